"""An independent check of what a run trained, from its run folder and its models alone.

Nothing of chatlearn is imported: rollout files are read as JSON, and logprobs, prompts, trained
positions and advantages are derived again with transformers and torch. What is asked of each
trajectory, and what every problem begins with:

logprob     the model of the turn's version, fed the recorded ids, gives the recorded logprobs
parent      a parent's prompt and completion begin the child's prompt, and no earlier turn begins
            more of it
sample      a trained position is one completion token of a turn that is not excluded, in exactly
            that turn's context, with its logprob, temperature and advantage; each such token is
            trained once; nothing else is
advantage   the rewards of the siblings, by GRPO's formula; their mean is 0
template    the template, rendering the conversation anew, writes the prompt (ChatML)
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GAP = 1e-4
"""Most that a recorded logprob may differ from the one derived again, in fp32 (nats)."""
TRAINABLE = ("finished", "truncated", "turn_limit")
MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", re.DOTALL)
SPEAK = "<|im_start|>assistant\n"


@dataclass(slots=True)
class Audit:
    """What was looked at, and what was found."""

    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """turns, tokens, trained, excluded, conversations, prompts, quoted: see where they are
    counted."""
    gap: float = 0.0
    """Largest difference of two logprobs, in nats."""


def audit(folder: Path, start: Path) -> Audit:
    """Check every rollout file of a run.

    Args:
        folder: of the run.
        start: folder of the model that sampled as version 0; later ones are in ``checkpoints``.
    """
    found = Audit()
    tokenizer = AutoTokenizer.from_pretrained(start)
    models: dict[int, Any] = {}
    siblings = defaultdict(list)
    for file in sorted((folder / "rollouts").glob("episode_*.jsonl")):
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            record = json.loads(line)
            where = f"{file.name}:{number} {record['agent_name']}"
            siblings[file.name, record["group"]].append((where, record))
            for turn in record["turns"]:
                version = turn["versions"][0]
                if version not in models:
                    models[version] = _model(folder, start, version)
                problems = _check_logprobs(found, models[version], turn)
                found.problems += [f"logprob: {where}, turn {turn['id']}: {p}" for p in problems]
            for law, check in (("parent", _check_parents), ("sample", _check_samples)):
                found.problems += [f"{law}: {where}, {p}" for p in check(found, record)]
            problems = _check_prompts(found, record, tokenizer)
            found.problems += [f"template: {where}, {p}" for p in problems]
    for group in siblings.values():
        found.problems += [f"advantage: {p}" for p in _check_advantages(group)]
    return found


def _model(folder: Path, start: Path, version: int) -> Any:
    path = folder / f"checkpoints/episode_{version:06d}/hf" if version else start
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def _check_logprobs(found: Audit, model: Any, turn: dict) -> Iterator[str]:
    prompt, said = turn["prompt_ids"], turn["completion_ids"]
    found.counts["turns"] += 1
    found.counts["tokens"] += len(said)
    if len(said) != len(turn["logprobs"]):
        yield f"{len(said)} tokens and {len(turn['logprobs'])} logprobs"
        return
    if turn["versions"][0] != turn["versions"][1]:
        yield f"sampled by several versions, {turn['versions']}"
        return
    logits = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].double()
    all_logprobs = torch.log_softmax(logits / turn["temperature"], dim=-1)
    derived = all_logprobs[torch.arange(len(said)), torch.tensor(said, dtype=torch.long)]
    gaps = (derived - torch.tensor(turn["logprobs"], dtype=torch.double)).abs()
    found.gap = max([found.gap, *gaps.tolist()])
    for i in torch.nonzero(~(gaps <= GAP)).flatten().tolist()[:1]:
        recorded, again = turn["logprobs"][i], derived[i].item()
        yield f"completion token {i} is recorded with {recorded:.5f}, the model says {again:.5f}"


def _check_parents(found: Audit, record: dict) -> Iterator[str]:
    rows = [turn["prompt_ids"] + turn["completion_ids"] for turn in record["turns"]]
    if [turn["id"] for turn in record["turns"]] != list(range(len(rows))):
        yield "its turns are not numbered from 0"
        return
    for turn in record["turns"]:
        parent, prompt = turn["parent"], turn["prompt_ids"]
        name, held = f"turn {turn['id']}", 0
        if parent is not None:
            if not 0 <= parent < turn["id"]:
                yield f"{name}: its parent {parent} is no earlier turn"
                continue
            held = len(rows[parent])
            if prompt[:held] != rows[parent]:
                yield f"{name}: its prompt does not begin with the tokens of its parent {parent}"
        for other, row in enumerate(rows[: turn["id"]]):
            said = bool(record["turns"][other]["completion_ids"])
            if said and held < len(row) < len(prompt) and prompt[: len(row)] == row:
                yield f"{name}: turn {other} begins more of its prompt than its parent {parent}"


@dataclass(slots=True)
class _Token:
    """A completion token of a turn."""

    turn: dict
    index: int
    trained: int = 0

    @property
    def name(self) -> str:
        return f"completion token {self.index} of turn {self.turn['id']}"


def _check_samples(found: Audit, record: dict) -> Iterator[str]:
    if record["advantage"] is None:
        if record["samples"]:
            yield "it has no advantage, and samples"
        return
    tokens: dict[tuple[bytes, int], list[_Token]] = defaultdict(list)
    for turn in record["turns"]:
        row, start = turn["prompt_ids"] + turn["completion_ids"], len(turn["prompt_ids"])
        contexts = _contexts(row)
        for i in range(start, len(row)):
            tokens[contexts[i], row[i]].append(_Token(turn, i - start))
    for number, sample in enumerate(record["samples"]):
        for position, problem in _check_sample(sample, tokens, record["advantage"]):
            yield f"sample {number}, position {position}: {problem}"
    for token in (token for same in tokens.values() for token in same):
        found.counts["excluded" if token.turn["excluded"] else "trained"] += 1
        if not token.turn["excluded"] and token.trained == 0:
            yield f"turn {token.turn['id']}: {token.name} is never trained"


def _check_sample(
    sample: dict, tokens: dict[tuple[bytes, int], list[_Token]], advantage: float
) -> Iterator[tuple[int, str]]:
    ids = sample["token_ids"]
    temperatures = sample.get("temperatures", 1.0)
    if not isinstance(temperatures, list):
        temperatures = [temperatures if on else 1.0 for on in sample["loss_mask"]]
    logprobs, advantages = sample["rollout_logprobs"], sample["advantages"]
    rows = (ids, sample["loss_mask"], logprobs, advantages, temperatures)
    contexts = _contexts(ids)
    for i, (token, on, logprob, own, temperature) in enumerate(zip(*rows, strict=True)):
        if not on:
            if logprob or own:
                yield i, f"not trained, but with logprob {logprob} and advantage {own}"
            continue
        same = tokens.get((contexts[i], token), [])
        if not same:
            yield i, f"token {token} is trained, and no turn sampled it in this context"
            continue
        free = [t for t in same if not t.turn["excluded"] and not t.trained]
        if not free:
            why = same[0].turn["excluded"] or "trained before"
            yield i, f"{same[0].name} is trained here, but it is {why}"
            continue
        # of equal drafts, the one that was sampled with this logprob
        chosen = min(free, key=lambda t: abs(t.turn["logprobs"][t.index] - logprob))
        chosen.trained += 1
        turn = chosen.turn
        if logprob != turn["logprobs"][chosen.index]:
            yield i, f"logprob {logprob}; {chosen.name} has {turn['logprobs'][chosen.index]}"
        if temperature != turn["temperature"]:
            yield i, f"temperature {temperature}; turn {turn['id']} has {turn['temperature']}"
        if turn["reward"] is None and own != advantage:
            yield i, f"advantage {own}; the run has {advantage}"


def _contexts(ids: list[int]) -> list[bytes]:
    """A digest of ``ids[:i]`` for every i. [L]"""
    running, digests = hashlib.blake2b(digest_size=16), []
    for token in ids:
        digests.append(running.digest())
        running.update(token.to_bytes(4, "little"))
    return digests


def _check_advantages(group: list[tuple[str, dict]]) -> Iterator[str]:
    trained = [
        (where, record)
        for where, record in group
        if record["outcome"] in TRAINABLE
        and record["reward"] is not None
        and not all(turn["excluded"] for turn in record["turns"])
    ]
    for where, record in group:
        if record["advantage"] is not None and (where, record) not in trained:
            yield f"{where}: {record['outcome']} with an advantage"
    if len(trained) < 2 or all(record["advantage"] is None for _, record in trained):
        return  # nobody to compare with, or a group that was dropped
    rewards = [record["reward"] for _, record in trained]
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    for where, record in trained:
        expected = (record["reward"] - mean) / (deviation + 1e-6)
        if record["advantage"] is None or abs(record["advantage"] - expected) > 1e-6:
            yield f"{where}: {record['advantage']}; the rewards {rewards} make {expected:.6f}"
    total = sum(record["advantage"] or 0.0 for _, record in trained)
    if abs(total) > 1e-6 * len(trained):
        yield f"{trained[0][0]} and its siblings: their advantages sum to {total}, not to 0"


def _check_prompts(found: Audit, record: dict, tokenizer: Any) -> Iterator[str]:
    for turn in record["turns"]:
        if problem := _check_prompt(found, turn, record["turns"], tokenizer):
            yield f"turn {turn['id']}: {problem}"
    spoken = sum(message["role"] == "assistant" for message in record["messages"])
    parents = [None, *range(len(record["turns"]) - 1)]
    is_chain = [turn["parent"] for turn in record["turns"]] == parents
    if is_chain and spoken == len(record["turns"]) > 0:
        found.counts["conversations"] += 1
        yield from _check_conversation(record, tokenizer)


def _check_prompt(found: Audit, turn: dict, turns: list[dict], tokenizer: Any) -> str | None:
    """The prompt is whole messages and the opening of another one, as the template writes them;
    what was sampled stands in it as a mark, for it may be anything."""
    ids = turn["prompt_ids"][: len(turn["prompt_ids"]) - turn["prefilled"]]
    opening = tokenizer.encode(SPEAK, add_special_tokens=False)
    eos = tokenizer.eos_token_id
    pieces, at, last = [], 0, 0
    answers = [(_words(t), t["completion_ids"][-1:] == [eos]) for t in turns[: turn["id"]]]
    answers.sort(key=lambda answer: -len(answer[0]))
    while at < len(ids):
        begins = [a for a in answers if a[0] and ids[at : at + len(a[0])] == a[0]]
        if begins and ids[at - len(opening) : at] == opening:
            words, is_closed = begins[0]
            pieces += [tokenizer.decode(ids[last:at]), "said", "<|im_end|>" * is_closed]
            at = last = at + len(words)
        else:
            at += 1
    text = "".join([*pieces, tokenizer.decode(ids[last:])])
    messages = [{"role": r, "content": c} for r, c in MESSAGE.findall(text)]
    special = set(tokenizer.all_special_ids)
    if any(special & set(t["completion_ids"][:-1]) for t in turns[: turn["id"]]):
        found.counts["quoted"] += 1  # the graph may quote an answer that breaks the form
        return None
    found.counts["prompts"] += 1
    written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if any("<|im_" in message["content"] for message in messages):
        return f"a message of {text!r} does not end as the template ends it"
    return None if text == written else f"the prompt is {text!r}, the template writes {written!r}"


def _words(turn: dict) -> list[int]:
    """All of the assistant's tokens, those put into its mouth first."""
    prompt = turn["prompt_ids"]
    return prompt[len(prompt) - turn["prefilled"] :] + turn["completion_ids"]


def _check_conversation(record: dict, tokenizer: Any) -> Iterator[str]:
    """A run without a fork is one conversation: rendered whole, it is the prompts around what was
    sampled. A system prompt in front may be the node's own."""
    marks, messages = [], []
    for message in record["messages"]:
        if message["role"] == "assistant":
            marks.append(f"[answer {len(marks)}]")
            message = {"role": "assistant", "content": marks[-1]}
        messages.append(message)
    text, pieces = tokenizer.apply_chat_template(messages, tokenize=False), []
    for mark in marks:
        piece, _, text = text.partition(mark)
        pieces.append(piece)
    before: list[int] = []
    for turn, piece in zip(record["turns"], pieces, strict=True):
        end = len(turn["prompt_ids"]) - turn["prefilled"]
        between = tokenizer.decode(turn["prompt_ids"][len(before) : end])
        if before and before[-1] == tokenizer.eos_token_id:
            piece = piece.removeprefix("<|im_end|>")
        own = between.removesuffix(piece) if not before else ""
        is_system = MESSAGE.fullmatch(own) and own.startswith("<|im_start|>system\n")
        if between != piece and not (is_system and own + piece == between):
            yield f"turn {turn['id']}: {between!r} in the prompt, {piece!r} by the template"
        before = turn["prompt_ids"] + turn["completion_ids"]
