"""Calling a reward function: user code, so behind a boundary and with its result checked."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from chatlearn.errors import JudgeError
from chatlearn.rewards.calling import call, finite, finite_values, returned, wants
from chatlearn.rewards.judging import JudgeCase, JudgeOutput, read_output
from chatlearn.rewards.registry import RewardFunction, describe
from chatlearn.rewards.responses import final_response, last_question
from chatlearn.types import Score, Task, Trajectory

_RETURNS = (
    "a reward function returns a number, (number, {name: number}), a chatlearn.types.Score or a "
    "JudgeOutput"
)


async def score(
    function: RewardFunction,
    *,
    trajectory: Trajectory,
    task: Task,
    auxiliary_models: Mapping[str, Any] = MappingProxyType({}),
) -> Score:
    """Reward, metrics and rewards of parts of one trajectory, which is not changed.

    The function is called with keywords: ``response``, ``messages``, ``ground_truth``,
    ``data_source``, ``trajectory``, ``prompt``, ``uid``, ``agent_name``, ``agent_cfg_path``,
    ``auxiliary_models``, ``judge_case`` and every other column of the row (a column of one of these
    names is hidden by ours). Without ``**kwargs`` it gets only the parameters it declares. A plain
    function runs in a thread, a coroutine function in the event loop.

    Raises:
        JudgeError: it asks for a parameter nobody supplies, raises, or returns something that is
            not a finite number, ``(number, {name: number})``, or a ``Score`` or ``JudgeOutput`` of
            finite numbers.
    """
    where = f"reward {describe(function)} of task {task.uid}"
    supply = _supply(trajectory, task, auxiliary_models)
    parameters = wants(function)
    if missing := parameters.missing(supply):
        raise JudgeError(
            f"{where} asks for {', '.join(missing)}, which the row does not have; "
            f"available as keywords: {', '.join(sorted(supply))}"
        )
    return _checked(await call(function, parameters.pick(supply), where), where)


def _supply(
    trajectory: Trajectory, task: Task, auxiliary_models: Mapping[str, Any]
) -> dict[str, Any]:
    response = final_response(trajectory.messages)
    return {
        **task.fields,
        "prompt": task.messages,
        "uid": task.uid,
        "agent_name": task.agent_name,
        "agent_cfg_path": task.agent_cfg_path,
        "response": response,
        "messages": trajectory.messages,
        "ground_truth": task.ground_truth,
        "data_source": task.data_source,
        "trajectory": trajectory,
        "auxiliary_models": auxiliary_models,
        "judge_case": JudgeCase(
            task=task.fields,
            response=response,
            query=last_question(task.messages),
            ground_truth=task.ground_truth,
            messages=trajectory.messages,
            turns=trajectory.turns,
            auxiliary_models=auxiliary_models,
        ),
    }


def _checked(result: Any, where: str) -> Score:
    """``result`` as a ``Score`` of Python floats."""
    if isinstance(result, Score):
        found = result
    elif isinstance(result, JudgeOutput):
        output = read_output(result, where)
        found = Score(output.reward, output.logged)
    elif not isinstance(result, tuple):
        found = Score(result)
    elif len(result) == 2:
        found = Score(*result)
    else:
        raise JudgeError(f"{where} {returned(result)}; {_RETURNS}")
    try:
        return Score(
            finite(found.reward, "reward"),
            finite_values(found.metrics, "metrics"),
            finite_values(found.node_rewards, "node_rewards"),
            finite_values(found.turn_rewards, "turn_rewards", (int, str)),
        )
    except ValueError as error:
        raise JudgeError(f"{where} {returned(result)}; {error}; {_RETURNS}") from None
