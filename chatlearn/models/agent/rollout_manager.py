"""Groups in flight: which prompts run, what becomes of failures, and how stale a group may be.

    slot       consumes             waits for                      is freed by
    ---------  -------------------  -----------------------------  ---------------------------------
    a group    the next prompt      a free slot                    release(): weights trained on it
                                                                   are published
    a run      one sibling          max_concurrent_rollouts        the end of the run

There are (1 + max_staleness) slots for every group of an episode. With ``max_staleness=0`` a group
starts only after the weights of the episode before are published: on-policy. Staleness is bounded
by construction; nothing is filtered afterwards.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from chatlearn.data.prompt_stream import PromptStream
from chatlearn.errors import AgentError
from chatlearn.types import Budget, Group, Outcome, SamplingParams, Session, Task, Trajectory

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
"""Times one run is tried when the engine fails under it."""
_MAX_REPLACED = 3
"""At most this many times an episode's groups are replaced for want of signal, then kept."""


class RunAgent(Protocol):
    async def __call__(
        self, task: Task, *, sampling: SamplingParams, budget: Budget, session: Session
    ) -> Trajectory: ...


class RolloutManager:
    """Keeps ``groups_per_episode`` groups coming.

    Args:
        run_agent: runs one sibling; returns failures as trajectories.
        stream: the prompts and their ledger.
        group_size: siblings of one prompt.
        max_failed_fraction: more failed runs than this share of an episode's rollouts end the run
            with ``AgentError``: a broken agent must not train on what little is left (law 4).
        replace_zero_signal_groups: ask another prompt when all siblings have one reward.
        on_trajectory: told of every finished run, for progress.
    """

    def __init__(
        self,
        run_agent: RunAgent,
        stream: PromptStream,
        *,
        sampling: SamplingParams,
        budget: Budget,
        group_size: int,
        groups_per_episode: int,
        max_staleness: int,
        max_concurrent_rollouts: int,
        max_failed_fraction: float,
        replace_zero_signal_groups: bool = False,
        on_trajectory: Callable[[Trajectory], None] = lambda trajectory: None,
    ) -> None:
        self._run_agent = run_agent
        self._stream = stream
        self._sampling = sampling
        self._budget = budget
        self._group_size = group_size
        self._min_group = max(2, (group_size + 1) // 2)
        self._groups_per_episode = groups_per_episode
        self._slots = groups_per_episode * (1 + max_staleness)
        self._concurrency = asyncio.Semaphore(max_concurrent_rollouts)
        self._max_failed = max_failed_fraction * groups_per_episode * group_size
        self._max_failed_fraction = max_failed_fraction
        self._replace_zero_signal = replace_zero_signal_groups
        self._on_trajectory = on_trajectory
        self._running: dict[int, asyncio.Task[Group]] = {}
        self._finished: dict[int, Group] = {}
        self._charged = 0
        self._counts: Counter[str] = Counter()
        self._failures: list[Trajectory] = []
        self.dropped: list[Group] = []
        """Groups of this episode that are not trained; the run folder shows them all the same."""

    async def __aenter__(self) -> RolloutManager:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        self._running.clear()

    async def next_groups(self) -> list[Group]:
        """The next episode's groups, oldest prompt first.

        Raises:
            AgentError: too many runs failed; says how many, how, and what the first one said.
        """
        self._counts, self._failures, self.dropped = Counter(), [], []
        while True:
            self._admit()
            if len(self._finished) >= self._groups_per_episode and self._oldest_are_finished():
                tickets = sorted(self._finished)[: self._groups_per_episode]
                return [self._finished.pop(ticket) for ticket in tickets]
            await asyncio.wait(self._running.values(), return_when=asyncio.FIRST_COMPLETED)
            self._collect()

    def release(self, groups: list[Group]) -> None:
        """The weights trained on ``groups`` are published: their prompts are done for good."""
        for group in groups:
            self._stream.trained(group.ticket)
        self._charged -= len(groups)

    def metrics(self) -> dict[str, float]:
        """Counts of the episode just returned."""
        failed = Counter(str(t.outcome) for t in self._failures)
        return {
            "rollout/failed": float(len(self._failures)),
            "rollout/retried": float(self._counts["retried"]),
            "groups/dropped": float(self._counts["dropped"]),
            "groups/replaced_zero_signal": float(self._counts["replaced"]),
            **{f"failed/{outcome}": float(n) for outcome, n in sorted(failed.items())},
        }

    def _admit(self) -> None:
        while self._charged < self._slots:
            ticket, task = self._stream.take()
            self._charged += 1
            self._running[ticket] = asyncio.create_task(self._run_group(ticket, task))

    def _oldest_are_finished(self) -> bool:
        """Whether no unfinished prompt is older than the groups to be returned."""
        last = sorted(self._finished)[self._groups_per_episode - 1]
        return all(ticket > last for ticket in self._running)

    def _collect(self) -> None:
        for ticket in sorted(t for t, running in self._running.items() if running.done()):
            group = self._running.pop(ticket).result()
            self._note_failures(group)
            if len(group.trainable) < self._min_group:
                self._drop(group, "dropped")
            elif self._replace_zero_signal and not group.has_signal and self._may_replace():
                self._drop(group, "replaced")
            else:
                self._stream.finish(ticket)
                self._finished[ticket] = group

    def _may_replace(self) -> bool:
        return self._counts["replaced"] < _MAX_REPLACED * self._groups_per_episode

    def _drop(self, group: Group, why: str) -> None:
        self._counts[why] += 1
        self.dropped.append(group)
        self._stream.drop(group.ticket)
        self._charged -= 1

    def _note_failures(self, group: Group) -> None:
        # A run whose every turn a check masked is not trained either, and did not fail.
        failures = [t for t in group.trajectories if not t.outcome.is_trainable or t.reward is None]
        for failure in failures:
            logger.warning("run %s ended as %s: %s", failure.uid, failure.outcome, failure.error)
        self._failures += failures
        if len(self._failures) <= self._max_failed:
            return
        counts = Counter(str(t.outcome) for t in self._failures)
        named = ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())
        raise AgentError(
            f"{len(self._failures)} runs of this episode failed ({named}), more than "
            f"runtime_args.max_failed_fraction={self._max_failed_fraction} of its "
            f"{self._groups_per_episode * self._group_size} rollouts; nothing of it was trained. "
            f"The first: {self._failures[0].error}"
        )

    async def _run_group(self, ticket: int, task: Task) -> Group:
        siblings = [
            asyncio.create_task(self._run_sibling(ticket, task, i)) for i in range(self._group_size)
        ]
        try:
            return Group(task, list(await asyncio.gather(*siblings)), ticket)
        finally:
            for sibling in siblings:
                sibling.cancel()

    async def _run_sibling(self, ticket: int, task: Task, sibling: int) -> Trajectory:
        for attempt in range(_MAX_ATTEMPTS):
            session = Session(group=f"{ticket}:{task.uid}", run=f"{sibling}.{attempt}")
            async with self._concurrency:
                trajectory = await self._run_agent(
                    task, sampling=self._sampling, budget=self._budget, session=session
                )
            if trajectory.outcome is not Outcome.ENGINE_ERROR or attempt == _MAX_ATTEMPTS - 1:
                break
            self._counts["retried"] += 1
            logger.warning("run %s is tried again: %s", session, trajectory.error)
        self._on_trajectory(trajectory)
        return trajectory
