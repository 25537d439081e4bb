"""Calling user functions by the names of their parameters: behind a boundary, sync or async."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from chatlearn.errors import JudgeError, boundary


@dataclass(frozen=True, slots=True)
class Wants:
    """What a function must be given, by its signature."""

    names: tuple[str, ...]
    """Parameters that can be given by name."""
    required: tuple[str, ...]
    """Those without a default, nameable or not."""
    takes_all: bool
    """It has ``**kwargs``."""

    def pick(self, supply: Mapping[str, Any]) -> dict[str, Any]:
        """The part of ``supply`` that the function takes."""
        if self.takes_all:
            return dict(supply)
        return {name: value for name, value in supply.items() if name in self.names}

    def missing(self, supply: Mapping[str, Any]) -> list[str]:
        """Required parameters that ``supply`` has not, or that cannot be given by name."""
        return [n for n in self.required if n not in self.names or n not in supply]


def wants(function: Callable[..., Any]) -> Wants:
    """The parameters of ``function``; of a builtin without a signature, everything."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return Wants((), (), takes_all=True)
    stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    nameable = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return Wants(
        names=tuple(p.name for p in parameters if p.kind in nameable),
        required=tuple(p.name for p in parameters if p.default is p.empty and p.kind not in stars),
        takes_all=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


async def call(function: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    """What ``function`` returns: a coroutine function runs in the event loop, another in a thread.

    Raises:
        JudgeError: it raised; with its traceback.
    """
    if is_async(function):
        with boundary(JudgeError, where):
            return await function(**arguments)

    def body() -> Any:
        with boundary(JudgeError, where):  # in the thread: a future can't carry StopIteration
            return function(**arguments)

    context = contextvars.copy_context()
    result = await asyncio.get_running_loop().run_in_executor(None, context.run, body)
    if inspect.isawaitable(result):
        with boundary(JudgeError, where):
            result = await result
    return result


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling ``function`` gives a coroutine, as far as can be seen."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
    )


def finite(value: Any, name: str) -> float:
    """``value`` as a finite float: Python, numpy and one-element tensors, but never text.

    Raises:
        ValueError: it is something else; says what.
    """
    number = None
    if hasattr(type(value), "__float__") and not isinstance(value, str):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = None
    if number is None or not math.isfinite(number):
        raise ValueError(f"{name} is no finite number but {short(value)}")
    return number


def finite_values(values: Any, name: str, kinds: tuple[type, ...] = (str,)) -> dict[Any, float]:
    """A dictionary of finite floats whose keys are of ``kinds``.

    Raises:
        ValueError: it is something else; says what.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{name} is no dictionary but {short(values)}")
    for key in values:
        if not isinstance(key, kinds) or isinstance(key, bool):
            words = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name} has the key {short(key)}, which is no {words}")
    return {key: finite(value, f"{name}[{short(key)}]") for key, value in values.items()}


def returned(result: Any) -> str:
    """What a function returned, for an error message."""
    return f"returned {short(result)} ({type(result).__name__})"


def short(value: Any) -> str:
    """``repr`` of ``value``, cut, also where its own ``__repr__`` raises."""
    cutting = reprlib.Repr()
    cutting.maxother = cutting.maxstring = 200
    return cutting.repr(value)
