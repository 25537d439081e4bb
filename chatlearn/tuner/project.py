"""A two-file project: the YAML of an AgentJet, astuner or ASTune project, read key by key.

Nothing of ours is loaded here and no row is read: ``read_project`` says what the file asks for, and
every key that cannot be had, all at once. ``project_settings`` makes our configuration of it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from chatlearn.config.load import shown
from chatlearn.config.yaml_file import parse_yaml, read_yaml
from chatlearn.errors import ConfigError
from chatlearn.tuner.keys import BadValue, Key, find, nearest, problem
from chatlearn.tuner.keys_table import KEYS, OTHER_ROOTS, OWN_ROOT, PASSIVE_ROOTS, ROOTS

_REFERENCE = re.compile(r"\$\{\s*([^{}]+?)\s*\}")
_ENVIRONMENT = ("oc.env:", "env:")


@dataclass(frozen=True, slots=True)
class Words:
    """What a project asks for that is not one key of ours."""

    experiment: str = "read_yaml_name"
    workflow: str | None = None
    judge: str | None = None
    reader: Mapping[str, str] = field(default_factory=dict)
    """``type``, and under short names what the blocks of ``task_reader`` say."""
    fields: Mapping[str, str] | None = None
    tasks_per_batch: int | None = None
    epochs: int | None = None
    steps: int = 1
    """Optimizer steps of a batch."""
    engines: int | None = None
    parallel: int = 1
    """GPUs of one engine."""
    nodes: int = 1
    gpus: int = 8
    """GPUs of one machine."""
    checks: Sequence[str] = ()
    check_reward: float | None = None
    check_ends: bool = False
    eval_repeat: int | None = None
    uses_kl: bool | None = None
    kl_coef: float | None = None
    kl_estimator: str | None = None
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_target_modules: Any = None
    debug_tasks: int = 2
    debug_parallel: int = 1


@dataclass(frozen=True, slots=True)
class Project:
    """What one YAML says."""

    path: Path
    root: str
    """``ajet``, ``astuner`` or ``astune``."""
    settings: Mapping[str, Any]
    """Keys of ours that one of theirs gives."""
    origin: Mapping[str, str]
    """Which key of theirs gave a key of ours, or a word."""
    words: Words
    own: Mapping[str, Any]
    """The section ``chatlearn:``, dotted."""
    said: tuple[str, ...]
    """What was accepted and means nothing, and why."""

    @property
    def folder(self) -> Path:
        return self.path.parent


def read_project(path: str | Path, overrides: Sequence[str] = ()) -> Project:
    """Read the YAML of a project.

    Args:
        path: the file.
        overrides: ``ajet.rollout.num_repeat=2``: keys of theirs, which replace the file's.

    Raises:
        ConfigError: no such file, no project, or a line for each key that is unknown or refused.
    """
    path = Path(path)
    tree = read_yaml(path)
    root = _root(path, tree)
    given = dict(_flatten(tree, root))
    for override in overrides:
        key, _, value = override.partition("=")
        given[_below(key.strip(), root)] = parse_yaml(value, override)
    problems: list[str] = [
        problem(name, tree[name], _unknown_root(name))
        for name in tree
        if name not in (*ROOTS, *OTHER_ROOTS, *PASSIVE_ROOTS, OWN_ROOT)
    ]
    said = [f"{name}: {why}" for name, why in PASSIVE_ROOTS.items() if name in tree]
    reading = _Reading(root, given, problems, said)
    for name in given:
        if not _is_refused_whole(name):
            reading.take(name)
    problems += _refused_sections(given)
    own = _own(tree, problems)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{path}: {count}\n" + "\n".join(f"  {p}" for p in problems))
    words = {k: v for k, v in reading.found.items() if "." not in k}
    return Project(
        path=path.resolve(),
        root=root,
        settings={k: v for k, v in reading.found.items() if "." in k},
        origin=reading.origin,
        words=Words(**words),
        own=own,
        said=tuple(said),
    )


def _is_refused_whole(name: str) -> bool:
    section = find(f"{name.partition('.')[0]}.", KEYS)
    return section is not None and section.fate == "refused"


def _refused_sections(given: Mapping[str, Any]) -> Iterator[str]:
    """One line for each section that is refused with all its keys."""
    counts = Counter(name.partition(".")[0] for name in given if _is_refused_whole(name))
    for section, count in counts.items():
        key = find(f"{section}.", KEYS)
        assert key is not None
        yield f"{section}, with {count} keys: is refused: {key.note}"


def is_theirs(override: str) -> bool:
    """Whether ``key=value`` is about a key of theirs."""
    return override.partition(".")[0].strip() in (*ROOTS, *OTHER_ROOTS)


class _Reading:
    """The file's keys one by one; what they set, and whose it is."""

    def __init__(
        self, root: str, given: Mapping[str, Any], problems: list[str], said: list[str]
    ) -> None:
        self.found: dict[str, Any] = {}
        self.origin: dict[str, str] = {}
        self._root, self._given, self._problems, self._said = root, given, problems, said

    def take(self, name: str) -> None:
        full, key = _full(self._root, name), find(name, KEYS)
        value = self._given[name]
        try:
            value = _resolved(value, self._given, self._root)
            if key is None:
                raise BadValue(_unknown(name, self._root))
            sets = key.read(value)
        except BadValue as error:
            self._problems.append(problem(full, value, str(error)))
            return
        if key.fate == "said":
            self._said.append(f"{full} = {shown(value)}: {key.note}")
        for target, item in sets.items():
            self._set(full, key, target, item)

    def _set(self, full: str, key: Key, target: str, item: Any) -> None:
        if isinstance(item, Mapping) and target == "reader":
            self.found["reader"] = {**self.found.get("reader", {}), **item}
            self.origin.setdefault("reader", full)
            return
        before = self.origin.get(target)
        if before is not None and self.found[target] != item:
            passes = [name.partition(".")[0] in OTHER_ROOTS for name in (before, full)]
            if passes == [True, True] or passes == [False, False]:
                self._problems.append(
                    f"{full} = {shown(item)}: {before} = {shown(self.found[target])} says "
                    f"otherwise, and both are {key.ours}; keep one"
                )
                return
            loser, winner = (before, full) if passes[0] else (full, before)
            self._said.append(f"{loser}: {winner} is the same thing here, and wins")
            if winner == before:
                return
        self.found[target], self.origin[target] = item, full


def _root(path: Path, tree: Mapping[str, Any]) -> str:
    present = [name for name in ROOTS if name in tree]
    if len(present) == 1:
        if not isinstance(tree[present[0]], Mapping):
            raise ConfigError(f"{path}: {present[0]} must be a section (key: value)")
        return present[0]
    if present:
        raise ConfigError(
            f"{path} has the roots {' and '.join(present)}, which are names of one thing; keep one"
        )
    if "runtime_args" in tree or "models" in tree:
        raise ConfigError(
            f"{path} is a configuration of chatlearn's own: run it with "
            f"chatlearn grpo --config-file {path}"
        )
    near = next((n for name in tree for n in get_close_matches(str(name), ROOTS, 1, 0.6)), None)
    raise ConfigError(
        f"{path} has none of the roots {', '.join(f'{name}:' for name in ROOTS)} (it has "
        f"{', '.join(str(name) for name in tree) or 'nothing'})"
        + (f"; did you mean {near}:?" if near else "; a two-file project has one of them")
    )


def _flatten(tree: Mapping[str, Any], root: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys: below the root, and whole in other roots."""
    for name in (root, *OTHER_ROOTS):
        prefix = "" if name == root else f"{name}."
        section = tree.get(name)
        if section is not None and not isinstance(section, Mapping):
            yield name, section
        elif section:
            yield from _leaves(section, prefix)


def _leaves(section: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        key = f"{prefix}{name}"
        is_leaf = any(known.name == key for known in KEYS)
        if isinstance(value, Mapping) and not is_leaf:
            yield from _leaves(value, f"{key}.")
        elif value is not None:  # as if it were left out
            yield key, value


def _resolved(value: Any, given: Mapping[str, Any], root: str, trail: tuple[str, ...] = ()) -> Any:
    """``value`` with ``${ajet.model.path}`` and ``${oc.env:NAME}`` replaced."""
    if isinstance(value, list):
        return [_resolved(item, given, root, trail) for item in value]
    if not isinstance(value, str):
        return value

    def one(name: str) -> Any:
        for prefix in _ENVIRONMENT:
            if name.startswith(prefix):
                variable, comma, default = name.removeprefix(prefix).partition(",")
                if variable not in os.environ and not comma:
                    raise BadValue(f"the environment variable {variable} is not set")
                return os.environ.get(variable, default)
        key = _below(name, root)
        if key not in given or key in trail:
            why = "refers to itself" if key in trail else "which is not set"
            raise BadValue(f"refers to ${{{name}}}, {why}; write the value")
        return _resolved(given[key], given, root, (*trail, key))

    whole = _REFERENCE.fullmatch(value)
    return one(whole[1]) if whole else _REFERENCE.sub(lambda m: str(one(m[1])), value)


def _own(tree: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    section = tree.get(OWN_ROOT)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        problems.append(f"{OWN_ROOT}: must be a section with runtime_args and models")
        return {}
    return {str(name): value for name, value in section.items() if value is not None}


def _below(key: str, root: str) -> str:
    """``ajet.model.path`` is ``model.path``; a key of another root is itself."""
    first, _, rest = key.partition(".")
    if first in ROOTS and first != root:
        raise ConfigError(f"{key}: the project's root is {root}; write {root}.{rest}")
    return rest if first == root else key


def _full(root: str, name: str) -> str:
    return name if name.partition(".")[0] in OTHER_ROOTS else f"{root}.{name}"


def _unknown(name: str, root: str) -> str:
    near = nearest(name, KEYS)
    if near:
        return f"unknown key; did you mean `{_full(root, near)}`?"
    return "unknown key; docs/projects.md lists them, and ours stand in a section chatlearn:"


def _unknown_root(name: str) -> str:
    near = get_close_matches(str(name), (*ROOTS, *OTHER_ROOTS, *PASSIVE_ROOTS, OWN_ROOT), 1, 0.6)
    return (
        f"unknown section; did you mean `{near[0]}`?"
        if near
        else (
            "unknown section; a project has one of ajet, astuner and astune, and may have "
            "chatlearn and trinity. What your workflow reads itself belongs in a file of its own"
        )
    )
