"""Whether a text is stuck in a loop: the same words, again and again.

Repeating is not a loop. A rule of dashes, an indent, a matrix of zeros, a table whose rows are
equal all repeat; a loop does it more often than anyone has a reason to, and fills the text.
"""

from __future__ import annotations

import re

_PIECE = re.compile(r"[^\W_]+|[^\w\s]|_+")
_EAST = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0eff]")
_FLOOD = re.compile(r"(\D)\1{400,}|(\d)\2{1200,}")
"""One character so often that no rule, indent or blank space is that long; nor a number."""
_RULE = re.compile(r"([-=_*#.~+\s|:─━═…·])(?: ?\1){3,}")
_LONG_WORD = 48
_GRAM = 4
_SHORTEST = 48
"""Pieces of the shortest loop."""
_LONG_PERIOD = 64
_TIMES, _TIMES_LONG = 10, 4
"""How often a block stands in a row in a loop; in one of blocks of more than ``_LONG_PERIOD``."""


def repetition(text: str) -> float:
    """The share of ``text`` that is a loop, 0 to 1.

    A block of words (letters, in scripts without spaces and in words of more than 48 letters) that
    stands at least 10 times in a row is a loop; a paragraph, more than 64 words, at least 4 times;
    one character more than 400 times, a digit more than 1,200 times.
    """
    if not text:
        return 0.0
    flooded = sum(len(found[0]) for found in _FLOOD.finditer(text))
    rest = _RULE.sub(r"\1\1\1", _FLOOD.sub(" ", text))
    pieces, sizes = _pieces(rest)
    looped = sum(size for size, is_in in zip(sizes, _loops(pieces), strict=True) if is_in)
    total = flooded + sum(sizes)
    return (flooded + looped) / total if total else 0.0


def _pieces(text: str) -> tuple[list[str], list[int]]:
    """Words, signs and, where there are no spaces between words, letters; and their lengths."""
    pieces: list[str] = []
    for found in _PIECE.finditer(text):
        word = found[0]
        is_wordless = _EAST.search(word) or (len(word) > _LONG_WORD and not word.isdigit())
        pieces += list(word) if is_wordless else [word]
    return pieces, [len(piece) for piece in pieces]


def _loops(pieces: list[str]) -> bytearray:
    """For every piece, whether it is in a stretch in which one block repeats. [len(pieces)]

    Where four pieces stood before, at some distance, the stretch at that distance is followed as
    far as it goes, both ways.
    """
    marks, last, reached = bytearray(len(pieces)), {}, {}
    for i in range(len(pieces) - _GRAM + 1):
        gram = tuple(pieces[i : i + _GRAM])
        period = i - last.get(gram, i)
        last[gram] = i
        if not period or reached.get(period, 0) > i:
            continue
        start, end = i, i + _GRAM
        while start > period and pieces[start - 1] == pieces[start - 1 - period]:
            start -= 1
        while end < len(pieces) and pieces[end] == pieces[end - period]:
            end += 1
        reached[period] = end
        first = start - period
        needed = _TIMES_LONG if period > _LONG_PERIOD else _TIMES
        if end - first >= max(_SHORTEST, needed * period):
            marks[first:end] = b"\1" * (end - first)
    return marks
