"""The built-in judges: mathematics, mathematics with a language model, weighted sums."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from chatlearn.errors import ConfigError, JudgeError
from chatlearn.rewards import JudgeCase, JudgeOutput, judge, load_judge
from chatlearn.rewards.judges import MathAnswerAndLlm, math_answer, weighted
from chatlearn.rewards.llm import LlmJudge
from chatlearn.rewards.math import math_reward


def case(answer="", truth="4", *, registered=None, row=None, **fields):
    metadata = {} if registered is None else {"final_answer": registered}
    return JudgeCase(row or {}, answer, metadata, "2+2?", truth, **fields)


@pytest.mark.parametrize(
    ("answer", "truth", "is_success"),
    [
        ("so \\boxed{4}", "4", True),
        ("The answer is 4.", "4", True),
        ("4", "4", True),
        ("4.0", "#### 4", True),
        ("1,000", "1000", True),
        ("\\frac{1}{2}", "0.5", True),
        ("x^2 + 4", "4", False),
        ("4 or 5", "5", False),
        ("it is 4", "4", True),
        ("I do not know", "4", False),
        ("", "4", False),
        ("\\boxed{\\frac{1}{2}}", "It is \\boxed{\\frac12}.", True),
        ("12*4=<<12*4=48>>48\n#### 48", "He has 12*4=48.\n#### 48", True),
    ],
)
def test_a_math_answer(answer, truth, is_success):
    for one in (case(answer, truth), case("no idea: 7", truth, registered=answer)):
        found = math_answer(one)
        assert (found.reward, found.is_success) == (float(is_success), is_success)


def test_the_ground_truth_may_be_the_column_answer_and_is_never_guessed():
    assert math_answer(case("72", None, row={"answer": "...\n#### 72"})).reward == 1.0
    with pytest.raises(JudgeError, match=r"no ground truth \(its columns: question, solution\)"):
        math_answer(case("72", None, row={"question": "q", "solution": "72"}))


class Model:
    """A chat model of LangChain's shape that says what it is told to, in turn."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.prompts = []

    async def ainvoke(self, messages):
        self.prompts.append(messages[0]["content"])
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, float):
            await asyncio.sleep(reply)
        return SimpleNamespace(content=reply)


class AgentScopeModel(Model):
    """One of AgentScope's shape, which is called."""

    ainvoke = property()

    async def __call__(self, messages):
        text = self.replies.pop(0)
        return SimpleNamespace(content=[{"type": "text", "text": text}])


YES, NO = "It is the same.\n**VERDICT: CORRECT**", "Not so.\nVerdict: incorrect."
FAST = LlmJudge(backoff_s=0.0, timeout_s=0.05)


async def test_the_model_is_asked_where_the_rule_says_no():
    model = Model(YES, NO)
    both = load_judge(MathAnswerAndLlm(FAST), "judge")
    models = {"judge": model}

    assert await both(case("4", auxiliary_models=models)) == JudgeOutput(
        1.0, {"answered": 1.0, "judge/asked": 0.0}, True
    )
    assert await both(case("twice two", auxiliary_models=models)) == JudgeOutput(
        1.0,
        {"answered": 0.0, "judge/asked": 1.0, "judge/agreement": 0.0, "judge/retries": 0.0},
        True,
    )
    assert (await both(case("5", auxiliary_models=models))).metrics["judge/agreement"] == 1.0
    assert (await both(case("", auxiliary_models=models))).metrics["judge/asked"] == 0.0
    assert "2+2?" in model.prompts[0]
    assert "twice two" in model.prompts[0]
    assert len(model.prompts) == 2


async def test_failures_refusals_and_silence_are_asked_again():
    model = Model(OSError("no route"), 1.0, "I cannot help with that.", YES)
    found = await LlmJudge(attempts=4, backoff_s=0.0, timeout_s=0.05)(
        case("4", auxiliary_models={"any": model})
    )
    assert found == JudgeOutput(1.0, {"judge/retries": 3.0}, True)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (OSError("no route"), "raised OSError: no route"),
        (1.0, r"took longer than 0\.05 seconds"),
        ("I cannot help with that.", "gave no verdict: 'I cannot help"),
        ("VERDICT: CORRECT or VERDICT: INCORRECT", "gave no verdict"),
        ("VERDICT: CORRECT\nVERDICT: INCORRECT", "gave no verdict"),
        ("VERDICT: not correct", "gave no verdict"),
    ],
)
async def test_without_a_verdict_there_is_no_reward(reply, said):
    with pytest.raises(JudgeError, match=f"'judge' did not judge in 2 attempts; the last .*{said}"):
        await LlmJudge(attempts=2, backoff_s=0.0, timeout_s=0.05)(
            case("4", auxiliary_models={"judge": Model(reply, reply)})
        )


async def test_waits_double():
    model, started = Model("?", "?", "?"), asyncio.get_running_loop().time()
    with pytest.raises(JudgeError):
        await LlmJudge(backoff_s=0.05)(case("4", auxiliary_models={"judge": model}))
    assert 0.15 <= asyncio.get_running_loop().time() - started < 1.0


async def test_a_model_of_agentscope_is_called():
    found = await FAST(case("4", auxiliary_models={"judge": AgentScopeModel(YES)}))
    assert found.reward == 1.0


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({}, "no auxiliary model 'judge'; runtime_args.auxiliary_models has none"),
        ({"a": 1, "judgy": 2}, "no auxiliary model 'judge'; did you mean 'judgy'"),
        ({"judge": 5}, "is int; it must be a chat model"),
    ],
)
async def test_a_missing_model_is_named(models, said):
    with pytest.raises(JudgeError, match=said):
        await FAST(case("4", auxiliary_models=models))


def test_a_wrong_prompt_is_refused_at_once():
    with pytest.raises(ConfigError, match="filling in its prompt raised KeyError: 'reference'"):
        LlmJudge(prompt="{reference} {answer}")
    with pytest.raises(ConfigError, match="needs one attempt"):
        LlmJudge(attempts=0)


@judge("test-short")
def short(response):
    return 1.0 if len(response) < 20 else 0.0, {"length": len(response)}


class Polite:
    name = "polite"

    async def __call__(self, solution):
        return SimpleNamespace(result=float("please" in solution.output))


async def test_a_weighted_sum_of_judges_functions_and_metrics():
    mix = weighted(("test-short", 0.5), (math_reward, 2.0), (Polite(), 0.25), math_answer=1.0)
    found = await load_judge(mix, "judge")(case("please: \\boxed{4}"))
    assert found == JudgeOutput(
        3.75,
        {
            "test-short": 1.0,
            "test-short/length": 17.0,
            "math_reward": 1.0,
            "math_reward/answered": 1.0,
            "polite": 1.0,
            "math_answer": 1.0,
            "math_answer/answered": 1.0,
        },
        True,
    )


async def test_one_part_that_fails_fails_the_sum():
    mix = load_judge(weighted((lambda task: float("nan"), 0.1), math_answer=0.9), "judge")
    with pytest.raises(JudgeError, match="reward is no finite number but nan"):
        await mix(case("4"))


@pytest.mark.parametrize(
    ("parts", "named", "said"),
    [
        ((), {}, "weighted has no parts"),
        ((), {"math_anser": 0.9}, "no judge 'math_anser'; did you mean 'math_answer'"),
        ((), {"math_answer": "0.9"}, "its weight is no finite number but '0.9'"),
        ((("math_answer", 0.5), (math_answer, 0.5)), {}, "two parts are named 'math_answer'"),
    ],
)
def test_a_wrong_sum_is_refused(parts, named, said):
    with pytest.raises(ConfigError, match=said):
        weighted(*parts, **named)
