"""``{"name": ..., "parameters": {...}}`` as the whole answer: Llama 3.1, 3.2 and 3.3."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from chatlearn.models.agent.parsers.json_calls import call_of, not_json, read_object
from chatlearn.models.agent.parsers.parsed import ParsedCall
from chatlearn.models.agent.parsers.segments import (
    Kind,
    Segment,
    SegmentParser,
    call_segment,
    content_segment,
)

TAG = "<|python_tag|>"
_SEPARATOR = re.compile(r"[\s;]*")
_ATTEMPT = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*'
    r'"(?:parameters|arguments)"\s*:'
)


class Llama3Parser(SegmentParser):
    """Calls are objects at the start of the answer or after ``<|python_tag|>``, separated by ``;``.

    No marker tells a call from an answer in JSON, so an object at the start is a call only if it
    has "name" and "parameters" (or "arguments"), or only the name of one of ``tools``; else it is
    content, and nothing of it is shown before the text is finished. After the tag all is calls.
    """

    markers = (TAG,)

    def body(self, text: str, tools: Sequence[dict[str, Any]] | None) -> Iterator[Segment]:
        head, *tagged = text.split(TAG)
        yield from self._untagged(head, _names(tools))
        for part in tagged:
            yield from _tagged(part)

    def _untagged(self, text: str, names: set[str]) -> Iterator[Segment]:
        start = len(text) - len(text.lstrip())
        if not text.startswith("{", start):
            yield from content_segment(text)
            return
        at = 0
        while text.startswith("{", start):
            try:
                value, end = read_object(text, start)
            except ValueError as error:
                if attempt := _ATTEMPT.match(text, start):
                    call = ParsedCall(attempt[1], text[start:].strip(), not_json(error))
                    yield call_segment(text[at:], call)
                    return
                break
            if not _is_call(value, names):
                break
            yield call_segment(text[at:end], call_of(value, text[start:end]))
            at, start = end, _SEPARATOR.match(text, end).end()
        if at and start == len(text):
            yield from _separator(text[at:])
        else:
            yield from content_segment(text[at:], settled=False)

    def _call_prefix(self, name: str | None) -> str:
        return '{"name": "' if name is None else f'{{"name": {json.dumps(name)}, "parameters": '


def _tagged(text: str) -> Iterator[Segment]:
    """The calls after a tag, which ``text`` does not hold."""
    at = start = 0
    opening = TAG
    while opening or start < len(text):
        try:
            value, end = read_object(text, start)
        except ValueError as error:
            why = not_json(error)
            call = ParsedCall(None, text[start:].strip(), why)
            yield call_segment(opening + text[at:], call)
            return
        yield call_segment(opening + text[at:end], call_of(value, text[start:end]))
        opening = ""
        at, start = end, _SEPARATOR.match(text, end).end()
    yield from _separator(text[at:])


def _separator(text: str) -> Iterator[Segment]:
    if text:
        yield Segment(Kind.MARKUP, text)


def _is_call(value: dict[str, Any], names: set[str]) -> bool:
    name = value.get("name")
    if not isinstance(name, str):
        return False
    return "parameters" in value or "arguments" in value or name in names


def _names(tools: Sequence[dict[str, Any]] | None) -> set[str]:
    return {str(tool.get("function", tool).get("name")) for tool in tools or ()}
