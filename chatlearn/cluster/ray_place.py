"""Where the processes of a run may be: the Ray cluster, its machines, what is reserved on them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group

from chatlearn.cluster.nodes import Node, RayProcess, answers, free_port
from chatlearn.config import GrpoConfig
from chatlearn.errors import ConfigError

logger = logging.getLogger(__name__)

_JOINING_S = 600.0
"""Seconds until every machine must have joined."""
_HEAD_S = 60.0
"""Seconds that the head of several machines may take to answer."""
_PLACING_S = 120.0
"""Seconds until missing resources are an error."""

Bundle = dict[str, float]
"""Resources of one process: ``{"GPU": 1, "CPU": 1}``."""


class RaySession:
    """The Ray cluster of a run: started on its machines, or joined at ``ray_address``.

    Args:
        cfg: the run's configuration.
        node: this machine; the head of the run's machines.
    """

    def __init__(self, cfg: GrpoConfig, node: Node) -> None:
        self._cfg, self._node = cfg, node
        self._head: RayProcess | None = None

    async def open(self) -> PlacementGroup:
        """Connect, and reserve what the run needs (``bundles``).

        Raises:
            ConfigError: the cluster is not there, or is smaller.
        """
        needed = bundles(self._cfg)
        address = self._cfg.runtime_args.ray_address
        if address is None:
            address = await self._start(needed)
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.ERROR}
        if self._cfg.runtime_args.working_dir is not None:
            options["runtime_env"] = {"working_dir": self._cfg.runtime_args.working_dir}
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, **options)
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray takes it, to exit on the spot
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {address} (runtime_args.ray_address): {error}"
            ) from error
        if self._head is not None:
            await self._wait_for_machines()
        return await _reserve(needed)

    def close(self) -> None:
        """Leave the cluster, and end it where this run started it."""
        ray.shutdown()
        if self._head is not None:
            self._head.stop()

    async def _start(self, needed: Sequence[Bundle]) -> str:
        """Start Ray here; the other machines join by themselves."""
        cpus = None
        if self._node.count == 1:
            # on a laptop the processes share what cores there are; Ray only counts them
            wanted = sum(bundle.get("CPU", 0) for bundle in needed)
            cpus = max(os.cpu_count() or 1, int(wanted))
            self._node = replace(self._node, port=free_port())
        node = self._node
        self._head = RayProcess(node, num_cpus=cpus)
        deadline = time.monotonic() + _HEAD_S
        while not answers(node.head, node.port):
            if self._head.poll() is not None or time.monotonic() > deadline:
                raise ConfigError(
                    f"Ray does not start on MASTER_ADDR={node.head}, MASTER_PORT={node.port}: "
                    "RANK=0 must be the machine of that address, and the port must be free. Ray "
                    f"said: {self._head.tail()}"
                )
            await asyncio.sleep(0.5)
        return f"{node.head}:{node.port}"

    async def _wait_for_machines(self) -> None:
        node, deadline, seen = self._node, time.monotonic() + _JOINING_S, 1
        while seen < node.count:
            alive = sum(machine["Alive"] for machine in ray.nodes())
            if alive != seen:
                logger.info("%d of %d machines have joined", alive, node.count)
                seen = alive
            elif time.monotonic() > deadline:
                raise ConfigError(
                    f"{alive} of WORLD_SIZE={node.count} machines joined within {_JOINING_S:g} s; "
                    "start the same command on each with its own RANK and "
                    f"MASTER_ADDR={node.head}, MASTER_PORT={node.port}"
                )
            else:
                await asyncio.sleep(1.0)


def bundles(cfg: GrpoConfig) -> list[Bundle]:
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


async def _reserve(needed: Sequence[Bundle]) -> PlacementGroup:
    total = Counter()
    for bundle in needed:
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
    group = placement_group(list(needed), strategy="PACK")
    done, _ = await asyncio.wait([asyncio.ensure_future(group.ready())], timeout=_PLACING_S)
    if not done:
        raise ConfigError(
            f"the Ray cluster has {has.get('GPU', 0):g} GPUs and {has.get('CPU', 0):g} CPUs, but "
            f"not free, or not in the portions this run needs: {list(needed)}. End what else runs "
            "there, or lower the num_gpu and num_cpu keys"
        )
    return group
