"""Answers as objects: ``with_structured_output`` and ``response_format``.

No constrained decoding: it would sample from another distribution than the one that is trained.
A schema is shown to the model, what it says is read strictly, and what cannot be read is an error
that the graph sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, BaseMessage, SystemMessage
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.json import parse_json_markdown
from langchain_core.utils.pydantic import is_basemodel_subclass

from chatlearn.errors import AgentError

METHODS = ("function_calling", "json_schema", "json_mode")
Schema = Mapping[str, Any] | type


def response_format(schema: Schema) -> dict[str, Any]:
    """OpenAI's ``response_format`` for ``schema``: a pydantic class, a TypedDict or a JSON schema.

    Raises:
        AgentError: ``schema`` is none of these.
    """
    try:
        found = dict(convert_to_json_schema(schema))
    except (TypeError, ValueError) as error:
        raise AgentError(
            f"with_structured_output({schema!r}): {error}; give a pydantic class, a TypedDict or a "
            "JSON schema with a title"
        ) from error
    name = str(found.get("title", "answer"))
    return {"type": "json_schema", "json_schema": {"name": name, "schema": found}}


def with_note(messages: Sequence[BaseMessage], asked: Any) -> list[BaseMessage]:
    """``messages`` with the note that ``response_format=asked`` puts into the system message.

    The note depends on the schema alone, so that a later call with it continues the turn.

    Raises:
        AgentError: ``asked`` is not one of OpenAI's formats.
    """
    kind = asked.get("type") if isinstance(asked, Mapping) else None
    if asked is None or kind in ("text", "json_object"):
        return list(messages)
    schema = (asked.get("json_schema") or {}).get("schema") if kind == "json_schema" else None
    if not isinstance(schema, Mapping):
        raise AgentError(
            f"response_format={asked!r} of self.llm is not known; use {{'type': 'json_schema', "
            "'json_schema': {'name': ..., 'schema': {...}}}, or with_structured_output"
        )
    note = (
        "Answer with one JSON object and nothing else. It must be valid against this JSON schema:\n"
        + json.dumps(schema, ensure_ascii=False)
    )
    if not messages or not isinstance(messages[0], SystemMessage):
        return [SystemMessage(note), *messages]
    said = messages[0].content
    if isinstance(said, str):
        content: Any = f"{said}\n\n{note}" if said else note
    else:
        content = [*said, {"type": "text", "text": f"\n\n{note}"}]
    return [messages[0].model_copy(update={"content": content}), *messages[1:]]


def reader(
    schema: Schema | None, *, tool: str | None, include_raw: bool
) -> Callable[[AIMessage], Any]:
    """A function of the policy's answer that returns the object in it.

    Args:
        schema: pydantic classes are validated and built; others, and None, give a dict.
        tool: name of the tool that the object is the call of; None when it is the text.
        include_raw: return ``{"raw", "parsed", "parsing_error"}`` and do not raise.

    The function raises ``OutputParserException`` when the answer holds no such object.
    """

    def read(message: AIMessage) -> Any:
        found = _text_object(message) if tool is None else _call_object(message, tool)
        if not (isinstance(schema, type) and is_basemodel_subclass(schema)):
            return found
        build = getattr(schema, "model_validate", None) or schema.parse_obj
        try:
            return build(found)
        except ValueError as error:  # pydantic's ValidationError is one, of both its versions
            raise _unreadable(message, f"it is not a {schema.__name__}: {error}") from error

    def read_with_raw(message: AIMessage) -> dict[str, Any]:
        try:
            return {"raw": message, "parsed": read(message), "parsing_error": None}
        except OutputParserException as error:
            return {"raw": message, "parsed": None, "parsing_error": error}

    return read_with_raw if include_raw else read


def _call_object(message: AIMessage, tool: str) -> dict[str, Any]:
    for call in message.tool_calls:
        if call["name"] == tool:
            return call["args"]
    for bad in message.invalid_tool_calls:
        raise _unreadable(message, bad["error"] or "the tool call cannot be read")
    raise _unreadable(message, f"it does not call {tool!r}")


def _text_object(message: AIMessage) -> dict[str, Any]:
    text = str(message.text if isinstance(message.text, str) else message.text())
    try:
        found = parse_json_markdown(text, parser=json.loads)
    except ValueError as error:
        raise _unreadable(message, f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise _unreadable(message, "it is not a JSON object")
    return found


def _unreadable(message: AIMessage, why: str) -> OutputParserException:
    said = message.content if isinstance(message.content, str) else json.dumps(message.content)
    return OutputParserException(
        f"the policy's answer cannot be read: {why}\nIt said: {said!r} and called "
        f"{[c['name'] for c in message.tool_calls]}",
        llm_output=said,
    )
