"""The model over key/value slots: one packed forward for prompts and decoding together.

transformers' ``AttentionInterface`` lets a model call our attention in place of its own, so the
same code serves every dense model of the library. A slot is one row of the key/value memory, and a
``Segment`` is the next few tokens of one slot::

    slot 0  [ k k k k k k . . ]  <- Segment(start=6, [t])         decoding: one token
    slot 1  [ k k k k . . . . ]  <- Segment(start=4, [t, t, t])   a prompt; 4 tokens were reused

All segments go through the linear layers as one row of tokens without padding. Attention then
treats segments of one token together, whatever they are, and longer ones each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from chatlearn.errors import EngineError

ATTENTION_NAME = "chatlearn_slots"
BLOCK = 16
"""Key/value lengths are multiples of this: aligned masks, and few distinct shapes."""
_KEYS_A_CALL = {"cpu": 1024}
"""How many unneeded keys are read in the time of one more call of attention, by device."""
_KEYS_A_CALL_ELSEWHERE = 65536
"""A guess: not measured on a GPU."""


@dataclass(slots=True, eq=False)
class Segment:
    """Consecutive tokens of one slot that a forward computes."""

    slot: int
    start: int
    """Position of the first token: so many tokens of the slot are held, or copied first."""
    token_ids: list[int]
    is_sampled: bool
    """Whether the logits after the last token are wanted."""
    source: int | None = None
    """Slot whose first ``start`` keys and values are copied before anything is computed."""


@dataclass(slots=True)
class _Rows:
    """Segments of one token that are attended together, in place: their slots are neighbours."""

    first: int
    """Row of the queries that the first of them is."""
    count: int
    slot: int
    """The lowest that is read."""
    width: int
    """Slots read; more than ``count`` where there are unused ones between them."""
    places: torch.Tensor | None
    """Row -> slot, counted from ``slot``, where some are unused. [count]"""
    length: int
    """Keys read of each."""
    bias: torch.Tensor  # [width, 1, 1, length], 0 where a key is visible and -inf elsewhere


@dataclass(slots=True)
class _Plan:
    """What the attention of every layer needs to know about the running forward."""

    memory: SlotModel
    slots: torch.Tensor  # [T] of each token
    positions: torch.Tensor  # [T] of each token in its slot
    copies: list[tuple[int, int, int]]  # (from slot, to slot, tokens)
    rows: list[_Rows]
    spans: list[tuple[int, int, int, int]]  # (first token, tokens, slot, start), longer than one


_plan: ContextVar[_Plan | None] = ContextVar("chatlearn_slots_plan", default=None)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: [1, H, T, D] -> [1, T, H, D]."""
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise EngineError(
                f"the embedded engine cannot honour {name}={_brief(kwargs[name])} of "
                f"{type(module).__name__}; use runtime_args.rollout_backend=sglang for this model"
            )
    plan = _plan.get()
    if plan is None:
        raise EngineError(f"attention {ATTENTION_NAME!r} is only for the embedded engine's forward")
    return plan.memory.attend(plan, module.layer_idx, query, key, value, scaling), None


def _brief(value: object) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


AttentionInterface.register(ATTENTION_NAME, _attention)
# No mask function is registered under the name: transformers then builds no mask at all, instead of
# looking through position_ids (a wait for the device) to build one that nobody reads.


class SlotModel:
    """A causal language model with key/value memory that grows as slots and lengths are used.

    The memory is one tensor per layer, slots x heads x positions, and doubles in slots or positions
    when it must; so one long context makes every used slot as long. ``release`` gives all of it
    back. The positions of a head lie together: attention on a CPU is up to three times as fast.
    """

    def __init__(self, model: nn.Module, *, max_context: int) -> None:
        self.model = model
        self.max_context = max_context
        self._memory: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # 2 x [S, H, N, D]
        self._slots = 0
        self._length = 0

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def release(self) -> None:
        """Forget every slot and free the memory."""
        self._memory.clear()
        self._slots = self._length = 0

    def forward(self, segments: Sequence[Segment]) -> tuple[list[Segment], torch.Tensor]:
        """Compute the tokens of ``segments``, in one pass without padding.

        A ``source`` must hold its tokens already or compute them in this very call. Returns the
        segments with ``is_sampled``, in the order of their logits [R, V].
        """
        singles = sorted((s for s in segments if len(s.token_ids) == 1), key=lambda s: s.slot)
        ordered = singles + [s for s in segments if len(s.token_ids) > 1]
        self._reserve(
            max(s.slot for s in ordered) + 1, max(s.start + len(s.token_ids) for s in ordered)
        )
        device = self.device
        positions = [p for s in ordered for p in range(s.start, s.start + len(s.token_ids))]
        slots = [s.slot for s in ordered for _ in s.token_ids]
        tokens = [t for s in ordered for t in s.token_ids]
        stacked = torch.tensor([tokens, positions, slots], device=device)  # one copy to the device
        ends = torch.tensor([len(s.token_ids) for s in ordered]).cumsum(0).tolist()
        plan = _Plan(
            memory=self,
            slots=stacked[2],
            positions=stacked[1],
            # in the order given: a source that is itself a copy comes first
            copies=[(s.source, s.slot, s.start) for s in segments if s.source is not None],
            rows=self._rows(singles, stacked[1]),
            spans=[
                (end - len(s.token_ids), len(s.token_ids), s.slot, s.start)
                for s, end in zip(ordered, ends, strict=True)
                if len(s.token_ids) > 1
            ],
        )
        sampled = [(s, end - 1) for s, end in zip(ordered, ends, strict=True) if s.is_sampled]
        if len(sampled) == len(tokens):
            keep: int | torch.Tensor = 0  # transformers' word for all
        else:
            keep = torch.tensor([row for _, row in sampled], device=device, dtype=torch.long)
        token = _plan.set(plan)
        try:
            with self.borrowed(ATTENTION_NAME):
                output = self.model(
                    input_ids=stacked[0][None],
                    position_ids=stacked[1][None],
                    use_cache=False,
                    logits_to_keep=keep,
                )
        finally:
            _plan.reset(token)
        return [segment for segment, _ in sampled], output.logits[0]

    def attend(
        self,
        plan: _Plan,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
    ) -> torch.Tensor:
        """Attention of one layer: [1, H, T, D] -> [1, T, H, D]. Called by the model itself."""
        keys, values = self._layer(layer, key, value)
        keys[plan.slots, :, plan.positions] = key[0].transpose(0, 1)
        values[plan.slots, :, plan.positions] = value[0].transpose(0, 1)
        for source, target, count in plan.copies:
            keys[target, :, :count] = keys[source, :, :count]
            values[target, :, :count] = values[source, :, :count]
        parts = [_attend_rows(rows, query, keys, values, scaling) for rows in plan.rows]
        for first, count, slot, start in plan.spans:
            mask = None
            if start:  # is_causal would align the queries with the first keys, not with the last
                mask = query.new_ones(count, start + count, dtype=torch.bool).tril_(start)
            out = F.scaled_dot_product_attention(
                query[:, :, first : first + count],
                keys[slot : slot + 1, :, : start + count],
                values[slot : slot + 1, :, : start + count],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=True,
            )
            parts.append(out[0].transpose(0, 1))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def _rows(self, singles: list[Segment], positions: torch.Tensor) -> list[_Rows]:
        """How the one-token segments, sorted by slot, read the memory; ``positions`` is [T].

        Slots between them that are not used are read too where that costs less than a call more.
        """
        most = _KEYS_A_CALL.get(positions.device.type, _KEYS_A_CALL_ELSEWHERE)
        groups: list[list[Segment]] = []
        for segment in singles:
            if groups:
                unused = segment.slot - groups[-1][-1].slot - 1
                if unused * segment.start <= most:
                    groups[-1].append(segment)
                    continue
            groups.append([segment])
        found, first = [], 0
        for group in groups:
            found.append(self._together(group, first, positions[first : first + len(group)]))
            first += len(group)
        return found

    def _together(self, group: list[Segment], first: int, last: torch.Tensor) -> _Rows:
        """``group`` begins at row ``first``; ``last`` [count] is the position of each."""
        count, slot = len(group), group[0].slot
        width, places = group[-1].slot + 1 - slot, None
        if width > count:
            places = torch.tensor([s.slot - slot for s in group], device=last.device)
            # unused slots see one key, so that their result, which nobody reads, stays finite
            last = last.new_zeros(width).index_copy_(0, places, last)
        length = _round_up(max(s.start for s in group) + 1)
        hidden = torch.arange(length, device=last.device) > last[:, None]
        bias = torch.zeros(hidden.shape, dtype=self.model.dtype, device=last.device)
        bias = bias.masked_fill_(hidden, float("-inf"))[:, None, None]
        return _Rows(first, count, slot, width, places, length, bias)

    def _layer(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [S, H, N, D] of one layer; the model's own tensors tell the shape."""
        if layer not in self._memory:
            self._memory[layer] = tuple(
                # zeros, not empty: a hidden key is multiplied by 0, and 0 * nan is nan
                x.new_zeros(self._slots, x.shape[1], self._length, x.shape[3])
                for x in (key, value)
            )
        return self._memory[layer]

    def _reserve(self, slots: int, length: int) -> None:
        """Make room for ``slots`` slots of ``length`` tokens, doubling what there is."""
        if slots <= self._slots and length <= self._length:
            return
        if length > self._length:
            most = _round_up(max(self.max_context, length))
            self._length = min(most, max(_round_up(length), 2 * self._length))
        if slots > self._slots:
            self._slots = max(slots, 2 * self._slots)
        for layer, pair in self._memory.items():
            grown = []
            for old in pair:
                new = old.new_zeros(self._slots, old.shape[1], self._length, old.shape[3])
                new[: old.shape[0], :, : old.shape[2]] = old
                grown.append(new)
            self._memory[layer] = tuple(grown)

    @contextmanager
    def borrowed(self, attention: str) -> Iterator[None]:
        """The trainer's model, in evaluation mode with ``attention``, for one forward."""
        config = self.model.config
        before = config._attn_implementation
        training = [m for m in self.model.modules() if m.training] if self.model.training else []
        config._attn_implementation = attention
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            config._attn_implementation = before
            for module in training:
                module.training = True


def _attend_rows(
    rows: _Rows,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of one-token segments: their rows of [1, H, T, D] -> [count, H, D].

    The query heads that share a key head stand where attention expects a sequence of queries, so
    keys and values are read once for all of them and never repeated.
    """
    heads, groups = query.shape[1], keys.shape[1]
    queries = query[0, :, rows.first : rows.first + rows.count].transpose(0, 1)
    if rows.places is not None:
        spread = queries.new_zeros(rows.width, *queries.shape[1:])
        queries = spread.index_copy_(0, rows.places, queries)
    read = slice(rows.slot, rows.slot + rows.width)
    out = F.scaled_dot_product_attention(
        queries.reshape(rows.width, groups, heads // groups, -1),
        keys[read, :, : rows.length],
        values[read, :, : rows.length],
        attn_mask=rows.bias.to(queries.dtype),
        scale=scaling,
    ).flatten(1, 2)
    return out if rows.places is None else out[rows.places]


def _round_up(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
