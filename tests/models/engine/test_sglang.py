"""The client, the server process and the three ways of publishing, against the real SGLang."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from chatlearn.errors import EngineError, EngineLost
from chatlearn.models.engine.sglang import SGLangEngine
from chatlearn.models.engine.sglang_server import SGLangServer
from chatlearn.models.policy.weight_checksums import expected_checksums, require_expected
from chatlearn.models.policy.weights import CollectiveSender, send_disk, send_tensors
from chatlearn.types import SamplingParams, Session, StopReason

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

MAX_CONTEXT = 500
SESSION = Session("group", "run")
BUCKET = {"bucket_bytes": 100_000, "dtype": torch.float32}
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=450)


@pytest.fixture(scope="module")
def model(tiny_policy):
    return AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)


@pytest.fixture
async def engine(sglang_server, tokenizer):
    client = a_client(sglang_server.url, tokenizer)
    yield client
    await client.close()


def a_client(url, tokenizer, **settings):
    return SGLangEngine(
        url,
        eos_token_ids=[tokenizer.eos_token_id],
        max_context=MAX_CONTEXT,
        vocab_size=len(tokenizer),
        **settings,
    )


def change(model):
    """Another policy, of the same shape."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)


def gap(model, prompt, completion, temperature=1.0):
    """Largest difference between the engine's logprobs and those of transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids])).logits[0]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return max(
        abs(logprobs[len(prompt) - 1 + i, token].item() - value)
        for i, (token, value) in enumerate(
            zip(completion.token_ids, completion.logprobs, strict=True)
        )
    )


async def publish(engine, model, version):
    await engine.begin_update()
    await send_tensors(model.state_dict().items(), [engine], **BUCKET)
    await engine.end_update(version=version)


_versions = iter(range(1, 1000))


@pytest.fixture
def next_version():
    return lambda: next(_versions)


# ---------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_new_tokens=40),
        SamplingParams(max_new_tokens=40, temperature=0.6, top_p=0.9, top_k=50),
        SamplingParams(max_new_tokens=40, temperature=0.0),
    ],
    ids=["plain", "cut", "greedy"],
)
async def test_logprobs_are_those_of_transformers(engine, model, say, sampling, next_version):
    await publish(engine, model, next_version())
    prompt = say("<|im_start|>user\nhello")
    completion = await engine.generate(prompt, sampling, session=SESSION)
    assert gap(model, prompt, completion, sampling.temperature or 1.0) < 1e-4


async def test_mixed_temperatures_in_one_batch_keep_their_own_logprobs(engine, model, say):
    prompt = say("mixed")
    temperatures = [0.0, 0.5, 1.0, 1.5] * 4
    completions = await asyncio.gather(
        *(
            engine.generate(
                prompt, SamplingParams(temperature=t, max_new_tokens=30), session=SESSION
            )
            for t in temperatures
        )
    )
    for temperature, completion in zip(temperatures, completions, strict=True):
        assert gap(model, prompt, completion, temperature or 1.0) < 1e-4


async def test_a_completion_ends_with_its_eos(sglang_server, engine, tokenizer, say):
    free = await engine.generate(say("once"), GREEDY, session=SESSION)
    assert free.stop_reason is StopReason.LENGTH
    end = free.token_ids[0]
    stopping = SGLangEngine(sglang_server.url, eos_token_ids=[end], max_context=MAX_CONTEXT)
    completion = await stopping.generate(say("once"), GREEDY, session=SESSION)
    await stopping.close()
    assert completion.token_ids == [end]
    assert completion.stop_reason is StopReason.STOP


async def test_a_stop_string_ends_with_the_token_that_completes_it(engine, tokenizer, say):
    free = await engine.generate(say("two"), GREEDY, session=SESSION)
    for length in range(3, 60):  # the first string whose end is the end of a character
        stop = tokenizer.decode(free.token_ids[length - 2 : length])
        if "�" not in stop:
            break
    sampling = SamplingParams(temperature=0.0, max_new_tokens=450, stop=("never seen", stop))
    completion = await engine.generate(say("two"), sampling, session=SESSION)
    wanted = next(n for n in range(1, 451) if stop in tokenizer.decode(free.token_ids[:n]))
    assert completion.token_ids == free.token_ids[:wanted]
    assert completion.stop_reason is StopReason.STOP


async def test_the_context_is_used_to_its_last_token(engine, say):
    prompt = (say("fill") * 200)[: MAX_CONTEXT - 1]
    completion = await engine.generate(prompt, GREEDY, session=SESSION)
    assert len(completion.token_ids) == 1
    with pytest.raises(EngineError, match="500 tokens, which leaves none of the context of 500"):
        await engine.generate([*prompt, 1], GREEDY, session=SESSION)


async def test_64_at_once(engine, model, say):
    prompts = [say(f"request {i}") for i in range(64)]
    sampling = SamplingParams(max_new_tokens=48)
    completions = await asyncio.gather(
        *(engine.generate(p, sampling, session=Session("g", str(i))) for i, p in enumerate(prompts))
    )
    assert max(gap(model, p, c) for p, c in zip(prompts, completions, strict=True)) < 1e-4
    stats = engine.stats()
    assert stats["engine/requests"] == 64
    assert stats["engine/tokens_sampled"] == sum(len(c.token_ids) for c in completions)
    assert stats["engine/request_s"] > 10 * stats["engine/busy_s"] > 0
    assert engine.stats()["engine/requests"] == 0


# ---------------------------------------------------------------------- ends


async def test_abort_ends_one_session_and_returns_what_it_has(engine, say):
    mine, other = Session("g", "mine"), Session("g", "other")
    running = [
        asyncio.create_task(engine.generate(say("long"), GREEDY, session=s)) for s in (mine, other)
    ]
    await asyncio.sleep(0.3)
    await engine.abort(mine)
    aborted, whole = await asyncio.gather(*running)
    assert aborted.stop_reason is StopReason.ABORT
    assert 0 < len(aborted.token_ids) < 450
    assert whole.stop_reason is StopReason.LENGTH
    assert aborted.token_ids == whole.token_ids[: len(aborted.token_ids)]
    await engine.abort(mine)


async def test_pause_abort_answers_everything(engine, say):
    running = asyncio.create_task(engine.generate(say("long"), GREEDY, session=SESSION))
    await asyncio.sleep(0.3)
    await engine.pause("abort")
    assert (await running).stop_reason is StopReason.ABORT
    await engine.resume()
    assert await engine.generate(say("again"), SamplingParams(max_new_tokens=2), session=SESSION)


async def test_a_cancelled_caller_frees_the_server(engine, say):
    running = asyncio.create_task(engine.generate(say("long"), GREEDY, session=SESSION))
    await asyncio.sleep(0.2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    started = time.monotonic()
    await engine.flush()  # refused while anything runs
    assert time.monotonic() - started < 5


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("way", ["tensor", "collective", "disk"])
async def test_what_is_published_is_what_samples(
    way, engine, model, say, tmp_path, tiny_policy, next_version
):
    prompt, sampling = say("weights"), SamplingParams(max_new_tokens=60)
    collective = CollectiveSender(host="127.0.0.1", backend="gloo", timeout_s=60)
    for _ in range(2):  # the second time over the kept group
        version = next_version()
        change(model)
        weights = model.state_dict()
        await engine.begin_update()
        if way == "tensor":
            sent = await send_tensors(weights.items(), [engine], **BUCKET)
        elif way == "collective":
            sent = await collective.send(weights.items(), [engine], **BUCKET)
        else:
            folder = tmp_path / "weights"
            sent = await send_disk(
                weights.items(),
                [engine],
                folder=folder,
                version=version,
                config_from=Path(tiny_policy),
                **BUCKET,
            )
        await engine.end_update(version=version)
        assert sent.num_buckets > 1
        assert sent.num_bytes == sum(w.numel() * 4 for w in weights.values())
        completion = await engine.generate(prompt, sampling, session=SESSION)
        assert completion.versions == (version, version)
        assert await engine.version() == version
        assert gap(model, prompt, completion) < 1e-4
    await collective.close()

    landed = await engine.checksums()
    require_expected(
        expected_checksums(weights.items(), dtype=torch.float32), landed, url=engine.url
    )
    await engine.begin_update()
    await send_disk(weights.items(), [engine], folder=tmp_path / "same", version=version, **BUCKET)
    await engine.end_update(version=version)
    assert await engine.checksums() == landed


async def test_a_changed_weight_is_found_by_name(engine, model, next_version):
    await publish(engine, model, next_version())
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    weights["model.layers.1.self_attn.k_proj.weight"][0, 0] += 1
    expected = expected_checksums(weights.items(), dtype=torch.float32)
    with pytest.raises(EngineError, match=r"1 of \d+ .* model\.layers\.1\.self_attn\.qkv_proj"):
        require_expected(expected, await engine.checksums(), url=engine.url)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_a_request_goes_on_over_a_publish(mode, engine, model, say, next_version):
    """Tokens 0 to n are of the old version, the others of the new one."""
    before, after = next_version(), next_version()
    await publish(engine, model, before)
    running = asyncio.create_task(engine.generate(say("across"), GREEDY, session=SESSION))
    await asyncio.sleep(0.3)
    await engine.pause(mode)
    change(model)
    await publish(engine, model, after)
    assert not running.done()
    await engine.resume()
    completion = await running
    assert completion.versions == (before, after)
    assert len(completion.token_ids) == 450


async def test_no_prefix_of_old_weights_is_reused(engine, model, say, tokenizer, next_version):
    """A publish beside a running request cannot flush; another client, which does not know of it,
    then asks for a prompt that the old weights have computed."""
    prompt, short = say("a prompt that is long enough to be kept"), SamplingParams(max_new_tokens=8)
    await publish(engine, model, next_version())
    other = a_client(engine.url, tokenizer)
    for _ in range(3):  # the first learns the version, the second computes, the third reuses
        await other.generate(prompt, short, session=SESSION)
    assert other.stats()["engine/prefill_tokens_reused"] > 0
    running = asyncio.create_task(other.generate(say("across"), GREEDY, session=SESSION))
    await asyncio.sleep(0.2)
    await engine.pause("in_place")
    change(model)
    await publish(engine, model, next_version())
    await engine.resume()
    completion = await other.generate(prompt, short, session=SESSION)
    assert gap(model, prompt, completion) < 1e-4
    assert other.stats()["engine/requests_asked_again"] == 1
    await running
    await other.close()


async def test_an_update_outside_begin_and_end_is_refused(engine, model):
    with pytest.raises(EngineError, match="must run between begin_weight_update") as caught:
        await send_tensors(model.state_dict().items(), [engine], **BUCKET)
    for said in (engine.url, "update_weights_from_tensor", "embed_tokens", "some old weights"):
        assert said in str(caught.value)


async def test_sleep_holds_requests_back_until_all_is_awake(engine, model, say, next_version):
    running = asyncio.create_task(engine.generate(say("sleepy"), GREEDY, session=SESSION))
    await asyncio.sleep(0.2)
    await engine.sleep()
    assert await engine.is_healthy()
    await engine.wake(["weights"])
    change(model)
    await engine.pause("in_place")
    await publish(engine, model, next_version())
    await engine.resume()
    await asyncio.sleep(0.3)
    assert not running.done()
    await engine.wake(["kv_cache"])
    assert len((await running).token_ids) == 450


# ---------------------------------------------------------------------- processes


async def test_a_killed_server_is_lost_and_can_be_started_again(
    server_settings, tokenizer, say, tmp_path, family
):
    server = SGLangServer(server_settings, log_file=tmp_path / "server.log")
    await server.start(timeout_s=240)
    engine = a_client(server.url, tokenizer)
    try:
        url, pid = server.url, server.pid
        running = asyncio.create_task(engine.generate(say("long"), GREEDY, session=SESSION))
        await asyncio.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(EngineLost, match=url):
            await running
        assert time.monotonic() - started < 3
        assert await server.wait_exit() == 128 + signal.SIGKILL
        assert family(pid) == []
        assert not await engine.is_healthy()
        with pytest.raises(EngineLost):
            await engine.generate(say("on"), GREEDY, session=SESSION)

        await server.start(timeout_s=240)
        assert server.url == url
        assert await engine.version() is None
        assert await engine.generate(say("on"), SamplingParams(max_new_tokens=2), session=SESSION)
    finally:
        await engine.close()
        await server.stop()
    assert family(server.pid) == []


PARENT = """
import asyncio, sys
from pathlib import Path
from chatlearn.models.engine.sglang_server import ServerSettings, SGLangServer

async def main():
    python, model, log = sys.argv[1:]
    settings = ServerSettings(
        model_path=model, python=python, device="cpu", dtype="fp32", context_length=500,
        max_running_requests=64, deterministic=True,
    )
    server = SGLangServer(settings, log_file=Path(log))
    await server.start(timeout_s=240)
    print(server.url, server.pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


async def test_seeds_count_and_no_orphan_is_left_by_a_killed_parent(
    sglang_python, tiny_policy, tokenizer, say, tmp_path, family
):
    """One server for both: it is deterministic, and its parent dies at the end."""
    command = [sys.executable, "-c", PARENT, sglang_python, tiny_policy, str(tmp_path / "log")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url, pid = (await asyncio.to_thread(parent.stdout.readline)).split()
    engine = a_client(url, tokenizer, deterministic=True)

    def ask(seed):
        sampling = SamplingParams(max_new_tokens=40, seed=seed)
        return engine.generate(say("seeded"), sampling, session=SESSION)

    alone = await ask(7)
    crowd = await asyncio.gather(*(ask(seed) for seed in range(16)))
    assert crowd[7].token_ids == alone.token_ids
    assert len({tuple(c.token_ids) for c in crowd}) > 10

    assert len(family(int(pid))) >= 3
    running = asyncio.create_task(engine.generate(say("long"), GREEDY, session=SESSION))
    await asyncio.sleep(0.2)
    parent.kill()
    parent.wait()
    with pytest.raises(EngineLost):
        await asyncio.wait_for(running, 5)
    deadline = time.monotonic() + 5
    while family(int(pid)) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert family(int(pid)) == []
    await engine.close()
