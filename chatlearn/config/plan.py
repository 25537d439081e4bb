"""What a run would do, in words and numbers, before anything is loaded: ``--dry-run``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil

from chatlearn.config.memory import estimate_memory
from chatlearn.config.schema import GrpoConfig
from chatlearn.types import Budget

Line = tuple[str, str]
"""A word and what is said of it; an empty word goes on with the one before."""


def plan(
    cfg: GrpoConfig, rows: Mapping[str, int | None] | None = None, *, machines: int = 1
) -> str:
    """About twenty lines, one idea each.

    Args:
        cfg: the resolved configuration.
        rows: rows of each file of ``data_path`` and ``eval_data_path``. None instead of a number:
            there is no such file on this machine. A file that is left out: nobody counted.
        machines: how many the run is started on (WORLD_SIZE); matters only with ``cluster=ray``.
    """
    rows = rows or {}
    lines = (
        *_run(cfg),
        *_placement(cfg, machines),
        *_data(cfg, rows),
        *_episode(cfg),
        *_tokens(cfg),
        *_evaluation(cfg, rows),
        *_safety(cfg),
        ("memory", estimate_memory(cfg, machines=machines)),
    )
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


def _run(cfg: GrpoConfig) -> Iterator[Line]:
    run, trainer = cfg.runtime_args, cfg.models.policy_trainer
    yield "run", f"{run.exp_name}: {run.num_episode:,} episodes, into {run.output_dir}"
    reference = "no reference"
    if trainer.kl_coef:
        where = cfg.reference_path
        if cfg.reference_is_base:
            where = "is the model without its adapters, no second one in memory"
        reference = f"reference {where} (kl_coef {trainer.kl_coef:g})"
    yield "model", f"{trainer.load}; {reference}"
    if trainer.lora_rank:
        targets = trainer.lora_target_modules
        layers = targets if isinstance(targets, str) else ", ".join(targets)
        yield (
            "",
            f"LoRA of rank {trainer.lora_rank}, alpha {trainer.lora_alpha:g}, on {layers}: only "
            "the adapters are trained",
        )
    yield "your code", ", ".join(run.import_modules) or "none imported: only the built-in agents"


def _placement(cfg: GrpoConfig, machines: int) -> Iterator[Line]:
    """Which process is where."""
    run, trainer = cfg.runtime_args, cfg.models.policy_trainer
    if run.cluster == "ray":
        yield "machines", _machines(cfg, machines)
        yield "engines", _engines(cfg)
        yield "trainer", _ranks(cfg)
        yield from _sharing(cfg)
        yield "publish", _publish(cfg)
        yield (
            "agents",
            f"{_count(cfg.models.rollout_manager.num_worker, 'worker process', 'es')}, "
            f"at most {run.max_concurrent_rollouts:,} agents at once",
        )
        return
    device = "one CUDA GPU" if trainer.num_gpu else "the CPU"
    where = f"{device} in {_precision(cfg)}, one process"
    if run.rollout_backend == "embedded":
        yield "device", f"{where}: trainer and embedded engine share the weights"
        return
    yield "device", f"{where}: the trainer, and the agents"
    yield "engines", _engines(cfg)
    yield from _sharing(cfg)
    yield "publish", _publish(cfg)


def _machines(cfg: GrpoConfig, machines: int) -> str:
    run, gpus = cfg.runtime_args, _gpus(cfg)
    if run.ray_address:
        needed = _count(gpus, "GPU") if gpus else "no GPU"
        return f"those of the Ray cluster at {run.ray_address}, which is left running; {needed}"
    if not gpus:
        devices = "without GPUs"
    elif gpus % machines:
        devices = f"with {_count(gpus, 'GPU')} in all"
    else:
        devices = f"with {_count(gpus // machines, 'GPU')}{' each' if machines > 1 else ''}"
    start = ", started on each" if machines > 1 else ""
    return f"{_count(machines, 'machine')} {devices}: a Ray cluster of this run's own{start}"


def _engines(cfg: GrpoConfig) -> str:
    policy = cfg.models.policy
    split = policy.tensor_model_parallel_size
    if policy.num_gpu:
        whose = "of its memory" if split == 1 else "of the memory of each"
        share = f"{policy.gpu_memory_utilization:.0%} {whose}"
        devices = f"{_count(split, 'GPU')} (TP {split}), {share}"
    else:
        devices = f"{_count(policy.cpu_per_process, 'CPU')} (TP {split})"
    served = f", served by {policy.sglang_python}" if policy.sglang_python else ""
    return (
        f"{_count(policy.num_engine, 'SGLang engine')} × {devices}{served}; "
        f"{_count(policy.max_concurrent_requests, 'call')} at once in each"
    )


def _ranks(cfg: GrpoConfig) -> str:
    trainer = cfg.models.policy_trainer
    masters = " with fp32 masters" if _precision(cfg) == "bf16" else ""
    device = "1 GPU" if trainer.num_gpu else _count(trainer.cpu_per_process, "CPU")
    library = "NCCL" if trainer.num_gpu else "gloo"
    return (
        f"{_count(trainer.num_rank, 'FSDP2 rank')} × {device} ({library}), in "
        f"{_precision(cfg)}{masters}"
    )


def _sharing(cfg: GrpoConfig) -> Iterator[Line]:
    """Apart or colocated, and whose memory moves when."""
    trainer = cfg.models.policy_trainer
    if not _gpus(cfg):
        how = "colocated: they take turns" if cfg.is_colocated else "apart"
        yield "placement", f"{how}; on CPUs no memory moves"
    elif not cfg.is_colocated:
        meanwhile = "one works while the other waits"
        if cfg.runtime_args.max_staleness:
            meanwhile = "both work at the same time"
        yield "placement", f"apart: engines and trainer have GPUs of their own; {meanwhile}"
    else:
        gpus = _count(trainer.num_gpu, "GPU")
        yield "placement", f"colocated: engines and trainer take turns on the same {gpus}"
        yield "", "while the trainer steps, the engines give back weights and caches"
        yield "", _moves(cfg)
    if trainer.kl_coef and cfg.models.ref_policy.free_gpu_memory.offload_weights:
        yield "", "the reference waits on the CPU between steps"


def _moves(cfg: GrpoConfig) -> str:
    free = cfg.models.policy_trainer.free_gpu_memory
    moved = ["parameters"] * free.offload_weights
    moved += ["AdamW's moments"] * free.offload_optimizer_states
    parts = [f"{' and '.join(moved)} move to the CPU"] * bool(moved)
    parts += ["gradients are dropped"] * free.free_grad_buffers
    return f"while the engines sample, {', '.join(parts) or 'the trainer keeps its memory'}"


def _publish(cfg: GrpoConfig) -> str:
    policy, on_gpu = cfg.models.policy, bool(_gpus(cfg))
    ways = {
        "tensor": "CUDA IPC on the same GPUs" if on_gpu else "shared memory",
        "collective": f"broadcast to all engines over {'NCCL' if on_gpu else 'gloo'}",
        "disk": "files that the engines read",
    }
    chosen = " (auto)" if policy.publish == "auto" else ""
    checks = {0: "none", 1: "all"}.get(
        policy.check_weights_interval, f"the first and one in {policy.check_weights_interval}"
    )
    if cfg.models.policy_trainer.lora_publish == "adapter":
        return "the adapters alone, in files that the engines read"
    return (
        f"{cfg.publish_method}{chosen}: {ways[cfg.publish_method]}, in pieces of "
        f"{policy.publish_bucket_mb:,} MiB; {checks} checked"
    )


def _gpus(cfg: GrpoConfig) -> int:
    """GPUs of the whole run."""
    sampling, training = cfg.models.policy.num_gpu, cfg.models.policy_trainer.num_gpu
    shared = cfg.is_colocated or cfg.runtime_args.rollout_backend == "embedded"
    return training if shared else sampling + training


def _precision(cfg: GrpoConfig) -> str:
    return cfg.precision("cuda" if cfg.models.policy_trainer.num_gpu else "cpu")


def _data(cfg: GrpoConfig, rows: Mapping[str, int | None]) -> Iterator[Line]:
    run = cfg.runtime_args
    text = _files(run.data_files, rows) + (", shuffled" if run.data_shuffle else ", in file order")
    counts = [rows.get(file) or 0 for file in run.data_files]
    if all(counts):
        passes = cfg.prompts_per_episode * run.num_episode / sum(counts)
        text += f"; the run goes over them {passes:.2g} times"
    yield "data", text


def _episode(cfg: GrpoConfig) -> Iterator[Line]:
    run, policy, trainer = cfg.runtime_args, cfg.models.policy, cfg.models.policy_trainer
    at_once = ""
    if run.cluster == "local":
        at_once = (
            f"; at most {run.max_concurrent_rollouts:,} run at once, "
            f"{policy.max_concurrent_requests:,} calls are decoded at once"
        )
    yield (
        "episode",
        f"{_count(cfg.prompts_per_episode, 'prompt')} × {policy.num_inference_per_prompt} rollouts "
        f"= {run.sample_per_episode:,} rollouts{at_once}",
    )
    passes = f" × {run.num_training_epoch} passes" if run.num_training_epoch > 1 else ""
    yield (
        "steps",
        f"{_count(run.steps_per_episode, 'optimizer step')} an episode (of "
        f"{run.rollouts_per_step:,} rollouts{passes}), {cfg.total_steps:,} in total; lr "
        f"{trainer.optimizer.lr:g} {trainer.optimizer.lr_schedule}",
    )
    yield "learning", _objective(cfg)
    if run.max_staleness:
        age = _count(run.max_staleness, "episode")
        yield "staleness", f"rollouts may be sampled by weights {age} old"
    else:
        yield "staleness", "0: every rollout is sampled by the weights it trains"


def _objective(cfg: GrpoConfig) -> str:
    trainer = cfg.models.policy_trainer
    parts = [f"advantages by {trainer.advantage}", f"loss {trainer.loss}, {trainer.aggregation}"]
    if trainer.decoupled:
        parts.append("ratios against the trainer's own logprobs (one more forward an episode)")
    if trainer.correction != "none":
        parts.append(f"correction {trainer.correction}")
    return "; ".join(parts)


def _tokens(cfg: GrpoConfig) -> Iterator[Line]:
    run, budget, policy = cfg.runtime_args, cfg.train_budget(), cfg.models.policy
    trainer = cfg.models.policy_trainer
    most = budget.rollout_tokens * run.sample_per_episode
    yield "tokens", f"{_limits(budget)}, a prompt {policy.max_prompt_tokens_length:,}"
    packed = f"rows are packed to {trainer.max_token_in_packing:,} a micro-batch"
    yield "", f"so an episode samples at most {most:,}; {packed}"
    if run.cluster == "ray":
        full = ceil(run.rollouts_per_step / (trainer.max_token_in_packing // budget.context_tokens))
        each = _count(ceil(full / trainer.num_rank), "micro-batch", "es")
        yield "", f"if every context were full, a step would be {each} on each rank"


def _evaluation(cfg: GrpoConfig, rows: Mapping[str, int | None]) -> Iterator[Line]:
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


def _safety(cfg: GrpoConfig) -> Iterator[Line]:
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
    for i, check in enumerate(run.checks):
        acts = {"mask": "a turn is masked", "reward": f"a run earns {check.reward:g}"}
        ends = f"a run ends and earns {check.reward:g}"
        what = f"{check.name}: from severity {check.threshold:g} on {acts.get(check.action, ends)}"
        yield "" if i else "checks", what
    if run.rollout_backend == "sglang":
        times = _count(cfg.models.policy.max_engine_restarts, "time")
        yield "", f"an engine that dies is started again, at most {times}; its calls go elsewhere"


def _limits(budget: Budget) -> str:
    return (
        f"at most: a call {budget.turn_tokens:,}, a rollout {budget.rollout_tokens:,}, "
        f"a context {budget.context_tokens:,}"
    )


def _files(files: Sequence[str], rows: Mapping[str, int | None]) -> str:
    return ", ".join(f"{file}{_counted(rows[file]) if file in rows else ''}" for file in files)


def _counted(rows: int | None) -> str:
    return " (NOT FOUND on this machine)" if rows is None else f" ({rows:,} rows)"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"
