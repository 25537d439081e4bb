"""Calling a reward: what it is given, where it runs, and which results are refused."""

import asyncio
import contextvars
import functools
import threading

import numpy as np
import pytest

from chatlearn.errors import EngineError, JudgeError
from chatlearn.rewards import final_response, score
from chatlearn.types import Score, Task, Trajectory

MESSAGES = [
    {"role": "user", "content": "Compute 3*4."},
    {"role": "assistant", "content": "12"},
]
TASK = Task(
    "d:0",
    MESSAGES[:1],
    "calculator",
    None,
    "my/sums",
    "12",
    {"level": 5, "extra_info": {"index": 7}, "response": "a column of this name is hidden"},
)
TRAJECTORY = Trajectory(task=TASK, messages=MESSAGES)


async def scored(function):
    return await score(function, trajectory=TRAJECTORY, task=TASK)


async def test_a_function_gets_the_parameters_it_declares():
    def mine(response, ground_truth, *, level, absent="default"):
        assert absent == "default"
        return float(response == ground_truth) + level

    assert await scored(mine) == Score(6.0)


async def test_a_function_with_kwargs_gets_everything():
    got = {}

    def mine(response, **rest):
        got.update(rest, response=response)
        return 0

    await scored(mine)
    assert got.pop("judge_case").response_text == "12"
    assert got == {
        "response": "12",
        "messages": MESSAGES,
        "ground_truth": "12",
        "data_source": "my/sums",
        "trajectory": TRAJECTORY,
        "level": 5,
        "extra_info": {"index": 7},
        "prompt": MESSAGES[:1],
        "uid": "d:0",
        "agent_name": "calculator",
        "agent_cfg_path": None,
        "auxiliary_models": {},
    }


@pytest.mark.parametrize(
    "function", [lambda answer: 1.0, lambda answer, **_: 1.0, lambda answer, /, **_: 1.0]
)
async def test_a_parameter_nobody_supplies_is_named(function):
    with pytest.raises(JudgeError, match=r"task d:0 asks for answer.*extra_info.*level"):
        await scored(function)


async def test_coroutine_functions_run_in_the_loop_and_plain_ones_beside_it():
    loop_thread = threading.current_thread()

    async def in_loop(**_):
        await asyncio.sleep(0)
        return float(threading.current_thread() is loop_thread)

    class Judge:
        async def __call__(self, response):
            return float(threading.current_thread() is loop_thread)

    def in_thread(**_):
        return float(threading.current_thread() is loop_thread)

    assert (await scored(in_loop)).reward == 1.0
    assert (await scored(Judge())).reward == 1.0
    assert (await scored(functools.partial(in_loop, weight=2))).reward == 1.0
    assert (await scored(lambda response: in_loop())).reward == 1.0, "a plain one may return one"
    assert (await scored(in_thread)).reward == 0.0


async def test_plain_functions_do_not_hold_the_loop_up_and_see_its_context():
    run = contextvars.ContextVar("run")
    met = threading.Barrier(3, timeout=10)

    def meets(**_):
        met.wait()  # passes only when three run at the same time
        return run.get()

    async def one(number):
        run.set(number)
        return (await scored(meets)).reward

    assert await asyncio.gather(one(1), one(2), one(3)) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("result", "reward"),
    [
        (1, 1.0),
        (True, 1.0),
        (-0.5, -0.5),
        (np.float32(0.25), 0.25),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
    ],
)
async def test_numbers_of_any_kind_are_rewards(result, reward):
    found = await scored(lambda: result)
    assert (found, type(found.reward)) == (Score(reward), float)
    assert await scored(lambda: (result, {"m": result})) == Score(reward, {"m": reward})
    parts = Score(result, {"m": result}, {"team/*": result}, {3: result, "run-1": result})
    found = await scored(lambda: parts)
    assert found == Score(reward, {"m": reward}, {"team/*": reward}, {3: reward, "run-1": reward})
    assert type(found.node_rewards["team/*"]) is type(found.turn_rewards[3]) is float


@pytest.mark.parametrize(
    "result",
    [
        None,
        "1.0",
        np.str_("1"),
        float("nan"),
        float("inf"),
        np.float64("-inf"),
        10**400,
        1j,
        [1.0],
        {"reward": 1.0},
        np.array([1.0, 2.0]),
        (),
        (1.0,),
        (1.0, 2.0),
        (1.0, None),
        (1.0, {}, {}),
        (None, {}),
        (1.0, {"m": None}),
        (1.0, {"m": float("nan")}),
        (1.0, {3: 1.0}),
        (Score(1.0), {}),
        Score(None),
        Score(float("nan")),
    ],
)
async def test_everything_else_is_a_judge_error_and_never_zero(result):
    def my_judge():
        return result

    with pytest.raises(JudgeError, match=r"(?s)my_judge of task d:0 returned .*number"):
        await scored(my_judge)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (Score(None, {}, {"n": 1.0}), "reward is no finite number but None"),
        (Score(1.0, {"m": "1"}), r"metrics\['m'\] is no finite number but '1'"),
        (Score(1.0, {}, {"n": float("inf")}), r"node_rewards\['n'\] is no finite number but inf"),
        (Score(1.0, {}, {3: 1.0}), "node_rewards has the key 3, which is no str"),
        (Score(1.0, {}, [1.0]), r"node_rewards is no dictionary but \[1.0\]"),
        (Score(1.0, {}, {}, {0: None}), r"turn_rewards\[0\] is no finite number but None"),
        (Score(1.0, {}, {}, {0.5: 1.0}), "turn_rewards has the key 0.5, which is no int or str"),
        (Score(1.0, {}, {}, {True: 1.0}), "turn_rewards has the key True, which is no int or str"),
        ((1.0, None), "metrics is no dictionary but None"),
        ((1.0, {}, {}), "returns a number"),
    ],
)
async def test_a_wrong_part_is_named(result, words):
    with pytest.raises(JudgeError, match=f"task d:0 returned .*{words}.*a JudgeOutput$"):
        await scored(lambda: result)


class Unprintable:
    def __repr__(self):
        raise OSError("no repr")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("bad row"), JudgeError),
        (StopIteration("in a thread, this would hang a future"), JudgeError),
        (TimeoutError("slow"), JudgeError),
        (EngineError("the judge model is down"), EngineError),
    ],
)
async def test_what_user_code_raises_is_a_judge_error_with_its_traceback(error, kind):
    def plain():
        raise error

    async def coroutine():
        raise ValueError("bad row")

    with pytest.raises(kind, match=str(error)):
        await asyncio.wait_for(scored(plain), 10)
    with pytest.raises(
        JudgeError, match=r"coroutine of task d:0 raised ValueError[\s\S]*raise Val"
    ):
        await scored(coroutine)
    with pytest.raises(JudgeError, match=r"returned <Unprintable instance .*finite number but"):
        await scored(lambda: Unprintable())


CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
TOOL = {"role": "tool", "content": "12", "tool_call_id": "1"}


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (MESSAGES, "12"),
        ([], ""),
        (MESSAGES[:1], ""),
        ([*MESSAGES, CALL, TOOL], ""),
        ([*MESSAGES, CALL, TOOL, {"role": "assistant", "content": "So 12."}], "So 12."),
        ([{"role": "assistant", "content": "I say 3."}, TOOL], "I say 3."),
        ([*MESSAGES, {"role": "user", "content": "Sure?"}], "12"),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant"}], ""),
        (
            [
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "text": "hidden"},
                        {"type": "text", "text": "a"},
                        {"type": "image_url", "image_url": {}},
                        "b",
                        {"type": "text", "text": None},
                    ],
                }
            ],
            "ab",
        ),
    ],
)
def test_the_answer_is_the_last_assistant_message_and_never_a_tools(messages, text):
    assert final_response(messages) == text
