"""Shapes of graphs: sub-graphs, fan-out, commands, hand-offs, loops, tasks."""

from __future__ import annotations

import asyncio
import operator
from typing import Annotated

import pytest
from langchain_core.messages import AnyMessage, SystemMessage
from langchain_core.runnables import RunnableLambda
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, MessagesState, StateGraph, add_messages
from langgraph.types import Command, Send
from typing_extensions import TypedDict

from chatlearn.types import Outcome


def ask(llm, *, system=None, more=None):
    """A node that asks on, with a system prompt of its own and a user message after it."""

    async def node(state: MessagesState):
        told = [SystemMessage(system), *state["messages"]] if system else state["messages"]
        return {"messages": [await llm.ainvoke(told), *([("user", more)] if more else [])]}

    return node


def line(**nodes):
    """A graph of nodes one after the other."""
    graph = StateGraph(MessagesState)
    graph.add_sequence(list(nodes.items()))
    graph.add_edge(START, next(iter(nodes)))
    return graph


@pytest.mark.feature("sub-graphs")
def test_subgraphs(play):
    def build(self):
        team = line(writer=ask(self.llm, more="shorter"), editor=ask(self.llm, more="done?"))
        return line(team=team.compile(), boss=ask(self.llm))

    played = play(build, ["four", "4", "yes"])
    assert played.rows == [
        "{user/2+2?}/{assistant/«four}»/{user/shorter}/{assistant/«4}»"
        "/{user/done?}/{assistant/«yes}»"
    ]
    assert played.tree == ["0: team/writer", "1 < 0: team/editor", "2 < 1: boss"]


@pytest.mark.feature("sub-graph with its own system prompt")
def test_subgraph_with_its_own_system_prompt(play):
    def build(self):
        critic = line(judge=ask(self.llm, system="Judge."))

        async def consult(state: MessagesState):
            said = await critic_graph.ainvoke(
                {"messages": [("user", state["messages"][-1].content)]}
            )
            return {"messages": [("user", "Critic: " + said["messages"][-1].content)]}

        critic_graph = critic.compile()
        return line(
            write=ask(self.llm, system="Write.", more="go"),
            consult=consult,
            again=ask(self.llm, system="Write."),
        )

    played = play(build, ["four", "bad", "4"])
    assert played.rows == [
        "{system/Judge.}/{user/go}/{assistant/«bad}»",
        "{system/Write.}/{user/2+2?}/{assistant/«four}»/{user/go}/{user/Critic: bad}"
        "/{assistant/«4}»",
    ]
    assert played.tree == ["0: write", "1: consult/judge, fresh", "2 < 0: again"]


class Drafts(TypedDict):
    messages: list
    topic: str
    drafts: Annotated[list, operator.add]


@pytest.mark.feature("Send (map-reduce)")
def test_send(play):
    def build(self):
        def split(state: Drafts):
            return [Send("draft", {"topic": topic}) for topic in ("a", "b", "c")]

        async def draft(state: Drafts):
            said = await self.llm.ainvoke(f"write {state['topic']}")
            return {"drafts": [said.content]}

        async def join(state: Drafts):
            text = " ".join(sorted(state["drafts"]))
            return {"messages": [await self.llm.ainvoke(f"join {text}")]}

        graph = StateGraph(Drafts)
        graph.add_node("draft", draft)
        graph.add_node("join", join)
        graph.add_conditional_edges(START, split, ["draft"])
        graph.add_edge("draft", "join")
        return graph

    said = {"write a": "A", "write b": "B", "write c": "C", "join A B C": "ABC"}
    played = play(build, said)
    assert sorted(played.rows) == [
        "{user/join A B C}/{assistant/«ABC}»",
        "{user/write a}/{assistant/«A}»",
        "{user/write b}/{assistant/«B}»",
        "{user/write c}/{assistant/«C}»",
    ]
    turns = played.trajectory.turns
    assert sorted(t.send for t in turns[:3]) == [0, 1, 2]
    assert [t.send for t in turns[3:]] == [None]
    assert [str(t.fork) for t in turns] == ["None", "fresh", "fresh", "fresh"]
    assert {t.path for t in turns} == {"draft", "join"}


@pytest.mark.feature("Send, drafts of one prompt whose text alone is used")
def test_send_drafts(play):
    def build(self):
        def split(state: Drafts):
            return [Send("draft", state) for _ in range(2)]

        async def draft(state: Drafts):
            return {"drafts": [(await self.llm.ainvoke(state["messages"])).content]}

        graph = StateGraph(Drafts)
        graph.add_node("draft", draft)
        graph.add_conditional_edges(START, split, ["draft"])
        return graph

    played = play(build, ["one", "two"])
    assert played.rows == ["{user/2+2?}/{assistant/«one}»", "{user/2+2?}/{assistant/«two}»"]
    assert played.tree == ["0: draft", "1: draft, repeat"]


@pytest.mark.feature("parallel nodes")
def test_parallel_nodes(play):
    def build(self):
        def speaks(after):
            async def node(state):
                told = [*state["messages"], ("user", after)]
                return {"notes": [(await self.llm.ainvoke(told)).content]}

            return node

        class Notes(MessagesState):
            notes: Annotated[list, operator.add]

        graph = StateGraph(Notes)
        graph.add_node("start", ask(self.llm))
        graph.add_node("left", speaks("left?"))
        graph.add_node("right", speaks("right?"))
        graph.add_edge(START, "start")
        graph.add_edge("start", "left")
        graph.add_edge("start", "right")
        return graph

    played = play(build, {"2+2?": "4", "left?": "L", "right?": "R"})
    assert played.rows == [
        "{user/2+2?}/{assistant/«4}»/{user/left?}/{assistant/«L}»",
        "{user/2+2?}/{assistant/4}/{user/right?}/{assistant/«R}»",
    ]
    assert played.tree == ["0: start", "1 < 0: left", "2 < 0: right, branch"]


@pytest.mark.feature("Command(goto, update)")
def test_command(play):
    def build(self):
        async def first(state: MessagesState) -> Command:
            said = await self.llm.ainvoke(state["messages"])
            return Command(goto=said.content, update={"messages": [said, ("user", "go on")]})

        graph = StateGraph(MessagesState)
        graph.add_node("first", first, destinations=("short", "long"))
        graph.add_node("short", ask(self.llm))
        graph.add_node("long", ask(self.llm))
        graph.add_edge(START, "first")
        return graph

    played = play(build, ["short", "4"])
    assert played.rows == ["{user/2+2?}/{assistant/«short}»/{user/go on}/{assistant/«4}»"]
    assert played.tree == ["0: first", "1 < 0: short"]


@pytest.mark.feature("multi-agent hand-off")
def test_handoff(play):
    """Two agents hand one conversation to each other; each has its own system prompt."""

    def build(self):
        def agent(system, other):
            async def node(state: MessagesState) -> Command:
                said = await self.llm.ainvoke([SystemMessage(system), *state["messages"]])
                goto = other if "over to" in said.content else END
                return Command(goto=goto, update={"messages": [said, ("user", "next")]})

            return node

        graph = StateGraph(MessagesState)
        graph.add_node("alice", agent("Alice.", "bob"), destinations=("bob", END))
        graph.add_node("bob", agent("Bob.", "alice"), destinations=("alice", END))
        graph.add_edge(START, "alice")
        return graph

    played = play(build, ["over to bob", "over to alice", "4"])
    # Alice's second prompt begins with her first; what Bob said in between is put in as sampled
    assert played.rows == [
        "{system/Bob.}/{user/2+2?}/{assistant/over to bob}/{user/next}/{assistant/«over to alice}»",
        "{system/Alice.}/{user/2+2?}/{assistant/«over to bob}»/{user/next}"
        "/{assistant/over to alice}/{user/next}/{assistant/«4}»",
    ]
    assert played.tree == ["0: alice", "1: bob, edited", "2 < 0: alice"]


@pytest.mark.feature("recursion limit")
def test_recursion_limit(play, tmp_path):
    cfg = tmp_path / "agent.yaml"
    cfg.write_text("recursion_limit: 3\n")

    def build(self):
        graph = StateGraph(MessagesState)
        graph.add_node("loop", ask(self.llm, more="more"))
        graph.add_edge(START, "loop")
        graph.add_edge("loop", "loop")
        return graph

    played = play(build, ["a", "b", "c", "d"], cfg=str(cfg), outcome=Outcome.TURN_LIMIT)
    assert played.rows == [
        "{user/2+2?}/{assistant/«a}»/{user/more}/{assistant/«b}»/{user/more}/{assistant/«c}»"
    ]
    assert played.tree == ["0: loop", "1 < 0: loop", "2 < 1: loop"]


class OwnState(TypedDict):
    messages: list
    history: Annotated[list[AnyMessage], add_messages]
    reward: float


@pytest.mark.feature("a state of one's own, with a reward")
def test_own_state(play):
    def build(self):
        async def answer(state: OwnState):
            first = await self.llm.ainvoke(state["messages"])
            return {"history": [*state["messages"], first, ("user", "sure?")]}

        async def check(state: OwnState):
            return {"history": [await self.llm.ainvoke(state["history"])], "reward": 0.5}

        graph = StateGraph(OwnState)
        graph.add_sequence([("answer", answer), ("check", check)])
        graph.add_edge(START, "answer")
        return graph

    played = play(build, ["4", "yes"])
    assert played.rows == ["{user/2+2?}/{assistant/«4}»/{user/sure?}/{assistant/«yes}»"]
    assert played.tree == ["0: answer", "1 < 0: check"]
    assert played.trajectory.reward == 0.5


@pytest.mark.feature("functional API (@entrypoint, @task)")
def test_functional_api(play):
    def build(self):
        @task
        async def draft(messages):
            return await self.llm.ainvoke(messages)

        @entrypoint()
        async def work(given):
            first = await draft(given["messages"])
            more = [*given["messages"], first, ("user", "again")]
            return {"messages": [*more, await draft(more)]}

        return work

    played = play(build, ["3", "4"])
    assert played.rows == ["{user/2+2?}/{assistant/«3}»/{user/again}/{assistant/«4}»"]
    assert played.tree == ["0: work/draft", "1 < 0: work/draft"]


@pytest.mark.feature("functional API, a task that is tried again")
def test_functional_retry(play):
    from langgraph.types import RetryPolicy

    tries = []

    def build(self):
        @task(retry_policy=RetryPolicy(initial_interval=0, jitter=False, retry_on=KeyError))
        async def draft(messages):
            said = await self.llm.ainvoke(messages)
            tries.append(said.content)
            if len(tries) == 1:
                raise KeyError("bad")
            return said

        @entrypoint()
        async def work(given):
            return {"messages": [await draft(given["messages"])]}

        return work

    played = play(build, ["3", "4"])
    assert played.rows == ["{user/2+2?}/{assistant/«4}»"]
    assert played.tree == ["0: work/draft, superseded", "1: work/draft, repeat"]


@pytest.mark.feature("a cancelled branch")
def test_cancelled_branch(play):
    """The race's loser is cancelled after its call was answered: nobody has the answer."""

    def build(self):
        said_slowly = asyncio.Event()

        async def slow(_):
            said = await self.llm.ainvoke("slow")
            said_slowly.set()
            await asyncio.sleep(60)
            return said

        async def race(state: MessagesState):
            loser = asyncio.create_task(RunnableLambda(slow).ainvoke({}))
            await said_slowly.wait()
            said = await self.llm.ainvoke(state["messages"])
            loser.cancel()
            await asyncio.gather(loser, return_exceptions=True)
            return {"messages": [said]}

        return line(race=race)

    played = play(build, {"slow": "late", "2+2?": "4"})
    assert played.rows == ["{user/2+2?}/{assistant/«4}»"]
    assert played.tree == ["0: race, superseded", "1: race, fresh"]
