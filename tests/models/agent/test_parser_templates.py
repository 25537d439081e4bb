"""A call rendered by the family's own chat template is parsed back to the call.

The templates are those that TRL ships (``trl/chat_templates``); TRL itself is not imported. It has
none of Mistral, Kimi K2 and DeepSeek V3.1: their texts are literals in test_tool_parser.py.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from chatlearn.models.agent.tool_parser import ParsedCall, guess, tool_parser

ENDS = ("<|im_end|>\n", "<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<|call|>", "</s>")
FIRST = (
    "find",
    {"who": "Zoë 李", "n": 3, "on": True, "deep": {"a": [1, {"b": None}], "c": "</x>"}},
)
SECOND = ("now", {})
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Find.",
            "parameters": {
                "type": "object",
                "properties": {
                    "who": {"type": "string", "description": "a"},
                    "n": {"type": "integer", "description": "b"},
                    "on": {"type": "boolean", "description": "c"},
                    "deep": {"type": "object", "description": "d"},
                },
                "required": ["who"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time.",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
FAMILIES = {  # template -> (parser, calls a message may have, may have content beside them)
    "qwen2_5": ("hermes", 2, True),
    "qwen3": ("hermes", 2, True),
    "qwen3_instruct_2507": ("hermes", 2, True),
    "qwen3_vl": ("hermes", 2, True),
    "qwen3_5_think": ("qwen3_coder", 2, True),
    "qwen3_5_nothink": ("qwen3_coder", 2, True),
    "qwen3_8": ("qwen3_coder", 2, True),
    "nemotron_3_nano": ("qwen3_coder", 2, True),
    "llama3_1": ("llama3", 1, False),
    "llama3_2": ("llama3", 1, False),
    "deepseekv3": ("deepseek_v3", 2, True),
    "glm4moe": ("glm", 2, True),
    "gptoss": ("gpt_oss", 1, False),
    "lfm2_2_5": ("lfm2", 2, True),
}


def trl_templates() -> Path:
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("TRL is not installed: no real templates here (pip install --no-deps trl)")
    return Path(found.submodule_search_locations[0]) / "chat_templates"


def completion(tokenizer, template: str, message: dict) -> str:
    """What the model would have written for ``message``, without its end-of-turn token."""

    def render(messages, generate=False):
        return tokenizer.apply_chat_template(
            messages,
            tools=TOOLS,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generate,
        )

    asked = [{"role": "user", "content": "Who?"}]
    start = render(asked)
    header = render(asked, generate=True)[len(start) :].partition("<think>")[0]
    whole = render([*asked, message])
    assert whole.startswith(start + header)
    text = whole[len(start + header) :]
    end = next((end for end in ENDS if text.endswith(end)), "")
    return text.removesuffix(end)


def tool_calls(calls, *, as_text: bool) -> list[dict]:
    return [
        {
            "id": f"call{i:05}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(args) if as_text else args},
        }
        for i, (name, args) in enumerate(calls)
    ]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_the_template_of_the_family_is_read_back(tokenizer, name, count, content):
    family, at_once, beside = FAMILIES[name]
    if count > at_once or content > beside:
        pytest.skip(f"the template {name} cannot write this")
    template = (trl_templates() / f"{name}.jinja").read_text()
    assert guess(template) == family
    parser = tool_parser(family)
    calls = [FIRST, SECOND][:count]
    message = {
        "role": "assistant",
        "content": "Let me see." if content else "",
        "tool_calls": tool_calls(calls, as_text="deepseek" in name),
    }
    text = completion(tokenizer, template, message)
    parsed = parser.parse(text, TOOLS)
    assert parsed.calls == [ParsedCall(*call) for call in calls]
    assert parsed.content.strip() == ("Let me see." if content else "")
    forced = parser.prefix("find").strip()
    if name != "gptoss":  # gpt-oss writes the recipient in either of two places
        assert forced in text


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_5_think", "qwen3_8", "glm4moe", "nemotron_3_nano"]
)
def test_reasoning_that_a_template_writes_is_read_back(tokenizer, name):
    template = (trl_templates() / f"{name}.jinja").read_text()
    message = {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "Zoë, of course.",
        "tool_calls": tool_calls([FIRST], as_text=False),
    }
    parsed = tool_parser(guess(template)).parse(completion(tokenizer, template, message), TOOLS)
    assert parsed.reasoning == "Zoë, of course."
    assert parsed.content == "Let me see."
    assert parsed.calls == [ParsedCall(*FIRST)]


@pytest.mark.parametrize(
    ("name", "opens"),
    [
        ("deepseekv3", True),
        ("deepseek_r1_distill", True),
        ("qwen3_5_think", True),
        ("qwen3_5_nothink", False),
        ("qwen3", False),
        ("glm4moe", False),
    ],
)
def test_a_prompt_that_opens_the_reasoning_is_seen(tokenizer, name, opens):
    template = (trl_templates() / f"{name}.jinja").read_text()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "<think>"}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert tool_parser(guess(template)).opens_thinking(prompt) is opens


def test_every_template_of_trl_is_guessed_or_refused():
    """No template that renders tools is taken for one without."""
    from chatlearn.errors import ConfigError

    guessed = {}
    for path in sorted(trl_templates().glob("*.jinja")):
        template = path.read_text()
        try:
            guessed[path.stem] = guess(template)
        except ConfigError:
            guessed[path.stem] = "refused"
        if guessed[path.stem] == "none":
            assert "tool_call" not in template
    assert guessed["gemma4"] == "refused"
    assert len(guessed) > 50
