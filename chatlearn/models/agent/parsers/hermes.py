"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen2.5, Qwen3."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from chatlearn.models.agent.parsers.json_calls import call_of, not_json, read_object
from chatlearn.models.agent.parsers.parsed import ParsedCall
from chatlearn.models.agent.parsers.segments import (
    Segment,
    SegmentParser,
    call_segment,
    content_segment,
)

OPEN = "<tool_call>"
_AFTER_JSON = re.compile(r"\s*(?:</tool_call>|(?=<tool_call>)|\Z)")
STOP = re.compile(r"</tool_call>|(?=<tool_call>)|\Z")
"""Where a malformed call ends."""


class HermesParser(SegmentParser):
    """A call ends where its JSON does, so arguments may hold any text, ``</tool_call>`` too.

    A call that is whole but not closed is a call: the end-of-turn token closed it.
    """

    markers = (OPEN,)

    def body(self, text: str, tools: Sequence[dict[str, Any]] | None) -> Iterator[Segment]:
        at = 0
        while (start := text.find(OPEN, at)) >= 0:
            yield from content_segment(text[at:start])
            call, at = self._call(text, start + len(OPEN))
            yield call_segment(text[start:at], call)
        yield from content_segment(text[at:])

    def _call_prefix(self, name: str | None) -> str:
        named = "" if name is None else f'{{"name": {json.dumps(name)}, "arguments": '
        return f"{OPEN}\n{named}"

    @staticmethod
    def _call(text: str, start: int) -> tuple[ParsedCall, int]:
        """The call whose opening tag ends at ``start``, and where its segment ends."""
        try:
            value, end = read_object(text, start)
        except ValueError as error:
            why = not_json(error)
        else:
            if closed := _AFTER_JSON.match(text, end):
                return call_of(value, text[start:end].strip()), closed.end()
            why = "the tool call goes on after its JSON"
        stop = STOP.search(text, start)
        return ParsedCall(None, text[start : stop.start()].strip(), why), stop.end()
