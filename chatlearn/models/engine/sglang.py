"""The client of one SGLang server: token ids in; ids, logprobs and weight versions out.

    generate        POST /generate; many hundred may be in flight
    update          pause -> begin_update -> update_from_* (any client, any process) -> end_update
    colocation      sleep(tags) -> wake(tags); a sleeping server is paused, so nothing can reach it

Several clients in several processes may speak to one server, so nothing here relies on having seen
what another did. Prefix caches are keyed by the version of the weights: after an update nothing is
reused that older weights computed, even where SGLang could not flush because requests run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from chatlearn.errors import EngineError, EngineLost
from chatlearn.models.engine.sglang_http import SGLangHttp
from chatlearn.models.engine.sglang_intake import WeightIntake
from chatlearn.types import Completion, SamplingParams, Session, StopReason

logger = logging.getLogger(__name__)

PauseMode = Literal["in_place", "retract", "abort"]

_HEALTH_S = 25.0
_ABORT_GRACE_S = 10.0
_FLUSH_S = 10.0
_UNNAMED = "default"
"""SGLang's name for the weights that a server was started with."""
_TAGS = ("kv_cache", "weights")
_ATTEMPTS = 8


@dataclass(eq=False, slots=True)
class _Flight:
    """One request that the server has not answered yet."""

    session: Session
    answer: asyncio.Task[dict[str, Any]]


@dataclass(slots=True)
class _Counts:
    """Sums since the last ``stats``; sums only, so that those of many clients can be added."""

    requests: int = 0
    sampled: int = 0
    prompt: int = 0
    cached: int = 0
    aborted: int = 0
    asked_again: int = 0
    request_s: float = 0.0
    busy_s: float = field(default=0.0)
    """Time in which at least one request was in flight."""


class SGLangEngine(WeightIntake):
    """Speaks to the server at ``url``.

    Args:
        url: ``http://host:port``.
        eos_token_ids: tokens that end a completion, beside those that the server takes from the
            model's own configuration and tokenizer. They are part of it.
        max_context: longest prompt plus completion, in tokens.
        request_timeout_s: a completion that takes longer is an ``EngineError``.
        deterministic: the server runs SGLang's deterministic inference, so seeds count.
        vocab_size: tokens of the model. A token id beyond it *kills* the server (on a CPU, and by
            an assertion on a GPU), so give it wherever prompts are not the tokenizer's own.
        adapter: name of the LoRA adapter to sample with; None = without one. The server has it
            after the first ``replace_adapter``.
    """

    def __init__(
        self,
        url: str,
        *,
        eos_token_ids: Collection[int],
        max_context: int,
        request_timeout_s: float = 3600.0,
        deterministic: bool = False,
        vocab_size: int | None = None,
        adapter: str | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        super().__init__(SGLangHttp(self.url, on_lost=self.restarted))
        self._eos = sorted(eos_token_ids)
        self._max_context, self._vocab, self._adapter = max_context, vocab_size, adapter
        self._timeout_s, self._deterministic = request_timeout_s, deterministic
        self._flights: dict[str, _Flight] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._label = _UNNAMED
        self._pauses: set[str] = set()
        self._pause_mode: PauseMode = "in_place"
        self._is_updating = False
        self._asleep: set[str] = set()
        self._counts = _Counts()
        self._busy_since = 0.0

    # ------------------------------------------------------------------ sampling

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, session: Session
    ) -> Completion:
        """Sample one completion of ``prompt_ids`` [P]. While the server is paused, this waits.

        Cancelling the caller ends the request at the server. An aborted request is answered with
        what it has sampled.

        Raises ``EngineLost`` when the server is gone, ``EngineError`` when it refuses.
        """
        body = self._request(prompt_ids, sampling, session)
        for _ in range(_ATTEMPTS):
            asked = self._label
            answer = await self._fly(body | {"rid": uuid.uuid4().hex, "extra_key": asked}, session)
            if answer is None:
                self._counts.aborted += 1
                version = _number(asked) or 0
                return Completion([], [], StopReason.ABORT, (version, version))
            meta = answer["meta_info"]
            self._label = meta["weight_version"]
            spans = meta.get("weight_versions") or [{"version": self._label}]
            is_fresh = spans[0]["version"] == asked or not meta.get("cached_tokens")
            if is_fresh or _was_aborted(meta):
                return self._completion(answer, spans, session)
            # The weights changed between asking and sampling: its prefix may be of the old ones.
            self._counts.asked_again += 1
        raise EngineError(
            f"request of {session}: the weights of {self.url} changed {_ATTEMPTS} times before it "
            "could start; publish less often"
        )

    async def abort(self, session: Session) -> None:
        """End what this client has in flight for ``session``; harmless when there is nothing."""
        found = [(rid, f) for rid, f in self._flights.items() if f.session == session]
        for _, flight in found:
            # A request that the server holds back (paused, or not read yet) misses its abort.
            asyncio.get_running_loop().call_later(_ABORT_GRACE_S, flight.answer.cancel)
        await asyncio.gather(
            *(self._server.ask("/abort_request", {"rid": rid}) for rid, _ in found)
        )

    def stats(self) -> dict[str, float]:
        """Counters since the last call, flat ``engine/quantity``; all of them may be summed."""
        now, counts = time.perf_counter(), self._counts
        if self._flights:
            counts.busy_s += now - self._busy_since
            self._busy_since = now
        self._counts = _Counts()
        return {
            "engine/requests": float(counts.requests),
            "engine/requests_aborted": float(counts.aborted),
            "engine/requests_asked_again": float(counts.asked_again),
            "engine/tokens_sampled": float(counts.sampled),
            "engine/prefill_tokens": float(counts.prompt - counts.cached),
            "engine/prefill_tokens_reused": float(counts.cached),
            "engine/request_s": counts.request_s,
            "engine/busy_s": counts.busy_s,
        }

    # ------------------------------------------------------------------ pause, sleep, health

    async def pause(self, mode: PauseMode) -> None:
        """Stop sampling. Requests in flight wait where they are (``in_place``), give up their
        cache and wait in the queue (``retract``), or are answered as aborted (``abort``)."""
        await self._hold("user", mode)

    async def resume(self) -> None:
        """Undo ``pause``; a server that sleeps or is being updated goes on only after that."""
        await self._release("user")

    async def sleep(self, tags: Collection[str] = _TAGS) -> None:
        """Give back the memory of ``tags``. Requests in flight wait in the queue until ``wake``."""
        tags = sorted(set(tags) - self._asleep)
        if not tags:
            return
        await self._hold("sleep", "retract")
        await self._server.ask("/release_memory_occupation", {"tags": tags})
        self._asleep.update(tags)

    async def wake(self, tags: Collection[str] | None = None) -> None:
        """Take memory back; sampling goes on when nothing sleeps any more. Weights come back with
        unknown contents: publish."""
        tags = sorted(self._asleep if tags is None else self._asleep & set(tags))
        if tags:
            await self._server.ask("/resume_memory_occupation", {"tags": tags})
            self._asleep.difference_update(tags)
        if not self._asleep:
            await self._release("sleep")

    async def flush(self) -> None:
        """Drop all prefix caches; ``EngineError`` while requests run."""
        # With a timeout a held scheduler counts its waiting requests as running.
        is_held = self._pauses and self._pause_mode != "abort"
        await self._server.ask(f"/flush_cache?timeout={0 if is_held else _FLUSH_S}", {})

    async def is_healthy(self) -> bool:
        """Whether the server generates a token; of a paused one, whether it answers."""
        path = "/model_info" if self._pauses else "/health_generate"
        try:
            await self._server.ask(path, timeout_s=_HEALTH_S)
        except EngineError:
            return False
        return True

    async def version(self) -> int | None:
        """Version of the weights it was sent, None while it has those it was started with."""
        info = await self._server.ask("/model_info", timeout_s=_HEALTH_S)
        return _number(info["weight_version"])

    def restarted(self) -> None:
        """Say that the server is another process now: nothing done to the old one holds."""
        self._pauses.clear()
        self._asleep.clear()
        self._is_updating, self._label = False, _UNNAMED

    # ------------------------------------------------------------------ weights

    async def begin_update(self) -> None:
        """Open an update: nothing is sampled until ``end_update``. Requests in flight wait in place
        unless the engine was paused otherwise. Beginning again starts the same update over."""
        if self._is_updating:
            return
        if not self._pauses:
            await self._hold("update", "in_place")
        await self._server.ask("/begin_weight_update", {})
        self._is_updating = True

    async def end_update(self, *, version: int) -> None:
        """Close the update, name the weights ``version``, drop the caches, go on sampling."""
        await self._server.ask("/end_weight_update", {})
        self._is_updating = False
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._server.ask("/update_weight_version", body)
        self._label = str(version)
        if "kv_cache" not in self._asleep:  # those of a sleeping cache went with its memory
            try:
                await self.flush()
            except EngineLost:
                raise
            except EngineError as error:
                if self._pause_mode != "in_place":
                    raise
                logger.debug("the caches of %s stay under their old version: %s", self.url, error)
        await self._release("update")

    async def replace_adapter(self, path: str, *, version: int) -> None:
        """Sample with the adapter in a folder of ``peft``'s format that the server can read, named
        ``version``. Takes the place of an update; waits for requests that run with the last one.

        The base stays as the server was started. Prefix caches are kept by adapter, so none is of
        the last one.
        """
        if await self.version() is not None:
            await self._server.ask("/unload_lora_adapter", {"lora_name": self._adapter})
        body = {"lora_name": self._adapter, "lora_path": path, "pinned": True}
        await self._server.ask("/load_lora_adapter", body)
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._server.ask("/update_weight_version", body)
        self._label = str(version)

    async def close(self) -> None:
        """Close the connections; the server goes on."""
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._server.close()

    # ------------------------------------------------------------------ one request

    def _request(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, session: Session
    ) -> dict[str, Any]:
        """The body of one ``/generate``, with nothing left to the model's own defaults."""
        prompt = list(prompt_ids)
        problem = None
        if not prompt:
            problem = "the prompt is empty"
        elif len(prompt) >= self._max_context:
            problem = (
                f"the prompt has {len(prompt)} tokens, which leaves none of the context of "
                f"{self._max_context} to sample"
            )
        elif min(prompt) < 0 or (self._vocab is not None and max(prompt) >= self._vocab):
            problem = f"the prompt has a token id outside the vocabulary of {self._vocab}"
        elif sampling.max_new_tokens < 1:
            problem = f"max_new_tokens is {sampling.max_new_tokens}, it must be at least 1"
        elif sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k == 0:
            problem = f"temperature >= 0, 0 < top_p <= 1 and top_k != 0 are needed: {sampling}"
        if problem is not None:
            raise EngineError(f"request of {session}: {problem}")
        params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": max(sampling.top_k, -1),
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_new_tokens": 0,
            "max_new_tokens": min(sampling.max_new_tokens, self._max_context - len(prompt)),
            "n": 1,
            "ignore_eos": False,
            "stop_token_ids": self._eos,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "no_stop_trim": True,
        }
        if sampling.stop:
            params["stop"] = list(sampling.stop)
            params["stop_regex"] = [_window(sampling.stop)]
        if self._deterministic:
            params["sampling_seed"] = sampling.seed % 2**63
        adapter = {"lora_path": self._adapter} if self._adapter else {}
        return adapter | {
            "input_ids": prompt,
            "sampling_params": params,
            "return_logprob": True,
            "logprob_start_len": -1,
        }

    async def _fly(self, body: dict[str, Any], session: Session) -> dict[str, Any] | None:
        """Ask and wait; None when the request was aborted and the server had no answer to that."""
        rid = body["rid"]
        answer = asyncio.create_task(self._server.ask("/generate", body, timeout_s=self._timeout_s))
        started = time.perf_counter()
        if not self._flights:
            self._busy_since = started
        self._flights[rid] = _Flight(session, answer)
        try:
            await asyncio.wait({answer})
        except asyncio.CancelledError:
            answer.cancel()
            self._end_in_background(rid)
            raise
        finally:
            del self._flights[rid]
            ended = time.perf_counter()
            self._counts.request_s += ended - started
            if not self._flights:
                self._counts.busy_s += ended - self._busy_since
        if answer.cancelled():  # by ``abort``, which has waited long enough
            return None
        return answer.result()

    def _end_in_background(self, rid: str) -> None:
        async def end() -> None:
            with contextlib.suppress(EngineError):  # it is gone: so is the request
                await self._server.ask("/abort_request", {"rid": rid}, timeout_s=_HEALTH_S)

        task = asyncio.get_running_loop().create_task(end())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _completion(
        self, answer: dict[str, Any], spans: list[dict[str, Any]], session: Session
    ) -> Completion:
        meta, ids = answer["meta_info"], answer["output_ids"]
        finish = meta["finish_reason"] or {"type": None}
        scored = meta["output_token_logprobs"] or []
        if finish["type"] not in ("stop", "length", "abort"):
            raise EngineError(f"request of {session}: {self.url} ended it with {finish}")
        reason = StopReason(finish["type"])
        if [token for _, token, _ in scored] != ids:
            raise EngineError(
                f"request of {session}: {self.url} returned {len(ids)} tokens and the logprobs of "
                f"{len(scored)}, which do not belong together"
            )
        versions = [_number(span["version"]) or 0 for span in spans]
        counts = self._counts
        counts.requests += 1
        counts.aborted += reason is StopReason.ABORT
        counts.sampled += len(ids)
        counts.prompt += meta["prompt_tokens"]
        counts.cached += meta.get("cached_tokens") or 0
        logprobs = [value for value, _, _ in scored]
        return Completion(ids, logprobs, reason, (min(versions), max(versions)))

    # ------------------------------------------------------------------ HTTP

    async def _hold(self, reason: str, mode: PauseMode) -> None:
        if not self._pauses or mode not in ("in_place", self._pause_mode):
            await self._server.ask("/pause_generation", {"mode": mode})
            self._pause_mode = mode
        self._pauses.add(reason)

    async def _release(self, reason: str) -> None:
        if reason not in self._pauses:
            return
        if self._pauses == {reason}:
            await self._server.ask("/continue_generation", {"torch_empty_cache": False})
        self._pauses.discard(reason)


def _was_aborted(meta: dict[str, Any]) -> bool:
    return (meta["finish_reason"] or {}).get("type") == "abort"


def _number(label: str) -> int | None:
    """A version, from SGLang's text; None for the weights a server was started with."""
    return int(label) if label.isdecimal() else None


def _window(stop: Sequence[str]) -> str:
    """A pattern that matches nothing, and has SGLang look for stop strings in a longer tail.

    It decodes as many last tokens as the *tokenizer* needs for the longest string, but a policy may
    spell it in more, at worst one a byte; and as many as the longest regex has characters.
    """
    return rf"[^\s\S]{{{max(len(text.encode()) for text in stop) + 4}}}"
