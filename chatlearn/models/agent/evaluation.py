"""Held-out evaluation: the same agents with their own sampling parameters, nothing trained."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from chatlearn.models.agent.rollout_manager import RunAgent
from chatlearn.types import Budget, Group, SamplingParams, Session, Task, Trajectory


async def evaluate(
    run_agent: RunAgent,
    tasks: Sequence[Task],
    *,
    sampling: SamplingParams,
    budget: Budget,
    samples_per_task: int,
    max_concurrent_rollouts: int,
) -> list[Group]:
    """``samples_per_task`` runs of every task, as groups in the order of ``tasks``.

    Seeds depend on the task and the sample, not on when the evaluation happens: two evaluations
    differ by the weights alone.
    """
    concurrency = asyncio.Semaphore(max_concurrent_rollouts)

    async def one(task: Task, sample: int) -> Trajectory:
        async with concurrency:
            session = Session(group=f"eval:{task.uid}", run=str(sample))
            return await run_agent(task, sampling=sampling, budget=budget, session=session)

    runs = [[asyncio.create_task(one(task, i)) for i in range(samples_per_task)] for task in tasks]
    try:
        return [
            Group(task, list(await asyncio.gather(*siblings)))
            for task, siblings in zip(tasks, runs, strict=True)
        ]
    finally:
        for siblings in runs:
            for run in siblings:
                run.cancel()
