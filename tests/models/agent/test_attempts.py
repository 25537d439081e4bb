"""Which calls count: a call of a node that completed does, one that was made again does not."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, RetryPolicy, interrupt

from chatlearn.models.agent import BaseAgentGraph

ONCE_MORE = RetryPolicy(initial_interval=0, jitter=False, max_attempts=2, retry_on=ValueError)
KEPT, LOST = "", "superseded"


def graph(retry=None, **nodes):
    """The nodes one after the other."""
    built = StateGraph(MessagesState)
    before = START
    for name, node in nodes.items():
        built.add_node(name, node, retry_policy=retry)
        built.add_edge(before, name)
        before = name
    return built


def fails_first():
    """A function that raises the first time it is called."""
    calls = []

    def check(message):
        calls.append(message)
        if len(calls) == 1:
            raise ValueError("not good enough")
        return message

    return check


class Asks(BaseAgentGraph):
    """``self.asks`` is a node that calls the policy once."""

    async def asks(self, state: MessagesState):
        return {"messages": [await self.llm.ainvoke(state["messages"])]}


def fate(trajectory) -> list[str]:
    assert trajectory.reward == 1.0, trajectory.error
    return [turn.excluded for turn in trajectory.turns]


def run(run_graph, agent, *answers):
    return run_graph(agent, list(answers), reward_function=lambda: 1.0)


class NodeRetried(Asks):
    def build_graph(self):
        check = fails_first()

        async def draft(state: MessagesState):
            return {"messages": [check(await self.llm.ainvoke(state["messages"]))]}

        return graph(retry=ONCE_MORE, draft=draft, refine=self.asks)


def test_the_failed_attempt_of_a_node_with_a_retry_policy_does_not_count(run_graph):
    trajectory = run(run_graph, NodeRetried, "bad", "good", "better")
    assert fate(trajectory) == [LOST, KEPT, KEPT]
    assert [turn.fork for turn in trajectory.turns] == [None, "repeat", None]


class SequenceRetried(Asks):
    def build_graph(self):
        async def node(state: MessagesState):
            chain = (self.llm | RunnableLambda(fails_first())).with_retry(
                stop_after_attempt=2, wait_exponential_jitter=False
            )
            return {"messages": [await chain.ainvoke(state["messages"])]}

        return graph(node=node)


def test_with_retry_inside_a_node_that_completed(run_graph):
    assert fate(run(run_graph, SequenceRetried, "bad", "good")) == [LOST, KEPT]


class FallsBack(Asks):
    def build_graph(self):
        async def node(state: MessagesState):
            first = self.llm | RunnableLambda(fails_first())
            other = (self.llm | RunnableLambda(lambda answer: answer)).with_config(run_name="other")
            answer = await first.with_fallbacks([other]).ainvoke(state["messages"])
            return {"messages": [answer]}

        return graph(node=node)


def test_what_a_fallback_replaces(run_graph):
    assert fate(run(run_graph, FallsBack, "bad", "good")) == [LOST, KEPT]


class Catches(Asks):
    def build_graph(self):
        async def node(state: MessagesState):
            checked = self.llm | RunnableLambda(fails_first())
            try:
                await checked.ainvoke(state["messages"])
            except ValueError as error:
                complaint = ("user", f"{error}; once more")
            return {
                "messages": [complaint, await self.llm.ainvoke([*state["messages"], complaint])]
            }

        return graph(node=node)


def test_a_call_whose_failure_the_node_made_use_of_counts(run_graph):
    assert fate(run(run_graph, Catches, "bad", "good")) == [KEPT, KEPT]


class Paused(Asks):
    """An inner graph of two nodes; the second asks, then waits for a person."""

    def build_graph(self):
        async def confirm(state: MessagesState):
            answer = await self.llm.ainvoke(state["messages"])
            interrupt("ok?")
            return {"messages": [answer]}

        inner = graph(plan=self.asks, confirm=confirm).compile()
        return graph(inner=inner).compile(checkpointer=InMemorySaver())

    async def run(self, **kwargs):
        config = {"configurable": {"thread_id": "t"}}
        await self.graph.ainvoke({"messages": kwargs["messages"]}, config)
        return await self.graph.ainvoke(Command(resume="yes"), config)


def test_resuming_asks_again_what_the_interrupted_node_asked_and_nothing_else(run_graph):
    trajectory = run(run_graph, Paused, "plan", "before", "after")
    assert fate(trajectory) == [KEPT, LOST, KEPT]
    assert [turn.path for turn in trajectory.turns] == [
        "inner/plan",
        "inner/confirm",
        "inner/confirm",
    ]
    assert {turn.thread for turn in trajectory.turns} == {"t"}


class InnerGraphRetried(Asks):
    """The second node of an inner graph fails once; the outer node has the retry policy."""

    def build_graph(self):
        check = fails_first()

        async def second(state: MessagesState):
            return {"messages": [check(await self.llm.ainvoke(state["messages"]))]}

        inner = graph(first=self.asks, second=second).compile()
        return graph(before=self.asks, inner=inner, retry=ONCE_MORE)


def test_an_inner_graph_that_is_run_again_supersedes_its_completed_nodes_too(run_graph):
    trajectory = run(run_graph, InnerGraphRetried, "zero", "one", "bad", "one again", "good")
    assert fate(trajectory) == [KEPT, LOST, LOST, KEPT, KEPT]


class Races(Asks):
    """Two branches; the slower one has asked once when it is cancelled."""

    def build_graph(self):
        async def slow(messages):
            answer = await self.llm.ainvoke(messages)
            await asyncio.sleep(60)
            return answer

        async def node(state: MessagesState):
            losing = asyncio.ensure_future(RunnableLambda(slow).ainvoke(state["messages"]))
            await asyncio.sleep(0.05)
            answer = await self.llm.ainvoke([*state["messages"], ("user", "quick")])
            losing.cancel()
            await asyncio.gather(losing, return_exceptions=True)
            return {"messages": [answer]}

        return graph(node=node)


def test_a_cancelled_branch_does_not_count(run_graph):
    assert fate(run(run_graph, Races, "lost", "won")) == [LOST, KEPT]


class NamedAlike(Asks):
    """An inner graph of the same name as its node, which LangGraph's callbacks cannot tell apart by
    name."""

    def build_graph(self):
        async def second(state: MessagesState):
            raise ValueError("for good")

        inner = graph(ask=self.asks, second=second).compile(name="inner")
        return graph(inner=inner)

    async def run(self, **kwargs):
        with pytest.raises(ValueError, match="for good"):
            await self.graph.ainvoke({"messages": kwargs["messages"]})
        return {"messages": []}


def test_a_failure_that_is_not_tried_again_supersedes_nothing(run_graph):
    assert fate(run(run_graph, NamedAlike, "one")) == [KEPT]


class Drafts(Asks):
    """Parallel nodes of which only the text is used."""

    def build_graph(self):
        async def drafts(state: MessagesState):
            asked = [self.llm.ainvoke(state["messages"]) for _ in range(3)]
            texts = [answer.content for answer in await asyncio.gather(*asked)]
            return {"messages": [("user", "choose: " + " ".join(texts))]}

        return graph(drafts=drafts, choose=self.asks)


def test_drafts_of_which_only_the_text_is_used_count(run_graph):
    trajectory = run(run_graph, Drafts, "a", "b", "c", "b")
    assert fate(trajectory) == [KEPT] * 4
    assert [turn.fork for turn in trajectory.turns] == [None, "repeat", "repeat", "branch"]
