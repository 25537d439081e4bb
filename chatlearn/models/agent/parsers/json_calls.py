"""Strict JSON out of a longer text, and the ``{"name", "arguments"}`` objects most formats use."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from chatlearn.models.agent.parsers.parsed import ParsedCall

MAX_DEPTH = 64
"""Nesting of arguments; deeper ones would only make a later ``json.dumps`` fail."""
_WINDOW = 256
_NOT_ARGUMENTS = {"name", "id", "type"}


def finite(number: str) -> float:
    """The float a text stands for; one that is too large is a ValueError."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"the number {number[:20]} is too large")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_float=finite, parse_constant=_refuse)


def skip_space(text: str, at: int) -> int:
    """The place of the first character from ``at`` on that is not whitespace."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def load_json(text: str) -> Any:
    """The value of a JSON text; NaN, Infinity, half characters and deep nesting are refused.

    Raises:
        ValueError: ``text`` is not such a JSON text; the message says why.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check(value, text)
    return value


def read_object(text: str, start: int) -> tuple[dict[str, Any], int]:
    """The JSON object that begins at ``start`` or after whitespace there, and where it ends.

    The text is looked at through a growing window: an error costs what was read, not what follows
    (``JSONDecodeError`` counts the lines of all it was given).

    Raises:
        ValueError: there is no such object; the message says why.
    """
    start = skip_space(text, start)
    if not text.startswith("{", start):
        raise ValueError("a JSON object was expected")
    size = _WINDOW
    while True:
        window = text[start : start + size]
        try:
            value, length = _DECODER.raw_decode(window)
        except json.JSONDecodeError as error:
            at_end = error.msg.startswith("Unterminated") or error.pos >= len(window) - 16
            if not at_end or start + size >= len(text):
                raise
            size *= 4
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        else:
            _check(value, window[:length])
            return value, start + length


def _check(value: Any, source: str) -> None:
    if source.count("[") + source.count("{") > MAX_DEPTH:
        level = [value]
        for _ in range(MAX_DEPTH):
            level = [inner for outer in level for inner in _children(outer)]
        if level:
            raise ValueError("it is nested too deeply")
    if "\\u" in source:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half of a surrogate pair") from None


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def call_of(value: dict[str, Any], text: str) -> ParsedCall:
    """The call that a decoded object stands for; ``text`` is the object as written."""
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return ParsedCall(None, text, 'the tool call has no "name"')
    keys = value.keys() - _NOT_ARGUMENTS
    if len(keys) > 1 or not keys <= {"arguments", "parameters"}:
        listed = ", ".join(sorted(keys))
        return ParsedCall(
            name, text, f'the tool call should have "name" and "arguments"; it also has {listed}'
        )
    return call_with(name, value[keys.pop()] if keys else {}, text)


def call_with(name: str, arguments: Any, text: str) -> ParsedCall:
    """A call of ``name``; arguments may be an object or the JSON text of one."""
    if isinstance(arguments, str):
        try:
            arguments = load_json(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        return ParsedCall(name, text, 'the "arguments" are not a JSON object')
    return ParsedCall(name, arguments)


def not_json(error: ValueError) -> str:
    """What is wrong with a call whose JSON cannot be read."""
    return f"the tool call is not JSON: {error}"
