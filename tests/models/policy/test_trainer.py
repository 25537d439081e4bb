"""The trainer: its gradient against a textbook one, law 3, checkpoints to the bit, and learning."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GraniteConfig,
    OPTConfig,
    Qwen3Config,
)

from chatlearn.algorithm.packing import collate, pack, total_weight
from chatlearn.errors import CheckpointError, TrainerError
from chatlearn.models.policy import token_logprobs
from chatlearn.models.policy.fsdp import FSDPTrainer
from chatlearn.models.policy.optimizer import Schedule
from chatlearn.models.policy.trainer import PolicyTrainer, TrainerSettings
from chatlearn.types import Sample

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = TrainerSettings(lr=1e-3, weight_decay=0.0)


def tiny(seed=0, dtype=torch.float32, config=None):
    torch.manual_seed(seed)
    config = config or Qwen3Config(**SHAPE, tie_word_embeddings=True, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def trainer(model, config=PLAIN, **changes):
    return PolicyTrainer(model, None, replace(config, **changes))


def samples(count=6, seed=0, temperatures=(0.7,)):
    """Rows of mixed lengths, weights and masks, with made-up rollout logprobs near -log 32.

    Runs of four tokens have the same temperature, so that with several of them some rows have one
    and others have more.
    """
    dice = random.Random(seed)
    made = []
    for i in range(count):
        length = dice.randint(2, 20)
        on = [False] + [dice.random() < 0.6 for _ in range(length - 2)] + [True]
        made.append(
            Sample(
                [dice.randrange(32) for _ in range(length)],
                on,
                [dice.gauss(-3.5, 0.3) if o else 0.0 for o in on],
                [dice.gauss(0, 1) if o else 0.0 for o in on],
                [temperatures[(i + j // 4) % len(temperatures)] for j in range(length)],
                dice.choice([0.5, 1.0, 2.0]),
                f"g/{i}",
            )
        )
    return made


def step(policy, batches):
    return asyncio.run(policy.step(batches))


def step_gradient(policy, batches):
    """The gradient of one step by parameter name, caught before the optimizer clips it."""
    caught = {}
    clip = policy._optimizer.clip
    policy._optimizer.clip = lambda limit, norm: (
        caught.update(
            (n, m.grad.clone())
            for n, m in zip(policy._optimizer.names, policy._optimizer.masters, strict=True)
        ),
        clip(limit, norm),
    )
    metrics = step(policy, batches)
    policy._optimizer.clip = clip
    return caught, metrics


def textbook_gradient(model, rows, config, reference=None):
    """One row at a time, full logits, the formulas of the papers written out."""
    total = 0.0
    for row in rows:
        ids = torch.tensor(row.token_ids)
        divisors = torch.tensor(row.temperatures)[1:, None]
        every = torch.log_softmax(model(ids[None]).logits[0, :-1] / divisors, -1)
        policy = every.gather(1, ids[1:, None])[:, 0]
        on = torch.tensor(row.loss_mask)[1:]
        advantage = torch.tensor(row.advantages)[1:]
        ratio = (policy - torch.tensor(row.rollout_logprobs)[1:]).exp()
        bounded = ratio.clamp(1 - config.neg_clip_ratio, 1 + config.pos_clip_ratio)
        loss = -torch.minimum(ratio * advantage, bounded * advantage)
        if reference is not None:
            with torch.no_grad():
                ref = torch.log_softmax(reference(ids[None]).logits[0, :-1] / divisors, -1)
            gap = ref.gather(1, ids[1:, None])[:, 0] - policy
            loss = loss + config.kl_coef * (gap.exp() - 1 - gap)
        loss = loss - config.entropy_coef * -(every.exp() * every).sum(-1)
        total = total + row.weight * loss[on].sum()
    (total / total_weight(rows)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(
            gradient, expected[name], atol=tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("temperatures", [(0.7,), (0.5, 1.0, 1.6)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pieces", [1, 7])
def test_the_gradient_is_the_textbook_one(checkpointing, pieces, temperatures, monkeypatch):
    """With every term on, recomputed or not, the head in one piece or in many, each token at its
    own temperature."""
    if pieces > 1:
        monkeypatch.setattr(token_logprobs, "_LOGITS_AT_ONCE", 32 * 7)
    config = replace(PLAIN, kl_coef=0.1, entropy_coef=0.05, gradient_checkpointing=checkpointing)
    policy = PolicyTrainer(tiny(), None, config, reference=tiny(1))
    rows = samples(temperatures=temperatures)
    got, metrics = step_gradient(policy, pack(rows, 40))
    assert_same(got, textbook_gradient(tiny(), rows, config, tiny(1)))
    norm = torch.stack([g.norm() for g in got.values()]).norm().item()
    assert metrics["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["policy/kl_ref"] > 0
    assert 0 < metrics["policy/entropy"] < 3.47  # log 32


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_law_3_however_rows_are_cut_the_gradient_is_the_same(data):
    temperatures = data.draw(st.sampled_from([(0.7,), (0.6, 1.0, 1.4)]))
    rows = samples(5, data.draw(st.integers(0, 3)), temperatures)
    denominator = total_weight(rows)
    shuffled = data.draw(st.permutations(rows))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1))))
    edges = [0, *cuts, len(rows)]
    by_hand = [collate(shuffled[a:b], denominator) for a, b in pairwise(edges)]
    by_pack = pack(rows, data.draw(st.integers(20, 100)))
    whole, metrics = step_gradient(trainer(tiny()), [collate(rows, denominator)])
    for batches in (by_hand, by_pack):
        got, again = step_gradient(trainer(tiny()), batches)
        assert_same(got, whole)
        for key in metrics.keys() - {"memory/peak_gb"}:
            assert again[key] == pytest.approx(metrics[key], rel=1e-3, abs=1e-5), key


def test_a_forked_row_weighs_as_its_tokens_do():
    """
    One row [ p | C0 | t | C1 ] or two, [ p | C0 ] and [ p | C0 as context | t | C1 ]: law 3.
    """
    ids, logprob, advantage = [3, 4, 5, 6, 7], -3.0, 0.5

    def row(mask, n):
        on = [c == "x" for c in mask]
        return Sample(
            ids[:n],
            on,
            [logprob * o for o in on],
            [advantage * o for o in on],
            [0.7 if o else 1.0 for o in on],
            trajectory="g/0",
        )

    one, _ = step_gradient(trainer(tiny()), pack([row(".xx.x", 5)], 50))
    two, _ = step_gradient(trainer(tiny()), pack([row(".xx", 3), row("....x", 5)], 50))
    assert_same(one, two)


def test_metrics_by_hand():
    """Two trained tokens; the engine's numbers are the trainer's own, then one is off by 1."""
    policy = trainer(tiny())
    row = Sample([3, 4, 5], [False, True, True], [0.0] * 3, [0.0, 1.0, 1.0])
    [[_, first, second]] = asyncio.run(policy.logprobs([row]))
    row.rollout_logprobs = [0.0, first, second - 1.0]
    got = step(policy, pack([row], 10))
    assert got["policy/logprob_gap_max"] == pytest.approx(1.0, abs=1e-5)
    assert got["policy/logprob_gap_mean"] == pytest.approx(0.5, abs=1e-5)
    assert got["policy/ratio_max"] == pytest.approx(2.71828, rel=1e-4)
    assert got["policy/clip_fraction_high"] == 0.5
    assert got["policy/clip_fraction_low"] == 0.0
    assert got["policy/loss"] == pytest.approx(-(1.0 + 1.2) / 2, rel=1e-5)
    assert got["policy/entropy_estimate"] == pytest.approx(-(first + second) / 2, rel=1e-5)
    assert got["policy/lr"] == PLAIN.lr
    assert (got["tokens/trained"], got["tokens/computed"]) == (2.0, 3.0)
    assert got["memory/peak_gb"] > 0
    assert not {"policy/kl_ref", "policy/entropy"} & got.keys()


def test_logprobs_are_of_each_token_in_order(monkeypatch):
    monkeypatch.setattr("chatlearn.models.policy.row_logprobs._SCORED_AT_ONCE", 25)
    rows = [*samples(7, temperatures=(0.7, 1.0, 1.3)), Sample([5], [False], [0.0], [0.0])]
    model = tiny()
    got = asyncio.run(trainer(model).logprobs(rows))
    for row, logprobs in zip(rows, got, strict=True):
        ids = torch.tensor(row.token_ids)
        divisors = torch.tensor(row.temperatures)[1:, None]
        every = torch.log_softmax(model(ids[None]).logits[0, :-1] / divisors, -1)
        expected = [0.0, *every.gather(1, ids[1:, None])[:, 0].tolist()]
        assert logprobs == pytest.approx(expected, abs=1e-5)


def test_one_temperature_is_a_number_and_several_are_a_row():
    """Of the trained tokens only: what context was sampled at does not matter."""
    policy = trainer(tiny())

    def given(*temperatures):
        on = [False, *[True] * (len(temperatures) - 1)]
        zeros = [0.0] * len(on)
        row = Sample([3] * len(on), on, zeros, zeros, list(temperatures))
        return policy._place(collate([row], 1.0)).temperature

    assert given(1.0, 0.5, 0.5) == 0.5
    assert given(0.3, 1.0) == 1.0
    assert given(0.7) == 1.0  # nothing is scored
    assert given(1.0, 0.5, 0.25).tolist() == [0.5, 0.25]


def test_a_greedy_token_is_not_divided_by_nothing():
    row = Sample([3, 4], [False, True], [0.0] * 2, [0.0, 1.0], [1.0, 0.0], trajectory="train:4/1")
    with pytest.raises(TrainerError, match=r"train:4/1.*models\.policy\.temperature"):
        asyncio.run(trainer(tiny()).logprobs([row]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_restored_trainer_goes_on_to_the_same_bits(tmp_path, precision):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    config = replace(
        PLAIN, precision=precision, lr_schedule="cosine", total_steps=5, warmup_steps=1
    )
    batches = pack(samples(), 40)
    first = trainer(tiny(0, dtype), config)
    for _ in range(2):
        step(first, batches)
    asyncio.run(first.save(tmp_path))
    noise = torch.rand(3)
    ended = [step(first, batches) for _ in range(2)]

    second = trainer(tiny(1, dtype), config)
    held = [p.data_ptr() for p in second.model.parameters()]
    step(second, batches)  # its moments and its step count must not survive
    asyncio.run(second.restore(tmp_path))
    assert torch.equal(torch.rand(3), noise)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=dtype)
    for (name, p), q in zip(loaded.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    again = [step(second, batches) for _ in range(2)]
    for a, b in zip(ended, again, strict=True):
        a.pop("memory/peak_gb"), b.pop("memory/peak_gb")
        assert a == b
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)
    # the engine samples from the same tensors: they were written, never replaced
    assert [p.data_ptr() for p in second.model.parameters()] == held


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    asyncio.run(trainer(tiny()).save(tmp_path))
    wide = tiny(config=Qwen3Config(**SHAPE | {"intermediate_size": 40}, tie_word_embeddings=True))
    deep = tiny(config=Qwen3Config(**SHAPE | {"num_hidden_layers": 3}, tie_word_embeddings=True))
    for other, words in ((wide, r"shape \[24, 16\] there and \[40, 16\]"), (deep, "layers.2")):
        with pytest.raises(CheckpointError, match=words):
            asyncio.run(trainer(other).restore(tmp_path))
    numbers = tmp_path / "state" / "trainer.json"
    assert json.loads(numbers.read_text()) == {"updates": 0}
    (tmp_path / "state" / "trainer.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="cannot be read"):
        asyncio.run(trainer(tiny()).restore(tmp_path))
    numbers.unlink()
    with pytest.raises(CheckpointError, match=r"trainer\.json is missing"):
        asyncio.run(trainer(tiny()).restore(tmp_path))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_rewarded_becomes_likelier(precision):
    """A bandit: token 7 after [3 4] is good, token 9 is bad, and the two are in one step."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    policy = trainer(tiny(0, dtype), precision=precision, lr=1e-2)

    def arms(logprobs):
        return [
            Sample([3, 4, arm], [False, False, True], [0.0, 0.0, p], [0.0, 0.0, advantage])
            for arm, p, advantage in zip((7, 9), logprobs, (1.0, -1.0), strict=True)
        ]

    def now():
        rows = asyncio.run(policy.logprobs(arms((0.0, 0.0))))
        return [row[-1] for row in rows]

    before = now()
    for _ in range(20):
        step(policy, pack(arms(now()), 10))
    good, bad = now()
    assert good > before[0] + 1.0
    assert bad < before[1] - 1.0


def test_masters_keep_what_bf16_would_lose():
    """A norm weight is 1.0; bf16 cannot step by 1e-3 from there (its spacing is 1/128)."""
    model = tiny(0, torch.bfloat16)
    policy = trainer(model, precision="bf16", lr=1e-3)
    norms = [p for name, p in model.named_parameters() if name.endswith("layernorm.weight")]
    batches = pack(samples(), 40)
    step(policy, batches)
    assert all((p == 1).all() for p in norms)
    for _ in range(7):
        step(policy, batches)
    assert any((p != 1).any() for p in norms)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_bf16_sums_gradients_in_fp32():
    """256 equal micro-batches: a bf16 sum of their gradients stops growing half-way."""
    row = samples(1)[0]
    batches = [collate([row], 256 * total_weight([row]))] * 256
    many, _ = step_gradient(trainer(tiny(0, torch.bfloat16), precision="bf16"), batches)
    one, _ = step_gradient(trainer(tiny(0, torch.bfloat16), precision="bf16"), pack([row], 40))
    for name, gradient in many.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, one[name], atol=2e-3, rtol=2e-2)


def test_the_same_inputs_give_the_same_bits():
    runs = []
    for _ in range(2):
        policy = trainer(tiny())
        for _ in range(3):
            step(policy, pack(samples(), 40))
        runs.append([p.detach().clone() for p in policy.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_loss_that_is_not_finite_updates_nothing_and_names_the_row():
    model = tiny()
    policy = trainer(model)
    before = [p.detach().clone() for p in model.parameters()]
    rows = [Sample([3] * 5, [False] * 4 + [True], [-3.0] * 5, [0.5] * 5) for _ in range(3)]
    rows[1].rollout_logprobs[4] = float("nan")
    with pytest.raises(TrainerError, match=r"micro-batch 0\), token 4 of its row \(id 3\)"):
        step(policy, pack(rows, 50))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert policy.updates == 0
    rows[1].rollout_logprobs[4] = -3.0
    step(policy, pack(rows, 50))  # and it goes on


def test_a_gradient_that_is_not_finite_names_the_parameter():
    policy = trainer(tiny())
    target = dict(policy.model.named_parameters())["model.norm.weight"]
    hook = target.register_hook(lambda gradient: gradient * float("inf"))
    before = target.detach().clone()
    with pytest.raises(TrainerError, match=r"1 parameters is not, of model\.norm\.weight"):
        step(policy, pack(samples(), 40))
    assert torch.equal(target, before)
    hook.remove()
    step(policy, pack(samples(), 40))


def test_a_step_needs_a_trained_token():
    empty = Sample([1, 2], [False, False], [0.0, 0.0], [0.0, 0.0])
    for batches in ([], pack([empty], 10)):
        with pytest.raises(TrainerError, match="no trained token"):
            step(trainer(tiny()), batches)


def test_the_model_is_left_as_the_engine_knows_it():
    policy = trainer(tiny(), gradient_checkpointing=True)
    model = policy.model
    before = (model.config._attn_implementation, [m.training for m in model.modules()])
    step(policy, pack(samples(), 40))
    assert before == (model.config._attn_implementation, [m.training for m in model.modules()])
    assert not any(before[1])
    weights = asyncio.run(policy.weights())
    names = [name for name, _ in weights]
    assert names == [name for name, _ in weights]  # as often as they are asked for
    assert policy.ranks == 1
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names  # tied: once


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**SHAPE, logits_scaling=4.0),
        CohereConfig(**SHAPE, logit_scale=0.5),
        Gemma3TextConfig(**SHAPE, sliding_window=4, final_logit_softcapping=5.0),
    ],
    ids=lambda config: config.model_type,
)
def test_heads_that_scale_or_cap_their_logits(config):
    rows = samples()
    got, _ = step_gradient(trainer(tiny(config=config)), pack(rows, 40))
    assert_same(got, textbook_gradient(tiny(config=config).eval(), rows, PLAIN))


def test_models_that_would_train_on_wrong_numbers_are_refused():
    model = tiny()
    model.lm_head.register_forward_hook(
        lambda module, inputs, out: out * 2 if inputs[0].dim() == 3 else out
    )
    with pytest.raises(TrainerError, match="do more than packed training knows"):
        trainer(model)

    opt = OPTConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, ffn_dim=8, dropout=0.5)
    opt.num_attention_heads, opt.word_embed_proj_dim = 2, 16
    trainer(tiny(config=opt))
    with pytest.raises(TrainerError, match="do more"):  # its layers drop out when recomputed
        trainer(tiny(config=opt), gradient_checkpointing=True)

    hybrid = tiny()
    hybrid.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(TrainerError, match="linear_attention layers"):
        trainer(hybrid)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(TrainerError, match="'fp8'"):
        TrainerSettings(precision="fp8")
    with pytest.raises(TrainerError, match="no reference"):
        trainer(tiny(), kl_coef=0.1)
    with pytest.raises(TrainerError, match=r"load_policy\(\.\.\., precision='bf16'\)"):
        trainer(tiny(), precision="bf16")
    with pytest.raises(TrainerError, match="total_steps"):
        trainer(tiny(), lr_schedule="linear")
    with pytest.raises(TrainerError, match="lr_schedule is 'step'"):
        trainer(tiny(), lr_schedule="step")


def test_schedules_by_hand():
    shape = {"lr": 1.0, "min_lr": 0.2, "warmup_steps": 2, "total_steps": 6}
    expected = {
        "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        "linear": [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2],
        "cosine": [0.5, 1.0, 1.0, 0.882843, 0.6, 0.317157, 0.2, 0.2],
    }
    for kind, rates in expected.items():
        schedule = Schedule(**shape, kind=kind)
        assert [schedule.at(n) for n in range(8)] == pytest.approx(rates, abs=1e-6), kind


def two_rows_each(count=3):
    """Rows of rollouts whose other row is in another micro-batch, and on another rank."""
    return [replace(row, trajectory=f"g/{i % count}") for i, row in enumerate(samples(2 * count))]


OVER_ROLLOUTS = {
    "gspo": replace(PLAIN, loss="gspo", lr=0.0),
    "gmpo": replace(PLAIN, loss="gmpo", lr=0.0),
    "mask": replace(PLAIN, correction="sequence-mask", correction_low=0.9, lr=0.0),
}


def job_over_rollouts(folder, config):
    policy = FSDPTrainer(folder, None, config, device="cpu")
    rank, size = policy._ranks.rank, policy._ranks.size
    return step_gradient(policy, pack(two_rows_each(), 22, ranks=size)[rank::size])


@pytest.mark.parametrize("case", OVER_ROLLOUTS)
def test_ratios_of_rollouts_that_lie_on_several_ranks(rank_pools, tmp_path, case):
    """FSDP2 in two processes against one forward of everything."""
    tiny().save_pretrained(tmp_path)
    config = OVER_ROLLOUTS[case]
    expected, metrics = step_gradient(trainer(tiny(), config), pack(two_rows_each(), 200))
    answers = rank_pools[2].run(job_over_rollouts, folder=str(tmp_path), config=config)
    got = {name: torch.cat([gradient[name] for gradient, _ in answers]) for name in answers[0][0]}
    assert_same(got, expected)
    for _, theirs in answers:
        for key in ("policy/loss", "policy/ratio_max", "policy/effective_sample_size"):
            assert theirs[key] == pytest.approx(metrics[key], rel=1e-4), key


def test_a_rollout_whole_in_one_micro_batch_needs_no_second_forward():
    calls = []
    policy = trainer(tiny(), loss="gspo")
    forward = policy._policy.hidden
    policy._policy.hidden = lambda *inputs: calls.append(1) or forward(*inputs)
    step(policy, pack(two_rows_each(), 200))
    assert len(calls) == 1
    calls.clear()
    batches = pack(two_rows_each(), 22)
    step(policy, batches)
    assert len(batches) < len(calls) <= 2 * len(batches)


def test_health_metrics_by_hand():
    """Two tokens whose ratios are 1 and 1/2: KL by k3 is the mean of 0 and 1/2 - 1 + log 2."""
    policy = trainer(tiny(), lr=0.0)
    row = Sample([3, 4, 5], [False, True, True], [0.0] * 3, [0.0, 1.0, 1.0])
    [[_, first, second]] = asyncio.run(policy.logprobs([row]))
    row.rollout_logprobs = [0.0, first, second + 0.693147]
    got = step(policy, pack([row], 10))
    assert got["policy/kl_rollout"] == pytest.approx((0.5 - 1 + 0.693147) / 2, abs=1e-5)
    assert got["policy/ratio_mean"] == pytest.approx(0.75, abs=1e-5)
    assert got["policy/effective_sample_size"] == pytest.approx(1.5**2 / (2 * 1.25), abs=1e-5)
    assert got["policy/logprob_gap_p50"] < 1e-5
    assert got["policy/logprob_gap_p99"] == pytest.approx(0.693147, rel=0.05)
    assert "policy/correction_mean" not in got


def test_a_correction_weighs_the_policy_loss_and_says_how_much():
    policy = trainer(tiny(), lr=0.0, correction="token-mask", correction_high=1.5)
    row = Sample([3, 4, 5], [False, True, True], [0.0] * 3, [0.0, 1.0, 1.0])
    [[_, first, second]] = asyncio.run(policy.logprobs([row]))
    row.rollout_logprobs = [0.0, first, second - 0.693147]
    got = step(policy, pack([row], 10))
    assert got["policy/loss"] == pytest.approx(-0.5, abs=1e-5)  # of two tokens, one is left
    assert got["policy/correction_mean"] == got["policy/correction_zero_fraction"] == 0.5
