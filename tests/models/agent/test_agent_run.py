"""Every way a run can end has its name, and a failure is never a number (laws 4 and 9)."""

from __future__ import annotations

import asyncio
import time

import pytest
from langgraph.graph import START, MessagesState, StateGraph

from chatlearn.errors import AgentError, EngineError
from chatlearn.models.agent import AgentGraphOutput, BaseAgentGraph
from chatlearn.types import Budget, Outcome


class OneCall(BaseAgentGraph):
    def build_graph(self):
        async def answer(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"])]}

        graph = StateGraph(MessagesState)
        graph.add_node("answer", answer)
        graph.add_edge(START, "answer")
        return graph


def agent_whose_run(body):
    """An agent with the graph of ``OneCall`` and ``body`` as its run."""
    return type("Agent", (OneCall,), {"run": body})


async def raises(self, **kwargs):
    await self.graph.ainvoke({"messages": kwargs["messages"]})
    raise KeyError("no such key")


async def hangs(self, **kwargs):
    await asyncio.sleep(60)


def hangs_in_a_thread(self, **kwargs):
    time.sleep(1.0)
    return {}


async def returns_a_string(self, **kwargs):
    await self.llm.ainvoke("hello")
    return "4"


async def returns_nothing(self, **kwargs):
    await self.llm.ainvoke("hello")


async def never_asks(self, **kwargs):
    return {"messages": []}


async def rewards_nan(self, **kwargs):
    state = await self.graph.ainvoke({"messages": kwargs["messages"]})
    return {**state, "reward": float("nan")}


@pytest.mark.parametrize(
    ("body", "outcome", "said"),
    [
        (raises, Outcome.AGENT_ERROR, "raised KeyError: 'no such key'"),
        (hangs, Outcome.TIMEOUT, "runtime_args.agent_timeout_s=0.3"),
        (hangs_in_a_thread, Outcome.TIMEOUT, "runtime_args.agent_timeout_s=0.3"),
        (returns_a_string, Outcome.AGENT_ERROR, "returned str; run() must return"),
        (returns_nothing, Outcome.AGENT_ERROR, "returned NoneType; run() must return"),
        (never_asks, Outcome.AGENT_ERROR, "without one call of self.llm"),
        (rewards_nan, Outcome.AGENT_ERROR, "is nan; it must be a finite number"),
    ],
)
def test_a_broken_agent_is_named_and_not_scored(run_graph, body, outcome, said):
    trajectory = run_graph(agent_whose_run(body), ["4"], reward_function=lambda: 1.0, timeout_s=0.3)

    assert trajectory.outcome is outcome
    assert said in trajectory.error
    assert trajectory.reward is None
    assert not trajectory.is_trainable


def test_the_traceback_of_user_code_is_kept(run_graph):
    trajectory = run_graph(agent_whose_run(raises), ["4"])
    assert 'raise KeyError("no such key")' in trajectory.error


def nan(response):
    return float("nan")


def nothing(response):
    return None


def broken(response):
    raise ValueError("the judge is down")


@pytest.mark.parametrize("judge", [nan, nothing, broken])
def test_a_broken_judge_is_not_the_policys_fault(run_graph, judge):
    trajectory = run_graph(OneCall, ["4"], reward_function=judge)
    assert trajectory.outcome is Outcome.JUDGE_ERROR
    assert judge.__name__ in trajectory.error
    assert trajectory.reward is None


def test_no_reward_at_all_is_a_judge_error(run_graph):
    trajectory = run_graph(OneCall, ["4"], reward_function=None)
    assert trajectory.outcome is Outcome.JUDGE_ERROR
    assert "no reward function" in trajectory.error


def test_an_engine_fault_is_named_even_when_the_graph_swallows_it(run_graph):
    class Swallows(OneCall):
        async def run(self, **kwargs):
            await self.llm.ainvoke("first")
            try:
                await self.llm.ainvoke("second")
            except EngineError:
                return {"messages": [], "reward": 0.0}

    trajectory = run_graph(Swallows, ["only one answer"])
    assert trajectory.outcome is Outcome.ENGINE_ERROR
    assert trajectory.reward is None


def test_a_run_may_set_its_own_reward(run_graph):
    class Own(OneCall):
        async def run(self, **kwargs):
            await self.graph.ainvoke({"messages": kwargs["messages"]})
            return AgentGraphOutput(reward=0.25, metrics={"retries": 2})

    trajectory = run_graph(Own, ["4"], reward_function=broken)
    assert trajectory.reward == 0.25
    assert trajectory.metrics["retries"] == 2


def test_every_column_of_the_row_reaches_run(run_graph):
    seen = {}

    class Sees(OneCall):
        async def run(self, **kwargs):
            seen.update(kwargs)
            return await self.graph.ainvoke({"messages": kwargs["messages"]})

    run_graph(Sees, ["4"], fields={"level": 3}, reward_function=lambda: 1.0)
    assert seen["level"] == 3
    assert seen["ground_truth"] == "4"
    assert seen["messages"] == [{"role": "user", "content": "2+2?"}]
    assert seen["sampling_params"]["temperature"] == 1.0


class Loops(BaseAgentGraph):
    """Asks for ever."""

    def build_graph(self):
        async def answer(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"]), ("user", "more")]}

        graph = StateGraph(MessagesState)
        graph.add_node("answer", answer)
        graph.add_edge(START, "answer")
        graph.add_edge("answer", "answer")
        return graph


def test_the_recursion_limit_is_the_turn_limit(run_graph, tmp_path):
    cfg = tmp_path / "loops.yaml"
    cfg.write_text("recursion_limit: 5\n")
    trajectory = run_graph(
        Loops, ["x"] * 9, cfg=str(cfg), reward_function=lambda response: float(response == "x")
    )
    assert len(trajectory.turns) == 5
    assert trajectory.outcome is Outcome.TURN_LIMIT
    assert trajectory.reward == 1.0


def test_the_rollout_budget_truncates_and_is_scored(run_graph):
    """Three answers of 4 tokens each fit into 13; the fourth gets what is left, one token."""
    budget = Budget(turn_tokens=100, rollout_tokens=13, context_tokens=10_000)
    trajectory = run_graph(
        Loops,
        lambda prompt, sampling, session: [65] * min(4, sampling.max_new_tokens),
        budget=budget,
        reward_function=lambda: 0.0,
    )
    assert [len(turn.completion.token_ids) for turn in trajectory.turns] == [4, 4, 4, 1]
    assert trajectory.outcome is Outcome.TRUNCATED
    assert trajectory.reward == 0.0


def test_a_context_that_is_full_truncates(run_graph):
    budget = Budget(turn_tokens=100, rollout_tokens=1000, context_tokens=60)
    trajectory = run_graph(Loops, ["x" * 20] * 9, budget=budget, reward_function=lambda: 0.0)
    assert trajectory.outcome is Outcome.TRUNCATED
    assert all(len(turn.token_ids) <= 60 for turn in trajectory.turns)


def test_a_sync_node_may_call_the_model(run_graph):
    class Sync(BaseAgentGraph):
        def build_graph(self):
            def answer(state: MessagesState):
                return {"messages": [self.llm.invoke(state["messages"])]}

            graph = StateGraph(MessagesState)
            graph.add_node("answer", answer)
            graph.add_edge(START, "answer")
            return graph

    trajectory = run_graph(Sync, ["4"], reward_function=lambda response: float(response))
    assert (trajectory.outcome, trajectory.reward) == (Outcome.FINISHED, 4.0)
    assert trajectory.turns[0].node == "answer"


def test_blocking_the_event_loop_is_refused_with_the_remedy(run_graph):
    class Blocks(OneCall):
        async def run(self, **kwargs):
            return {"messages": [self.llm.invoke("hello")]}

    trajectory = run_graph(Blocks, ["4"])
    assert trajectory.outcome is Outcome.AGENT_ERROR
    assert "await self.llm.ainvoke" in trajectory.error


def test_the_policy_cannot_be_called_outside_a_run(llm):
    with pytest.raises(AgentError, match="outside an agent run"):
        llm.invoke("hello")
