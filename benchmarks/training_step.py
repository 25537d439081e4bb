"""One training step on the same tokens: chatlearn beside TRL's GRPOTrainer.

    pip install "trl==1.16.0" datasets
    python benchmarks/training_step.py                        # a random Qwen3 of 3M parameters
    python benchmarks/training_step.py --model DIR --groups 1 --turns 1 --steps 1   # a real model

A step is forward, backward, clipping of the gradient and AdamW on one batch of rollouts: groups of
8 siblings, a prompt of 260 to 340 tokens in each group, completions of 20 to 400 tokens whose
lengths are log-normal (median 90), so that most are short and a few long. A prompt's rate of
success is uniform between 0 and 1 and advantages are those of GRPO, so that about 2 of 9 groups
have equal rewards, and no advantage.

First the gradients of all sides must agree to 1e-4. Then the sides take turns, each in a process of
its own. chatlearn is ``PolicyTrainer.step`` on ``step_batches``, packing included:

    all rows    every row goes through the model
    pulling     rows without advantage, which have no gradient, are left out
    as train()  moreover a prompt is computed once for all its siblings (tree packing)

TRL is ``GRPOTrainer.compute_loss``, unmodified, with its own optimizer. It is spared what is around
that in ``Trainer``: its batch is padded beforehand, not timed, as generation leaves it (prompts
left, completions right, to the longest of the step), and cut into micro-batches of ``--trl-rows``
(4, 8 and 16 took the same time, 32 more). Both compute in fp32 with equal threads.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sides import alone, apart, gradient_of, keep, kept, loads, median_and_best, padded
from sides import random_qwen3 as random_model

from chatlearn.types import Sample

if TYPE_CHECKING:  # each process loads only the library that it measures
    from trl import GRPOTrainer

GROUP = 8
PROMPT = (260, 340)
COMPLETION = (20, 400)
MEDIAN, SPREAD = 90, 0.8
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
LR = 1e-6
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Job:
    """One turn of one side; everything that all must agree on."""

    model: str
    samples: str
    """File of the batch, with the logprobs of the rollouts."""
    folder: str
    """Where a side may write."""
    steps: int
    threads: int
    max_tokens: int
    """Of a micro-batch of chatlearn."""
    trl_rows: int = GROUP
    """Of a micro-batch of TRL."""
    keep_gradient: str = ""
    """File to write the gradient of the first step to."""


@dataclass(frozen=True)
class Turn:
    """What a side did."""

    seconds: list[float]
    """Of each step after the first."""
    tokens: int
    """Given to the model in a step, padding included."""
    loss: float


# the batch -------------------------------------------------------------------------------------


def completion_length(draw: random.Random) -> int:
    low, high = COMPLETION
    return min(high, max(low, round(MEDIAN * draw.lognormvariate(0.0, SPREAD))))


def advantages_of(rewards: list[float]) -> list[float]:
    """GRPO's: standardised inside the group, 0 where all are equal."""
    spread = statistics.stdev(rewards)
    mean = statistics.fmean(rewards)
    return [(reward - mean) / (spread + 1e-6) if spread else 0.0 for reward in rewards]


def batch(groups: int, draw: random.Random, vocabulary: int) -> list[Sample]:
    """Rollouts of ``groups`` prompts; their logprobs are yet to be found."""

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(count)]

    samples = []
    for group in range(groups):
        prompt, success = tokens(draw.randint(*PROMPT)), draw.random()
        rewards = [float(draw.random() < success) for _ in range(GROUP)]
        for sibling, advantage in enumerate(advantages_of(rewards)):
            answer = tokens(completion_length(draw))
            before, trained = [0.0] * len(prompt), len(answer)
            samples.append(
                Sample(
                    token_ids=prompt + answer,
                    loss_mask=[False] * len(prompt) + [True] * trained,
                    rollout_logprobs=before + [0.0] * trained,
                    advantages=before + [advantage] * trained,
                    trajectory=f"{group}/{sibling}",
                )
            )
    return samples


def prepare(job: Job, is_random: bool, make: Callable[[int], list[Sample]], seed: int) -> None:
    """Write the batch that ``make(vocabulary)`` is, and the random model if there is no other.

    The logprobs are the model's own, moved at random by what weights of a few steps ago would
    differ, so that the ratios are not all 1.
    """
    torch.set_num_threads(job.threads)
    if is_random:
        save_random(job.model)
    trainer = our_trainer(job)
    vocabulary = trainer.model.get_input_embeddings().num_embeddings
    samples = make(vocabulary)
    noise = random.Random(seed)
    found = asyncio.run(trainer.logprobs(samples))
    keep(
        [
            replace(
                sample,
                rollout_logprobs=[
                    value + noise.gauss(0, 0.05) if is_trained else 0.0
                    for value, is_trained in zip(row, sample.loss_mask, strict=True)
                ],
            )
            for sample, row in zip(samples, found, strict=True)
        ],
        Path(job.samples),
    )


def save_random(folder: str) -> None:
    """The random model, and the tokenizer without which TRL does not start."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    random_model(torch.float32).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0"
    ).save_pretrained(folder)


# chatlearn -------------------------------------------------------------------------------------


def our_trainer(job: Job):
    from chatlearn.models.policy.loading import load_policy
    from chatlearn.models.policy.trainer import PolicyTrainer, TrainerSettings

    model = load_policy(job.model, device=torch.device("cpu"), precision="fp32")
    settings = TrainerSettings(lr=LR, pos_clip_ratio=CLIP_HIGH, neg_clip_ratio=CLIP_LOW)
    return PolicyTrainer(model, None, settings)


def ours(job: Job, *, all_rows: bool = False, tree: bool = False) -> Turn:
    from chatlearn.algorithm.aggregation import step_batches

    torch.set_num_threads(job.threads)
    samples, trainer = kept(job.samples), our_trainer(job)

    def step() -> tuple[float, int, float]:
        started = time.perf_counter()
        batches = step_batches(
            samples,
            "token-mean",
            horizon=1,
            max_tokens=job.max_tokens,
            tree=tree,
            all_rows=all_rows,
        )
        metrics = asyncio.run(trainer.step(batches))
        seconds = time.perf_counter() - started
        return seconds, sum(len(b.token_ids) for b in batches), metrics["policy/loss"]

    gradient, end = gradient_of(trainer.model)
    _, tokens, loss = step()
    end()
    if job.keep_gradient:
        torch.save(gradient, job.keep_gradient)
    gradient.clear()
    return Turn([step()[0] for _ in range(job.steps)], tokens, loss)


# TRL -------------------------------------------------------------------------------------------


def trl_trainer(job: Job, batches: int) -> GRPOTrainer:
    """A GRPOTrainer that accumulates ``batches`` micro-batches a step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=f"{job.folder}/trl",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=job.trl_rows,
        gradient_accumulation_steps=batches,
        num_generations=GROUP,
        loss_type="dapo",
        beta=0.0,
        epsilon=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        learning_rate=LR,
        weight_decay=0.01,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "w3"}] * 64),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=AutoTokenizer.from_pretrained(job.model),
    )


def trl(job: Job) -> Turn:
    torch.set_num_threads(job.threads)
    whole = padded(kept(job.samples))
    rows = len(whole["advantages"])
    cuts = range(0, rows, job.trl_rows)
    trainer = trl_trainer(job, len(cuts))
    trainer.current_gradient_accumulation_steps = len(cuts)  # the training loop would set it
    optimizer, model = trainer.create_optimizer(), trainer.model.train()
    batches = [
        {
            name: value[cut : cut + job.trl_rows] if value.ndim else value
            for name, value in whole.items()
        }
        for cut in cuts
    ]

    def step() -> tuple[float, float]:
        started, total = time.perf_counter(), 0.0
        for inputs in batches:
            loss = trainer.compute_loss(model, inputs)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        return time.perf_counter() - started, total

    gradient, end = gradient_of(model)
    _, loss = step()
    end()
    if job.keep_gradient:
        torch.save(gradient, job.keep_gradient)
    gradient.clear()
    tokens = whole["prompt_ids"].numel() + whole["completion_ids"].numel()
    return Turn([step()[0] for _ in range(job.steps)], tokens, loss)


# the table -------------------------------------------------------------------------------------

TRL = "TRL 1.16"
SIDES = {
    "chatlearn, all rows": partial(ours, all_rows=True),
    "chatlearn, pulling rows": ours,
    "chatlearn, as train()": partial(ours, tree=True),
    TRL: trl,
}


def measure(job: Job, turns: int) -> tuple[dict[str, list[Turn]], dict[str, float]]:
    """The turns of each side, and how far its gradient is from TRL's."""
    found: dict[str, list[Turn]] = {side: [] for side in SIDES}
    files = {side: f"{job.folder}/gradient{i}.pt" for i, side in enumerate(SIDES)}
    for turn in range(turns):
        for side, function in SIDES.items():
            mine = replace(job, keep_gradient="" if turn else files[side])
            found[side].append(alone(function, mine))
    theirs = torch.load(files[TRL])
    return found, {side: apart(torch.load(file), theirs) for side, file in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a causal LM; default: a random Qwen3 of 3M")
    parser.add_argument("--groups", type=int, default=8, help=f"of {GROUP} rollouts")
    parser.add_argument("--steps", type=int, default=3, help="of a turn, after one not counted")
    parser.add_argument("--turns", type=int, default=2, help="of each side")
    parser.add_argument("--max-tokens", type=int, default=4096, help="max_token_in_packing")
    parser.add_argument("--trl-rows", type=int, default=8, help="per_device_train_batch_size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    before = loads()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            model=options.model or f"{folder}/model",
            samples=f"{folder}/samples.pkl",
            folder=folder,
            steps=options.steps,
            threads=options.threads,
            max_tokens=options.max_tokens,
            trl_rows=options.trl_rows,
        )
        make = partial(batch, options.groups, random.Random(options.seed))
        alone(prepare, job, options.model is None, make, options.seed)
        samples = kept(job.samples)
        found, gaps = measure(job, options.turns)
    idle = sum(not any(s.advantages) for s in samples)
    print(f"{options.model or 'random Qwen3, 3M'}, fp32, {options.threads} threads, ", end="")
    print(f"{len(samples)} rollouts of {sum(len(s.token_ids) for s in samples)} tokens, of which ")
    print(f"{sum(s.num_trained for s in samples)} trained; {idle} rows without advantage; ", end="")
    print(f"before {before}, after {loads()}\n")
    print("| side | gradient apart | tokens through the model | s a step, median (best) | ratio |")
    print("|---" * 5 + "|")
    theirs = statistics.median(s for turn in found[TRL] for s in turn.seconds)
    for side, turns in found.items():
        seconds = [s for turn in turns for s in turn.seconds]
        cells = (
            f"{gaps[side]:.1e}",
            str(turns[0].tokens),
            median_and_best(seconds),
            f"{theirs / statistics.median(seconds):.2f}x",
        )
        print(f"| {side} | " + " | ".join(cells) + " |")
    if max(gaps.values()) >= TOLERANCE:
        raise SystemExit(f"gradients differ by {max(gaps.values()):.1e}, more than {TOLERANCE}")


if __name__ == "__main__":
    main()
