"""Who waits, who has a slot, and which tokens the next forward computes. No tensors, no clock."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from chatlearn.models.engine.slots import Segment
from chatlearn.types import Completion, SamplingParams, Session, StopReason


@dataclass(slots=True, eq=False)
class Request:
    """One call of ``Engine.generate``."""

    session: Session
    sampling: SamplingParams
    prompt_length: int
    token_ids: list[int]  # [P + sampled so far]
    draws: list[float]
    """One uniform for each token that may be sampled; their number is the limit."""
    future: asyncio.Future[Completion]
    logprobs: list[float] = field(default_factory=list)
    slot: Slot | None = None

    @property
    def key(self) -> tuple[str, str, list[int], int]:
        """Orders requests of one step whatever thread came first; equal keys get equal tokens."""
        return self.session.group, self.session.run, self.token_ids, self.sampling.seed

    def answer(self, reason: StopReason, version: int) -> None:
        """Give the caller, if there still is one, what has been sampled."""
        if not self.future.done():
            sampled = self.token_ids[self.prompt_length :]
            completion = Completion(sampled, self.logprobs, reason, (version, version))
            self.future.set_result(completion)

    def fail(self, error: Exception) -> None:
        """Raise ``error`` in the caller, if there still is one."""
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(slots=True, eq=False)
class Slot:
    """Who uses, or last used, one row of the key/value memory."""

    index: int
    session: Session
    token_ids: list[int]
    """Those of the request: it appends here what it samples."""
    held: int
    """So many of ``token_ids`` have keys and values."""
    request: Request | None
    """None when the slot is only kept for later prompts."""
    last_step: int = 0


class Schedule:
    """A queue in front of ``max_slots`` slots; decides by order of arrival and counts alone."""

    def __init__(self, *, max_slots: int, max_forward_tokens: int) -> None:
        self.prefilled = 0
        """Prompt tokens given to a forward so far."""
        self.reused = 0
        """Prompt tokens taken from a slot instead."""
        self._max_slots = max_slots
        self._max_forward_tokens = max(max_forward_tokens, max_slots)
        self._arrived: list[Request] = []  # since the last step
        self._waiting: deque[Request] = deque()
        self._slots: dict[int, Slot] = {}
        self._step = 0

    def add(self, request: Request) -> None:
        """Queue a request; those of one step are put in an order that no thread can change."""
        self._arrived.append(request)

    def running(self) -> list[Request]:
        """Requests that hold a slot."""
        return [slot.request for slot in self._slots.values() if slot.request is not None]

    def in_flight(self) -> list[Request]:
        """Every request that has not been answered."""
        return [*self._arrived, *self._waiting, *self.running()]

    def owner(self, segment: Segment) -> Request:
        """The request whose tokens a planned segment computes."""
        return self._slots[segment.slot].request

    def leave(self, request: Request) -> None:
        """Take a request out, wherever it is; harmless when it is nowhere."""
        if request in self._arrived:
            self._arrived.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)
        elif request.slot is not None:
            self._slots.pop(request.slot.index, None)
            request.slot = None

    def finish(self, request: Request) -> None:
        """Take a request out and keep its slot for prompts that continue it."""
        request.slot.request = None
        request.slot = None

    def forget(self, session: Session) -> None:
        """Free the slots of ``session``."""
        for slot in list(self._slots.values()):
            if slot.session == session:
                del self._slots[slot.index]

    def forget_all(self) -> None:
        """Free every slot."""
        for request in self.running():
            request.slot = None
        self._slots.clear()

    def plan(self, *, admit: bool = True) -> list[Segment]:
        """The tokens to compute now: decoding first, then prompts as far as they fit.

        Without ``admit`` no request starts; those that run go on.
        """
        self._step += 1
        self._waiting.extend(sorted(self._arrived, key=lambda request: request.key))
        self._arrived.clear()
        active = [slot for slot in self._slots.values() if slot.request is not None]
        # at most one prompt is in pieces; it comes after the others, and before any new one
        active.sort(key=lambda slot: (len(slot.token_ids) - slot.held, slot.index))
        segments: list[Segment] = []
        budget = self._max_forward_tokens
        for slot in active:
            segments.append(self._advance(slot, budget))
            budget -= len(segments[-1].token_ids)
        while admit and self._waiting and budget > 0:
            source, shared = self._longest_prefix(self._waiting[0])
            slot = self._place(self._waiting[0], source, shared)
            if slot is None:
                break
            self._waiting.popleft()
            self.reused += shared
            copied = None
            if source is not None and source is not slot:
                copied, source.last_step = source.index, self._step
            segments.append(self._advance(slot, budget, copied))
            budget -= len(segments[-1].token_ids)
        return segments

    def _advance(self, slot: Slot, budget: int, source: int | None = None) -> Segment:
        """The next tokens of ``slot``, at most ``budget``; counts them as held from now on."""
        start = slot.held
        token_ids = slot.token_ids[start : start + budget]
        slot.held += len(token_ids)
        slot.last_step = self._step
        if not slot.request.logprobs:  # still the prompt
            self.prefilled += len(token_ids)
        return Segment(slot.index, start, token_ids, slot.held == len(slot.token_ids), source)

    def _longest_prefix(self, request: Request) -> tuple[Slot | None, int]:
        """The slot of the same group that holds most of the prompt, and how much of it.

        The last token of the prompt is always computed: its logits are wanted.
        """
        best: Slot | None = None
        most = 0
        for slot in self._slots.values():
            if slot.session.group == request.session.group:
                limit = min(slot.held, request.prompt_length - 1)
                shared = common_prefix(slot.token_ids, request.token_ids, limit)
                if shared > most:
                    best, most = slot, shared
        return best, most

    def _place(self, request: Request, source: Slot | None, shared: int) -> Slot | None:
        """Give ``request`` a slot, or None when all are taken.

        A kept slot of the same run whose tokens are all in the prompt is continued. Else a free
        slot is taken, or the kept one that is longest unused, ``source`` last.
        """
        kept = [slot for slot in self._slots.values() if slot.request is None]
        # a slot that this very forward copies from must stay as it is until the next one
        idle = [slot for slot in kept if slot.last_step < self._step]
        if source in kept and source.held == shared and source.session == request.session:
            slot = source
        elif len(self._slots) < self._max_slots:
            index = next(i for i in range(self._max_slots) if i not in self._slots)
            slot = Slot(index, request.session, [], 0, None)
        elif idle:
            slot = min(idle, key=lambda slot: (slot is source, slot.last_step, slot.index))
        else:
            return None
        slot.session, slot.token_ids, slot.held = request.session, request.token_ids, shared
        slot.request, request.slot = request, slot
        self._slots[slot.index] = slot
        return slot


def common_prefix(left: list[int], right: list[int], limit: int) -> int:
    """Length of the common beginning, at most ``limit``: bisection over C-speed comparisons."""
    if left[:limit] == right[:limit]:
        return limit
    low, high = 0, limit  # equal up to low, not up to high
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
