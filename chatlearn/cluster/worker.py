"""One rollout worker of a cluster: runs agents, and asks the engines over HTTP."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from chatlearn.cluster.agents import Agents, import_user_code
from chatlearn.cluster.settings import Vocabulary, sglang_engines
from chatlearn.config import GrpoConfig
from chatlearn.models.engine.pool import EnginePool
from chatlearn.models.policy.loading import load_tokenizer
from chatlearn.types import Budget, SamplingParams, Session, Task, Trajectory

_MAX_THREADS = 256
"""Sync nodes and tools that may be under way at once."""


class RolloutWorker:
    """Agents on one side, engines on the other; lives in an event loop of its own process.

    Args:
        cfg: the run's configuration.
        urls: the engines' addresses; which one serves a group is said with each run.
        vocabulary: of the policy.
        workers: processes like this one, which share the engines.

    Raises:
        ConfigError, AgentError, TrainerError: user code or the tokenizer cannot be loaded.
    """

    def __init__(
        self, cfg: GrpoConfig, urls: Sequence[str], vocabulary: Vocabulary, workers: int
    ) -> None:
        policy = cfg.models.policy
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_MAX_THREADS))
        import_user_code(cfg)
        trust = cfg.models.policy_trainer.trust_remote_code
        tokenizer = load_tokenizer(cfg.policy_path, trust_remote_code=trust)
        self._agents = Agents(cfg, tokenizer, vocabulary.eos)
        self._engines = sglang_engines(cfg, urls, vocabulary)
        self._pool = EnginePool(
            self._engines,
            max_in_flight=-(-policy.max_concurrent_requests // workers),
            patience_s=policy.engine_start_timeout_s,
        )
        # Else every full collection walks all imported libraries: 0.3 s in which no agent moves,
        # and 40 % of the CPU time of 256 agents.
        gc.collect()
        gc.freeze()

    def validate(self, tasks: Sequence[Task]) -> list[Task]:
        """See ``interfaces.Cluster.validate``."""
        return self._agents.validate(tasks)

    async def run(
        self,
        task: Task,
        *,
        sampling: SamplingParams,
        budget: Budget,
        session: Session,
        home: int,
        version: int,
    ) -> Trajectory:
        """Run one agent; ``home`` is the engine of its group, while that is alive, and ``version``
        that of the weights published last."""
        self._pool.router.settle(session.group, home)
        self._pool.version = max(self._pool.version, version)
        return await self._agents.run(
            task, engine=self._pool, sampling=sampling, budget=budget, session=session
        )

    def stats(self) -> dict[str, float]:
        """Counters of this worker's engine clients since the last call."""
        total: dict[str, float] = {"engine/reissued": float(self._pool.reissued)}
        self._pool.reissued = 0
        for engine in self._engines:
            for name, value in engine.stats().items():
                total[name] = total.get(name, 0.0) + value
        return total
