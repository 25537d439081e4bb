"""Samples into micro-batches: rows laid end to end under a token limit, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain

import torch

from chatlearn.errors import TrainerError
from chatlearn.types import MicroBatch, Sample


def pack(
    samples: Sequence[Sample], max_tokens: int, *, keep_zero_advantages: bool = True
) -> list[MicroBatch]:
    """Pack the samples of one optimizer step into micro-batches of at most ``max_tokens``.

    First-fit decreasing: the longest row goes first, each into the first micro-batch with room
    (at most 11/9 of the fewest possible, plus one). Equal lengths keep their order, so the same
    samples always give the same micro-batches. Every micro-batch carries the same denominator:
    the weight of all trained tokens of all ``samples``.

    Args:
        keep_zero_advantages: False leaves out rows whose advantages are all 0. They have no
            gradient under a pure policy loss, and still count in the denominator.

    Raises:
        TrainerError: a sample is longer than ``max_tokens``; it is named.
    """
    bins: list[list[Sample]] = []
    room: list[int] = []
    rows = [s for s in samples if keep_zero_advantages or any(s.advantages)]
    for sample in sorted(rows, key=lambda s: len(s.token_ids), reverse=True):
        length = len(sample.token_ids)
        if length > max_tokens:
            raise TrainerError(
                f"A sample of trajectory {sample.trajectory!r} has {length} tokens, but "
                f"models.policy_trainer.max_token_in_packing is {max_tokens}. Raise it to at least "
                "models.policy.max_seq_len, or lower that one."
            )
        place = next((i for i, left in enumerate(room) if left >= length), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[place].append(sample)
        room[place] -= length
    denominator = total_weight(samples)
    return [collate(packed, denominator) for packed in bins]


def total_weight(samples: Iterable[Sample]) -> float:
    """The denominator of an optimizer step: the weight of all trained tokens of its samples."""
    return float(sum(sample.weight * sample.num_trained for sample in samples))


def collate(samples: Sequence[Sample], denominator: float) -> MicroBatch:
    """Lay ``samples`` end to end, in their order, as one micro-batch."""
    lengths = [len(sample.token_ids) for sample in samples]

    def row(values: Iterable[Iterable[float]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(list(chain.from_iterable(values)), dtype=dtype)

    return MicroBatch(
        token_ids=row((s.token_ids for s in samples), torch.int64),
        position_ids=row((range(n) for n in lengths), torch.int64),
        cu_seqlens=torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32),
        loss_mask=row((s.loss_mask for s in samples), torch.bool),
        rollout_logprobs=row((s.rollout_logprobs for s in samples), torch.float32),
        advantages=row((s.advantages for s in samples), torch.float32),
        weights=row(([s.weight] * n for s, n in zip(samples, lengths, strict=True)), torch.float32),
        trajectories=[s.trajectory for s in samples],
        denominator=denominator,
    )
