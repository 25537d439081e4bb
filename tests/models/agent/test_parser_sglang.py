"""On well-formed text our parsers and SGLang's read the same (marker ``sglang``).

On the rest they differ on purpose: SGLang's drop a malformed call or pass it off as content.
"""

from __future__ import annotations

import json
import subprocess

import pytest

from chatlearn.models.agent.tool_parser import tool_parser

pytestmark = pytest.mark.sglang

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {
                    "who": {"type": "string"},
                    "n": {"type": "integer"},
                    "deep": {"type": "object"},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
]
ARGS = '{"who": "Zoë 李", "n": 3, "deep": {"a": [1, {"b": "x\\ny"}]}}'
DEEP = '{"a": [1, {"b": "x\\ny"}]}'
XML = (
    "<tool_call>\n<function=find>\n<parameter=who>\nZoë 李\n</parameter>\n<parameter=n>\n3\n"
    f"</parameter>\n<parameter=deep>\n{DEEP}\n</parameter>\n</function>\n</tool_call>"
)


def glm(between: str) -> str:
    pairs = [("who", "Zoë 李"), ("n", "3"), ("deep", DEEP)]
    elements = [f"<arg_key>{k}</arg_key>{between}<arg_value>{v}</arg_value>" for k, v in pairs]
    return between.join(["<tool_call>find", *elements, "</tool_call>"])


def kimi(name: str, index: int, args: str) -> str:
    id_ = f"functions.{name}:{index}"
    return f"<|tool_call_begin|>{id_}<|tool_call_argument_begin|>{args}<|tool_call_end|>"


def deepseek(name: str, args: str) -> str:
    head = f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}"
    return f"{head}\n```json\n{args}\n```<｜tool▁call▁end｜>"


def deepseek_v31(name: str, args: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{args}<｜tool▁call▁end｜>"


HERMES = f'<tool_call>\n{{"name": "find", "arguments": {ARGS}}}\n</tool_call>'
HERMES_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
CASES = [  # ours, SGLang's calls, SGLang's reasoning, text
    ("hermes", "qwen", "qwen3", HERMES),
    ("hermes", "qwen", "qwen3", f"{HERMES}\n{HERMES_NOW}"),
    ("hermes", "hermes", "qwen3", HERMES_NOW),
    ("hermes", "qwen", "qwen3", f"<think>\nI look.\n</think>\n\nOk.\n{HERMES}"),
    ("hermes", "qwen", "qwen3", "<think>\nI look.\n</think>\n\nIt is 4."),
    ("hermes", "qwen", "qwen3", "It is {4}."),
    ("qwen3_coder", "qwen3_coder", "qwen3", XML),
    ("qwen3_coder", "qwen3_coder", "qwen3", f"<think>\nHm\n</think>\n\nOk.\n{XML}\n{XML}"),
    ("glm", "glm45", "glm45", glm("\n")),
    ("glm", "glm47", "glm45", f"<think>Hm</think>{glm('')}"),
    ("llama3", "llama3", None, f'{{"name": "find", "parameters": {ARGS}}}'),
    ("llama3", "llama3", None, f'<|python_tag|>{{"name": "find", "parameters": {ARGS}}}'),
    (
        "llama3",
        "llama3",
        None,
        f'<|python_tag|>{{"name": "find", "parameters": {ARGS}}};'
        '{"name": "now", "parameters": {}}',
    ),
    ("pythonic", "pythonic", None, "[find(who='Zoë 李', n=3, deep={'a': [1, {'b': 'x\\ny'}]})]"),
    ("pythonic", "pythonic", None, "<|python_start|>[find(n=3), now()]<|python_end|>"),
    ("lfm2", "lfm2", None, "<|tool_call_start|>[find(who='Zoë', n=3), now()]<|tool_call_end|>"),
    ("mistral", "mistral", "mistral", f'[TOOL_CALLS] [{{"name": "find", "arguments": {ARGS}}}]'),
    ("mistral", "mistral", "mistral", f"Ok.[TOOL_CALLS]find[ARGS]{ARGS}[TOOL_CALLS]now[ARGS]{{}}"),
    ("mistral", "mistral", "mistral", "[THINK]Hm[/THINK]It is 4."),
    (
        "deepseek_v3",
        "deepseekv3",
        "deepseek-r1",
        f"<think>Hm</think>Ok.<｜tool▁calls▁begin｜>{deepseek('find', ARGS)}\n"
        f"{deepseek('now', '{}')}<｜tool▁calls▁end｜>",
    ),
    (
        "deepseek_v31",
        "deepseekv31",
        "deepseek-v3",
        f"<｜tool▁calls▁begin｜>{deepseek_v31('find', ARGS)}{deepseek_v31('now', '{}')}"
        "<｜tool▁calls▁end｜>",
    ),
    (
        "kimi_k2",
        "kimi_k2",
        "kimi_k2",
        f"<think>Hm</think>Ok.<|tool_calls_section_begin|>{kimi('find', 0, ARGS)}"
        f"{kimi('now', 1, '{}')}<|tool_calls_section_end|>",
    ),
    (
        "kimi_k2",
        "kimi_k2",
        "kimi_k2",
        f"<think>Hm<|tool_calls_section_begin|>{kimi('find', 0, ARGS)}<|tool_calls_section_end|>",
    ),
    (
        "gpt_oss",
        "gpt-oss",
        "gpt-oss",
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary"
        f" to=functions.find <|constrain|>json<|message|>{ARGS}<|call|>",
    ),
    (
        "gpt_oss",
        "gpt-oss",
        "gpt-oss",
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>4",
    ),
]

ORACLE = """
import json, logging, sys
logging.disable(logging.CRITICAL)
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.reasoning_parser import ReasoningParser
asked = json.load(sys.stdin)
tools = [Tool(**tool) for tool in asked["tools"]]
answers = []
for _, calls_name, reasoning_name, text in asked["cases"]:
    reasoning = ""
    if reasoning_name:
        parser = ReasoningParser(reasoning_name, stream_reasoning=False, force_reasoning=False)
        reasoning, text = parser.parse_non_stream(text)
    parser = FunctionCallParser(tools, calls_name)
    calls = []
    if parser.has_tool_call(text or ""):
        text, found = parser.parse_non_stream(text)
        calls = [(call.name, json.loads(call.parameters)) for call in found]
    answers.append([(text or "").strip(), (reasoning or "").strip(), calls])
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(sglang_python) -> list:
    done = subprocess.run(
        [sglang_python, "-c", ORACLE],
        input=json.dumps({"tools": TOOLS, "cases": CASES}),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("ANSWERS")[2])


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-{i}")
def test_well_formed_text_reads_the_same(answers, index):
    name, _, _, text = CASES[index]
    ours = tool_parser(name).parse(text, TOOLS)
    calls = [[call.name, call.arguments] for call in ours.calls]
    assert [ours.content.strip(), ours.reasoning, calls] == answers[index]
    assert not any(call.error for call in ours.calls)
