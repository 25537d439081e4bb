"""Names of workflows and judges: ``file.py->Name`` and ``pkg.mod->Name``, so that every process of
a run finds the same object.

What has no such name (a closure, a cell of a notebook, a script from stdin) is kept in a table of
this process, where only ``runtime_args.cluster=local`` can find it. Objects that do have a name are
in the table too: the process that was given one does not import its file a second time.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from chatlearn.errors import ConfigError
from chatlearn.rewards.registry import load_function

IN_PROCESS = "this process"
"""What stands before ``->`` in the name of an object that only this process has."""

_objects: dict[str, Any] = {}

_importing: ContextVar[str | None] = ContextVar("chatlearn_importing", default=None)


def name_of(thing: Any) -> str:
    """The name other processes find ``thing`` by, or ``this process->…`` when there is none.

    ``load_object`` gives ``thing`` back for it in this process.
    """
    spec = _lasting_name(thing)
    if spec is None:
        base = f"{IN_PROCESS}->{_plain_name(thing)}"
        names = itertools.chain([base], (f"{base}#{n}" for n in itertools.count(2)))
        spec = next(name for name in names if _objects.get(name, thing) is thing)
    _objects[spec] = thing
    return spec


def is_in_process(spec: str) -> bool:
    """Whether only this process can find ``spec``."""
    return spec.startswith(f"{IN_PROCESS}->")


def known_object(spec: str) -> Any:
    """The object this process gave the name ``spec`` to; None when it gave it to none."""
    return _objects.get(spec)


def load_object(spec: str, where: str) -> Any:
    """The workflow that ``spec`` names: what this process gave the name to, else imported.

    Args:
        spec: ``path/file.py->Name`` (looked up from the current directory) or ``pkg.mod->Name``.
        where: what names it, for messages: ``workflow in agent.yaml``.

    Raises:
        ConfigError: it is no such name, or the file, the module or the object is not there.
    """
    return _objects[spec] if spec in _objects else import_object(spec, where)


def import_object(spec: str, where: str) -> Any:
    """What ``spec`` names in a process that was given nothing. Raises ``ConfigError``."""
    if isinstance(spec, str) and is_in_process(spec):
        raise ConfigError(
            f"{where} is {spec!r}: it was defined where no other process can find it (a notebook, "
            "a closure, a script from stdin); move it to the top level of a .py file, or set "
            "runtime_args.cluster=local"
        )
    place, arrow, name = spec.partition("->") if isinstance(spec, str) else ("", "", "")
    if not arrow or not place.strip() or not name.strip():
        raise ConfigError(f"{where} is {spec!r}; write 'path/file.py->Name' or 'pkg.mod->Name'")
    place, name = place.strip(), name.strip()
    folder = Path(place).expanduser().resolve().parent if place.endswith(".py") else Path.cwd()
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))  # so that the file can import its neighbours
    with importing(place):
        return load_function(f"{place}:{name}", where)


def resolve_spec(spec: str, *folders: Path) -> str:
    """``spec`` with the path of its file made absolute: in the first of ``folders`` that has it.

    What is no file, or is in none of them, stays as it is.
    """
    place, arrow, name = spec.partition("->")
    place = place.strip()
    if not arrow or not place.endswith(".py"):
        return spec
    found = next((f / place for f in folders if (f / place).is_file()), None)
    return spec if found is None else f"{found.resolve()}->{name.strip()}"


@contextmanager
def importing(place: str) -> Iterator[None]:
    """Around the import of a file that holds a workflow or a judge."""
    token = _importing.set(place)
    try:
        yield
    finally:
        _importing.reset(token)


def refuse_while_importing() -> None:
    """Raises ``ConfigError`` when the calling code runs only because its file is being imported."""
    place = _importing.get()
    if place is not None:
        raise ConfigError(
            f"tune() was called while {place} was imported to find a workflow in it: the file "
            "would start its own training again; put the call under  if __name__ == '__main__':"
        )


def _lasting_name(thing: Any) -> str | None:
    name = getattr(thing, "__qualname__", None)
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    if not name or module is None or not name.isidentifier():
        return None  # a lambda, a closure, a method, an instance
    if getattr(module, name, None) is not thing:
        return None  # decorated or renamed: the name leads elsewhere
    file = _file(module)
    if module.__name__ == "__main__":
        return f"{file}->{name}" if file else None
    if file and "." not in module.__name__:  # a neighbour of the script: workers lack its folder
        return f"{file}->{name}"
    return f"{module.__name__}->{name}" if file else None


def _file(module: ModuleType) -> str | None:
    """The .py file of a module; None in a notebook, on stdin and under ``python -c``."""
    path = getattr(module, "__file__", None)
    if not path or not path.endswith(".py") or not Path(path).is_file():
        return None
    return str(Path(path).resolve())


def _plain_name(thing: Any) -> str:
    if not (inspect.isfunction(thing) or inspect.isclass(thing)):
        thing = type(thing)
    return f"{getattr(thing, '__qualname__', 'object')}"
