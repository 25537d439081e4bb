"""Samples into micro-batches: rows under a token limit, without padding, beginnings shared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Any

from chatlearn.algorithm.layout import collate, in_token_order, shared_length
from chatlearn.errors import TrainerError
from chatlearn.types import MicroBatch, Sample

_BREAK_EVEN = 32_768
"""Length of a row at which its attention costs about as much as its matrices. It differs with the
model's width; here it only weighs long rows against short ones."""
_WORTH = 0.05
"""Share of a step's tokens that a tree must save: less does not pay for its attention."""


def pack(
    samples: Sequence[Sample],
    max_tokens: int,
    *,
    ranks: int = 1,
    tree: bool = False,
) -> list[MicroBatch]:
    """Pack the samples of one optimizer step into micro-batches of at most ``max_tokens``.

    First-fit decreasing: the longest row goes first, each into the first micro-batch with room
    (at most 11/9 of the fewest possible, plus one). Equal lengths keep their order, so the same
    samples always give the same micro-batches. Every micro-batch carries the same denominator:
    the weight of all trained tokens of all ``samples``.

    As a tree, samples are cut in the order of their tokens, where those that begin alike are
    neighbours: into the fewest micro-batches of neighbours, and for several ranks so that the
    dearest is as cheap as it can be. A micro-batch computes each distinct beginning once; what a
    cut separates is computed on both sides of it.

    With several ranks the number of micro-batches is a multiple of ``ranks``, and rank r takes
    ``batches[r::ranks]``: as many as any other, of near-equal cost both in total and at the same
    turn, since ranks wait for each other in every micro-batch. Where rows are too few, the rest are
    short micro-batches with nothing to train, so that no rank is missing from a collective.

    Args:
        ranks: trainer processes that share the micro-batches.
        tree: share the tokens that samples begin with, where that saves enough of them.

    Raises:
        TrainerError: a sample is longer than ``max_tokens``, or see ``collate``; it is named.
    """
    longest = max(samples, key=_length, default=None)
    if longest is None:
        return []
    if _length(longest) > max_tokens:
        raise TrainerError(
            f"A sample of trajectory {longest.trajectory!r} has {_length(longest)} tokens, but "
            f"models.policy_trainer.max_token_in_packing is {max_tokens}. Raise it to at least "
            "models.policy.max_seq_len, or lower that one."
        )
    rows = _neighbours(samples)
    distinct, total = sum(row.new for row in rows), sum(map(_length, samples))
    tree = tree and distinct <= (1 - _WORTH) * total
    if tree:
        bins = _cut(rows, max_tokens, ranks)
    else:
        bins = _first_fit(samples, max_tokens)
        if ranks > 1:
            bins = _balanced(samples, max_tokens, fewest=len(bins), ranks=ranks)
    denominator = total_weight(samples)
    batches = [collate(packed, denominator, tree=tree) for packed in bins]
    return [replace(batch, distinct_tokens=distinct) for batch in batches]


@dataclass(frozen=True, slots=True)
class _Row:
    """A sample beside the one before it in the order of their tokens."""

    sample: Sample
    shared: int
    """Tokens that both begin with."""

    @property
    def new(self) -> int:
        return len(self.sample.token_ids) - self.shared

    def tokens(self, *, first: bool) -> int:
        """That it adds to a micro-batch which it begins, or in which it follows its neighbour."""
        return len(self.sample.token_ids) if first else self.new

    def cost(self, *, first: bool) -> float:
        length = len(self.sample.token_ids)
        return self.tokens(first=first) * (1 + length / _BREAK_EVEN)


def _neighbours(samples: Sequence[Sample]) -> list[_Row]:
    ordered = [samples[number] for number in in_token_order(samples)]
    shared = [shared_length(a.token_ids, b.token_ids) for a, b in pairwise(ordered)]
    return [_Row(sample, n) for sample, n in zip(ordered, [0, *shared], strict=True)]


def _cut(rows: Sequence[_Row], max_tokens: int, ranks: int) -> list[list[Sample]]:
    """Neighbours in the fewest micro-batches; for several ranks a multiple of them, fairly."""
    chunks = _chunks(rows, max_tokens, most_cost=float("inf"))
    if ranks > 1:
        count = ceil(len(chunks) / ranks) * ranks
        # the least limit that needs no more chunks: filling one after the other is then optimal
        low, high = 0.0, sum(_chunk_cost(chunk) for chunk in chunks)
        for _ in range(30):
            middle = (low + high) / 2
            if len(_chunks(rows, max_tokens, most_cost=middle)) > count:
                low = middle
            else:
                high = middle
        chunks = _chunks(rows, max_tokens, most_cost=high)
        chunks += [[] for _ in range(count - len(chunks))]
        chunks = _fair_turns(chunks, _chunk_cost, ranks)
    everything = [row.sample for row in rows]
    return [[row.sample for row in chunk] or [_untrained(everything)] for chunk in chunks]


def _chunks(rows: Sequence[_Row], max_tokens: int, *, most_cost: float) -> list[list[_Row]]:
    """Neighbours together while both limits hold; a row that is above the cost is alone."""
    chunks: list[list[_Row]] = []
    tokens, cost_ = 0, 0.0
    for row in rows:
        tokens += row.tokens(first=False)
        cost_ += row.cost(first=False)
        if not chunks or tokens > max_tokens or cost_ > most_cost:
            chunks.append([])
            tokens, cost_ = row.tokens(first=True), row.cost(first=True)
        chunks[-1].append(row)
    return chunks


def _chunk_cost(chunk: Sequence[_Row]) -> float:
    return sum(row.cost(first=number == 0) for number, row in enumerate(chunk))


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
    fair = _fair_turns(bins, lambda packed: sum(map(cost, packed)), ranks)
    return [packed or [_untrained(rows)] for packed in fair]


def _fair_turns(bins: list[Any], work: Callable[[Any], float], ranks: int) -> list[Any]:
    """The dearest first, in turns of ``ranks`` that go back and forth: whoever had the dearest bin
    of one turn has the cheapest of the next."""
    ordered = sorted(bins, key=work, reverse=True)
    turns = [ordered[i : i + ranks] for i in range(0, len(ordered), ranks)]
    return [bin_ for i, turn in enumerate(turns) for bin_ in (turn if i % 2 == 0 else turn[::-1])]


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
