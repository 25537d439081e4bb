"""Names of judges: the built-in ones, users' (``@judge``), and what other projects call ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatlearn.errors import ConfigError
from chatlearn.rewards.registry import describe, home, load_object, meant

logger = logging.getLogger(__name__)

BUILT_IN = {
    "math_answer": "chatlearn.rewards.judges:math_answer",
    "math_answer_and_llm": "chatlearn.rewards.judges:math_answer_and_llm",
}
"""Judges of this package by name; ``@judge`` adds users'."""

THEIRS = {
    "MathAnswerAsJudge": "math_answer",
    "MathAnswerAndLlmAsJudge": "math_answer_and_llm",
}
"""Names in modules ``math_answer_as_judge`` of AgentJet, astuner and ASTune, and ours."""

_registered: dict[str, Any] = {}


def judge(name: str) -> Callable[[Any], Any]:
    """Register a judge under a name, for ``load_judge`` and ``weighted``.

    Raises:
        ConfigError: the name is taken by another judge. The same one coming again, because its file
            is imported under a second name, replaces the first.
    """

    def register(found: Any) -> Any:
        known = _registered.get(name)
        if name in BUILT_IN or (known is not None and home(known) != home(found)):
            owner = BUILT_IN.get(name) or describe(known)
            raise ConfigError(f"two judges are named {name!r}: {owner} and {describe(found)}")
        _registered[name] = found
        return found

    return register


def find_judge(spec: str, where: str) -> Any:
    """What ``spec`` names: a registered judge, or ``file.py->Name``, ``pkg.mod->Name``.

    Raises:
        ConfigError: there is no such judge; says the nearest.
    """
    theirs = _ours_for(spec)
    if theirs is not None:
        logger.info("%s: %s is this package's judge %r", where, spec, theirs)
        spec = theirs
    if spec in _registered:
        return _registered[spec]
    if spec in BUILT_IN:
        return load_object(BUILT_IN[spec], where)
    if "->" not in spec and ":" not in spec:
        known = [*BUILT_IN, *_registered]
        raise ConfigError(
            f"{where}: there is no judge {spec!r}{meant(spec, known)}; known are "
            f"{', '.join(known)}; yours is named by 'path/file.py->Name' or 'pkg.mod->Name'"
        )
    return load_object(":".join(part.strip() for part in spec.rsplit("->", 1)), where)


def _ours_for(spec: str) -> str | None:
    """Our judge for one of ``THEIRS``, unless the module is the user's own file."""
    module, arrow, name = spec.rpartition("->") if "->" in spec else spec.rpartition(":")
    module = module.strip()
    if not arrow or module.rpartition(".")[2] != "math_answer_as_judge":
        return None
    if Path(*module.split(".")).with_suffix(".py").is_file():
        return None
    return THEIRS.get(name.strip())
