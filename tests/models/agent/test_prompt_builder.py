"""Turns are joined token by token, under templates that treat history in awkward ways."""

from __future__ import annotations

import copy
from datetime import date

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


def with_template(tokenizer, template, ends=None, **kwargs):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    ids = [tokenizer.convert_tokens_to_ids(e) for e in ends or [tokenizer.eos_token]]
    return PromptBuilder(tokenizer, ids, **kwargs)


def test_any_end_token_of_the_model_closes_a_turn(tokenizer, say):
    prompts = with_template(tokenizer, DEFAULT_SYSTEM, ["<|im_end|>", "<|endoftext|>"])
    held = prompts.first([USER]) + say("ho<|endoftext|>")
    extended = prompts.extend(held, ANSWER, [MORE])
    assert extended[: len(held)] == held
    added = tokenizer.decode(extended[len(held) :])
    assert added == "\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("end", ["<|im_end|>", ""], ids=["stop", "length"])
def test_the_assistant_can_speak_twice(tokenizer, say, end):
    prompts = with_template(tokenizer, DEFAULT_SYSTEM)
    twice = prompts.extend(prompts.first([USER]) + say("ho" + end), ANSWER, [])
    assert twice == prompts.first([USER, ANSWER])
    assert tokenizer.decode(twice).count("Be kind.") == 1


def test_speaking_twice_is_refused_where_no_header_tells_the_turns_apart(tokenizer, say):
    headless = DEFAULT_SYSTEM.replace("{%- if add_generation_prompt -%}", "{%- if false -%}")
    prompts = with_template(tokenizer, headless)
    with pytest.raises(AgentError, match="nothing to put between two assistant turns"):
        prompts.extend(prompts.first([USER]) + say("ho<|im_end|>"), ANSWER, [])


def test_a_message_that_the_template_would_lose_is_refused_by_role(tokenizer, say):
    hoists = DEFAULT_SYSTEM.replace(
        "{%- for m in messages -%}", "{%- for m in messages if m.role != 'tool' -%}"
    )
    prompts = with_template(tokenizer, hoists)
    held = prompts.first([USER]) + say("ho<|im_end|>")
    tool = {"role": "tool", "content": "4", "tool_call_id": "a"}
    said = r"does not show the tool message in its place in \['tool', 'user'\]"
    with pytest.raises(AgentError, match=said):
        prompts.extend(held, ANSWER, [tool, MORE])
    with pytest.raises(AgentError, match="does not show the tool message"):
        prompts.first([USER, tool])


def test_two_users_in_a_row_name_roles_and_template(tokenizer, say):
    alternates = DEFAULT_SYSTEM.replace(
        "{%- for m in messages -%}",
        "{%- for m in messages -%}{%- if loop.previtem and loop.previtem.role == m.role -%}"
        "{{ raise_exception('roles must alternate') }}{%- endif -%}",
    )
    prompts = with_template(tokenizer, alternates)
    held = prompts.first([USER]) + say("ho<|im_end|>")
    said = r"refuses the roles \['user', 'user'\] after an assistant turn: roles must alternate"
    with pytest.raises(AgentError, match=said):
        prompts.extend(held, ANSWER, [MORE, MORE])


def test_the_day_is_fixed_for_the_life_of_the_builder(tokenizer):
    dated = "{{ strftime_now('%d %b %Y') + ' ' + strftime_now(\"%Y\") }}" + DEFAULT_SYSTEM
    prompts = with_template(tokenizer, dated, today=date(2031, 2, 3))
    assert tokenizer.decode(prompts.first([USER])).startswith("03 Feb 2031 2031<|im_start|>")


def test_arguments_and_contents_take_the_form_that_the_template_reads(tokenizer):
    awkward = DEFAULT_SYSTEM.replace("m.content", "m.content[0]['text']").replace(
        "+ '<|im_end|>",
        "+ (m.tool_calls[0].function.arguments if m.tool_calls else '') + '<|im_end|>",
    )
    prompts = with_template(tokenizer, awkward)
    call = {"type": "function", "id": "a", "function": {"name": "f", "arguments": {"é": 1}}}
    said = {"role": "assistant", "content": "so", "tool_calls": [call]}
    text = tokenizer.decode(prompts.first([USER, said]))
    assert '<|im_start|>assistant\nso{"é": 1}<|im_end|>' in text


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_sentencepiece_space_is_added_where_a_full_render_has_it(scheme):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate("▁abcdefghijklmnopqrstuvwxyzB.[]:?-")}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{ '[a] ' + m.content + ' [b]' if m.role == 'user' "
        "else m.content + eos_token }}{%- endfor -%}"
    )
    prompts = PromptBuilder(tokenizer, [tokenizer.eos_token_id])
    whole = prompts.first([USER, ANSWER, MORE])
    end = whole.index(tokenizer.eos_token_id)
    assert prompts.extend(whole[: end + 1], ANSWER, [MORE]) == whole
    assert prompts.extend(whole[:end], ANSWER, [MORE]) == whole


def test_a_turn_costs_the_same_after_a_long_history(tokenizer, say):
    prompts = builder(tokenizer)
    rendered = []
    render = prompts.template.render
    prompts.template.render = lambda messages, *a, **k: (
        rendered.append(messages) or render(messages, *a, **k)
    )
    held = prompts.first([USER])
    for turn in range(50):
        held = prompts.extend(held + say("ho<|im_end|>"), ANSWER, [{**MORE, "content": f"{turn}"}])
    assert max(map(len, rendered)) == 3


def test_a_tokenizer_that_user_code_left_truncating_still_encodes_whole_texts(tokenizer):
    prompts = PromptBuilder(tokenizer, [tokenizer.eos_token_id])
    tokenizer("long enough", truncation=True, max_length=3)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert prompts.decode(prompts.encode("long enough <|im_end|>")) == "long enough <|im_end|>"
    tokenizer.backend_tokenizer.no_truncation()
