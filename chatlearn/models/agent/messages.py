"""LangChain messages to OpenAI-style ones, which chat templates and reward functions read."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

from chatlearn.errors import AgentError
from chatlearn.types import Message

_as_json = json.JSONEncoder(sort_keys=True, default=str).encode
_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"}


_SAID_ELSEWHERE = {
    "invalid_tool_call",
    "reasoning",
    "thinking",
    "tool_call",
    "tool_call_chunk",
    "tool_use",
}
"""Blocks that repeat a message's ``tool_calls``, or its reasoning."""


def kind_of(message: BaseMessage) -> str:
    """LangChain's type of a message; a sum of streamed chunks is what it became."""
    return message.type.removesuffix("MessageChunk").lower()


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or a list of blocks of text.

    Raises:
        AgentError: a block is not text; images and audio cannot be trained yet.
    """
    if isinstance(content, str):
        return content
    parts = []
    for block in content or []:
        if isinstance(block, str):
            parts.append(block)
        elif isinstance(block, dict) and block.get("type") == "text":
            parts.append(block.get("text", ""))
        elif isinstance(block, dict) and block.get("type") in _SAID_ELSEWHERE:
            continue
        else:
            kind = block.get("type") if isinstance(block, dict) else type(block).__name__
            raise AgentError(f"a message holds a block of type {kind!r}; only text can be trained")
    return "".join(parts)


def to_openai(message: BaseMessage) -> Message:
    """One message as chat templates expect it; tool arguments stay a dict, not a JSON string."""
    role = _ROLES.get(kind_of(message)) or getattr(message, "role", None)
    if role is None:
        raise AgentError(f"a message of type {message.type!r} cannot be given to a chat template")
    out: Message = {"role": role, "content": text_of(message.content)}
    if isinstance(message, ToolMessage):
        out["tool_call_id"] = message.tool_call_id
        if message.name:
            out["name"] = message.name
    if isinstance(message, AIMessage):
        if reasoning := message.additional_kwargs.get("reasoning_content"):
            out["reasoning_content"] = reasoning
        calls = [(c["name"], c["args"], c["id"]) for c in message.tool_calls]
        if calls:
            out["tool_calls"] = [
                {"type": "function", "id": i, "function": {"name": n, "arguments": a}}
                for n, a, i in calls
            ]
    return out


def fingerprint(message: BaseMessage) -> bytes:
    """What a message says, without its id: two messages that render alike have one fingerprint."""
    try:
        content: Any = text_of(message.content)  # a text and a list of one text block are one thing
    except AgentError:
        content = message.content
    parts: list[Any] = [kind_of(message), content]
    if isinstance(message, ToolMessage):
        parts += [message.tool_call_id, message.name]
    if isinstance(message, AIMessage):
        parts += [
            [[c["name"], c["args"], c["id"]] for c in message.tool_calls],
            [[c.get("name"), c.get("args")] for c in message.invalid_tool_calls],
            message.additional_kwargs.get("reasoning_content"),
        ]
    return hashlib.blake2b(_as_json(parts).encode(), digest_size=16).digest()
