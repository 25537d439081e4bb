"""Causal attention over rows laid end to end, without a T x T mask and without a new kernel.

A packed row [1, T] holds N segments. A mask over it costs T² memory; a call per segment costs N
launches per layer. Here segments of similar length form a bucket, which is gathered to
[n, heads, L, dim] with right padding, attended with ``is_causal`` (a real token never looks right,
so the padding needs no mask) and scattered back. What is gathered where depends on the lengths
only, so it is worked out once per micro-batch and used by every layer: it is a ``Plan``. Kernels
that take segments as they are have plans of their own (``kernels.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chatlearn.errors import TrainerError

PACKED = "chatlearn_packed"
_FILL = 0.75
"""The shortest segment of a bucket fills at least this much of its longest."""


class Plan(Protocol):
    """How the segments of one packed row are attended; every layer uses it."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Causal attention inside each segment.

        Args:
            query: [1, heads, T, dim]
            key: [1, kv_heads, T, dim]; kv_heads divides heads.
            value: [1, kv_heads, T, dim]
            scaling: of the scores; None is ``dim ** -0.5``.
            window: how many tokens back a token sees, itself included; None is all.

        Returns:
            [1, T, heads, dim]
        """
        ...


Planner = Callable[[Sequence[int], "torch.device | str"], Plan]
"""Bounds ``cu_seqlens`` and a device into a plan; ``Segments.of`` is the one that always works."""


@dataclass(slots=True)
class Bucket:
    """Segments that are attended in one call."""

    count: int
    length: int
    """Of the longest segment, which the others are padded to."""
    rows: torch.Tensor | slice
    """Packed positions to gather [count * length]; a slice where they are adjacent already."""
    bands: dict[int, torch.Tensor] = field(default_factory=dict)
    """Masks [length, length] of sliding windows shorter than ``length``, by window."""

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """[1, heads, T, dim] -> [count, heads, length, dim]"""
        rows = states[0].transpose(0, 1)
        rows = rows[self.rows] if isinstance(self.rows, slice) else rows.index_select(0, self.rows)
        return rows.unflatten(0, (self.count, self.length)).transpose(1, 2)

    def mask(self, window: int | None, device: torch.device) -> torch.Tensor | None:
        """None where plain causal attention is right; else which keys a query sees. True = sees."""
        if window is None or window >= self.length:
            return None
        if window not in self.bands:
            at = torch.arange(self.length, device=device)
            behind = at[:, None] - at[None, :]
            self.bands[window] = (behind >= 0) & (behind < window)
        return self.bands[window]


@dataclass(slots=True)
class Segments:
    """Where the samples of one packed row are, as attention needs it."""

    buckets: list[Bucket]
    inverse: torch.Tensor | None
    """Where each packed position is in the buckets' outputs laid end to end [T]; None: there."""

    @classmethod
    def of(cls, cu_seqlens: Sequence[int], device: torch.device | str) -> Segments:
        """The plan for segments ``[cu_seqlens[n], cu_seqlens[n + 1])``; empty ones are ignored."""
        spans = [(a, b - a) for a, b in pairwise(cu_seqlens) if b > a]
        groups: list[list[tuple[int, int]]] = []
        for span in sorted(spans, key=lambda span: -span[1]):
            if not groups or span[1] < _FILL * groups[-1][0][1]:
                groups.append([])
            groups[-1].append(span)
        order = [span for group in groups for span in group]
        in_place = order == spans and all(group[0][1] == group[-1][1] for group in groups)
        buckets, inverse, offset = [], [0] * cu_seqlens[-1], 0
        for group in groups:
            longest = group[0][1]
            rows: list[int] = []
            for start, length in group:
                rows += range(start, start + length)
                rows += [start] * (longest - length)
                inverse[start : start + length] = range(offset, offset + length)
                offset += longest
            adjacent = rows == list(range(rows[0], rows[0] + len(rows)))
            where = (
                slice(rows[0], rows[0] + len(rows)) if adjacent else torch.tensor(rows).to(device)
            )
            buckets.append(Bucket(len(group), longest, where))
        return cls(buckets, None if in_place else torch.tensor(inverse).to(device))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """One call of PyTorch's attention a bucket; see ``Plan``."""
        outputs = []
        for bucket in self.buckets:
            q, k, v = bucket.gather(query), bucket.gather(key), bucket.gather(value)
            mask = bucket.mask(window, query.device)
            out = scaled_dot_product_attention(
                q,
                k,
                v,
                mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=k.shape[1] != q.shape[1],
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self.inverse is not None:
            rows = rows.index_select(0, self.inverse)
        return rows.unsqueeze(0)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Plan | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' ``AttentionInterface``.

    Args:
        query: [1, heads, T, dim]
        key: [1, kv_heads, T, dim]; kv_heads divides heads.
        value: [1, kv_heads, T, dim]
        segments: the plan; without one this is transformers' own sdpa attention.
        dropout: ignored where there are segments: a policy gradient needs the sampled policy.

    Returns:
        [1, T, heads, dim] and None.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    unknown = [k for k in ("softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]
    if unknown:
        raise TrainerError(
            f"{type(module).__name__} uses {unknown[0]} in its attention, which packed training "
            "cannot compute. Train a model without it."
        )
    return segments.attend(query, key, value, scaling=scaling, window=sliding_window), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


@contextmanager
def attending_packed(config: PretrainedConfig) -> Iterator[None]:
    """Make the model of ``config`` look up ``packed_attention`` in the block, and undo it after.

    An engine may sample from the same module, with an attention of its own, so this must surround
    a step (backward too: checkpointed layers look their attention up again) and nothing longer.
    """
    before = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = before


def body_inputs(position_ids: torch.Tensor, segments: Plan) -> dict[str, Any]:
    """The keyword arguments, beside the tokens, that make a decoder body attend in ``segments``.

    A mask that has four dimensions is passed on as it is, so transformers builds none.
    """
    return {
        "position_ids": position_ids.unsqueeze(0),
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=position_ids.device),
        "use_cache": False,
        "segments": segments,
    }
