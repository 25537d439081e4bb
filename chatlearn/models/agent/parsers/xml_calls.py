"""Calls with an element for every argument: Qwen3-Coder and Qwen3.5, and GLM-4.5 and newer.

Values are bare text. A value ends at the closing tag after which the format can go on, so it may
hold tags itself. What is between the elements must be whitespace.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

from chatlearn.models.agent.parsers.hermes import OPEN, STOP
from chatlearn.models.agent.parsers.parsed import ParsedCall
from chatlearn.models.agent.parsers.segments import (
    Segment,
    SegmentParser,
    call_segment,
    content_segment,
)
from chatlearn.models.agent.parsers.typed_values import typed_arguments


class XmlCallParser(SegmentParser):
    """What the formats share. A format is four patterns."""

    markers = (OPEN,)

    head: re.Pattern[str]
    """After the opening tag; group 1 is the name of the tool."""
    key: re.Pattern[str]
    """Up to the first character of a value; group 1 is the name of the argument."""
    value_end: re.Pattern[str]
    """The closing tag of a value, where the format can go on after it."""
    tail: re.Pattern[str]
    """After the last argument."""

    def body(self, text: str, tools: Sequence[dict[str, Any]] | None) -> Iterator[Segment]:
        ends = [found.span() for found in self.value_end.finditer(text)]
        at = 0
        while (start := text.find(OPEN, at)) >= 0:
            yield from content_segment(text[at:start])
            call, at = self._call(text, start + len(OPEN), ends, tools)
            yield call_segment(text[start:at], call)
        yield from content_segment(text[at:])

    def _call(
        self,
        text: str,
        start: int,
        ends: list[tuple[int, int]],
        tools: Sequence[dict[str, Any]] | None,
    ) -> tuple[ParsedCall, int]:
        """The call whose opening tag ends at ``start``, and where its segment ends."""
        head = self.head.match(text, start)
        if head is None:
            name, why = None, "the tool call has no name"
        else:
            name, at = head[1], head.end()
            written: dict[str, str] = {}
            why = None
            while why is None and (key := self.key.match(text, at)):
                found = bisect_left(ends, (key.end(), 0))
                if found == len(ends):
                    why = f"the argument {key[1]!r} is not closed"
                elif key[1] in written:
                    why = f"the argument {key[1]!r} is there twice"
                else:
                    written[key[1]] = self._value(text[key.end() : ends[found][0]])
                    at = ends[found][1]
            if why is None and (tail := self.tail.match(text, at)):
                return ParsedCall(name, typed_arguments(name, written, tools)), tail.end()
            why = why or "the tool call is not written as its format says"
        stop = STOP.search(text, start)
        return ParsedCall(name, text[start : stop.start()].strip(), why), stop.end()

    def _value(self, written: str) -> str:
        return written


class Qwen3CoderParser(XmlCallParser):
    """``<tool_call><function=f><parameter=x>1</parameter></function></tool_call>``.

    One newline on each side of a value belongs to the format. A call that is whole but for
    ``</tool_call>`` at the end of the text is a call.
    """

    head = re.compile(r"\s*<function=([^<>\s]+)>\s*")
    key = re.compile(r"<parameter=([^<>\n]+)>")
    value_end = re.compile(r"</parameter>\s*(?=<parameter=|</function>)")
    tail = re.compile(r"</function>\s*(?:</tool_call>|(?=<tool_call>)|\Z)")

    def _value(self, written: str) -> str:
        return written.removeprefix("\n").removesuffix("\n")

    def _call_prefix(self, name: str | None) -> str:
        return f"{OPEN}\n<function=" + ("" if name is None else f"{name}>\n")


class GlmParser(XmlCallParser):
    """``<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>``, GLM-4.5 to 4.7.

    4.5 and 4.6 put a newline between the elements, 4.7 nothing; both are read.
    """

    head = re.compile(r"\s*([^<>\s]+)\s*(?=<arg_key>|</tool_call>)")
    key = re.compile(r"<arg_key>([^<>\n]+)</arg_key>\s*<arg_value>")
    value_end = re.compile(r"</arg_value>\s*(?=<arg_key>|</tool_call>)")
    tail = re.compile(r"</tool_call>")

    def _call_prefix(self, name: str | None) -> str:
        return OPEN + (name or "")
