"""Checkpointers, interrupts, stores and time travel: messages come back as other objects."""

from __future__ import annotations

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, interrupt

THREAD = {"configurable": {"thread_id": "t1"}}
ODD = '<tool_call>{ "arguments":{"b":2,  "a":2}, "name":"add" }</tool_call>'


def chat(llm):
    """One answer a run; the thread keeps the conversation."""

    async def answer(state: MessagesState):
        return {"messages": [await llm.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    return graph


async def two_runs(graph, messages):
    await graph.ainvoke({"messages": messages}, THREAD)
    return await graph.ainvoke({"messages": [("user", "sure?")]}, THREAD)


TWO_RUNS = [f"{{user/2+2?}}/{{assistant/«{ODD}}}»/{{user/sure?}}/{{assistant/«yes}}»"]


@pytest.mark.feature("InMemorySaver")
def test_memory(play):
    async def run(self, messages, **row):
        return await two_runs(chat(self.llm).compile(checkpointer=InMemorySaver()), messages)

    played = play(None, [ODD, "yes"], run=run)
    assert played.rows == TWO_RUNS
    assert played.tree == ["0: answer", "1 < 0: answer"]
    assert {turn.thread for turn in played.trajectory.turns} == {"t1"}


@pytest.mark.feature("AsyncSqliteSaver")
def test_async_sqlite(play, tmp_path):
    """The second run opens the file again: every message is made from bytes."""

    async def run(self, messages, **row):
        for said in (messages, [("user", "sure?")]):
            async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "a.db")) as saver:
                graph = chat(self.llm).compile(checkpointer=saver)
                state = await graph.ainvoke({"messages": said}, THREAD)
        return state

    played = play(None, [ODD, "yes"], run=run)
    assert played.rows == TWO_RUNS
    assert played.tree == ["0: answer", "1 < 0: answer"]


@pytest.mark.feature("SqliteSaver, graph.invoke")
def test_sqlite(play, tmp_path):
    def run(self, messages, **row):
        def answer(state: MessagesState):
            return {"messages": [self.llm.invoke(state["messages"])]}

        graph = StateGraph(MessagesState)
        graph.add_node("answer", answer)
        graph.add_edge(START, "answer")
        with SqliteSaver.from_conn_string(str(tmp_path / "a.db")) as saver:
            compiled = graph.compile(checkpointer=saver)
            compiled.invoke({"messages": messages}, THREAD)
            return compiled.invoke({"messages": [("user", "sure?")]}, THREAD)

    played = play(None, [ODD, "yes"], run=run)
    assert played.rows == TWO_RUNS
    assert played.tree == ["0: answer", "1 < 0: answer"]


@pytest.mark.feature("stores")
def test_store(play):
    async def run(self, messages, **row):
        async def answer(state: MessagesState, *, store):
            found = await store.aget(("memory",), "said")
            told = [HumanMessage(found.value["text"])] if found else []
            said = await self.llm.ainvoke([*told, *state["messages"]])
            await store.aput(("memory",), "said", {"text": said.content})
            return {"messages": [said]}

        graph = StateGraph(MessagesState)
        graph.add_node("answer", answer)
        graph.add_edge(START, "answer")
        compiled = graph.compile(store=InMemoryStore())
        await compiled.ainvoke({"messages": messages})
        return await compiled.ainvoke({"messages": messages})

    played = play(None, ["4", "5"], run=run)
    assert played.rows == [
        "{user/2+2?}/{assistant/«4}»",
        "{user/4}/{user/2+2?}/{assistant/«5}»",
    ]
    assert played.tree == ["0: answer", "1: answer, edited"]


def asks_a_human(llm):
    async def draft(state: MessagesState):
        return {"messages": [await llm.ainvoke(state["messages"]), ("user", "check")]}

    async def review(state: MessagesState):
        said = await llm.ainvoke(state["messages"])
        verdict = interrupt(said.content)
        more = [*state["messages"], said, ("user", verdict)]
        return {"messages": [*more[-2:], await llm.ainvoke(more)]}

    graph = StateGraph(MessagesState)
    graph.add_sequence([("draft", draft), ("review", review)])
    graph.add_edge(START, "draft")
    return graph


@pytest.mark.feature("interrupt and resume")
def test_interrupt(play):
    """LangGraph runs the interrupted node from its start: the call before it is made again."""

    async def run(self, messages, **row):
        graph = asks_a_human(self.llm).compile(checkpointer=InMemorySaver())
        await graph.ainvoke({"messages": messages}, THREAD)
        assert (await graph.aget_state(THREAD)).next == ("review",)
        return await graph.ainvoke(Command(resume="fine"), THREAD)

    played = play(None, ["four", "ok?", "ok!", "end"], run=run)
    assert played.rows == [
        "{user/2+2?}/{assistant/«four}»/{user/check}/{assistant/«ok!}»"
        "/{user/fine}/{assistant/«end}»"
    ]
    assert played.tree == [
        "0: draft",
        "1 < 0: review, superseded",
        "2 < 0: review, repeat",
        "3 < 2: review",
    ]


@pytest.mark.feature("an interrupt that nobody resumes")
def test_interrupt_without_resume(play):
    """Nothing was made again, so both answers count."""

    async def run(self, messages, **row):
        graph = asks_a_human(self.llm).compile(checkpointer=InMemorySaver())
        return await graph.ainvoke({"messages": messages}, THREAD)

    played = play(None, ["four", "ok?"], run=run)
    assert played.rows == ["{user/2+2?}/{assistant/«four}»/{user/check}/{assistant/«ok?}»"]
    assert played.tree == ["0: draft", "1 < 0: review"]


@pytest.mark.feature("time travel: a past checkpoint run again")
def test_time_travel(play):
    """What was sampled before the fork in time still happened, and counts."""

    async def run(self, messages, **row):
        async def speak(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"]), ("user", "next")]}

        graph = StateGraph(MessagesState)
        graph.add_sequence([("one", speak), ("two", speak)])
        graph.add_edge(START, "one")
        compiled = graph.compile(checkpointer=InMemorySaver())
        await compiled.ainvoke({"messages": messages}, THREAD)
        past = [s async for s in compiled.aget_state_history(THREAD) if s.next == ("two",)]
        return await compiled.ainvoke(None, past[0].config)

    played = play(None, ["a", "b", "c"], run=run)
    assert played.rows == [
        "{user/2+2?}/{assistant/«a}»/{user/next}/{assistant/«b}»",
        "{user/2+2?}/{assistant/a}/{user/next}/{assistant/«c}»",
    ]
    assert played.tree == ["0: one", "1 < 0: two", "2 < 0: two, repeat"]


@pytest.mark.feature("time travel: update_state")
def test_update_state(play):
    """A person corrects the answer: what the policy did not say is context."""

    async def run(self, messages, **row):
        graph = chat(self.llm).compile(checkpointer=InMemorySaver())
        said = (await graph.ainvoke({"messages": messages}, THREAD))["messages"][-1]
        better = {"messages": [AIMessage("Four.", id=said.id), ("user", "sure?")]}
        await graph.aupdate_state(THREAD, better, as_node=START)
        return await graph.ainvoke(None, THREAD)

    played = play(None, ["4", "yes"], run=run)
    assert played.rows == [
        "{user/2+2?}/{assistant/«4}»",
        "{user/2+2?}/{assistant/Four.}/{user/sure?}/{assistant/«yes}»",
    ]
    assert played.tree == ["0: answer", "1: answer, edited"]


@pytest.mark.feature("sub-graph with a checkpointer, interrupted inside")
def test_interrupt_in_a_subgraph(play):
    """A node of the sub-graph that completed before the interrupt is not run again."""

    async def run(self, messages, **row):
        graph = StateGraph(MessagesState)
        graph.add_node("team", asks_a_human(self.llm).compile())
        graph.add_edge(START, "team")
        compiled = graph.compile(checkpointer=InMemorySaver())
        await compiled.ainvoke({"messages": messages}, THREAD)
        return await compiled.ainvoke(Command(resume="fine"), THREAD)

    played = play(None, ["four", "ok?", "ok!", "end"], run=run)
    assert played.rows == [
        "{user/2+2?}/{assistant/«four}»/{user/check}/{assistant/«ok!}»"
        "/{user/fine}/{assistant/«end}»"
    ]
    assert played.tree == [
        "0: team/draft",
        "1 < 0: team/review, superseded",
        "2 < 0: team/review, repeat",
        "3 < 2: team/review",
    ]
