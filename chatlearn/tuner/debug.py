"""``--backbone=debug``: a few tasks, everything shown, nothing trained. No Ray, no GPU.

    tasks ──► the same agents, recorder, judge and advantages as in training ──► printed

What answers is the model (``embedded``), a list of texts (``scripted``), or a server (a URL). A
breakpoint in a workflow stops there: runs go on one at a time and have a day.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from chatlearn.config import GrpoConfig
from chatlearn.data.prompt_dataset import read_tasks
from chatlearn.errors import AgentError, ConfigError
from chatlearn.observability.logs import setup_logging
from chatlearn.train import scoring_of
from chatlearn.tuner.debug_report import Report
from chatlearn.types import Budget, Group, SamplingParams, Session, Task, Trajectory

logger = logging.getLogger(__name__)


class Bench(Protocol):
    """What runs agents: a cluster of one process, or agents beside a stand-in for the engine."""

    def validate(self, tasks: Sequence[Task]) -> list[Task]: ...

    async def run_agent(
        self, task: Task, *, sampling: SamplingParams, budget: Budget, session: Session
    ) -> Trajectory: ...


@dataclass(frozen=True, slots=True)
class Setup:
    """An open bench, and what is known of its tokens."""

    bench: Bench
    cfg: GrpoConfig
    """The run's, with limits that fit the bench's tokens."""
    tokenizer: Any
    """None where the tokens are another model's: nothing can be said of them."""
    said: str
    """What answers, for the first line."""


def debug(
    cfg: GrpoConfig,
    *,
    engine: str = "embedded",
    engine_model: str | None = None,
    answers: str | Path | None = None,
    console: Console | None = None,
) -> list[Group]:
    """Run the tasks of ``cfg`` once as training would, and print what happened.

    Args:
        cfg: of one process; its data files hold the tasks to run.
        engine: ``embedded``, ``scripted``, or the URL of an OpenAI-compatible server.
        engine_model: model at that URL.
        answers: JSON file of what ``scripted`` says.
        console: where it is printed; standard output by default.

    Returns:
        The groups, in the order of the tasks.

    Raises:
        ChatLearnError: the model, the engine or the agents cannot be had.
        AgentError: not one run ended in a way that could be trained.
    """
    setup_logging()
    report = Report(console or Console(file=sys.stdout, highlight=False))
    try:
        return asyncio.run(_debug(cfg, engine, engine_model, answers, report))
    finally:
        report.close()


async def _debug(
    cfg: GrpoConfig,
    engine: str,
    engine_model: str | None,
    answers: str | Path | None,
    report: Report,
) -> list[Group]:
    tasks = read_tasks(cfg.runtime_args.data_files)
    async with _setup(cfg, engine, engine_model, answers) as setup:
        tasks = setup.bench.validate(tasks)
        report.begin(setup.said, tasks, cfg)
        groups = []
        for number, task in enumerate(tasks):
            group = await _group(setup, number, task, report)
            advantages, rows = scoring_of(cfg)([group])
            samples = [sample for row in rows for sample in row]
            report.group(group, advantages, samples, setup.tokenizer)
            groups.append(group)
        report.end(groups)
    failed = [t for g in groups for t in g.trajectories if not t.is_trainable]
    if len(failed) == sum(len(group.trajectories) for group in groups):
        raise AgentError(f"not one of {len(failed)} runs could be trained on: {failed[0].error}")
    return groups


async def _group(setup: Setup, number: int, task: Task, report: Report) -> Group:
    """The siblings of one task, with the seeds that training gives to its first prompts."""
    cfg = setup.cfg
    concurrency = asyncio.Semaphore(cfg.runtime_args.max_concurrent_rollouts)

    async def one(sibling: int) -> Trajectory:
        async with concurrency:
            trajectory = await setup.bench.run_agent(
                task,
                sampling=cfg.train_sampling(),
                budget=cfg.train_budget(),
                session=Session(group=f"{number}:{task.uid}", run=f"{sibling}.0"),
            )
            report.run(trajectory, sibling)
            return trajectory

    siblings = range(cfg.models.policy.num_inference_per_prompt)
    return Group(task, list(await asyncio.gather(*map(one, siblings))), ticket=number)


@asynccontextmanager
async def _setup(
    cfg: GrpoConfig, engine: str, engine_model: str | None, answers: str | Path | None
) -> AsyncIterator[Setup]:
    if answers is not None and engine != "scripted":
        raise ConfigError(f"--answers is for --engine=scripted, not for {engine}")
    if engine == "embedded":
        async with _embedded(cfg) as setup:
            yield setup
        return
    from chatlearn.tuner.debug_engines import scripted, url

    if engine == "scripted":
        yield scripted(cfg, answers)
    elif engine.startswith(("http://", "https://")):
        async with url(cfg, engine, engine_model) as setup:
            yield setup
    else:
        raise ConfigError(
            f"--engine={engine}: write embedded, scripted, or a URL: http://127.0.0.1:8000/v1"
        )


@asynccontextmanager
async def _embedded(cfg: GrpoConfig) -> AsyncIterator[Setup]:
    from chatlearn.cluster.local import LocalCluster

    logs = Path(cfg.runtime_args.data_files[0]).parent
    async with LocalCluster(cfg, logs=logs) as cluster:
        await cluster.engine.publish(await cluster.trainer.weights(), version=0)
        said = f"{cfg.policy_path} answers, inside this process"
        yield Setup(cluster, cfg, cluster.trainer.tokenizer, said)
