"""YAML in and out: strict about what people get wrong, exact about where.

PyYAML speaks YAML 1.1, in which ``2e-6`` is text, ``12:30`` is 750, ``012`` is 10, a date is an
object, and a key written twice silently loses its first value. Here a number looks like a number of
YAML 1.2, dates stay text and a repeated key is refused. ``yes``/``no`` stay booleans, as PyYAML and
OmegaConf users expect of their agent files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from chatlearn.errors import ConfigError

_FLOAT = re.compile(
    r"""^(?: [-+]? (?: [0-9][0-9_]*\.[0-9_]* | \.[0-9][0-9_]* ) (?: [eE][-+]?[0-9]+ )?
          |  [-+]? [0-9][0-9_]* [eE][-+]?[0-9]+
          |  [-+]? \.(?:inf|Inf|INF)  |  \.(?:nan|NaN|NAN) )$""",
    re.VERBOSE,
)
_INT = re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$")
_OURS = {"int": _INT, "float": _FLOAT}
_DROPPED = ("timestamp", *_OURS)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [(tag, regexp) for tag, regexp in pairs if tag.rpartition(":")[2] not in _DROPPED]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a repeated key here, before ``<<`` merges add keys that may be overridden."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {key.value!r} is written twice", key.start_mark
                    )
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Knows both sets of rules, and quotes any text that one of them would read otherwise."""


for _name, _regexp in _OURS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _regexp, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """The value that ``text`` spells.

    Args:
        text: one YAML document.
        where: what is being read, for the message: a path, or the override it stands in.

    Raises:
        ConfigError: it does not parse, or repeats a key; names ``where``, line and column from 1.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}{place}: not valid YAML: {reason}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing, cannot be read, does not parse, or is not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file (looked in {Path.cwd()})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a YAML file: {error}") from error
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping (key: value), not {_kind(tree)}")
    return tree


def dump_yaml(tree: Any) -> str:
    """``tree`` as YAML that ``parse_yaml`` (and any YAML 1.1 reader) reads back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the single value {value!r}"
