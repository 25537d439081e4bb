"""Checks and judges inside agent runs: forced rewards, stopped runs, masked turns, judge errors."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph

from chatlearn.config.runtime_args import CheckArgs
from chatlearn.errors import JudgeError
from chatlearn.models.agent import BaseAgentGraph
from chatlearn.models.agent.rollout_manager import RolloutManager
from chatlearn.observability.metrics import eval_metrics, rollout_metrics
from chatlearn.rewards.checks import load_checks
from chatlearn.rewards.judges import MathAnswerAndLlm
from chatlearn.rewards.registry import load_function
from chatlearn.types import Group, Outcome

LOOP = "no " * 60
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'


class TwoCalls(BaseAgentGraph):
    """Answers, and answers again; a failure of the first call does not end it."""

    def build_graph(self):
        async def first(state: MessagesState):
            try:
                return {"messages": [await self.llm.ainvoke(state["messages"])]}
            except Exception as error:
                return {"messages": [{"role": "user", "content": f"failed: {error}"}]}

        async def second(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"])]}

        graph = StateGraph(MessagesState)
        graph.add_node("first", first)
        graph.add_node("second", second)
        graph.add_edge(START, "first")
        graph.add_edge("first", "second")
        return graph


@tool
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


class OneToolCall(BaseAgentGraph):
    def build_graph(self):
        async def answer(state: MessagesState):
            return {"messages": [await self.llm.bind_tools([add]).ainvoke(state["messages"])]}

        graph = StateGraph(MessagesState)
        graph.add_node("answer", answer)
        graph.add_edge(START, "answer")
        return graph


def checks(**entry):
    return load_checks([CheckArgs(**entry)])


def always_1(response):
    return 1.0


def test_a_run_without_findings_is_scored_as_ever(run_graph):
    found = run_graph(
        TwoCalls, ["4", "four"], reward_function=always_1, checks=checks(name="repetition")
    )
    assert (found.outcome, found.reward) == (Outcome.FINISHED, 1.0)
    assert found.metrics["checks/repetition"] == 0.0


def test_degenerate_output_earns_the_reward_of_the_check(run_graph):
    def never(response):
        raise AssertionError("no judge is asked")

    found = run_graph(
        TwoCalls, ["4", LOOP], reward_function=never, checks=checks(name="repetition", reward=-1.0)
    )
    assert (found.outcome, found.reward) == (Outcome.FINISHED, -1.0)
    assert found.metrics["checks/repetition"] == 1.0


class RewardsItself(TwoCalls):
    async def run(self, **kwargs):
        state = await self.graph.ainvoke({"messages": kwargs["messages"]})
        return {**state, "reward": 1.0, "node_rewards": {"first": 1.0}, "turn_rewards": {1: 1.0}}


def test_the_reward_of_a_check_wins_over_the_agents(run_graph):
    found = run_graph(RewardsItself, ["4", LOOP], checks=checks(name="repetition"))
    assert (found.reward, found.node_rewards, found.turn_rewards) == (0.0, {}, {})
    assert [turn.reward for turn in found.turns] == [None, None]


def test_a_stopped_run_is_truncated_even_where_the_graph_goes_on(run_graph):
    found = run_graph(
        TwoCalls,
        [LOOP, "four"],
        reward_function=always_1,
        checks=checks(name="repetition", action="stop", reward=-0.5),
    )
    assert (found.outcome, found.reward, len(found.turns)) == (Outcome.TRUNCATED, -0.5, 1)
    assert "check 'repetition' (runtime_args.checks) ended the run" in found.error
    assert found.is_trainable


def test_a_masked_turn_is_context(run_graph):
    found = run_graph(
        TwoCalls,
        [LOOP, "four"],
        reward_function=always_1,
        checks=checks(name="repetition", action="mask"),
    )
    assert [turn.excluded for turn in found.turns] == ["check: repetition", ""]
    assert (found.outcome, found.reward) == (Outcome.FINISHED, 1.0)


def test_a_run_masked_whole_is_not_trained_and_did_not_fail(run_graph):
    found = run_graph(
        TwoCalls,
        [LOOP, LOOP],
        reward_function=always_1,
        checks=checks(name="repetition", action="mask"),
    )
    assert (found.outcome, found.reward, found.error) == (Outcome.FINISHED, 1.0, None)
    assert not found.is_trainable
    fine = run_graph(TwoCalls, ["4", "four"], reward_function=always_1)

    async def replay(task, *, sampling, budget, session):
        return found if session.run.startswith("0") else fine

    class Stream:
        def take(self):
            return 0, found.task

        def finish(self, ticket):
            pass

    async def one_episode():
        async with RolloutManager(
            replay,
            Stream(),
            sampling=None,
            budget=None,
            group_size=3,
            groups_per_episode=1,
            max_staleness=0,
            max_concurrent_rollouts=3,
            max_failed_fraction=0.0,
        ) as manager:
            (group,) = await manager.next_groups()
            return group, manager.metrics()

    group, metrics = asyncio.run(one_episode())
    assert group.trainable == [fine, fine]
    assert metrics["rollout/failed"] == 0.0


@pytest.mark.parametrize(
    ("answer", "rate"),
    [("four", 0.0), (ADD, 0.0), (ADD.replace("add", "sum"), 1.0), (ADD.replace("}}", ""), 1.0)],
)
def test_wrong_tool_calls_are_seen_as_they_were_written(run_graph, answer, rate):
    found = run_graph(
        OneToolCall, [answer], reward_function=always_1, checks=checks(name="wrong_toolcall")
    )
    assert (found.metrics["checks/wrong_toolcall"], found.reward) == (rate, 1.0 - rate)


def test_a_check_that_fails_is_a_judge_error_even_where_the_graph_catches_it(run_graph, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def broken(text):\n    return 0.0 if text == 'four' else 1 / 0\n")
    found = run_graph(
        TwoCalls, ["4", "four"], reward_function=always_1, checks=checks(name=f"{file}->broken")
    )
    assert (found.outcome, found.reward) == (Outcome.JUDGE_ERROR, None)
    assert "check 'broken' (runtime_args.checks) raised ZeroDivisionError" in found.error


def test_the_rate_of_a_check_is_a_metric(run_graph):
    repeats = checks(name="repetition", action="mask")
    runs = [
        run_graph(TwoCalls, ["4", text], reward_function=always_1, checks=repeats)
        for text in ("four", LOOP)
    ]
    group = Group(runs[0].task, runs)
    assert rollout_metrics([group])["checks/repetition"] == 0.5
    assert eval_metrics([group], 2)["eval/checks/repetition"] == 0.5


class JudgesItself(TwoCalls):
    async def run(self, **kwargs):
        await self.graph.ainvoke({"messages": kwargs["messages"]})
        raise JudgeError("the judge of the workflow raised")


def test_a_judge_that_fails_inside_the_run_is_a_judge_error(run_graph):
    found = run_graph(JudgesItself, ["4", "four"], reward_function=always_1)
    assert (found.outcome, found.reward) == (Outcome.JUDGE_ERROR, None)
    assert found.error == "the judge of the workflow raised"


def test_a_built_in_judge_is_a_reward_function_with_auxiliary_models(run_graph):
    model = FakeListChatModel(responses=["The same.\nVERDICT: CORRECT"])
    found = run_graph(
        TwoCalls,
        ["let me see", "twice two"],
        reward_function=MathAnswerAndLlm(),
        auxiliary_models={"judge": model},
    )
    assert (found.outcome, found.reward, found.error) == (Outcome.FINISHED, 1.0, None)
    assert found.metrics["judge/agreement"] == 0.0
    assert found.metrics["success"] == 1.0


def test_a_built_in_judge_is_named_as_any_reward_function(run_graph):
    function = load_function("chatlearn.rewards.judges:math_answer", "reward_fn")
    assert run_graph(TwoCalls, ["so", "it is 4"], reward_function=function).reward == 1.0
