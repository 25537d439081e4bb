"""The processes that train together, as one of them sees them.

``Alone`` is the null object: a trainer of one process has the same lines and nobody to ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist

from chatlearn.errors import ChatLearnError


class Ranks(Protocol):
    """Collectives of a trainer: every rank calls each of them, in the same order."""

    rank: int
    size: int

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, equally many each. [K] -> [size][K]"""
        ...

    def norm(self, own: torch.Tensor) -> torch.Tensor:
        """L2 norm of what all ranks hold together, from that of what each holds. [] -> []"""
        ...

    def first(self, word: str | None) -> str | None:
        """What the lowest rank that has something to say says, on every rank."""
        ...


class Alone:
    """One process."""

    rank = 0
    size = 1

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        return [list(numbers)]

    def norm(self, own: torch.Tensor) -> torch.Tensor:
        return own

    def first(self, word: str | None) -> str | None:
        return word


class World:
    """All processes of ``torch.distributed``; its default group must have gloo for the CPU."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        own = torch.tensor(numbers, dtype=torch.float64)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own)
        return [row.tolist() for row in rows]

    def norm(self, own: torch.Tensor) -> torch.Tensor:
        squares = own.square()
        dist.all_reduce(squares)
        return squares.sqrt()

    def first(self, word: str | None) -> str | None:
        words: list[str | None] = [None] * self.size
        dist.all_gather_object(words, word)
        return next((w for w in words if w is not None), None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Every rank leaves the block with the error of the lowest rank that has one, or with none.

        In the block a rank may fail between collectives, not in the middle of them: the others wait
        at the end of it. Their error is of the same class and has the same words.
        """
        error: ChatLearnError | None = None
        try:
            yield
        except ChatLearnError as raised:
            error = raised
        errors: list[ChatLearnError | None] = [None] * self.size
        dist.all_gather_object(errors, error and type(error)(*error.args))
        first = next((rank for rank, other in enumerate(errors) if other is not None), None)
        if first == self.rank and error is not None:
            raise error  # with its cause
        if first is not None and (other := errors[first]) is not None:
            raise other
