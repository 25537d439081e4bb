"""Which function scores a task: the row's, else the agent's, else the one of its data source."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from chatlearn.errors import ConfigError, boundary
from chatlearn.types import Task

RewardFunction = Callable[..., Any]
"""Takes keyword arguments, returns a number or (number, metrics), maybe as a coroutine."""

_functions: dict[str, RewardFunction] = {}


def reward(*data_sources: str) -> Callable[[RewardFunction], RewardFunction]:
    """Register a function as the reward of one or more data sources.

    ::

        @reward("my/sums")
        def my_reward(response, ground_truth, **_):
            return float(response.strip() == ground_truth)

    Raises:
        ConfigError: a source has another function already. The same function coming again,
            because its file is imported under a second name, replaces the first.
    """
    if not data_sources or not all(isinstance(source, str) and source for source in data_sources):
        raise ConfigError(
            f'@reward needs names of data sources: @reward("my/data"), not {data_sources}'
        )

    def register(function: RewardFunction) -> RewardFunction:
        for source in data_sources:
            known = _functions.get(source)
            if known is not None and home(known) != home(function):
                raise ConfigError(
                    f"two rewards for data source {source!r}: {describe(known)} and "
                    f"{describe(function)}; to override one for some rows, name yours in their "
                    "reward_fn column or in reward_fn of the agent YAML"
                )
        _functions.update(dict.fromkeys(data_sources, function))
        return function

    return register


def lookup(data_source: str) -> RewardFunction | None:
    """The function registered for a data source, or None."""
    return _functions.get(data_source)


def resolve_reward(task: Task, agent_reward_fn: str | None) -> RewardFunction | None:
    """The reward of a task: ``reward_fn`` of the row, else of the agent YAML, else the registry's.

    Args:
        agent_reward_fn: ``reward_fn`` of the agent YAML: ``pkg.mod:function`` or
            ``path/file.py:function``.

    Returns:
        None when nobody names one; the agent must then score its own runs.

    Raises:
        ConfigError: a named function cannot be had.
    """
    for spec, where in (
        (task.fields.get("reward_fn"), f"reward_fn of row {task.uid}"),
        (agent_reward_fn, f"reward_fn in the YAML of agent {task.agent_name!r}"),
    ):
        if spec is not None and spec != "":
            return load_function(spec, where)
    return lookup(task.data_source)


def load_function(spec: str, where: str) -> RewardFunction:
    """Import the function of a spec ``pkg.mod:function`` or ``path/file.py:function``.

    Args:
        where: what names the spec, for the error message.
    """
    function = load_object(spec, where)
    if not callable(function):
        raise ConfigError(f"{where}: {spec} is {type(function).__name__}, not a function")
    return function


def load_object(spec: str, where: str) -> Any:
    """Import what a spec ``pkg.mod:name`` or ``path/file.py:name`` names.

    Args:
        where: what names the spec, for the error message.

    Raises:
        ConfigError: the spec is no such text, or the module or the name cannot be had.
    """
    module_name, colon, name = spec.rpartition(":") if isinstance(spec, str) else ("", "", "")
    if not colon or not module_name or not name:
        raise ConfigError(
            f"{where} is {spec!r}; write 'pkg.mod:function' or 'path/file.py:function'"
        )
    is_file = module_name.endswith(".py")
    module = _import_file(module_name, where) if is_file else _import_module(module_name, where)
    if not hasattr(module, name):
        names = [key for key, value in vars(module).items() if callable(value)]
        raise ConfigError(f"{where}: {module_name} has no {name!r}{meant(name, names)}")
    return getattr(module, name)


def describe(function: RewardFunction) -> str:
    """A reward function in an error message: its module and name."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', '?')}:{name}"


def home(function: Any) -> tuple[str, str]:
    """File and name a function was defined under, the same through every import of the file."""
    code = getattr(function, "__code__", None)
    file = str(Path(code.co_filename).resolve()) if code else type(function).__module__
    return file, getattr(function, "__qualname__", repr(function))


def _import_file(path: str, where: str) -> ModuleType:
    """Import a file once under a name made of its path, so that processes agree on the name."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        near = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise ConfigError(f"{where}: there is no file {file}{meant(file.name, near)}")
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    name = f"chatlearn_file_{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, f"no loader for {file}"
    assert spec.loader is not None, f"no loader for {file}"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look a module up by name
    try:
        with boundary(ConfigError, f"{where}: importing {file}"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str, where: str) -> ModuleType:
    try:
        with boundary(ConfigError, f"{where}: importing {name}"):
            return importlib.import_module(name)
    except ConfigError as error:
        cause = error.__cause__
        if not isinstance(cause, ModuleNotFoundError) or not cause.name:
            raise
        if name != cause.name and not name.startswith(cause.name + "."):
            raise  # the module exists, and imports something that does not
        hint = meant(cause.name, _siblings(cause.name))
        raise ConfigError(
            f"{where}: there is no module {cause.name!r}{hint}; "
            "a file that is not installed is named by its path: 'path/file.py:function'"
        ) from None


def _siblings(name: str) -> list[str]:
    """Modules that lie where ``name`` was looked for."""
    parent, dot, _ = name.rpartition(".")
    places = getattr(sys.modules.get(parent), "__path__", []) if dot else None
    return [f"{parent}{dot}{found.name}" for found in pkgutil.iter_modules(places)]


def meant(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` with the nearest known name; '' when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
