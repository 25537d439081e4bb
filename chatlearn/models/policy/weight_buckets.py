"""What weights are sent in, and to whom: buckets of tensors, and the receiving engine's side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from chatlearn.errors import EngineError, EngineLost
from chatlearn.interfaces import Weights
from chatlearn.models.policy.weights_sharing import payload


class Receiver(Protocol):
    """One engine as senders see it; ``SGLangEngine`` is one."""

    url: str

    async def update_from_tensors(self, payloads: Sequence[str]) -> None: ...

    async def update_from_group(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
    ) -> None: ...

    async def update_from_disk(self, path: str, *, version: int) -> None: ...

    async def join_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
    ) -> None: ...

    async def leave_group(self, group_name: str) -> None: ...

    async def version(self) -> int | None:
        """None when it was sent nothing since it was started."""
        ...


@dataclass(frozen=True, slots=True)
class Sent:
    """What one rank sent."""

    num_bytes: int
    """Of weights, once, however many engines took them."""
    seconds: float
    num_buckets: int = 0

    @classmethod
    def merged(cls, parts: Iterable[Sent]) -> Sent:
        """Of ranks that sent at the same time."""
        parts = list(parts)
        return cls(
            sum(part.num_bytes for part in parts),
            max((part.seconds for part in parts), default=0.0),
            max((part.num_buckets for part in parts), default=0),
        )


@dataclass(slots=True)
class Bucket:
    """Tensors of one dtype, end to end in one piece of memory."""

    flat: torch.Tensor  # [B] uint8
    dtype: torch.dtype
    names: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    used: int = 0
    """Bytes of ``flat`` that are filled."""

    @property
    def data(self) -> torch.Tensor:
        """The filled part. [used] uint8"""
        return self.flat[: self.used]

    @property
    def dtypes(self) -> list[str]:
        return [str(self.dtype).removeprefix("torch.")] * len(self.names)

    def payload(self) -> str:
        """A handle for one opening, when ``flat`` is shared memory."""
        return payload(self.data, self.names, self.shapes, self.dtype)

    def add(self, name: str, tensor: torch.Tensor, size: int) -> None:
        """Append ``tensor``, converted; ``size`` is its length in bytes."""
        place = self.flat[self.used : self.used + size].view(self.dtype)
        place.copy_(tensor.detach().reshape(-1))
        self.names.append(name)
        self.shapes.append(tuple(tensor.shape))
        self.used += size

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors, as views."""
        found, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            end = start + torch.Size(shape).numel() * self.dtype.itemsize
            found[name] = self.flat[start:end].view(self.dtype).reshape(shape)
            start = end
        return found

    def __str__(self) -> str:
        return f"the bucket of {self.names[0]} to {self.names[-1]}, {self.used} bytes"


Allocate = Callable[[int, torch.device], torch.Tensor]


def plain_memory(size: int, device: torch.device) -> torch.Tensor:
    """[size] uint8"""
    return torch.empty(size, dtype=torch.uint8, device=device)


def buckets(
    named: Weights,
    *,
    bucket_bytes: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    allocate: Allocate = plain_memory,
) -> Iterator[Bucket]:
    """Cut ``named`` into buckets of at most ``bucket_bytes``; a larger tensor is one of its own.

    Floating tensors become ``dtype``, others stay. A bucket has one dtype, so that all of it is
    aligned. Forget a bucket before asking for the next, and there is never more than one in memory.

    Args:
        device: where buckets are made; None = where each first tensor is.
    """
    bucket: list[Bucket] = []  # at most one, so that ``pop`` leaves no reference here
    for name, tensor in named:
        target = dtype if tensor.is_floating_point() else tensor.dtype
        size = tensor.numel() * target.itemsize
        if bucket and (bucket[0].dtype != target or bucket[0].used + size > len(bucket[0].flat)):
            yield bucket.pop()
        if not bucket:
            flat = allocate(max(size, bucket_bytes), device or tensor.device)
            bucket.append(Bucket(flat, target))
            del flat
        bucket[0].add(name, tensor, size)
        del tensor
    if bucket:
        yield bucket.pop()


def exhaust(named: Weights) -> None:
    """Take part in whatever gathers behind ``named``, and keep nothing."""
    for _ in named:
        pass


@contextlib.contextmanager
def naming(receiver: Receiver, what: object) -> Iterator[None]:
    """Failures of ``receiver`` say what it was being sent."""
    try:
        yield
    except EngineError as error:
        kind = EngineLost if isinstance(error, EngineLost) else EngineError
        raise kind(
            f"{receiver.url} did not take {what}, and has some new and some old weights now: "
            f"{error}"
        ) from error
