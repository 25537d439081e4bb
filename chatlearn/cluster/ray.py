"""Trainer ranks, engines and rollout workers as processes of one or several machines, under Ray.

    driver          train(), the prompts, the run folder
    TrainerRank     one a GPU (or a few CPUs): a shard of the policy, FSDP2
    EngineHost      one a server: starts SGLang on its machine, and again when it dies
    RolloutWorker   a process that runs many agents and asks the engines over HTTP

Tokens and weights never pass the driver: agents reach the engines themselves, and ranks send
weights to them. What dies: an engine and a worker are started again and their rollouts asked anew;
a rank ends the run, and the same command continues from the last checkpoint. The only file that
imports ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from chatlearn.cluster.agents import import_user_code
from chatlearn.cluster.fleet import SGLangFleet
from chatlearn.cluster.nodes import Node, RayProcess, answers, free_port
from chatlearn.cluster.rank import TrainerRank
from chatlearn.cluster.settings import server_settings, sglang_engines
from chatlearn.cluster.worker import RolloutWorker
from chatlearn.config import GrpoConfig
from chatlearn.errors import ChatLearnError, ConfigError, EngineLost, TrainerError
from chatlearn.models.engine.sglang_server import ServerSettings, SGLangServer
from chatlearn.models.policy.weights import Sent
from chatlearn.types import (
    Budget,
    MicroBatch,
    Outcome,
    Sample,
    SamplingParams,
    Session,
    Task,
    Trajectory,
)

logger = logging.getLogger(__name__)

_RANK = "a trainer rank"
_JOINING_S = 600.0
"""Seconds until every machine must have joined."""
_HEAD_S = 60.0
"""Seconds that the head of several machines may take to answer."""
_PLACING_S = 120.0
"""Seconds until missing resources are an error."""
_MAX_ATTEMPTS = 3
"""Times one run is given to a worker when workers die under it."""
_RAY_WAIT_S = 60.0
"""Seconds a restarted worker may take to answer."""


class _Seat(NamedTuple):
    """Where one trainer rank is."""

    ip: str
    gpus: tuple[int, ...]
    bundle: int


class _Place:
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


class _Rank(_Place):
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


class _Host(_Place):
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


class _Worker(_Place):
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


class _RemoteHost:
    """``fleet.Host`` of an actor."""

    def __init__(self, actor: Any, name: str) -> None:
        self.actor, self._name = actor, name

    async def start(self, *, timeout_s: float) -> tuple[str, int]:
        return await _call(self.actor.start.remote(timeout_s), self._name)

    async def wait_exit(self) -> int:
        return await _call(self.actor.wait_exit.remote(), self._name)


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

    async def logprobs(self, samples: Sequence[Sample], temperature: float) -> list[list[float]]:
        async with self._room():
            return (await self.each("logprobs", list(samples), temperature))[0]

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
        return await _gather(calls, _RANK)


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
        self._cfg, self._logs, self._node = cfg, logs.resolve(), node
        self._place = (None if cfg.runtime_args.working_dir else os.getcwd(), list(sys.path))
        self._head: RayProcess | None = None
        self._group: PlacementGroup | None = None
        self._hosts: list[_RemoteHost] = []
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
        ray.shutdown()
        if self._head is not None:
            self._head.stop()

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
            raise _original(error) from None

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
                    raise _original(error) from None
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
        needed = _resources(cfg)
        await self._connect(needed)
        self._group = await _placed(cfg, needed)
        self._make_workers()
        if cfg.is_colocated:
            described = await self._start_ranks()
            await self.trainer.each("offload", weights=True, rest=True)
            urls = await self._start_engines()
        else:
            described, urls = await asyncio.gather(self._start_ranks(), self._start_engines())
        eos = described["eos"]
        await self.trainer.each(
            "connect", urls, eos, self._logs.parent / "weights", self._seats[0].ip
        )
        self.engine = SGLangFleet(
            sglang_engines(cfg, urls, eos),
            self._hosts,
            self._send,
            self._expected_checksums,
            cfg.models.policy,
            at_hand=self._weights_loaded if cfg.is_colocated else nullcontext,
            pauses=cfg.runtime_args.max_staleness > 0,
            colocated=cfg.is_colocated,
        )
        self._load = (cfg, urls, eos, cfg.models.rollout_manager.num_worker)
        await self._load_workers()
        logger.info(
            "policy %s: %s; %d engines, %d rollout workers",
            *(cfg.policy_path, described["description"], len(urls), len(self._workers)),
        )

    async def _connect(self, needed: Sequence[dict[str, float]]) -> None:
        """Join the Ray cluster of ``ray_address``, or start one on the machines of this run."""
        run = self._cfg.runtime_args
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.ERROR}
        if run.working_dir is not None:
            options["runtime_env"] = {"working_dir": run.working_dir}
        if run.ray_address is not None:
            options["address"] = run.ray_address
        else:
            cpus = None
            if self._node.count == 1:
                # on a laptop the processes share what cores there are; Ray only counts them
                wanted = sum(bundle.get("CPU", 0) for bundle in needed)
                cpus = max(os.cpu_count() or 1, int(wanted))
                self._node = replace(self._node, port=free_port())
            self._head = RayProcess(self._node, num_cpus=cpus)
            await self._wait_for_head()
            options["address"] = f"{self._node.head}:{self._node.port}"
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster at runtime_args.ray_address={run.ray_address}: {error}"
            ) from error
        await self._wait_for_machines()

    async def _wait_for_head(self) -> None:
        deadline = time.monotonic() + _HEAD_S
        while not answers(self._node.head, self._node.port):
            if self._head.poll() is not None or time.monotonic() > deadline:
                raise ConfigError(
                    f"Ray does not start on MASTER_ADDR={self._node.head}, "
                    f"MASTER_PORT={self._node.port}: RANK=0 must be the machine of that address, "
                    f"and the port must be free. Ray said: {self._head.tail()}"
                )
            await asyncio.sleep(0.5)

    async def _wait_for_machines(self) -> None:
        deadline, seen = time.monotonic() + _JOINING_S, 0
        while self._node.count > 1 and self._cfg.runtime_args.ray_address is None:
            alive = sum(node["Alive"] for node in ray.nodes())
            if alive != seen:
                logger.info("%d of %d machines have joined", alive, self._node.count)
                seen = alive
            if alive >= self._node.count:
                return
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{alive} of WORLD_SIZE={self._node.count} machines joined within "
                    f"{_JOINING_S:g} s; start the same command on each with its own RANK and "
                    f"MASTER_ADDR={self._node.head}, MASTER_PORT={self._node.port}"
                )
            await asyncio.sleep(1.0)

    async def _start_ranks(self) -> dict[str, Any]:
        """The ranks in the order of machines and GPUs, so that neighbours share an engine; what
        they say of the policy."""
        settings = self._cfg.models.policy_trainer
        gpus = 1 if settings.num_gpu else 0
        cpus = 1 if settings.num_gpu else settings.cpu_per_process
        actors = [
            ray.remote(_Rank)
            .options(num_gpus=gpus, num_cpus=cpus, scheduling_strategy=self._in_bundle(i))
            .remote(self._place, self._cfg)
            for i in range(settings.num_rank)
        ]
        where = await _gather([actor.where.remote() for actor in actors], _RANK)
        self._seats = sorted(_Seat(ip, gpus, bundle) for bundle, (ip, gpus, _) in enumerate(where))
        logger.info("trainer ranks: %s", ", ".join(f"{ip} pid {pid}" for ip, _, pid in where))
        ranks = [actors[seat.bundle] for seat in self._seats]
        meeting = await _call(ranks[0].call.remote("meeting_point", self._seats[0].ip), _RANK)
        loads = [actor.call.remote("load", meeting, rank) for rank, actor in enumerate(ranks)]
        self.trainer = RemoteTrainer(ranks, self._room if self._cfg.is_colocated else nullcontext)
        return (await _gather(loads, _RANK))[0]

    async def _start_engines(self) -> list[str]:
        cfg, policy = self._cfg, self._cfg.models.policy
        split = policy.tensor_model_parallel_size
        on_own_gpus = policy.num_gpu and not cfg.is_colocated
        for i in range(policy.num_engine):
            bundle, gpus = cfg.models.policy_trainer.num_rank + i, ()
            if policy.num_gpu and cfg.is_colocated:
                bundle, gpus = self._seats[i * split].bundle, self._gpus_of_engine(i)
            actor = (
                ray.remote(_Host)
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
            self._hosts.append(_RemoteHost(actor, f"the host of engine {i}"))
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
            actor = ray.remote(_Worker).options(
                num_cpus=manager.cpu_per_process,
                max_restarts=-1,
                max_concurrency=self._cfg.runtime_args.max_concurrent_rollouts + 16,
                scheduling_strategy=self._in_bundle(first + i),
            )
            self._workers.append(actor.remote(self._place))
        self._busy = [0] * len(self._workers)

    async def _load_workers(self) -> None:
        loaded = [worker.load.remote(*self._load) for worker in self._workers]
        pids = await _gather(loaded, "a rollout worker")
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
            await asyncio.wait(self._reviving.values(), return_when=asyncio.FIRST_COMPLETED)
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


def _resources(cfg: GrpoConfig) -> list[dict[str, float]]:
    """One bundle a trainer rank, then one an engine (unless it shares the ranks'), then one a
    worker."""
    trainer, policy, manager = (
        cfg.models.policy_trainer,
        cfg.models.policy,
        cfg.models.rollout_manager,
    )
    rank = {"GPU": 1, "CPU": 1} if trainer.num_gpu else {"CPU": trainer.cpu_per_process}
    engine = {"CPU": policy.cpu_per_process}
    if policy.num_gpu:
        engine = {"GPU": policy.tensor_model_parallel_size, "CPU": 1}
    shares = policy.num_gpu and cfg.is_colocated
    return [
        *([rank] * trainer.num_rank),
        *([] if shares else [engine] * policy.num_engine),
        *([{"CPU": manager.cpu_per_process}] * manager.num_worker),
    ]


async def _placed(cfg: GrpoConfig, bundles: list[dict[str, float]]) -> PlacementGroup:
    """Reserve the resources.

    Raises:
        ConfigError: the cluster has fewer.
    """
    total = Counter()
    for bundle in bundles:
        total.update(bundle)
    has = ray.cluster_resources()
    for kind, keys in (
        (
            "GPU",
            "models.policy_trainer.num_gpu and models.policy.num_gpu (set colocation to share)",
        ),
        ("CPU", "models.rollout_manager.num_cpu, models.policy.num_cpu and policy_trainer.num_cpu"),
    ):
        if total[kind] > has.get(kind, 0):
            raise ConfigError(
                f"the run asks for {total[kind]:g} {kind}s and the Ray cluster has "
                f"{has.get(kind, 0):g}; lower {keys}, or add machines"
            )
    group = placement_group(bundles, strategy="PACK")
    done, _ = await asyncio.wait([asyncio.ensure_future(group.ready())], timeout=_PLACING_S)
    if not done:
        raise ConfigError(
            f"the Ray cluster has {has.get('GPU', 0):g} GPUs and {has.get('CPU', 0):g} CPUs, but "
            f"not free, or not in the portions this run needs: {bundles}. End what else runs "
            "there, or lower the num_gpu and num_cpu keys"
        )
    return group


async def _gather(calls: Sequence[Any], who: str) -> list[Any]:
    """All answers, or the first failure as the actor raised it."""
    return await asyncio.gather(*(_call(call, who) for call in calls))


async def _call(call: Any, who: str) -> Any:
    try:
        return await call
    except RayTaskError as error:
        raise _original(error) from None
    except RayActorError as error:
        raise TrainerError(
            f"{who} died ({_reason(error)}); the run cannot go on without it. The same command "
            "continues from the last checkpoint"
        ) from None


def _original(error: RayTaskError) -> BaseException:
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
