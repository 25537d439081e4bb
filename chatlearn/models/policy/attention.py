"""Causal attention over packed rows, without a T x T mask and without a new kernel.

A packed row [1, T] holds N segments. A mask over it costs T² memory; a call per segment costs N
launches per layer. Here segments of similar length form a bucket, which is gathered to
[n, heads, L, dim] with right padding, attended with ``is_causal`` (a real token never looks right,
so the padding needs no mask) and scattered back. A segment that goes on from the middle of another
(``MicroBatch.parents``) is gathered with the keys and values of all tokens before it, which were
computed once, and a mask by depth. What is gathered where depends on the lengths
only, so it is worked out once per micro-batch and used by every layer: it is a ``Plan``. Kernels
that take segments as they are have plans of their own (``attention_kernels.py``).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
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
_HIDDEN = 2**40
"""Depth of a key that no query sees."""


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
        """Causal attention: a token sees itself and the tokens before it in its sample.

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


class Planner(Protocol):
    """Makes plans; ``Segments.of`` is the one that always works."""

    def __call__(
        self, cu_seqlens: Sequence[int], device: torch.device | str, parents: Sequence[int] = ()
    ) -> Plan:
        """The plan of a packed row.

        Args:
            cu_seqlens: [N + 1] segment n is ``[cu_seqlens[n], cu_seqlens[n + 1])``.
            parents: [N] the position each goes on after, -1 where it begins a row; () = all do.
        """
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """One segment and what it sees."""

    start: int
    length: int
    path: torch.Tensor
    """Positions of the tokens before its first. [P] int64"""

    @property
    def depth(self) -> int:
        return len(self.path)

    @property
    def seen(self) -> int:
        """Tokens that its last one sees."""
        return self.depth + self.length


def spans(cu_seqlens: Sequence[int], parents: Sequence[int] = ()) -> list[Span]:
    """The segments that are not empty, each with the path from the root of its tree."""
    found: list[Span] = []
    nothing = torch.empty(0, dtype=torch.int64)
    for number, (start, end) in enumerate(pairwise(cu_seqlens)):
        parent = parents[number] if parents else -1
        path = nothing
        if parent >= 0:
            above = found[bisect_right(found, parent, key=lambda span: span.start) - 1]
            path = torch.cat([above.path, torch.arange(above.start, parent + 1)])
        if end > start:
            found.append(Span(start, end - start, path))
    return found


@dataclass(slots=True)
class Bucket:
    """Segments that are attended in one call."""

    count: int
    length: int
    """Of the longest segment, which the others are padded to."""
    rows: torch.Tensor | slice
    """Packed positions to gather [count * length]; a slice where they are adjacent already."""
    seen: Seen | None = None
    """The keys, where they are not the segments' own tokens only."""
    bands: dict[int, torch.Tensor] = field(default_factory=dict)
    """Masks [length, length] of sliding windows shorter than ``length``, by window."""

    def queries(self, states: torch.Tensor) -> torch.Tensor:
        """[1, heads, T, dim] -> [count, heads, length, dim]"""
        rows = states[0].transpose(0, 1)
        rows = rows[self.rows] if isinstance(self.rows, slice) else rows.index_select(0, self.rows)
        return rows.unflatten(0, (self.count, self.length)).transpose(1, 2)

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        """[1, heads, T, dim] -> [count, heads, tokens seen, dim]"""
        if self.seen is None:
            return self.queries(states)
        rows = states[0].transpose(0, 1).index_select(0, self.seen.rows)
        return rows.unflatten(0, (self.count, -1)).transpose(1, 2)

    def mask(self, window: int | None, device: torch.device) -> torch.Tensor | None:
        """None where plain causal attention is right; else which keys a query sees. True = sees."""
        if self.seen is not None:
            return self.seen.mask(window)
        if window is None or window >= self.length:
            return None
        if window not in self.bands:
            at = torch.arange(self.length, device=device)
            behind = at[:, None] - at[None, :]
            self.bands[window] = (behind >= 0) & (behind < window)
        return self.bands[window]


@dataclass(slots=True)
class Seen:
    """What the segments of a bucket see: the tokens before them, then their own."""

    rows: torch.Tensor
    """Packed positions to gather. [count * K]"""
    depths: torch.Tensor
    """Of the keys in their samples; of padding, more than any query has. [count, 1, 1, K]"""
    query_depths: torch.Tensor  # [count, 1, length, 1]
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    """[count, 1, length, K] by window."""

    def mask(self, window: int | None) -> torch.Tensor:
        """Every key is of the query's own path, so depth alone says what is before it."""
        if window not in self.masks:
            behind = self.query_depths - self.depths
            sees = behind >= 0
            self.masks[window] = sees if window is None else sees & (behind < window)
        return self.masks[window]


@dataclass(slots=True)
class Segments:
    """Where the samples of one packed row are, as attention needs it."""

    buckets: list[Bucket]
    inverse: torch.Tensor | None
    """Where each packed position is in the buckets' outputs laid end to end [T]; None: there."""

    @classmethod
    def of(
        cls, cu_seqlens: Sequence[int], device: torch.device | str, parents: Sequence[int] = ()
    ) -> Segments:
        """See ``Planner``; empty segments are ignored."""
        in_row = spans(cu_seqlens, parents)
        groups = _alike(in_row)
        order = [span for group in groups for span in group]
        in_place = all(group[0].length == group[-1].length for group in groups) and all(
            a.start < b.start for a, b in pairwise(order)
        )
        buckets, inverse, offset = [], torch.empty(cu_seqlens[-1], dtype=torch.int64), 0
        for group in groups:
            longest = group[0].length
            for span in group:
                inverse[span.start : span.start + span.length] = torch.arange(
                    offset, offset + span.length
                )
                offset += longest
            buckets.append(_bucket(group, device))
        return cls(buckets, None if in_place else inverse.to(device))

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
            q, k, v = bucket.queries(query), bucket.keys(key), bucket.keys(value)
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


def _alike(in_row: Sequence[Span]) -> list[list[Span]]:
    """Groups that padding suits, the longest first in each; roots apart from branches."""
    groups: list[list[Span]] = []
    for span in sorted(in_row, key=lambda span: (span.depth > 0, -span.length, -span.seen)):
        group = groups[-1] if groups else [span]
        seen = [other.seen for other in (*group, span)]
        if (
            not groups
            or (span.depth > 0) != (group[0].depth > 0)
            or span.length < _FILL * group[0].length
            or min(seen) < _FILL * max(seen)
        ):
            groups.append([])
        groups[-1].append(span)
    return groups


def _bucket(group: Sequence[Span], device: torch.device | str) -> Bucket:
    longest = group[0].length
    queries = torch.stack([_padded(_own(span), longest) for span in group])
    rows = queries.flatten()
    adjacent = bool((rows.diff() == 1).all())
    where = slice(int(rows[0]), int(rows[0]) + len(rows)) if adjacent else rows.to(device)
    if group[0].depth == 0:
        return Bucket(len(group), longest, where)
    most = max(span.seen for span in group)
    keys = torch.stack([_padded(torch.cat([span.path, _own(span)]), most) for span in group])
    at = torch.arange(most)
    counts = torch.tensor([[span.seen] for span in group])
    depths = torch.where(at < counts, at, _HIDDEN)
    own = torch.arange(longest) + torch.tensor([[span.depth] for span in group])
    lengths = torch.tensor([[span.length] for span in group])
    own = torch.where(torch.arange(longest) < lengths, own, own[:, :1])
    seen = Seen(
        keys.flatten().to(device),
        depths[:, None, None, :].to(device),
        own[:, None, :, None].to(device),
    )
    return Bucket(len(group), longest, where, seen)


def _own(span: Span) -> torch.Tensor:
    return torch.arange(span.start, span.start + span.length)


def _padded(positions: torch.Tensor, length: int) -> torch.Tensor:
    """With its first position again to ``length``."""
    return torch.cat([positions, positions[:1].expand(length - len(positions))])


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
