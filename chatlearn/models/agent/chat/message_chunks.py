"""Streaming: one finished answer cut into LangChain's chunks, which sum to it again.

The engine answers whole, for only a finished completion has logprobs and a place in the tree. What
is streamed is therefore cut from the message: a graph that keeps the sum of the chunks keeps the
message, and its next call continues the turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.tracers.context import register_configure_hook

_WORDS = re.compile(r"\s*\S+|\s+\Z")
_LAST = {"chunk_position": "last"} if "chunk_position" in AIMessageChunk.model_fields else {}


def cut(message: AIMessage) -> Iterator[AIMessageChunk]:
    """Chunks whose sum is ``message``: reasoning and text word by word, calls name first.

    An answer with a call that cannot be read is one chunk: LangChain parses the sum of tool call
    chunks leniently, and would make a call out of half a one.
    """
    if message.invalid_tool_calls:
        yield AIMessageChunk(
            content=message.content,
            id=message.id,
            additional_kwargs=message.additional_kwargs,
            tool_calls=message.tool_calls,
            invalid_tool_calls=message.invalid_tool_calls,
            response_metadata=message.response_metadata,
            usage_metadata=message.usage_metadata,
            **_LAST,
        )
        return
    for word in _WORDS.findall(message.additional_kwargs.get("reasoning_content", "")):
        yield AIMessageChunk(
            content="", id=message.id, additional_kwargs={"reasoning_content": word}
        )
    for word in _WORDS.findall(message.content):
        yield AIMessageChunk(content=word, id=message.id)
    for index, call in enumerate(message.tool_calls):
        opening = tool_call_chunk(name=call["name"], args="", id=call["id"], index=index)
        yield AIMessageChunk(content="", id=message.id, tool_call_chunks=[opening])
        for piece in _WORDS.findall(json.dumps(call["args"], ensure_ascii=False)):
            part = tool_call_chunk(args=piece, index=index)
            yield AIMessageChunk(content="", id=message.id, tool_call_chunks=[part])
    yield AIMessageChunk(
        content="",
        id=message.id,
        response_metadata=message.response_metadata,
        usage_metadata=message.usage_metadata,
        **_LAST,
    )


@dataclass(frozen=True, slots=True)
class CallStart:
    """What LangChain's callbacks were told of a call: what ``Position.of`` reads."""

    metadata: dict[str, Any]
    tags: list[str]
    parent_run_id: UUID | None


class _CallStarts(BaseCallbackHandler):
    """Remembers, in its own context, the call that is starting.

    LangChain calls ``_stream`` without the run manager (``_generate`` gets it), so a streamed call
    could not know its node otherwise.
    """

    run_inline = True  # in the task that goes on to call _stream
    ignore_llm = ignore_chain = ignore_agent = ignore_retriever = True
    ignore_retry = ignore_custom_event = True

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[Any]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _starting.set(CallStart(metadata or {}, tags or [], parent_run_id))


_starting: ContextVar[CallStart | None] = ContextVar("chatlearn_starting", default=None)
_listening: ContextVar[_CallStarts] = ContextVar("chatlearn_call_starts", default=_CallStarts())  # noqa: B039
register_configure_hook(_listening, inheritable=False)


def starting_call() -> CallStart | None:
    """The call of a chat model that this task started last; None outside one."""
    return _starting.get()
