"""Is this a workflow? Asked before anything is loaded; the answer names its parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from chatlearn.errors import ConfigError

NEEDED = ("task", "model")
OPTIONAL = ("auxiliary_models", "logger")
"""Parameters of the function form; each is given by its name."""

TUNER_NAMES = ("model_tuner", "tuner")
"""What the second parameter of ``Workflow.execute`` may be called."""

_FORMS = (
    "a workflow is `async def run(task, model)`, which may also take auxiliary_models and logger, "
    "or a class with `async def execute(self, workflow_task, model_tuner)`"
)


def check_workflow(workflow: Any, where: str) -> None:
    """Refuse what cannot be run as a workflow.

    Args:
        workflow: the function, or the class.
        where: what names it: ``tune(workflow_func=…)``.

    Raises:
        ConfigError: it is neither form, is not async, or its parameters are others; they are named.
    """
    if inspect.isclass(workflow):
        _check_class(workflow, where)
    elif callable(workflow):
        _check_function(workflow, where)
    else:
        raise ConfigError(f"{where} is {workflow!r}, which cannot be called; {_FORMS}")


def is_class_form(workflow: Any) -> bool:
    """Whether ``workflow`` is a class with ``execute``."""
    return inspect.isclass(workflow)


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters a caller may give, by name."""
    return dict(inspect.signature(function).parameters)


def shown_signature(thing: Any, parameters: dict[str, inspect.Parameter]) -> str:
    """``name(task, model)``, for messages."""
    name = getattr(thing, "__qualname__", None) or type(thing).__qualname__
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    given = [stars.get(p.kind, "") + p.name for p in parameters.values()]
    return f"{name}({', '.join(given)})"


def _check_function(function: Any, where: str) -> None:
    parameters = parameters_of(function)
    shown = shown_signature(function, parameters)
    _check_async(function, f"{where}: {shown}")
    starred = [p for p in parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if starred:
        raise ConfigError(f"{where}: {shown} takes {starred[0]}; name its parameters. {_FORMS}")
    missing = [name for name in NEEDED if name not in parameters]
    others = [
        p.name
        for p in parameters.values()
        if p.name not in NEEDED + OPTIONAL and p.default is p.empty
    ]
    if missing or others:
        problems = [f"lacks {', '.join(missing)}"] if missing else []
        problems += [f"asks for {', '.join(others)}, which nobody gives"] if others else []
        raise ConfigError(f"{where}: {shown} {' and '.join(problems)}; {_FORMS}")
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_ONLY]
    if positional:
        raise ConfigError(
            f"{where}: {shown} takes {', '.join(positional)} by position only; workflows are "
            "called with keywords, so remove the '/'"
        )


def _check_class(workflow: type, where: str) -> None:
    execute = getattr(workflow, "execute", None)
    if execute is None:
        raise ConfigError(f"{where}: the class {workflow.__qualname__} has no execute; {_FORMS}")
    parameters = parameters_of(execute)
    shown = shown_signature(execute, parameters)
    _check_async(execute, f"{where}: {shown}")
    names = list(parameters)[1:]
    if len(names) != 2 or names[0] != "workflow_task" or names[1] not in TUNER_NAMES:
        raise ConfigError(
            f"{where}: {shown} takes ({', '.join(names)}) beside self; write "
            "`async def execute(self, workflow_task, model_tuner)`"
        )
    needed = [
        p.name
        for p in list(inspect.signature(workflow).parameters.values())
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise ConfigError(
            f"{where}: {workflow.__qualname__}() needs {', '.join(needed)}; an object is made for "
            "every run without arguments, so give them defaults"
        )


def _check_async(function: Any, where: str) -> None:
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not inspect.iscoroutinefunction(inner) and not inspect.iscoroutinefunction(
        getattr(type(inner), "__call__", None)  # noqa: B004 - an object with an async __call__
    ):
        raise ConfigError(f"{where} is not async; write `async def` and await the model in it")
