"""The embedded engine against the plain forward of the same model, in fp32 on a CPU."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from chatlearn.errors import EngineError
from chatlearn.models.engine.embedded import EmbeddedEngine
from chatlearn.models.engine.sampler import sample, uniforms
from chatlearn.types import SamplingParams, Session, StopReason

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PARAMS = SamplingParams(max_new_tokens=12)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that spin for their next piece of a tiny matrix only fight over shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(kind="qwen3", seed=0):
    torch.manual_seed(seed)
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():  # sharper than an initial model: tokens matter
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(params=["qwen3", "llama"])
def model(request):
    return build(request.param)


def engine_of(model, **options):
    defaults = {"eos_token_ids": (), "max_slots": 8, "max_context": 128}
    return EmbeddedEngine(model, **(defaults | options))


def prompt(seed, length=20):
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def session(group, run=0):
    return Session(f"g{group}", str(run))


def gap(model, prompt_ids, completion, temperature=1.0):
    """Largest difference of the completion's logprobs from a full forward of the model."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + completion.token_ids])).logits[0].float()
    wanted = torch.log_softmax(logits / temperature, -1)[len(prompt_ids) - 1 : -1]
    wanted = wanted.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    return (wanted - torch.tensor(completion.logprobs)).abs().max().item()


async def ask(engine, prompt_ids, params=PARAMS, who=None):
    return await engine.generate(prompt_ids, params, session=who or session(0))


async def until(condition, turns=2000):
    for _ in range(turns):
        if condition():
            return
        await asyncio.sleep(0.001)  # not 0: the engine waits while the loop is busy
    raise AssertionError("never came true")


async def test_logprobs_are_those_of_a_full_forward_alone_and_in_a_batch(model):
    engine = engine_of(model)
    prompts = [prompt(seed, 1 + 7 * seed) for seed in range(8)]
    alone = await ask(engine, prompts[3], replace(PARAMS, seed=3), session(100))
    batch = await asyncio.gather(
        *[ask(engine, p, replace(PARAMS, seed=i), session(i)) for i, p in enumerate(prompts)]
    )
    assert max(gap(model, p, c) for p, c in zip(prompts, batch, strict=True)) < 1e-5
    assert alone.token_ids == batch[3].token_ids
    assert all(c.stop_reason is StopReason.LENGTH and len(c.token_ids) == 12 for c in batch)
    assert all(c.versions == (0, 0) for c in batch)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.8])
async def test_logprobs_are_of_the_tempered_uncut_distribution(model, temperature):
    params = SamplingParams(temperature=temperature, top_k=7, top_p=0.8, max_new_tokens=20)
    completion = await ask(engine_of(model), prompt(1), params)
    assert gap(model, prompt(1), completion, temperature) < 1e-5


async def test_greedy_is_what_generate_gives(model):
    ids = prompt(2)
    completion = await ask(
        engine_of(model), ids, SamplingParams(temperature=0.0, max_new_tokens=30)
    )
    wanted = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=30, eos_token_id=None, pad_token_id=0
    )[0, len(ids) :].tolist()
    assert completion.token_ids == wanted
    assert gap(model, ids, completion) < 1e-5
    one = SamplingParams(temperature=0.9, top_k=1, max_new_tokens=30)
    assert (await ask(engine_of(model), ids, one)).token_ids == wanted


async def test_siblings_prefill_their_prompt_once(model):
    """Eight equal prompts of 40 tokens: 40 computed, then the last one for each other sibling."""
    engine = engine_of(model)
    ids = prompt(3, 40)
    siblings = await asyncio.gather(
        *[ask(engine, ids, replace(PARAMS, seed=i), session(0, i)) for i in range(8)]
    )
    assert max(gap(model, ids, c) for c in siblings) < 1e-5
    assert len({tuple(c.token_ids) for c in siblings}) > 1
    stats = engine.stats()
    assert stats["engine/prefill_tokens"] == 40 + 7
    assert stats["engine/prefill_tokens_reused"] == 7 * 39
    assert stats["engine/mean_batch"] == 8
    assert engine.stats()["engine/steps"] == 0


async def test_a_later_turn_computes_only_what_is_new(model):
    """Turn 2 = turn 1 + its 12 tokens, of which the last has no keys yet, + 5 new ones."""
    engine = engine_of(model)
    ids = prompt(4, 30)
    first = await ask(engine, ids)
    engine.stats()
    longer = ids + first.token_ids + prompt(5, 5)
    second, fork = await asyncio.gather(
        ask(engine, longer), ask(engine, longer[:35] + prompt(6, 9), replace(PARAMS, seed=9))
    )
    assert gap(model, longer, second) < 1e-5
    assert gap(model, longer[:35] + prompt(6, 9), fork) < 1e-5
    stats = engine.stats()
    assert stats["engine/prefill_tokens_reused"] == 41 + 35
    assert stats["engine/prefill_tokens"] == 6 + 9


async def test_a_side_call_does_not_cost_the_conversation_its_cache(model):
    """A summary that shares 10 tokens with the conversation copies them; turn 2 finds all 41."""
    engine = engine_of(model)
    first = await ask(engine, prompt(4, 30))
    await ask(engine, prompt(4, 30)[:10] + prompt(5, 7))
    engine.stats()
    await ask(engine, prompt(4, 30) + first.token_ids)
    assert engine.stats()["engine/prefill_tokens_reused"] == 41


async def test_nothing_is_shared_between_groups(model):
    engine = engine_of(model)
    await ask(engine, prompt(4, 30), who=session(0))
    engine.stats()
    await ask(engine, prompt(4, 30), who=session(1))
    assert engine.stats()["engine/prefill_tokens_reused"] == 0


async def test_a_slot_is_not_evicted_while_the_same_forward_copies_from_it():
    """One kept slot A, three slots: two siblings copy A; the stranger behind them must wait."""
    model = build()
    engine = engine_of(model, max_slots=3)
    ids = prompt(7, 30)
    await ask(engine, ids, who=session(0, 9))
    asks = [(ids + prompt(8, 4), session(0, 0)), (ids + prompt(9, 6), session(0, 1))]
    asks.append((prompt(10, 50), session(1)))
    found = await asyncio.gather(*[ask(engine, p, who=who) for p, who in asks])
    assert max(gap(model, p, c) for (p, _), c in zip(asks, found, strict=True)) < 1e-5
    assert engine.stats()["engine/prefill_tokens_reused"] == 60


async def test_long_prompts_in_pieces_and_growing_memory(model):
    engine = engine_of(model, max_forward_tokens=16, max_slots=4, max_context=256)
    prompts = [prompt(i, n) for i, n in enumerate((3, 70, 33, 17, 100, 64))]
    prompts.append(prompts[1][:60] + prompts[2])
    groups = (0, 1, 2, 3, 4, 5, 1)
    found = await asyncio.gather(
        *[
            ask(engine, p, replace(PARAMS, max_new_tokens=40, seed=i), session(groups[i], i))
            for i, p in enumerate(prompts)
        ]
    )
    assert max(gap(model, p, c) for p, c in zip(prompts, found, strict=True)) < 1e-5


async def test_staggered_arrivals_join_and_more_requests_than_slots_queue(model):
    engine = engine_of(model, max_slots=3)
    prompts = [prompt(i, 5 + i) for i in range(12)]

    async def late(i):
        await asyncio.sleep(0.004 * i)
        params = replace(PARAMS, max_new_tokens=5 + i % 4, seed=i)
        return await ask(engine, prompts[i], params, session(i % 5, i))

    found = await asyncio.gather(*[late(i) for i in range(12)])
    assert max(gap(model, p, c) for p, c in zip(prompts, found, strict=True)) < 1e-5
    assert [len(c.token_ids) for c in found] == [5 + i % 4 for i in range(12)]
    assert 0 < engine.stats()["engine/mean_batch"] <= 3
    alone = await ask(engine, prompts[7], replace(PARAMS, max_new_tokens=8, seed=7), session(99))
    assert alone.token_ids == found[7].token_ids


async def test_the_same_requests_give_the_same_bits():
    async def once():
        engine = engine_of(build(), max_slots=5)
        turns = []
        ids = [prompt(i % 3, 10 + i % 3) for i in range(9)]
        for turn in range(2):
            params = SamplingParams(max_new_tokens=9, top_p=0.9, seed=turn)
            found = await asyncio.gather(
                *[ask(engine, p, params, session(i % 3, i)) for i, p in enumerate(ids)]
            )
            ids = [p + c.token_ids + [1, 2] for p, c in zip(ids, found, strict=True)]
            turns += found
        return turns

    assert await once() == await once()


async def test_the_order_of_arrival_within_a_step_changes_nothing():
    async def once(order):
        engine = engine_of(build())
        asks = {i: ask(engine, prompt(i), PARAMS, session(i % 2, i // 4)) for i in order}
        return dict(zip(asks, await asyncio.gather(*asks.values()), strict=True))

    assert await once(range(8)) == await once(reversed(range(8)))


async def test_eos_ends_a_completion_and_is_part_of_it(model):
    ids = prompt(11)
    full = await ask(engine_of(model), ids)
    eos = full.token_ids[5]
    cut = await ask(engine_of(model, eos_token_ids={eos}), ids)
    assert cut.token_ids == full.token_ids[: full.token_ids.index(eos) + 1]
    assert cut.stop_reason is StopReason.STOP


async def test_stop_strings_keep_the_token_that_completes_them(model):
    """Token t is the text ``<t>``; the stop string spans two tokens and begins inside one."""

    def decode(ids):
        return "".join(f"<{i}>" for i in ids)

    ids = prompt(12)
    full = (await ask(engine_of(model), ids)).token_ids
    engine = engine_of(model, decode=decode)
    stop = f"{full[5]}><{full[6]}"
    cut = await ask(engine, ids, replace(PARAMS, stop=("nothing", stop)))
    assert cut.token_ids == full[:7]
    assert cut.stop_reason is StopReason.STOP
    # the prompt's own text never completes a stop string
    kept = await ask(engine, ids, replace(PARAMS, stop=(f"{ids[-1]}><{full[0]}",)))
    assert kept.token_ids == full


async def test_the_context_limits_a_completion(model):
    engine = engine_of(model, max_context=24)
    completion = await ask(engine, prompt(1, 20))
    assert len(completion.token_ids) == 4
    assert completion.stop_reason is StopReason.LENGTH
    assert gap(model, prompt(1, 20), completion) < 1e-5


async def test_a_cancelled_request_leaves_and_the_others_go_on():
    model = build()
    engine = engine_of(model, max_slots=2)
    long = replace(PARAMS, max_new_tokens=100)
    tasks = [asyncio.ensure_future(ask(engine, prompt(i), long, session(i))) for i in range(3)]
    await until(lambda: engine._steps >= 3)
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    assert len(engine._schedule.in_flight()) == 2
    others = await asyncio.gather(*tasks[1:])
    assert tasks[0].cancelled()
    assert max(gap(model, prompt(i + 1), c) for i, c in enumerate(others)) < 1e-5
    assert not engine._schedule.in_flight()


async def test_abort_answers_with_what_was_sampled_and_forgets_the_session():
    model = build()
    engine = engine_of(model, max_slots=2)
    long = replace(PARAMS, max_new_tokens=100)
    tasks = [asyncio.ensure_future(ask(engine, prompt(0), long, session(0, i))) for i in range(2)]
    queued = asyncio.ensure_future(ask(engine, prompt(0), long, session(0, 1)))
    await until(lambda: engine._steps >= 5)
    await engine.abort(session(0, 1))
    aborted, waiting = await tasks[1], await queued
    assert aborted.stop_reason is StopReason.ABORT
    assert 5 <= len(aborted.token_ids) < 100
    assert gap(model, prompt(0), aborted) < 1e-5
    assert (waiting.token_ids, waiting.stop_reason) == ([], StopReason.ABORT)
    assert len((await tasks[0]).token_ids) == 100
    await engine.abort(session(0, 0))
    engine.stats()
    await ask(engine, prompt(0))
    assert engine.stats()["engine/prefill_tokens_reused"] == 0


async def test_publish_after_an_update_in_place_drops_stale_caches(model):
    engine = engine_of(model)
    ids = prompt(13)
    before = await ask(engine, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    await engine.publish(model.named_parameters(), version=7)
    after = await ask(engine, ids)
    assert gap(model, ids, after) < 1e-5
    assert gap(model, ids, before) > 1e-2
    assert after.versions == (7, 7)


async def test_publish_copies_foreign_weights_and_refuses_wrong_ones():
    model, other = build(seed=0), build(seed=1)
    engine = engine_of(model)
    await engine.publish(other.state_dict().items(), version=1)
    assert gap(other, prompt(1), await ask(engine, prompt(1))) < 1e-5
    with pytest.raises(EngineError, match="'nonsense' is not in"):
        await engine.publish([("nonsense", torch.zeros(1))], version=2)
    with pytest.raises(EngineError, match="has shape"):
        await engine.publish([("lm_head.weight", torch.zeros(1))], version=2)
    task = asyncio.ensure_future(ask(engine, prompt(1), replace(PARAMS, max_new_tokens=50)))
    await until(lambda: engine._schedule.running())
    with pytest.raises(EngineError, match="at rest"):
        await engine.publish([], version=2)
    await task


async def test_going_to_sleep_waits_for_what_runs_and_lets_nothing_start():
    engine = engine_of(build(), max_slots=1)
    running = asyncio.ensure_future(ask(engine, prompt(1), replace(PARAMS, max_new_tokens=20)))
    await until(lambda: engine._schedule.running())
    waiting = asyncio.ensure_future(ask(engine, prompt(2)))
    await engine.sleep()
    assert running.done()
    assert not waiting.done()
    await engine.publish([], version=5)
    await engine.wake()
    assert (await waiting).versions == (5, 5)


async def test_requests_wait_while_the_engine_sleeps():
    engine = engine_of(build())
    await ask(engine, prompt(1))
    await engine.sleep()
    assert not engine._memory._memory
    task = asyncio.ensure_future(ask(engine, prompt(1)))
    await asyncio.sleep(0.05)
    assert not task.done()
    await engine.publish([], version=3)  # has not started, so it sees the new weights
    await engine.wake()
    assert (await task).versions == (3, 3)


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ([], PARAMS, "empty"),
        ([1] * 128, PARAMS, "128 tokens"),
        ([1, VOCAB], PARAMS, "outside the vocabulary"),
        ([-1], PARAMS, "outside the vocabulary"),
        ([1], replace(PARAMS, max_new_tokens=0), "max_new_tokens"),
        ([1], replace(PARAMS, top_p=0.0), "top_p"),
        ([1], replace(PARAMS, stop=("x",)), "decode"),
    ],
)
async def test_a_bad_request_fails_alone(ids, params, message):
    engine = engine_of(build())
    good, bad = await asyncio.gather(
        ask(engine, prompt(1)), ask(engine, ids, params), return_exceptions=True
    )
    assert len(good.token_ids) == 12
    assert isinstance(bad, EngineError)
    assert message in str(bad)


async def test_a_failing_forward_fails_those_in_flight_and_no_one_later():
    model = build()
    engine = engine_of(model)
    broken = True

    def break_once(module, arguments):
        if broken and engine._steps == 3:
            raise RuntimeError("out of memory, say")

    hook = model.lm_head.register_forward_pre_hook(break_once)
    asks = [ask(engine, prompt(i), PARAMS, session(i)) for i in range(3)]
    failed = await asyncio.gather(*asks, return_exceptions=True)
    assert all(isinstance(e, EngineError) and "out of memory, say" in str(e) for e in failed)
    broken = False
    assert gap(model, prompt(0), await ask(engine, prompt(0))) < 1e-5
    hook.remove()


async def test_a_diverged_model_is_an_engine_error():
    model = build()
    engine = engine_of(model)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    for params in (PARAMS, replace(PARAMS, top_k=3), replace(PARAMS, temperature=0.0)):
        with pytest.raises(EngineError, match="not finite"):
            await ask(engine, prompt(1), params)


async def test_a_failing_decode_fails_only_its_caller():
    engine = engine_of(build(), decode=lambda ids: 1 // 0)
    asks = [ask(engine, prompt(1)), ask(engine, prompt(2), replace(PARAMS, stop=("x",)))]
    good, bad = await asyncio.gather(*asks, return_exceptions=True)
    assert len(good.token_ids) == 12
    assert isinstance(bad, EngineError)
    assert "ZeroDivisionError" in str(bad)


async def test_the_trainers_model_is_given_back_as_it_was(model):
    model.train()
    model.lm_head.eval()
    attention = model.config._attn_implementation
    await ask(engine_of(model), prompt(1))
    assert model.training
    assert model.model.layers[0].self_attn.training
    assert not model.lm_head.training
    assert model.config._attn_implementation == attention
    model(torch.tensor([prompt(1)]), labels=torch.tensor([prompt(1)])).loss.backward()


async def test_bfloat16_and_one_slot():
    model = build().to(torch.bfloat16)
    engine = engine_of(model, max_slots=1)
    found = await asyncio.gather(*[ask(engine, prompt(i), who=session(i)) for i in range(2)])
    assert max(gap(model, prompt(i), c) for i, c in enumerate(found)) < 0.3


def test_models_that_would_not_be_exact_are_refused():
    with pytest.raises(EngineError, match="sliding_attention"):
        engine_of(Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16)))
    softcap = Gemma2Config(**SIZES, head_dim=16, layer_types=["full_attention"] * 2)
    with pytest.raises(EngineError, match="softcap"):
        engine_of(Gemma2ForCausalLM(softcap))
    with pytest.raises(EngineError, match="causal language model"):
        engine_of(build().model)
    mixing = build()  # a layer that looks across the row, as a convolution would
    mixing.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out + out.mean(1, True))
    with pytest.raises(EngineError, match="other logits"):
        engine_of(mixing)


def test_another_event_loop_is_fine_once_the_first_has_ended():
    engine = engine_of(build())
    assert asyncio.run(ask(engine, prompt(1))) == asyncio.run(
        ask(engine, prompt(1), who=session(1))
    )


# The sampler


def test_frequencies_follow_the_distribution():
    """20,000 draws of 8 tokens: chi-square with 7 degrees of freedom stays under 24.3 (p=0.001)."""
    probs = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.08, 0.05, 0.02, 0.0])
    count = 20_000
    logits = probs.log().expand(count, -1)
    for draws in (uniforms(0, count), [uniforms(seed, 1)[0] for seed in range(count)]):
        tokens, _ = sample(logits, draws, [SamplingParams()] * count)
        found = torch.bincount(torch.tensor(tokens), minlength=8)
        assert found[7] == 0
        expected = probs[:7] * count
        assert ((found[:7] - expected) ** 2 / expected).sum() < 24.3


def test_a_zero_probability_is_never_picked_and_the_index_never_leaves_the_vocabulary():
    logits = torch.full((4, 6), float("-inf"))
    logits[:, 2:4] = 0.0
    edges = [0.0, 1 - 2**-24, 0.5, 0.49999997]
    for params in (SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.99)):
        tokens, logprobs = sample(logits, edges, [params] * 4)
        assert tokens == [2, 3, 3, 2]
        assert logprobs == pytest.approx([-0.6931472] * 4)


def test_top_p_and_top_k_keep_the_nucleus_and_leave_the_logprobs_alone():
    probs = torch.tensor([[0.05, 0.4, 0.1, 0.3, 0.15]])
    draws = torch.linspace(0, 1 - 1e-6, 200).tolist()
    logits = probs.log().expand(200, -1)
    for params, allowed in (
        (SamplingParams(top_p=0.6), {1, 3}),
        (SamplingParams(top_p=0.71), {1, 3, 4}),
        (SamplingParams(top_p=1e-6), {1}),
        (SamplingParams(top_k=3), {1, 3, 4}),
        (SamplingParams(top_k=3, top_p=0.8), {1, 3}),  # 0.4 + 0.3 of 0.85 is over 0.8
    ):
        tokens, logprobs = sample(logits, draws, [params] * 200)
        assert set(tokens) == allowed
        assert logprobs == pytest.approx(probs[0].log()[tokens].tolist())


def test_rows_that_sample_differently_share_a_batch():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3),
        SamplingParams(temperature=2.0, top_p=0.5),
        SamplingParams(temperature=0.0, top_p=0.5),
        SamplingParams(temperature=0.5),
    ]
    draws = uniforms(5, 6)
    batch = sample(logits, draws, params)
    alone = [sample(logits[i : i + 1], draws[i : i + 1], params[i : i + 1]) for i in range(6)]
    assert batch[0] == [tokens[0] for tokens, _ in alone]
    assert batch[1] == pytest.approx([values[0] for _, values in alone])


def test_the_first_uniforms_do_not_depend_on_how_many_are_drawn():
    assert uniforms(3, 1000)[:5] == uniforms(3, 5)
    assert uniforms(-1, 2) == uniforms(2**63 - 1, 2)
