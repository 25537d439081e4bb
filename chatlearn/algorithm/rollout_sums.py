"""Sums over whole rollouts, whose rows may lie in several micro-batches and on several ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b

import torch

Gather = Callable[[Sequence[float]], list[list[float]]]
"""The numbers of every rank, equally many each. [K] -> [ranks][K]"""


def sums_of(columns: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """Sums per owner, and how many tokens each has. [N, K], [N] -> [count, K + 1] fp64"""
    values = torch.cat([columns.double(), columns.new_ones(len(columns), 1).double()], dim=1)
    return values.new_zeros(count, values.shape[1]).index_add(0, owner, values)


def spread(batches: Iterable[Iterable[str]], gather: Gather) -> set[str]:
    """Of this rank's trajectories, those that have trained tokens in several micro-batches.

    Args:
        batches: the trajectories with trained tokens of each of this rank's micro-batches.
    """
    own = Counter(name for names in batches for name in set(names))
    everywhere = _everywhere({name: [float(n)] for name, n in own.items()}, gather, width=1)
    return {name for name in own if everywhere[_key(name)][0] > 1}


def added(
    parts: Iterable[tuple[list[str], torch.Tensor]], gather: Gather
) -> dict[str, list[float]]:
    """The sums of this rank's trajectories over all micro-batches of all ranks.

    Args:
        parts: of each micro-batch the trajectories [S] and their sums [S, K].
    """
    own: dict[str, list[float]] = {}
    width = 0
    for names, sums in parts:
        width = sums.shape[1]
        for name, row in zip(names, sums.tolist(), strict=True):
            own[name] = [a + b for a, b in zip(own.get(name, [0.0] * width), row, strict=True)]
    everywhere = _everywhere(own, gather, width=width)
    return {name: everywhere[_key(name)] for name in own}


def _key(name: str) -> float:
    """48 bits of a name, as a number that a float keeps; 10,000 names collide once in 5 million."""
    return float(int.from_bytes(blake2b(name.encode(), digest_size=6).digest(), "big"))


def _everywhere(
    own: dict[str, list[float]], gather: Gather, *, width: int
) -> dict[float, list[float]]:
    """The sums of all ranks by key, added up where several have one. Every rank calls it."""
    most = max(int(n) for [n] in gather([len(own)]))
    flat = [number for name, row in own.items() for number in (_key(name), *row)]
    flat += [-1.0] * ((most - len(own)) * (width + 1))
    found: dict[float, list[float]] = {}
    for numbers in gather(flat) if most else []:
        for at in range(0, len(numbers), width + 1):
            key, row = numbers[at], numbers[at + 1 : at + 1 + width]
            if key >= 0:
                found[key] = [
                    a + b for a, b in zip(found.get(key, [0.0] * width), row, strict=True)
                ]
    return found
