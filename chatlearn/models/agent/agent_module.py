"""The registry: ``@register("name")``, the import of user code, and one built graph per agent."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from chatlearn.errors import AgentError, ConfigError, boundary
from chatlearn.models.agent.agent_cfg import load_agent_cfg
from chatlearn.models.agent.base_agent_graph import BaseAgentGraph

AgentClass = TypeVar("AgentClass", bound=type)

_graph_registry: dict[str, type] = {}


def register(agent_name: str) -> Callable[[AgentClass], AgentClass]:
    """Class decorator: rows whose ``agent_name`` is this name are run by the class.

    Raises:
        AgentError: the name is taken by another class.
    """

    def add(agent_class: AgentClass) -> AgentClass:
        taken = _graph_registry.get(agent_name)
        if taken is not None and _origin(taken) != _origin(agent_class):
            raise AgentError(
                f"agent {agent_name!r} is registered twice: by {_origin(taken)} and by "
                f"{_origin(agent_class)}; give one of them another name"
            )
        _graph_registry[agent_name] = agent_class
        return agent_class

    return add


def agent_class(agent_name: str) -> type:
    """The class registered as ``agent_name``; an unknown name lists the known ones."""
    if agent_name not in _graph_registry:
        known = sorted(_graph_registry)
        near = difflib.get_close_matches(agent_name, known, 1)
        raise AgentError(
            f"agent {agent_name!r} is not registered; registered: {', '.join(known)}. "
            + (f"Did you mean {near[0]!r}? " if near else "")
            + "A module of your own is imported through runtime_args.import_modules"
        )
    return _graph_registry[agent_name]


def import_modules(names: Sequence[str]) -> None:
    """Import user code: dotted modules, or paths of .py files.

    The current directory can be imported from, as with ``python -m``.

    Raises:
        ConfigError: a file or module is not there.
        AgentError: user code raised while being imported; its traceback is in the message.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in names:
        with boundary(AgentError, f"importing {name!r} (runtime_args.import_modules)"):
            if name.endswith(".py"):
                _import_file(Path(name).resolve())
            else:
                _import_dotted(name)


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"runtime_args.import_modules: there is no file {path}")
    module_name = path.stem
    loaded = sys.modules.get(module_name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return
    if loaded is not None or importlib.util.find_spec(module_name) is not None:
        module_name = f"chatlearn_user_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that the file can import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise


def _import_dotted(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"runtime_args.import_modules: there is no module {name!r} (looked from "
                f"{Path.cwd()}); a file is given by its path: path/to/{name.split('.')[-1]}.py"
            ) from error
        raise


class AgentFactory:
    """Builds each agent once and keeps it, by (agent_name, agent_cfg_path).

    Args:
        llm: the policy's chat model.
        tokenizer: its tokenizer.
        auxiliary_models: frozen models, by name.
    """

    def __init__(
        self, llm: Any, tokenizer: Any, auxiliary_models: Mapping[str, Any] | None = None
    ) -> None:
        self._llm = llm
        self._auxiliary_models = MappingProxyType(dict(auxiliary_models or {}))
        self._tokenizer = tokenizer
        self._agents: dict[tuple[str, str | None], tuple[BaseAgentGraph, str | None]] = {}

    def agent(
        self, agent_name: str, agent_cfg_path: str | None
    ) -> tuple[BaseAgentGraph, str | None]:
        """The agent of a row, and the ``reward_fn`` its YAML names.

        Raises:
            AgentError: the name is unknown, or the agent cannot be built.
            ConfigError: its YAML cannot be read.
        """
        key = (agent_name, agent_cfg_path)
        if key not in self._agents:
            found = agent_class(agent_name)
            cfg, reward_fn = load_agent_cfg(agent_cfg_path, found)
            with boundary(AgentError, f"building agent {agent_name!r} ({_origin(found)})"):
                agent = found.__new__(found)
                agent.auxiliary_models = self._auxiliary_models  # before a constructor builds
                agent.__init__(
                    agent_name=agent_name,
                    cfg=cfg,
                    llm=self._llm,
                    tokenizer=self._tokenizer,
                    processor=None,
                    model_type="llm",
                )
                agent.compile()
            self._agents[key] = agent, reward_fn
        return self._agents[key]


def _origin(agent_class: type) -> str:
    """Where a class is from; the same file imported under two names is one origin."""
    module = sys.modules.get(agent_class.__module__)
    file = getattr(module, "__file__", None)
    return f"{file or agent_class.__module__}:{agent_class.__qualname__}"
