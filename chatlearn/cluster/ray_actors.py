"""The processes of a Ray cluster, and how the driver asks them.

An actor stands where the driver stands (folder, import path) and wraps a plain class; the
``Remote`` classes are the same things seen from the driver.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from chatlearn.cluster.rank import TrainerRank
from chatlearn.cluster.worker import RolloutWorker
from chatlearn.config import GrpoConfig
from chatlearn.errors import ChatLearnError, EngineLost, TrainerError
from chatlearn.models.engine.sglang_server import ServerSettings, SGLangServer
from chatlearn.types import MicroBatch, Sample, Task, Trajectory

logger = logging.getLogger(__name__)

RANK = "a trainer rank"
"""How errors call one."""


class Actor:
    """What every actor of this file does first: stand where the driver stands."""

    def __init__(self, folder: str | None, paths: Sequence[str]) -> None:
        if folder is not None and Path(folder).is_dir():
            os.chdir(folder)
        sys.path[:] = [*(p for p in paths if p not in sys.path), *sys.path]
        logging.basicConfig(
            level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        for noisy in ("httpx", "httpcore"):
            logging.getLogger(noisy).setLevel(logging.WARNING)


class RankActor(Actor):
    """``TrainerRank`` as an actor."""

    def __init__(self, place: tuple, cfg: GrpoConfig) -> None:
        super().__init__(*place)
        self._rank = TrainerRank(cfg)

    def where(self) -> tuple[str, tuple[int, ...], int]:
        """Address, GPUs and process of this rank."""
        gpus = tuple(int(gpu) for gpu in ray.get_gpu_ids())
        return ray.util.get_node_ip_address(), gpus, os.getpid()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """One method of ``TrainerRank``."""
        return getattr(self._rank, method)(*args, **kwargs)


class HostActor(Actor):
    """``SGLangServer`` as an actor; async, so that one call may wait for the server's end."""

    def __init__(self, place: tuple, settings: ServerSettings, log_file: Path) -> None:
        super().__init__(*place)
        host = ray.util.get_node_ip_address()
        gpus = settings.gpu_ids or tuple(int(gpu) for gpu in ray.get_gpu_ids())
        self._server = SGLangServer(
            replace(settings, host=host, gpu_ids=gpus), log_file=_here(log_file)
        )

    async def start(self, timeout_s: float) -> tuple[str, int]:
        """Start the server; its address and process."""
        await self._server.start(timeout_s=timeout_s)
        logger.info("SGLang server %s is pid %d", self._server.url, self._server.pid)
        return self._server.url, self._server.pid

    async def wait_exit(self) -> int:
        return await self._server.wait_exit()

    async def stop(self) -> None:
        await self._server.stop()


class WorkerActor(Actor):
    """``RolloutWorker`` as an actor; async, so that many agents run in it at once."""

    def __init__(self, place: tuple) -> None:
        super().__init__(*place)
        self._worker: RolloutWorker | None = None

    async def load(self, *args: Any) -> int:
        """Import user code and connect; the process id."""
        self._worker = RolloutWorker(*args)
        return os.getpid()

    async def validate(self, tasks: Sequence[Task]) -> list[Task]:
        return self._worker.validate(tasks)

    async def run(self, task: Task, **kwargs: Any) -> Trajectory:
        if self._worker is None:
            raise EngineLost("this rollout worker was started again and is not loaded yet")
        return await self._worker.run(task, **kwargs)

    async def stats(self) -> dict[str, float]:
        return self._worker.stats() if self._worker is not None else {}


class RemoteHost:
    """``fleet.Host`` of an actor."""

    def __init__(self, actor: Any, name: str) -> None:
        self.actor, self._name = actor, name

    async def start(self, *, timeout_s: float) -> tuple[str, int]:
        return await result(self.actor.start.remote(timeout_s), self._name)

    async def wait_exit(self) -> int:
        return await result(self.actor.wait_exit.remote(), self._name)


class RemoteTrainer:
    """``interfaces.Trainer`` over the ranks: each call goes to all of them.

    Args:
        ranks: actors, in the order of their ranks.
        room: around what needs the whole trainer on devices that it may share with engines.
    """

    def __init__(
        self,
        ranks: Sequence[Any],
        room: Callable[[], AbstractAsyncContextManager[Any]] = nullcontext,
    ) -> None:
        self.ranks = len(ranks)
        self.packs_trees = False  # until they have loaded the policy and say so
        self._actors, self._room = ranks, room

    async def each(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """``method`` of every rank with the same arguments."""
        return await self._all([a.call.remote(method, *args, **kwargs) for a in self._actors])

    async def step(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """One update; rank r computes every micro-batch whose number is r modulo ``ranks``."""
        if len(micro_batches) % self.ranks:
            raise TrainerError(
                f"{len(micro_batches)} micro-batches for {self.ranks} ranks: every rank needs as "
                "many; pack them with ranks=trainer.ranks"
            )
        parts = [list(micro_batches[rank :: self.ranks]) for rank in range(self.ranks)]
        calls = [a.call.remote("step", p) for a, p in zip(self._actors, parts, strict=True)]
        return (await self._all(calls))[0]

    async def logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        parts = [list(samples[rank :: self.ranks]) for rank in range(self.ranks)]
        async with self._room():
            found = await self._all(
                [
                    actor.call.remote("logprobs", part)
                    for actor, part in zip(self._actors, parts, strict=True)
                ]
            )
        return [found[i % self.ranks][i // self.ranks] for i in range(len(samples))]

    async def weights(self) -> RemoteTrainer:
        """The ranks themselves: they send their weights to the engines, not through here."""
        return self

    async def save(self, folder: Path) -> None:
        async with self._room():
            await self.each("save", folder.resolve())

    async def restore(self, folder: Path) -> None:
        async with self._room():
            await self.each("restore", folder.resolve())

    async def _all(self, calls: Sequence[Any]) -> list[Any]:
        return await results(calls, RANK)


async def results(refs: Sequence[Any], who: str) -> list[Any]:
    """All answers, or the first failure as the actor raised it."""
    return await asyncio.gather(*(result(ref, who) for ref in refs))


async def result(ref: Any, who: str) -> Any:
    try:
        return await ref
    except RayTaskError as error:
        raise original(error) from None
    except RayActorError as error:
        raise TrainerError(
            f"{who} died ({_reason(error)}); the run cannot go on without it. The same command "
            "continues from the last checkpoint"
        ) from None


def original(error: RayTaskError) -> BaseException:
    """What was raised in the actor: our own errors as they are, others with their traceback."""
    cause = error.cause
    return cause if isinstance(cause, ChatLearnError) else error.as_instanceof_cause()


def _reason(error: RayActorError) -> str:
    return " ".join(str(error).split())[:300]


def _here(log_file: Path) -> Path:
    """``log_file``, where this machine can write it; else a folder of its own."""
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        return log_file
    except OSError:
        return Path.cwd() / log_file.name
