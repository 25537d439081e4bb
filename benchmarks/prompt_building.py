"""What the next prompt of a conversation costs: appended, rendered whole, and as others build it.

    pip install -e . && python scripts/tiny_model.py --out pretrained_models/tiny
    python benchmarks/prompt_building.py --model pretrained_models/tiny

    # with the builders of others, in an environment of its own:
    pip install -e . trl==1.16.0 datasets
    pip install --no-deps --target verl verl==0.9.1
    python benchmarks/prompt_building.py --model pretrained_models/tiny --verl verl

The conversation is a user's question and N turns of one tool call and its result, about 128 tokens
a turn. Timed is the step from the tokens held, ended by the last call, to the prompt of turn N + 1:
one new tool message. Call id and result are others each time, as in a run, so that nothing is
remembered. Medians of 200 calls, of 7 for the full render. Columns:

- ours: ``PromptBuilder.extend``. Its copy of the tokens held is in the figure, and is what grows.
- new tokens only: ``PromptBuilder.continuation``, the same without that copy.
- remembered: the same when a sibling's tool has already answered so.
- full render: ``apply_chat_template(tokenize=True)`` of the whole history, as in loops that keep
  messages.
- TRL: ``GRPOTrainer._get_tool_suffix_ids`` of one tool message, joined to the tokens held. The
  method is called on an object that has the five attributes it reads; no trainer is built.
- verl: ``merge_context_tokens`` of the builder that ``ContinuousTokenBuilder`` is for Qwen models,
  loaded from its file alone. It also compares the old messages with the new ones.

``--template`` gives the tokenizer another chat template: that of the tiny model, for a tokenizer
whose own shows no tool calls.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from transformers import AutoTokenizer

from chatlearn.models.agent.prompt_builder import PromptBuilder
from chatlearn.types import Message

Build = Callable[[list[int], list[Message], Message], list[int]]
"""Tokens held, messages so far, and a new tool message to the next prompt."""
WORDS = ("the", "sum", "of", "these", "numbers", "is", "larger", "than", "what", "was", "asked")


def call(turn: int, words: int) -> Message:
    said = " ".join(WORDS[(turn + i) % len(WORDS)] for i in range(words))
    function = {"name": "calculator", "arguments": {"expression": f"{turn} + {turn}", "why": said}}
    calls = [{"type": "function", "id": f"c{turn:08d}", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(turn: int, words: int, tag: str = "") -> Message:
    said = " ".join(WORDS[(turn + i) % len(WORDS)] for i in range(words))
    content = f"{turn + turn} {said} {tag}".strip()
    return {
        "role": "tool",
        "content": content,
        "tool_call_id": f"c{turn:08d}",
        "name": "calculator",
    }


def conversation(turns: int, words: int) -> list[Message]:
    messages: list[Message] = [{"role": "user", "content": "What is the sum of all numbers?"}]
    for turn in range(turns):
        messages += [call(turn, words), result(turn, words)]
    return messages[:-1]


def words_a_turn(tokenizer: Any, tokens: int) -> int:
    """Words in a call, and in a result, that make a turn of about ``tokens``."""
    size = {n: len(full(tokenizer, conversation(9, n))) // 9 for n in range(1, 80)}
    return min(size, key=lambda n: abs(size[n] - tokens))


def full(tokenizer: Any, messages: list[Message]) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def builders(tokenizer: Any, verl: Path | None) -> dict[str, Build]:
    prompts, other_prompts = (PromptBuilder(tokenizer, [tokenizer.eos_token_id]) for _ in "12")
    found: dict[str, Build] = {
        "ours": lambda held, past, new: prompts.extend(held, past[-1], [new]),
        "new tokens only": lambda held, past, new: other_prompts.continuation(
            held, past[-1], [new]
        ),
        "remembered": lambda held, past, new: other_prompts.continuation(held, past[-1], [new]),
        "full render": lambda held, past, new: full(tokenizer, [*past, new]),
    }
    if importlib.util.find_spec("trl") and importlib.util.find_spec("datasets"):
        from trl import GRPOTrainer

        trainer = SimpleNamespace(
            _is_vlm=False,
            processing_class=tokenizer,
            _tokenizer=tokenizer,
            chat_template=None,
            chat_template_kwargs={},
        )
        suffix = GRPOTrainer._get_tool_suffix_ids
        found["TRL"] = lambda held, past, new: held + suffix(trainer, [new])
    if verl is not None:
        # verl's own __init__ needs Ray and more; the folder of this module needs nothing of it.
        sys.path.insert(0, str(verl / "verl" / "utils"))
        from tokenizer.continuous_token import QwenContinuousTokenBuilder

        other = QwenContinuousTokenBuilder(tokenizer)
        found["verl"] = lambda held, past, new: (
            other.merge_context_tokens(past, [*past, new], held).token_ids
        )
    return found


def microseconds(build: Build, held: list[int], past: list[Message], repeats: int) -> float:
    """Median over ``repeats`` calls, each with another call id and another result."""
    turn, words = len(past) // 2 - 1, len(_why(past[-1]).split())
    times = []
    for i in range(-3, repeats):
        answer, new = call(turn, words), result(turn, words, f"{i}")
        answer["tool_calls"][0]["id"] = new["tool_call_id"] = f"{turn}r{i}"
        spoken = [*past[:-1], answer]
        started = time.perf_counter()
        build(held, spoken, new)
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times[3:])


def _why(answer: Message) -> str:
    return answer["tool_calls"][0]["function"]["arguments"]["why"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder with a tokenizer and a template")
    parser.add_argument("--template", type=Path, help="chat_template.jinja to use instead")
    parser.add_argument("--verl", type=Path, help="folder that verl was installed to")
    parser.add_argument("--turns", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--tokens", type=int, default=128, help="a turn: a call and its result")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.template:
        tokenizer.chat_template = args.template.read_text("utf-8")
    words = words_a_turn(tokenizer, args.tokens)
    found = builders(tokenizer, args.verl)
    heads = [f"{name}, µs" for name in found]
    lines = [
        "| turns | context, tokens | " + " | ".join(heads) + " | full ÷ ours | same tokens |",
        "|" + "---|" * (len(found) + 4),
    ]
    for turns in args.turns:
        past = conversation(turns, words)
        whole = full(tokenizer, past)
        end = len(whole) - 1 - whole[::-1].index(tokenizer.eos_token_id)
        held = whole[: end + 1]
        new = result(turns - 1, words, "last")
        wanted = full(tokenizer, [*past, new])
        same = [
            name
            for name, build in found.items()
            if build(held, past, new) in (wanted, wanted[len(held) :])
        ]
        cost = {
            name: microseconds(build, held, past, 7 if name == "full render" else 200)
            for name, build in found.items()
        }
        verdict = "all" if len(same) == len(found) else ", ".join(same)
        ratio = cost["full render"] / cost["ours"]
        cells = " | ".join(f"{c:,.0f}" for c in cost.values())
        lines.append(f"| {turns} | {len(held):,} | {cells} | {ratio:,.0f} | {verdict} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
