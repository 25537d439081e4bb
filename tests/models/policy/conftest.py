"""Real ranks: processes with a gloo group between them, which run functions of the test files."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest

_PATIENCE_S = 60


class RankPool:
    """``world`` processes that stay for the session, as they take seconds to start."""

    def __init__(self, world: int, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._listener = Listener(str(folder / "parent"), "AF_UNIX")
        command = [sys.executable, str(Path(__file__).with_name("rank.py"))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self._processes = [
            subprocess.Popen(
                [*command, str(rank), str(world), str(folder / "store"), str(folder / "parent")],
                env=environment,
                stderr=(folder / f"rank{rank}.log").open("w"),
            )
            for rank in range(world)
        ]
        self._pipes: list[Connection] = []
        self._dead: str | None = None

    def attempt(self, job: Callable[..., Any], **arguments: Any) -> list[tuple[Any, str | None]]:
        """Run ``job`` on every rank: what it returned and None, or its error and traceback."""
        if self._dead:
            pytest.fail(f"The ranks are dead since {self._dead}.")
        if not self._pipes:
            pipes = [self._listener.accept() for _ in self._processes]
            self._pipes = [pipe for _, pipe in sorted((pipe.recv(), pipe) for pipe in pipes)]
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((inspect.getsourcefile(job), job.__name__, arguments)))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                answer = pipe.recv_bytes() if pipe.poll(_PATIENCE_S) else None
            except EOFError:
                answer = None
            if answer is None:
                self._kill(job.__name__)
                log = (self._folder / f"rank{rank}.log").read_text()[-3000:]
                pytest.fail(f"{job.__name__} hangs or died on rank {rank}: {log}")
            answers.append(pickle.loads(answer))
        return answers

    def run(self, job: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Run ``job`` on every rank; what each returned, in order."""
        answers = self.attempt(job, **arguments)
        errors = [f"rank {rank}: {trace}" for rank, (_, trace) in enumerate(answers) if trace]
        assert not errors, "\n".join(errors)
        return [value for value, _ in answers]

    def fail(self, job: Callable[..., Any], **arguments: Any) -> list[Exception]:
        """Run ``job``, which must fail on every rank; the errors."""
        answers = self.attempt(job, **arguments)
        assert all(trace for _, trace in answers), f"{job.__name__} did not fail: {answers}"
        return [error for error, _ in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps(None))
            pipe.close()
        for process in self._processes:
            try:
                process.wait(20 if self._pipes else 0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._listener.close()

    def _kill(self, since: str) -> None:
        for process in self._processes:
            process.kill()
        self._pipes, self._dead = [], since


@pytest.fixture(scope="session")
def rank_pools(tmp_path_factory):
    """Pools of one and of two ranks, by their number."""
    folder = tmp_path_factory.mktemp("ranks")
    pools = {world: RankPool(world, folder / str(world)) for world in (2, 1)}
    yield pools
    for pool in pools.values():
        pool.close()
