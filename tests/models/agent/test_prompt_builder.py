"""Turns are joined token by token, under templates that treat history in awkward ways."""

from __future__ import annotations

import copy

import pytest

from chatlearn.errors import AgentError, ConfigError
from chatlearn.models.agent.prompt_builder import PromptBuilder

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho"}
MORE = {"role": "user", "content": "more"}

DROPS_THINKING = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{{ (m.content.split('</think>')[-1] if m.role == 'assistant' else m.content) + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
DEFAULT_SYSTEM = """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
{%- endif -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def builder(tokenizer, template=None):
    if template is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    return PromptBuilder(tokenizer, [tokenizer.eos_token_id])


@pytest.mark.parametrize("template", [None, DEFAULT_SYSTEM])
def test_extending_equals_a_full_render(tokenizer, say, template):
    prompts = builder(tokenizer, template)
    held = prompts.first([USER]) + say("ho<|im_end|>")
    assert prompts.extend(held, ANSWER, [MORE]) == prompts.first([USER, ANSWER, MORE])


def test_thinking_that_the_template_would_drop_stays_as_sampled(tokenizer, say):
    prompts = builder(tokenizer, DROPS_THINKING)
    sampled = say("<think>hm</think>ho<|im_end|>")
    extended = prompts.extend(prompts.first([USER]) + sampled, ANSWER, [MORE])
    assert tokenizer.decode(extended) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>hm</think>ho<|im_end|>\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_cut_turn_gets_its_end_of_turn(tokenizer, say):
    prompts = builder(tokenizer)
    whole = prompts.extend(prompts.first([USER]) + say("ho<|im_end|>"), ANSWER, [MORE])
    cut = prompts.extend(prompts.first([USER]) + say("ho"), ANSWER, [MORE])
    assert cut == whole


def test_the_prompt_of_siblings_is_rendered_once_and_not_shared(tokenizer):
    prompts = builder(tokenizer)
    first = prompts.first([USER])
    first.append(0)
    assert prompts.first([USER]) == first[:-1]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("", "has no chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "none of the model's end-of-seq"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_at_the_start(tokenizer, template, said):
    with pytest.raises(ConfigError, match=said):
        builder(tokenizer, template)


def test_a_role_the_template_refuses_is_named(tokenizer):
    template = DEFAULT_SYSTEM.replace(
        "{%- for",
        "{%- if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{%- for",
        1,
    )
    with pytest.raises(AgentError, match=r"refuses the roles \['tool'\]: no tools"):
        builder(tokenizer, template).first([{"role": "tool", "content": "4"}])
