"""Tree-packed training beside plain packing: tokens through the model and seconds a step.

    python benchmarks/tree_packing.py              # a random Qwen3 of 3M parameters

Two workloads, of random tokens:

    group    16 siblings on a prompt of 1,500 tokens, completions of 50 to 300 tokens
    agent    4 runs that map and reduce: a history of 1,000 tokens with two answers in it, then 8
             parallel branches (an instruction of 20 tokens, an answer of 40 to 160), then a
             reduction that goes on from the history with all the answers in its prompt

Plain packing lays every root-to-leaf row end to end; the tree computes what rows begin with once.
Both are ``PolicyTrainer.step`` on ``step_batches``, packing included, with micro-batches of at most
``--max-tokens``. The gradients must agree to 1e-4. The sides take turns, each in a process of its
own. Distinct tokens are what no packing can go below; a cut between two micro-batches computes
what it separates twice.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from sides import alone, apart, kept, loads, median_and_best
from training_step import TOLERANCE, Job, Turn, ours, prepare

from chatlearn.types import Sample

PLAIN, TREE = "plain", "tree"
SIDES = {PLAIN: partial(ours, all_rows=True), TREE: partial(ours, all_rows=True, tree=True)}

Part = tuple[list[int], bool]
"""Tokens, and whether the policy sampled them."""


def row(parts: list[Part], trained_from: int, advantage: float, trajectory: str) -> Sample:
    """One root-to-leaf row; parts before ``trained_from`` are another row's to train (law 2)."""
    mask = [
        sampled and number >= trained_from
        for number, (tokens, sampled) in enumerate(parts)
        for _ in tokens
    ]
    return Sample(
        token_ids=[token for tokens, _ in parts for token in tokens],
        loss_mask=mask,
        rollout_logprobs=[0.0] * len(mask),
        advantages=[advantage * trained for trained in mask],
        trajectory=trajectory,
    )


def group(draw: random.Random, vocabulary: int) -> list[Sample]:
    """16 siblings of one long prompt."""
    prompt = (tokens(draw, vocabulary, 1500), False)
    return [
        row([prompt, said(draw, vocabulary, 50, 300)], 1, draw.gauss(0, 1), f"sibling {number}")
        for number in range(16)
    ]


def agent(draw: random.Random, vocabulary: int) -> list[Sample]:
    """4 runs of 8 branches and a reduction each."""
    samples = []
    for run in range(4):
        advantage, name = draw.gauss(0, 1), f"run {run}"
        history: list[Part] = [
            (tokens(draw, vocabulary, 500), False),
            said(draw, vocabulary, 100, 100),
            (tokens(draw, vocabulary, 300), False),
            said(draw, vocabulary, 100, 100),
        ]
        branches: list[list[Part]] = [
            [(tokens(draw, vocabulary, 20), False), said(draw, vocabulary, 40, 160)]
            for _ in range(8)
        ]
        answers = [token for _, (answer, _) in branches for token in answer]
        reduction: list[Part] = [(answers, False), said(draw, vocabulary, 100, 200)]
        for number, branch in enumerate([*branches, reduction]):
            # the answers of the history are trained once, in the first row that has them
            samples.append(row(history + branch, len(history) if number else 0, advantage, name))
    return samples


def tokens(draw: random.Random, vocabulary: int, count: int) -> list[int]:
    return [draw.randrange(vocabulary) for _ in range(count)]


def said(draw: random.Random, vocabulary: int, low: int, high: int) -> Part:
    return tokens(draw, vocabulary, draw.randint(low, high)), True


WORKLOADS = {"group": group, "agent": agent}


def make(job: Job, workload: str, is_random: bool, seed: int) -> None:
    """Write the batch of ``workload``, with logprobs of the model."""
    prepare(job, is_random, partial(WORKLOADS[workload], random.Random(seed)), seed)


def distinct(samples: list[Sample]) -> int:
    """Different beginnings of ``samples``, which are the nodes of their tree."""
    found, before = 0, []
    for ids in sorted(sample.token_ids for sample in samples):
        pairs = zip(before, ids, strict=False)
        shared = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(before), len(ids)))
        found += len(ids) - shared
        before = ids
    return found


def measure(job_of: partial[Job], turns: int) -> tuple[dict[str, list[Turn]], float]:
    """The turns of both sides, and how far apart their gradients are."""
    found: dict[str, list[Turn]] = {side: [] for side in SIDES}
    folder = job_of.keywords["folder"]
    files = {side: f"{folder}/{side}.pt" for side in SIDES}
    for turn in range(turns):
        for side, function in SIDES.items():
            job = job_of(keep_gradient="" if turn else files[side])
            found[side].append(alone(function, job))
    return found, apart(torch.load(files[TREE]), torch.load(files[PLAIN]))


def lines(workload: str, samples: list[Sample], found: dict[str, list[Turn]]) -> list[str]:
    """Of the table."""
    base = statistics.median(s for turn in found[PLAIN] for s in turn.seconds)
    rows = []
    for side, turns in found.items():
        seconds = [s for turn in turns for s in turn.seconds]
        cells = (
            f"{workload}, {side}",
            str(turns[0].tokens),
            f"{turns[0].tokens / distinct(samples):.2f}",
            median_and_best(seconds),
            f"{base / statistics.median(seconds):.2f}x",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a causal LM; default: a random Qwen3 of 3M")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--steps", type=int, default=2, help="of a turn, after one not counted")
    parser.add_argument("--turns", type=int, default=2, help="of each side")
    parser.add_argument("--max-tokens", type=int, default=8192, help="max_token_in_packing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table, gaps, before = [], [], loads()
    for workload in options.workloads:
        with tempfile.TemporaryDirectory() as folder:
            job_of = partial(
                Job,
                model=options.model or f"{folder}/model",
                samples=f"{folder}/samples.pkl",
                folder=folder,
                steps=options.steps,
                threads=options.threads,
                max_tokens=options.max_tokens,
            )
            alone(make, job_of(), workload, options.model is None, options.seed)
            samples = kept(Path(folder) / "samples.pkl")
            found, gap = measure(job_of, options.turns)
        table += lines(workload, samples, found)
        gaps.append(gap)
    print(f"{options.model or 'random Qwen3, 3M'}, fp32, {options.threads} threads, ", end="")
    print(f"before {before}, after {loads()}; gradients apart ", end="")
    print(
        ", ".join(f"{gap:.1e} ({name})" for gap, name in zip(gaps, options.workloads, strict=True))
        + "\n"
    )
    print("| workload, packing | tokens | ÷ distinct | s a step, median (best) | ratio |")
    print("|---" * 5 + "|")
    print("\n".join(table))
    if max(gaps) >= TOLERANCE:
        raise SystemExit(f"gradients differ by {max(gaps):.1e}, more than {TOLERANCE}")


if __name__ == "__main__":
    main()
