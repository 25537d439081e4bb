"""The client against a server that plays SGLang's refusals, and the process side without SGLang."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from chatlearn.errors import ConfigError, EngineError, EngineLost
from chatlearn.models.engine import orphan_guard, sglang
from chatlearn.models.engine.sglang import SGLangEngine
from chatlearn.models.engine.sglang_server import (
    CONTEXT_SLACK,
    ServerSettings,
    SGLangServer,
    check_version,
)
from chatlearn.types import Completion, SamplingParams, Session, StopReason

SESSION = Session("group", "run")
SETTINGS = ServerSettings(
    model_path="/models/tiny",
    python="/opt/python",
    device="cpu",
    dtype="fp32",
    context_length=1000,
    max_running_requests=8,
)


def answer(ids, *, finish="stop", spans=(("3", 0, 9),), cached=0, logprobs=None):
    scored = [[-0.5, token, None] for token in ids] if logprobs is None else logprobs
    meta = {
        "finish_reason": {"type": finish},
        "output_token_logprobs": scored,
        "prompt_tokens": 2,
        "cached_tokens": cached,
        "weight_version": spans[-1][0],
        "weight_versions": [{"version": v, "start": a, "end": b} for v, a, b in spans],
    }
    return 200, {"output_ids": list(ids), "meta_info": meta}


@pytest.fixture
async def engine(script):
    client = SGLangEngine(script.url, eos_token_ids=[9, 7], max_context=20, vocab_size=10)
    yield client
    await client.close()


async def test_a_request_leaves_nothing_to_the_models_defaults(engine, script):
    script.answers["/generate"] = answer([5, 7], spans=[("3", 0, 1), ("4", 1, 2)])
    sampling = SamplingParams(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=99, stop=("é",))
    completion = await engine.generate([1, 2], sampling, session=SESSION)
    assert completion == Completion([5, 7], [-0.5, -0.5], StopReason.STOP, (3, 4))
    [(_, body)] = script.asked
    assert body["input_ids"] == [1, 2]
    assert body["return_logprob"] is True
    assert body["sampling_params"] == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "max_new_tokens": 18,
        "n": 1,
        "ignore_eos": False,
        "stop_token_ids": [7, 9],
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "no_stop_trim": True,
        "stop": ["é"],
        "stop_regex": [r"[^\s\S]{6}"],
    }


@pytest.mark.parametrize(
    ("prompt", "sampling", "says"),
    [
        ([], SamplingParams(), "empty"),
        ([1] * 20, SamplingParams(), "20 tokens, which leaves none of the context of 20"),
        ([1, 10], SamplingParams(), "outside the vocabulary of 10"),
        ([-1], SamplingParams(), "outside the vocabulary"),
        ([1], SamplingParams(max_new_tokens=0), "max_new_tokens is 0"),
        ([1], SamplingParams(top_k=0), "top_k != 0"),
    ],
)
async def test_a_bad_request_never_reaches_the_server(engine, script, prompt, sampling, says):
    with pytest.raises(EngineError, match=f"request of group/run: .*{says}"):
        await engine.generate(prompt, sampling, session=SESSION)
    assert script.asked == []


@pytest.mark.parametrize(
    ("status", "said", "wanted"),
    [
        (400, {"error": {"message": "too long"}}, "too long"),
        (400, {"object": "error", "message": "no such mode"}, "no such mode"),
        (400, {"success": False, "message": "no session is open"}, "no session is open"),
        (200, {"success": False, "message": "half an update"}, "half an update"),
        (404, {"detail": "Not Found"}, "Not Found"),
        (500, "Internal Server Error", "Internal Server Error"),
    ],
)
async def test_a_refusal_names_server_path_and_reason(engine, script, status, said, wanted):
    script.answers["/update_weights_from_tensor"] = (status, said)
    with pytest.raises(EngineError, match=wanted) as caught:
        await engine.update_from_tensors(["x"])
    assert f"{script.url}/update_weights_from_tensor" in str(caught.value)
    assert not isinstance(caught.value, EngineLost)


async def test_a_server_that_hangs_up_is_lost(engine, script):
    script.answers["/generate"] = None
    with pytest.raises(EngineLost, match=script.url) as caught:
        await engine.generate([1], SamplingParams(), session=SESSION)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


async def test_a_port_where_nobody_listens_is_lost():
    engine = SGLangEngine("http://127.0.0.1:9", eos_token_ids=[], max_context=20)
    with pytest.raises(EngineLost, match=r"127\.0\.0\.1:9"):
        await engine.flush()
    assert not await engine.is_healthy()
    await engine.close()


async def test_a_server_that_hangs_is_an_error_in_time(script):
    engine = SGLangEngine(script.url, eos_token_ids=[], max_context=20, request_timeout_s=0.2)
    script.answers["/generate"] = hold = threading.Event()
    with pytest.raises(EngineError, match=r"no answer in 0\.2 s"):
        await engine.generate([1], SamplingParams(), session=SESSION)
    hold.set()
    await engine.close()


async def test_cancelling_tells_the_server(engine, script):
    script.answers["/generate"] = hold = threading.Event()
    task = asyncio.create_task(engine.generate([1], SamplingParams(), session=SESSION))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.close()
    hold.set()
    (_, asked), (path, told) = script.asked
    assert path == "/abort_request"
    assert told["rid"] == asked["rid"]


async def test_abort_asks_for_its_own_session_only(engine, script):
    script.answers["/generate"] = hold = threading.Event()
    sessions = [Session("g", str(i)) for i in range(3)]
    tasks = [
        asyncio.create_task(engine.generate([1], SamplingParams(), session=s)) for s in sessions
    ]
    await asyncio.sleep(0.1)
    await engine.abort(sessions[1])
    await engine.abort(Session("g", "unknown"))
    assert script.paths().count("/abort_request") == 1
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    hold.set()


async def test_an_abort_that_the_server_misses_is_answered_anyway(engine, script, monkeypatch):
    monkeypatch.setattr(sglang, "_ABORT_GRACE_S", 0.1)
    script.answers["/generate"] = hold = threading.Event()
    task = asyncio.create_task(engine.generate([1], SamplingParams(), session=SESSION))
    await asyncio.sleep(0.1)
    await engine.abort(SESSION)
    assert await task == Completion([], [], StopReason.ABORT, (0, 0))
    hold.set()


async def test_tokens_and_logprobs_that_differ_are_refused(engine, script):
    script.answers["/generate"] = answer([5, 6], logprobs=[[-0.5, 5, None]])
    with pytest.raises(EngineError, match="2 tokens and the logprobs of 1"):
        await engine.generate([1], SamplingParams(), session=SESSION)


async def test_a_prefix_of_unknown_weights_is_asked_again_unless_aborted(engine, script):
    script.answers["/generate"] = answer([5], cached=1)
    await engine.generate([1], SamplingParams(), session=SESSION)
    assert [body["extra_key"] for _, body in script.asked] == ["default", "3"]
    script.answers["/generate"] = answer([5], cached=1, finish="abort", spans=[("4", 0, 1)])
    completion = await engine.generate([1], SamplingParams(), session=SESSION)
    assert completion.stop_reason is StopReason.ABORT
    assert len(script.asked) == 3


async def test_an_update_pauses_and_goes_on_only_when_nothing_else_holds(engine, script):
    await engine.begin_update()
    await engine.begin_update()
    await engine.end_update(version=4)
    assert script.paths() == [
        "/pause_generation",
        "/begin_weight_update",
        "/end_weight_update",
        "/update_weight_version",
        "/flush_cache",
        "/continue_generation",
    ]
    assert script.asked[3][1] == {"new_version": "4", "abort_all_requests": False}
    script.asked.clear()
    await engine.sleep()
    await engine.pause("in_place")
    await engine.wake(["weights"])
    await engine.begin_update()
    await engine.end_update(version=5)
    await engine.resume()
    assert "/continue_generation" not in script.paths()
    assert "/flush_cache" not in script.paths()
    await engine.wake(["kv_cache"])
    assert script.paths()[-2:] == ["/resume_memory_occupation", "/continue_generation"]
    await engine.wake()
    assert script.paths()[-1] == "/continue_generation"


async def test_what_was_done_to_a_lost_server_does_not_hold_for_the_next(engine, script):
    await engine.begin_update()
    script.answers["/update_weights_from_tensor"] = None
    with pytest.raises(EngineLost):
        await engine.update_from_tensors(["x"])
    script.asked.clear()
    await engine.begin_update()
    assert script.paths() == ["/pause_generation", "/begin_weight_update"]


# ---------------------------------------------------------------------- the process


def test_the_flags_of_a_cpu_server():
    words = SETTINGS.command(1234, 5678)
    assert words[:3] == ["/opt/python", "-m", "sglang.launch_server"]
    flags = " ".join(words)
    for wanted in (
        "--port 1234",
        "--device cpu",
        "--dtype float32",
        "--attention-backend torch_native",
        f"--context-length {1000 + CONTEXT_SLACK}",
        f"--max-total-tokens {8 * (1000 + CONTEXT_SLACK)}",
        "--sampling-defaults openai",
        "--sleep-on-idle",
    ):
        assert wanted in flags
    assert "memory-saver" not in flags
    env = SETTINGS.environment()
    assert (env["SGLANG_USE_CPU_ENGINE"], env["OMP_NUM_THREADS"]) == ("1", "1")
    assert "PYTHONPATH" not in env


def test_the_flags_of_a_gpu_server():
    settings = ServerSettings(
        model_path="m",
        python="",
        device="cuda",
        dtype="bf16",
        context_length=100,
        max_running_requests=8,
        gpu_ids=(2, 3),
        tensor_parallel=2,
        memory_saver=True,
        deterministic=True,
        rl_on_policy_target="fsdp",
        extra_args={
            "attention_backend": "fa3",
            "sleep_on_idle": False,
            "ep-size": 2,
            "x": {"a": 1},
        },
    )
    words = settings.command(1, 2)
    assert words[0] == sys.executable
    flags = " ".join(words)
    for wanted in (
        "--dtype bfloat16",
        "--tp-size 2",
        "--enable-memory-saver",
        "--enable-deterministic-inference",
        "--rl-on-policy-target fsdp",
        "--attention-backend fa3",
        "--ep-size 2",
        '--x {"a": 1}',
    ):
        assert wanted in flags
    assert "sleep-on-idle" not in flags
    assert "max-total-tokens" not in flags
    assert settings.environment()["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_on_policy_kernels_need_gpus(tmp_path):
    settings = ServerSettings("m", "", "cpu", "fp32", 10, 1, rl_on_policy_target="fsdp")
    with pytest.raises(ConfigError, match=r"models\.policy\.rl_on_policy_target=fsdp needs GPUs"):
        SGLangServer(settings, log_file=tmp_path / "log")


@pytest.fixture
def fake_python(tmp_path):
    """An interpreter that says it has some SGLang, and then does what a shell command does."""

    def make(version: str, server: str = "exit 3") -> str:
        path = tmp_path / "python"
        path.write_text(f'#!/bin/sh\nif [ "$1" = -I ]; then echo {version}; exit; fi\n{server}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def test_versions_are_checked_before_a_launch(fake_python, tmp_path):
    assert check_version(fake_python("sglang 0.5.22")) == "0.5.22"
    with pytest.raises(ConfigError, match=r"models\.policy\.sglang_python=.* has sglang 0\.4\.9"):
        check_version(fake_python("sglang 0.4.9"))
    with pytest.raises(ConfigError, match=r"has no SGLang .*PackageNotFound.*sglang==0\.5\.23"):
        check_version(sys.executable)
    with pytest.raises(ConfigError, match=r"models\.policy\.sglang_python=.*cannot be run"):
        check_version(str(tmp_path / "nothing"))


async def test_a_server_that_dies_while_it_starts_shows_its_last_words(fake_python, tmp_path):
    python = fake_python("sglang 0.5.23", "echo out of memory; exit 3")
    settings = ServerSettings("m", python, "cpu", "fp32", 10, 1)
    server = SGLangServer(settings, log_file=tmp_path / "logs" / "server.log")
    with pytest.raises(EngineError, match=r"ended with code 3(.|\n)*out of memory"):
        await server.start(timeout_s=20)
    assert not server.is_alive
    assert await server.wait_exit() == 3


async def test_a_server_that_is_not_ready_in_time_is_ended(fake_python, tmp_path, family):
    python = fake_python("sglang 0.5.23", "sleep 1000 & echo loading; sleep 1000")
    settings = ServerSettings("m", python, "cpu", "fp32", 10, 1)
    server = SGLangServer(settings, log_file=tmp_path / "server.log")
    with pytest.raises(EngineError, match=r"engine_start_timeout_s=1(.|\n)*loading"):
        await server.start(timeout_s=1)
    assert family(server.pid) == []


TREE = "trap '' TERM; sleep 1000 & sleep 1000 & wait"


@pytest.mark.parametrize("victim", ["parent", "guard"])
def test_a_killed_parent_or_guard_takes_the_whole_tree_along(victim, family):
    """A shell plays the parent; the tree ignores SIGTERM, as a busy server would."""
    guard = f"'{sys.executable}' -I '{orphan_guard.__file__}' $$ 1 bash -c \"{TREE}\""
    parent = subprocess.Popen(
        ["bash", "-c", f"{guard} & echo $!; wait"], stdout=subprocess.PIPE, text=True
    )
    guard_pid, leader = (int(parent.stdout.readline()) for _ in range(2))
    until(lambda: len(family(leader)) == 3)
    os.kill(parent.pid if victim == "parent" else guard_pid, signal.SIGKILL)
    try:
        if victim == "parent":
            until(lambda: not family(leader))
        else:  # the leader only: SGLang's children follow their own parent in the same way
            until(lambda: leader not in family(leader))
    finally:
        orphan_guard.end_session(leader)
        parent.kill()
        parent.wait()
        parent.stdout.close()


def test_the_guard_ends_a_stubborn_tree_when_told(family):
    guard = subprocess.Popen(
        [sys.executable, "-I", orphan_guard.__file__, str(os.getpid()), "0.2", "bash", "-c", TREE],
        stdout=subprocess.PIPE,
        text=True,
    )
    leader = int(guard.stdout.readline())
    until(lambda: len(family(leader)) == 3)
    guard.terminate()
    assert guard.wait(10) == 128 + signal.SIGKILL
    assert family(leader) == []
    guard.stdout.close()


def until(holds, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_shims_are_found_by_the_script():
    folder = Path(__file__).parents[2] / "sglang_cpu"
    script = (folder.parent / "sglang_env.sh").read_text()
    assert "sglang==0.5.23" in script
    assert {"sgl_kernel", "sglang_cpu.pth", "entry_points.txt"} <= {
        p.name for p in folder.iterdir()
    }
