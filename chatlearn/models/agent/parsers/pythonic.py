"""``[f(x=1, y="a"), g()]``: Llama 4, and LFM2 between markers.

Read by a parser of its own, of literals only: ``ast.parse`` may overflow the C stack on long input.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from chatlearn.models.agent.parsers.json_calls import MAX_DEPTH, finite
from chatlearn.models.agent.parsers.parsed import ParsedCall
from chatlearn.models.agent.parsers.segments import (
    Segment,
    SegmentParser,
    call_segment,
    content_segment,
)

_OPEN = re.compile(r"<\|(?:python_start|tool_call_start)\|>")
_CLOSE = re.compile(r"\s*<\|(?:python_end|tool_call_end)\|>")
_STOP = re.compile(r"<\|(?:python_end|tool_call_end)\|>|(?=<\|(?:python|tool_call)_start\|>)|\Z")
_ATTEMPT = re.compile(r"\[\s*[A-Za-z_][\w.]*\(\s*(?:\)|[A-Za-z_]\w*\s*=)")
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')"""
    r"|(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z_][\w.]*)"
    r"|(?P<sign>[\[\](){},=:]))",
    re.DOTALL,
)
_ESCAPE = re.compile(
    r"\\(?:([abfnrtv0\\'\"\n])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))"
)
_ESCAPED = dict(zip("abfnrtv0\\'\"\n", "\a\b\f\n\r\t\v\0\\'\"", strict=False)) | {"\n": ""}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


class PythonicParser(SegmentParser):
    """A list of calls with named arguments, as the whole answer or between markers.

    Without markers, a list at the start that does not begin like a call is content.
    """

    markers = (
        *("<|python_start|>", "<|tool_call_start|>"),
        *("<|python_end|>", "<|tool_call_end|>"),  # may close a list that looks whole without
    )

    def body(self, text: str, tools: Sequence[dict[str, Any]] | None) -> Iterator[Segment]:
        first = _OPEN.search(text)
        at = first.start() if first else len(text)
        yield from _bare(text[:at])
        while opening := _OPEN.search(text, at):
            yield from content_segment(text[at : opening.start()])
            calls, end = _read(text, opening.end())
            at = _closed(text, opening.end(), end)
            yield call_segment(text[opening.start() : at], *calls)
        yield from content_segment(text[at:])

    def _call_prefix(self, name: str | None) -> str:
        return "[" if name is None else f"[{name}("


class Lfm2Parser(PythonicParser):
    """The same, with the forced prefix of LFM2."""

    def _call_prefix(self, name: str | None) -> str:
        return "<|tool_call_start|>[" + ("" if name is None else f"{name}(")


def _bare(text: str) -> Iterator[Segment]:
    start = len(text) - len(text.lstrip())
    if not text.startswith("[", start):
        yield from content_segment(text)
    elif _ATTEMPT.match(text, start):
        calls, end = _read(text, start)
        end = _STOP.search(text, start).end() if end is None else end
        yield call_segment(text[:end], *calls)
        yield from content_segment(text[end:])
    else:
        yield from content_segment(text, settled=False)


def _closed(text: str, start: int, end: int | None) -> int:
    """Where a marked list ends that was read to ``end``, or is malformed."""
    if end is None:
        return _STOP.search(text, start).end()
    close = _CLOSE.match(text, end)
    return close.end() if close else end


def _read(text: str, start: int) -> tuple[list[ParsedCall], int | None]:
    """The calls of the list at ``start`` and where it ends; None if it is malformed."""
    reader = _Reader(text, start)
    try:
        return reader.calls(), reader.at
    except ValueError as error:
        stop = _STOP.search(text, start).start()
        why = f"the tool calls are not a list of calls: {error}"
        return [ParsedCall(None, text[start:stop].strip(), why)], None


class _Reader:
    """Reads literals at ``at``. Methods raise ValueError."""

    def __init__(self, text: str, at: int) -> None:
        self.text = text
        self.at = at

    def calls(self) -> list[ParsedCall]:
        self._expect("[")
        calls = [self._call()]
        while self._next("],") == ",":
            calls.append(self._call())
        return calls

    def _call(self) -> ParsedCall:
        kind, name = self._token()
        if kind != "name":
            raise ValueError(f"a name was expected, not {name[:20]!r}")
        self._expect("(")
        arguments: dict[str, Any] = {}
        while not self._skip(")"):
            kind, key = self._token()
            if kind != "name":
                raise ValueError(f"{name}() needs its arguments named")
            self._expect("=")
            if key in arguments:
                raise ValueError(f"{name}() has {key!r} twice")
            arguments[key] = self._value(1)
            if self._next("),") == ")":
                break
        return ParsedCall(name, arguments)

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        kind, token = self._token()
        if kind == "string":
            return _unescaped(token[1:-1])
        if kind == "number":
            return int(token) if token.lstrip("+-").isdigit() else finite(token)
        if kind == "name" and token in _WORDS:
            return _WORDS[token]
        if token == "{":
            return self._dict(depth)
        if token in ("[", "("):
            return self._list("]" if token == "[" else ")", depth)
        raise ValueError(f"a literal was expected, not {token[:20]!r}")

    def _list(self, close: str, depth: int) -> list[Any]:
        values = []
        while not self._skip(close):
            values.append(self._value(depth + 1))
            if self._next(f"{close},") == close:
                break
        return values

    def _dict(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not self._skip("}"):
            key = self._value(depth + 1)
            if not isinstance(key, str):
                raise ValueError("a key is not a string")
            self._expect(":")
            values[key] = self._value(depth + 1)
            if self._next("},") == "}":
                break
        return values

    def _token(self) -> tuple[str, str]:
        found = _TOKEN.match(self.text, self.at)
        if found is None:
            raise ValueError("it ends early" if self._ended() else "it has an unknown sign")
        self.at = found.end()
        return found.lastgroup, found[found.lastgroup]

    def _ended(self) -> bool:
        return not self.text[self.at :].strip()

    def _skip(self, sign: str) -> bool:
        found = _TOKEN.match(self.text, self.at)
        if found is None or found["sign"] != sign:
            return False
        self.at = found.end()
        return True

    def _next(self, signs: str) -> str:
        _, token = self._token()
        if token not in tuple(signs):
            raise ValueError(f"one of {signs} was expected, not {token[:20]!r}")
        return token

    def _expect(self, sign: str) -> None:
        self._next(sign)


def _unescaped(text: str) -> str:
    def one(found: re.Match[str]) -> str:
        if found[1]:
            return _ESCAPED[found[1]]
        return chr(int(found[2] or found[3] or found[4], 16))

    text = _ESCAPE.sub(one, text)
    text.encode()  # half a surrogate pair is a ValueError
    return text
