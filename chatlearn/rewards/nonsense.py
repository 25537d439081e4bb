"""Whether a text is garbage: characters nobody writes, broken encodings, scripts thrown together.

Made to stay silent on everything that people and good models write: mathematics, every language,
lists of translations, tables, code, emoji, terminal colours, base64, long numbers. So nothing is
measured by being unusual: a character, an encoding, a mixture or a distribution must be broken.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

_TERMINAL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
"""Colours and titles of a terminal, as tools print them."""
_EMOJI = range(0x1F000, 0x1FB00)
_IDEOGRAPHS = range(0x20000, 0x40000)
"""Characters added to these blocks after Python's tables were made are not unassigned."""
_LETTERS = re.compile(r"[^\W\d_]+(?:[^\W\d_]|[\u0300-\u036f])*")
_BAD_AT_LEAST = 8
_BAD_SHARE = 0.004
_SHORTEST_SOUP = 16
_CP1252 = {
    chr_: byte
    for byte in range(0x80, 0x100)
    for chr_ in {
        bytes([byte]).decode("latin-1"),
        bytes([byte]).decode("cp1252", "ignore") or chr(byte),
    }
}
"""Characters that one byte became when UTF-8 was read as Latin-1 or Windows-1252."""
_OLD_BYTES = re.compile(f"[{re.escape(''.join(_CP1252))}]+")
_SCRIPTS = (
    (0x0041, 0x024F, "latin"),
    (0x0250, 0x02AF, "latin"),
    (0x0370, 0x03FF, "greek"),
    (0x0400, 0x052F, "cyrillic"),
    (0x0530, 0x058F, "armenian"),
    (0x0590, 0x05FF, "hebrew"),
    (0x0600, 0x077F, "arabic"),
    (0x0900, 0x0DFF, "indic"),
    (0x0E00, 0x0EFF, "thai"),
    (0x0F00, 0x0FFF, "tibetan"),
    (0x1000, 0x109F, "myanmar"),
    (0x10A0, 0x10FF, "georgian"),
    (0x1100, 0x11FF, "east"),
    (0x1200, 0x139F, "ethiopic"),
    (0x1780, 0x17FF, "khmer"),
    (0x1E00, 0x1EFF, "latin"),
    (0x1F00, 0x1FFF, "greek"),
    (0x3040, 0x30FF, "east"),
    (0x3100, 0x31FF, "east"),
    (0x3400, 0x9FFF, "east"),
    (0xAC00, 0xD7AF, "east"),
    (0xF900, 0xFAFF, "east"),
    (0xFB50, 0xFEFF, "arabic"),
    (0x20000, 0x3FFFF, "east"),
)
_SPACELESS = frozenset({"east", "thai", "tibetan", "myanmar", "khmer"})
"""Scripts without spaces: a foreign name stands inside them, 使用Python."""
_SOUP_OF = 4
"""Scripts besides Latin and Greek in a soup; a lesson in a language has one or two."""


def nonsense(text: str, logprobs: Sequence[float] = ()) -> float:
    """How much of ``text`` is garbage, 0 to 1: the worst of four signs.

    - Characters nobody writes: U+FFFD, unassigned, private-use and control characters.
    - Mojibake: UTF-8 that was read in another encoding (``Ã©``).
    - Scripts thrown together: Cyrillic and Thai in one word, or changing from word to word.
    - Implausible tokens: ``logprobs`` of the sampled tokens [C] so low on average (-6 gives 0.5)
      that they were drawn nearly at random.

    Of the first three, 8 occurrences are 1, or 4 for every 1,000 characters of a long text.
    """
    plain = _TERMINAL.sub("", text)
    # A token limit may cut a character in two.
    plain = plain.rstrip("\ufffd") if len(plain) - len(plain.rstrip("\ufffd")) <= 3 else plain
    enough = max(_BAD_AT_LEAST, _BAD_SHARE * len(plain))
    found = max(_bad_characters(plain), _mojibake(plain), _mixtures(plain))
    return max(min(1.0, found / enough), _implausible(logprobs))


def _bad_characters(text: str) -> int:
    if text.isascii() and text.isprintable():
        return 0
    return sum(_is_bad(char) for char in text)


def _is_bad(char: str) -> bool:
    if char == "\ufffd":
        return True
    code, kind = ord(char), unicodedata.category(char)
    if kind == "Cc":
        return char not in "\t\n\r\f\v\x85"
    if kind == "Cn":
        return code not in _EMOJI and code not in _IDEOGRAPHS
    return kind in ("Co", "Cs")


def _mojibake(text: str) -> int:
    """Characters that come back when the old bytes of a run of them are read as UTF-8."""
    if text.isascii():
        return 0
    return sum(_came_back(bytes(_CP1252[char] for char in run)) for run in _OLD_BYTES.findall(text))


def _came_back(raw: bytes) -> int:
    try:
        read = raw.decode("utf-8")
    except UnicodeDecodeError:
        return 0
    return 0 if any(map(_is_accident, read)) else len(read)


def _is_accident(char: str) -> bool:
    """Whether nobody's text held ``char``, so that its bytes are what was written: ``×¼``, ``ß“``,
    and ``é»`` with a French space between."""
    kind, code = unicodedata.category(char), ord(char)
    if code < 0x100:
        return kind == "Cc"
    return code == 0x983B or 0x700 <= code < 0x900 or (code < 0x800 and kind[0] != "L")


def _mixtures(text: str) -> float:
    """Words of scripts that do not mix; in a soup also changes from one word to the next."""
    if text.isascii():
        return 0
    mixed, changes, known, before, end = 0, 0, set(), "", 0
    for word in _LETTERS.finditer(text):
        scripts = _scripts(word[0])
        foreign = set(scripts) - {"latin", "greek"}
        known |= foreign
        switches = len(scripts) - 1
        mixed += len(foreign) > 1 or (switches > 1 and bool(foreign - _SPACELESS))
        if before and scripts and before != scripts[0]:
            changes += text[end : word.start()].strip(" ") == ""
        before, end = scripts[-1] if scripts else "", word.end()
    return mixed + (changes / 4 if len(known) >= _SOUP_OF else 0)


def _scripts(word: str) -> list[str]:
    """Scripts of a word's letters in order, each as often as the script changes."""
    found = [(char, _script(char)) for char in word]
    if any(name == "cyrillic" for _, name in found):
        # Chechen has Latin I or l for palochka, Chuvash Latin ă; who types them has no other key.
        found = [
            (c, name) for c, name in found if name != "latin" or (c.isascii() and c not in "Il")
        ]
    return [name for name, _ in groupby(name for _, name in found if name)]


def _script(char: str) -> str:
    """Script of a letter; '' of marks, mathematical letters and rarer scripts."""
    code = ord(char)
    if char == "µ" or unicodedata.category(char) == "Lm":
        return ""
    return next((name for first, last, name in _SCRIPTS if first <= code <= last), "")


def _implausible(logprobs: Sequence[float]) -> float:
    if len(logprobs) < _SHORTEST_SOUP:
        return 0.0
    return min(1.0, max(0.0, (-fmean(logprobs) - 4.0) / 4.0))
