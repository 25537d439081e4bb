"""An engine inside the training process: samples from the very module that the trainer updates.

Agents await ``generate`` one by one; the engine steps when they all wait. A step is one forward:
the next token of every running request, and as much of the waiting prompts as fits beside them::

    arrive -> wait for a slot (first in, first out) -> prefill -> decode ... -> leave the slot

A slot keeps its keys and values after its request has left, until the room is needed. A later
prompt of the same group that begins with the same tokens computes only the rest.

Everything that is sampled is a function of the requests and their order: there is no clock here,
and ``Lockstep`` sees to the order. ``benchmarks/engine.py`` measures it against the alternatives.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from chatlearn.errors import EngineError, boundary
from chatlearn.interfaces import Weights
from chatlearn.models.engine.exactness import require_exact
from chatlearn.models.engine.lockstep import Lockstep
from chatlearn.models.engine.sampler import sample, uniforms
from chatlearn.models.engine.schedule import Request, Schedule
from chatlearn.models.engine.slots import Segment, SlotModel
from chatlearn.types import Completion, SamplingParams, Session, StopReason


class EmbeddedEngine:
    """Implements ``interfaces.Engine`` in process, on whatever device the model is on.

    Args:
        model: a causal language model of transformers with full attention in every layer. It is
            borrowed, not copied: a forward switches its attention and mode, and restores both.
        eos_token_ids: tokens that end a completion; they are part of it.
        max_slots: requests that run at the same time; more wait their turn.
        max_context: longest prompt plus completion, in tokens.
        decode: token ids to text; needed only by requests with stop strings.
        lockstep: what the agents are doing, for bitwise repetition (law 8). Without it the engine
            steps as soon as the event loop has nothing else to do.
        max_forward_tokens: longer prompts are computed in pieces, over several steps.

    Raises ``EngineError`` for a model that it would not compute exactly, naming the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_token_ids: Collection[int],
        max_slots: int,
        max_context: int,
        decode: Callable[[Sequence[int]], str] | None = None,
        lockstep: Lockstep | None = None,
        max_forward_tokens: int = 8192,
    ) -> None:
        if max_slots < 1 or max_context < 2 or max_forward_tokens < 1:
            raise EngineError(
                "the embedded engine needs max_slots >= 1, max_context >= 2 and "
                f"max_forward_tokens >= 1, got {max_slots}, {max_context}, {max_forward_tokens}"
            )
        self._memory = SlotModel(model, max_context=max_context)
        require_exact(self._memory)
        self._model = model
        self._vocab = model.get_input_embeddings().num_embeddings
        self._eos = frozenset(eos_token_ids)
        self._max_context = max_context
        self._decode = decode
        self._lockstep = Lockstep() if lockstep is None else lockstep
        self._schedule = Schedule(max_slots=max_slots, max_forward_tokens=max_forward_tokens)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_posted = False
        self._is_asleep = False
        self._version = 0
        self._steps = self._sampled = 0
        self._busy_s = 0.0
        self._reported: dict[str, float] = {}

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, session: Session
    ) -> Completion:
        """Sample one completion of ``prompt_ids`` [P].

        Its tokens depend on the prompt, the weights and ``sampling`` with its seed. A cancelled
        caller leaves its slot; an aborted one is answered with what it has.

        Raises ``EngineError`` for a request that cannot be served, or when the forward failed.
        """
        self._bind()
        request = self._request(prompt_ids, sampling, session)
        with self._lockstep.asking():
            self._schedule.add(request)
            try:
                self._post()
                return await request.future
            finally:
                self._schedule.leave(request)

    async def publish(self, weights: Weights, *, version: int) -> None:
        """Take ``weights`` by their names in the model; those that are its own memory already need
        no copy. Every cache is dropped. Requests that have not started yet see the new weights.

        Raises ``EngineError`` while a request is running, for an unknown name or another shape.
        """
        self._require_rest("publish")
        self._drop_caches()
        own = dict(self._model.named_parameters(remove_duplicate=False))
        own.update(self._model.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in weights:
                if name not in own:
                    raise EngineError(f"published weight {name!r} is not in the engine's model")
                target = own[name]
                if target.shape != tensor.shape:
                    raise EngineError(
                        f"published weight {name!r} has shape {tuple(tensor.shape)}, the engine's "
                        f"model has {tuple(target.shape)}"
                    )
                if target.device != tensor.device or target.data_ptr() != tensor.data_ptr():
                    target.copy_(tensor)
        self._version = version

    async def sleep(self) -> None:
        """Let running requests end, then free the key/value memory.

        Requests that have not started, and those that arrive from now on, wait for ``wake``.
        """
        self._is_asleep = True
        while running := self._schedule.running():
            self._post()
            await asyncio.wait([request.future for request in running])
        self._drop_caches()

    async def wake(self) -> None:
        """Serve again, first those that have waited."""
        self._is_asleep = False
        self._post()

    async def abort(self, session: Session) -> None:
        """Answer what ``session`` has in flight with ``StopReason.ABORT``; forget its slots."""
        for request in self._schedule.in_flight():
            if request.session == session:
                self._schedule.leave(request)
                request.answer(StopReason.ABORT, self._version)
        self._schedule.forget(session)

    def stats(self) -> dict[str, float]:
        """Counters since the last call: flat ``engine/quantity`` for the metrics."""
        totals = {
            "engine/steps": float(self._steps),
            "engine/tokens_sampled": float(self._sampled),
            "engine/prefill_tokens": float(self._schedule.prefilled),
            "engine/prefill_tokens_reused": float(self._schedule.reused),
            "engine/busy_s": self._busy_s,
            "engine/unsynchronised_steps": float(self._lockstep.unsynchronised_steps),
        }
        found = {name: total - self._reported.get(name, 0.0) for name, total in totals.items()}
        self._reported = totals
        found["engine/mean_batch"] = found["engine/tokens_sampled"] / max(found["engine/steps"], 1)
        return found

    def _request(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, session: Session
    ) -> Request:
        prompt = list(prompt_ids)
        problem = None
        if not prompt:
            problem = "the prompt is empty"
        elif len(prompt) >= self._max_context:
            problem = (
                f"the prompt has {len(prompt)} tokens, which leaves none of the context of "
                f"{self._max_context} to sample"
            )
        elif min(prompt) < 0 or max(prompt) >= self._vocab:
            problem = f"the prompt has a token id outside the vocabulary of {self._vocab}"
        elif sampling.max_new_tokens < 1:
            problem = f"max_new_tokens is {sampling.max_new_tokens}, it must be at least 1"
        elif sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k == 0:
            problem = f"temperature >= 0, 0 < top_p <= 1 and top_k != 0 are needed: {sampling}"
        elif sampling.stop and self._decode is None:
            problem = "stop strings need an engine made with `decode`"
        if problem is not None:
            raise EngineError(f"request of {session}: {problem}")
        limit = min(sampling.max_new_tokens, self._max_context - len(prompt))
        return Request(
            session=session,
            sampling=sampling,
            prompt_length=len(prompt),
            token_ids=prompt,
            draws=uniforms(sampling.seed, limit),
            future=asyncio.get_running_loop().create_future(),
        )

    def _bind(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        if self._schedule.in_flight():
            raise EngineError("the embedded engine already serves another event loop")
        self._loop, self._is_posted = loop, False

    def _require_rest(self, what: str) -> None:
        running = self._schedule.running()
        if running:
            raise EngineError(
                f"{what} needs an engine at rest, but {len(running)} requests are running, of "
                f"{running[0].session} among others; await or abort them first"
            )

    def _drop_caches(self) -> None:
        self._schedule.forget_all()
        self._memory.release()

    def _post(self) -> None:
        """Have the next step taken when every agent waits for it."""
        is_due = self._schedule.running() if self._is_asleep else self._schedule.in_flight()
        if is_due and not self._is_posted:
            self._lockstep.when_idle(self._step)
            self._is_posted = True

    def _step(self) -> None:
        self._is_posted = False
        started = time.perf_counter()
        try:
            with boundary(EngineError, "a step of the embedded engine"):
                segments = self._schedule.plan(admit=not self._is_asleep)
                if segments:
                    self._sample(segments)
        except EngineError as error:
            failed = self._schedule.running()
            self._drop_caches()
            for request in failed:
                request.fail(EngineError(str(error)))
        self._busy_s += time.perf_counter() - started
        self._post()

    def _sample(self, segments: list[Segment]) -> None:
        """Compute ``segments``, append one token to each request that is due, let the done go."""
        done, logits = self._memory.forward(segments)
        self._steps += 1
        requests = [self._schedule.owner(segment) for segment in done]
        if not requests:
            return
        draws = [request.draws[len(request.logprobs)] for request in requests]
        tokens, logprobs = sample(logits, draws, [request.sampling for request in requests])
        if not all(map(math.isfinite, logprobs)):
            raise EngineError("the model's logits are not finite: did the last update diverge?")
        self._sampled += len(tokens)
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            request.token_ids.append(token)
            request.logprobs.append(logprob)
            try:
                is_stopped = token in self._eos or self._has_stop_string(request)
            except EngineError as error:
                self._schedule.leave(request)
                request.fail(error)
                continue
            if is_stopped or len(request.logprobs) == len(request.draws):
                self._schedule.finish(request)
                reason = StopReason.STOP if is_stopped else StopReason.LENGTH
                request.answer(reason, self._version)

    def _has_stop_string(self, request: Request) -> bool:
        """Whether the newest token completed a stop string; only a tail is decoded.

        A token is at least one byte of text, so the bytes of the string bound its tokens; a few
        more give the tokenizer the start of a word or of a character.
        """
        stop = request.sampling.stop
        if not stop:
            return False
        longest = max(len(text.encode()) for text in stop)
        first = max(request.prompt_length, len(request.token_ids) - longest - 4)
        with boundary(EngineError, f"decoding for the stop strings of {request.session}"):
            tail = self._decode(request.token_ids[first:])
        return any(text in tail for text in stop)
