"""Keys of a two-file project (AgentJet, astuner, ASTune): what one is, and what becomes of it.

``keys_table.KEYS`` has every known key of the three generations. Each acts, is accepted and
answered for ("has no meaning here, because"), or is refused with the remedy; docs/projects.md is
made of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from chatlearn.config.load import shown

Fate = Literal["acts", "said", "only", "refused"]
"""``acts``: becomes settings of ours. ``said``: accepted, and the output says why it means nothing.
``only``: the value that is how things are here anyway; any other is refused. ``refused``: never."""

Put = Callable[[Any], Mapping[str, Any]]
"""A value to what it sets: keys of ours (dotted), or words of the project (no dot)."""


class BadValue(ValueError):
    """A value that cannot be converted; the text says what it must be."""


@dataclass(frozen=True, slots=True)
class Key:
    """One known key, or all below one (``trinity.explorer.*``)."""

    name: str
    """Below the root: ``rollout.num_repeat``; in another root its whole name: ``trinity.…``."""
    fate: Fate
    ours: str = ""
    """What it becomes, for readers: our key, or a formula of ours."""
    note: str = ""
    """Why, or what to do instead; one sentence."""
    put: Put | None = None
    value: Any = None
    """The one value that is accepted, where ``fate`` is ``only``."""

    def matches(self, name: str) -> bool:
        return name == self.name or (self.name.endswith("*") and fnmatchcase(name, self.name))

    def read(self, value: Any) -> Mapping[str, Any]:
        """What ``value`` sets.

        Raises:
            BadValue: it is refused; the message goes on after ``key = value:``.
        """
        if self.fate == "refused" or (self.fate == "only" and value != self.value):
            raise BadValue(f"is refused: {self.note}")
        return self.put(value) if self.put is not None else {}


def acts(name: str, ours: str, note: str = "", *, put: Put | None = None) -> Key:
    """A key that becomes ``ours``: as it is, unless ``put`` says otherwise."""
    return Key(name, "acts", ours, note, put or (lambda value: {ours: value}))


def said(name: str, note: str) -> Key:
    return Key(name, "said", note=note)


def only(name: str, value: Any, note: str) -> Key:
    return Key(name, "only", note=note, value=value)


def refused(name: str, note: str) -> Key:
    return Key(name, "refused", note=note)


def word(name: str, kind: Callable[[Any], Any]) -> Put:
    """Sets the word ``name`` of the project to ``kind(value)``."""
    return lambda value: {name: kind(value)}


def below(name: str, kind: Callable[[Any], Any]) -> Callable[[str], Put]:
    """Sets an entry of the word ``name``, which is a mapping: ``below("reader", text)("type")``."""
    return lambda entry: lambda value: {name: {entry: kind(value)}}


def whole(value: Any) -> int:
    """A number of things."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadValue("must be a whole number above 0")
    return value


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadValue("must be a number")
    return float(value)


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadValue("must be text")
    return value.strip()


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadValue("must be true or false")
    return value


def names(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadValue("must be a list of names: [one, two]")
    return value


def find(name: str, table: Iterable[Key]) -> Key | None:
    """The key called ``name``: itself, else the one that has all below it."""
    return next((key for key in table if key.matches(name)), None)


def nearest(name: str, table: Iterable[Key]) -> str | None:
    """The known key that ``name`` is most likely meant to be: a slip among its siblings, else the
    same leaf in another section."""
    known = [key.name for key in table if not key.name.endswith("*")]
    section, _, leaf = name.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    for slip in difflib.get_close_matches(leaf, siblings, 1, 0.7):
        return siblings[slip]
    leaves = {k.rpartition(".")[2] for k in known}
    for same in difflib.get_close_matches(leaf, leaves, 1, 0.8):
        elsewhere = [k for k in known if k.rpartition(".")[2] == same]
        return difflib.get_close_matches(name, elsewhere, 1, 0.0)[0]
    return None


def problem(key: str, value: Any, why: str) -> str:
    """One line of a refusal."""
    return f"{key} = {shown(value)}: {why}"
