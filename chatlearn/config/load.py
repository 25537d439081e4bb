"""Defaults < YAML file < ``a.b=value``, then ``${a.b}``; every problem is reported at once.

Settings travel through this file as one flat dict, dotted key to value, so that a key means the
same wherever it comes from.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from chatlearn.config.not_here import reason_not_here
from chatlearn.config.schema import GrpoConfig, keys, sections
from chatlearn.config.yaml_file import dump_yaml, parse_yaml, read_yaml
from chatlearn.errors import ConfigError

_REFERENCE = re.compile(r"\$\{\s*([^{}]*?)\s*\}")
_STAND_IN = "?"
"""Takes the place of a missing text so that the rules about other keys can still be asked."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> GrpoConfig:
    """The configuration of a run.

    Args:
        path: YAML file, or None for the defaults alone.
        overrides: ``a.b=value`` each, the value spelled as YAML; a later one wins.

    Raises:
        ConfigError: one line for each problem: the key, its value, and what to do.
    """
    settings: dict[str, Any] = {}
    problems: list[str] = []
    spoiled: set[str] = set()
    if path is not None:
        for key, value in _flatten(read_yaml(path)):
            if key in settings:
                problems.append(f"{key}: is written twice in {path}; keep one")
            settings[key] = value
    for override in overrides:
        try:
            settings.update(_parse_override(override))
        except ConfigError as error:
            problems.append(str(error))
            spoiled.add(override.partition("=")[0].strip())

    known = keys()
    for key in [key for key in settings if key not in known]:
        problems.append(f"{key} = {shown(settings.pop(key))}: {_unknown(key)}")
    settings, unresolved = _resolve(settings, known)
    problems += unresolved.values()
    config, refused = _validate(settings, known, spoiled | set(unresolved))
    problems += refused
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{path or 'the configuration'}: {count}\n{listed}")
    assert config is not None  # a tree that was refused left a line
    return config


def dump_config(config: GrpoConfig) -> str:
    """The resolved configuration as YAML; ``load_config`` reads it back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a nested mapping. An empty section (all its keys commented out) has none."""
    nodes, known = {name for name, _ in sections()}, keys()
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known and (value or key in nodes):
            yield from _flatten(value, f"{key}.")
        elif not (value is None and key in nodes):
            yield key, value


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(f"{override}: has no '='; write key=value, as in runtime_args.seed=1")
    if not key:
        raise ConfigError(f"{override}: names no key before '='; write key=value")
    if not text.strip():
        raise ConfigError(f"{override}: has no value; write {key}=null or {key}='\"\"' for nothing")
    value = parse_yaml(text, override)
    return dict(_flatten({key: value}))


def _resolve(
    settings: dict[str, Any], known: Mapping[str, FieldInfo]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Replace ``${a.b}`` in every value. Returns what resolved, and the problem of each that did
    not, by key."""
    done: dict[str, Any] = {}
    problems: dict[str, str] = {}

    def value_of(key: str, trail: tuple[str, ...]) -> Any:
        if key in trail:
            raise ConfigError(f"refers to itself: {' -> '.join([*trail, key])}; break the circle")
        if key not in known:
            raise ConfigError(f"refers to ${{{key}}}: {_unknown(key)}")
        if key not in settings:
            if known[key].is_required():
                raise ConfigError(f"refers to ${{{key}}}, which is not set; set it")
            return known[key].get_default()
        if key not in done:
            done[key] = fill(settings[key], (*trail, key))
        return done[key]

    def fill(value: Any, trail: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [fill(item, trail) for item in value]
        if not isinstance(value, str):
            return value
        whole = _REFERENCE.fullmatch(value)
        if whole:
            return value_of(whole[1], trail)
        return _REFERENCE.sub(lambda found: embedded(found[1], trail), value)

    def embedded(key: str, trail: tuple[str, ...]) -> str:
        value = value_of(key, trail)
        if value is None or isinstance(value, list | tuple):
            raise ConfigError(f"refers to ${{{key}}}, which is {shown(value)} and not text")
        return value if isinstance(value, str) else shown(value)

    for key in settings:
        try:
            value_of(key, ())
        except ConfigError as error:
            problems[key] = f"{key} = {shown(settings[key])}: {error}"
    return done, problems


def _validate(
    settings: dict[str, Any], known: Mapping[str, FieldInfo], spoiled: set[str]
) -> tuple[GrpoConfig | None, list[str]]:
    """The tree, and a line for each problem. Problems of ``spoiled`` keys were already told."""
    lines = []
    for key, field in known.items():
        if field.is_required() and key not in settings:
            if key not in spoiled:
                lines.append(f"{key}: is not set; add {key}=… ({_first_sentence(field)})")
            spoiled = spoiled | {key}
            settings = settings | {key: _STAND_IN}
    try:
        return GrpoConfig.model_validate(_nest(settings)), lines
    except ValidationError as error:
        errors = error.errors()
    if errors[0]["type"] == "conflicts":
        found = errors[0]["ctx"]["conflicts"]
        return None, lines + [c.message for c in found if not spoiled.intersection(c.keys)]

    refused: dict[str, str] = {}
    for error in errors:
        key = _key_at(error["loc"], known)
        value = settings.get(key)
        refused.setdefault(key, f"{key} = {shown(value)}: {_reason(error, key)}")
    # Ask the rules about the remaining keys as well, so that nobody meets them one run later.
    rest = {key: value for key, value in settings.items() if key not in refused}
    return None, [*lines, *refused.values(), *_validate(rest, known, spoiled | set(refused))[1]]


def _nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, _ in sections():
        _node(tree, name)
    for key, value in settings.items():
        prefix, leaf = _split(key)
        _node(tree, prefix)[leaf] = value
    return tree


def _node(tree: dict[str, Any], name: str) -> dict[str, Any]:
    for part in name.split(".") if name else ():
        tree = tree.setdefault(part, {})
    return tree


def _key_at(location: Sequence[int | str], known: Mapping[str, FieldInfo]) -> str:
    """The key of a pydantic location, which may go on into a list."""
    key = ""
    for part in location:
        key = f"{key}.{part}".lstrip(".")
        if key in known:
            break
    return key


def _reason(error: Mapping[str, Any], key: str) -> str:
    given = error["input"]
    inner = ".".join(str(part) for part in error["loc"])[len(key) + 1 :]
    if error["type"] == "extra_forbidden":
        return f"{inner}: there is no such key; docs/config.md lists them"
    if given is None:
        return f"must not be null; leave {key} out for its default"
    if error["type"] in ("int_type", "float_type", "bool_type") and isinstance(given, str):
        kind = {"int_type": "a whole number", "float_type": "a number"}.get(error["type"])
        return f"must be {kind or 'true or false'}, without quotes"
    return {
        "int_type": "must be a whole number",
        "float_type": "must be a number",
        "bool_type": "must be true or false",
        "string_type": f"must be text; put it in quotes: {key}='\"…\"'",
        "tuple_type": f"must be a list: {key}='[one, two]'",
    }.get(error["type"], error["msg"].replace("Input should be", "must be"))


def _unknown(key: str) -> str:
    """Why ``key`` is not in the schema, and what was probably meant."""
    why = reason_not_here(key)
    if why:
        return f"not a key here: {why}"
    known, nodes = keys(), dict(sections())
    if key in nodes:
        first = next(iter(nodes[key].model_fields))
        return f"is a section, not a value; set its keys, as in {key}.{first}=…"
    above = next((name for name in known if key.startswith(f"{name}.")), None)
    if above:
        return f"unknown key; {above} holds one value, with no keys below it"
    near = _nearest(key, known)
    if near:
        return f"unknown key; did you mean `{near}`?"
    section = key.rpartition(".")[0]
    if section in nodes:
        return f"unknown key; {section or 'the top'} holds {', '.join(nodes[section].model_fields)}"
    return "unknown key; docs/config.md lists them all"


def _nearest(key: str, known: Iterable[str]) -> str | None:
    """A slip among its siblings, else the same leaf elsewhere: in the section most like ``key``'s.

    Leaves are compared alone, because a long common prefix makes any two keys look alike.
    """
    section, leaf = _split(key)
    siblings = {_split(name)[1]: name for name in known if _split(name)[0] == section}
    for slip in difflib.get_close_matches(leaf, siblings, 1, 0.75):
        return siblings[slip]
    leaves = {_split(name)[1] for name in known}
    for same in difflib.get_close_matches(leaf, leaves, 1, 0.75):
        return difflib.get_close_matches(
            key, [name for name in known if _split(name)[1] == same], 1, 0.0
        )[0]
    return None


def _split(key: str) -> tuple[str, str]:
    section, _, leaf = key.rpartition(".")
    return section, leaf


def _first_sentence(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).split(". ")[0].rstrip(".")


def shown(value: Any) -> str:
    """A value as one would write it: ``"50"`` and 50, ``true`` and ``null``."""
    return json.dumps(value, ensure_ascii=False, default=str)
