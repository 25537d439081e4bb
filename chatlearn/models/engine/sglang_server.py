"""An SGLang server as a process: launch, readiness, logs, and an end that leaves nothing.

    SGLangServer ──► orphan_guard ──► python -m sglang.launch_server ──► schedulers, detokenizer

SGLang is never imported here: it lives in the interpreter ``ServerSettings.python``, whose torch
may differ from the trainer's. A server that ended may be started again, at the same address.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from chatlearn.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

SUPPORTED = {
    "0.5.21": "no checksums on a CPU",
    "0.5.22": "no checksums on a CPU",
    "0.5.23": "tested",
}
"""Versions with the API spoken here: weight updates between begin and end, pause modes, spans of
``weight_versions``. What each lacks. Read off the wheels, run for the tested one."""

CONTEXT_SLACK = 8
"""SGLang keeps up to six tokens of its context to itself (``max_req_input_len``), so it is given a
longer one than it is asked to fill."""

_GUARD = Path(__file__).with_name("orphan_guard.py")
_PYTHON_KEY = "models.policy.sglang_python"
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_MAX_CPU_CONTEXTS = 64
_GRACE_S = 1.0
"""SGLang answers SIGTERM by a drain that looks at its watch every five seconds; nothing of a server
that is stopped is worth that wait."""
_TAIL_LINES = 30


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How one server is started."""

    model_path: str
    python: str
    """Interpreter that serves; '' = this one."""
    device: str
    """``cpu`` or ``cuda``."""
    dtype: str
    """``fp32`` or ``bf16``."""
    context_length: int
    """Tokens in any one context."""
    max_running_requests: int
    host: str = "127.0.0.1"
    port: int = 0
    """0 = a free one, chosen at the first start and kept."""
    gpu_ids: tuple[int, ...] = ()
    """GPUs of this server; () = those that the process sees."""
    tensor_parallel: int = 1
    mem_fraction_static: float = 0.8
    max_total_tokens: int | None = None
    """Tokens in the KV cache. None = what the memory holds; on a CPU at most 64 full contexts."""
    trust_remote_code: bool = False
    enforce_eager: bool = False
    """No CUDA graphs."""
    memory_saver: bool = False
    """Weights and KV cache can be released (colocation). On a CPU there is nothing to release."""
    deterministic: bool = False
    rl_on_policy_target: str | None = None
    seed: int = 0
    cpu_threads: int = 1
    """OpenMP threads of one rank on a CPU."""
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    """Further flags by name: ``attention_backend: fa3`` is ``--attention-backend fa3``; True is a
    bare flag, False and None leave it out, a mapping is given as JSON. They win over ours."""

    def command(self, port: int, nccl_port: int) -> list[str]:
        """What is executed, with ``self.python`` resolved.

        The tokenizer stays loaded (no ``skip_tokenizer_init``): stop strings need it, and with it
        the tokens per second were the same.
        """
        flags: dict[str, Any] = {
            "model_path": self.model_path,
            "host": self.host,
            "port": port,
            "nccl_port": nccl_port,
            "device": self.device,
            "dtype": _DTYPES[self.dtype],
            "context_length": self.context_length + CONTEXT_SLACK,
            "max_running_requests": self.max_running_requests,
            "tp_size": self.tensor_parallel,
            "mem_fraction_static": self.mem_fraction_static,
            "max_total_tokens": self.max_total_tokens,
            "trust_remote_code": self.trust_remote_code,
            "random_seed": self.seed,
            # else generation_config.json of the model would change what is sampled
            "sampling_defaults": "openai",
            # an idle scheduler would spin on a core that the trainer needs
            "sleep_on_idle": True,
            "enable_deterministic_inference": self.deterministic,
            "rl_on_policy_target": self.rl_on_policy_target,
            "log_level_http": "warning",
        }
        if self.device == "cpu":
            flags["attention_backend"] = "torch_native"
            if self.max_total_tokens is None:
                contexts = min(self.max_running_requests, _MAX_CPU_CONTEXTS)
                flags["max_total_tokens"] = contexts * flags["context_length"]
        else:
            flags["enable_memory_saver"] = self.memory_saver
            flags["disable_cuda_graph"] = self.enforce_eager
        flags.update({name.replace("-", "_"): value for name, value in self.extra_args.items()})
        words = [self.python or sys.executable, "-m", "sglang.launch_server"]
        for name, value in flags.items():
            words += _flag(name, value)
        return words

    def environment(self) -> dict[str, str]:
        """Variables of the server: this process's, and what SGLang needs to run on the device."""
        env = dict(os.environ)
        if self.python and self.python != sys.executable:
            for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):  # of another interpreter
                env.pop(name, None)
        env["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"  # for CONTEXT_SLACK; never filled
        if self.device == "cpu":
            env["SGLANG_USE_CPU_ENGINE"] = "1"
            env["OMP_NUM_THREADS"] = str(self.cpu_threads)
            env["OMP_WAIT_POLICY"] = "PASSIVE"
            if self.tensor_parallel > 1:
                env["SGLANG_CPU_OMP_THREADS_BIND"] = self._cores()
        elif self.gpu_ids:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.gpu_ids))
        return env

    def check(self) -> None:
        """Raise ``ConfigError`` for settings that SGLang cannot serve."""
        if self.dtype not in _DTYPES or self.device not in ("cpu", "cuda"):
            raise ConfigError(
                f"an SGLang server needs dtype fp32 or bf16 and device cpu or cuda, got "
                f"{self.dtype!r} and {self.device!r}"
            )
        if self.rl_on_policy_target is not None and self.device == "cpu":
            raise ConfigError(
                f"models.policy.rl_on_policy_target={self.rl_on_policy_target} needs GPUs: its "
                "kernels do not exist on a CPU; set it to null or models.policy.num_gpu above 0"
            )

    def _cores(self) -> str:
        """One share of the cores a rank, as SGLang writes it: ``0,1|2,3``."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
        shares = [cores[rank :: self.tensor_parallel] for rank in range(self.tensor_parallel)]
        return "|".join(",".join(map(str, share or cores[:1])) for share in shares)


def _flag(name: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    words = [f"--{name.replace('_', '-')}"]
    if value is True:
        return words
    if isinstance(value, Mapping):
        return [*words, json.dumps(dict(value))]
    if isinstance(value, (list, tuple)):
        return [*words, *map(str, value)]
    return [*words, str(value)]


def check_version(python: str) -> str:
    """The SGLang version of an interpreter.

    Raises ``ConfigError`` naming ``models.policy.sglang_python`` when there is none that is known.
    """
    python = python or sys.executable
    ask = "import importlib.metadata as m; print('sglang', m.version('sglang'))"
    remedy = (
        f"set {_PYTHON_KEY} to a Python with sglang=={max(SUPPORTED)} (pip install "
        f"'sglang=={max(SUPPORTED)}'; without a GPU, tests/sglang_env.sh makes one)"
    )
    try:
        done = subprocess.run(
            [python, "-I", "-c", ask], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{_PYTHON_KEY}={python} cannot be run: {error}; {remedy}") from error
    found = re.search(r"^sglang (\S+)$", done.stdout, re.MULTILINE)
    if found is None:
        problem = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigError(f"{_PYTHON_KEY}={python} has no SGLang ({problem}); {remedy}")
    version = found[1].split("+")[0].split(".post")[0]
    if version not in SUPPORTED:
        raise ConfigError(
            f"{_PYTHON_KEY}={python} has sglang {found[1]}; supported are "
            f"{', '.join(SUPPORTED)}, because the weight-update API differs between versions; "
            f"{remedy}"
        )
    return found[1]


class SGLangServer:
    """One server process.

    Args:
        settings: how to start it.
        log_file: where everything goes that the server prints; appended to.
    """

    def __init__(self, settings: ServerSettings, *, log_file: Path) -> None:
        settings.check()
        self._settings, self._log_file = settings, Path(log_file)
        self._port = settings.port
        self._guard: subprocess.Popen[str] | None = None
        self._pid: int | None = None

    @property
    def url(self) -> str:
        """Where it answers; the same after every start."""
        if not self._port:
            raise EngineError("this SGLang server has no address before its first start")
        return f"http://{self._settings.host}:{self._port}"

    @property
    def pid(self) -> int:
        """The process that answers HTTP; leader of a session with all the others."""
        if self._pid is None:
            raise EngineError("this SGLang server has not been started")
        return self._pid

    @property
    def is_alive(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    async def start(self, *, timeout_s: float) -> None:
        """Start the server; returns when it has generated a token.

        Raises ``ConfigError`` when the interpreter has no SGLang that is known, ``EngineError``
        with the end of the log when the server dies or is not ready in time.
        """
        if self.is_alive:
            raise EngineError(f"the SGLang server at {self.url} runs already, pid {self._pid}")
        version = await asyncio.to_thread(check_version, self._settings.python)
        started = time.monotonic()
        begin = self._launch()
        logger.debug("SGLang %s at %s, pid %d, log %s", version, self.url, self.pid, self._log_file)
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as http:
                while not await self._is_ready(http):
                    if not self.is_alive:
                        raise self._failure(f"ended with code {self._guard.returncode}", begin)
                    if time.monotonic() - started > timeout_s:
                        raise self._failure(
                            f"was not ready within models.policy.engine_start_timeout_s="
                            f"{timeout_s:g}",
                            begin,
                        )
                    await asyncio.sleep(0.25)
        except BaseException:
            await self.stop()
            raise

    async def wait_exit(self) -> int:
        """Wait for the server's end; its exit code, 128 + n after signal n."""
        if self._guard is None:
            raise EngineError("this SGLang server has not been started")
        while self._guard.poll() is None:
            await asyncio.sleep(0.2)
        return self._guard.returncode

    async def stop(self) -> None:
        """End the server with all its processes: SIGTERM, and SIGKILL after a few seconds."""
        guard = self._guard
        if guard is None:
            return
        if guard.poll() is None:
            guard.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 2 * _GRACE_S
        while guard.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if guard.poll() is None:
            guard.kill()  # the server follows: see orphan_guard
            await asyncio.to_thread(guard.wait)

    def _launch(self) -> int:
        """Start the processes; where this start begins in the log."""
        nccl_port, port = _free_ports(self._settings.host)
        self._port = self._port or port
        guard = (sys.executable, "-I", str(_GUARD), str(os.getpid()), str(_GRACE_S))
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("ab") as log:
            begin = log.tell()
            self._guard = subprocess.Popen(
                [*guard, *self._settings.command(self._port, nccl_port)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._settings.environment(),
                text=True,
                start_new_session=True,  # Ctrl-C is for the run, which stops its servers itself
            )
        with self._guard.stdout as lines:
            first = lines.readline()
        if not first:
            self._guard.wait()
            raise self._failure("could not be executed", begin)
        self._pid = int(first)
        return begin

    async def _is_ready(self, http: aiohttp.ClientSession) -> bool:
        try:
            async with http.get(f"{self.url}/health_generate") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, asyncio.TimeoutError):
            return False

    def _failure(self, what: str, begin: int) -> EngineError:
        with self._log_file.open("rb") as log:
            log.seek(begin)
            lines = log.read().decode(errors="replace").splitlines()
        tail = "\n".join(line[:400] for line in lines[-_TAIL_LINES:])
        return EngineError(
            f"the SGLang server of {self._settings.model_path} at {self.url} {what}; the end of "
            f"{self._log_file}:\n{tail or '(empty)'}"
        )


def _free_ports(host: str) -> tuple[int, int]:
    """Two different free ports; held together, so that they differ."""
    with socket.socket() as one, socket.socket() as two:
        for held in (one, two):
            held.bind((host, 0))
        return one.getsockname()[1], two.getsockname()[1]
