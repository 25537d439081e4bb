"""Attempts that fail and are made again: their calls are orphans, and are not trained."""

from __future__ import annotations

import pytest
from langchain_core.output_parsers import JsonOutputParser
from langchain_core.runnables import RunnableLambda
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import RetryPolicy

from chatlearn.types import NodeSampling, SamplingParams

AT_ONCE = {"initial_interval": 0.0, "jitter": False, "retry_on": ValueError}


def one_node(node, **options):
    graph = StateGraph(MessagesState)
    graph.add_node("work", node, **options)
    graph.add_edge(START, "work")
    return graph


def picky(llm):
    """A node that raises unless the answer is "4"."""

    async def work(state: MessagesState):
        said = await llm.ainvoke(state["messages"])
        if said.content != "4":
            raise ValueError(f"{said.content} is wrong")
        return {"messages": [said]}

    return work


@pytest.mark.feature("LangGraph's RetryPolicy")
def test_retry_policy(play):
    def build(self):
        return one_node(picky(self.llm), retry_policy=RetryPolicy(**AT_ONCE))

    played = play(build, ["3", "4"])
    assert played.rows == ["{user/2+2?}/{assistant/«4}»"]
    assert played.tree == ["0: work, superseded", "1: work, repeat"]


@pytest.mark.feature("train_orphans")
def test_train_orphans(play):
    def build(self):
        return one_node(picky(self.llm), retry_policy=RetryPolicy(**AT_ONCE))

    played = play(build, ["3", "4"], train_orphans=True)
    assert played.rows == ["{user/2+2?}/{assistant/«3}»", "{user/2+2?}/{assistant/«4}»"]
    assert played.tree == ["0: work", "1: work, repeat"]


@pytest.mark.feature("with_retry")
def test_with_retry(play):
    def build(self):
        reads = (self.llm | JsonOutputParser()).with_retry(
            wait_exponential_jitter=False, stop_after_attempt=3
        )

        async def work(state: MessagesState):
            assert await reads.ainvoke(state["messages"]) == {"sum": 4}
            return {}

        return one_node(work)

    played = play(build, ["no", "nor this", '{"sum": 4}'])
    assert played.rows == ['{user/2+2?}/{assistant/«{"sum": 4}}»']
    assert played.tree == [
        "0: work, superseded",
        "1: work, repeat, superseded",
        "2: work, repeat",
    ]


@pytest.mark.feature("with_structured_output(...).with_retry()")
def test_structured_retry(play):
    def build(self):
        asks = self.llm.with_structured_output({"title": "Sum", "type": "object"}).with_retry(
            wait_exponential_jitter=False, stop_after_attempt=2
        )

        async def work(state: MessagesState):
            assert await asks.ainvoke(state["messages"]) == {"v": 4}
            return {}

        return one_node(work)

    opening = '<tool_call>/{"name": "Sum", "arguments": '
    played = play(build, ["four", '{"v": 4}}\n</tool_call>'])
    assert played.rows == ["{user/2+2?}/{assistant/" + opening + '«{"v": 4}}/</tool_call>}»']
    assert played.tree == ["0: work, superseded", "1: work, repeat"]


@pytest.mark.feature("with_fallbacks")
def test_with_fallbacks(play):
    def build(self):
        def strict(message):
            if message.content != "4":
                raise ValueError("not 4")
            return message

        second = RunnableLambda(lambda m: [("user", "Say 4.")]) | self.llm
        asks = (self.llm | strict).with_fallbacks([second])

        async def work(state: MessagesState):
            return {"messages": [await asks.ainvoke(state["messages"])]}

        return one_node(work)

    played = play(build, ["3", "4"])
    assert played.rows == ["{user/Say 4.}/{assistant/«4}»"]
    assert played.tree == ["0: work, superseded", "1: work, fresh"]


@pytest.mark.feature("a model that fails, with_fallbacks")
def test_model_with_fallbacks(play):
    """The policy refuses the call, so there is no turn; another model may answer."""

    def build(self):
        asks = self.llm.bind(temperature=-1).with_fallbacks([self.llm])

        async def work(state: MessagesState):
            return {"messages": [await asks.ainvoke(state["messages"])]}

        return one_node(work)

    played = play(build, ["4"])
    assert played.rows == ["{user/2+2?}/{assistant/«4}»"]
    assert played.tree == ["0: work"]


@pytest.mark.feature("an error that the graph handles")
def test_handled_error(play):
    """Nothing was made again: the answer that led to the error counts."""

    def build(self):
        async def work(state: MessagesState):
            try:
                return await picky(self.llm)(state)
            except ValueError as error:
                return {"messages": [("ai", "failed"), ("user", str(error))]}

        async def repair(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"][-1:])]}

        graph = one_node(work)
        graph.add_node("repair", repair)
        graph.add_edge("work", "repair")
        return graph

    played = play(build, ["3", "4"])
    assert played.rows == [
        "{user/2+2?}/{assistant/«3}»",
        "{user/3 is wrong}/{assistant/«4}»",
    ]
    assert played.tree == ["0: work", "1: repair, fresh"]


@pytest.mark.feature("trainable_nodes")
def test_trainable_nodes(play):
    def build(self):
        async def plan(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"]), ("user", "do it")]}

        graph = StateGraph(MessagesState)
        graph.add_sequence([("plan", plan), ("work", plan)])
        graph.add_edge(START, "plan")
        return graph

    played = play(build, ["think", "4"], trainable_nodes=("work",))
    assert played.rows == ["{user/2+2?}/{assistant/think}/{user/do it}/{assistant/«4}»"]
    assert played.trajectory.turns[0].excluded == (
        "node 'plan' is not in models.policy.trainable_nodes"
    )


@pytest.mark.feature("node_sampling")
def test_node_sampling(play):
    def build(self):
        async def speak(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"]), ("user", "do it")]}

        graph = StateGraph(MessagesState)
        graph.add_sequence([("plan", speak), ("work", speak)])
        graph.add_edge(START, "plan")
        return graph

    nodes = (NodeSampling("plan", temperature=0.5, max_tokens=3),)
    played = play(build, ["think", "4"], sampling=SamplingParams(nodes=nodes))
    assert played.rows == ["{user/2+2?}/{assistant/«thi»}/{user/do it}/{assistant/«4}»"]
    assert [turn.temperature for turn in played.trajectory.turns] == [0.5, 1.0]


@pytest.mark.feature("a streamed call in an attempt that fails")
def test_streamed_retry(play):
    """LangChain streams without telling the model its place; it is known nevertheless."""

    def build(self):
        tries = []

        async def work(state: MessagesState):
            said = [chunk async for chunk in self.llm.astream(state["messages"])]
            tries.append(said)
            if len(tries) == 1:
                raise ValueError("again")
            return {"messages": [sum(said[1:], said[0])]}

        return one_node(work, retry_policy=RetryPolicy(**AT_ONCE))

    played = play(build, ["3", "4"])
    assert played.rows == ["{user/2+2?}/{assistant/«4}»"]
    assert played.tree == ["0: work, superseded", "1: work, repeat"]
