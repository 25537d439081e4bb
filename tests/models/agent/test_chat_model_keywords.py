"""The keywords of a call: what acts, what changes nothing, and what is refused."""

from __future__ import annotations

import copy

import langgraph.prebuilt
import pytest
from langchain_core.tools import tool

from chatlearn.errors import AgentError
from chatlearn.models.agent.asking import ANY_TOOL, Wish
from chatlearn.models.agent.chat.bound_tools import shown_tools
from chatlearn.models.agent.chat.call_settings import wish_of
from chatlearn.models.agent.tool_parser import tool_parser

ADD = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}
LOOK = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}
HERMES = tool_parser("hermes")
ToolRuntime = getattr(langgraph.prebuilt, "ToolRuntime", None)


@pytest.mark.parametrize(
    ("asked", "wish"),
    [
        ({}, Wish()),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 5}, Wish(temperature=0.5, top_p=0.9, top_k=5)),
        ({"max_completion_tokens": 7}, Wish(max_tokens=7)),
        ({"sampling_params": {"max_new_tokens": 9, "top_k": -1}}, Wish(max_tokens=9, top_k=-1)),
        ({"sampling_params": {"temperature": 0.1}, "temperature": 0.2}, Wish(temperature=0.2)),
        ({"seed": 3, "temperature": None}, Wish(seed=3)),
        ({"parallel_tool_calls": False, "strict": True, "user": "me", "n": 1}, Wish()),
        ({"presence_penalty": 0.0, "repetition_penalty": 1, "logprobs": False}, Wish()),
        ({"tools": [ADD]}, Wish(tools=[ADD])),
        ({"tools": [ADD], "tool_choice": "any"}, Wish(tools=[ADD], must_call="add")),
        ({"tools": [ADD, LOOK], "tool_choice": True}, Wish(tools=[ADD, LOOK], must_call=ANY_TOOL)),
        ({"tools": [ADD, LOOK], "tool_choice": "look"}, Wish(tools=[ADD, LOOK], must_call="look")),
        ({"tools": [ADD], "tool_choice": "none"}, Wish()),
    ],
)
def test_keywords_that_act_or_change_nothing(asked, wish):
    assert wish_of(asked, None, HERMES) == wish


def test_what_a_call_says_is_over_what_the_model_is_set_to():
    defaults = {"temperature": 0.1, "top_p": 0.5, "stop": ["x"]}
    assert wish_of({"temperature": 0.9}, None, HERMES, defaults) == Wish(
        temperature=0.9, top_p=0.5, stop=("x",)
    )
    assert wish_of({"sampling_params": {"top_p": 1}}, ["y"], HERMES, defaults) == Wish(
        temperature=0.1, top_p=1.0, stop=("y",)
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"temprature": 1}, r"temprature=1 of self.llm is not known; known: temperature, top_p"),
        ({"reasoning_effort": "low"}, "reasoning_effort='low' of self.llm is not known"),
        ({"sampling_params": {"tools": []}}, r"tools=\[\] of sampling_params is not known"),
        ({"sampling_params": 3}, "sampling_params=3 of self.llm must be a dict"),
        ({"temperature": -1}, "temperature=-1 of self.llm: it must be a number, at least 0"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": True}, "temperature=True"),
        ({"top_p": 0}, "top_p=0 of self.llm: it must be a number, above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 0}, "top_k=0 of self.llm: it must be a whole number, at least 1, or -1"),
        ({"max_tokens": 0}, "max_tokens=0 of self.llm: it must be a whole number, at least 1"),
        ({"max_tokens": 1.5}, "max_tokens=1.5"),
        ({"seed": "x"}, "seed='x' of self.llm: it must be a whole number"),
        ({"stop": ["a", ""]}, "give strings that are not empty"),
        ({"stop": [3]}, "give strings that are not empty"),
        ({"n": 2}, r"await self.llm.abatch\(\[messages\] \* n\)"),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5 of self.llm: tokens are trained under"),
        ({"logprobs": True}, "logprobs=True"),
        ({"tool_choice": "add"}, "tool_choice='add' without tools"),
        ({"tools": [ADD, LOOK], "tool_choice": "ad"}, "names no tool; bound are: add, look"),
        ({"tools": [ADD], "tool_choice": 3}, "tool_choice=3 is not known"),
        ({"tools": [3]}, "3 cannot be shown to the policy as a tool"),
        ({"tools": [{"type": "web_search_preview"}]}, "is a tool that its provider runs"),
    ],
)
def test_keywords_that_are_refused(asked, said):
    with pytest.raises(AgentError, match=said):
        wish_of(asked, None, HERMES)


def test_a_format_that_cannot_force_calls_says_so(llm):
    plain = llm.model_copy(update={"parser": tool_parser("none")})
    with pytest.raises(AgentError, match=r"cannot be forced in this model's format \(PlainParser"):
        plain.bind_tools([ADD], tool_choice="any")
    plain.bind_tools([ADD])
    assert "tool_choice" not in plain.with_structured_output(ADD).first.kwargs


def test_bind_tools_refuses_an_unknown_tool_where_it_is_written(llm):
    with pytest.raises(AgentError, match="bound are: add"):
        llm.bind_tools([ADD], tool_choice="sub")


def test_any_keyword_is_not_an_argument():
    def spread(a: int, **kwargs) -> str:
        """Has any."""

    [shown] = shown_tools([spread])
    assert list(shown["function"]["parameters"]["properties"]) == ["a"]


@pytest.mark.skipif(ToolRuntime is None, reason="ToolRuntime is new in langgraph 1.0")
@pytest.mark.parametrize("made", [tool, lambda function: function], ids=["tool", "function"])
def test_the_runtime_of_a_tool_is_not_shown(made):
    def look(word: str, runtime: ToolRuntime) -> str:
        """Look a word up."""

    [shown] = shown_tools([made(look)])
    assert list(shown["function"]["parameters"]["properties"]) == ["word"]


def test_schemas_of_the_user_are_left_as_they_are():
    mine = copy.deepcopy(ADD)
    shown_tools([mine])
    assert mine == ADD


@pytest.mark.parametrize(
    ("schema", "method"), [(ADD, "xml"), (None, "json_schema"), (3, "json_schema")]
)
def test_structured_output_that_cannot_be(llm, schema, method):
    with pytest.raises(AgentError, match="with_structured_output"):
        llm.with_structured_output(schema, method=method)
