"""What each family of models writes, and what is read; the registry; the guess.

Literal texts. That no text at all breaks a parser is in test_parser_laws.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chatlearn.errors import AgentError, ConfigError
from chatlearn.models.agent.tool_parser import (
    PARSERS,
    ParsedCall,
    ParsedText,
    SegmentParser,
    content_segment,
    guess,
    register_tool_parser,
    tool_parser,
)

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {
                "x": {"type": "integer"},
                "r": {"type": "number"},
                "on": {"type": "boolean"},
                "s": {"type": "string"},
                "o": {"type": "object"},
                "l": {"type": "array"},
                "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "one": {"enum": [1, 2]},
            },
        },
    },
}
DS = "<｜tool▁calls▁begin｜>"
DS_END = "<｜tool▁calls▁end｜>"
KIMI = "<|tool_calls_section_begin|>"
KIMI_END = "<|tool_calls_section_end|>"


def deepseek(name: str, arguments: str) -> str:
    return (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
        "<｜tool▁call▁end｜>"
    )


def kimi(name: str, index: int, arguments: str) -> str:
    return (
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{arguments}"
        "<|tool_call_end|>"
    )


def calls(*named: tuple[str, dict], content: str = "", reasoning: str = "") -> ParsedText:
    return ParsedText(content, reasoning, [ParsedCall(name, args) for name, args in named])


F, G = ("f", {"x": 1}), ("g", {"a": {"b": ["ü", None, 1.5, "</tool_call>"]}})
X1 = '{"x": 1}'
G_JSON = '{"a": {"b": ["ü", null, 1.5, "</tool_call>"]}}'
WELL_FORMED = [
    ("hermes", "It is 4.", ParsedText("It is 4.")),
    (
        "hermes",
        'Let me see. <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
        calls(F, content="Let me see."),
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n'
        f'<tool_call>{{"name": "g", "arguments": {G_JSON}}}</tool_call>',
        calls(F, G),
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
        '<tool_call>{"name": "g", "arguments": "{\\"y\\": 2}"}</tool_call> done',
        calls(("f", {}), ("g", {"y": 2}), content=" done"),
    ),
    ("hermes", '<tool_call>{"name": "f"}', calls(("f", {}))),  # whole, closed by the turn's end
    ("hermes", '<tool_call>{"name":"f","parameters":{"x":1}}</tool_call>', calls(F)),
    (
        "hermes",
        '<think>\nI add.\n</think>\n\n<tool_call>{"name":"f","arguments":{"x":1}}</tool_call>',
        calls(F, reasoning="I add."),
    ),
    ("hermes", "<think>two and two</think>\n\n4", ParsedText("4", "two and two")),
    ("hermes", "<think>two and", ParsedText("", "two and")),
    ("hermes", "<think>\n\n</think>\n\n4", ParsedText("4")),
    ("hermes", "a <think> b </think> c", ParsedText("a <think> b </think> c")),
    ("hermes", "4</tool_call><|stray|>", ParsedText("4</tool_call><|stray|>")),
    (
        "qwen3_coder",
        "Sure.\n\n<tool_call>\n<function=add>\n<parameter=x>\n3\n</parameter>\n<parameter=s>\n"
        "3\n\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n"
        "</tool_call>",
        calls(("add", {"x": 3, "s": "3\n"}), ("now", {}), content="Sure."),
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=add>\n<parameter=s>\na</parameter>\nb<parameter=</tool_call>\n"
        "</parameter>\n<parameter=on>\nTrue\n</parameter>\n</function>",
        calls(("add", {"s": "a</parameter>\nb<parameter=</tool_call>", "on": True})),
    ),
    (
        "glm",
        "<think>I add.</think>\nOk.\n<tool_call>add\n<arg_key>x</arg_key>\n<arg_value>3</arg_value>"
        '\n<arg_key>o</arg_key>\n<arg_value>{"é": [1]}</arg_value>\n</tool_call>\n'
        "<tool_call>now\n</tool_call>",
        calls(("add", {"x": 3, "o": {"é": [1]}}), ("now", {}), content="Ok.", reasoning="I add."),
    ),
    (
        "glm",  # 4.7
        "<tool_call>add<arg_key>s</arg_key><arg_value>12</arg_value><arg_key>r</arg_key>"
        "<arg_value>2</arg_value></tool_call><tool_call>now</tool_call>",
        calls(("add", {"s": "12", "r": 2}), ("now", {})),
    ),
    ("llama3", '{"name": "f", "parameters": {"x": 1}}', calls(F)),
    ("llama3", '{"type": "function", "name": "f", "parameters": {"x": 1}}', calls(F)),
    (
        "llama3",
        'Hm. <|python_tag|>{"name": "f", "parameters": {"x": 1}}; '
        f'{{"name": "g", "arguments": {G_JSON}}}',
        calls(F, G, content="Hm."),
    ),
    ("llama3", '{"name": "add"}', calls(("add", {}))),
    ("llama3", '{"name": "Ann", "age": 3}', ParsedText('{"name": "Ann", "age": 3}')),
    ("llama3", '{"name": "Ann"', ParsedText('{"name": "Ann"')),
    ("llama3", 'Say {"name": "f"}', ParsedText('Say {"name": "f"}')),
    ("pythonic", "[f(x=1), g(a={'b': ['ü', None, 1.5, \"</tool_call>\"]})]", calls(F, G)),
    ("pythonic", "<|python_start|>[f(x=+1,), now()]<|python_end|>", calls(F, ("now", {}))),
    (
        "pythonic",
        r"[f(x='a\n\'\x41\d', y=-.5, z=(1, True))]",
        calls(("f", {"x": "a\n'A\\d", "y": -0.5, "z": [1, True]})),
    ),
    ("pythonic", "[link](url) [f(x=1)]", ParsedText("[link](url) [f(x=1)]")),
    ("lfm2", "Ok.<|tool_call_start|>[f(x=1)]<|tool_call_end|> on", calls(F, content="Ok. on")),
    (
        "mistral",
        f'Ok. [TOOL_CALLS] [{{"name": "f", "arguments": {{"x": 1}}, "id": "abcdefghi"}}, '
        f'{{"name": "g", "arguments": {G_JSON}}}]',
        calls(F, G, content="Ok."),
    ),
    ("mistral", f"[TOOL_CALLS]f[ARGS]{X1}[TOOL_CALLS]g[ARGS]{G_JSON}", calls(F, G)),
    ("mistral_v11", '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"x": 1}', calls(F)),
    ("mistral", "[THINK]two[/THINK]4", ParsedText("4", "two")),
    (
        "deepseek_v3",
        f"Ok.{DS}{deepseek('f', X1)}\n{deepseek('g', G_JSON)}{DS_END}",
        calls(F, G, content="Ok."),
    ),
    ("deepseek_v3", deepseek("f", '{"x": 1}'), calls(F)),  # no section
    (
        "deepseek_v31",
        f"<think>a</think>{DS}<｜tool▁call▁begin｜>f<｜tool▁sep｜>{X1}<｜tool▁call▁end｜>"
        f"<｜tool▁call▁begin｜>g<｜tool▁sep｜>{G_JSON}<｜tool▁call▁end｜>{DS_END}",
        calls(F, G, reasoning="a"),
    ),
    (
        "kimi_k2",
        f"Ok.{KIMI}\n{kimi('f', 0, X1)}{kimi('g', 1, G_JSON)}{KIMI_END} on",
        calls(F, G, content="Ok. on"),
    ),
    ("kimi_k2", f"<think>I add.{KIMI}{kimi('f', 0, X1)}{KIMI_END}", calls(F, reasoning="I add.")),
    ("kimi_k2", "◁think▷two◁/think▷4", ParsedText("4", "two")),
    (
        "gpt_oss",
        "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant<|channel|>commentary"
        "<|message|>Ok.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"x": 1}',
        calls(F, content="Ok.", reasoning="I add."),
    ),
    ("gpt_oss", ' to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>', calls(F)),
    (
        "gpt_oss",
        "<|channel|>commentary<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
        ParsedText("a\nb"),
    ),
    ("gpt_oss", "4", ParsedText("4")),
    (
        "none",
        "<think>a</think><tool_call>{}</tool_call>",
        ParsedText("<tool_call>{}</tool_call>", "a"),
    ),
]


@pytest.mark.parametrize(("name", "text", "expected"), WELL_FORMED)
def test_what_is_written_is_what_is_read(name, text, expected):
    assert tool_parser(name).parse(text, [ADD]) == expected


OPEN, CLOSE = "<tool_call>", "</tool_call>"
DEEP, DEEPEST, LONG = "[" * 70 + "]" * 70, "[" * 100_000, "1" * 5000
HARMONY = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
MALFORMED = [
    ("hermes", f'{OPEN}{{"name": "f", "arguments": {{"x": 1{CLOSE}', "not JSON", None),
    ("hermes", f'{OPEN}["f"]{CLOSE}', "object was expected", None),
    ("hermes", f'{OPEN}{{"arguments": {{}}}}{CLOSE}', 'no "name"', None),
    ("hermes", f'{OPEN}{{"name": "f", "arguments": [1]}}{CLOSE}', "not a JSON object", "f"),
    ("hermes", f'{OPEN}{{"name": "f", "arguments": "x"}}{CLOSE}', "not a JSON object", "f"),
    ("hermes", f'{OPEN}{{"name": "f", "x": 1}}{CLOSE}', "also has x", "f"),
    ("hermes", f'{OPEN}{{"name": "f"}} and{CLOSE}', "goes on after its JSON", None),
    ("hermes", f'{OPEN}{{"name": "f", "arguments": {{"x": NaN}}}}{CLOSE}', "NaN is not JSON", None),
    ("hermes", f'{OPEN}{{"name": "f", "arguments": {{"x": 1e999}}}}{CLOSE}', "too large", None),
    ("hermes", f'{OPEN}{{"name": "f", "arguments": {{"x": "\\ud800"}}}}{CLOSE}', "surrogate", None),
    ("hermes", f'{OPEN}{{"x": {DEEP}}}{CLOSE}', "deeply", None),
    ("hermes", f'{OPEN}{{"x": {DEEPEST}{CLOSE}', "deeply", None),
    ("hermes", f'{OPEN}{{"x": {LONG}}}{CLOSE}', "not JSON", None),
    ("qwen3_coder", f"{OPEN}<function=f><parameter=x>1{CLOSE}", "'x' is not closed", "f"),
    ("qwen3_coder", f"{OPEN}<function=f>x</function>{CLOSE}", "as its format says", "f"),
    ("qwen3_coder", f"{OPEN}x{CLOSE}", "no name", None),
    ("glm", f"{OPEN}f\n<arg_key>x</arg_key>\n<arg_value>1", "'x' is not closed", "f"),
    ("glm", f"{OPEN}f<arg_key>x</arg_key>{CLOSE}", "as its format says", "f"),
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {"x": ', "not JSON", None),
    ("llama3", "<|python_tag|>print(1)", "object was expected", None),
    ("llama3", '{"name": "f", "parameters": {"x": ', "not JSON", "f"),
    ("llama3", '{"name": "f", "parameters": [1]}', "not a JSON object", "f"),
    ("pythonic", "[f(x=1", "ends early", None),
    ("pythonic", "<|python_start|>[f(1)]<|python_end|>", "arguments named", None),
    ("pythonic", "[f(x=g())]", "a literal was expected, not 'g'", None),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1', "not JSON", None),
    ("mistral", '[TOOL_CALLS] [{"name": "f"}', "array of tool calls is not closed", None),
    ("mistral", "[TOOL_CALLS] []", "object was expected", None),
    ("mistral", "[TOOL_CALLS]f{}", "no name", None),
    ("mistral", "[TOOL_CALLS][TOOL_CALLS]f[ARGS]{}", "no name", None),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"x"', "not JSON", "f"),
    ("deepseek_v3", f"{DS}{DS_END}", "holds no call", None),
    ("deepseek_v3", f"{DS}hm{DS_END}", "text between", None),
    ("deepseek_v3", f"{DS}<｜tool▁call▁begin｜>f<｜tool▁sep｜>{{}}{DS_END}", "no name", None),
    ("deepseek_v3", DS + deepseek("f", '{"x": '), "not JSON", "f"),
    ("kimi_k2", KIMI + kimi("f", 0, '{"x": ') + KIMI_END, "not JSON", "f"),
    ("kimi_k2", KIMI + "<|tool_call_begin|>3<|tool_call_argument_begin|>{}", "no name", None),
    ("kimi_k2", KIMI + kimi("f", 0, "{} x") + KIMI_END, "not closed after its JSON", "f"),
    ("gpt_oss", HARMONY + '{"x": 1', "not JSON", "f"),
    ("gpt_oss", HARMONY + "{} x", "text after", "f"),
    ("gpt_oss", "<|channel|>commentary to=functions.f", "header of the tool call is cut", "f"),
]


@pytest.mark.parametrize(("name", "text", "why", "called"), MALFORMED)
def test_a_malformed_call_is_kept_with_the_reason(name, text, why, called):
    found = tool_parser(name).parse(text, [ADD]).calls
    [call] = [call for call in found if call.error]
    assert why in call.error
    assert call.name == called
    assert isinstance(call.arguments, str)


def test_the_valid_calls_around_a_malformed_one_stand():
    text = f'a{OPEN}{{"name": "f"}}{CLOSE}{OPEN}{{{OPEN}{{"name": "g"}}{CLOSE}b'
    parsed = tool_parser("hermes").parse(text)
    assert [(c.name, c.error is None) for c in parsed.calls] == [
        ("f", True),
        (None, False),
        ("g", True),
    ]
    assert parsed.calls[1].arguments == "{"
    assert parsed.content == "ab"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("x", "3", 3),
        ("x", "3.0", 3),
        ("x", "three", "three"),
        ("x", "true", "true"),
        ("r", "3", 3),
        ("r", "-2.5e1", -25.0),
        ("on", "False", False),
        ("on", "true", True),
        ("on", "maybe", "maybe"),
        ("s", "007", "007"),
        ("s", "null", "null"),
        ("o", '{"a": [1]}', {"a": [1]}),
        ("o", "{a}", "{a}"),
        ("l", "[1, 2]", [1, 2]),
        ("maybe", "null", None),
        ("maybe", "3", "3"),
        ("maybe", '"q"', '"q"'),
        ("one", "2", 2),
        ("new", "[1]", [1]),
        ("new", "a b", "a b"),
    ],
)
def test_bare_text_takes_the_type_of_the_schema(key, text, value):
    written = f"<tool_call>add<arg_key>{key}</arg_key><arg_value>{text}</arg_value></tool_call>"
    [call] = tool_parser("glm").parse(written, [ADD]).calls
    assert call.arguments == {key: value}
    assert type(call.arguments[key]) is type(value)


def test_thinking_that_the_prompt_opened():
    parser = tool_parser("deepseek_v3")
    assert parser.opens_thinking("<｜Assistant｜><think>\n")
    assert not parser.opens_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert parser.parse("two and two</think>\n\n4", thinking_open=True) == ParsedText(
        "4", "two and two"
    )
    assert parser.parse("<think>two</think>4", thinking_open=True) == ParsedText("4", "two")
    assert parser.parse("two and", thinking_open=True) == ParsedText("", "two and")
    assert parser.parse("a</think>b") == ParsedText("a</think>b")  # nothing opened it
    assert parser.visible("two and two", thinking_open=True) == ""
    assert parser.visible("two</think>\n4", thinking_open=True) == "4"


REST = {
    "hermes": '{"x": 1}}\n</tool_call>',
    "qwen3_coder": "<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
    "glm": "\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "llama3": '{"x": 1}}',
    "pythonic": "x=1)]",
    "lfm2": "x=1)]<|tool_call_end|>",
    "mistral": '{"x": 1}}]',
    "mistral_v11": '{"x": 1}',
    "deepseek_v3": '{"x": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek_v31": '{"x": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "kimi_k2": '{"x": 1}<|tool_call_end|><|tool_calls_section_end|>',
    "gpt_oss": '{"x": 1}',
}


@pytest.mark.parametrize("name", [name for name in PARSERS if name != "none"])
@pytest.mark.parametrize("thinking_open", [False, True])
def test_a_forced_prefix_makes_what_follows_a_call(name, thinking_open):
    parser = tool_parser(name)
    forced = parser.prefix("f", thinking_open=thinking_open)
    parsed = parser.parse(forced + REST[name], thinking_open=thinking_open)
    assert parsed == ParsedText("", "", [ParsedCall("f", {"x": 1})])
    either = parser.prefix(thinking_open=thinking_open)
    assert forced.startswith(either)
    assert either.strip()
    assert tool_parser("none").prefix("f") is None


def test_an_unknown_parser_lists_the_known():
    with pytest.raises(ConfigError, match=r"'hermis' is not known; known: hermes.*mean 'hermes'"):
        tool_parser("hermis")


def test_a_parser_of_ones_own_needs_only_a_body():
    class Shout(SegmentParser):
        def body(self, text, tools):
            yield from content_segment(text)

    try:
        register_tool_parser("shout")(Shout)
        register_tool_parser("shout")(Shout)  # the same class again: a module imported twice
        assert tool_parser("shout").parse("<think>a</think>B") == ParsedText("B", "a")
        with pytest.raises(AgentError, match="'shout' is registered twice"):
            register_tool_parser("shout")(type("Other", (Shout,), {}))
    finally:
        PARSERS.pop("shout", None)


def test_the_documents_are_true():
    """docs/parsers.md: its table is the registry, and its example is a parser that works."""
    PARSERS.pop("at_sign", None)  # tests/test_docs.py runs the example too
    text = (Path(__file__).parents[3] / "docs" / "parsers.md").read_text()
    table = text.split("## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(PARSERS)
    forced = re.findall(r"^\| `\w+` \|.* (yes|no) \|$", table, re.MULTILINE)
    assert forced == ["no" if tool_parser(n).prefix() is None else "yes" for n in PARSERS]
    try:
        exec(text.partition("```python\n")[2].partition("```")[0], {})
        parser = tool_parser("at_sign")
        parsed = parser.parse('a @@f {"x": 1} b @@g [1]')
        assert parsed.content == "a  b"
        assert parsed.calls[0] == ParsedCall("f", {"x": 1})
        assert parsed.calls[1].arguments == "[1]"
        assert "not JSON" in parsed.calls[1].error
        assert parser.visible('a @@f {"x": 1} b @') == "a  b"
        assert parser.prefix("f") == "@@f "
    finally:
        PARSERS.pop("at_sign", None)


def test_a_parser_that_lacks_a_method_or_takes_a_name_is_refused():
    class Half:
        def parse(self, text, tools=None, *, thinking_open=False): ...

    with pytest.raises(AgentError, match="has no visible, prefix, opens_thinking"):
        register_tool_parser("half")(Half)
    for taken in ("auto", "hermes"):
        with pytest.raises(AgentError, match="registered twice"):
            register_tool_parser(taken)(Half)


def test_the_parser_is_guessed_from_the_template():
    assert guess("{{ bos }}{{ messages }}", "gpt2") == "none"
    assert guess("{% if tools %}<tool_call>\n{{ call | tojson }}") == "hermes"
    assert guess("{{ tools }}<tool_call>\n<function=") == "qwen3_coder"
    assert guess("{{ tools }}[TOOL_CALLS] [{{ calls }}]") == "mistral"
    assert guess("{{ tools }}[TOOL_CALLS]{{ name }}[ARGS]{{ args }}") == "mistral_v11"
    assert guess("{{ tools }}<|tool_calls_section_begin|><|tool_call_begin|>") == "kimi_k2"
    with pytest.raises(ConfigError, match="'gemma9' renders tools, but not in a format known"):
        guess("{{ tools }}<call>{{ x }}</call>", "gemma9")
