"""Streaming: one finished answer cut into LangChain's chunks, which sum to it again.

The engine answers whole, for only a finished completion has logprobs and a place in the tree. What
is streamed is therefore cut from the message: a graph that keeps the sum of the chunks keeps the
message, and its next call continues the turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk

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
