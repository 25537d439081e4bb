"""The arguments of ``tune()`` and the keys they set: one table.

A field that is None was not given and sets nothing. Names are those of AgentScope's tuner; a field
that has no meaning here is refused with what to do instead.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chatlearn.errors import ConfigError

_LOAD = "models.policy_trainer.load"
_GROUP = "models.policy.num_inference_per_prompt"
_SAMPLES = "runtime_args.sample_per_episode"
_CONTEXT = "models.policy.max_seq_len"
_RESPONSE = "models.policy.max_response_tokens_length"
_PROMPT = "models.policy.max_prompt_tokens_length"
_TURN = "models.policy.max_tokens_per_turn"
_PACKING = "models.policy_trainer.max_token_in_packing"
_EPISODES = "runtime_args.num_episode"


@dataclass(frozen=True, slots=True)
class TunerModelConfig:
    """The model that is trained."""

    model_path: str | None = None
    """Model folder or hub id. None only where ``config_path`` names it."""
    max_model_len: int | None = None
    """Tokens in any one context: prompt, answers and tool results."""
    temperature: float | None = None
    """Sampling temperature in training."""
    top_p: float | None = None
    """Nucleus sampling in training."""
    max_tokens: int | None = None
    """Tokens sampled by one call. None = all that the run has left."""
    enable_thinking: bool | None = None
    """Passed to the chat template."""
    tensor_parallel_size: int | None = None
    """GPUs of one engine."""
    inference_engine_num: int | None = None
    """Engines, each of ``tensor_parallel_size`` GPUs."""
    tool_call_parser: str | None = None
    """How the model writes tool calls: a name of docs/parsers.md. None = by its chat template."""
    reasoning_parser: str | None = None
    """Refused: ``tool_call_parser`` reads reasoning too."""
    tinker_config: Any = None
    """Refused: training runs on this machine or cluster."""


@dataclass(frozen=True, slots=True)
class AlgorithmConfig:
    """How the model is trained."""

    algorithm_type: str | None = None
    """A name of ``ALGORITHMS``."""
    learning_rate: float | None = None
    """Learning rate of AdamW."""
    group_size: int | None = None
    """Runs of one task, whose rewards are compared."""
    batch_size: int | None = None
    """Tasks of one step; a step has ``batch_size`` × ``group_size`` runs."""
    save_interval_steps: int | None = None
    """Steps between checkpoints; the last step is saved too."""
    eval_interval_steps: int | None = None
    """Steps between evaluations on ``eval_dataset``; after the last step too."""


_OF_MODEL = {
    "model_path": _LOAD,
    "max_model_len": _CONTEXT,
    "temperature": "models.policy.temperature",
    "top_p": "models.policy.top_p",
    "max_tokens": _TURN,
    "enable_thinking": "models.policy.enable_thinking",
    "tensor_parallel_size": "models.policy.tensor_model_parallel_size",
    "tool_call_parser": "models.policy.tool_parser",
}
_OF_ALGORITHM = {
    "learning_rate": "models.policy_trainer.optimizer.lr",
    "group_size": _GROUP,
    "save_interval_steps": "runtime_args.save_episode_interval",
    "eval_interval_steps": "runtime_args.eval_episode_interval",
}

ARGUMENTS: dict[str, str] = {
    **{f"model.{name}": key for name, key in _OF_MODEL.items()},
    "model.inference_engine_num": "models.policy.num_gpu",
    **{f"algorithm.{name}": key for name, key in _OF_ALGORITHM.items()},
    "algorithm.algorithm_type": "models.policy_trainer.advantage",
    "algorithm.batch_size": _SAMPLES,
    "train_dataset": "runtime_args.data_path",
    "train_dataset.total_epochs": _EPISODES,
    "train_dataset.total_steps": _EPISODES,
    "eval_dataset": "runtime_args.eval_data_path",
    "auxiliary_models": "runtime_args.auxiliary_models",
    "experiment_name": "runtime_args.exp_name",
    "project_name": "runtime_args.output_dir",
    "monitor_type": "runtime_args.log_args_dict.enable_tensorboard",
}
"""Argument to the key that it sets; ``algorithm_type`` and ``monitor_type`` set others too."""

_CLIP = {"models.policy_trainer.advantage": "grpo", "models.policy_trainer.loss": "clip"}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "multi_step_grpo": _CLIP,
    "grpo": _CLIP,
    **{
        name: {"models.policy_trainer.advantage": name}
        for name in ("dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline")
    },
    "gigpo": {
        "models.policy_trainer.advantage": "gigpo",
        "models.policy_trainer.turn_discount": 0.95,
    },
    **{name: {"models.policy_trainer.loss": name} for name in ("gspo", "cispo", "sapo")},
    "gmpo": {
        "models.policy_trainer.loss": "gmpo",
        "models.policy_trainer.aggregation": "seq-mean-token-mean",
    },
}
"""``algorithm_type`` to keys; ``config_path`` and ``overrides`` reach every other combination."""

DEFAULTS: dict[str, Any] = {
    "runtime_args.cluster": "local",
    "runtime_args.rollout_backend": "embedded",
    "runtime_args.save_episode_interval": 100,
    _SAMPLES: 256,
    _GROUP: 8,
    _RESPONSE: 2048,
    _PROMPT: 1024,
}
"""What holds without ``config_path``, over the defaults of docs/config.md: one process on this
machine, and AgentScope's batch of 32 tasks × 8 runs."""

_MONITORS: dict[str, dict[str, bool]] = {
    "tensorboard": {"enable_tensorboard": True, "enable_wandb": False},
    "wandb": {"enable_tensorboard": False, "enable_wandb": True},
}


def of_model(model: TunerModelConfig | None, below: Mapping[str, Any]) -> dict[str, Any]:
    """Keys set by ``model``.

    Args:
        below: what holds without it, by key: the file at ``config_path``, or ``DEFAULTS``.

    Raises:
        ConfigError: a field has no meaning here.
    """
    if model is None:
        return {}
    if model.reasoning_parser is not None:
        raise ConfigError(
            f"TunerModelConfig.reasoning_parser = {model.reasoning_parser!r}: tool_call_parser "
            "reads a model's reasoning too; leave it out"
        )
    if model.tinker_config is not None:
        raise ConfigError(
            "TunerModelConfig.tinker_config: training runs on this machine or its cluster, not in "
            "a service; leave it out"
        )
    keys = _given(model, _OF_MODEL)
    if model.inference_engine_num is not None:
        keys |= _engines(model, below)
    if _CONTEXT in keys and _CONTEXT not in below:
        keys |= _lengths(keys[_CONTEXT], keys.get(_TURN) or 0, below)
    return keys


def of_algorithm(algorithm: AlgorithmConfig | None, below: Mapping[str, Any]) -> dict[str, Any]:
    """Keys set by ``algorithm``. ``below`` as in ``of_model``.

    Raises:
        ConfigError: an unknown ``algorithm_type``; the nearest known one is named.
    """
    if algorithm is None:
        return {}
    keys = _given(algorithm, _OF_ALGORITHM)
    name = algorithm.algorithm_type
    if name is not None:
        if name not in ALGORITHMS:
            near = difflib.get_close_matches(str(name), ALGORITHMS, 1)
            raise ConfigError(
                f"AlgorithmConfig.algorithm_type = {name!r}: "
                + (f"did you mean {near[0]!r}? " if near else "")
                + f"known are {', '.join(ALGORITHMS)}; docs/algorithms.md has every combination, "
                "for config_path or overrides"
            )
        keys |= ALGORITHMS[name]
    if algorithm.batch_size is not None or algorithm.group_size is not None:
        group_below = below.get(_GROUP, DEFAULTS[_GROUP])
        tasks = algorithm.batch_size or below.get(_SAMPLES, DEFAULTS[_SAMPLES]) // group_below
        keys[_SAMPLES] = tasks * (algorithm.group_size or group_below)
    return keys


def of_monitor(
    monitor_type: str | None, project_name: str | None, experiment_name: str | None
) -> dict[str, Any]:
    """Keys set by ``monitor_type``, ``project_name`` and ``experiment_name``."""
    section, keys = "runtime_args.log_args_dict", {}
    if experiment_name is not None:
        keys["runtime_args.exp_name"] = experiment_name
    if project_name is not None:
        keys["runtime_args.output_dir"] = f"outputs/{project_name}"
    if monitor_type is not None:
        if monitor_type not in _MONITORS:
            raise ConfigError(
                f"monitor_type = {monitor_type!r}: there are {' and '.join(_MONITORS)}; for any "
                "other, the numbers are in metrics.jsonl of the run folder too"
            )
        keys |= {f"{section}.{name}": value for name, value in _MONITORS[monitor_type].items()}
        if monitor_type == "wandb":
            keys[f"{section}.wandb_project"] = project_name or "chatlearn"
    return keys


def episodes(
    rows: int, *, epochs: int, steps: int | None, keys: Mapping[str, Any], below: Mapping[str, Any]
) -> dict[str, Any]:
    """The length of the run: ``steps``, or ``epochs`` over ``rows``.

    A length in the file at ``config_path`` stands against one epoch, which is what a dataset has
    that says nothing.
    """
    if steps is not None:
        return {_EPISODES: steps}
    if epochs == 1 and _EPISODES in below:
        return {}
    both = {**DEFAULTS, **below, **keys}
    tasks = max(1, both[_SAMPLES] // both[_GROUP])
    return {_EPISODES: max(1, math.ceil(rows * epochs / tasks))}


def _given(config: Any, table: Mapping[str, str]) -> dict[str, Any]:
    values = {key: getattr(config, name) for name, key in table.items()}
    return {key: value for key, value in values.items() if value is not None}


def _lengths(context: int, turn: int, below: Mapping[str, Any]) -> dict[str, Any]:
    """Other lengths that follow from the longest context, where the file says nothing."""
    derived = {
        _PROMPT: max(1, context - 1),
        _RESPONSE: max(context, turn),
        _PACKING: max(8192, context),
    }
    free = [key for key in derived if below.get(key) in (None, DEFAULTS.get(key))]
    return {key: derived[key] for key in free}


def _engines(model: TunerModelConfig, below: Mapping[str, Any]) -> dict[str, Any]:
    count = model.inference_engine_num
    if below.get("runtime_args.rollout_backend", "embedded") == "embedded":
        if count == 1:
            return {}
        raise ConfigError(
            f"TunerModelConfig.inference_engine_num = {count} with "
            "runtime_args.rollout_backend=embedded: that engine is one; leave it out, or give "
            "config_path=template/grpo_fsdp.yaml"
        )
    assert count is not None
    if below.get("models.policy.num_gpu"):
        return {"models.policy.num_gpu": count * (model.tensor_parallel_size or 1)}
    return {"models.policy.num_cpu": count * below.get("models.policy.cpu_per_process", 1)}
