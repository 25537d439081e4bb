"""Where the tokens of samples lie in a packed row: each for itself, or shared beginnings once.

Samples of a group begin with one prompt, and those of a branching run with one history. In a tree
each distinct beginning is computed once, and what branches off attends to it::

    samples   a b c d          packed   a b c d x y
              a b x y                     └─────┘
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from chatlearn.errors import TrainerError
from chatlearn.types import MicroBatch, Sample


@dataclass(slots=True)
class Layout:
    """A packed row as segments; see ``MicroBatch``."""

    token_ids: list[int] = field(default_factory=list)  # [T]
    position_ids: list[int] = field(default_factory=list)  # [T]
    cu_seqlens: list[int] = field(default_factory=lambda: [0])  # [N + 1]
    parents: list[int] = field(default_factory=list)  # [N]
    places: list[torch.Tensor] = field(default_factory=list)
    """Of each sample, in the order given: where each of its tokens lies. [L] int64 each"""


def lay(samples: Sequence[Sample], *, tree: bool) -> Layout:
    """Lay ``samples`` end to end in their order, or as a tree in the order of their tokens.

    In that order a sample shares with the one before it all that it shares with any before it, so
    it is one segment: what it does not share. The tokens below any token then lie together, right
    after it.
    """
    layout = Layout(places=[torch.empty(0, dtype=torch.int64)] * len(samples))
    order = in_token_order(samples) if tree else range(len(samples))
    before: Sequence[int] = ()
    place = torch.empty(0, dtype=torch.int64)
    for number in order:
        tokens = samples[number].token_ids
        shared = shared_length(before, tokens) if tree else 0
        start = len(layout.token_ids)
        parent = int(place[shared - 1]) if shared else -1
        own = torch.arange(start, start + len(tokens) - shared)
        place = torch.cat([place[:shared], own])
        layout.places[number] = place
        if len(own):
            layout.token_ids += tokens[shared:]
            layout.position_ids += range(shared, len(tokens))
            layout.cu_seqlens.append(len(layout.token_ids))
            layout.parents.append(parent)
        before = tokens
    return layout


def in_token_order(samples: Sequence[Sample]) -> list[int]:
    """Numbers of the samples, those that begin alike beside each other."""
    return sorted(range(len(samples)), key=lambda number: samples[number].token_ids)


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared in C
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def collate(samples: Sequence[Sample], denominator: float, *, tree: bool = False) -> MicroBatch:
    """Lay ``samples`` out as one micro-batch.

    Args:
        denominator: see ``MicroBatch``.
        tree: share the tokens that samples begin with; else they lie end to end in their order.

    Raises:
        TrainerError: a trained token has a temperature that is not above 0; its trajectory is
            named.
    """
    layout = lay(samples, tree=tree)
    trained = [torch.tensor(sample.loss_mask).nonzero().squeeze(1) for sample in samples]
    counts = torch.tensor([len(on) for on in trained], dtype=torch.int64)
    names = {name: i for i, name in enumerate(dict.fromkeys(s.trajectory for s in samples))}

    def column(of_sample: str) -> torch.Tensor:
        values = [
            torch.tensor(getattr(sample, of_sample), dtype=torch.float32)[on]
            for sample, on in zip(samples, trained, strict=True)
        ]
        return torch.cat(values) if values else torch.empty(0)

    def places(before: int) -> torch.Tensor:
        found = [
            place[on - before] for place, on in zip(layout.places, trained, strict=True) if len(on)
        ]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)

    def each(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(counts)

    temperatures = column("temperatures")
    if not bool((temperatures > 0).all()):
        refuse_cold(samples)
    return MicroBatch(
        token_ids=torch.tensor(layout.token_ids, dtype=torch.int64),
        position_ids=torch.tensor(layout.position_ids, dtype=torch.int64),
        cu_seqlens=torch.tensor(layout.cu_seqlens, dtype=torch.int32),
        parents=torch.tensor(layout.parents, dtype=torch.int32),
        targets=places(0),
        predictors=places(1),
        rollout_logprobs=column("rollout_logprobs"),
        advantages=column("advantages"),
        temperatures=temperatures,
        weights=each([sample.weight for sample in samples], torch.float32),
        owners=each([names[sample.trajectory] for sample in samples], torch.int64),
        trajectories=list(names),
        denominator=denominator,
    )


def refuse_cold(samples: Sequence[Sample]) -> NoReturn:
    """Name the trained token of the lowest temperature. Raises TrainerError."""

    def coldest(sample: Sample) -> float:
        pairs = zip(sample.temperatures, sample.loss_mask, strict=True)
        return min((t for t, on in pairs if on), default=1.0)

    cold = min(samples, key=coldest)
    raise TrainerError(
        f"A token of trajectory {cold.trajectory!r} has temperature {coldest(cold)}, but its "
        "logits are divided by it: set models.policy.temperature above 0."
    )
