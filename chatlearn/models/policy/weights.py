"""How weights leave a trainer for SGLang: in buckets, by one of three ways.

    send_tensors      same machine: a bucket in shared memory (CUDA IPC on GPUs), its handle by HTTP
    CollectiveSender  other devices or machines: one broadcast a bucket to all engines at once
    send_disk         safetensors files in a folder that the engines can read; always works

The caller has begun an update at every receiver, and ends it. A receiver that refuses or is lost
leaves the others with some new and some old weights, so every failure is raised, naming the bucket:
the update has to be sent again from its beginning, or the run has to end.

Names and shapes are those of Hugging Face; SGLang fuses and splits them itself. It does not check
them: an unknown name is left out with a line in its log, a wrong shape ends the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch

from chatlearn.errors import EngineError
from chatlearn.interfaces import Weights
from chatlearn.models.policy.engine_group import EngineGroup, all_of, together
from chatlearn.models.policy.weight_buckets import (
    Bucket,
    Receiver,
    Sent,
    buckets,
    exhaust,
    naming,
)
from chatlearn.models.policy.weights_sharing import shared_memory

_CONFIG_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py")


# ---------------------------------------------------------------------- same machine


async def send_tensors(
    named: Weights,
    receivers: Sequence[Receiver],
    *,
    bucket_bytes: int,
    dtype: torch.dtype,
    copies: int = 1,
    gather: Callable[[str], Sequence[str]] | None = None,
    device: torch.device | None = None,
) -> Sent:
    """Share every bucket with engines of this machine, one after the other.

    Args:
        named: advanced to its end even without a receiver: other ranks may gather along.
        receivers: engines to send to; () on a rank that only gathers along.
        copies: tensor-parallel ranks of each engine; each opens the shared memory once.
        gather: collects the payloads of the trainer ranks that share an engine's devices, one a
            tensor-parallel rank, in their order; called on every rank once a bucket. It takes the
            place of ``copies``, and there may be one receiver.

    Raises ``EngineLost`` or ``EngineError`` naming the engine and the bucket.
    """
    if gather is not None and len(receivers) > 1:
        raise EngineError(f"ranks that gather share one engine, not {len(receivers)}")
    started, total, count = time.perf_counter(), 0, 0
    if gather is None and not receivers:
        exhaust(named)
        return Sent(0, time.perf_counter() - started)
    cut = buckets(
        named, bucket_bytes=bucket_bytes, dtype=dtype, device=device, allocate=shared_memory
    )
    for bucket in cut:
        if gather is not None:
            gathered = list(gather(bucket.payload()))
        for receiver in receivers:
            # a handle is good for one opening, so every rank of every engine gets its own
            payloads = gathered if gather else [bucket.payload() for _ in range(copies)]
            with naming(receiver, bucket):
                await receiver.update_from_tensors(payloads)
        total += bucket.used
        count += 1
        del bucket
        if torch.cuda.is_initialized():
            torch.cuda.ipc_collect()  # the engine has let go; free the block before the next
    return Sent(total if receivers else 0, time.perf_counter() - started, count)


# ---------------------------------------------------------------------- apart


class CollectiveSender:
    """Broadcasts from this process, rank 0, to all ranks of all engines.

    The process group is made at the first send and kept. It is made anew when other engines are
    sent to, or when one has no version, which means that it was started since.

    Args:
        host: address of this machine that the engines can reach.
        backend: ``nccl``, or ``gloo`` on CPUs.
        timeout_s: of the meeting, and with gloo of one broadcast.
    """

    def __init__(self, *, host: str, backend: str, timeout_s: float = 600.0) -> None:
        self._host, self._backend, self._timeout_s = host, backend, timeout_s
        self._members: tuple[Receiver, ...] = ()
        self._group: EngineGroup | None = None

    async def send(
        self,
        named: Weights,
        receivers: Sequence[Receiver],
        *,
        bucket_bytes: int,
        dtype: torch.dtype,
        copies: int = 1,
        device: torch.device | None = None,
    ) -> Sent:
        """Broadcast every bucket; see ``send_tensors`` for the arguments.

        Raises ``EngineLost`` or ``EngineError`` naming the engine and the bucket; the group is
        gone then, and the engines in it may hang until its connections time out.
        """
        started, total, count = time.perf_counter(), 0, 0
        if not receivers:
            exhaust(named)
            return Sent(0, time.perf_counter() - started)
        await self._meet(receivers, copies)
        for bucket in buckets(named, bucket_bytes=bucket_bytes, dtype=dtype, device=device):
            await self._broadcast(bucket)
            total += bucket.used
            count += 1
            del bucket
        return Sent(total, time.perf_counter() - started, count)

    async def close(self) -> None:
        """Leave the group, and have the engines leave it."""
        group, members = self._group, self._members
        self._group, self._members = None, ()
        if group is None:
            return
        for receiver in members:
            with contextlib.suppress(EngineError):  # lost, or started again: not in it any more
                await receiver.leave_group(group.name)
        group.destroy()

    async def _meet(self, receivers: Sequence[Receiver], copies: int) -> None:
        versions = await asyncio.gather(*(receiver.version() for receiver in receivers))
        if self._group is not None and self._members == tuple(receivers) and None not in versions:
            return
        await self.close()
        group = EngineGroup(
            self._host, 1 + copies * len(receivers), self._backend, timeout_s=self._timeout_s
        )
        joins = [
            receiver.join_group(
                master_address=self._host,
                master_port=group.port,
                rank_offset=1 + copies * i,
                world_size=group.size,
                group_name=group.name,
                backend=self._backend,
            )
            for i, receiver in enumerate(receivers)
        ]
        await together(group.meet, joins)
        self._group, self._members = group, tuple(receivers)

    async def _broadcast(self, bucket: Bucket) -> None:
        group = self._group

        async def ask(receiver: Receiver) -> None:
            with naming(receiver, bucket):
                await receiver.update_from_group(
                    bucket.names, bucket.dtypes, bucket.shapes, group.name
                )

        try:
            await together(
                lambda: group.broadcast(bucket.data), [ask(receiver) for receiver in self._members]
            )
        except BaseException:
            self._group, self._members = None, ()
            group.abort()
            raise


# ---------------------------------------------------------------------- by disk


async def send_disk(
    named: Weights,
    receivers: Sequence[Receiver],
    *,
    folder: Path,
    version: int,
    bucket_bytes: int,
    dtype: torch.dtype,
    config_from: Path | None = None,
) -> Sent:
    """Write ``folder``, then have every engine load it; see ``send_tensors`` for the arguments.

    Args:
        folder: replaced as a whole when it exists. It stays: an engine can be started from it.
        config_from: a model folder whose other files (configuration, tokenizer) are copied along.
    """
    started = time.perf_counter()
    if not receivers:
        exhaust(named)
        return Sent(0, time.perf_counter() - started)
    total, count = write_folder(
        named, folder, bucket_bytes=bucket_bytes, dtype=dtype, config_from=config_from
    )

    async def ask(receiver: Receiver) -> None:
        with naming(receiver, folder):
            await receiver.update_from_disk(str(folder), version=version)

    await all_of([ask(receiver) for receiver in receivers])
    return Sent(total, time.perf_counter() - started, count)


def write_folder(
    named: Weights,
    folder: Path,
    *,
    bucket_bytes: int,
    dtype: torch.dtype,
    config_from: Path | None = None,
) -> tuple[int, int]:
    """Write safetensors files of at most ``bucket_bytes`` each, with an index; bytes and files."""
    folder = folder.resolve()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    where: dict[str, str] = {}
    total = count = 0
    for bucket in buckets(
        named, bucket_bytes=bucket_bytes, dtype=dtype, device=torch.device("cpu")
    ):
        count += 1
        file = f"model-{count:05d}.safetensors"
        safetensors.torch.save_file(bucket.tensors(), partial / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(bucket.names, file))
        total += bucket.used
        del bucket
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    if config_from is not None:
        for path in Path(config_from).iterdir():
            if path.is_file() and path.suffix in _CONFIG_SUFFIXES and ".index." not in path.name:
                shutil.copy(path, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return total, count
