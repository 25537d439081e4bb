"""Hermes tool calls and thinking: whatever a model writes is parsed, nothing is dropped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.errors import ConfigError
from chatlearn.models.agent.tool_parser import PARSERS, ParsedCall, ParsedText, tool_parser

hermes = tool_parser("hermes")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 4.", ParsedText("It is 4.")),
        (
            'Let me see. <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
            ParsedText("Let me see.", calls=[ParsedCall("f", {"x": 1})]),
        ),
        (
            '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
            '<tool_call>{"name": "g", "arguments": "{\\"y\\": 2}"}</tool_call>',
            ParsedText("", calls=[ParsedCall("f", {}), ParsedCall("g", {"y": 2})]),
        ),
        (
            '<tool_call>{"name": "f"}',  # never closed, yet whole
            ParsedText("", calls=[ParsedCall("f", {})]),
        ),
        ("<think>two and two</think>\n\n4", ParsedText("4", "two and two")),
        ("two and two</think>4", ParsedText("4", "two and two")),  # opened by the template
        ("<think>two and", ParsedText("", "two and")),  # cut
    ],
)
def test_what_is_written_is_what_is_read(text, expected):
    assert hermes.parse(text) == expected


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ('{"name": "f", "arguments": {"x": 1}', "not JSON"),
        ('["f"]', 'no "name"'),
        ('{"arguments": {}}', 'no "name"'),
        ('{"name": "f", "arguments": [1]}', "not a JSON object"),
        ('{"name": "f", "arguments": "x"}', "not a JSON object"),
        ("[" * 100_000, "not"),
    ],
)
def test_a_malformed_call_is_kept_with_the_reason(body, error):
    [call] = hermes.parse(f"<tool_call>{body}</tool_call>").calls
    assert error in call.error or "deeply" in call.error
    assert call.arguments == body


@given(st.text(alphabet=st.sampled_from('<>/_{}[]":, abtool_callthink\\n1')) | st.text())
def test_no_text_makes_a_parser_raise(text):
    for name in PARSERS:
        tool_parser(name).parse(text)


def test_an_unknown_parser_lists_the_known():
    with pytest.raises(ConfigError, match=r"'hermis' is not known; known: hermes"):
        tool_parser("hermis")
