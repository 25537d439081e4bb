"""What a run would do, in words and numbers, before anything is loaded: ``--dry-run``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from chatlearn.config.memory import estimate_memory
from chatlearn.config.schema import GrpoConfig
from chatlearn.types import Budget


def plan(cfg: GrpoConfig, rows: Mapping[str, int] | None = None) -> str:
    """About fifteen lines, one idea each.

    Args:
        cfg: the resolved configuration.
        rows: rows of each file of ``data_path`` and ``eval_data_path``; None where nobody counted.
    """
    rows = rows or {}
    lines = (
        *_where(cfg),
        *_data(cfg, rows),
        *_episode(cfg),
        *_tokens(cfg),
        *_evaluation(cfg, rows),
        *_safety(cfg),
        ("memory", estimate_memory(cfg)),
    )
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


def _where(cfg: GrpoConfig) -> Iterator[tuple[str, str]]:
    run, trainer = cfg.runtime_args, cfg.models.policy_trainer
    device = "cuda" if trainer.num_gpu else "cpu"
    yield "run", f"{run.exp_name}: {run.num_episode:,} episodes, into {run.output_dir}"
    yield (
        "device",
        f"{'one CUDA GPU' if trainer.num_gpu else 'the CPU'} in {cfg.precision(device)}, one "
        "process: trainer and embedded engine share the weights",
    )
    reference = "no reference"
    if trainer.kl_coef:
        reference = f"reference {cfg.reference_path} (kl_coef {trainer.kl_coef:g})"
    yield "model", f"{trainer.load}; {reference}"
    yield "your code", ", ".join(run.import_modules) or "none imported: only the built-in agents"


def _data(cfg: GrpoConfig, rows: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    run = cfg.runtime_args
    text = _files(run.data_files, rows) + (", shuffled" if run.data_shuffle else ", in file order")
    counts = [rows.get(file, 0) for file in run.data_files]
    if all(counts):
        passes = cfg.prompts_per_episode * run.num_episode / sum(counts)
        text += f"; the run goes over them {passes:.2g} times"
    yield "data", text


def _episode(cfg: GrpoConfig) -> Iterator[tuple[str, str]]:
    run, policy, optimizer = (
        cfg.runtime_args,
        cfg.models.policy,
        cfg.models.policy_trainer.optimizer,
    )
    yield (
        "episode",
        f"{_count(cfg.prompts_per_episode, 'prompt')} × {policy.num_inference_per_prompt} rollouts "
        f"= {run.sample_per_episode:,} rollouts; at most {run.max_concurrent_rollouts:,} run at "
        f"once, {policy.max_concurrent_requests:,} calls are decoded at once",
    )
    passes = f" × {run.num_training_epoch} passes" if run.num_training_epoch > 1 else ""
    yield (
        "steps",
        f"{_count(run.steps_per_episode, 'optimizer step')} an episode (of "
        f"{run.rollouts_per_step:,} rollouts{passes}), {cfg.total_steps:,} in total; lr "
        f"{optimizer.lr:g} {optimizer.lr_schedule}",
    )
    if run.max_staleness:
        yield "staleness", f"rollouts may be sampled by weights {run.max_staleness} episodes old"
    else:
        yield "staleness", "0: every rollout is sampled by the weights it trains"


def _tokens(cfg: GrpoConfig) -> Iterator[tuple[str, str]]:
    budget, policy = cfg.train_budget(), cfg.models.policy
    most = budget.rollout_tokens * cfg.runtime_args.sample_per_episode
    yield "tokens", f"{_limits(budget)}, a prompt {policy.max_prompt_tokens_length:,}"
    yield (
        "",
        f"so an episode samples at most {most:,}; rows are packed to "
        f"{cfg.models.policy_trainer.max_token_in_packing:,} a micro-batch",
    )


def _evaluation(cfg: GrpoConfig, rows: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    run, policy = cfg.runtime_args, cfg.models.policy
    when = []
    if run.enable_eval_before_training:
        when.append("before training")
    if run.eval_episode_interval:
        when.append(f"every {_count(run.eval_episode_interval, 'episode')} and at the end")
    if not when:
        yield "evaluation", "never"
        return
    how = f"temperature {policy.eval_temperature:g}" if policy.eval_temperature else "greedy"
    yield (
        "evaluation",
        f"{', '.join(when)}: {_files(run.eval_files, rows)}, "
        f"{_count(policy.eval_num_inference_per_prompt, 'rollout')} a prompt, {how}",
    )
    if cfg.eval_budget() != cfg.train_budget():
        yield "", f"{_limits(cfg.eval_budget())} tokens"


def _safety(cfg: GrpoConfig) -> Iterator[tuple[str, str]]:
    run = cfg.runtime_args
    interval, kept = run.save_episode_interval, run.max_checkpoints
    when = f"every {_count(interval, 'episode')} and at the end" if interval else "at the end"
    yield (
        "checkpoints",
        f"{when}, {'all' if kept is None else f'the newest {kept}'} kept; "
        + ("an unfinished run is continued" if run.enable_resume_training else "a new run starts"),
    )
    yield (
        "failures",
        f"an agent run ends after {run.agent_timeout_s:g} s; the training stops when more than "
        f"{run.max_failed_fraction:.0%} of an episode's rollouts fail",
    )


def _limits(budget: Budget) -> str:
    return (
        f"at most: a call {budget.turn_tokens:,}, a rollout {budget.rollout_tokens:,}, "
        f"a context {budget.context_tokens:,}"
    )


def _files(files: Sequence[str], rows: Mapping[str, int]) -> str:
    return ", ".join(f"{f} ({rows[f]:,} rows)" if f in rows else f for f in files)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
