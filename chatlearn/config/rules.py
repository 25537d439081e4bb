"""Keys that must agree with each other. Every rule names the keys, their values and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from chatlearn.config.lora_rules import lora_conflicts

if TYPE_CHECKING:
    from chatlearn.config.schema import GrpoConfig

_SAMPLES = "runtime_args.sample_per_episode"
_STEP = "runtime_args.train_global_batch_size"
_GROUP = "models.policy.num_inference_per_prompt"
_PROMPT = "models.policy.max_prompt_tokens_length"
_PACKING = "models.policy_trainer.max_token_in_packing"


class Conflict(NamedTuple):
    """One disagreement."""

    keys: tuple[str, ...]
    """Every key that takes part, so that a key already refused need not be blamed twice."""
    message: str


def conflicts(cfg: GrpoConfig) -> list[Conflict]:
    """Everything in ``cfg`` that cannot be true at once, whatever each key says alone."""
    rules = (_devices, _batches, _lengths, _models, _colocation, _companions, _losses, _weights)
    found = [conflict for rule in rules for conflict in rule(cfg)]
    return found + [Conflict(*refused) for refused in lora_conflicts(cfg)]


def _devices(cfg: GrpoConfig) -> Iterator[Conflict]:
    """Which cluster can drive which engine, on how many devices."""
    run, models = cfg.runtime_args, cfg.models
    if run.cluster == "ray" and run.rollout_backend == "embedded":
        yield Conflict(
            ("runtime_args.cluster", "runtime_args.rollout_backend"),
            "runtime_args.cluster = ray with runtime_args.rollout_backend = embedded: that engine "
            "lives in the process of the one trainer; set runtime_args.rollout_backend=sglang, or "
            "runtime_args.cluster=local",
        )
    if run.cluster == "local":
        roles = {"policy_trainer": models.policy_trainer, "ref_policy": models.ref_policy}
        if run.rollout_backend == "embedded":
            roles = {"policy": models.policy} | roles
        for name, model in roles.items():
            key = f"models.{name}.num_gpu"
            if model.num_gpu > 1:
                yield Conflict(
                    (key, "runtime_args.cluster"),
                    f"{key} = {model.num_gpu} with runtime_args.cluster = local: one process "
                    f"drives one device; set {key} to 1, to 0 for the CPU, or "
                    "runtime_args.cluster=ray",
                )
    trains, samples = models.policy_trainer.num_gpu, models.policy.num_gpu
    if run.rollout_backend == "sglang" and bool(trains) != bool(samples):
        keys = ("models.policy.num_gpu", "models.policy_trainer.num_gpu")
        yield Conflict(
            keys,
            f"{keys[0]} = {samples} and {keys[1]} = {trains}: engines and trainer are all on GPUs "
            "or all on CPUs; set both above 0, or both to 0",
        )
    if models.policy.publish == "tensor" and samples and not run.colocation:
        keys = ("models.policy.publish", "runtime_args.colocation")
        yield Conflict(
            keys,
            f"{keys[0]} = tensor without {keys[1]}: engines on GPUs of their own cannot open the "
            f"trainer's memory; set {keys[0]} to auto, collective or disk",
        )
    yield from _split_engines(cfg)
    yield from _cpu_processes(cfg)


def _split_engines(cfg: GrpoConfig) -> Iterator[Conflict]:
    policy = cfg.models.policy
    key, split = "models.policy.tensor_model_parallel_size", policy.tensor_model_parallel_size
    if cfg.runtime_args.rollout_backend == "embedded":
        if split != 1:
            yield Conflict(
                (key, "runtime_args.rollout_backend"),
                f"{key} = {split} with runtime_args.rollout_backend = embedded: that engine is on "
                f"one device; set {key}=1",
            )
    elif policy.num_gpu % split:
        yield Conflict(
            (key, "models.policy.num_gpu"),
            f"models.policy.num_gpu = {policy.num_gpu} is not a multiple of {key} = {split}: an "
            f"engine takes {split} GPUs; change one of them",
        )


def _cpu_processes(cfg: GrpoConfig) -> Iterator[Conflict]:
    """CPUs are dealt out in whole processes."""
    models = cfg.models
    roles = {"rollout_manager": models.rollout_manager}
    roles |= {"policy": models.policy} if models.policy.num_gpu == 0 else {}
    roles |= {"policy_trainer": models.policy_trainer} if models.policy_trainer.num_gpu == 0 else {}
    for name, model in roles.items():
        total, each = f"models.{name}.num_cpu", f"models.{name}.cpu_per_process"
        if model.num_cpu % model.cpu_per_process:
            yield Conflict(
                (total, each),
                f"{total} = {model.num_cpu} is not a multiple of {each} = {model.cpu_per_process}; "
                "change one of them",
            )


def _batches(cfg: GrpoConfig) -> Iterator[Conflict]:
    run = cfg.runtime_args
    divisors = {_GROUP: cfg.models.policy.num_inference_per_prompt}
    if run.train_global_batch_size is not None:
        divisors[_STEP] = run.train_global_batch_size
    for key, divisor in divisors.items():
        if run.sample_per_episode % divisor:
            below = run.sample_per_episode // divisor * divisor
            choices = f"{below} or {below + divisor}" if below else f"{divisor}"
            yield Conflict(
                (_SAMPLES, key),
                f"{_SAMPLES} = {run.sample_per_episode} is not a multiple of {key} = {divisor}; "
                f"set {_SAMPLES} to {choices}",
            )


def _lengths(cfg: GrpoConfig) -> Iterator[Conflict]:
    policy = cfg.models.policy
    packing = cfg.models.policy_trainer.max_token_in_packing
    context, keys, where = policy.train_context, ["models.policy.max_seq_len"], ""
    if policy.max_seq_len is None:
        keys += [_PROMPT, "models.policy.max_response_tokens_length"]
        where = " (prompt + response lengths)"
    if context > packing:
        yield Conflict(
            (*keys, _PACKING),
            f"models.policy.max_seq_len = {context}{where} is more than {_PACKING} = {packing}: "
            f"such a row fits no micro-batch; set {_PACKING} to at least {context}, or a smaller "
            "models.policy.max_seq_len",
        )
    for prefix, limit in (("", policy.max_seq_len), ("eval_", policy.eval_max_seq_len)):
        if limit is not None and limit <= policy.max_prompt_tokens_length:
            key = f"models.policy.{prefix}max_seq_len"
            yield Conflict(
                (key, _PROMPT),
                f"{key} = {limit} leaves no room after {_PROMPT} = "
                f"{policy.max_prompt_tokens_length}; raise the first or lower the second",
            )
    for prefix, turn, rollout in (
        ("", policy.max_tokens_per_turn, policy.max_response_tokens_length),
        ("eval_", policy.eval_max_tokens_per_turn, policy.eval_response),
    ):
        if turn is not None and turn > rollout:
            one, whole = (
                f"models.policy.{prefix}{name}"
                for name in ("max_tokens_per_turn", "max_response_tokens_length")
            )
            yield Conflict(
                (one, whole, "models.policy.max_response_tokens_length"),
                f"{one} = {turn} is more than {whole} = {rollout}: a call cannot sample more than "
                "its rollout; lower the first or raise the second",
            )


def _models(cfg: GrpoConfig) -> Iterator[Conflict]:
    policy, trainer, ref = cfg.models.policy, cfg.models.policy_trainer, cfg.models.ref_policy
    if ref.num_gpu != trainer.num_gpu and (trainer.kl_coef or ref.num_gpu):
        keys = ("models.ref_policy.num_gpu", "models.policy_trainer.num_gpu")
        yield Conflict(
            (*keys, "models.policy_trainer.kl_coef"),
            f"{keys[0]} = {ref.num_gpu} is not {keys[1]} = {trainer.num_gpu}: the reference is on "
            "the trainer's devices; set both to the same number",
        )
    if cfg.runtime_args.rollout_backend == "embedded" and policy.num_gpu != trainer.num_gpu:
        keys = ("models.policy.num_gpu", "models.policy_trainer.num_gpu")
        yield Conflict(
            keys,
            f"{keys[0]} = {policy.num_gpu} is not {keys[1]} = {trainer.num_gpu}: the embedded "
            "engine shares the trainer's weights; set both to the same number",
        )
    if policy.load is not None and policy.load != trainer.load:
        keys = ("models.policy.load", "models.policy_trainer.load")
        yield Conflict(
            keys,
            f"{keys[0]} = {policy.load} is not {keys[1]} = {trainer.load}: the engine samples from "
            f"the trainer's weights; leave {keys[0]} out",
        )


def _colocation(cfg: GrpoConfig) -> Iterator[Conflict]:
    run, policy, trainer = cfg.runtime_args, cfg.models.policy, cfg.models.policy_trainer
    if not run.colocation:
        return
    key, shown = "runtime_args.colocation", f"[{', '.join(run.colocation)}]"
    if not {"policy", "policy_trainer"} <= set(run.colocation):
        yield Conflict(
            (key,),
            f"{key} = {shown}: engine and trainer share devices or do not; set it to [policy, "
            "policy_trainer, ref_policy], or leave it out",
        )
    if policy.num_gpu != trainer.num_gpu:
        keys = ("models.policy.num_gpu", "models.policy_trainer.num_gpu")
        yield Conflict(
            (*keys, key),
            f"{keys[0]} = {policy.num_gpu} is not {keys[1]} = {trainer.num_gpu} with {key} = "
            f"{shown}: they are the same GPUs; set both to the same number, or leave {key} out",
        )
    if run.max_staleness:
        yield Conflict(
            (key, "runtime_args.max_staleness"),
            f"runtime_args.max_staleness = {run.max_staleness} with {key} = {shown}: engines sleep "
            "while the trainer works, so nothing is sampled meanwhile; set max_staleness=0, or "
            f"leave {key} out",
        )
    if policy.publish == "collective" and policy.num_gpu:
        yield Conflict(
            (key, "models.policy.publish"),
            f"models.policy.publish = collective with {key} = {shown}: NCCL cannot have two ranks "
            "on one GPU; set models.policy.publish=tensor",
        )


def _companions(cfg: GrpoConfig) -> Iterator[Conflict]:
    """A key that needs another one to act."""
    run, optimizer = cfg.runtime_args, cfg.models.policy_trainer.optimizer
    evaluates = {
        "runtime_args.eval_episode_interval": run.eval_episode_interval,
        "runtime_args.enable_eval_before_training": run.enable_eval_before_training,
    }
    for key, value in evaluates.items():
        if value and not run.eval_files:
            yield Conflict(
                (key, "runtime_args.eval_data_path"),
                f"{key} = {str(value).lower()} but runtime_args.eval_data_path = "
                f'"{run.eval_data_path}" names no file; set the path, or {key}='
                f"{'false' if value is True else 0}",
            )
    log, section = run.log_args_dict, "runtime_args.log_args_dict"
    if log.enable_wandb and not log.wandb_project:
        yield Conflict(
            (f"{section}.enable_wandb", f"{section}.wandb_project"),
            f"{section}.enable_wandb = true but {section}.wandb_project = null; name the project",
        )
    if optimizer.min_lr > 0:
        section = "models.policy_trainer.optimizer"
        if optimizer.lr_schedule == "constant":
            yield Conflict(
                (f"{section}.min_lr", f"{section}.lr_schedule"),
                f"{section}.min_lr = {optimizer.min_lr} does nothing with {section}.lr_schedule = "
                "constant; set the schedule to linear or cosine, or min_lr=0",
            )
        if optimizer.min_lr > optimizer.lr:
            yield Conflict(
                (f"{section}.min_lr", f"{section}.lr"),
                f"{section}.min_lr = {optimizer.min_lr} is more than {section}.lr = "
                f"{optimizer.lr}; the rate falls from lr to min_lr, so lower the first",
            )


def _losses(cfg: GrpoConfig) -> Iterator[Conflict]:
    """Keys of the advantage and the loss that would do nothing."""
    trainer, section = cfg.models.policy_trainer, "models.policy_trainer"
    if trainer.advantage == "gigpo" and not trainer.turn_discount:
        yield Conflict(
            (f"{section}.advantage", f"{section}.turn_discount"),
            f"{section}.advantage = gigpo with {section}.turn_discount = 0: no turn but the last "
            "would be credited with the run's reward; set turn_discount=0.95",
        )
    limit = cfg.models.policy.max_response_tokens_length
    if trainer.overlong_buffer > limit:
        keys = (f"{section}.overlong_buffer", "models.policy.max_response_tokens_length")
        yield Conflict(
            keys,
            f"{keys[0]} = {trainer.overlong_buffer} is more than {keys[1]} = {limit}: every "
            "rollout would be punished; lower the first",
        )
    if trainer.dual_clip_ratio is not None and trainer.loss != "clip":
        yield Conflict(
            (f"{section}.dual_clip_ratio", f"{section}.loss"),
            f"{section}.dual_clip_ratio = {trainer.dual_clip_ratio} with {section}.loss = "
            f"{trainer.loss}: only the clipped surrogate has that bound; set loss=clip, or leave "
            "dual_clip_ratio out",
        )
    if trainer.loss == "gmpo" and trainer.aggregation != "seq-mean-token-mean":
        yield Conflict(
            (f"{section}.loss", f"{section}.aggregation"),
            f"{section}.loss = gmpo with {section}.aggregation = {trainer.aggregation}: the "
            "geometric mean is of a rollout, and each counts once; set "
            "aggregation=seq-mean-token-mean",
        )
    if trainer.kl_estimator != "k3" and not trainer.kl_coef:
        yield Conflict(
            (f"{section}.kl_estimator", f"{section}.kl_coef"),
            f"{section}.kl_estimator = {trainer.kl_estimator} does nothing with {section}.kl_coef "
            "= 0; set a kl_coef, or leave kl_estimator out",
        )


_TRUNCATED = ("token-tis", "sequence-tis")
_CONTAIN_THE_RATIO = (*_TRUNCATED, "icepop")


def _weights(cfg: GrpoConfig) -> Iterator[Conflict]:
    """The correction, and what its ratio is against."""
    trainer, section = cfg.models.policy_trainer, "models.policy_trainer"
    key, kind = f"{section}.correction", trainer.correction
    limits = {"correction_low": trainer.correction_low, "correction_high": trainer.correction_high}
    for name, limit in limits.items():
        if limit is not None and kind == "none":
            yield Conflict(
                (f"{section}.{name}", key),
                f"{section}.{name} = {limit} does nothing with {key} = none; set a correction, or "
                f"leave {name} out",
            )
    if kind in _TRUNCATED and trainer.correction_low is not None:
        yield Conflict(
            (f"{section}.correction_low", key),
            f"{section}.correction_low = {trainer.correction_low} with {key} = {kind}: truncation "
            "has an upper limit only; leave correction_low out, or set correction=icepop",
        )
    low, high = limits.values()
    if low is not None and high is not None and low > high:
        yield Conflict(
            (f"{section}.correction_low", f"{section}.correction_high"),
            f"{section}.correction_low = {low} is more than {section}.correction_high = {high}: "
            "no token would be kept; swap them",
        )
    if kind in _CONTAIN_THE_RATIO and trainer.loss != "reinforce" and not trainer.decoupled:
        yield Conflict(
            (key, f"{section}.loss", f"{section}.decoupled"),
            f"{key} = {kind} with {section}.loss = {trainer.loss}: both contain the ratio to the "
            "engine's probabilities, which would count twice; set decoupled=true, loss=reinforce, "
            "or correction=token-mask",
        )
    if trainer.decoupled and trainer.loss == "reinforce":
        yield Conflict(
            (f"{section}.decoupled", f"{section}.loss"),
            f"{section}.decoupled = true with {section}.loss = reinforce: that loss has no ratio "
            "to take against other numbers; leave decoupled out",
        )
    elif trainer.decoupled and cfg.runtime_args.steps_per_episode == 1:
        yield Conflict(
            (f"{section}.decoupled", _STEP, "runtime_args.num_training_epoch"),
            f"{section}.decoupled = true with one optimizer step an episode: the ratio would "
            f"always be 1; set {section}.loss=reinforce, which has the same gradient without "
            f"the extra forward pass, or a smaller {_STEP}",
        )
