"""Real chat templates: what is appended is what the template would have rendered, or says why not.

The templates are read from the installed TRL and transformers (test-only packages; nothing of
them is imported). Each gets a tokenizer with one token a byte and one for every special token that
its text mentions. ``python tests/models/agent/test_templates.py`` prints the table of
docs/templates.md.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from chatlearn.errors import AgentError, ConfigError
from chatlearn.models.agent.prompt_builder import PromptBuilder
from chatlearn.models.agent.templates.check import Rule, TemplateReport, Verdict, check_template
from chatlearn.models.agent.templates.play import CONVERSATIONS, TOOLS

DOC = Path(__file__).parents[3] / "docs" / "templates.md"
SPECIAL = re.compile(
    r"<\|[\w/ ]+\|>|<｜[^｜<>]+｜>|<\|?\w+\|>|<\|\w+>|\[/?[A-Z_]{4,}\]"
    r"|</?(?:s|think|tool_call|tool_response|start_of_turn|end_of_turn|end_of_utterance)>"
)
ENDS = (  # in a model's generation_config.json
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",
    "<|return|>",
    "<|call|>",
    "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
    "</s>",
)
OTHER_ENDS = (("<|observation|>", "<|user|>"), ("<|end|>",))
"""Ends of a turn where none of ``ENDS`` is and the first is known: GLM's roles, Phi's token."""
LETTERS = dict(zip(Rule, "tesokrcaw", strict=True))
MISTRAL = """\
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{{ bos_token }}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- if not loop.first and messages[loop.index0 - 1].role == 'user' -%}
{{ raise_exception('roles must alternate user and assistant') }}
{%- endif -%}
{%- if tools and m == users[-1] -%}
{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif -%}
{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls -%}
{{ '[TOOL_CALLS] ' + m.tool_calls | map(attribute='function') | list | tojson + eos_token }}
{%- elif m.role == 'tool' -%}
{{ '[TOOL_RESULTS] ' + {'content': m.content} | tojson + '[/TOOL_RESULTS]' }}
{%- else -%}
{{ ' ' + m.content + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
"""Written for this test in the manner of Mistral's: tools move, and no header for the answer."""


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)  # finds it without importing it
    return Path(spec.submodule_search_locations[0]) if spec else None


@cache
def corpus() -> dict[str, str]:
    """Template text by name; empty when TRL is not installed."""
    trl = _package("trl")
    if trl is None:
        return {}
    found = {p.stem: p.read_text("utf-8") for p in sorted(trl.glob("chat_templates/*.jinja"))}
    source = _package("transformers") / "models/llama4/processing_llama4.py"
    for node in ast.parse(source.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "chat_template":
            found["llama4"] = ast.literal_eval(node.value)
    return found


needs_corpus = pytest.mark.skipif(
    not corpus(),
    reason="TRL IS NOT INSTALLED: no real chat template was tested; `pip install --no-deps trl`",
)


def make_tokenizer(template: str, name: str = "model"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = sorted({*SPECIAL.findall(template), "<|endoftext|>"} - {"<image>"})
    ends = [e for e in ENDS if e in special]
    for group in OTHER_ENDS:
        ends = ends or (list(group) if group[0] in special else [])
    ends = ends or (["</s>"] if "eos_token" in template else ["<|endoftext|>"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token=ends[0],
        additional_special_tokens=special,
        name_or_path=name,
    )
    tokenizer.chat_template = template
    return tokenizer, [tokenizer.convert_tokens_to_ids(e) for e in ends]


@cache
def report(name: str, thinking: bool) -> TemplateReport:
    text = MISTRAL if name == "mistral" else corpus()[name]
    return check_template(*make_tokenizer(text, name), {"enable_thinking": thinking})


# ------------------------------------------------------------------------------ the corpus


@needs_corpus
def test_the_corpus_is_large():
    assert len(corpus()) >= 70
    assert len(CONVERSATIONS) * 2 * len(corpus()) > 2000


@pytest.mark.parametrize("thinking", [False, True], ids=["nothink", "think"])
@pytest.mark.parametrize("name", [*corpus(), "mistral"])
def test_no_prompt_differs_without_a_rule(name, thinking):
    found = report(name, thinking).findings
    assert [str(f) for f in found if f.verdict is Verdict.DIFFERS] == []
    assert [str(f) for f in found if f.is_plain and f.verdict is Verdict.REFUSED] == []


@needs_corpus
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "lfm2_v2", "llama3_1"])
def test_families_without_awkward_rules_are_equal_everywhere(name):
    verdicts = {(f.verdict, f.rules) for f in report(name, False).findings}
    allowed = {(Verdict.EQUAL, ())} | (
        {(Verdict.RULE, (Rule.TURNS,))} if "llama" in name else set()
    )
    assert verdicts == allowed


# ------------------------------------------------------------------------------- pictures

USER = {"role": "user", "content": "hi"}
MORE = {"role": "user", "content": "more"}
ANSWER = {"role": "assistant", "content": "ho"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "call00000", "function": {"name": "add", "arguments": {}}}
    ],
}
TOOL = {"role": "tool", "content": "4", "tool_call_id": "call00000", "name": "add"}

PICTURES = [
    # template, sampled, answer, what follows, appended
    ("qwen2_5", "ho<|im_end|>", ANSWER, [MORE],
     "\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"),
    ("qwen2_5", "ho", ANSWER, [MORE],
     "<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"),
    ("qwen2_5", "ho<|endoftext|>", ANSWER, [],
     "<|im_end|>\n<|im_start|>assistant\n"),  # not an end token of this model
    ("qwen3", "ho<|im_end|>", CALL, [TOOL, TOOL],
     "\n<|im_start|>user\n<tool_response>\n4\n</tool_response>\n<tool_response>\n4\n"
     "</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ("llama3_1", "ho<|eot_id|>", ANSWER, [MORE],
     "<|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("llama3_1", "ho<|eom_id|>", CALL, [TOOL],
     '<|start_header_id|>ipython<|end_header_id|>\n\n"4"<|eot_id|>'
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("llama3_1", "ho", CALL, [TOOL],
     '<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"4"<|eot_id|>'
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("deepseekv3", "ho<｜end▁of▁sentence｜>", ANSWER, [MORE],
     "<｜User｜>more<｜Assistant｜><think>\n"),
    ("deepseekv3", "ho", CALL, [TOOL],
     "<｜end▁of▁sentence｜><｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>4<｜tool▁output▁end｜>"
     "<｜tool▁outputs▁end｜>"),
    ("glm4moe", "ho<|user|>", ANSWER, [MORE],
     "\nmore/nothink<|assistant|>\n<think></think>"),  # the end token is the next role
    ("glm4moe", "ho", ANSWER, [MORE], "<|user|>\nmore/nothink<|assistant|>\n<think></think>"),
    ("glm4moe", "ho<|observation|>", CALL, [TOOL],
     "\n<tool_response>\n4\n</tool_response><|assistant|>\n<think></think>"),
    ("glm4moe", "ho<|user|>", CALL, [TOOL],  # the wrong role was sampled; it stays
     "<|observation|>\n<tool_response>\n4\n</tool_response><|assistant|>\n<think></think>"),
    ("gptoss", "<|channel|>final<|message|>ho<|return|>", ANSWER, [MORE],
     "<|start|>user<|message|>more<|end|><|start|>assistant"),
    ("gptoss", "<|channel|>final<|message|>ho", ANSWER, [MORE],
     "<|end|><|start|>user<|message|>more<|end|><|start|>assistant"),
    ("gptoss", "{}<|call|>", CALL, [TOOL],
     '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"4"<|end|>'
     "<|start|>assistant"),
    ("gptoss", "{}", CALL, [TOOL],
     '<|call|><|start|>functions.add to=assistant<|channel|>commentary<|message|>"4"<|end|>'
     "<|start|>assistant"),
    ("gemma3", "ho<end_of_turn>", ANSWER, [MORE],
     "\n<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\n"),
    ("gemma3", "ho", ANSWER, [],
     "<end_of_turn>\n<start_of_turn>model\n"),
    ("gemma4_v5", "ho<|tool_response>", CALL, [TOOL],
     'response:add{value:<|"|>4<|"|>}<tool_response|>'),
    ("cohere2", "ho<|END_RESPONSE|>", ANSWER, [MORE],  # half of its closing was sampled
     "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>more<|END_OF_TURN_TOKEN|>"
     "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>"),
    ("phi3", "ho", ANSWER, [MORE], "<|end|>\n<|user|>\nmore<|end|>\n<|assistant|>\n"),
    ("mistral", "ho</s>", ANSWER, [MORE], "[INST] more[/INST]"),
    ("mistral", "ho", CALL, [TOOL], '</s>[TOOL_RESULTS] {"content": "4"}[/TOOL_RESULTS]'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sampled", "answer", "new", "appended"), PICTURES)
def test_what_is_appended(name, sampled, answer, new, appended):
    if name != "mistral" and not corpus():
        pytest.skip("TRL IS NOT INSTALLED: this picture was not compared")
    tokenizer, ends = make_tokenizer(MISTRAL if name == "mistral" else corpus()[name])
    prompts = PromptBuilder(tokenizer, ends, {"enable_thinking": False})
    held = prompts.first([USER]) + prompts.encode(sampled)
    extended = prompts.extend(held, answer, new)
    assert extended[: len(held)] == held
    assert tokenizer.decode(extended[len(held) :]) == appended


# ------------------------------------------------------------------------ the check itself

NUMBERED = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + ' ' + loop.index|string + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant {{ messages|length }}\n{%- endif -%}
"""


def test_a_template_that_counts_messages_is_refused_with_the_place(caplog):
    found = check_template(*make_tokenizer(NUMBERED, "counts"))
    assert {f.verdict for f in found.findings if f.is_plain} == {Verdict.DIFFERS}
    with pytest.raises(ConfigError, match=r"'counts' cannot be continued .* a full render"):
        found.raise_or_warn()


def test_tool_messages_without_support_are_known_at_start_and_an_error_when_used(caplog):
    tokenizer, ends = make_tokenizer(MISTRAL.replace("m.role == 'tool'", "false"), "toolless")
    no_tools = tokenizer.chat_template.replace(
        "{%- else -%}", "{%- elif m.role == 'tool' -%}{%- else -%}"
    )
    tokenizer.chat_template = no_tools
    found = check_template(tokenizer, ends)
    found.raise_or_warn()
    assert "toolless refuses: " in caplog.text
    assert "'tool'" not in caplog.text
    prompts = PromptBuilder(tokenizer, ends)
    held = prompts.first([USER]) + prompts.encode("ho</s>")
    with pytest.raises(AgentError, match=r"'toolless' does not show the tool message in its"):
        prompts.extend(held, CALL, [TOOL])


def test_tools_that_the_template_moves_stay_where_they_were():
    by_name = {(f.conversation, str(f.stop)): f for f in report("mistral", False).findings}
    assert by_name["tools unused", "stop"].rules == (Rule.TOOLS,)
    assert by_name["tool", "stop"].verdict is Verdict.EQUAL
    assert "nothing to put between two assistant turns" in by_name["twice", "stop"].why


def test_the_summary_is_one_line_with_counts_and_rules():
    summary = report("mistral", False).summary
    assert summary.startswith("chat template of mistral: of 32 cases ")
    assert "tools stay" in summary
    assert "refused (" in summary
    assert "\n" not in summary


# ------------------------------------------------------------------------------- the table


def table() -> str:
    """Verdicts by template and conversation; templates with equal rows share one."""
    head = ["template", *(str(i) for i in range(1, len(CONVERSATIONS) + 1))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    names = defaultdict(list)
    for name in corpus():
        cells = (_cell(name, c.name) for c in CONVERSATIONS)
        names[tuple(cells)].append(name)
    lines += [f"| {', '.join(n)} | {' | '.join(cells)} |" for cells, n in names.items()]
    return "\n".join(lines)


def _cell(name: str, conversation: str) -> str:
    found = [f for f in report(name, False).findings if f.conversation == conversation]
    verdicts = {f.verdict for f in found}
    if Verdict.DIFFERS in verdicts:
        return "≠"
    if Verdict.REFUSED in verdicts:
        return "✗"
    rules = {rule for f in found for rule in f.rules}
    return "".join(LETTERS[rule] for rule in Rule if rule in rules) or "="


@needs_corpus
def test_the_table_in_the_document_is_what_the_code_says():
    assert table() in DOC.read_text("utf-8")


def test_the_document_names_every_rule_and_conversation():
    text = DOC.read_text("utf-8")
    for rule, letter in LETTERS.items():
        assert f"| {letter} | {rule.value} |" in text
    for i, conversation in enumerate(CONVERSATIONS, 1):
        assert f"| {i} | {conversation.name} |" in text
    assert TOOLS


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
