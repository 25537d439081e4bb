"""Tools as the model is shown them, and how one of them is forced."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from langchain_core.tools import InjectedToolArg
from langchain_core.tools import tool as as_tool
from langchain_core.utils.function_calling import convert_to_openai_tool

from chatlearn.errors import AgentError
from chatlearn.models.agent.asking import ANY_TOOL


def shown_tools(tools: Sequence[Any]) -> list[dict]:
    """OpenAI schemas of ``tools``: LangChain tools, functions, pydantic classes, TypedDicts, or
    schemas as they are. Arguments that LangGraph injects (state, store, runtime) are not shown.

    Raises:
        AgentError: something is not a tool, or a tool that only a provider can run.
    """
    return [_schema(tool) for tool in tools]


def called_tool(choice: Any, tools: Sequence[Mapping[str, Any]], parser: Any) -> str | None:
    """Name of the tool that ``tool_choice=choice`` forces, ``ANY_TOOL`` for any, None for none.

    Args:
        choice: None, False, "auto" and "none" force nothing; True, "any" and "required" a call;
            the name of a tool, or OpenAI's dict of it, that tool.
        tools: their schemas. Any of one is that one.
        parser: ``ToolParser`` of the model.

    Raises:
        AgentError: no such tool, or calls cannot be forced in the model's format.
    """
    name = _chosen(choice)
    if name is None:
        return None
    names = [tool["function"]["name"] for tool in tools]
    if not names:
        raise AgentError(f"tool_choice={choice!r} without tools; pass them to bind_tools")
    if name == ANY_TOOL and len(names) == 1:
        name = names[0]
    if name != ANY_TOOL and name not in names:
        raise AgentError(
            f"tool_choice={choice!r} names no tool; bound are: {', '.join(names)} (or use 'auto', "
            "'any', 'none')"
        )
    if parser.prefix(None if name == ANY_TOOL else name) is None:
        raise AgentError(
            f"tool_choice={choice!r}: a call cannot be forced in this model's format "
            f"({type(parser).__name__}), for nothing is written in front of one; use "
            "tool_choice='auto' and ask for the call in the prompt"
        )
    return name


def hides_tools(choice: Any) -> bool:
    """Whether ``tool_choice=choice`` means no call: the policy is not shown the tools then."""
    return choice == "none" or (isinstance(choice, Mapping) and choice.get("type") == "none")


def _chosen(choice: Any) -> str | None:
    """Name of the tool to call, ``ANY_TOOL``, or None when the model is free."""
    if isinstance(choice, Mapping):
        kind = choice.get("type", "function")
        named = choice.get("function", choice)
        if kind in ("function", "tool") and isinstance(named, Mapping) and named.get("name"):
            return str(named["name"])
        choice = kind if kind != "function" else choice
    if choice is None or choice is False or choice in ("auto", "none"):
        return None
    if choice is True or choice in ("any", "required"):
        return ANY_TOOL
    if isinstance(choice, str) and choice:
        return choice
    raise AgentError(
        f"tool_choice={choice!r} is not known; use 'auto', 'none', 'any' (or 'required', True), "
        "the name of a tool, or {'type': 'function', 'function': {'name': ...}}"
    )


def _schema(tool: Any) -> dict:
    if isinstance(tool, Mapping) and tool.get("type") == "function" and "function" in tool:
        return dict(tool)
    try:
        if inspect.isroutine(tool):  # as LangGraph does, so that it injects what is not shown
            tool = as_tool(tool, parse_docstring=True, error_on_invalid_docstring=False)
        schema = convert_to_openai_tool(tool)
    except (TypeError, ValueError) as error:
        raise AgentError(
            f"{tool!r} cannot be shown to the policy as a tool: {error}; give bind_tools LangChain "
            "tools, functions with a docstring, pydantic classes or OpenAI schemas"
        ) from error
    if "function" not in schema:
        raise AgentError(
            f"{tool!r} is a tool that its provider runs; the policy has none such: bind a "
            "LangChain tool that does the same"
        )
    parameters = schema["function"].get("parameters", {})
    for name in _not_the_models(tool):
        parameters.get("properties", {}).pop(name, None)
        if name in parameters.get("required", ()):
            parameters["required"] = [r for r in parameters["required"] if r != name]
    return schema


def _not_the_models(tool: Any) -> set[str]:
    """Arguments that LangChain lists and that are not the model's to give: a function's
    ``**kwargs``, and, in older versions, what is injected where annotations are texts."""
    function = getattr(tool, "func", None) or getattr(tool, "coroutine", None)
    if not inspect.isroutine(function):
        return set()
    parameters = inspect.signature(function).parameters.values()
    names = {p.name for p in parameters if p.kind is p.VAR_KEYWORD and p.name == "kwargs"}
    return names | {name for name, hint in _hints(function).items() if _is_injected(hint)}


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except NameError:  # an annotation of a name that is only there for type checkers
        return {}


def _is_injected(hint: Any) -> bool:
    marks = getattr(hint, "__metadata__", ())
    return any(
        isinstance(m, InjectedToolArg) or (isinstance(m, type) and issubclass(m, InjectedToolArg))
        for m in marks
    )
