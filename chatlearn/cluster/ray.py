"""Trainer ranks, engines and rollout workers as processes of one or several machines, under Ray.

    driver          train(), the prompts, the run folder
    TrainerRank     one a GPU (or a few CPUs): a shard of the policy, FSDP2
    EngineHost      one a server: starts SGLang on its machine, and again when it dies
    RolloutWorker   a process that runs many agents and asks the engines over HTTP

Tokens and weights never pass the driver: agents reach the engines themselves, and ranks send
weights to them. What dies: an engine and a worker are started again and their rollouts asked anew;
a rank ends the run, and the same command continues from the last checkpoint. Only the ``ray*.py``
files of this folder import ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from chatlearn.cluster.agents import import_user_code
from chatlearn.cluster.fleet import SGLangFleet
from chatlearn.cluster.nodes import Node
from chatlearn.cluster.ray_actors import (
    RANK,
    HostActor,
    RankActor,
    RemoteHost,
    RemoteTrainer,
    WorkerActor,
    original,
    result,
    results,
)
from chatlearn.cluster.ray_place import RaySession
from chatlearn.cluster.settings import server_settings, sglang_engines
from chatlearn.config import GrpoConfig
from chatlearn.errors import ConfigError, EngineError, EngineLost
from chatlearn.models.policy.weight_buckets import Sent
from chatlearn.types import Budget, Outcome, SamplingParams, Session, Task, Trajectory

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
"""Times one run is given to a worker when workers die under it."""
_RAY_WAIT_S = 60.0
"""Seconds a restarted worker may take to answer."""


class _Seat(NamedTuple):
    """Where one trainer rank is."""

    ip: str
    gpus: tuple[int, ...]
    bundle: int


class RayCluster:
    """Implements ``interfaces.Cluster`` on Ray.

    Args:
        cfg: the run's configuration.
        logs: folder for the logs of servers, on machines that share the disk.
        node: this machine; must be the head.
    """

    engine: SGLangFleet
    trainer: RemoteTrainer

    def __init__(self, cfg: GrpoConfig, *, logs: Path, node: Node) -> None:
        self._cfg, self._logs = cfg, logs.resolve()
        self._place = (None if cfg.runtime_args.working_dir else os.getcwd(), list(sys.path))
        self._session = RaySession(cfg, node)
        self._group: PlacementGroup | None = None
        self._hosts: list[RemoteHost] = []
        self._workers: list[Any] = []
        self._busy: list[int] = []
        self._reviving: dict[int, asyncio.Task[None]] = {}
        self._counts: Counter[str] = Counter()

    async def __aenter__(self) -> RayCluster:
        try:
            await self._start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """End everything this run started, whatever state it is in."""
        for revival in self._reviving.values():
            revival.cancel()
        if hasattr(self, "engine"):
            await self.engine.close()
        if self._hosts and ray.is_initialized():
            stops = [host.actor.stop.remote() for host in self._hosts]
            await asyncio.wait(map(asyncio.ensure_future, stops), timeout=30)
        self._session.close()

    def metrics(self) -> dict[str, float]:
        total = Counter(self.engine.stats())
        asked = [w.stats.remote() for i, w in enumerate(self._workers) if i not in self._reviving]
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=10)
        for answer in done:
            try:
                total.update(ray.get(answer))
            except (RayActorError, RayTaskError):
                continue  # a worker that dies here is revived by its next run
        total.update(self._counts)
        self._counts.clear()
        return {name: float(value) for name, value in total.items()} | {
            "rollout/worker_restarts": float(total["rollout/worker_restarts"])
        }

    def validate(self, tasks: Sequence[Task]) -> list[Task]:
        if not tasks:
            return []
        try:
            return ray.get(self._workers[0].validate.remote(list(tasks)))
        except RayTaskError as error:
            raise original(error) from None

    async def run_agent(
        self, task: Task, *, sampling: SamplingParams, budget: Budget, session: Session
    ) -> Trajectory:
        """Run one agent in the worker that has the least to do; a worker that dies under it is
        replaced and the run starts again elsewhere."""
        for attempt in range(_MAX_ATTEMPTS):
            home = self.engine.pool.router.home(session.group, self._homes())
            asked = replace(session, run=f"{session.run}.w{attempt}") if attempt else session
            index = await self._free_worker()
            self._busy[index] += 1
            self.engine.pool.router.load[home] += 1
            try:
                return await self._workers[index].run.remote(
                    task,
                    sampling=sampling,
                    budget=budget,
                    session=asked,
                    home=home,
                    version=self.engine.pool.version,
                )
            except (RayActorError, RayTaskError) as error:
                if isinstance(error, RayTaskError) and not isinstance(error.cause, EngineLost):
                    raise original(error) from None
                logger.warning("rollout worker %d died under %s", index, asked)
                self._revive(index)
            finally:
                self._busy[index] -= 1
                self.engine.pool.router.load[home] -= 1
        return Trajectory(
            task=task,
            uid=str(session),
            outcome=Outcome.ENGINE_ERROR,
            error=f"{_MAX_ATTEMPTS} rollout workers died while they ran it",
        )

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        """Colocated: the engines sleep, the trainer takes the memory and gives it back."""
        await self.engine.sleep()
        if self._cfg.is_colocated:
            await self.trainer.each("onload", weights=True, rest=True)
        yield
        if self._cfg.is_colocated:
            await self.trainer.each("offload", rest=True)

    async def _start(self) -> None:
        cfg = self._cfg
        import_user_code(cfg)  # a mistake in it is told before anything is started
        self._group = await self._session.open()
        self._make_workers()
        if cfg.is_colocated:
            described = await self._start_ranks()
            await self.trainer.each("offload", weights=True, rest=True)
            urls = await self._start_engines()
        else:
            described, urls = await asyncio.gather(self._start_ranks(), self._start_engines())
        vocabulary = described["vocabulary"]
        await self.trainer.each(
            "connect", urls, vocabulary, self._logs.parent / "weights", self._seats[0].ip
        )
        self.engine = SGLangFleet(
            sglang_engines(cfg, urls, vocabulary),
            self._hosts,
            self._send,
            self._expected_checksums,
            cfg.models.policy,
            at_hand=self._weights_loaded if cfg.is_colocated else nullcontext,
            pauses=cfg.runtime_args.max_staleness > 0,
            colocated=cfg.is_colocated,
            sends_adapters=cfg.models.policy_trainer.lora_publish == "adapter",
        )
        self._load = (cfg, urls, vocabulary, cfg.models.rollout_manager.num_worker)
        await self._load_workers()
        logger.info(
            "policy %s: %s; %d engines, %d rollout workers",
            *(cfg.policy_path, described["description"], len(urls), len(self._workers)),
        )

    async def _start_ranks(self) -> dict[str, Any]:
        """The ranks in the order of machines and GPUs, so that neighbours share an engine; what
        they say of the policy."""
        settings = self._cfg.models.policy_trainer
        gpus = 1 if settings.num_gpu else 0
        cpus = 1 if settings.num_gpu else settings.cpu_per_process
        actors = [
            ray.remote(RankActor)
            .options(num_gpus=gpus, num_cpus=cpus, scheduling_strategy=self._in_bundle(i))
            .remote(self._place, self._cfg)
            for i in range(settings.num_rank)
        ]
        where = await results([actor.where.remote() for actor in actors], RANK)
        self._seats = sorted(_Seat(ip, gpus, bundle) for bundle, (ip, gpus, _) in enumerate(where))
        logger.info("trainer ranks: %s", ", ".join(f"{ip} pid {pid}" for ip, _, pid in where))
        ranks = [actors[seat.bundle] for seat in self._seats]
        meeting = await result(ranks[0].call.remote("meeting_point", self._seats[0].ip), RANK)
        loads = [actor.call.remote("load", meeting, rank) for rank, actor in enumerate(ranks)]
        self.trainer = RemoteTrainer(ranks, self._room if self._cfg.is_colocated else nullcontext)
        described = (await results(loads, RANK))[0]
        self.trainer.packs_trees = described["packs_trees"]
        return described

    async def _start_engines(self) -> list[str]:
        cfg, policy = self._cfg, self._cfg.models.policy
        split = policy.tensor_model_parallel_size
        on_own_gpus = policy.num_gpu and not cfg.is_colocated
        for i in range(policy.num_engine):
            bundle, gpus = cfg.models.policy_trainer.num_rank + i, ()
            if policy.num_gpu and cfg.is_colocated:
                bundle, gpus = self._seats[i * split].bundle, self._gpus_of_engine(i)
            actor = (
                ray.remote(HostActor)
                .options(
                    num_gpus=split if on_own_gpus else 0,
                    num_cpus=0,
                    scheduling_strategy=self._in_bundle(bundle),
                )
                .remote(
                    self._place,
                    server_settings(cfg, gpu_ids=gpus),
                    self._logs / f"engine_{i}.log",
                )
            )
            self._hosts.append(RemoteHost(actor, f"the host of engine {i}"))
        starts = [host.start(timeout_s=policy.engine_start_timeout_s) for host in self._hosts]
        started = await asyncio.gather(*starts)
        logger.info("engines: %s", ", ".join(f"{url} pid {pid}" for url, pid in started))
        return [url for url, _ in started]

    def _gpus_of_engine(self, index: int) -> tuple[int, ...]:
        """The GPUs of the ranks that engine ``index`` shares; they must be of one machine."""
        split = self._cfg.models.policy.tensor_model_parallel_size
        shared = self._seats[index * split : (index + 1) * split]
        if len({seat.ip for seat in shared}) > 1:
            raise ConfigError(
                f"models.policy.tensor_model_parallel_size = {split}: engine {index} would be on "
                "two machines; set it to a divisor of the GPUs of one machine"
            )
        return tuple(gpu for seat in shared for gpu in seat.gpus)

    def _make_workers(self) -> None:
        """Only the processes, which import while the others load."""
        manager = self._cfg.models.rollout_manager
        first = self._group.bundle_count - manager.num_worker
        for i in range(manager.num_worker):
            actor = ray.remote(WorkerActor).options(
                num_cpus=manager.cpu_per_process,
                max_restarts=-1,
                max_concurrency=self._cfg.runtime_args.max_concurrent_rollouts + 16,
                scheduling_strategy=self._in_bundle(first + i),
            )
            self._workers.append(actor.remote(self._place))
        self._busy = [0] * len(self._workers)

    async def _load_workers(self) -> None:
        loaded = [worker.load.remote(*self._load) for worker in self._workers]
        pids = await results(loaded, "a rollout worker")
        logger.info("rollout workers: %s", ", ".join(f"pid {pid}" for pid in pids))

    def _in_bundle(self, index: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)

    @asynccontextmanager
    async def _room(self) -> AsyncIterator[None]:
        """Between trainings: the trainer is whole on the devices, and the engines keep their
        weights."""
        await self.engine.make_room()
        await self.trainer.each("onload", weights=True, rest=True)
        yield
        await self.trainer.each("offload", weights=True, rest=True)
        await self.engine.wake()

    @asynccontextmanager
    async def _weights_loaded(self) -> AsyncIterator[None]:
        await self.trainer.each("onload", weights=True)
        yield
        await self.trainer.each("offload", weights=True)

    async def _send(self, weights: RemoteTrainer, targets: Sequence[int], version: int) -> Sent:
        """Every rank's part of a publish (``fleet.Send``)."""
        parts = await weights.each("send", list(targets), version)
        return Sent.merged(parts)

    async def _expected_checksums(self, weights: RemoteTrainer) -> dict[str, str] | None:
        return (await weights.each("expected_checksums"))[0]

    def _homes(self) -> set[int]:
        """Engines that may be given a group; all of them when none is alive, which will change."""
        return set(self.engine.pool.alive) or set(range(len(self._hosts)))

    async def _free_worker(self) -> int:
        """The living worker with the fewest runs."""
        while len(self._reviving) == len(self._workers):
            waiting = [task for task in self._reviving.values() if not task.done()]
            if not waiting:
                raise EngineError(
                    "no rollout worker is left, so no agent can run; the run's log says how each "
                    "died. The same command continues from the last checkpoint"
                )
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        living = [i for i in range(len(self._workers)) if i not in self._reviving]
        return min(living, key=self._busy.__getitem__)

    def _revive(self, index: int) -> None:
        if index in self._reviving:
            return
        self._counts["rollout/worker_restarts"] += 1
        self._reviving[index] = asyncio.create_task(self._reload(index))

    async def _reload(self, index: int) -> None:
        """Ray starts the process of a dead actor again; this gives it its work back."""
        deadline = time.monotonic() + _RAY_WAIT_S
        while True:
            try:
                pid = await self._workers[index].load.remote(*self._load)
                break
            except RayActorError:
                if time.monotonic() > deadline:
                    logger.error("rollout worker %d does not come back; the others go on", index)
                    return  # stays among the reviving: it is given nothing any more
                await asyncio.sleep(0.5)
        logger.info("rollout worker %d is back: pid %d", index, pid)
        del self._reviving[index]
