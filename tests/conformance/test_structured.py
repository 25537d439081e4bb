"""``with_structured_output``: three methods, raw or not, and answers that cannot be read."""

from __future__ import annotations

import pytest
from langchain_core.exceptions import OutputParserException
from pydantic import BaseModel
from typing_extensions import TypedDict

from chatlearn.types import Outcome


class Sum(BaseModel):
    """The sum."""

    value: int


class SumDict(TypedDict):
    """The sum."""

    value: int


JSON_SCHEMA = {
    "title": "Sum",
    "description": "The sum.",
    "type": "object",
    "properties": {"value": {"type": "integer"}},
    "required": ["value"],
}
CALLED = '{"value": 4}}\n</tool_call>'
OPENING = '<tool_call>/{"name": "%s", "arguments": '


def asks(schema, seen, **options):
    async def run(self, messages, **row):
        model = self.llm.with_structured_output(schema, **options)
        seen.append(await model.ainvoke(messages))
        return {"messages": messages}

    return run


@pytest.mark.feature("with_structured_output, function_calling")
@pytest.mark.parametrize(
    ("schema", "name", "object_"),
    [
        (Sum, "Sum", Sum(value=4)),
        (SumDict, "SumDict", {"value": 4}),
        (JSON_SCHEMA, "Sum", {"value": 4}),
    ],
    ids=["pydantic", "TypedDict", "JSON schema"],
)
def test_function_calling(play, schema, name, object_):
    seen = []
    played = play(None, [CALLED], run=asks(schema, seen))
    assert seen == [object_]
    assert played.rows == [
        "{user/2+2?}/{assistant/" + OPENING % name + '«{"value": 4}}/</tool_call>}»'
    ]


@pytest.mark.feature("with_structured_output, json_schema")
@pytest.mark.parametrize(
    ("schema", "object_"),
    [(Sum, Sum(value=4)), (SumDict, {"value": 4}), (JSON_SCHEMA, {"value": 4})],
    ids=["pydantic", "TypedDict", "JSON schema"],
)
def test_json_schema(play, schema, object_):
    seen = []
    played = play(
        None, ['```json\n{"value": 4}\n```'], run=asks(schema, seen, method="json_schema")
    )
    assert seen == [object_]
    [row] = played.rows
    assert row.startswith("{system/Answer with one JSON object and nothing else. ")
    assert row.endswith('}/{user/2+2?}/{assistant/«```json/{"value": 4}/```}»')


@pytest.mark.feature("with_structured_output, json_mode")
@pytest.mark.parametrize(("schema", "object_"), [(Sum, Sum(value=4)), (None, {"value": 4})])
def test_json_mode(play, schema, object_):
    seen = []
    played = play(None, ['{"value": 4}'], run=asks(schema, seen, method="json_mode"))
    assert seen == [object_]
    assert played.rows == ['{user/2+2?}/{assistant/«{"value": 4}}»']


@pytest.mark.feature("with_structured_output, include_raw")
@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
def test_include_raw(play, method):
    good = [CALLED if method == "function_calling" else '{"value": 4}']
    bad = ['{"value": 4…' if method == "function_calling" else "four"]
    seen = []
    run = asks(Sum, seen, method=method, include_raw=True)
    play(None, good, run=run)
    played = play(
        None,
        bad,
        run=run,
        outcome=Outcome.TRUNCATED if method == "function_calling" else Outcome.FINISHED,
    )
    assert seen[0]["parsed"] == Sum(value=4)
    assert seen[0]["parsing_error"] is None
    assert seen[1]["parsed"] is None
    assert isinstance(seen[1]["parsing_error"], OutputParserException)
    assert seen[1]["raw"].id == "turn-0:test:0/0.0-0"
    assert len(played.rows) == 1


@pytest.mark.feature("with_structured_output, an answer that cannot be read")
def test_unreadable(play):
    """The error is the agent's to handle; the answer is data and is trained."""

    async def run(self, messages, **row):
        model = self.llm.with_structured_output(Sum, method="json_mode")
        with pytest.raises(OutputParserException, match="not a Sum"):
            await model.ainvoke(messages)
        return {"messages": messages}

    played = play(None, ['{"value": "four"}'], run=run)
    assert played.rows == ['{user/2+2?}/{assistant/«{"value": "four"}}»']


@pytest.mark.feature("with_structured_output, turns continue")
@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_turns_continue(play, method):
    async def run(self, messages, **row):
        model = self.llm.with_structured_output(Sum, method=method, include_raw=True)
        messages = [("system", "Brief."), *messages] if method == "json_schema" else messages
        first = (await model.ainvoke(messages))["raw"]
        await model.ainvoke([*messages, first, ("user", "again")])
        return {"messages": []}

    played = play(None, ['{"value": 4}', '{"value": 5}'], run=run)
    [row] = played.rows
    turns = '{user/2+2?}/{assistant/«{"value": 4}}»/{user/again}/{assistant/«{"value": 5}}»'
    system = row.removesuffix(turns)
    if method == "json_mode":
        assert system == ""
    else:
        assert system.startswith("{system/Brief.//Answer with one JSON object and nothing else. ")
    assert len(row) == len(system) + len(turns)
    assert played.tree == ["0: ", "1 < 0: "]
