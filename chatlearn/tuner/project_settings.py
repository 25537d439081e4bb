"""What a project's keys come to in ours, by backbone: numbers only, no file is read or written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Literal

from chatlearn.config import GrpoConfig, load_config
from chatlearn.config.load import shown
from chatlearn.config.schema import keys
from chatlearn.config.yaml_file import parse_yaml
from chatlearn.errors import ConfigError
from chatlearn.tuner.keys_table import OWN_ROOT
from chatlearn.tuner.project import Project

Backbone = Literal["debug", "local", "ray"]

WORKFLOW_MODULE = "chatlearn.tuner.workflow_agent"
_IMPORTS = "runtime_args.import_modules"
_GROUP = "models.policy.num_inference_per_prompt"
_SAMPLES = "runtime_args.sample_per_episode"
_PACKING = "models.policy_trainer.max_token_in_packing"
_KL = "models.policy_trainer.kl_coef"
_THEIR_KL = 0.002
"""Their ``kl_loss_coef`` where ``use_kl_loss`` is all that is said."""
_THEIR_CHECK_REWARD = -1.0
"""Their ``agent_madness_reward`` where it is not given."""
_DEBUG_GROUP = 4
"""Most siblings of a debugged task."""
_DAY_S = 86400.0

_ONE_PROCESS: Mapping[str, Any] = {
    "runtime_args.cluster": "local",
    "runtime_args.rollout_backend": "embedded",
}
BASES: Mapping[Backbone, Mapping[str, Any]] = {
    # A breakpoint stops the clock for as long as it likes.
    "debug": {**_ONE_PROCESS, "runtime_args.agent_timeout_s": _DAY_S},
    "local": _ONE_PROCESS,
    "ray": {
        "runtime_args.cluster": "ray",
        "runtime_args.rollout_backend": "sglang",
        "runtime_args.agent_timeout_s": 1800.0,
        "models.policy_trainer.gradient_checkpointing": True,
        "models.ref_policy.num_gpu": "${models.policy_trainer.num_gpu}",
        "models.rollout_manager.num_cpu": 16,
    },
}
"""Ours where the project says nothing; every other default is that of docs/config.md."""
TASKS_PER_BATCH: Mapping[Backbone, int] = {"debug": 8, "local": 8, "ray": 32}


class Layers:
    """Settings of one project on one backbone, later ones over earlier ones::

        BASES < the project's keys < what debugging needs < chatlearn: < key=value

    Args:
        tasks: rows to train on; None while they are not counted yet.
    """

    def __init__(
        self,
        project: Project,
        backbone: Backbone,
        overrides: Sequence[str] = (),
        *,
        tasks: int | None = None,
    ) -> None:
        self.project, self.backbone, self.tasks = project, backbone, tasks
        self.notes: list[str] = []
        """What a user should know of how keys were read."""
        self._overrides = list(overrides)
        self._base: dict[str, Any] = {
            **BASES[backbone],
            _IMPORTS: [WORKFLOW_MODULE],
        }
        own, given = _flat(project.own), dict(_parsed(overrides))
        self._top = {**own, **given}
        self._theirs = {**project.settings}
        for derived in (_name, _model, _devices, _lengths, _batches, _learning, _checks):
            self._theirs.update(derived(self))
        debugging = dict(_debugging(self)) if backbone == "debug" else {}
        self._theirs.update(debugging)
        self.origin = {
            **self.project.origin,
            _SAMPLES: self.project.origin.get("tasks_per_batch", ""),
            **dict.fromkeys(debugging, "--backbone=debug"),
            **dict.fromkeys(own, OWN_ROOT),
            **dict.fromkeys(given, "the command line"),
        }
        """Where a setting comes from: a key of the project, a section, an option."""

    def value(self, key: str, default: Any = None) -> Any:
        """What ``key`` is after all layers, as far as they are known by now."""
        for layer in (self._top, self._theirs, self._base):
            if key in layer:
                return layer[key]
        return default

    def config(self, **ours: Any) -> GrpoConfig:
        """The configuration, with the data files and such as ``ours`` (``runtime_args`` keys).

        Raises:
            ConfigError: our configuration refuses something; every key is named with theirs.
        """
        given = {f"runtime_args.{key}": value for key, value in ours.items()}
        spelled = [f"{k}={json.dumps(v)}" for k, v in {**self._base, **self._theirs}.items()]
        spelled += [f"{key}={json.dumps(value)}" for key, value in self.project.own.items()]
        imported = self.value(_IMPORTS)
        if isinstance(imported, list) and WORKFLOW_MODULE not in imported:
            given[_IMPORTS] = [*imported, WORKFLOW_MODULE]
        spelled += [*self._overrides, *(f"{k}={json.dumps(v)}" for k, v in given.items())]
        try:
            return load_config(None, spelled)
        except ConfigError as error:
            raise ConfigError(self._in_their_words(str(error))) from error

    def _in_their_words(self, message: str) -> str:
        """``message``, and which key of the project each key of ours in it is."""
        theirs = {ours: name for ours, name in self.origin.items() if "." in ours and name}
        lines = [f"    {o} is {name}" for o, name in theirs.items() if o in message]
        behind = "\n  where\n" + "\n".join(lines) if lines else ""
        return message.replace("the configuration:", f"{self.project.path}:", 1) + behind


def _name(layers: Layers) -> Iterator[tuple[str, Any]]:
    project = layers.project
    key, experiment = "runtime_args.exp_name", project.words.experiment
    if experiment != "read_yaml_name":
        yield key, experiment
    elif key not in project.settings:
        yield key, project.path.stem


def _model(layers: Layers) -> Iterator[tuple[str, Any]]:
    """A model folder beside the YAML is meant before one of the same name elsewhere."""
    key = "models.policy_trainer.load"
    path = layers.project.settings.get(key)
    if isinstance(path, str) and path and (layers.project.folder / path).is_dir():
        yield key, str((layers.project.folder / path).resolve())


def _devices(layers: Layers) -> Iterator[tuple[str, Any]]:
    words, policy = layers.project.words, "models.policy"
    if layers.backbone != "ray":
        gpus = int(layers.backbone == "local" and _has_gpu())
        yield f"{policy}.num_gpu", gpus
        yield "models.policy_trainer.num_gpu", gpus
        yield "models.ref_policy.num_gpu", gpus
        if gpus:
            layers.notes.append("this machine has a GPU: it trains there (models.*.num_gpu=0: CPU)")
        return
    total = words.nodes * words.gpus
    yield f"{policy}.tensor_model_parallel_size", words.parallel
    if words.engines is None:
        yield "runtime_args.colocation", ["policy", "policy_trainer", "ref_policy"]
        yield f"{policy}.num_gpu", total
        yield "models.policy_trainer.num_gpu", total
        return
    sampling = words.engines * words.parallel
    left = total - sampling
    if left < 1 and "models.policy_trainer.num_gpu" not in layers._top:
        engines = layers.project.origin["engines"]
        raise ConfigError(
            f"{layers.project.path}: {engines} = {words.engines} engines of {words.parallel} GPUs "
            f"leave none of {total} for the trainer; raise {layers.project.root}.trainer_common."
            "n_gpus_per_node or nnodes, or leave the engines out to share all GPUs"
        )
    yield f"{policy}.num_gpu", sampling
    yield "models.policy_trainer.num_gpu", left


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _lengths(layers: Layers) -> Iterator[tuple[str, Any]]:
    """A limit that the project leaves out follows the ones it gives."""
    policy = "models.policy"
    turn = layers.value(f"{policy}.max_tokens_per_turn")
    response = layers.value(f"{policy}.max_response_tokens_length")
    if isinstance(turn, int) and response is None:
        response = max(turn, 2048)
        yield f"{policy}.max_response_tokens_length", response
    prompt = layers.value(f"{policy}.max_prompt_tokens_length", 1024)
    context = layers.value(f"{policy}.max_seq_len", None)
    lengths = [n for n in (context, prompt, response) if isinstance(n, int)]
    if layers.value(_PACKING) is None and lengths:
        longest = context if isinstance(context, int) else sum(lengths) + 2048
        yield _PACKING, max(8192, longest)


def _batches(layers: Layers) -> Iterator[tuple[str, Any]]:
    words = layers.project.words
    group = layers.value(_GROUP, 8)
    if not isinstance(group, int):
        return
    tasks = words.tasks_per_batch or TASKS_PER_BATCH[layers.backbone]
    yield _SAMPLES, tasks * group
    if words.steps > 1:
        if (tasks * group) % words.steps:
            raise ConfigError(
                f"{layers.project.origin['steps']} = {words.steps} does not divide the {tasks} × "
                f"{group} rollouts of a batch; change one of them"
            )
        yield "runtime_args.train_global_batch_size", tasks * group // words.steps
    if words.eval_repeat and "models.policy.eval_num_inference_per_prompt" not in layers._theirs:
        yield "models.policy.eval_num_inference_per_prompt", words.eval_repeat
    if words.epochs and layers.tasks and "runtime_args.num_episode" not in layers._theirs:
        yield "runtime_args.num_episode", max(1, ceil(words.epochs * layers.tasks / tasks))
        episodes = layers.value("runtime_args.num_episode")
        saves = layers.value("runtime_args.save_episode_interval")
        if saves == 0 and layers.backbone != "debug" and episodes > 100:
            layers.notes.append(
                f"only the last of {episodes:,} episodes is saved: a run that is stopped before "
                f"loses everything; set {layers.project.root}.trainer_common.save_freq to 20, say"
            )


def _learning(layers: Layers) -> Iterator[tuple[str, Any]]:
    words, trainer = layers.project.words, "models.policy_trainer"
    coefficient = 0.0
    if words.uses_kl is not False:
        coefficient = (
            words.kl_coef if words.kl_coef is not None else _THEIR_KL * bool(words.uses_kl)
        )
    if words.uses_kl is not None or words.kl_coef is not None:
        yield _KL, coefficient
    if words.kl_estimator and layers.value(_KL, coefficient):
        yield f"{trainer}.kl_estimator", words.kl_estimator
    if words.lora_rank:
        yield f"{trainer}.lora_rank", words.lora_rank
        if words.lora_alpha is not None:
            yield f"{trainer}.lora_alpha", words.lora_alpha
        if words.lora_target_modules is not None:
            yield f"{trainer}.lora_target_modules", words.lora_target_modules


def _checks(layers: Layers) -> Iterator[tuple[str, Any]]:
    words, root = layers.project.words, layers.project.root
    if not words.checks:
        if words.check_reward is not None or words.check_ends:
            layers.notes.append(
                f"{root}.rollout.agent_madness_* does nothing: compute_madness_checklist names no "
                "check"
            )
        return
    reward = _THEIR_CHECK_REWARD if words.check_reward is None else words.check_reward
    act = {"action": "stop" if words.check_ends else "reward", "reward": reward}
    yield "runtime_args.checks", [{"name": name, **act} for name in words.checks]


def _debugging(layers: Layers) -> Iterator[tuple[str, Any]]:
    """A few tasks, one run at a time, nothing evaluated."""
    words = layers.project.words
    group = layers.value(_GROUP, 8)
    if isinstance(group, int) and group > _DEBUG_GROUP and _GROUP not in layers._top:
        layers.notes.append(f"debugging runs {_DEBUG_GROUP} siblings of a task, not {group}")
        group = _DEBUG_GROUP
        yield _GROUP, group
    if isinstance(group, int):
        yield _SAMPLES, group * (layers.tasks or words.debug_tasks)
    yield "runtime_args.train_global_batch_size", None
    yield "runtime_args.num_episode", 1
    yield "runtime_args.eval_episode_interval", 0
    yield "runtime_args.enable_eval_before_training", False
    yield "runtime_args.max_concurrent_rollouts", words.debug_parallel


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of the section ``chatlearn:``, to look single ones up."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return found


def _parsed(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals:
            yield key.strip(), parse_yaml(value, override)


def differences(cfg: GrpoConfig, origin: Mapping[str, str]) -> list[str]:
    """The settings that are not the defaults, and where each comes from."""
    lines = []
    for key, info in keys().items():
        value: Any = cfg
        for part in key.split("."):
            value = getattr(value, part)
        if info.is_required() or value != info.get_default():
            given = _plain(value)
            where = origin.get(key)
            lines.append(f"{key} = {shown(given)}" + (f"   <- {where}" if where else ""))
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
