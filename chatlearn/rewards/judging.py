"""Judges: what they are given, what they return, and how one is named, checked and called.

A judge scores one run of a workflow. Users bring theirs in the forms they have: a function
``(task, response, auxiliary_models)``, a function with keywords like a reward function, a class
with ``compute_reward(workflow_task, workflow_output)``, an object that is called. ``load_judge``
makes one coroutine function of all of them, so the caller writes ``await judge(case)``.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from chatlearn.errors import ConfigError, JudgeError, boundary
from chatlearn.rewards.calling import Wants, call, finite, finite_values, returned, wants
from chatlearn.rewards.judge_names import find_judge
from chatlearn.rewards.registry import describe
from chatlearn.rewards.responses import final_response, response_text
from chatlearn.types import Message, Turn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JudgeOutput:
    """What a judge says of one run."""

    reward: float
    metrics: dict[str, float] = field(default_factory=dict)
    """Logged under their names."""
    is_success: bool | None = None
    """Whether the task is solved; None when the judge does not say."""

    @property
    def logged(self) -> dict[str, float]:
        """``metrics``, with ``success`` where the judge says it."""
        known = {} if self.is_success is None else {"success": float(self.is_success)}
        return {**known, **self.metrics}


@dataclass(frozen=True)
class JudgeCase:
    """One run as judges see it."""

    task: dict[str, Any]
    """The raw row of the dataset."""
    response: Any = None
    """What the workflow answered: any object."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the workflow registered for its judge."""
    query: str = ""
    ground_truth: Any = None
    messages: list[Message] = field(default_factory=list)
    """The conversation at the end of the run."""
    turns: list[Turn] = field(default_factory=list)
    """Every call of the policy."""
    environment: Any = None
    """Handle of the run's environment instance; None without one."""
    auxiliary_models: Mapping[str, Any] = field(default_factory=dict)
    """Frozen models by name."""
    workflow_task: Any = None
    """The object a workflow of the class form was given."""
    workflow_output: Any = None
    """The object the workflow returned."""

    @cached_property
    def response_text(self) -> str:
        """``response`` as text; without one, the last assistant message."""
        return final_response(self.messages) if self.response is None else self._text

    @cached_property
    def _text(self) -> str:
        return response_text(self.response)

    @property
    def steps(self) -> list[list[Message]]:
        """The conversation up to each answer of the assistant, one list an answer."""
        ends = [i + 1 for i, m in enumerate(self.messages) if m.get("role") == "assistant"]
        return [self.messages[:end] for end in ends]


Judge = Callable[[JudgeCase], Awaitable[JudgeOutput]]

KEYWORDS = (
    "task",
    "response",
    "auxiliary_models",
    "query",
    "ground_truth",
    "metadata",
    "messages",
    "turns",
    "environment",
    "workflow_task",
    "workflow_output",
    "judge_input_dictionary",
    "solution",
    "judge_case",
    "logger",
)
"""Parameters a judge may have."""

_RETURNS = (
    "a judge returns a number, (reward, is_success), (reward, {name: number}) or an object with "
    "reward, and maybe metrics and is_success"
)


class BaseJudge:
    """What judges of the class form may inherit; any class with ``compute_reward`` will do."""

    def __init__(self, config: Any = None) -> None:
        self.config = config

    def compute_reward(self, workflow_task: Any, workflow_output: Any) -> Any:
        """The reward of one run, in any form ``JudgeOutput`` can be read from; may be async."""
        raise NotImplementedError(f"{type(self).__name__} has no compute_reward")


def load_judge(
    spec: Any,
    where: str,
    *,
    columns: Collection[str] = (),
    config: Any = None,
    timeout_s: float | None = None,
) -> Judge:
    """The judge of ``spec``, ready to be awaited with a ``JudgeCase``; its parameters are checked.

    A judge is given by name what it declares of ``KEYWORDS``; columns of the row come with
    ``**kwargs`` or by name. ``response`` is the workflow's object for a judge that declares
    ``task``, and its text for one that does not, as reward functions expect. What is returned
    raises JudgeError when the judge raises, takes longer than ``timeout_s`` or returns something
    that is no finite number in one of its forms.

    Args:
        spec: ``path/file.py->Name``, ``pkg.mod->Name`` (or with ``:``), the name of a registered
            judge (``math_answer``, ``math_answer_and_llm``), a function, a class or an instance.
        where: what names it, for messages: ``task_judge.judge_protocol``.
        columns: names of the row's columns that a judge may also have as parameters.
        config: handed to a class whose constructor takes ``config``.
        timeout_s: longest one judgement may take; None = as long as the run may.

    Raises:
        ConfigError: it cannot be had, or takes other parameters than a judge may have.
    """
    found = find_judge(spec, where) if isinstance(spec, str) else spec
    function = _function(found, where, config)
    parameters = wants(function)
    by_position = _check(function, parameters, where, columns)

    async def judged(case: JudgeCase) -> JudgeOutput:
        name = f"judge {describe(function)}"
        supply = _supply(case, gives_text="task" not in parameters.names)
        given = parameters.pick(supply)
        if by_position:
            given = {n: supply[o] for n, o in zip(parameters.required, by_position, strict=True)}
        try:
            result = await asyncio.wait_for(call(function, given, name), timeout_s)
        except asyncio.TimeoutError:
            raise JudgeError(f"{name} took longer than {timeout_s} seconds ({where})") from None
        return read_output(result, name)

    return judged


def read_output(result: Any, where: str) -> JudgeOutput:
    """What a judge returned, in any of its forms, as a ``JudgeOutput`` of Python floats.

    Raises:
        JudgeError: it is none of them, or holds something that is no finite number.
    """
    reward, metrics, is_success = result, None, None
    if isinstance(result, tuple) and len(result) == 2:
        reward, second = result
        metrics, is_success = (second, None) if isinstance(second, dict) else (None, second)
    elif hasattr(result, "reward"):
        reward, metrics = result.reward, getattr(result, "metrics", None)
        is_success = getattr(result, "is_success", None)
        if getattr(result, "node_rewards", None) or getattr(result, "turn_rewards", None):
            raise JudgeError(
                f"{where} {returned(result)}; rewards of nodes and turns come from a reward "
                "function (reward_fn), not from a judge"
            )
    elif hasattr(result, "result"):  # AgentScope's MetricResult
        reward = result.result
    try:
        if is_success is not None and finite(is_success, "is_success") not in (0.0, 1.0):
            raise ValueError(f"is_success is {is_success!r}, neither true nor false")
        return JudgeOutput(
            finite(reward, "reward"),
            finite_values({} if metrics is None else metrics, "metrics"),
            None if is_success is None else bool(is_success),
        )
    except ValueError as error:
        raise JudgeError(f"{where} {returned(result)}; {error}; {_RETURNS}") from None


def _function(found: Any, where: str, config: Any) -> Callable[..., Any]:
    """What is called: a class is built first, and ``compute_reward`` of an object wins."""
    if inspect.isclass(found):
        needed = wants(found)
        takes_config = "config" in needed.names
        if [name for name in needed.required if name != "config"]:
            raise ConfigError(
                f"{where}: judge class {describe(found)} is built with "
                f"({', '.join(needed.required)}); a judge's constructor takes nothing or config"
            )
        with boundary(ConfigError, f"{where}: building {describe(found)}"):
            found = found(config=config) if takes_config else found()
    method = getattr(found, "compute_reward", None)
    if callable(method):
        return method
    if not callable(found):
        raise ConfigError(
            f"{where} is {type(found).__name__}; a judge is a function, a class or object with "
            "compute_reward(workflow_task, workflow_output), or an object that is called"
        )
    return found


def _check(
    function: Callable[..., Any], parameters: Wants, where: str, columns: Collection[str]
) -> tuple[str, ...]:
    """Refuse parameters nobody supplies; returns what is given by position, () when by name."""
    known = {*KEYWORDS, *columns}
    strange = [n for n in parameters.required if n not in known or n not in parameters.names]
    if not strange:
        return ()
    if getattr(function, "__name__", "") == "compute_reward" and parameters.names:
        by_count = {1: ("judge_input_dictionary",), 2: ("workflow_task", "workflow_output")}
        if len(parameters.required) in by_count:
            return by_count[len(parameters.required)]
    hint = "; a column of the row is task['name']" if not columns else ""
    raise ConfigError(
        f"{where}: judge {describe(function)} has the parameters "
        f"({', '.join(parameters.required)}); nobody supplies {', '.join(strange)}. It may have "
        f"{', '.join((*KEYWORDS, *columns))}{hint}"
    )


def _supply(case: JudgeCase, *, gives_text: bool) -> dict[str, Any]:
    """Everything a judge may be given, by name."""
    task, output = case.workflow_task, case.workflow_output
    if task is None:
        task = SimpleNamespace(
            task=SimpleNamespace(main_query=case.query, metadata=case.task, task_id=""),
            gym_env=case.environment,
        )
    if output is None:
        output = SimpleNamespace(
            reward=None, response=case.response, metadata=case.metadata, metrics={}
        )
    return {
        **(case.task if isinstance(case.task, Mapping) else {}),
        "task": case.task,
        "response": case.response_text if gives_text else case.response,
        "auxiliary_models": case.auxiliary_models,
        "query": case.query,
        "ground_truth": case.ground_truth,
        "metadata": case.metadata,
        "messages": case.messages,
        "turns": case.turns,
        "environment": case.environment,
        "workflow_task": task,
        "workflow_output": output,
        "judge_input_dictionary": {
            **case.metadata,
            "env": case.environment,
            "task_core_arg": task,
            "grouped_steps": case.steps,
        },
        "solution": SimpleNamespace(
            success=True, output=case.response, trajectory=case.messages, meta=case.metadata
        ),
        "judge_case": case,
        "logger": logger,
    }
