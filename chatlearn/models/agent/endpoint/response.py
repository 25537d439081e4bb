"""Recorded turns as the answers of OpenAI's chat API: one body, or a stream of chunks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage

from chatlearn.types import StopReason, Turn

_PIECE = 16
"""Characters of one streamed piece: the engine answers whole, so pieces are cut from the text."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What one sampled turn says to the client."""

    turn: Turn
    content: str
    """Also the text of calls that cannot be read: a client could only fail on them."""
    reasoning: str
    calls: list[dict[str, Any]]
    finish_reason: str

    @classmethod
    def of(cls, turn: Turn, answer: AIMessage, *, only_first_call: bool) -> Choice:
        calls = answer.tool_calls[:1] if only_first_call else answer.tool_calls
        unread = [str(call.get("args") or "") for call in answer.invalid_tool_calls]
        ended = turn.completion.stop_reason
        return cls(
            turn=turn,
            content="\n".join(text for text in (str(answer.content), *unread) if text),
            reasoning=answer.additional_kwargs.get("reasoning_content", ""),
            calls=[
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {
                        "name": call["name"],
                        "arguments": json.dumps(call["args"], ensure_ascii=False),
                    },
                }
                for call in calls
            ],
            finish_reason="length"
            if ended is not StopReason.STOP
            else "tool_calls"
            if calls
            else "stop",
        )

    @property
    def call_ids(self) -> list[str]:
        return [call["id"] for call in self.calls]


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one request."""

    id: str
    model: str
    choices: list[Choice]
    tokenizer: Any
    logprobs: bool

    def body(self) -> dict[str, Any]:
        """A ``chat.completion``."""
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": i,
                    "message": _message(choice),
                    "logprobs": self._logprobs(choice),
                    "finish_reason": choice.finish_reason,
                }
                for i, choice in enumerate(self.choices)
            ],
            "usage": _usage([choice.turn for choice in self.choices]),
        }

    def events(self, *, include_usage: bool) -> Iterator[str]:
        """Server-sent events of ``chat.completion.chunk`` that add up to ``body``."""
        head = self._head("chat.completion.chunk")
        for i, choice in enumerate(self.choices):
            logprobs = self._logprobs(choice)
            for delta in _deltas(choice):
                piece = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": None}
                logprobs = None
                yield _event({**head, "choices": [piece]})
            end = {"index": i, "delta": {}, "finish_reason": choice.finish_reason}
            yield _event({**head, "choices": [end]})
        if include_usage:
            usage = _usage([choice.turn for choice in self.choices])
            yield _event({**head, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        completion = choice.turn.completion
        tokens = []
        for token_id, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            text = self.tokenizer.decode([token_id], skip_special_tokens=False)
            tokens.append(
                {
                    "token": text,
                    "bytes": list(text.encode()),
                    "logprob": logprob,
                    "top_logprobs": [],
                }
            )
        return {"content": tokens, "refusal": None}


def error_body(message: str, *, status: int, code: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    if status == 401:
        kind = "authentication_error"
    else:
        kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _message(choice: Choice) -> dict[str, Any]:
    out: dict[str, Any] = {
        "role": "assistant",
        "content": choice.content or (None if choice.calls else ""),
        "refusal": None,
    }
    if choice.reasoning:
        out["reasoning_content"] = choice.reasoning
    if choice.calls:
        out["tool_calls"] = choice.calls
    return out


def _deltas(choice: Choice) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": None if choice.calls else ""}
    for key, text in (("reasoning_content", choice.reasoning), ("content", choice.content)):
        for i in range(0, len(text), _PIECE):
            yield {key: text[i : i + _PIECE]}
    for i, call in enumerate(choice.calls):
        written = call["function"]["arguments"]
        opening = {**call, "function": {"name": call["function"]["name"], "arguments": ""}}
        yield {"tool_calls": [{"index": i, **opening}]}
        for at in range(0, len(written), _PIECE):
            piece = {"arguments": written[at : at + _PIECE]}
            yield {"tool_calls": [{"index": i, "function": piece}]}


def _usage(turns: Sequence[Turn]) -> dict[str, int]:
    prompt = len(turns[0].prompt_ids)
    sampled = sum(len(turn.completion.token_ids) for turn in turns)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
