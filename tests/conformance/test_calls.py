"""How the policy can be called: sync, async, many at once, streamed; what callbacks are told."""

from __future__ import annotations

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.messages import AIMessageChunk
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
DRAWN_CALL = CALL.replace("\n", "/")


@tool
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


def chain(*nodes):
    """A graph of nodes one after the other, each named as its function."""
    graph = StateGraph(MessagesState)
    graph.add_sequence(list(nodes))
    graph.add_edge(START, nodes[0].__name__)
    return graph


@pytest.mark.feature("invoke in a sync node")
def test_invoke(play):
    def build(self):
        def answer(state: MessagesState):
            return {"messages": [self.llm.invoke(state["messages"])]}

        return chain(answer)

    played = play(build, ["4"])
    assert played.rows == ["{user/2+2?}/{assistant/«4}»"]
    assert played.tree == ["0: answer"]


@pytest.mark.feature("ainvoke in an async node")
def test_ainvoke(play):
    def build(self):
        async def first(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"]), ("user", "sure?")]}

        async def second(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"])]}

        return chain(first, second)

    played = play(build, ["4", "yes"])
    assert played.rows == ["{user/2+2?}/{assistant/«4}»/{user/sure?}/{assistant/«yes}»"]
    assert played.tree == ["0: first", "1 < 0: second"]


@pytest.mark.feature("batch")
def test_batch(play):
    def build(self):
        def answer(state: MessagesState):
            a, b = self.llm.batch(["one", "two"])
            return {"messages": [*state["messages"], ("user", a.content), b]}

        return chain(answer)

    played = play(build, {"one": "1", "two": "2"})
    assert sorted(played.rows) == ["{user/one}/{assistant/«1}»", "{user/two}/{assistant/«2}»"]
    assert [line.partition(": ")[2] for line in played.tree] == ["answer", "answer, fresh"]


@pytest.mark.feature("abatch, several answers to one prompt")
def test_abatch(play):
    def build(self):
        async def draft(state: MessagesState):
            drafts = await self.llm.abatch([state["messages"]] * 3)
            more = [*state["messages"], drafts[1], ("user", "go on")]
            return {"messages": [drafts[1], more[-1], await self.llm.ainvoke(more)]}

        return chain(draft)

    played = play(build, ["a", "b", "c", "end"])
    assert played.rows == [
        "{user/2+2?}/{assistant/«a}»",
        "{user/2+2?}/{assistant/«c}»",
        "{user/2+2?}/{assistant/«b}»/{user/go on}/{assistant/«end}»",
    ]
    assert played.tree == ["0: draft", "1: draft, repeat", "2: draft, repeat", "3 < 1: draft"]


@pytest.mark.feature("astream, the sum kept")
def test_astream(play):
    pieces = []

    def build(self):
        async def speak(state: MessagesState):
            total = None
            async for chunk in self.llm.astream(state["messages"]):
                pieces.append(chunk.content)
                total = chunk if total is None else total + chunk
            more = [*state["messages"], total, ("user", "again")]
            return {"messages": [total, ("user", "again"), await self.llm.ainvoke(more)]}

        return chain(speak)

    played = play(build, ["it is 4", "4"])
    assert [p for p in pieces if p] == ["it", " is", " 4"]
    assert played.rows == ["{user/2+2?}/{assistant/«it is 4}»/{user/again}/{assistant/«4}»"]
    assert played.tree == ["0: speak", "1 < 0: speak"]


@pytest.mark.feature("stream in a sync node")
def test_stream(play):
    def build(self):
        def speak(state: MessagesState):
            first, *rest = self.llm.stream(state["messages"])
            return {"messages": [sum(rest, first), ("user", "again")]}

        def close(state: MessagesState):
            return {"messages": [self.llm.invoke(state["messages"])]}

        return chain(speak, close)

    played = play(build, ["it is 4", "4"])
    assert played.rows == ["{user/2+2?}/{assistant/«it is 4}»/{user/again}/{assistant/«4}»"]
    assert played.tree == ["0: speak", "1 < 0: close"]


@pytest.mark.feature("tool-call chunks")
def test_tool_call_chunks(play):
    chunks: list[AIMessageChunk] = []

    def build(self):
        llm = self.llm.bind_tools([add])

        async def ask(state: MessagesState):
            chunks.extend([c async for c in llm.astream(state["messages"])])
            total = sum(chunks[1:], chunks[0])
            assert [(c["name"], c["args"]) for c in total.tool_calls] == [("add", {"a": 2, "b": 2})]
            result = await add.ainvoke(total.tool_calls[0])
            more = [*state["messages"], total, result]
            return {"messages": [total, result, await llm.ainvoke(more)]}

        return chain(ask)

    played = play(build, ["hm " + CALL, "4"])
    parts = [part for chunk in chunks for part in chunk.tool_call_chunks]
    assert [p["name"] for p in parts] == ["add"] + [None] * (len(parts) - 1)
    assert len(parts) > 2
    assert {p["index"] for p in parts} == {0}
    assert played.rows == [
        f"{{user/2+2?}}/{{assistant/«hm {DRAWN_CALL}}}»"
        "/{user/<tool_response>/4/</tool_response>}/{assistant/«4}»"
    ]
    assert played.tree == ["0: ask", "1 < 0: ask"]


@pytest.mark.feature("astream_events v2")
def test_astream_events(play):
    seen = []

    def build(self):
        async def answer(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"])]}

        return chain(answer)

    async def run(self, messages, **row):
        async for event in self.graph.astream_events({"messages": messages}, version="v2"):
            if event["event"].startswith("on_chat_model"):
                seen.append((event["event"], event["metadata"]["langgraph_node"], event["data"]))
        return {"messages": messages}

    played = play(build, ["it is 4"], run=run)
    assert seen[0][0] == "on_chat_model_start"
    streamed = [d["chunk"].content for e, _, d in seen if e == "on_chat_model_stream"]
    assert "".join(streamed) == "it is 4"
    assert len(streamed) >= 3
    assert seen[-1][2]["output"].usage_metadata["output_tokens"] == len("it is 4}")
    assert {node for _, node, _ in seen} == {"answer"}
    assert played.rows == ["{user/2+2?}/{assistant/«it is 4}»"]
    assert played.tree == ["0: answer"]


@pytest.mark.feature('stream_mode="messages"')
def test_stream_mode_messages(play):
    heard = []

    def build(self):
        async def first(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"]), ("user", "sure?")]}

        def second(state: MessagesState):
            return {"messages": [self.llm.invoke(state["messages"])]}

        return chain(first, second)

    async def run(self, messages, **row):
        state = {}
        stream = self.graph.astream({"messages": messages}, stream_mode=["messages", "values"])
        async for mode, data in stream:
            if mode == "values":
                state = data
            elif data[0].content and data[0].type == "AIMessageChunk":
                heard.append((data[1]["langgraph_node"], data[0].content))
        return state

    played = play(build, ["it is 4", "yes"], run=run)
    assert heard == [("first", "it"), ("first", " is"), ("first", " 4"), ("second", "yes")]
    assert played.rows == ["{user/2+2?}/{assistant/«it is 4}»/{user/sure?}/{assistant/«yes}»"]
    assert played.tree == ["0: first", "1 < 0: second"]


@pytest.mark.feature("callbacks and usage metadata")
def test_callbacks(play):
    class Told(AsyncCallbackHandler):
        heard: list = []  # noqa: RUF012

        async def on_chat_model_start(self, serialized, messages, **kwargs):
            self.heard.append(("start", messages[0][0].content, kwargs["tags"]))

        async def on_llm_end(self, response, **kwargs):
            self.heard.append(("end", response.generations[0][0].message.usage_metadata))

    usage = UsageMetadataCallbackHandler()

    def build(self):
        async def answer(state: MessagesState):
            config = {"callbacks": [Told(), usage], "tags": ["mine"]}
            return {"messages": [await self.llm.ainvoke("hello", config)]}

        return chain(answer)

    played = play(build, ["4"])
    tokens = {"input_tokens": len("{user/hello}/{assistant/"), "output_tokens": 2}
    tokens["total_tokens"] = sum(tokens.values())
    assert Told.heard[0][:2] == ("start", "hello")
    assert "mine" in Told.heard[0][2]
    assert Told.heard[1] == ("end", tokens)
    counted = usage.usage_metadata["policy"]
    assert {key: counted[key] for key in tokens} == tokens
    assert played.rows == ["{user/hello}/{assistant/«4}»"]
    assert played.trajectory.turns[0].tags == ("mine",)


@pytest.mark.feature("bind(stop=...)")
def test_bind_stop(play):
    def build(self):
        async def answer(state: MessagesState):
            said = await self.llm.bind(stop=["END"]).ainvoke(state["messages"])
            assert said.content == "4 "
            return {
                "messages": [
                    said,
                    ("user", "more"),
                    await self.llm.ainvoke([*state["messages"], said, ("user", "more")]),
                ]
            }

        return chain(answer)

    played = play(build, ["4 END…", "5"])
    assert played.engine.requests[0].sampling.stop == ("END",)
    # what was sampled after the stop string began stays, and the turn is closed as the template
    # would
    assert played.rows == ["{user/2+2?}/{assistant/«4 END»}/{user/more}/{assistant/«5}»"]
    assert played.tree == ["0: answer", "1 < 0: answer"]


@pytest.mark.feature("sampling of one call")
def test_sampling_overrides(play):
    def build(self):
        warm = self.llm.bind(temperature=0.5, top_k=7)

        async def answer(state: MessagesState):
            first = await warm.ainvoke(state["messages"], max_tokens=2, top_p=0.9)
            more = [*state["messages"], first, ("user", "on")]
            second = await self.llm.ainvoke(more, temperature=0)
            third = await self.llm.ainvoke([*more, second, ("user", "on")])
            return {"messages": [first, second, third]}

        return chain(answer)

    played = play(build, ["123", "5", "6"])
    asked = [r.sampling for r in played.engine.requests]
    assert [(s.temperature, s.top_p, s.top_k) for s in asked] == [
        (0.5, 0.9, 7),
        (0, 1.0, -1),
        (1.0, 1.0, -1),
    ]
    assert asked[0].max_new_tokens == 2
    # each token is trained at the temperature that sampled it; a greedy choice is context
    assert [t.temperature for t in played.trajectory.turns] == [0.5, 0, 1.0]
    assert played.rows == [
        "{user/2+2?}/{assistant/«12»}/{user/on}/{assistant/5}/{user/on}/{assistant/«6}»"
    ]
    assert played.tree == ["0: answer", "1 < 0: answer, greedy", "2 < 1: answer"]
