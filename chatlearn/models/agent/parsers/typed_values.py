"""Values written as bare text, made into what the tool's schema says they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatlearn.models.agent.parsers.json_calls import load_json

_PYTHON = {"True": True, "False": False, "None": None}
"""Templates write booleans as Python does (Qwen3.5: ``args_value | string``)."""
_UNKNOWN = object()


def typed_arguments(
    name: str, written: dict[str, str], tools: Sequence[dict[str, Any]] | None
) -> dict[str, Any]:
    """``written`` by type: a string stays as it is, other types are read as JSON.

    A value that is not of its type stays text, so that the tool's own validation can say so. A
    parameter of no known type is JSON if it can be read as JSON, else text.
    """
    properties = _properties(name, tools)
    return {key: _typed(text, _types(properties.get(key))) for key, text in written.items()}


def _typed(text: str, types: set[str]) -> Any:
    if types == {"string"}:
        return text
    value = _loose(text.strip())
    if value is _UNKNOWN:
        return text
    if "integer" in types and isinstance(value, float) and value.is_integer():
        return value if "number" in types else int(value)
    kind = _kind(value)
    if types and kind == "string":
        return text
    known = not types or kind in types or (kind == "integer" and "number" in types)
    return value if known else text


def _loose(text: str) -> Any:
    if text in _PYTHON:
        return _PYTHON[text]
    try:
        return load_json(text)
    except ValueError:
        return _UNKNOWN


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "string",
        list: "array",
        dict: "object",
    }
    return kinds.get(type(value), "object")


def _properties(name: str, tools: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    for tool in tools or ():
        function = tool.get("function", tool)
        if function.get("name") == name:
            return (function.get("parameters") or {}).get("properties") or {}
    return {}


def _types(schema: Any) -> set[str]:
    """JSON type names a value may have; empty when the schema does not say."""
    if not isinstance(schema, dict):
        return set()
    for key in ("anyOf", "oneOf"):
        if key in schema:
            options = [_types(option) for option in schema[key]]
            return set().union(*options) if all(options) else set()
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return set(declared)
    if "enum" in schema:
        return {_kind(value) for value in schema["enum"]}
    return {_kind(schema["const"])} if "const" in schema else set()
