"""LoRA: the maths of merging by hand, the same numbers on any number of ranks, and the refusals."""

from __future__ import annotations

import asyncio
import random
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from chatlearn.algorithm.packing import pack
from chatlearn.errors import CheckpointError, TrainerError
from chatlearn.models.policy.fsdp import FSDPTrainer
from chatlearn.models.policy.loading import load_policy
from chatlearn.models.policy.lora import Lora, base_parameters, inject, merged_weights
from chatlearn.models.policy.trainer import PolicyTrainer, TrainerSettings
from chatlearn.types import Sample

peft = pytest.importorskip("peft")

SHAPE = {
    "vocab_size": 33,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}
CONFIG = Qwen3Config(**SHAPE)
LORA = Lora(rank=3, alpha=6.0, seed=5)  # two ranks have unequal rows of A
PLAIN = TrainerSettings(lr=1e-2, weight_decay=0.1, clip_grad=0.5, lora=LORA)
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("base")
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model of the same shape."""
    torch.manual_seed(1)
    made = tmp_path_factory.mktemp("other")
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(made)
    return made


def rows(count=7, seed=0):
    """Rows of mixed lengths, weights and masks, with made-up rollout logprobs near -log 33."""
    dice = random.Random(seed)
    made = []
    for i in range(count):
        length = dice.randint(2, 20)
        on = [False] + [dice.random() < 0.6 for _ in range(length - 2)] + [True]
        made.append(
            Sample(
                [dice.randrange(33) for _ in range(length)],
                on,
                [dice.gauss(-3.5, 0.3) if o else 0.0 for o in on],
                [dice.gauss(0, 1) if o else 0.0 for o in on],
                [1.0] * length,
                dice.choice([0.5, 1.0, 2.0]),
                f"g/{i}",
            )
        )
    return made


def one_process(folder, settings=PLAIN, **options):
    return PolicyTrainer(
        load_policy(folder, precision=settings.precision), None, settings, **options
    )


def take_step(trainer, samples, max_tokens=30):
    """One step with this rank's share of the batches: gradient before clipping, and metrics."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    caught, optimizer = {}, trainer._optimizer
    clip = optimizer.clip

    def catch(limit, norm):
        pairs = zip(optimizer.names, optimizer.masters, strict=True)
        caught.update((name, master.grad.clone()) for name, master in pairs)
        clip(limit, norm)

    optimizer.clip = catch
    metrics = asyncio.run(trainer.step(pack(samples, max_tokens, ranks=size)[rank::size]))
    optimizer.clip = clip
    return caught, metrics


def weights_of(trainer):
    if isinstance(trainer, FSDPTrainer):
        return {name: w.clone() for name, w in trainer.full_weights(torch.float32)}
    return {name: w.float().clone() for name, w in asyncio.run(trainer.weights())}


def logprobs_of(trainer):
    return torch.tensor([p for row in asyncio.run(trainer.logprobs(rows())) for p in row])


def train(trainer, steps):
    """Gradients of the last step (in the first A has none, as B is zero), metrics, weights."""
    every = [take_step(trainer, rows(seed=number)) for number in range(steps)]
    gradient = every[-1][0] if every else {}
    return gradient, [metrics for _, metrics in every], weights_of(trainer)


def assert_close(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(
            value, expected[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_merged_weight_by_hand():
    """W is 1 everywhere, A is [1, 2, 0, …], B is 0 but for its first row, 3; alpha / rank = 2."""
    model = AutoModelForCausalLM.from_config(CONFIG)
    inject(model, Lora(rank=1, alpha=2.0, target_modules=("layers.0.self_attn.q_proj",)))
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        layer.lora_A["default"].weight.zero_()[0, :2] = torch.tensor([1.0, 2.0])
        layer.lora_B["default"].weight.zero_()[0, 0] = 3.0
    merged = dict(merged_weights(model))["model.layers.0.self_attn.q_proj.weight"]
    assert merged[0, :3].tolist() == [7.0, 13.0, 1.0]
    assert merged[1:].eq(1.0).all()
    assert layer.base_layer.weight.eq(1.0).all()


def test_only_the_adapters_are_trained_and_the_base_keeps_its_bits(folder):
    trainer = one_process(folder)
    before = {name: p.clone() for name, p in base_parameters(trainer.model).items()}
    assert before.keys() == dict(load_policy(folder).named_parameters()).keys()
    train(trainer, steps=3)
    names = [
        f"model.layers.{i}.{block}.{kind}.{matrix}.default.weight"
        for i in range(2)
        for block, kinds in (("self_attn", KINDS[:4]), ("mlp", KINDS[4:]))
        for kind in kinds
        for matrix in ("lora_A", "lora_B")
    ]
    assert trainer._optimizer.names == names
    assert {n.partition(".")[2] for n in trainer._optimizer.state()} == set(names)
    for name, parameter in base_parameters(trainer.model).items():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None


def test_an_untrained_adapter_changes_nothing(folder):
    plain, lora = one_process(folder, replace(PLAIN, lora=None)), one_process(folder)
    assert asyncio.run(lora.logprobs(rows())) == asyncio.run(plain.logprobs(rows()))
    assert_close(weights_of(lora), weights_of(plain), tolerance=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_published_and_saved_is_what_was_trained(folder, tmp_path, precision):
    """Logprobs of the trainer, of the merged ``hf/``, and of the base with ``adapter/`` on it."""
    settings = replace(PLAIN, precision=precision)
    trainer = one_process(folder, settings)
    train(trainer, steps=3)
    assert {m.dtype for m in trainer._optimizer.parameters} == {torch.float32}
    asyncio.run(trainer.save(tmp_path))
    trained = logprobs_of(trainer)
    tolerance = 1e-5 if precision == "fp32" else 0.1  # of logprobs near -3.5

    base = one_process(folder, replace(settings, lora=None))
    untrained = logprobs_of(base)
    assert (trained - untrained).abs().max() > 5 * tolerance

    merged = one_process(tmp_path / "hf", replace(settings, lora=None))
    assert_close(weights_of(merged), weights_of(trainer), tolerance=0)
    got = logprobs_of(merged)
    assert (got - trained).abs().max() < tolerance

    model = load_policy(folder, precision=precision)
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    theirs = dict(loaded.merge_and_unload().named_parameters())
    got_weights = weights_of(trainer)
    assert theirs.keys() == got_weights.keys()
    for name, weight in theirs.items():
        close = 1e-6 if precision == "fp32" else 2e-2
        torch.testing.assert_close(weight.float(), got_weights[name], atol=close, rtol=close)


def test_the_weights_can_be_asked_for_as_often_as_one_likes(folder):
    trainer = one_process(folder)
    train(trainer, steps=1)
    weights = asyncio.run(trainer.weights())
    first, second = ({n: w.clone() for n, w in weights} for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_micro_batches_add_up_to_one(folder):
    """Law 3, for the gradient of the adapters."""
    first, second = one_process(folder), one_process(folder)
    train(first, steps=1)
    train(second, steps=1)
    one, _ = take_step(first, rows(seed=9), max_tokens=10_000)
    many, metrics = take_step(second, rows(seed=9), max_tokens=20)
    assert len(pack(rows(seed=9), 20)) > 3
    assert metrics["policy/grad_norm"] > 0
    assert_close(many, one, tolerance=1e-6)


def test_a_resumed_run_has_the_same_bits(folder, tmp_path):
    trainer = one_process(folder)
    take_step(trainer, rows())
    asyncio.run(trainer.save(tmp_path))
    take_step(trainer, rows(seed=1))
    resumed = one_process(folder)
    asyncio.run(resumed.restore(tmp_path))
    take_step(resumed, rows(seed=1))
    assert_close(weights_of(resumed), weights_of(trainer), tolerance=0)
    for name, value in trainer._optimizer.state().items():
        assert torch.equal(value, resumed._optimizer.state()[name]), name


def job_restore(folder, settings, saved):
    asyncio.run(ranked(folder, settings).restore(saved))


def test_adapters_are_taken_back_only_where_they_belong(folder, other, tmp_path, rank_pools):
    asyncio.run(one_process(folder).save(tmp_path / "one"))
    asyncio.run(one_process(folder, replace(PLAIN, lora=None)).save(tmp_path / "whole"))
    cases = {
        r"lora_alpha / lora_rank = 2, which is 4 now": (
            *(folder, replace(PLAIN, lora=replace(LORA, alpha=12.0)), "one"),
        ),
        r"were trained on another base": (other, PLAIN, "one"),
        r"only on one side": (folder, replace(PLAIN, lora=None), "one"),
        r"was written without LoRA": (folder, PLAIN, "whole"),
        r"of another model: .* has shape \[3, 16\]": (
            *(folder, replace(PLAIN, lora=replace(LORA, rank=2, alpha=4.0)), "one"),
        ),
    }
    for words, (base, settings, saved) in cases.items():
        with pytest.raises(CheckpointError, match=words):
            asyncio.run(one_process(base, settings).restore(tmp_path / saved))
    error, _ = rank_pools[2].fail(job_restore, folder=other, settings=PLAIN, saved=tmp_path / "one")
    assert "were trained on another base" in str(error)


def test_the_reference_is_the_base_without_a_second_model(folder):
    """Step by step the metrics of a run that was given the base as a model of its own."""
    settings = replace(PLAIN, kl_coef=0.3)
    alone = one_process(folder, settings)
    beside = one_process(folder, settings, reference=load_policy(folder))
    gradient, metrics, weights = train(alone, steps=3)
    expected = train(beside, steps=3)
    assert metrics[0]["policy/kl_ref"] == 0
    assert metrics[2]["policy/kl_ref"] > 1e-4
    assert_close(gradient, expected[0], tolerance=0)
    assert metrics[2]["policy/kl_ref"] == expected[1][2]["policy/kl_ref"]
    assert_close(weights, expected[2], tolerance=0)


def test_the_engine_of_this_process_samples_from_the_adapted_module(folder):
    """``is_shared``: what is published is the module's own memory, under its own names."""
    trainer = one_process(folder, is_shared=True)
    published = dict(asyncio.run(trainer.weights()))
    own = dict(trainer.model.named_parameters())
    assert published.keys() == own.keys()
    assert all(published[name].data_ptr() == own[name].data_ptr() for name in own)


# ---------------------------------------------------------------------- ranks


def ranked(folder, settings, **options):
    return FSDPTrainer(folder, None, settings, device="cpu", **options)


def job_train(folder, settings, steps, **options):
    return train(ranked(folder, settings, **options), steps)


CASES = {
    "plain": {},
    "some layers": {"lora": replace(LORA, target_modules=("q_proj", "layers.1.mlp.up_proj"))},
    "recomputed": {"gradient_checkpointing": True},
    "base as reference": {"kl_coef": 0.3},
}


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_makes_the_same_update(folder, rank_pools, case):
    settings = replace(PLAIN, **CASES[case])
    gradient, metrics, weights = train(one_process(folder, settings), steps=3)
    for pool in rank_pools.values():
        answers = pool.run(job_train, folder=folder, settings=settings, steps=3)
        parts = [answer[0] for answer in answers]
        assert_close({n: torch.cat([part[n] for part in parts]) for n in parts[0]}, gradient)
        for _, got, got_weights in answers:
            assert_close(got_weights, weights)
            for ours, theirs in zip(got, metrics, strict=True):
                assert ours.keys() == theirs.keys()
                for key in ("policy/loss", "policy/grad_norm", "policy/logprob_gap_mean"):
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


def job_other_reference(folder, settings, reference):
    return train(ranked(folder, settings, reference_path=reference), 2)


def test_a_reference_of_its_own_is_loaded_beside_the_adapters(folder, other, rank_pools):
    settings = replace(PLAIN, kl_coef=0.3)
    expected = train(one_process(folder, settings, reference=load_policy(other)), steps=2)
    for _, metrics, weights in rank_pools[2].run(
        job_other_reference, folder=folder, settings=settings, reference=other
    ):
        assert_close(weights, expected[2])
        assert metrics[0]["policy/kl_ref"] > 0.1


def job_bf16(folder, settings):
    trainer = ranked(folder, settings)
    held = {p.dtype for p in base_parameters(trainer.model).values()}
    return held, {m.dtype for m in trainer._optimizer.masters}, train(trainer, 3)


def test_bf16_ranks_hold_the_base_in_bf16_and_the_adapters_in_fp32(folder, rank_pools):
    settings = replace(PLAIN, precision="bf16")
    _, metrics, weights = train(one_process(folder, settings), steps=3)
    for held, masters, (_, got, got_weights) in rank_pools[2].run(
        job_bf16, folder=folder, settings=settings
    ):
        assert held == {torch.bfloat16}
        assert masters == {torch.float32}
        assert_close(got_weights, weights, tolerance=2e-2)
        for key in ("policy/loss", "policy/logprob_gap_mean"):
            assert got[2][key] == pytest.approx(metrics[2][key], rel=5e-2, abs=5e-3), key


def job_save(folder, target):
    """A step, a checkpoint, a step; the same from the checkpoint; and offloaded in between."""
    trainer = ranked(folder, PLAIN)
    take_step(trainer, rows())
    asyncio.run(trainer.save(target))
    trainer.offload(weights=True, gradients=True, optimizer=True)
    held = sum(p.detach().to_local().untyped_storage().nbytes() for p in trainer.model.parameters())
    trainer.onload(weights=True, gradients=True, optimizer=True)
    take_step(trainer, rows(seed=1))
    resumed = ranked(folder, PLAIN)
    asyncio.run(resumed.restore(target))
    take_step(resumed, rows(seed=1))
    return held, weights_of(trainer), weights_of(resumed)


def test_ranks_save_resume_and_offload(folder, tmp_path, rank_pools):
    one = one_process(folder)
    take_step(one, rows())
    saved = weights_of(one)
    for held, went_on, resumed in rank_pools[2].run(job_save, folder=folder, target=tmp_path):
        assert held == 0
        assert_close(resumed, went_on, tolerance=0)
    assert_close(weights_of(one_process(tmp_path / "hf", replace(PLAIN, lora=None))), saved)
    model = peft.PeftModel.from_pretrained(load_policy(folder), str(tmp_path / "adapter"))
    assert_close({n: p.detach() for n, p in model.merge_and_unload().named_parameters()}, saved)


def job_experts(folder, target):
    trainer = ranked(folder, PLAIN)
    train(trainer, steps=2)
    asyncio.run(trainer.save(target))


def test_a_mixture_of_experts_keeps_its_experts_and_is_stored_as_it_was(tmp_path, rank_pools):
    """transformers computes with other tensors than such a model's files have."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    trainer = one_process(tmp_path / "base")
    assert {name.split(".")[-4] for name in trainer._optimizer.names} == set(KINDS[:4])
    train(trainer, steps=2)
    asyncio.run(trainer.save(tmp_path / "one"))
    rank_pools[2].run(job_experts, folder=tmp_path / "base", target=tmp_path / "ranks")
    base, one, ranks = (
        load_file(tmp_path / where / "model.safetensors")
        for where in ("base", "one/hf", "ranks/hf")
    )
    assert base.keys() == one.keys() == ranks.keys()
    assert_close(ranks, one)
    moved = {name.split(".")[-2] for name in base if not torch.equal(base[name], one[name])}
    assert moved == set(KINDS[:4])


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("q_proj", "qkv"), r"no linear layer 'qkv'\. It has down_proj, gate_proj, .*all-linear"),
        ((), r"is \[\], but Qwen3ForCausalLM has no linear layer of no name"),
        (("lm_head",), r"'lm_head', whose weights are also the input embeddings"),
        (("input_layernorm",), r"no linear layer 'input_layernorm'"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused_with_those_that_can(targets, words):
    with pytest.raises(TrainerError, match=words):
        inject(AutoModelForCausalLM.from_config(CONFIG), Lora(rank=2, target_modules=targets))


@pytest.mark.parametrize("numbers", [{"rank": -1}, {"rank": 0}, {"rank": 2, "alpha": 0.0}])
def test_a_rank_or_alpha_below_its_least_is_refused(numbers):
    with pytest.raises(TrainerError, match=r"both must be above 0\. Set models\.policy_trainer\."):
        Lora(**numbers)


def test_a_rank_that_is_the_only_one_to_fail_ends_all(folder, rank_pools):
    settings = replace(PLAIN, lora=Lora(rank=2, target_modules=("nothing",)))
    for error in rank_pools[2].fail(job_train, folder=folder, settings=settings, steps=0):
        assert isinstance(error, TrainerError)
        assert "no linear layer 'nothing'" in str(error)


def test_without_peft_the_extra_is_named(tmp_path):
    """In a process whose ``peft`` cannot be imported, as where it is not installed."""
    import subprocess

    (tmp_path / "peft.py").write_text("raise ImportError('No module named peft')\n")
    script = (
        "from transformers import AutoModelForCausalLM, Qwen3Config\n"
        "from chatlearn.errors import TrainerError\n"
        "from chatlearn.models.policy.lora import Lora, inject\n"
        "model = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=8, hidden_size=8,\n"
        "    num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8,\n"
        "    intermediate_size=8))\n"
        "try:\n    inject(model, Lora(rank=2))\n"
        "except TrainerError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "lora_rank is 2, and LoRA needs peft" in done.stdout
    assert "Install chatlearn[lora], or set models.policy_trainer.lora_rank=0" in done.stdout
