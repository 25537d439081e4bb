"""The agent's own YAML (a row's ``agent_cfg_path``), read as attributes: ``self.cfg.max_turns``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic

from chatlearn.config.yaml_file import read_yaml
from chatlearn.errors import AgentError


class AgentCfg(Mapping[str, Any]):
    """A YAML mapping read as attributes or items, nested mappings too.

    A key that is not there says which are, and which is nearest. Read-only: an agent is shared by
    all its runs.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        object.__setattr__(self, "_values", dict(values))
        object.__setattr__(self, "_where", where)

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        return AgentCfg(value, f"{self._where}: {key}") if isinstance(value, Mapping) else value

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        try:
            return self[key]
        except KeyError:
            raise AttributeError(_missing(key, list(self._values), self._where)) from None

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError(f"the agent configuration is read-only; set {key!r} in {self._where}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"AgentCfg({self._values!r})"


def load_agent_cfg(path: str | None, agent_class: type) -> tuple[Any, str | None]:
    """The YAML at ``path`` for an agent of ``agent_class``, and its ``reward_fn`` if it names one.

    With a nested class ``Config`` (a pydantic model or a dataclass) in the agent, the YAML is that
    type, checked, and its defaults hold where the YAML or the path is absent. Without one it is an
    ``AgentCfg``, empty when there is no path.

    Raises:
        ConfigError: the file cannot be read or parsed.
        AgentError: it does not fit the agent's ``Config``.
    """
    values = read_yaml(path) if path else {}
    where = path or f"{agent_class.__name__} (its rows have no agent_cfg_path)"
    typed = getattr(agent_class, "Config", None)
    reward_fn = values.get("reward_fn")
    if typed is None:
        return AgentCfg(values, where), reward_fn
    own = {k: v for k, v in values.items() if k != "reward_fn"}
    known = [f.name for f in dataclasses.fields(typed)] if dataclasses.is_dataclass(typed) else None
    if known is None and issubclass(typed, pydantic.BaseModel):
        known = list(typed.model_fields)
    if known is None:
        raise AgentError(
            f"{agent_class.__name__}.Config must be a pydantic model or a dataclass, "
            f"it is {typed!r}"
        )
    for key in own:
        if key not in known:
            raise AgentError(_missing(key, known, where))
    try:
        return typed(**own), reward_fn
    except (TypeError, ValueError) as error:
        raise AgentError(f"{where} does not fit {agent_class.__name__}.Config: {error}") from error


def _missing(key: str, known: list[str], where: str) -> str:
    near = difflib.get_close_matches(key, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no key {key!r} in {where}; it has: {', '.join(map(repr, known)) or 'nothing'}{hint}"
