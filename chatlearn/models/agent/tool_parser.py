"""Model text to reasoning, content and tool calls. One small class per format; never raises.

What a policy writes is data: a malformed call becomes an ``InvalidToolCall`` with the reason, which
the graph sees, and is never dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from chatlearn.errors import ConfigError


@dataclass(slots=True)
class ParsedCall:
    """One tool call as the model wrote it."""

    name: str | None
    arguments: dict | str
    """A dict when the call is valid, else the text as written."""
    error: str | None = None
    """Why the call is not valid; None when it is."""


@dataclass(slots=True)
class ParsedText:
    """The parts of one completion."""

    content: str
    reasoning: str = ""
    calls: list[ParsedCall] = field(default_factory=list)


class HermesParser:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen2.5, Qwen3."""

    _CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)

    def parse(self, text: str) -> ParsedText:
        reasoning, text = split_reasoning(text)
        calls = [self._call(body.strip()) for body in self._CALL.findall(text)]
        content = self._CALL.sub("", text).strip() if calls else text
        return ParsedText(content=content, reasoning=reasoning, calls=calls)

    @staticmethod
    def _call(body: str) -> ParsedCall:
        try:
            call = json.loads(body)
        except ValueError as error:
            return ParsedCall(None, body, f"the tool call is not JSON: {error}")
        except RecursionError:
            return ParsedCall(None, body, "the tool call is nested too deeply")
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return ParsedCall(None, body, 'the tool call has no "name"')
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return ParsedCall(call["name"], body, 'the "arguments" are not a JSON object')
        if not isinstance(arguments, dict):
            return ParsedCall(call["name"], body, 'the "arguments" are not a JSON object')
        return ParsedCall(call["name"], arguments)


class NoToolParser:
    """For models and agents without tools: all text is content."""

    def parse(self, text: str) -> ParsedText:
        reasoning, text = split_reasoning(text)
        return ParsedText(content=text, reasoning=reasoning)


PARSERS: dict[str, Callable[[], HermesParser | NoToolParser]] = {
    "hermes": HermesParser,
    "qwen": HermesParser,
    "none": NoToolParser,
}
"""Every value of ``models.policy.tool_parser``."""


def tool_parser(name: str) -> HermesParser | NoToolParser:
    """The parser called ``name``; an unknown name is refused with the known ones."""
    if name not in PARSERS:
        raise ConfigError(
            f"models.policy.tool_parser={name!r} is not known; known: {', '.join(PARSERS)}"
        )
    return PARSERS[name]()


def split_reasoning(text: str) -> tuple[str, str]:
    """``(reasoning, rest)`` of a completion that may think in ``<think>...</think>`` first.

    Some templates open the block inside the prompt, so the completion may hold only its end; a
    completion that never closes the block is reasoning to its last token.
    """
    head, closed, rest = text.partition("</think>")
    if closed:
        return head.replace("<think>", "", 1).strip(), rest.lstrip("\n")
    if text.lstrip().startswith("<think>"):
        return text.replace("<think>", "", 1).strip(), ""
    return "", text
