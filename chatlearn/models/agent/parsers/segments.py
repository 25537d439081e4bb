"""The part that all parsers share: a text cut into segments, of which none is dropped.

A format says where its calls are (``body``). The reasoning in front, the content around, and what
may be shown while the text is unfinished follow from the segments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from chatlearn.models.agent.parsers.parsed import ParsedCall, ParsedText


class Kind(Enum):
    """What a segment is."""

    CONTENT = "content"
    """For the reader of the answer."""
    REASONING = "reasoning"
    """Inside the reasoning block."""
    CALL = "call"
    """Calls with their markers; ``calls`` has at least one."""
    MARKUP = "markup"
    """A marker or whitespace that the format needs and nobody reads."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the text. The texts of all segments, joined, are the text."""

    kind: Kind
    text: str
    calls: tuple[ParsedCall, ...] = ()
    settled: bool = True
    """More text cannot change this segment or what it is followed by so far."""


class SegmentParser:
    """Base of the parsers. A format has ``markers``, a ``body``, and a ``_call_prefix`` if any.

    Linear in the length of the text. Reasoning is recognised at the start only, and lasts to its
    closing tag: a call written inside it is reasoning.
    """

    markers: tuple[str, ...] = ()
    """Texts a call can begin with, or that may follow a whole one; a piece of one is not shown."""
    think_opens: tuple[str, ...] = ("<think>",)
    think_closes: tuple[str, ...] = ("</think>",)
    joint: str = ""
    """Between two pieces of content."""
    interrupts: tuple[str, ...] = ()
    """Markers that end an open reasoning block."""

    def body(self, text: str, tools: Sequence[dict[str, Any]] | None) -> Iterator[Segment]:
        """The segments of ``text``, which has no reasoning in front."""
        raise NotImplementedError

    def segments(
        self,
        text: str,
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        thinking_open: bool = False,
    ) -> Iterator[Segment]:
        """``text`` in order, nothing left out."""
        start, thought = self._reasoning(text, thinking_open)
        yield from thought
        if start < len(text):
            yield from self.body(text[start:], tools)

    def parse(
        self,
        text: str,
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        thinking_open: bool = False,
    ) -> ParsedText:
        """See ``ToolParser.parse``."""
        said: dict[Kind, list[str]] = {kind: [] for kind in Kind}
        calls: list[ParsedCall] = []
        for segment in self.segments(text, tools, thinking_open=thinking_open):
            said[segment.kind].append(segment.text)
            calls += segment.calls
        content = self.joint.join(said[Kind.CONTENT])
        return ParsedText(
            content=content.rstrip() if calls else content,
            reasoning="".join(said[Kind.REASONING]).strip(),
            calls=calls,
        )

    def visible(self, text: str, *, thinking_open: bool = False) -> str:
        """See ``ToolParser.visible``. Nothing is shown after a malformed call or at its place."""
        shown: list[str] = []
        last = None
        for last in self.segments(text, thinking_open=thinking_open):
            if not last.settled:
                break
            if last.kind is Kind.CONTENT:
                shown.append(last.text)
        content = self.joint.join(shown)
        if last is not None and last.settled and last.kind is Kind.CONTENT:
            content = content[: len(content) - _unfinished(content, self._held)]
        return content.rstrip()

    def prefix(self, name: str | None = None, *, thinking_open: bool = False) -> str | None:
        """See ``ToolParser.prefix``."""
        call = self._call_prefix(name)
        if call is None or not (thinking_open and self.think_closes):
            return call
        return f"\n{self.think_closes[0]}\n\n{call}"

    def opens_thinking(self, prompt: str) -> bool:
        """See ``ToolParser.opens_thinking``."""
        return prompt.rstrip().endswith(self.think_opens)

    def _call_prefix(self, name: str | None) -> str | None:
        return None

    @property
    def _held(self) -> tuple[str, ...]:
        return (*self.markers, *self.think_opens)

    def _reasoning(self, text: str, thinking_open: bool) -> tuple[int, list[Segment]]:
        """Where the reasoning in front ends, and its segments."""
        start = len(text) - len(text.lstrip())
        opening = next((tag for tag in self.think_opens if text.startswith(tag, start)), None)
        if opening is None and not (thinking_open and self.think_closes):
            return 0, []
        found = []
        start = 0 if opening is None else start + len(opening)
        if start:
            found.append(Segment(Kind.MARKUP, text[:start]))
        tags = "|".join(map(re.escape, (*self.think_closes, *self.interrupts)))
        end = re.compile(tags).search(text, start)
        if end is None:
            return len(text), [*found, Segment(Kind.REASONING, text[start:])]
        found.append(Segment(Kind.REASONING, text[start : end.start()]))
        if end[0] in self.interrupts:
            return end.start(), found
        after = end.end()
        while text.startswith("\n", after):
            after += 1
        return after, [*found, Segment(Kind.MARKUP, text[end.start() : after])]


class PlainParser(SegmentParser):
    """For models and agents without tools: all text but the reasoning is content."""

    def body(self, text: str, tools: Sequence[dict[str, Any]] | None) -> Iterator[Segment]:
        yield Segment(Kind.CONTENT, text)


def call_segment(text: str, *calls: ParsedCall) -> Segment:
    """A segment of calls. While one is malformed, more text may still change where it ends."""
    return Segment(Kind.CALL, text, calls, settled=all(call.error is None for call in calls))


def content_segment(text: str, *, settled: bool = True) -> Iterator[Segment]:
    """``text`` as content, or nothing when it is empty."""
    if text:
        yield Segment(Kind.CONTENT, text, settled=settled)


def _unfinished(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that may be the start of a marker."""
    lengths = range(min(len(text), max(map(len, markers), default=1) - 1), 0, -1)
    return next(
        (n for n in lengths if any(len(m) > n and m.startswith(text[-n:]) for m in markers)), 0
    )
