"""chatlearn beside TRL's GRPOTrainer on one CPU: the same gradient, and how long a step takes.

    python -m venv side && . side/bin/activate
    pip install torch --index-url https://download.pytorch.org/whl/cpu   # first: no CUDA packages
    pip install -e . "trl==1.16.0" datasets
    python scripts/tiny_model.py --out pretrained_models/tiny
    python chatlearn/data/data_preprocess/arithmetic_agent.py --local_dir data
    python benchmarks/trl_side_by_side.py \\
        --model pretrained_models/tiny --data data/train_agent.json
    python benchmarks/trl_side_by_side.py --workload long --model pretrained_models/tiny

Two workloads of a multi-turn agent with a tool, 64 rollouts a step in groups of 8:

    calculator  at most 3 calls, about 70 tokens in all: where a real LangGraph run costs most
    long        at most 6 calls on a prompt of 600 tokens, records of 45 tokens between them, about
                1,000 tokens in all, thoughts of skewed lengths; see ``field_survey.py``

First one batch of rollouts is given to both trainers: the same tokens, masks, rollout logprobs and
advantages. Loss and gradient must agree to 1e-4, as sampled and also with the rollout logprobs
shifted at random, so that both clip bounds cut. Then both train from the same weights, on the same
prompts in the same order. They take turns (A B A B), each turn in a process of its own, so that
neither pays for what the other imported. chatlearn is ``train()`` with ``LocalCluster``, as
``chatlearn grpo`` runs it; TRL generates with ``generate``, its fastest way on a CPU (two steps of
the long workload took 78 s of CPU; 102 with a static cache, and more than 186 with transformers'
continuous batching: ``--trl-sampling``), and has the tool as ``tools=[...]``. Seconds a step are
from the end of one step to the end of the next, all included. Both use ``--threads`` threads, which
wait passively; on a model this small and cores that others use too, 1 is as fast as 2 or faster.
What still differs, and on whose side:

- TRL adds 1e-4 to the standard deviation of a group, chatlearn 1e-6: up to 0.03 % of an advantage.
- TRL takes the ratio against its own forward pass, so that it is exactly 1 in the one step on a
  batch; chatlearn against what the engine recorded. They differ by the rounding of the engine.
- TRL's batch goes on until its longest answer is done, and begins each turn by computing every
  context anew. In chatlearn a run that is answered goes on at once, and a context keeps its keys
  and values over its turns.
- chatlearn leaves rows without advantage out of the forward pass, and computes what rows begin with
  in common once (``tree_packing``). TRL computes all rows, padded to the longest.
- chatlearn tells Python's garbage collector to leave alone what is loaded; TRL does not.
- chatlearn writes every rollout and every metric to disk; TRL is told to write nothing.
- An unknown tool is answered in other words. The seeds are equal; the random numbers are not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import field_survey
import torch
from sides import Gradient, alone, apart, gradient_of, loads, padded

if TYPE_CHECKING:  # each process loads only the library that it measures
    from trl import GRPOTrainer

    from chatlearn.types import Sample

HERE = Path(__file__).resolve().parent
TEMPLATE = HERE.parent / "template" / "local_cpu.yaml"
GROUP, ROLLOUTS = 8, 64
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
BETAS = (0.9, 0.95)
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Job:
    """One turn of one side; everything that both must agree on."""

    workload: str
    """A name in ``WORKLOADS``."""
    model: str
    prompts: str
    """File with ``ROLLOUTS / GROUP`` rows a step, in the order in which they are used."""
    folder: str
    """Where a side may write."""
    longest_prompt: int
    steps: int
    max_tokens: int
    """Of a rollout after its prompt, tool results included."""
    lr: float
    threads: int
    sampling: str
    """A name in ``TRL_SAMPLING``."""
    seed: int = 0


@dataclass(frozen=True)
class Step:
    ended: float
    rollout_s: float
    train_s: float
    tokens: float
    """Sampled by the model."""
    reward: float


# chatlearn -------------------------------------------------------------------------------------


class Clock:
    """A sink of chatlearn's tracker that notes when an episode ended."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def write(self, episode: int, metrics: Mapping[str, float]) -> None:
        seconds = metrics["time/rollout_s"], metrics["time/train_s"]
        tokens, reward = metrics["tokens/generated"], metrics["reward/mean"]
        self.steps.append(Step(time.perf_counter(), *seconds, tokens, reward))

    def close(self) -> None:
        pass


def run_chatlearn(job: Job) -> list[Step]:
    from chatlearn.cluster.local import LocalCluster
    from chatlearn.config import dump_config, load_config
    from chatlearn.observability.run_folder import RunFolder
    from chatlearn.observability.tracker import Tracker
    from chatlearn.train import train

    torch.set_num_threads(job.threads)
    settings = {
        "runtime_args.exp_name": "chatlearn",
        "runtime_args.output_dir": job.folder,
        "runtime_args.data_path": job.prompts,
        "runtime_args.data_shuffle": False,
        "runtime_args.seed": job.seed,
        "runtime_args.import_modules": json.dumps(WORKLOADS[job.workload].modules),
        "runtime_args.num_episode": job.steps,
        "runtime_args.sample_per_episode": ROLLOUTS,
        "runtime_args.save_episode_interval": 0,
        "runtime_args.enable_resume_training": False,
        "runtime_args.log_args_dict.enable_tensorboard": False,
        "models.policy.num_inference_per_prompt": GROUP,
        "models.policy.max_prompt_tokens_length": job.longest_prompt,
        "models.policy.max_response_tokens_length": job.max_tokens,
        "models.policy.max_seq_len": job.longest_prompt + job.max_tokens,
        "models.policy_trainer.load": job.model,
        "models.policy_trainer.precision": "fp32",
        "models.policy_trainer.max_token_in_packing": WORKLOADS[job.workload].packing,
        "models.policy_trainer.pos_clip_ratio": CLIP_HIGH,
        "models.policy_trainer.neg_clip_ratio": CLIP_LOW,
        "models.policy_trainer.optimizer.lr": job.lr,
        "models.policy_trainer.optimizer.weight_decay": 0.0,
        "models.policy_trainer.optimizer.adam_beta1": BETAS[0],
        "models.policy_trainer.optimizer.adam_beta2": BETAS[1],
    }
    cfg = load_config(TEMPLATE, [f"{key}={value}" for key, value in settings.items()])
    clock = Clock()
    with (
        RunFolder.open(job.folder, "chatlearn", resume=False, config_text=dump_config(cfg)) as run,
        Tracker(run.metrics_file, [clock]) as tracker,
    ):
        asyncio.run(train(cfg, LocalCluster(cfg, logs=run.logs), run, tracker))
    return clock.steps


# TRL -------------------------------------------------------------------------------------------


def calculator(expression: str) -> str:
    """Work out an arithmetic expression, for example 12*(3+4).

    Args:
        expression: The expression.

    Returns:
        Its value.
    """
    from chatlearn.models.agent.examples.calculator_agent_graph import evaluate

    try:
        return str(evaluate(expression))
    except (ValueError, ZeroDivisionError) as error:
        return f"error: {error}"


def reward(completions: list[Any], ground_truth: list[str], **_: Any) -> list[float]:
    """The function chatlearn scores these rows with."""
    from chatlearn.rewards.math import arithmetic_reward
    from chatlearn.rewards.score import final_response

    pairs = zip(completions, ground_truth, strict=True)
    return [arithmetic_reward(final_response(said), truth)[0] for said, truth in pairs]


def survey_reward(completions: list[Any], ground_truth: list[str], **_: Any) -> list[float]:
    """The function chatlearn scores these rows with."""
    from chatlearn.rewards.score import final_response

    pairs = zip(completions, ground_truth, strict=True)
    return [field_survey.said_so(final_response(said), truth) for said, truth in pairs]


@dataclass(frozen=True)
class Workload:
    """What the agent does, and how each side is told."""

    calls: int
    """Most model calls of a rollout."""
    max_tokens: int
    """Of a rollout after its prompt, tool results included."""
    lr: float
    tool: Callable[..., str]
    """As TRL takes it."""
    reward: Callable[..., list[float]]
    trl_rows: int
    """Of a micro-batch of TRL. Of long rows, 4 to 16 take the same time: ``training_step.py``."""
    packing: int
    """Tokens of a micro-batch of chatlearn."""
    steps: int
    """Of a turn, unless told."""
    warm_up: int
    """So many of them are not timed."""
    modules: list[str]
    """With the agent and the reward of chatlearn."""


WORKLOADS = {
    "calculator": Workload(3, 96, 5e-4, calculator, reward, ROLLOUTS, ROLLOUTS * 512, 12, 2, []),
    "long": Workload(
        field_survey.MAX_CALLS,
        field_survey.MAX_TOKENS,
        1e-5,
        field_survey.measure,
        survey_reward,
        16,
        8192,
        3,
        1,
        [str(HERE / "field_survey_agent.py")],
    ),
}


TRL_SAMPLING: dict[str, dict[str, Any]] = {
    "generate": {},
    "static": {"cache_implementation": "static"},
    "continuous": {"use_transformers_continuous_batching": True},
}
"""Settings of TRL's ways to sample without vLLM, which has no build for CPUs on PyPI."""


def trl_trainer(job: Job) -> tuple[GRPOTrainer, list[Step]]:
    """A GRPOTrainer of the same settings, and the list that gets a ``Step`` after each of its."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import qwen3_template

    class Stopwatch(GRPOTrainer):
        rollout_s = 0.0

        # TRL reports this time to wandb alone, so the stopwatch goes around the method itself
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            started = time.perf_counter()
            found = super()._generate_and_score_completions(inputs)
            self.rollout_s = time.perf_counter() - started
            return found

    class Notes(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.busy_s = time.perf_counter() - self.began

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "reward" in logs:  # the last call has a summary of the run instead
                tokens = logs["completions/mean_length"] * ROLLOUTS
                train_s = self.busy_s - trainer.rollout_s
                now = time.perf_counter()
                steps.append(Step(now, trainer.rollout_s, train_s, tokens, logs["reward"]))

    torch.set_num_threads(job.threads)
    workload = WORKLOADS[job.workload]
    config = GRPOConfig(
        output_dir=f"{job.folder}/trl",
        use_cpu=True,
        bf16=False,
        seed=job.seed,
        shuffle_dataset=False,
        per_device_train_batch_size=workload.trl_rows,
        gradient_accumulation_steps=ROLLOUTS // workload.trl_rows,
        num_generations=GROUP,
        max_completion_length=job.max_tokens,
        max_tool_calling_iterations=workload.calls - 1,
        max_steps=job.steps,
        temperature=1.0,
        **TRL_SAMPLING[job.sampling],
        loss_type="dapo",
        scale_rewards="group",
        beta=0.0,
        epsilon=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokenizer.response_template = qwen3_template  # TRL knows it only by the template's exact text
    rows = [json.loads(line) for line in Path(job.prompts).read_text().splitlines()]
    trainer = Stopwatch(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(
            [
                {"prompt": row["prompt"], "ground_truth": row["reward_model"]["ground_truth"]}
                for row in rows
            ]
        ),
        reward_funcs=workload.reward,
        processing_class=tokenizer,
        tools=[workload.tool],
        callbacks=[Notes()],
    )
    trainer.remove_callback(PrinterCallback)
    steps: list[Step] = []
    return trainer, steps


def run_trl(job: Job) -> list[Step]:
    trainer, steps = trl_trainer(job)
    trainer.train()
    return steps


# The same gradient -----------------------------------------------------------------------------


def compare_gradients(job: Job) -> list[tuple[str, float, float, float, float]]:
    """(batch, loss of chatlearn, loss of TRL, relative difference of gradients, clipped share)."""
    from chatlearn.observability.rollout_files import read_rollouts

    run_chatlearn(replace(job, steps=1))
    file = Path(job.folder) / "chatlearn" / "latest" / "rollouts" / "episode_000001.jsonl"
    sampled = [sample for rollout in read_rollouts(file) for sample in rollout.samples]
    noise = torch.Generator().manual_seed(0)

    def shifted(sample: Sample) -> Sample:
        moves = (0.3 * torch.randn(len(sample.token_ids), generator=noise)).tolist()
        pairs = zip(sample.rollout_logprobs, moves, strict=True)
        return replace(sample, rollout_logprobs=[value + move for value, move in pairs])

    found = []
    trainer, _ = trl_trainer(job)
    for name, samples in (("as sampled", sampled), ("shifted", [shifted(s) for s in sampled])):
        our_loss, clipped, ours = chatlearn_gradient(job, samples)
        trl_loss, theirs = trl_gradient(trainer, samples)
        found.append((name, our_loss, trl_loss, apart(ours, theirs), clipped))
    return found


def chatlearn_gradient(job: Job, samples: Sequence[Sample]) -> tuple[float, float, Gradient]:
    """Loss, share of clipped tokens and gradient (before it is clipped) of one trainer step."""
    from chatlearn.algorithm.aggregation import step_batches
    from chatlearn.models.policy.loading import load_policy
    from chatlearn.models.policy.trainer import PolicyTrainer, TrainerSettings

    model = load_policy(job.model, device=torch.device("cpu"), precision="fp32")
    settings = TrainerSettings(pos_clip_ratio=CLIP_HIGH, neg_clip_ratio=CLIP_LOW)
    trainer = PolicyTrainer(model, None, settings)
    gradient, _ = gradient_of(model)
    # several micro-batches, so that their sum is compared with TRL's single batch
    most = max(1024, max(len(sample.token_ids) for sample in samples))
    batches = step_batches(
        samples, "token-mean", horizon=1, max_tokens=most, tree=trainer.packs_trees
    )
    metrics = asyncio.run(trainer.step(batches))
    clipped = metrics["policy/clip_fraction_low"] + metrics["policy/clip_fraction_high"]
    return metrics["policy/loss"], clipped, gradient


def trl_gradient(trainer: GRPOTrainer, samples: Sequence[Sample]) -> tuple[float, Gradient]:
    """Loss and gradient of TRL's ``compute_loss``, on tensors as its generation leaves them."""
    inputs = padded(samples)
    model = trainer.model.train()
    # the training loop would set it; equal to the other, so that this batch is the whole step
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    model.zero_grad()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


# The table -------------------------------------------------------------------------------------

SIDES = {"chatlearn": run_chatlearn, "TRL": run_trl}


def row(side: str, turns: Sequence[Sequence[Step]], warm_up: int) -> str:
    """One line of the table: medians over all timed steps of all turns."""
    timed = [
        (after.ended - before.ended, after)
        for turn in turns
        for before, after in pairwise(turn[warm_up - 1 :])
    ]
    seconds = [took for took, _ in timed]
    rest = [took - step.rollout_s - step.train_s for took, step in timed]
    cells = [
        f"{statistics.median(seconds):.3f} ({min(seconds):.3f})",
        f"{statistics.median(step.rollout_s for _, step in timed):.3f}",
        f"{statistics.median(step.train_s for _, step in timed):.3f}",
        f"{statistics.median(rest):.3f}",
        f"{statistics.median(step.tokens for _, step in timed):.0f}",
        f"{sum(step.tokens for _, step in timed) / sum(seconds):.0f}",
        *(
            f"{statistics.fmean(step.reward for turn in turns for step in turn[part]):.2f}"
            for part in (slice(3), slice(-3, None))
        ),
    ]
    return f"| {side} | " + " | ".join(cells) + " |"


def prepared(options: argparse.Namespace, folder: str) -> Job:
    """The job of both sides, with a file of just the rows that they will use."""
    from transformers import AutoTokenizer

    from chatlearn.data.row_files import read_rows, write_rows

    workload, model = WORKLOADS[options.workload], options.model
    count = options.steps * ROLLOUTS // GROUP
    if options.workload == "long":
        model = f"{folder}/model"
        field_survey.make_policy(options.model, Path(model))
        rows = field_survey.rows(count, seed=0)
    else:
        rows = [fields for _, fields in read_rows(options.data)[:count]]
    if len(rows) < count:
        raise SystemExit(f"{options.steps} steps use {count} rows; {options.data} has {len(rows)}")
    prompts = Path(folder) / "prompts.json"
    write_rows(prompts, rows)
    render = AutoTokenizer.from_pretrained(model).apply_chat_template
    lengths = [
        len(render(fields["prompt"], add_generation_prompt=True, return_dict=False))
        for fields in rows
    ]
    return Job(
        workload=options.workload,
        model=model,
        prompts=str(prompts),
        folder=folder,
        longest_prompt=max(lengths),
        steps=options.steps,
        max_tokens=options.max_tokens or workload.max_tokens,
        lr=options.lr or workload.lr,
        threads=options.threads,
        sampling=options.trl_sampling,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a small chat model")
    parser.add_argument("--workload", default="calculator", choices=WORKLOADS)
    parser.add_argument("--data", type=Path, help="train_agent.json of sums, for the calculator")
    parser.add_argument("--steps", type=int, help="of a turn")
    parser.add_argument("--turns", type=int, default=2, help="of each side")
    parser.add_argument("--max-tokens", type=int, help="after the prompt")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--trl-sampling", default="generate", choices=TRL_SAMPLING)
    options = parser.parse_args()
    if options.workload == "calculator" and options.data is None:
        parser.error("the calculator needs --data")
    workload = WORKLOADS[options.workload]
    options.steps = options.steps or workload.steps
    if options.steps <= workload.warm_up:
        parser.error(f"--steps must be above the {workload.warm_up} that are warm-up")
    with tempfile.TemporaryDirectory() as folder:
        job = prepared(options, folder)
        batches = alone(compare_gradients, job)
        print(
            "| one batch, both trainers | loss, chatlearn | loss, TRL | gradients apart | clipped |"
        )
        print("|---|---|---|---|---|")
        for name, ours, theirs, apart, clipped in batches:
            print(f"| {name} | {ours:.7f} | {theirs:.7f} | {apart:.1e} | {clipped:.1%} |")
        gap = max(batch[3] for batch in batches)
        if gap >= TOLERANCE:
            raise SystemExit(f"the gradients differ by {gap:.1e}, more than {TOLERANCE}")
        turns: dict[str, list[list[Step]]] = {side: [] for side in SIDES}
        print()
        for seed in range(options.turns):
            for side, function in SIDES.items():
                before = loads()
                turns[side].append(alone(function, replace(job, seed=seed)))
                print(f"turn {seed + 1} of {side}: {before} -> {loads()} (1, 5, 15 min)")
    print(
        f"\n{ROLLOUTS} rollouts a step, {options.threads} threads, fp32; seconds are medians ",
        end="",
    )
    print(
        f"of {options.turns} x {options.steps - workload.warm_up} steps (in brackets the fastest)"
    )
    print("| | s a step | rollout s | train s | rest s | sampled tokens a step | tokens/s ", end="")
    print("| reward, first 3 steps | last 3 |\n" + "|---" * 9 + "|")
    for side, found in turns.items():
        print(row(side, found, workload.warm_up))


if __name__ == "__main__":
    main()
