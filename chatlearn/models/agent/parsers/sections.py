"""Calls between special tokens, in a section of their own: DeepSeek V3, R1 and V3.1, Kimi K2."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from chatlearn.models.agent.parsers.json_calls import not_json, read_object
from chatlearn.models.agent.parsers.parsed import ParsedCall
from chatlearn.models.agent.parsers.segments import (
    Kind,
    Segment,
    SegmentParser,
    call_segment,
    content_segment,
)


class SectionParser(SegmentParser):
    """What the formats share. A section without a call is a malformed call, so is text in it.

    A call outside a section is a call. The end of a section that never began is content.
    """

    section_open: str
    section_close: str
    call_open: str
    call_close: str
    head: re.Pattern[str]
    """Between ``call_open`` and the JSON of the arguments; group 1 is the name of the tool."""
    tail: re.Pattern[str]
    """After the JSON."""

    def __init__(self) -> None:
        self.markers = (self.section_open, self.call_open)
        tags = (self.section_open, self.section_close, self.call_open)
        self._tag = re.compile("|".join(map(re.escape, tags)))
        stops = (self.call_open, self.section_open, self.section_close)
        self._stop = re.compile(
            f"{re.escape(self.call_close)}|(?={'|'.join(map(re.escape, stops))})|\\Z"
        )

    def body(self, text: str, tools: Sequence[dict[str, Any]] | None) -> Iterator[Segment]:
        at, inside = 0, False
        pending = ""  # the opening of a section, while only whitespace came after it
        while tag := self._tag.search(text, at):
            if tag[0] == self.section_close and not inside:
                yield from content_segment(text[at : tag.end()])
                at = tag.end()
                continue
            gap = text[at : tag.start()]
            if pending and not gap.strip():
                pending += gap
            else:
                yield from _opened(pending)
                yield from _between(gap, inside)
                pending = ""
            at = tag.end()
            if tag[0] == self.call_open:
                yield from _opened(pending)
                call, at = self._call(text, at)
                yield call_segment(text[tag.start() : at], call)
                pending = ""
            elif tag[0] == self.section_open:
                yield from _empty(pending)
                pending, inside = tag[0], True
            else:
                yield from _empty(pending + tag[0]) if pending else _opened(tag[0])
                pending, inside = "", False
        gap = text[at:]
        if pending and not gap.strip():
            yield from _empty(pending + gap)
        else:
            yield from _opened(pending)
            yield from _between(gap, inside)

    def _call(self, text: str, start: int) -> tuple[ParsedCall, int]:
        """The call whose opening tag ends at ``start``, and where its segment ends."""
        name, why = None, "the tool call has no name"
        if head := self.head.match(text, start):
            name = head[1]
            try:
                arguments, end = read_object(text, head.end())
            except ValueError as error:
                why = not_json(error)
            else:
                if tail := self.tail.match(text, end):
                    return ParsedCall(name, arguments), tail.end()
                why = "the tool call is not closed after its JSON"
        stop = self._stop.search(text, start)
        return ParsedCall(name, text[start : stop.start()].strip(), why), stop.end()


def _opened(markers: str) -> Iterator[Segment]:
    if markers:
        yield Segment(Kind.MARKUP, markers)


def _empty(section: str) -> Iterator[Segment]:
    if section:
        why = "the section of tool calls holds no call"
        yield call_segment(section, ParsedCall(None, "", why))


def _between(gap: str, inside: bool) -> Iterator[Segment]:
    if not inside:
        yield from content_segment(gap)
    elif gap.strip():
        why = "there is text between the tool calls"
        yield call_segment(gap, ParsedCall(None, gap.strip(), why))
    else:
        yield from _opened(gap)


class DeepSeekV3Parser(SectionParser):
    """``function<｜tool▁sep｜>f`` and the arguments in a fenced block: DeepSeek V3 and R1."""

    section_open = "<｜tool▁calls▁begin｜>"
    section_close = "<｜tool▁calls▁end｜>"
    call_open = "<｜tool▁call▁begin｜>"
    call_close = "<｜tool▁call▁end｜>"
    head = re.compile(r"\s*function\s*<｜tool▁sep｜>\s*([^\s<`]+)\s*```json(?=\s)")
    tail = re.compile(r"\s*```\s*<｜tool▁call▁end｜>")

    def _call_prefix(self, name: str | None) -> str:
        start = f"{self.section_open}{self.call_open}function<｜tool▁sep｜>"
        return start if name is None else f"{start}{name}\n```json\n"


class DeepSeekV31Parser(DeepSeekV3Parser):
    """``f<｜tool▁sep｜>{...}``: DeepSeek V3.1."""

    head = re.compile(r"\s*([^\s<]+)\s*<｜tool▁sep｜>")
    tail = re.compile(r"\s*<｜tool▁call▁end｜>")

    def _call_prefix(self, name: str | None) -> str:
        start = f"{self.section_open}{self.call_open}"
        return start if name is None else f"{start}{name}<｜tool▁sep｜>"


class KimiK2Parser(SectionParser):
    """``functions.f:0<|tool_call_argument_begin|>{...}``: Kimi K2; Kimi 1.5's ``◁think▷`` too.

    K2 Thinking may start its calls without closing the reasoning; the section closes it. An id that
    is only a number names no tool.
    """

    section_open = "<|tool_calls_section_begin|>"
    section_close = "<|tool_calls_section_end|>"
    call_open = "<|tool_call_begin|>"
    call_close = "<|tool_call_end|>"
    head = re.compile(
        r"\s*(?:functions\.)?(?!\d+\s*<)([^\s<:]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>"
    )
    tail = re.compile(r"\s*<\|tool_call_end\|>")
    think_opens = ("<think>", "◁think▷")
    think_closes = ("</think>", "◁/think▷")
    interrupts = (section_open,)

    def _call_prefix(self, name: str | None) -> str:
        start = f"{self.section_open}{self.call_open}functions."
        return start if name is None else f"{start}{name}:0<|tool_call_argument_begin|>"
