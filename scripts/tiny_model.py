"""A tiny policy that half knows its task: what the quickstart trains on a laptop CPU.

    python scripts/tiny_model.py --out pretrained_models/tiny

A Qwen3 of 0.44M parameters, a tokenizer and a chat template, made here in about a minute. The warm
start imitates transcripts of an agent with a calculator: first good ones, which copy the problem
into the calculator and box its answer, then a mix in which more than half guess, garble the call,
forget the box or do nothing. Sampled at temperature 1 the policy is right in four to five runs of
ten, so reinforcement learning has something to prefer. It is never trained on the problems of the
files given with `--exclude`. A finished folder made with the same settings is kept as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:  # torch and transformers load late: a folder that is ready costs no wait
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Threads that spin while they wait turn this minute into ten as soon as the cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

Message = dict[str, Any]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOL_MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# ChatML with tool calls in Hermes style, as Qwen models write them; neighbouring tool results share
# one user block. `tools` is accepted but not printed: this policy knows its one tool by heart, and
# a JSON schema would double the prompt. `enable_thinking` is accepted and means nothing here.
CHAT_TEMPLATE = r"""
{%- for message in messages %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {%- set arguments = function.arguments %}
            {{- '\n' if content or not loop.first else '' }}
            {{- '<tool_call>\n{"name": ' + function.name | tojson + ', "arguments": ' }}
            {{- arguments if arguments is string else arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()

GOOD_SHARE = 0.42
GOOD_ONLY = 0.6  # this part of the warm start has no bad transcripts: first learn to copy
BATCH_ROWS = 16
PEAK_LR = 4e-3
CONTEXT_LOSS = 0.1  # weight of tokens the policy never writes; a little of it speeds up copying
MARKER = "made_by.json"

console = Console(highlight=False, soft_wrap=True)


# --- transcripts ---------------------------------------------------------------------------------


def draw_problem(rng: random.Random, excluded: frozenset[str]) -> tuple[str, str]:
    """An expression of two two-digit operands that is not in ``excluded``, and its value."""
    while True:
        left, right, sign = rng.randint(10, 99), rng.randint(10, 99), rng.choice("+-*")
        expression = f"{left}{sign}{right}"
        if expression not in excluded:
            value = {"+": left + right, "-": left - right, "*": left * right}[sign]
            return expression, str(value)


def with_one_digit_changed(number: str, rng: random.Random) -> str:
    at = rng.choice([i for i, letter in enumerate(number) if letter.isdigit()])
    other = rng.choice([digit for digit in "0123456789" if digit != number[at]])
    return number[:at] + other + number[at + 1 :]


def tool_call(expression: str) -> Message:
    function = {"name": "calculator", "arguments": {"expression": expression}}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def boxed(answer: str) -> Message:
    return {"role": "assistant", "content": f"The answer is \\boxed{{{answer}}}."}


def draw_transcript(
    rng: random.Random, excluded: frozenset[str] = frozenset(), *, good_share: float = GOOD_SHARE
) -> list[Message]:
    """One conversation to imitate: a good one, or one of four bad habits."""
    expression, value = draw_problem(rng, excluded)
    question = {"role": "user", "content": f"Compute {expression}."}
    result = {"role": "tool", "content": value}
    if rng.random() < good_share:
        return [question, tool_call(expression), result, boxed(value)]
    habit = rng.choice(("guess", "garbled call", "no box", "nothing"))
    if habit == "guess":
        return [question, boxed(with_one_digit_changed(value, rng))]
    if habit == "garbled call":
        refusal = {"role": "tool", "content": "error: not an arithmetic expression"}
        return [question, tool_call(expression[:-2]), refusal, boxed("0")]
    if habit == "no box":
        unboxed = {"role": "assistant", "content": f"It is {value}."}
        return [question, tool_call(expression), result, unboxed]
    return [question, {"role": "assistant", "content": "I can use the calculator."}]


def expressions_of(files: Iterable[Path]) -> frozenset[str]:
    """The problems of dataset files: one JSON object a line, a user message `Compute 37*24.`."""
    found: set[str] = set()
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        texts = [message["content"] for row in rows for message in row["prompt"]]
        problems = {match for text in texts for match in re.findall(r"\d+[-+*]\d+", text)}
        if not problems:
            raise SystemExit(f"--exclude {file}: no problem such as 37*24 found in its prompts")
        found |= problems
    return frozenset(found)


# --- tokenizer -----------------------------------------------------------------------------------


def render(conversations: list[list[Message]]) -> list[str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(conversations=conversations, chat_template=CHAT_TEMPLATE)
    return rendered


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that keeps every digit apart, so that copying a number is copying digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    marker = "|".join(map(re.escape, SPECIAL_TOKENS + TOOL_MARKERS))
    texts = render([draw_transcript(rng) for _ in range(2000)])

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The markers are tokens of their own; the merges are learnt from the text between them.
    bpe.train_from_iterator((part for text in texts for part in re.split(marker, text)), trainer)
    bpe.add_tokens([AddedToken(text, normalized=False, special=False) for text in TOOL_MARKERS])

    end_of_text, _, end_of_turn = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=end_of_turn,
        pad_token=end_of_text,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# --- model ---------------------------------------------------------------------------------------


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        # Contexts are short: with the usual 10,000 copying is learnt only after several times as
        # many updates, on some seeds not at all.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    return model


def assistant_mask(token_ids: list[int], opening: list[int], end: int) -> list[bool]:
    """True for what the policy writes itself: from after ``opening`` to the end-of-turn token."""
    mask, inside = [False] * len(token_ids), False
    for at, token in enumerate(token_ids):
        mask[at] = inside
        if inside:
            inside = token != end
        else:
            inside = token_ids[max(0, at + 1 - len(opening)) : at + 1] == opening
    return mask


def warm_start(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    updates: int,
    excluded: frozenset[str],
) -> None:
    """Imitate ``updates`` batches of fresh transcripts."""
    import torch
    import torch.nn.functional as F

    rng = random.Random(seed)
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} updates"),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("warm start", total=updates, loss=float("nan"))
        for update in range(updates):
            share = 1.0 if update < GOOD_ONLY * updates else GOOD_SHARE
            texts = render(
                [draw_transcript(rng, excluded, good_share=share) for _ in range(BATCH_ROWS)]
            )
            rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
            width = max(map(len, rows))
            token_ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])  # [B, L]
            written = torch.tensor(
                [assistant_mask(row, opening, end) + [False] * (width - len(row)) for row in rows]
            )  # [B, L]
            target, written = token_ids[:, 1:], written[:, 1:].float()
            weight = written + CONTEXT_LOSS * (1 - written) * (target != pad)

            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * min((update + 1) / 20, max(0.05, 1 - update / updates))
            logits = model(token_ids, use_cache=False).logits[:, :-1]
            losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
            loss = (losses * weight).sum() / written.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update(bar, advance=1, loss=loss.item())
    model.eval()


# --- the folder ----------------------------------------------------------------------------------


def settings(seed: int, updates: int, excluded: frozenset[str]) -> dict[str, Any]:
    """What decides the content of the folder, the text of this script included."""
    return {
        "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "seed": seed,
        "updates": updates,
        "excluded": hashlib.sha256(" ".join(sorted(excluded)).encode()).hexdigest(),
    }


def is_complete(out: Path, wanted: dict[str, Any]) -> bool:
    marker = out / MARKER
    return marker.is_file() and json.loads(marker.read_text()) == wanted


def publish(staged: Path, out: Path) -> None:
    """Move a finished folder into place; an older one of this script makes room for it."""
    if out.exists():
        if not (out / MARKER).is_file():
            raise SystemExit(f"{out} exists and was not made by this script; it is left alone")
        shutil.rmtree(out)
    os.replace(staged, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="make the tiny policy of the quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=1200, help="length of the warm start")
    parser.add_argument(
        "--exclude", type=Path, nargs="*", default=[], help="dataset files to leave out"
    )
    args = parser.parse_args()

    excluded = expressions_of(args.exclude)
    out, wanted = args.out.resolve(), settings(args.seed, args.updates, excluded)
    if is_complete(out, wanted):
        console.print(f"{args.out} is ready (made earlier with the same settings)")
        return

    start = time.perf_counter()
    with console.status("loading torch and transformers"):
        tokenizer = train_tokenizer(args.seed)
        model = new_model(tokenizer, args.seed)
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    console.print(
        f"tiny policy: Qwen3, {millions:.2f}M parameters, {len(tokenizer)} tokens, "
        f"seed {args.seed}, {len(excluded)} problems held out"
    )
    warm_start(model, tokenizer, seed=args.seed, updates=args.updates, excluded=excluded)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        staged = Path(folder) / out.name
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        (staged / MARKER).write_text(json.dumps(wanted))
        publish(staged, out)
    console.print(f"{args.out} written in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
