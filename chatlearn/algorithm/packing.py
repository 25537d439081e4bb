"""Samples into micro-batches: rows laid end to end under a token limit, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from math import ceil

import torch

from chatlearn.errors import TrainerError
from chatlearn.types import MicroBatch, Sample

_BREAK_EVEN = 32_768
"""Length of a row at which its attention costs about as much as its matrices. It differs with the
model's width; here it only weighs long rows against short ones."""


def pack(
    samples: Sequence[Sample],
    max_tokens: int,
    *,
    ranks: int = 1,
) -> list[MicroBatch]:
    """Pack the samples of one optimizer step into micro-batches of at most ``max_tokens``.

    First-fit decreasing: the longest row goes first, each into the first micro-batch with room
    (at most 11/9 of the fewest possible, plus one). Equal lengths keep their order, so the same
    samples always give the same micro-batches. Every micro-batch carries the same denominator:
    the weight of all trained tokens of all ``samples``.

    With several ranks the number of micro-batches is a multiple of ``ranks``, and rank r takes
    ``batches[r::ranks]``: as many as any other, of near-equal cost both in total and at the same
    turn, since ranks wait for each other in every micro-batch. Where rows are too few, the rest are
    short micro-batches with nothing to train, so that no rank is missing from a collective.

    Args:
        ranks: trainer processes that share the micro-batches.

    Raises:
        TrainerError: a sample is longer than ``max_tokens``, or see ``collate``; it is named.
    """
    longest = max(samples, key=_length, default=None)
    if longest is not None and _length(longest) > max_tokens:
        raise TrainerError(
            f"A sample of trajectory {longest.trajectory!r} has {_length(longest)} tokens, but "
            f"models.policy_trainer.max_token_in_packing is {max_tokens}. Raise it to at least "
            "models.policy.max_seq_len, or lower that one."
        )
    bins = _first_fit(samples, max_tokens)
    if ranks > 1:
        bins = _balanced(samples, max_tokens, fewest=len(bins), ranks=ranks)
    denominator = total_weight(samples)
    return [collate(packed, denominator) for packed in bins]


def cost(sample: Sample) -> float:
    """Work of one row in tokens of a short row: its matrices are linear, its attention is not."""
    length = _length(sample)
    return length * (1 + length / _BREAK_EVEN)


def _length(sample: Sample) -> int:
    return len(sample.token_ids)


def _first_fit(rows: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """The longest row first, each into the first bin with room."""
    bins: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(rows, key=_length, reverse=True):
        length = _length(sample)
        place = next((i for i, left in enumerate(room) if left >= length), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[place].append(sample)
        room[place] -= length
    return bins


def _balanced(
    rows: Sequence[Sample], max_tokens: int, *, fewest: int, ranks: int
) -> list[list[Sample]]:
    """A multiple of ``ranks`` bins of near-equal cost, ordered so that ``[r::ranks]`` is fair.

    The longest row first, each into the cheapest bin with room (Graham's LPT rule: without the
    limit no two bins differ by more than one row). One more bin a rank where that finds no room.
    """
    count = ceil(fewest / ranks) * ranks
    while (bins := _cheapest_fit(rows, max_tokens, count)) is None:
        count += ranks
    bins.sort(key=lambda packed: sum(map(cost, packed)), reverse=True)
    turns = [bins[i : i + ranks] for i in range(0, count, ranks)]
    # back and forth: whoever had the dearest bin of one turn has the cheapest of the next
    fair = [
        packed for i, turn in enumerate(turns) for packed in (turn if i % 2 == 0 else turn[::-1])
    ]
    return [packed or [_untrained(rows)] for packed in fair]


def _cheapest_fit(rows: Sequence[Sample], max_tokens: int, count: int) -> list[list[Sample]] | None:
    """Every row in one of ``count`` bins, or None where a row finds no room."""
    bins: list[list[Sample]] = [[] for _ in range(count)]
    used = [0] * count
    costs = [0.0] * count
    for sample in sorted(rows, key=_length, reverse=True):
        length = _length(sample)
        open_bins = [i for i in range(count) if used[i] + length <= max_tokens]
        if not open_bins:
            return None
        place = min(open_bins, key=lambda i: costs[i])
        bins[place].append(sample)
        used[place] += length
        costs[place] += cost(sample)
    return bins


def _untrained(rows: Sequence[Sample]) -> Sample:
    """A row of two known tokens that trains nothing."""
    token_ids = min(rows, key=_length).token_ids[:2]
    nothing = [0.0] * len(token_ids)
    return Sample(token_ids, [False] * len(token_ids), nothing, nothing)


def total_weight(samples: Iterable[Sample]) -> float:
    """The denominator of an optimizer step: the weight of all trained tokens of its samples."""
    return float(sum(sample.weight * sample.num_trained for sample in samples))


def collate(samples: Sequence[Sample], denominator: float) -> MicroBatch:
    """Lay ``samples`` end to end, in their order, as one micro-batch.

    Raises:
        TrainerError: a temperature is not above 0; the trajectory is named.
    """
    lengths = [len(sample.token_ids) for sample in samples]

    def row(values: Iterable[Iterable[float]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(list(chain.from_iterable(values)), dtype=dtype)

    temperatures = row((s.temperatures for s in samples), torch.float32)
    if not bool((temperatures > 0).all()):
        coldest = min(samples, key=lambda s: min(s.temperatures, default=1.0))
        raise TrainerError(
            f"A token of trajectory {coldest.trajectory!r} has temperature "
            f"{min(coldest.temperatures)}, but its logits are divided by it: set "
            "models.policy.temperature above 0."
        )
    return MicroBatch(
        token_ids=row((s.token_ids for s in samples), torch.int64),
        position_ids=row((range(n) for n in lengths), torch.int64),
        cu_seqlens=torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32),
        loss_mask=row((s.loss_mask for s in samples), torch.bool),
        rollout_logprobs=row((s.rollout_logprobs for s in samples), torch.float32),
        advantages=row((s.advantages for s in samples), torch.float32),
        temperatures=temperatures,
        weights=row(([s.weight] * n for s, n in zip(samples, lengths, strict=True)), torch.float32),
        trajectories=[s.trajectory for s in samples],
        denominator=denominator,
    )
