"""FSDP2 over gloo, in real processes: the same numbers as one process, however many ranks."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from chatlearn.algorithm.packing import pack
from chatlearn.errors import TrainerError
from chatlearn.models.policy.fsdp import FSDPTrainer
from chatlearn.models.policy.loading import load_policy
from chatlearn.models.policy.trainer import PolicyTrainer, TrainerSettings
from chatlearn.types import Sample

SHAPE = {
    "vocab_size": 33,  # odd: two ranks have unequal shards
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
}
CONFIGS = {
    "tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    # matrices of one row: the second of two ranks has none of it
    "untied": LlamaConfig(**SHAPE | {"intermediate_size": 1}, tie_word_embeddings=False),
}
PLAIN = TrainerSettings(lr=1e-3, weight_decay=0.1, clip_grad=0.5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny models by name, and ``other``, of the shape of ``tied``."""
    made = {}
    for seed, (name, config) in enumerate({**CONFIGS, "other": CONFIGS["tied"]}.items()):
        torch.manual_seed(seed)
        made[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    made["bf16"] = tmp_path_factory.mktemp("bf16")
    load_policy(made["tied"], precision="bf16").save_pretrained(made["bf16"])
    return made


def rows(count=7, seed=0):
    """Rows of mixed lengths, weights and masks, with made-up rollout logprobs near -log 33.

    Runs of eight tokens have one temperature: some micro-batches have one, others have several.
    """
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
                [(0.7, 1.0, 1.3)[(i + j // 8) % 3] for j in range(length)],
                dice.choice([0.5, 1.0, 2.0]),
                f"g/{i}",
            )
        )
    return made


def one_process(folder, settings, reference=None):
    def load(path):
        return load_policy(path, precision=settings.precision)

    return PolicyTrainer(load(folder), None, settings, reference=reference and load(reference))


def ranked(folder, settings, reference=None, **options):
    return FSDPTrainer(folder, None, settings, device="cpu", reference_path=reference, **options)


def take_step(trainer, samples, max_tokens=30):
    """One step with this rank's share of the batches: gradient before clipping, and metrics."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    caught = {}
    optimizer = trainer._optimizer
    clip = optimizer.clip

    def catch(limit, norm):
        pairs = zip(optimizer.names, optimizer.masters, strict=True)
        caught.update((name, master.grad.clone()) for name, master in pairs)
        clip(limit, norm)

    optimizer.clip = catch
    metrics = asyncio.run(trainer.step(pack(samples, max_tokens, ranks=size)[rank::size]))
    optimizer.clip = clip
    return caught, metrics


def train(trainer, steps, count=7):
    """Gradients of the first step, metrics of all, and the weights after them."""
    gradient, all_metrics = {}, []
    for number in range(steps):
        caught, metrics = take_step(trainer, rows(count, seed=number))
        gradient = gradient or caught
        all_metrics.append(metrics)
    if isinstance(trainer, FSDPTrainer):
        weights = {n: w.clone() for n, w in trainer.full_weights(torch.float32)}
    else:
        weights = {n: w.detach().float() for n, w in trainer.model.named_parameters()}
    return gradient, all_metrics, weights


def job_train(folder, settings, steps, count=7, reference=None, **options):
    return train(ranked(folder, settings, reference, **options), steps, count)


def whole(parts):
    """Gradients by rank, each its own rows, laid together."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def assert_close(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(
            value, expected[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_run(answers, expected, *, leave_out=("memory/peak_gb",)):
    gradient, metrics, weights = expected
    assert_close(whole([answer[0] for answer in answers]), gradient)
    for _, got, got_weights in answers:
        assert_close(got_weights, weights)
        assert got == answers[0][1]  # every rank tells the same
        for ours, theirs in zip(got, metrics, strict=True):
            assert ours.keys() == theirs.keys()
            for key in theirs.keys() - set(leave_out):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


CASES = {
    "tied": ("tied", {}),
    "untied": ("untied", {"entropy_coef": 0.05}),
    "reference": ("tied", {"kl_coef": 0.1, "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_makes_the_same_update(folders, rank_pools, case):
    name, changes = CASES[case]
    settings = replace(PLAIN, **changes)
    reference = folders["other"] if settings.kl_coef else None
    expected = train(one_process(folders[name], settings, reference), steps=2)
    for pool in rank_pools.values():
        answers = pool.run(
            job_train,
            folder=folders[name],
            settings=settings,
            steps=2,
            reference=reference,
            offload_reference=True,
        )
        assert_same_run(answers, expected)


def test_ranks_without_a_row_are_given_nothing_to_train(folders, rank_pools):
    """One row on two ranks: the other computes a row of two tokens, without gradient."""
    expected = train(one_process(folders["tied"], PLAIN), steps=1, count=1)
    answers = rank_pools[2].run(job_train, folder=folders["tied"], settings=PLAIN, steps=1, count=1)
    more = ("memory/peak_gb", "tokens/computed", "tokens/computed_per_distinct")
    assert_same_run(answers, expected, leave_out=more)
    assert answers[0][1][0]["tokens/computed"] == expected[1][0]["tokens/computed"] + 2


def test_bf16_gathers_rounded_masters(folders, rank_pools):
    """As one process does: bf16 forward, gradients summed in fp32, fp32 masters moved."""
    settings = replace(PLAIN, precision="bf16", kl_coef=0.1)
    gradient, metrics, _ = train(one_process(folders["bf16"], settings, folders["other"]), steps=2)
    weights = train(one_process(folders["bf16"], PLAIN), steps=0)[2]
    for pool in rank_pools.values():
        answers = pool.run(
            job_train,
            folder=folders["bf16"],
            settings=settings,
            steps=2,
            reference=folders["other"],
        )
        got = whole([answer[0] for answer in answers])
        for name, value in got.items():
            assert value.dtype == torch.float32
            distance = (value - gradient[name]).norm() / gradient[name].norm()
            assert distance < 2e-2, name
        for ours, theirs in zip(answers[0][1], metrics, strict=True):
            for key in ("policy/loss", "policy/kl_ref", "policy/logprob_gap_mean"):
                assert ours[key] == pytest.approx(theirs[key], rel=2e-2, abs=2e-3), key
        moved = [(answers[0][2][n] - w).abs().max() for n, w in weights.items()]
        assert min(moved) > 1e-4  # and bf16 alone could not move a norm weight of 1.0 by 1e-3
        assert max(moved) < 1e-2


def job_logprobs(folder, counts):
    rank = dist.get_rank()
    trainer = ranked(folder, PLAIN)
    samples = [*rows(counts[rank], seed=rank), Sample([5], [False], [0.0], [0.0])]
    return asyncio.run(trainer.logprobs(samples))


def test_logprobs_of_unequally_many_samples(folders, rank_pools):
    counts = [1, 700]  # together above and below one forward
    policy = one_process(folders["untied"], PLAIN)
    answers = rank_pools[2].run(job_logprobs, folder=folders["untied"], counts=counts)
    for rank, (count, got) in enumerate(zip(counts, answers, strict=True)):
        samples = [*rows(count, seed=rank), Sample([5], [False], [0.0], [0.0])]
        expected = asyncio.run(policy.logprobs(samples))
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def job_not_finite(folder, where):
    """Rank 1 has a bad number; then the same trainer makes a good step."""
    trainer = ranked(folder, PLAIN)
    before = [w.clone() for _, w in trainer.full_weights()]
    batches = pack(rows(), 30, ranks=2)[dist.get_rank() :: 2]
    parameter = dict(trainer.model.named_parameters())["model.norm.weight"]
    if where == "loss" and dist.get_rank() == 1:
        at = -1
        good = batches[0].rollout_logprobs[at].item()
        batches[0].rollout_logprobs[at] = float("nan")
    hook = None
    if where == "gradient":
        head = trainer.model.lm_head
        times = float("inf") if dist.get_rank() == 1 else 1.0
        hook = head.register_full_backward_hook(lambda m, i, o: (i[0] * times,))
    with pytest.raises(TrainerError) as caught:
        asyncio.run(trainer.step(batches))
    if hook is not None:
        hook.remove()
    after = [w.clone() for _, w in trainer.full_weights()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trainer.updates == 0
    assert parameter.grad is None
    if where == "loss" and dist.get_rank() == 1:
        batches[0].rollout_logprobs[at] = good
    asyncio.run(trainer.step(batches))
    return str(caught.value)


def test_a_bad_number_on_one_rank_ends_the_step_on_all(folders, rank_pools):
    words = rank_pools[2].run(job_not_finite, folder=folders["tied"], where="loss")
    assert words[0] == words[1]
    assert "not finite; no update was made" in words[0]
    assert "'g/" in words[0]
    assert "(rank 1, micro-batch 0)" in words[0]
    words = rank_pools[2].run(job_not_finite, folder=folders["tied"], where="gradient")
    assert words[0] == words[1]
    assert "The loss is finite but the gradient" in words[0]


def job_unequal(folder, batches_by_rank):
    asyncio.run(ranked(folder, PLAIN).step(batches_by_rank[dist.get_rank()]))


def test_shares_that_would_hang_are_refused(folders, rank_pools):
    batches = pack(rows(), 30)
    cases = {
        "equally many micro-batches.*2 of weight .*, 1 of weight": [batches[:2], batches[:1]],
        "one denominator": [pack(rows(3), 90), pack(rows(4), 90)],
        "no trained token": [[], []],
    }
    for words, shares in cases.items():
        for error in rank_pools[2].fail(
            job_unequal, folder=folders["tied"], batches_by_rank=shares
        ):
            assert isinstance(error, TrainerError)
            with pytest.raises(TrainerError, match=words):
                raise error


def job_offload(folder):
    """Offloaded and back between two steps: the bits of a trainer that was left alone."""
    runs = []
    for away in (False, True):
        trainer = ranked(folder, PLAIN)
        take_step(trainer, rows())
        parts = {"weights": True, "gradients": True, "optimizer": True}
        if away:
            asyncio.run(trainer.logprobs(rows(2)))
            trainer.offload(**parts)
            held = [*trainer._optimizer.masters, *trainer._optimizer.moments()]
            assert sum(t.untyped_storage().nbytes() for t in held) == 0
            trainer.offload(**parts)  # again: harmless
            for use in (
                lambda t: asyncio.run(t.step([])),
                lambda t: asyncio.run(t.logprobs([])),
                lambda t: next(t.full_weights()),
            ):
                with pytest.raises(TrainerError, match=r"weights.* offloaded.*onload"):
                    use(trainer)
            trainer.onload(weights=True, gradients=False, optimizer=False)
            sum(1 for _ in trainer.full_weights())  # what a publish needs
            trainer.onload(**parts)
        take_step(trainer, rows(seed=1))
        runs.append([w.clone() for _, w in trainer.full_weights()])
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_offloading_changes_nothing(folders, rank_pools):
    assert all(rank_pools[2].run(job_offload, folder=folders["tied"]))


def job_invariants(folder):
    """What the optimizer and the offloading rely on in FSDP."""
    trainer = ranked(folder, PLAIN)
    take_step(trainer, rows())
    asyncio.run(trainer.logprobs(rows(2)))
    parameters = trainer._optimizer.parameters
    return [
        p.to_local().untyped_storage().data_ptr() == m.untyped_storage().data_ptr()
        for p, m in zip(parameters, trainer._optimizer.masters, strict=True)
    ]


def test_masters_are_the_shards_themselves(folders, rank_pools):
    for same in rank_pools[2].run(job_invariants, folder=folders["tied"]):
        assert same
        assert all(same)
