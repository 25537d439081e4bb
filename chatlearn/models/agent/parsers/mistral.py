"""``[TOOL_CALLS]``: an array with the older Mistral tokenizers, ``name[ARGS]{...}`` since v11."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from chatlearn.models.agent.parsers.json_calls import call_of, not_json, read_object, skip_space
from chatlearn.models.agent.parsers.parsed import ParsedCall
from chatlearn.models.agent.parsers.segments import (
    Segment,
    SegmentParser,
    call_segment,
    content_segment,
)

OPEN = "[TOOL_CALLS]"
_HEAD = re.compile(r"\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\]\s*[^\s\[\]{}]*\s*)?\[ARGS\]")


class MistralParser(SegmentParser):
    """Both generations are read; the forced prefix is that of the array.

    Of an array that goes wrong, the calls before the wrong one stand.
    """

    markers = (OPEN,)
    think_opens = ("[THINK]", "<think>")
    think_closes = ("[/THINK]", "</think>")

    def body(self, text: str, tools: Sequence[dict[str, Any]] | None) -> Iterator[Segment]:
        at = 0
        while (start := text.find(OPEN, at)) >= 0:
            yield from content_segment(text[at:start])
            after = skip_space(text, start + len(OPEN))
            is_array = text.startswith("[", after) and not text.startswith(OPEN, after)
            read = _array if is_array else _named
            calls, at = read(text, after)
            yield call_segment(text[start:at], *calls)
        yield from content_segment(text[at:])

    def _call_prefix(self, name: str | None) -> str:
        start = f'{OPEN} [{{"name": '
        return start + ('"' if name is None else f'{json.dumps(name)}, "arguments": ')


class MistralV11Parser(MistralParser):
    """The same, with the forced prefix of ``name[ARGS]``."""

    def _call_prefix(self, name: str | None) -> str:
        return OPEN if name is None else f"{OPEN}{name}[ARGS]"


def _array(text: str, start: int) -> tuple[list[ParsedCall], int]:
    """The calls of the array at ``start``, and where it ends."""
    calls: list[ParsedCall] = []
    at = start + 1
    while True:
        at = skip_space(text, at)
        try:
            value, end = read_object(text, at)
        except ValueError as error:
            stop, rest = _stop(text, at), at if calls else start
            return [*calls, ParsedCall(None, text[rest:stop].strip(), not_json(error))], stop
        calls.append(call_of(value, text[at:end]))
        at = skip_space(text, end)
        if text.startswith("]", at):
            return calls, at + 1
        if not text.startswith(",", at):
            stop, why = _stop(text, at), "the array of tool calls is not closed"
            return [*calls, ParsedCall(None, text[at:stop].strip(), why)], stop
        at += 1


def _named(text: str, start: int) -> tuple[list[ParsedCall], int]:
    """The call ``name[ARGS]{...}`` at ``start``, and where it ends."""
    name, why = None, "the tool call has no name"
    if head := _HEAD.match(text, start):
        name = head[1]
        try:
            arguments, end = read_object(text, head.end())
            return [ParsedCall(name, arguments)], end
        except ValueError as error:
            why = not_json(error)
    stop = _stop(text, start)
    return [ParsedCall(name, text[start:stop].strip(), why)], stop


def _stop(text: str, start: int) -> int:
    """Where malformed text ends: at the next calls."""
    found = text.find(OPEN, start)
    return len(text) if found < 0 else found
