"""Tools: bound, forced, failing, and run by LangChain's own agents."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import pytest
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedState, ToolNode, create_react_agent, tools_condition
from langgraph.types import Command
from pydantic import BaseModel
from typing_extensions import TypedDict

from chatlearn.types import Outcome

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
DRAWN_CALL = CALL.replace("\n", "/")
HEARD = "/{user/<tool_response>/%s/</tool_response>}/{assistant/"
OPENING = '<tool_call>/{"name": "add", "arguments": '

needs_langchain_1 = pytest.mark.skipif(
    int(version("langchain").split(".")[0]) < 1, reason="create_agent is new in langchain 1.0"
)


@tool
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


@tool
def look(word: str) -> str:
    """Look a word up."""
    raise ValueError(f"no {word} here")


def loop(llm, tools):
    """An agent node and a tool node, until no tool is called."""

    async def agent(state: MessagesState):
        return {"messages": [await llm.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("agent", agent)
    graph.add_node("tools", ToolNode(tools, handle_tool_errors=True))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", tools_condition)
    graph.add_edge("tools", "agent")
    return graph


@pytest.mark.feature("bind_tools and ToolNode")
def test_bind_tools(play):
    played = play(lambda self: loop(self.llm.bind_tools([add]), [add]), [CALL, "4"])
    assert played.rows == [f"{{user/2+2?}}/{{assistant/«{DRAWN_CALL}}}»" + HEARD % 4 + "«4}»"]
    assert played.tree == ["0: agent", "1 < 0: agent"]
    assert [turn.tool_calls for turn in played.trajectory.turns] == [("add",), ()]


@pytest.mark.feature("ToolNode errors")
def test_tool_errors(play):
    call = CALL.replace("add", "look").replace('{"a": 2, "b": 2}', '{"word": "4"}')
    played = play(lambda self: loop(self.llm.bind_tools([look]), [look]), [call, "I see"])
    [row] = played.rows
    sampled = call.replace("\n", "/")
    assert row.startswith(
        f"{{user/2+2?}}/{{assistant/«{sampled}}}»/{{user/<tool_response>/Error: ValueError"
    )
    assert row.endswith("{assistant/«I see}»")
    assert played.trajectory.metrics["tool_errors"] == 1


def bound_kinds():
    def subtract(a: int, b: int, state: Annotated[dict, InjectedState], **kwargs) -> int:
        """Subtract.

        Args:
            a: from this
            b: so much
        """
        return a - b

    class Multiply(BaseModel):
        """Multiply."""

        a: int

    class Divide(TypedDict):
        """Divide."""

        a: int

    schema = {"type": "function", "function": {"name": "root", "parameters": {"type": "object"}}}
    return [add, subtract, Multiply, Divide, schema]


@pytest.mark.feature("tools of every kind, injected arguments hidden")
def test_kinds_of_tools(llm):
    shown = {
        t["function"]["name"]: t["function"] for t in llm.bind_tools(bound_kinds()).kwargs["tools"]
    }
    assert list(shown) == ["add", "subtract", "Multiply", "Divide", "root"]
    assert list(shown["subtract"]["parameters"]["properties"]) == ["a", "b"]


FORCED = {
    "any": "any",
    "required": "required",
    "True": True,
    "name": "add",
    "OpenAI's dict": {"type": "function", "function": {"name": "add"}},
}


@pytest.mark.feature("tool_choice: any, required, True, a name, a dict")
@pytest.mark.parametrize("choice", FORCED.values(), ids=FORCED)
def test_forced(play, choice):
    """The opening of the call is put into the policy's mouth: it is context, not trained."""

    def build(self):
        async def agent(state: MessagesState):
            forced = self.llm.bind_tools([add], tool_choice=choice)
            call = await forced.ainvoke(state["messages"])
            result = await add.ainvoke(call.tool_calls[0])
            free = self.llm.bind_tools([add])
            more = [*state["messages"], call, result]
            return {"messages": [call, result, await free.ainvoke(more)]}

        graph = StateGraph(MessagesState)
        graph.add_node("agent", agent)
        graph.add_edge(START, "agent")
        return graph

    played = play(build, ['{"a": 2, "b": 2}}\n</tool_call>', "4"])
    assert played.rows == [
        "{user/2+2?}/{assistant/"
        + OPENING
        + '«{"a": 2, "b": 2}}/</tool_call>}»'
        + HEARD % 4
        + "«4}»"
    ]
    assert played.tree == ["0: agent", "1 < 0: agent"]
    assert played.trajectory.turns[0].prefilled == len(OPENING)


@pytest.mark.feature("tool_choice: any of several tools")
def test_any_of_several(play):
    async def run(self, messages, **row):
        said = await self.llm.bind_tools([add, look], tool_choice="any").ainvoke(messages)
        assert said.tool_calls[0]["name"] == "look"
        return {"messages": [said]}

    played = play(None, ['{"name": "look", "arguments": {"word": "x"}}\n</tool_call>'], run=run)
    assert played.rows == [
        '{user/2+2?}/{assistant/<tool_call>/«{"name": "look", "arguments": {"word": "x"}}'
        "/</tool_call>}»"
    ]


@pytest.mark.feature("tool_choice: auto, none")
def test_free_choices(play):
    """Under "none" the tools are not shown: another conversation, so another row."""

    async def run(self, messages, **row):
        first = await self.llm.bind_tools([add], tool_choice="auto").ainvoke(messages)
        more = [*messages, first, ("user", "why?")]
        await self.llm.bind_tools([add], tool_choice="auto").ainvoke(more)
        await self.llm.bind_tools([add], tool_choice="none").ainvoke(messages)
        return {"messages": []}

    played = play(None, ["4", "so", "5"], run=run)
    assert played.rows == [
        "{user/2+2?}/{assistant/«4}»/{user/why?}/{assistant/«so}»",
        "{user/2+2?}/{assistant/«5}»",
    ]
    assert played.tree == ["0: ", "1 < 0: ", "2: repeat"]


@pytest.mark.feature("create_react_agent")
def test_create_react_agent(play):
    played = play(lambda self: create_react_agent(self.llm, [add], prompt="Be brief."), [CALL, "4"])
    assert played.rows == [
        f"{{system/Be brief.}}/{{user/2+2?}}/{{assistant/«{DRAWN_CALL}}}»" + HEARD % 4 + "«4}»"
    ]
    assert played.tree == ["0: agent", "1 < 0: agent"]


@needs_langchain_1
@pytest.mark.feature("create_agent")
def test_create_agent(play):
    from langchain.agents import create_agent

    played = play(
        lambda self: create_agent(self.llm, [add], system_prompt="Be brief."), [CALL, "4"]
    )
    assert played.rows == [
        f"{{system/Be brief.}}/{{user/2+2?}}/{{assistant/«{DRAWN_CALL}}}»" + HEARD % 4 + "«4}»"
    ]
    assert played.tree == ["0: model", "1 < 0: model"]


class Sum(BaseModel):
    """The sum."""

    value: int


def answers_with(response_format):
    """An agent that must answer with a ``Sum``, and its run."""

    def build(self):
        from langchain.agents import create_agent

        return create_agent(self.llm, [add], response_format=response_format())

    async def run(self, messages, **row):
        state = await self.graph.ainvoke({"messages": messages})
        assert state["structured_response"] == Sum(value=4)
        return {"messages": state["messages"]}

    return {"build": build, "run": run}


def tool_strategy():
    from langchain.agents.structured_output import ToolStrategy

    return ToolStrategy(Sum)


def provider_strategy():
    from langchain.agents.structured_output import ProviderStrategy

    return ProviderStrategy(Sum)


@needs_langchain_1
@pytest.mark.feature("create_agent with response_format")
@pytest.mark.parametrize("response_format", [lambda: Sum, tool_strategy])
def test_create_agent_response_format(play, response_format):
    """LangChain forces a call in every turn; the schema is a tool of its own."""
    played = play(
        answers=[
            '{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>',
            '{"name": "Sum", "arguments": {"value": 4}}\n</tool_call>',
        ],
        **answers_with(response_format),
    )
    assert played.rows == [
        '{user/2+2?}/{assistant/<tool_call>/«{"name": "add", "arguments": {"a": 2, "b": 2}}'
        "/</tool_call>}»"
        + HEARD % 4
        + '<tool_call>/«{"name": "Sum", "arguments": {"value": 4}}/</tool_call>}»'
    ]
    assert played.tree == ["0: model", "1 < 0: model"]


@needs_langchain_1
@pytest.mark.feature("create_agent with response_format=ProviderStrategy")
def test_create_agent_provider_strategy(play):
    """The schema stands in the system message of every turn; nothing is forced."""
    played = play(answers=[CALL, '{"value": 4}'], **answers_with(provider_strategy))
    [row] = played.rows
    assert row.startswith("{system/Answer with one JSON object and nothing else. ")
    assert row.endswith(
        f"}}/{{user/2+2?}}/{{assistant/«{DRAWN_CALL}}}»" + HEARD % 4 + '«{"value": 4}}»'
    )
    assert played.tree == ["0: model", "1 < 0: model"]


@needs_langchain_1
@pytest.mark.feature("middleware that rewrites history (SummarizationMiddleware)")
def test_summarization_middleware(play):
    """What is kept of the policy's own answers stands in the new prompt as it was sampled."""
    from langchain.agents import create_agent
    from langchain.agents.middleware import SummarizationMiddleware

    odd = '<tool_call>{"arguments":{"b":2,"a":2}, "name":"add"}</tool_call>'

    def build(self):
        shorter = SummarizationMiddleware(
            model=self.llm,
            trigger=("messages", 5),
            keep=("messages", 2),
            summary_prompt="Sum up: {messages}",
        )
        return create_agent(self.llm, [add], middleware=[shorter])

    played = play(build, [CALL, odd, "summary", "4"])
    heard = "{user/<tool_response>/4/</tool_response>}"
    first = f"{{user/2+2?}}/{{assistant/«{DRAWN_CALL}}}»/{heard}/{{assistant/«{odd}}}»"
    assert played.rows[0] == first
    assert played.rows[1].endswith("{assistant/«summary}»")
    assert played.rows[2] == (
        "{user/Here is a summary of the conversation to date://summary}"
        f"/{{assistant/{odd}}}/{heard}/{{assistant/«4}}»"
    )
    assert played.tree == [
        "0: model",
        "1 < 0: model",
        "2: SummarizationMiddleware.before_model, fresh",
        "3: model, compacted",
    ]


@pytest.mark.feature("a call that cannot be read")
def test_malformed_call(play):
    def build(self):
        llm = self.llm.bind_tools([add])

        async def agent(state: MessagesState):
            total = None
            async for chunk in llm.astream(state["messages"]):
                total = chunk if total is None else total + chunk
            [bad] = total.invalid_tool_calls
            assert total.tool_calls == []
            assert "not JSON" in bad["error"]
            more = [*state["messages"], total, HumanMessage("again")]
            return {"messages": [total, more[-1], await llm.ainvoke(more)]}

        graph = StateGraph(MessagesState)
        graph.add_node("agent", agent)
        graph.add_edge(START, "agent")
        return graph

    played = play(build, ['<tool_call>{"name": "add"', "4"])
    assert played.rows == [
        '{user/2+2?}/{assistant/«<tool_call>{"name": "add"}»/{user/again}/{assistant/«4}»'
    ]
    assert played.tree == ["0: agent", "1 < 0: agent"]


@pytest.mark.feature("system prompt by node")
def test_system_prompts(play):
    def build(self):
        async def ask(state: MessagesState):
            told = [SystemMessage("Brief."), *state["messages"]]
            return {"messages": [await self.llm.ainvoke(told), ("user", "sure?")]}

        graph = StateGraph(MessagesState)
        graph.add_node("ask", ask)
        graph.add_node("again", ask)
        graph.add_edge(START, "ask")
        graph.add_edge("ask", "again")
        return graph

    played = play(build, ["4", "yes"])
    assert played.rows == [
        "{system/Brief.}/{user/2+2?}/{assistant/«4}»/{user/sure?}/{assistant/«yes}»"
    ]
    assert played.tree == ["0: ask", "1 < 0: again"]
    assert played.trajectory.outcome is Outcome.FINISHED


@pytest.mark.feature("a tool that hands over (Command from a tool)")
def test_handoff_tool(play):
    def build(self):
        @tool
        def transfer(tool_call_id: Annotated[str, InjectedToolCallId]):
            """Hand over to the expert."""
            note = ToolMessage("handed over", tool_call_id=tool_call_id)
            return Command(goto="expert", update={"messages": [note]})

        llm = self.llm.bind_tools([transfer])

        async def desk(state: MessagesState):
            return {"messages": [await llm.ainvoke(state["messages"])]}

        async def expert(state: MessagesState):
            return {"messages": [await llm.ainvoke(state["messages"])]}

        graph = StateGraph(MessagesState)
        graph.add_node("desk", desk)
        graph.add_node("tools", ToolNode([transfer]), destinations=("expert",))
        graph.add_node("expert", expert)
        graph.add_edge(START, "desk")
        graph.add_edge("desk", "tools")
        return graph

    call = '<tool_call>{"name": "transfer", "arguments": {}}</tool_call>'
    played = play(build, [call, "4"])
    assert played.rows == [f"{{user/2+2?}}/{{assistant/«{call}}}»" + HEARD % "handed over" + "«4}»"]
    assert played.tree == ["0: desk", "1 < 0: expert"]


@pytest.mark.feature("two calls in one answer")
def test_parallel_tool_calls(play):
    both = CALL + "\n" + CALL.replace("2", "3")
    played = play(lambda self: loop(self.llm.bind_tools([add]), [add]), [both, "4, 6"])
    sampled = both.replace("\n", "/")
    heard = "/{user/<tool_response>/4/</tool_response>/<tool_response>/6/</tool_response>}"
    assert played.rows == [f"{{user/2+2?}}/{{assistant/«{sampled}}}»{heard}/{{assistant/«4, 6}}»"]
    assert played.trajectory.turns[0].tool_calls == ("add", "add")
