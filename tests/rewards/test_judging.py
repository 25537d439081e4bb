"""Judges in every form users have them, refused when loaded wrongly, never 0 when they fail."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from chatlearn.errors import ConfigError, JudgeError
from chatlearn.rewards import BaseJudge, JudgeCase, JudgeOutput, judge, load_judge, score
from chatlearn.rewards.responses import response_text
from chatlearn.types import Score, Task, Trajectory

ROW = {"question": "2+2?", "answer": "4", "level": 1}
MESSAGES = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "let me see"},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "it is 4"},
]
CASE = JudgeCase(
    task=ROW,
    response=SimpleNamespace(content="it is 4", number=4),
    metadata={"final_answer": "4"},
    query="2+2?",
    ground_truth="4",
    messages=MESSAGES,
    environment="the environment",
    auxiliary_models={"big": "a model"},
)


async def judged(spec, case=CASE, **settings):
    return await load_judge(spec, "judge", **settings)(case)


async def as_agentscope(task, response, auxiliary_models):
    assert (task, auxiliary_models) == (ROW, {"big": "a model"})
    return float(response.number == int(task["answer"]))


async def as_agentscope_with_logger(task, response, auxiliary_models=None, logger=None):
    logger.debug("judging")
    return 1.0


def as_a_reward(response, ground_truth, *, level, **_):
    return float(response == "it is 4" and ground_truth == "4" and level == 1)


class AsAgentJet(BaseJudge):
    def compute_reward(self, workflow_task, workflow_output):
        assert workflow_task.task.main_query == "2+2?"
        right = workflow_output.metadata["final_answer"] == workflow_task.task.metadata["answer"]
        return (1.0, True) if right else (0.0, False)


class WithOtherNames:
    def __init__(self, config):
        self.config = config

    async def compute_reward(self, job, found):
        return found.metadata["final_answer"] == job.task.metadata["answer"]


class AsAstune:
    def compute_reward(self, judge_input_dictionary):
        assert judge_input_dictionary["env"] == "the environment"
        assert judge_input_dictionary["task_core_arg"].task.metadata == ROW
        assert judge_input_dictionary["grouped_steps"] == [MESSAGES[:2], MESSAGES[:4]]
        return 1.0, judge_input_dictionary["final_answer"] == "4"


class AsMetric:
    """AgentScope's MetricBase: a metric with a name, called with a solution."""

    name = "short"

    async def __call__(self, solution):
        return SimpleNamespace(name=self.name, result=1.0 / solution.output.number)


@pytest.mark.parametrize(
    ("form", "reward", "is_success"),
    [
        (as_agentscope, 1.0, None),
        (as_agentscope_with_logger, 1.0, None),
        (as_a_reward, 1.0, None),
        (lambda response, messages, turns, query: len(messages), 4.0, None),
        (lambda judge_case: judge_case.response.number, 4.0, None),
        (AsAgentJet, 1.0, True),
        (AsAgentJet(), 1.0, True),
        (WithOtherNames, 1.0, None),
        (AsAstune, 1.0, True),
        (AsMetric(), 0.25, None),
    ],
)
async def test_every_form_is_called_as_its_users_call_it(form, reward, is_success):
    columns = ("level",) if form is as_a_reward else ()
    assert await judged(form, columns=columns) == JudgeOutput(reward, {}, is_success)


@dataclass
class TheirOutput:
    reward: float
    metrics: dict | None = field(default=None)


@pytest.mark.parametrize(
    ("returned", "read"),
    [
        (1, JudgeOutput(1.0)),
        (np.float32(0.5), JudgeOutput(0.5)),
        (True, JudgeOutput(1.0)),
        ((0.5, True), JudgeOutput(0.5, {}, True)),
        ((0.5, np.bool_(False)), JudgeOutput(0.5, {}, False)),
        ((0.5, {"format": 1}), JudgeOutput(0.5, {"format": 1.0})),
        (JudgeOutput(0.5, {"a": 2.0}, True), JudgeOutput(0.5, {"a": 2.0}, True)),
        (TheirOutput(0.5), JudgeOutput(0.5)),
        (TheirOutput(0.5, {"a": 2}), JudgeOutput(0.5, {"a": 2.0})),
        (Score(0.5, {"a": 2.0}), JudgeOutput(0.5, {"a": 2.0})),
    ],
)
async def test_every_form_of_output_is_read(returned, read):
    assert await judged(lambda task: returned) == read


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (math.nan, "reward is no finite number but nan"),
        (None, "reward is no finite number but None"),
        ("1.0", "reward is no finite number but '1.0'"),
        ((math.inf, True), "reward is no finite number but inf"),
        ((1.0, "yes"), "is_success is no finite number but 'yes'"),
        ((1.0, 0.7), "is_success is 0.7, neither true nor false"),
        ((1.0, True, {}), "reward is no finite number"),
        (JudgeOutput(1.0, {"a": math.nan}), r"metrics\['a'\] is no finite number"),
        (JudgeOutput(1.0, [1.0]), "metrics is no dictionary"),
        (Score(1.0, {}, {"writer": 1.0}), "come from a reward function"),
    ],
)
async def test_what_is_no_number_is_an_error_and_never_0(returned, said):
    with pytest.raises(JudgeError, match=f"judge .*<lambda> returned .*{said}"):
        await judged(lambda task: returned)


async def test_a_judge_that_raises_is_named_with_its_traceback():
    def broken(task):
        return 1 / len({})

    with pytest.raises(
        JudgeError, match=r"(?s)judge .*broken raised ZeroDivisionError.*return 1 /"
    ):
        await judged(broken)


async def test_a_judge_that_takes_too_long_is_an_error():
    async def slow(task):
        await asyncio.sleep(30)

    with pytest.raises(JudgeError, match=r"slow took longer than 0\.05 seconds"):
        await judged(slow, timeout_s=0.05)


class NeedsMore:
    def __init__(self, model, config):
        raise AssertionError("never built")

    def compute_reward(self, a, b):
        return 1.0


class ThreeParameters:
    def compute_reward(self, task, output, extra):
        return 1.0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (lambda task, answer: 1.0, r"parameters \(task, answer\); nobody supplies answer"),
        (lambda task, /: 1.0, "nobody supplies task"),
        (lambda row, output: 1.0, "It may have task, response, auxiliary_models"),
        (NeedsMore, r"built with \(model, config\); a judge's constructor takes nothing or config"),
        (ThreeParameters, r"parameters \(task, output, extra\); nobody supplies output, extra"),
        (5, "is int; a judge is a function"),
        ("math_anser", "no judge 'math_anser'; did you mean 'math_answer'"),
        ("nowhere->Judge", "there is no module 'nowhere'"),
        ("chatlearn.rewards.judges->math_anser", "did you mean 'math_answer'"),
        ("missing.py->Judge", r"there is no file .*missing\.py"),
        ("json->loads", "parameters .*nobody supplies s"),
    ],
)
def test_a_wrong_judge_is_refused_when_it_is_loaded(spec, said):
    with pytest.raises(ConfigError, match=said):
        load_judge(spec, "task_judge.judge_protocol")


async def test_judges_are_named_by_file_by_module_and_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from chatlearn.rewards import judge\n"
        "class Mine:\n    def compute_reward(self, task, output):\n        return 0.25\n"
        "ready = Mine()\n"
        "@judge('test-format')\ndef form(task):\n    return 0.5\n"
    )
    for spec, reward in (
        (f"{file}->Mine", 0.25),
        (f"{file} -> ready", 0.25),
        (f"{file}:form", 0.5),
        ("test-format", 0.5),
        ("chatlearn.rewards.judges->math_answer", 1.0),
        ("chatlearn.rewards.judges:math_answer", 1.0),
        ("math_answer", 1.0),
    ):
        assert (await judged(spec)).reward == reward
    with pytest.raises(ConfigError, match="two judges are named 'test-format'"):
        judge("test-format")(as_agentscope)


@pytest.mark.parametrize(
    "spec",
    [
        "ajet.task_judge.math_answer_as_judge->MathAnswerAsJudge",
        "astuner.task_judge.math_answer_as_judge->MathAnswerAsJudge",
        "astune.task_judge.math_answer_as_judge->MathAnswerAsJudge",
        "tutorial.example_math_agent.math_answer_as_judge->MathAnswerAsJudge",
    ],
)
async def test_their_math_judge_is_ours(spec, caplog):
    caplog.set_level("INFO")
    assert (await judged(spec)).is_success is True
    assert caplog.messages == [f"judge: {spec} is this package's judge 'math_answer'"]


async def test_their_name_in_a_file_of_the_user_is_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "test_judging_own"
    folder.mkdir()
    (folder / "math_answer_as_judge.py").write_text(
        "def MathAnswerAsJudge(task):\n    return 0.75\n"
    )
    spec = "test_judging_own.math_answer_as_judge->MathAnswerAsJudge"
    assert (await judged(spec)).reward == 0.75


@pytest.mark.parametrize(
    ("response", "text"),
    [
        (None, ""),
        ("4", "4"),
        (4, "4"),
        ({"role": "assistant", "content": "4"}, "4"),
        (SimpleNamespace(content=[{"type": "text", "text": "4"}, {"type": "image"}]), "4"),
        (MESSAGES, "it is 4"),
        ({"messages": MESSAGES}, "it is 4"),
        ([SimpleNamespace(type="ai", content="4"), SimpleNamespace(type="tool", content="5")], "4"),
        ([{"type": "text", "text": "4"}], "4"),
        ({"answer": 4}, "{'answer': 4}"),
    ],
)
def test_the_text_of_any_response(response, text):
    assert response_text(response) == text


def test_without_a_response_the_last_assistant_message_is_judged():
    assert JudgeCase(ROW, messages=MESSAGES).response_text == "it is 4"


async def test_a_judge_is_a_reward_function_too():
    task = Task("d:0", MESSAGES[:1], "a", None, "test", "4", {"level": 1})
    trajectory = Trajectory(task=task, messages=MESSAGES)

    async def mine(judge_case, auxiliary_models):
        assert (judge_case.query, judge_case.ground_truth) == ("2+2?", "4")
        assert judge_case.auxiliary_models is auxiliary_models
        return JudgeOutput(float(judge_case.response_text == "it is 4"), {"m": 2.0}, True)

    models = {"big": "a model"}
    found = await score(mine, trajectory=trajectory, task=task, auxiliary_models=models)
    assert found == Score(1.0, {"success": 1.0, "m": 2.0})
