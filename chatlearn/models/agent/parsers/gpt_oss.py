"""Harmony, the format of gpt-oss: messages on channels, calls addressed to ``functions.f``.

Source: https://github.com/openai/harmony (docs/format.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from chatlearn.models.agent.parsers.json_calls import not_json, read_object, skip_space
from chatlearn.models.agent.parsers.parsed import ParsedCall
from chatlearn.models.agent.parsers.segments import (
    Kind,
    Segment,
    SegmentParser,
    call_segment,
    content_segment,
)

_BEGIN = re.compile(r"<\|(?:start|channel)\|>")
_FIRST = re.compile(r"\s*to=[^\s<]+\s*<\|channel\|>")
_MAYBE_FIRST = re.compile(r"\s*(?:t|to|to=[^\s<]*\s*(?:<[|a-z]*)?)?")
_HEADER_END = re.compile(r"<\|(?:message|end|return|call)\|>|(?=<\|start\|>)|\Z")
_BODY_END = re.compile(r"<\|(?:end|return|call)\|>|(?=<\|start\|>)|\Z")
_TO = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class GptOssParser(SegmentParser):
    """A completion follows ``<|start|>assistant``; its last end marker was the end of the turn.

    A message with a recipient is a call (its body is the arguments), one on the channel
    ``analysis`` is reasoning, other messages of the assistant are content, each on its own line.
    Text without a header, and messages of other roles, are content as written.
    """

    markers = ("<|start|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>")
    think_opens = ()
    think_closes = ()
    joint = "\n"

    def body(self, text: str, tools: Sequence[dict[str, Any]] | None) -> Iterator[Segment]:
        at = 0
        if not _FIRST.match(text):
            at = _next_begin(text, 0)
            settled = at < len(text) or not _MAYBE_FIRST.fullmatch(text)
            yield from content_segment(text[:at], settled=settled)
        while at < len(text):
            header = _HEADER_END.search(text, at + 1)
            if header[0] == "<|message|>":
                end = _BODY_END.search(text, header.end())
                yield from _message(text, at, header.end(), end.start(), end.end())
            else:
                end = header
                yield from _headless(text[at : end.end()])
            at = _next_begin(text, end.end())
            yield from content_segment(text[end.end() : at])

    def _call_prefix(self, name: str | None) -> str:
        start = "<|channel|>commentary to=functions."
        return start if name is None else f"{start}{name} <|constrain|>json<|message|>"


def _next_begin(text: str, at: int) -> int:
    found = _BEGIN.search(text, at)
    return len(text) if found is None else found.start()


def _message(text: str, at: int, body: int, end: int, after: int) -> Iterator[Segment]:
    """The segments of the message whose header, body and end marker end at the last three."""
    header = text[at:body]
    if header.startswith("<|start|>") and not header.startswith("<|start|>assistant"):
        yield from content_segment(text[at:after])
        return
    to, channel = _TO.search(header), _CHANNEL.search(header)
    if to is not None:
        yield call_segment(text[at:after], _call(to[1], text[body:end]))
    elif channel is None or channel[1] not in ("analysis", "commentary", "final"):
        yield from content_segment(text[at:after])
    else:
        kind = Kind.REASONING if channel[1] == "analysis" else Kind.CONTENT
        yield Segment(Kind.MARKUP, header)
        if body < end:
            yield Segment(kind, text[body:end])
        if end < after:
            yield Segment(Kind.MARKUP, text[end:after])


def _headless(text: str) -> Iterator[Segment]:
    """A header that was cut, or never came to its message."""
    if to := _TO.search(text):
        why = "the header of the tool call is cut"
        yield call_segment(text, ParsedCall(to[1], text.strip(), why))
    else:
        yield from content_segment(text, settled=False)


def _call(name: str, body: str) -> ParsedCall:
    try:
        arguments, end = read_object(body, 0)
        if skip_space(body, end) < len(body):
            raise ValueError("there is text after the object")
    except ValueError as error:
        return ParsedCall(name, body.strip(), not_json(error))
    return ParsedCall(name, arguments)
