"""Calling a reward function: user code, so behind a boundary and with its result checked."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import reprlib
from collections.abc import Sequence
from typing import Any

from chatlearn.errors import JudgeError, boundary
from chatlearn.rewards.registry import RewardFunction, describe
from chatlearn.types import Message, Score, Task, Trajectory

_RETURNS = "a reward function returns a number, (number, {name: number}) or a chatlearn.types.Score"


async def score(function: RewardFunction, *, trajectory: Trajectory, task: Task) -> Score:
    """Reward, metrics and rewards of parts of one trajectory, which is not changed.

    The function is called with keywords: ``response``, ``messages``, ``ground_truth``,
    ``data_source``, ``trajectory``, ``prompt``, ``uid``, ``agent_name``, ``agent_cfg_path`` and
    every other column of the row (a column of one of these names is hidden by ours). Without
    ``**kwargs`` it gets only the parameters it declares. A plain function runs in a thread, a
    coroutine function in the event loop.

    Raises:
        JudgeError: it asks for a parameter nobody supplies, raises, or returns something that is
            not a finite number, ``(number, {name: number})`` or a ``Score`` of finite numbers.
    """
    where = f"reward {describe(function)} of task {task.uid}"
    arguments = _select(function, _supply(trajectory, task), where)
    if _is_async(function):
        with boundary(JudgeError, where):
            result = await function(**arguments)
    else:

        def call() -> Any:
            with boundary(JudgeError, where):  # in the thread: a future can't carry StopIteration
                return function(**arguments)

        context = contextvars.copy_context()
        result = await asyncio.get_running_loop().run_in_executor(None, context.run, call)
        if inspect.isawaitable(result):
            with boundary(JudgeError, where):
                result = await result
    return _checked(result, where)


def final_response(messages: Sequence[Message]) -> str:
    """Text of the last assistant message; '' when there is none.

    What a tool printed is never the answer, even when it comes last. Of content blocks, those with
    text are joined.
    """
    for message in reversed(messages):
        if message.get("role") == "assistant":
            return _text(message.get("content"))
    return ""


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    return "".join(
        block if isinstance(block, str) else str(block.get("text") or "")
        for block in blocks
        if isinstance(block, str) or (isinstance(block, dict) and block.get("type") == "text")
    )


def _supply(trajectory: Trajectory, task: Task) -> dict[str, Any]:
    return {
        **task.fields,
        "prompt": task.messages,
        "uid": task.uid,
        "agent_name": task.agent_name,
        "agent_cfg_path": task.agent_cfg_path,
        "response": final_response(trajectory.messages),
        "messages": trajectory.messages,
        "ground_truth": task.ground_truth,
        "data_source": task.data_source,
        "trajectory": trajectory,
    }


def _select(function: RewardFunction, supply: dict[str, Any], where: str) -> dict[str, Any]:
    """The part of ``supply`` that the function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return supply
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    missing = [name for name in required if name not in named or name not in supply]
    if missing:
        raise JudgeError(
            f"{where} asks for {', '.join(missing)}, which the row does not have; "
            f"available as keywords: {', '.join(sorted(supply))}"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return supply
    return {name: value for name, value in supply.items() if name in named}


def _is_async(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
    )


def _checked(result: Any, where: str) -> Score:
    """``result`` as a ``Score`` of Python floats."""
    if isinstance(result, Score):
        found = result
    elif not isinstance(result, tuple):
        found = Score(result)
    elif len(result) == 2:
        found = Score(*result)
    else:
        raise JudgeError(f"{where} {_returned(result)}; {_RETURNS}")
    try:
        return Score(
            _number(found.reward, "reward"),
            _numbers(found.metrics, "metrics", (str,)),
            _numbers(found.node_rewards, "node_rewards", (str,)),
            _numbers(found.turn_rewards, "turn_rewards", (int, str)),
        )
    except ValueError as error:
        raise JudgeError(f"{where} {_returned(result)}; {error}; {_RETURNS}") from None


def _numbers(values: Any, name: str, kinds: tuple[type, ...]) -> dict[Any, float]:
    """A dictionary of finite floats whose keys are of ``kinds``."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} is no dictionary but {_short(values)}")
    for key in values:
        if not isinstance(key, kinds) or isinstance(key, bool):
            words = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name} has the key {_short(key)}, which is no {words}")
    return {key: _number(value, f"{name}[{_short(key)}]") for key, value in values.items()}


def _number(value: Any, name: str) -> float:
    """``value`` as a finite float: Python, numpy and one-element tensors, but never text."""
    number = None
    if hasattr(type(value), "__float__") and not isinstance(value, str):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = None
    if number is None or not math.isfinite(number):
        raise ValueError(f"{name} is no finite number but {_short(value)}")
    return number


def _returned(result: Any) -> str:
    return f"returned {_short(result)} ({type(result).__name__})"


def _short(value: Any) -> str:
    short = reprlib.Repr()  # cuts long values, and survives a __repr__ that raises
    short.maxother = short.maxstring = 200
    return short.repr(value)
