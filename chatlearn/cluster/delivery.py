"""How one trainer rank takes its part in a publish: which engines it sends to, and by which way.

    tensor       a rank and an engine share a GPU, or all share one machine's memory
    collective   rank 0 broadcasts to every engine at once
    disk         rank 0 writes files that every engine reads; adapters alone always go this way

Whole tensors are gathered from the shards one at a time, so every rank walks through all of them,
also one that sends nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from chatlearn.config import GrpoConfig
from chatlearn.interfaces import Weights
from chatlearn.models.engine.sglang import SGLangEngine
from chatlearn.models.policy.engine_group import all_of
from chatlearn.models.policy.optimizer import dtype_of
from chatlearn.models.policy.weight_buckets import Sent, exhaust
from chatlearn.models.policy.weight_checksums import expected_checksums
from chatlearn.models.policy.weights import (
    CollectiveSender,
    send_disk,
    send_tensors,
)

_MIB = 1024**2


class Delivery:
    """The sending end of one rank.

    Args:
        cfg: the run's configuration.
        engines: clients of all engines, in their order.
        rank: of ``ranks`` trainer processes.
        folder: where ``disk`` writes; every engine can read it.
        host: address of this machine that every engine can reach.
    """

    def __init__(
        self,
        cfg: GrpoConfig,
        engines: Sequence[SGLangEngine],
        *,
        rank: int,
        ranks: int,
        folder: Path,
        host: str,
    ) -> None:
        self._engines, self._rank, self._ranks, self._folder = engines, rank, ranks, folder
        self._method = cfg.publish_method
        self._split = cfg.models.policy.tensor_model_parallel_size
        self._bucket_bytes = cfg.models.policy.publish_bucket_mb * _MIB
        self._on_gpu = cfg.models.policy.num_gpu > 0
        self._dtype = dtype_of(cfg.precision("cuda" if self._on_gpu else "cpu"))
        self._collective = CollectiveSender(host=host, backend="nccl" if self._on_gpu else "gloo")
        self._sharers: dist.ProcessGroup | None = None
        if self._method == "tensor" and self._on_gpu and self._split > 1:
            groups = [
                dist.new_group(list(range(first, first + self._split)), backend="gloo")
                for first in range(0, ranks, self._split)
            ]
            self._sharers = groups[rank // self._split]

    async def send(self, named: Weights, targets: Sequence[int], version: int) -> Sent:
        """Send ``named``, whole tensors, to those engines of ``targets`` that are this rank's.

        Raises ``EngineLost`` or ``EngineError`` naming engine and tensors.
        """
        if self._method == "tensor":
            return await self._send_tensors(named, targets)
        options = {"bucket_bytes": self._bucket_bytes, "dtype": self._dtype}
        mine = [self._engines[t] for t in targets] if self._rank == 0 else []
        if self._method == "collective":
            return await self._collective.send(named, mine, copies=self._split, **options)
        return await send_disk(named, mine, folder=self._folder, version=version, **options)

    async def send_adapter(
        self, save: Callable[[Path], int], targets: Sequence[int], version: int
    ) -> Sent:
        """Have the engines ``targets`` sample with the adapter that ``save`` writes to a folder.

        Args:
            save: called on every rank; rank 0 writes, and knows the bytes.

        Raises ``EngineLost`` or ``EngineError``.
        """
        started, folder = time.perf_counter(), self._folder.resolve() / "adapter"
        size = save(folder)
        mine = [self._engines[t] for t in targets] if self._rank == 0 else []
        await all_of([engine.replace_adapter(str(folder), version=version) for engine in mine])
        return Sent(size if mine else 0, time.perf_counter() - started, len(mine[:1]))

    def expected_checksums(self, named: Weights) -> dict[str, str] | None:
        """What the engines' checksums must be, on rank 0; None where they cannot be computed."""
        if self._rank != 0 or self._on_gpu or self._split > 1:
            exhaust(named)
            return None
        return expected_checksums(named, dtype=self._dtype)

    async def close(self) -> None:
        """Close the connections to the engines."""
        await self._collective.close()
        for engine in self._engines:
            await engine.close()

    async def _send_tensors(self, named: Weights, targets: Sequence[int]) -> Sent:
        options = {"bucket_bytes": self._bucket_bytes, "dtype": self._dtype}
        if not self._on_gpu:
            mine = [self._engines[t] for t in targets if t % self._ranks == self._rank]
            return await send_tensors(named, mine, copies=self._split, **options)
        shared = self._rank // self._split
        is_first = self._rank % self._split == 0
        mine = [self._engines[shared]] if shared in targets and is_first else []
        gather = self._gather if self._sharers is not None and shared in targets else None
        return await send_tensors(named, mine, gather=gather, **options)

    def _gather(self, payload: str) -> list[str]:
        """The payloads of the ranks that share an engine, in their order."""
        found: list[str] = [""] * self._split
        dist.all_gather_object(found, payload, group=self._sharers)
        return found
