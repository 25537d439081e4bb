"""The seams: what an engine, a trainer and a cluster can do. Async only, stdlib only.

``train()`` knows these three and nothing else, so the same loop runs in one process on a CPU and on
a Ray cluster (law 6). Each can be faked in twenty lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from chatlearn.types import (
    Budget,
    Completion,
    MicroBatch,
    Sample,
    SamplingParams,
    Session,
    Task,
    Trajectory,
)

if TYPE_CHECKING:
    import torch

Weights = Iterable[tuple[str, "torch.Tensor"]]
"""Named parameters under their Hugging Face names, one at a time, as often as they are asked for. A
cluster's trainer and engine pass each other a handle instead: weights do not travel through the
driver."""


asked_by_socket: ContextVar[bool] = ContextVar("chatlearn_asked_by_socket", default=False)
"""Set where the engine is asked for a client at a socket, which may block a thread of the run."""


class Engine(Protocol):
    """Samples tokens from the policy."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, session: Session
    ) -> Completion:
        """Sample one completion of ``prompt_ids`` [P].

        Requests awaited at the same time are batched. ``session`` says whose request it is: an
        engine may keep a cache for it. Raises ``EngineError`` when it cannot sample.
        """
        ...

    async def publish(self, weights: Weights, *, version: int) -> None:
        """Take new weights; later tokens are of ``version``. Stale caches are dropped."""
        ...

    async def sleep(self) -> None:
        """Give back the memory that sampling needs; nothing is in flight."""
        ...

    async def wake(self) -> None:
        """Undo ``sleep``."""
        ...

    async def abort(self, session: Session) -> None:
        """End what ``session`` has in flight and forget its caches; harmless when it is done."""
        ...


class Trainer(Protocol):
    """Updates the policy."""

    ranks: int
    """Processes that update it together; a step's micro-batches are a multiple of it."""
    packs_trees: bool
    """Whether a step's micro-batches should share what samples begin with."""

    async def step(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """One optimizer update over ``micro_batches``; returns metrics, flat ``area/quantity``."""
        ...

    async def logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        """log p of every token of every sample under the current weights, each at its own
        ``Sample.temperatures``. [[L], ...], first 0.0"""
        ...

    async def weights(self) -> Weights:
        """The current weights, to publish."""
        ...

    async def save(self, folder: Path) -> None:
        """Write ``folder/hf`` (loads with ``from_pretrained``) and ``folder/state``."""
        ...

    async def restore(self, folder: Path) -> None:
        """Continue from what ``save`` wrote, to the same bits."""
        ...


class Cluster(Protocol):
    """Who runs where. Used as ``async with cluster:`` around the whole run."""

    engine: Engine
    trainer: Trainer

    async def run_agent(
        self, task: Task, *, sampling: SamplingParams, budget: Budget, session: Session
    ) -> Trajectory:
        """Run one agent on one task and score it. A bad rollout is returned, not raised."""
        ...

    def training(self) -> AbstractAsyncContextManager[Any]:
        """Around optimizer steps: colocated engines sleep, the trainer loads."""
        ...

    def metrics(self) -> dict[str, float]:
        """Counters of the engine since the last call, flat ``engine/quantity``."""
        ...

    def validate(self, tasks: Sequence[Task]) -> list[Task]:
        """Before training: refuse tasks whose agent, agent YAML or reward cannot be had, and
        leave out those whose prompt is too long."""
        ...

    async def __aenter__(self) -> Cluster: ...

    async def __aexit__(self, *exc_info: object) -> None: ...
