"""Text of what was answered, whatever object it comes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chatlearn.types import Message


def final_response(messages: Sequence[Message]) -> str:
    """Text of the last assistant message; '' when there is none.

    What a tool printed is never the answer, even when it comes last. Of content blocks, those with
    text are joined.
    """
    for message in reversed(messages):
        if message.get("role") == "assistant":
            return content_text(message.get("content"))
    return ""


def last_question(messages: Sequence[Message]) -> str:
    """Text of the last user message; '' when there is none."""
    for message in reversed(messages):
        if message.get("role") == "user":
            return content_text(message.get("content"))
    return ""


def content_text(content: Any) -> str:
    """Text of a message's content: a string, or blocks of which those with text are joined."""
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    return "".join(
        block if isinstance(block, str) else str(block.get("text") or "")
        for block in blocks
        if isinstance(block, str) or (isinstance(block, dict) and block.get("type") == "text")
    )


def response_text(response: Any) -> str:
    """What a workflow answered as text: a string, a message of OpenAI's, LangChain's or
    AgentScope's kind, or a list of messages, of which the assistant's last counts.

    None is ''. Any other object is its ``str()``.
    """
    if response is None or isinstance(response, str):
        return response or ""
    if isinstance(response, Mapping) and isinstance(response.get("content"), str | list):
        return content_text(response["content"])
    if isinstance(response, Mapping) and isinstance(response.get("messages"), list):
        return response_text(response["messages"])
    if isinstance(response, list) and response:
        roles = [_role(message) for message in response]
        if all(roles):
            said = [m for m, r in zip(response, roles, strict=True) if r in ("assistant", "ai")]
            return response_text(said[-1]) if said else ""
        return content_text(response)
    content = getattr(response, "content", None)
    return content_text(content) if isinstance(content, str | list) else str(response)


def _role(message: Any) -> str:
    """Of OpenAI's kind of message its role, of LangChain's its type; '' of anything else."""
    if isinstance(message, Mapping):
        return str(message.get("role") or "")
    return str(getattr(message, "role", None) or getattr(message, "type", ""))
