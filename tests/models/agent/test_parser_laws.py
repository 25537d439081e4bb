"""Whatever a model writes: no parser raises, loses a character, takes back what it showed, or
slows down."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatlearn.models.agent.parsers.segments import Kind
from chatlearn.models.agent.tool_parser import PARSERS, ParsedCall, ParsedText, tool_parser

NAMES = list(PARSERS)
VALID = {
    "hermes": '<think>a</think>\n\nOk.\n<tool_call>\n{"name": "f", "arguments": {"x": '
    '"</tool_call>"}}\n</tool_call> b <tool_call>{"name": "g"}</tool_call> c',
    "qwen3_coder": "Ok.\n<tool_call>\n<function=f>\n<parameter=x>\n</tool_call>\n</parameter>\n"
    "</function>\n</tool_call> b <tool_call><function=g></function></tool_call> c",
    "glm": "<think>a</think>\nOk.\n<tool_call>f\n<arg_key>x</arg_key>\n<arg_value></tool_call>"
    "</arg_value>\n</tool_call> b <tool_call>g</tool_call> c",
    "llama3": '{"name": "f", "parameters": {"x": "<|python_tag|"}}; {"name": "g", "parameters": {}}'
    ' b <|python_tag|>{"name": "h"}',
    "pythonic": "[f(x='<|python_start|'), g()] b <|python_start|>[h(y=[1, {'a': 2}])]"
    "<|python_end|> c",
    "lfm2": "Ok. <|tool_call_start|>[f(x=1), g()]<|tool_call_end|> c",
    "mistral": '[THINK]a[/THINK]Ok. [TOOL_CALLS] [{"name": "f", "arguments": {"x": "[TOOL_CALLS]"}}'
    ', {"name": "g"}] b [TOOL_CALLS]h[ARGS]{"x": 1} c',
    "mistral_v11": 'Ok. [TOOL_CALLS]f[CALL_ID]abc[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{} c',
    "deepseek_v3": "<think>a</think>Ok.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
    '<｜tool▁sep｜>f\n```json\n{"x": "```"}\n```<｜tool▁call▁end｜>\n<｜tool▁calls▁end｜> c',
    "deepseek_v31": 'Ok.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"x": 1}'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜> c",
    "kimi_k2": "<think>a</think>Ok.<|tool_calls_section_begin|>\n<|tool_call_begin|>functions.f:0"
    '<|tool_call_argument_begin|>{"x": 1}<|tool_call_end|>\n<|tool_calls_section_end|> c',
    "gpt_oss": "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary"
    "<|message|>Ok.<|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|>"
    '{"x": 1}<|call|><|start|>assistant<|channel|>final<|message|>c',
    "none": "<think>a</think>\n\nb",
}
TAGS = re.compile(
    r"</?tool_call>|</?think>|\[/?THINK\]|◁/?think▷|\[TOOL_CALLS\]|<[|｜][a-z_▁]+[|｜]>"
)
FRAGMENTS = [
    *sorted({tag for text in VALID.values() for tag in TAGS.findall(text)}),
    *("<function=f>", "</function>", "<parameter=x>", "</parameter>", "[ARGS]", "functions.f:0"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "◁think▷", "◁/think▷", "[f(", ")]"),
    *("function", "```json", "```", "to=functions.f", "analysis", "final", "assistant", "user"),
    *('{"name": "f"', '"arguments": {}', '"parameters": ', '{"x": 1}', "{", "}", "[", "]", '"'),
    *(":", ",", ";", " ", "\n", "f", "x=1", "'", "\\", "<", "|", "\\ud800", "NaN"),
]
MARKED = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)
CUT = st.builds(
    lambda text, at, rest: text[: at % (len(text) + 1)] + rest,
    st.sampled_from(sorted(VALID.values())),
    st.integers(0, 10_000),
    MARKED,
)
TEXT = st.text() | st.text(alphabet=st.sampled_from('<>/_{}[]":, abtool_callthink\\n1')) | MARKED
TEXT = TEXT | CUT
MARKUP = re.compile(
    rf"(?:{TAGS.pattern}|[\s;]|assistant|analysis|commentary|final|<\|constrain\|>json)*"
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150)
@given(TEXT, st.booleans())
@example("[A(A=<|python_end|>0", False)
@example("[TOOL_CALLS][TOOL_CALLS]<", False)
@example("[TOOL_CALLS][", False)
@example('<|python_tag|>{"name": "f"}; {"name": "g"}; ', False)
@example('{"name": "f"}; {"name": "g"}; ', False)
def test_no_text_is_lost(name, text, thinking_open):
    parser = tool_parser(name)
    segments = list(parser.segments(text, TOOLS, thinking_open=thinking_open))
    assert "".join(s.text for s in segments) == text
    for segment in segments:
        assert bool(segment.calls) is (segment.kind is Kind.CALL)
        if segment.kind is Kind.MARKUP:
            assert MARKUP.fullmatch(segment.text), segment.text
        for call in segment.calls:
            if call.error:
                assert isinstance(call.arguments, str)
                assert call.arguments in segment.text
            else:
                json.dumps(call.arguments, ensure_ascii=False, allow_nan=False).encode()
        if len(segment.calls) == 1 and segment.calls[0].error:
            before, _, after = segment.text.rpartition(segment.calls[0].arguments or "\0")
            around = before + after
            assert MARKUP.fullmatch(_headers(around)), around
    parsed = parser.parse(text, TOOLS, thinking_open=thinking_open)
    assert parsed.calls == [call for segment in segments for call in segment.calls]


def _headers(text: str) -> str:
    """Without the names a call's ``name`` stands for."""
    return re.sub(r"to=\S*?(?=[\s<])|(?<=commentary )json|\w+(?=<\|call\|>)", "", text)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150)
@given(TEXT, st.booleans())
@example("<|tool_call_start|>[f(x=1),g()]<|tool_call_end|>", False)
@example('<tool_call>{"x": "</tool_call> a"} <tool_call>', False)
@example(' to=functions.f<|channel|>commentary<|message|>{"x": 1}', False)
def test_what_was_shown_is_never_taken_back(name, text, thinking_open):
    parser = tool_parser(name)
    before = ""
    for end in range(min(len(text), 250) + 1):
        piece = text[:end]
        shown = parser.visible(piece, thinking_open=thinking_open)
        assert shown.startswith(before)
        for tools in (None, TOOLS):
            content = parser.parse(piece, tools, thinking_open=thinking_open).content
            assert content.startswith(shown)
        before = shown


@pytest.mark.parametrize("name", NAMES)
def test_a_valid_text_is_shown_as_it_comes(name):
    """Not the empty answer to the law above: content that is final is shown."""
    parser, text = tool_parser(name), VALID[name]
    parsed = parser.parse(text)
    assert not any(call.error for call in parsed.calls)
    if name not in ("llama3", "pythonic"):  # content after their calls waits for the end
        assert parser.visible(text) == parsed.content.rstrip() != ""
    assert parser.visible("The answer is 4") == "The answer is 4"


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_call_is_a_call_with_an_error(name):
    """Every place inside the last call of a valid text: the call is there, whole or malformed."""
    parser, text = tool_parser(name), VALID[name]
    segments = list(parser.segments(text))
    whole = parser.parse(text).calls
    at = 0
    for segment in segments:
        opening = max((len(m) for m in parser.markers if segment.text.startswith(m)), default=None)
        if name == "gpt_oss" and segment.kind is Kind.CALL:  # the recipient makes it a call
            opening = segment.text.index("to=f") + 4
        if segment.kind is Kind.CALL and opening is not None:
            for end in range(at + opening, at + len(segment.text)):
                found = parser.parse(text[:end]).calls
                assert found, text[:end]
                assert found[-1].error or found[-1] in whole
        at += len(segment.text)


CODER = "<function=f><parameter=x>1</parameter></function>"
SLOW = [
    *(
        "<tool_call>",
        "<tool_call>{",
        '<tool_call>{"',
        '<tool_call>{"a":"',
        "<tool_call>[",
        "</think>",
    ),
    *('<tool_call>{"a":[', '<tool_call>{"a":"\\"', '<tool_call>{"name": "f"}', "<think>", "[", "{"),
    *(
        "<tool_call><function=f>",
        "<tool_call><function=f><parameter=x>",
        "<parameter=x></parameter>",
    ),
    *("<tool_call><function=f><parameter=x>1</parameter>", "<tool_call>f<arg_key>x</arg_key>"),
    *(
        "<tool_call>f<arg_key>x</arg_key><arg_value>",
        "<tool_call>\n",
        "<tool_call>f",
        "</arg_value>",
    ),
    *(
        "[TOOL_CALLS]",
        "[TOOL_CALLS] [",
        '[TOOL_CALLS] [{"',
        "[TOOL_CALLS]f[ARGS]{",
        "[TOOL_CALLS]f",
    ),
    *(
        "[TOOL_CALLS]f[CALL_ID]",
        '[TOOL_CALLS] [{"name": "f"},',
        "<|python_tag|>",
        "<|python_tag|>{",
    ),
    *(
        '{"name": "f", "parameters": {}};',
        '{"name": "f", "parameters": {',
        "[f(",
        "[f(x=[",
        "[f(x='",
    ),
    *(
        "<|python_start|>",
        "<|python_start|>[f(x='",
        '<|python_start|>[f(x="\\',
        "[f(x=1),",
        "(",
        " ",
    ),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁sep｜>",
        "\n",
    ),
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{",
    *("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_begin|>functions.f:0"),
    '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a":"',
    *(
        "<|channel|>",
        "<|start|>",
        "<|message|>",
        "<|channel|>analysis<|message|>",
        "<|end|>",
        " to=f",
    ),
    *(
        "<|start|>assistant<|channel|>commentary to=f<|message|>{",
        "to=",
        "<",
        "a ",
        "1",
        "\\",
        '"a",',
    ),
]


@pytest.mark.parametrize("name", NAMES)
def test_time_is_linear_in_the_text(name):
    """100,000 characters of one marker, with an opening of its own and without: below a second."""
    parser = tool_parser(name)
    for unit in SLOW:
        for start in ("", *parser.markers[:1]):
            text = start + unit * (100_000 // len(unit))
            begun = time.perf_counter()
            parser.parse(text, TOOLS)
            parser.visible(text)
            taken = time.perf_counter() - begun
            assert taken < 1, f"{unit!r} after {start!r}: {taken:.2f} s"


@pytest.mark.parametrize(
    ("name", "millions", "unit"),
    [
        ("hermes", 3, "<tool_call>{"),
        ("hermes", 1, '<tool_call>{"a":"'),
        ("qwen3_coder", 1, f"<tool_call>{CODER}</tool_call>"),
        ("glm", 1, "<tool_call>f<arg_key>x</arg_key><arg_value>"),
        ("mistral", 1, "[TOOL_CALLS]f[ARGS]{"),
    ],
)
def test_millions_of_characters_take_seconds(name, millions, unit):
    """What is quadratic with a small constant shows itself here."""
    text = unit * (millions * 1_000_000 // len(unit))
    begun = time.perf_counter()
    tool_parser(name).parse(text, TOOLS)
    assert time.perf_counter() - begun < 5


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200)
@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=4), st.booleans())
@example({"x": "</tool_call><tool_call>"}, False)
@example({"x": "\n```<｜tool▁call▁end｜>"}, True)
def test_arguments_may_hold_any_text(arguments, ascii_only):
    """The formats in JSON: what is between the markers is JSON, whatever the strings say."""
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    called = [ParsedCall("f", arguments)]
    for name, text in {
        "hermes": f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>',
        "llama3": f'{{"name": "f", "parameters": {written}}}',
        "mistral": f'[TOOL_CALLS] [{{"name": "f", "arguments": {written}}}]',
        "mistral_v11": f"[TOOL_CALLS]f[ARGS]{written}",
        "deepseek_v31": f"<｜tool▁call▁begin｜>f<｜tool▁sep｜>{written}<｜tool▁call▁end｜>",
        "kimi_k2": f"<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{written}"
        "<|tool_call_end|>",
    }.items():
        assert tool_parser(name).parse(text + " ok") == ParsedText(" ok", "", called), name


@settings(max_examples=200)
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), VALUES, max_size=4))
def test_python_literals_are_read_back(arguments):
    written = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    parsed = tool_parser("pythonic").parse(f"[f({written})]")
    assert parsed == ParsedText("", "", [ParsedCall("f", arguments)])
