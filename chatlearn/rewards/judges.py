"""The built-in judges: a math answer, a math answer with a language model, a weighted sum.

Each takes a ``JudgeCase``, so it serves workflows (``load_judge``) and, as
``reward_fn: chatlearn.rewards.judges:math_answer``, any agent.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from chatlearn.errors import ConfigError, JudgeError
from chatlearn.rewards.calling import finite, short
from chatlearn.rewards.equivalence import equivalent
from chatlearn.rewards.judging import Judge, JudgeCase, JudgeOutput, load_judge
from chatlearn.rewards.llm import LlmJudge
from chatlearn.rewards.math import MAX_ANSWER_CHARS, final_answer_reward, last_box
from chatlearn.rewards.registry import describe

_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
"""A word of a sentence, not a command of LaTeX."""
_FORMULA = re.compile(r"[=+*/^_\\]")
_EITHER = re.compile(r"\d\W*\bor\b\W*\d")


def math_answer(judge_case: JudgeCase) -> JudgeOutput:
    """1 when the answer is the ground truth mathematically, else 0.

    The answer is ``metadata["final_answer"]`` where the workflow registered one, else the text of
    the response: its last box, or all of it when it is one short line, or the last number of a
    sentence; "4 or 5" is wrong. The ground truth is that of the row, else its column ``answer``;
    of a worked solution what follows the last ``####``, or the last box.

    Raises:
        JudgeError: the row has no ground truth.
    """
    gold, answer = _gold(judge_case), _answer(judge_case)
    if last_box(answer) is None and len(answer) <= MAX_ANSWER_CHARS and "\n" not in answer:
        if equivalent(gold, answer):
            return JudgeOutput(1.0, {"answered": 1.0}, is_success=True)
        is_formula = _FORMULA.search(answer) and not _WORD.search(answer)
        if answer and (is_formula or _EITHER.search(answer)):
            return JudgeOutput(0.0, {"answered": 1.0}, is_success=False)
    reward, metrics = final_answer_reward(answer, gold)
    return JudgeOutput(reward, metrics, is_success=reward == 1.0)


@dataclass(frozen=True)
class MathAnswerAndLlm:
    """``math_answer``, and a language model where the rule finds the answer wrong.

    1 when either of them accepts. Metrics beside those of the two: ``judge/asked``, and
    ``judge/agreement`` over the runs in which the model was asked.

    ::

        my_judge = MathAnswerAndLlm(LlmJudge(model="big", attempts=5), ask="always")
    """

    llm: LlmJudge = field(default_factory=LlmJudge)
    ask: Literal["unequal", "always"] = "unequal"
    """``always`` asks for answers that the rule accepts too, which measures the agreement."""

    async def __call__(self, judge_case: JudgeCase) -> JudgeOutput:
        rule = await asyncio.to_thread(math_answer, judge_case)
        answer = _answer(judge_case)
        if not answer or (rule.is_success and self.ask == "unequal"):
            return JudgeOutput(rule.reward, {**rule.metrics, "judge/asked": 0.0}, rule.is_success)
        said = await self.llm.verdict(judge_case.query, _gold(judge_case), answer, judge_case)
        is_success = bool(rule.is_success or said.is_success)
        metrics = {
            **rule.metrics,
            **said.metrics,
            "judge/asked": 1.0,
            "judge/agreement": float(rule.is_success == said.is_success),
        }
        return JudgeOutput(float(is_success), metrics, is_success)


math_answer_and_llm = MathAnswerAndLlm()
"""With the auxiliary model ``judge``, or the only one there is."""


@dataclass(frozen=True)
class _Part:
    name: str
    judge: Judge
    weight: float


class Weighted:
    """The weighted sum of several judges: made by ``weighted``."""

    def __init__(self, parts: tuple[_Part, ...]) -> None:
        self.parts = parts

    async def __call__(self, judge_case: JudgeCase) -> JudgeOutput:
        reward, metrics, successes = 0.0, {}, []
        for part in self.parts:
            found = await part.judge(judge_case)
            reward += part.weight * found.reward
            metrics[part.name] = found.reward
            metrics |= {f"{part.name}/{key}": value for key, value in found.metrics.items()}
            successes += [] if found.is_success is None else [found.is_success]
        return JudgeOutput(reward, metrics, all(successes) if successes else None)


def weighted(*parts: tuple[Any, float], **named: float) -> Weighted:
    """A judge whose reward is a weighted sum: ``weighted(math_answer=0.9, format=0.1)``.

    Every part's reward is a metric under the part's name, its own metrics come below that. The task
    is solved when every part that says so says yes.

    Args:
        parts: (judge, weight): a judge in any form that ``load_judge`` takes, a reward function, or
            an object with AgentScope's ``MetricBase`` shape: an async call that returns something
            with ``result``.
        named: weights of registered judges (``@judge``), by name.

    Raises:
        ConfigError: no part, a weight that is no number, a judge that cannot be had, two parts
            of one name.
    """
    made: list[_Part] = []
    for found, weight in [*parts, *named.items()]:
        name = _name(found)
        where = f"weighted: {name}"
        if name in [part.name for part in made]:
            raise ConfigError(f"weighted: two parts are named {name!r}; give one another name")
        try:
            number = finite(weight, "its weight")
        except ValueError as error:
            raise ConfigError(f"{where}: {error}; write weighted({name}=0.5)") from None
        made.append(_Part(name, load_judge(found, where), number))
    if not made:
        raise ConfigError("weighted has no parts; write weighted(math_answer=0.9, format=0.1)")
    return Weighted(tuple(made))


def _name(found: Any) -> str:
    if isinstance(found, str):
        return re.split(r"->|:", found)[-1].strip()
    named = getattr(found, "name", None)
    return named if isinstance(named, str) and named else describe(found).rpartition(":")[2]


def _answer(case: JudgeCase) -> str:
    registered = case.metadata.get("final_answer") if isinstance(case.metadata, Mapping) else None
    return (case.response_text if registered is None else str(registered)).strip()


def _gold(case: JudgeCase) -> str:
    found = case.ground_truth
    if found is None or found == "":
        found = case.task.get("answer") if isinstance(case.task, Mapping) else None
    if found is None or not str(found).strip():
        columns = (
            ", ".join(map(str, case.task)) if isinstance(case.task, Mapping) else short(case.task)
        )
        raise JudgeError(
            f"the row has no ground truth (its columns: {columns}); name the column that holds it "
            "in the field map of the dataset, or set reward_model.ground_truth in the row"
        )
    text = str(found).rpartition("####")[2].strip()
    return last_box(text) or text
