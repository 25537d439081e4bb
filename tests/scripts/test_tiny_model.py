"""The tiny policy of the quickstart: its chat template, its transcripts, the folder it becomes."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/tiny_model.py"
BASH_SCRIPTS = (*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / ".ci/run")

spec = importlib.util.spec_from_file_location("tiny_model", SCRIPT)
tiny_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_model)

USER = {"role": "user", "content": "Compute 37*24."}
CALL = tiny_model.tool_call("37*24")
CALL_TEXT = (
    '<tool_call>\n{"name": "calculator", "arguments": {"expression": "37*24"}}\n</tool_call>'
)
RESULT = {"role": "tool", "content": "888"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model.train_tokenizer(seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder made by a real run of three updates, and what the run printed."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    return out, run_script(out)


def run_script(out: Path, *options: str) -> str:
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--updates", "3", *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_system_user_and_generation_prompt(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, USER]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nCompute 37*24.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "call",
    [
        {"type": "function", "function": {"name": "calculator", "arguments": '{"a": 1}'}},
        {"type": "function", "function": {"name": "calculator", "arguments": {"a": 1}}},
        {"name": "calculator", "arguments": {"a": 1}},
    ],
    ids=["json text", "dict", "without a function level"],
)
def test_arguments_may_be_a_dict_or_json_text(tokenizer, call):
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert tokenizer.apply_chat_template([message], tokenize=False) == (
        "<|im_start|>assistant\n"
        '<tool_call>\n{"name": "calculator", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
    )


def test_content_and_several_calls_stand_on_lines_of_their_own(tokenizer):
    message = {**CALL, "content": "Let me see.", "tool_calls": CALL["tool_calls"] * 2}
    assert tokenizer.apply_chat_template([message], tokenize=False) == (
        f"<|im_start|>assistant\nLet me see.\n{CALL_TEXT}\n{CALL_TEXT}<|im_end|>\n"
    )


def test_neighbouring_tool_results_share_one_user_block(tokenizer):
    messages = [USER, CALL, RESULT, {"role": "tool", "content": "889"}, tiny_model.boxed("888")]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nCompute 37*24.<|im_end|>\n"
        f"<|im_start|>assistant\n{CALL_TEXT}<|im_end|>\n"
        "<|im_start|>user\n"
        "<tool_response>\n888\n</tool_response>\n"
        "<tool_response>\n889\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nThe answer is \\boxed{888}.<|im_end|>\n"
    )


def test_tools_and_enable_thinking_are_accepted_and_print_nothing(tokenizer):
    schema = {"type": "function", "function": {"name": "calculator", "parameters": {}}}
    plain = tokenizer.apply_chat_template([USER], tokenize=False)
    with_both = tokenizer.apply_chat_template(
        [USER], tokenize=False, tools=[schema], enable_thinking=False
    )
    assert with_both == plain


def test_a_longer_conversation_continues_the_text_of_a_shorter_one(tokenizer):
    """Holds wherever a turn of the policy may begin, hence not between two tool results."""
    history = [USER, CALL, RESULT, tiny_model.boxed("888"), USER, CALL, RESULT, RESULT]
    whole = tokenizer.apply_chat_template(history, tokenize=False)
    for length in (1, 2, 3, 4, 5, 6, 8):
        part = tokenizer.apply_chat_template(history[:length], tokenize=False)
        assert whole.startswith(part)
        if length < len(history) and history[length]["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(
                history[:length], tokenize=False, add_generation_prompt=True
            )
            assert whole.startswith(prompt)


def test_markers_are_single_tokens_and_digits_stand_alone(tokenizer):
    for marker in tiny_model.SPECIAL_TOKENS + tiny_model.TOOL_MARKERS:
        assert len(tokenizer.encode(marker, add_special_tokens=False)) == 1
    assert tokenizer.convert_tokens_to_ids(list(tiny_model.SPECIAL_TOKENS)) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert tokenizer.tokenize("1024") == ["1", "0", "2", "4"]
    token_ids = tokenizer.encode(f"<|im_start|>{CALL_TEXT}<|im_end|>", add_special_tokens=False)
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == CALL_TEXT


def test_mask_covers_what_the_assistant_writes(tokenizer):
    """<|im_start|>assistant\\n[The answer is \\boxed{888}.<|im_end|>]\\n, in each of its turns."""
    text = tokenizer.apply_chat_template(
        [USER, CALL, RESULT, tiny_model.boxed("888")], tokenize=False
    )
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    mask = tiny_model.assistant_mask(token_ids, opening, tokenizer.eos_token_id)
    written = [token for token, inside in zip(token_ids, mask, strict=True) if inside]
    answer = "The answer is \\boxed{888}."
    assert tokenizer.decode(written) == f"{CALL_TEXT}<|im_end|>{answer}<|im_end|>"


def test_transcripts_survive_the_tokenizer(tokenizer):
    rng = random.Random(3)
    for text in tiny_model.render([tiny_model.draw_transcript(rng) for _ in range(100)]):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(token_ids) == text


def test_good_transcripts_copy_the_problem_and_box_the_value():
    rng = random.Random(5)
    for _ in range(50):
        question, call, result, answer = tiny_model.draw_transcript(rng, good_share=1.0)
        expression = call["tool_calls"][0]["function"]["arguments"]["expression"]
        assert question["content"] == f"Compute {expression}."
        assert result["content"] == str(eval(expression))
        assert answer["content"] == f"The answer is \\boxed{{{result['content']}}}."


def test_excluded_problems_are_never_drawn(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"Compute {n}*24."}]} for n in range(10, 100)]
    file = tmp_path / "test_agent.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    excluded = tiny_model.expressions_of([file])
    assert excluded == {f"{n}*24" for n in range(10, 100)}
    rng = random.Random(0)
    drawn = {tiny_model.draw_problem(rng, excluded)[0] for _ in range(20_000)}
    assert len(drawn) > 10_000
    assert not drawn & excluded


def test_folder_loads_as_any_other_model(folder, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, printed = folder
    assert "written in" in printed
    loaded = AutoTokenizer.from_pretrained(out)
    text = loaded.apply_chat_template([USER, CALL, RESULT], tokenize=False)
    assert text == tokenizer.apply_chat_template([USER, CALL, RESULT], tokenize=False)
    assert loaded.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == "qwen3"
    assert 0.4e6 < model.num_parameters() < 0.5e6
    assert model.generation_config.eos_token_id == loaded.eos_token_id


def test_finished_folder_is_kept_until_the_settings_change(folder):
    out, _ = folder
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert "is ready" in run_script(out)
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    other_seed = tiny_model.settings(seed=1, updates=3, excluded=frozenset())
    assert not tiny_model.is_complete(out, other_seed)


def test_a_foreign_folder_is_left_alone(tmp_path):
    foreign, staged = tmp_path / "mine", tmp_path / "staged"
    foreign.mkdir()
    staged.mkdir()
    with pytest.raises(SystemExit, match="left alone"):
        tiny_model.publish(staged, foreign)
    assert foreign.is_dir()


@pytest.mark.parametrize("script", BASH_SCRIPTS, ids=lambda path: path.name)
def test_bash_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
