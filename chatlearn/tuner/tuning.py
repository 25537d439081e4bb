"""``tune()``: a function, a judge, a dataset, one call. The configuration, loop and recorder are
those of ``chatlearn grpo``."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatlearn.config import GrpoConfig, load_config
from chatlearn.config.yaml_file import read_yaml
from chatlearn.data.dataset_config import DatasetConfig
from chatlearn.errors import ConfigError
from chatlearn.observability.checkpoints import complete_checkpoints
from chatlearn.observability.jsonl import read_records
from chatlearn.observability.logs import setup_logging
from chatlearn.rewards.judging import load_judge
from chatlearn.tuner.arguments import (
    DEFAULTS,
    AlgorithmConfig,
    TunerModelConfig,
    episodes,
    of_algorithm,
    of_model,
    of_monitor,
)
from chatlearn.tuner.model_kinds import model_kind
from chatlearn.tuner.naming import (
    import_object,
    importing,
    is_in_process,
    known_object,
    load_object,
    name_of,
    refuse_while_importing,
    resolve_spec,
)
from chatlearn.tuner.rows import inputs_folder, write_agent_cfg, write_rows
from chatlearn.tuner.signatures import check_workflow, is_class_form

logger = logging.getLogger(__name__)

AGENT_MODULE = "chatlearn.tuner.workflow_agent"
EVAL_INTERVAL = 100
"""Steps between evaluations where nothing says."""
_IMPORTS = "runtime_args.import_modules"
_PLACE_KEYS = ("runtime_args.output_dir", "runtime_args.exp_name")


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What a run left."""

    run: Path
    """The run folder: config.yaml, metrics.jsonl, tensorboard/, rollouts/, checkpoints/."""
    checkpoint: Path | None
    """The trained model, for transformers' ``from_pretrained``."""
    curve: list[dict[str, float]] = field(repr=False)
    """One row a step: ``episode``, ``reward/mean``, ``agent/<metric>``, and ``eval/…`` where it was
    evaluated."""


def tune(
    workflow_func: Any,
    judge_func: Any = None,
    model: TunerModelConfig | None = None,
    train_dataset: DatasetConfig | None = None,
    eval_dataset: DatasetConfig | None = None,
    algorithm: AlgorithmConfig | None = None,
    auxiliary_models: Mapping[str, Any] | None = None,
    config_path: str | Path | None = None,
    *,
    project_name: str | None = None,
    experiment_name: str | None = None,
    monitor_type: str | None = None,
    overrides: Sequence[str] = (),
) -> TuneResult | None:
    """Train a workflow, and return when it is trained.

    Defaults < the YAML at ``config_path`` < the other arguments < ``overrides``. The same call
    again continues an unfinished run.

    Args:
        workflow_func: the async function or ``Workflow`` class, or its name
            ``path/file.py->Name``.
        judge_func: what scores runs whose workflow gives no reward: a function, a class, or the
            name of one; see docs/rewards.md.
        model: what is trained, and how it samples.
        train_dataset: its rows; each reaches the workflow as the dict it is.
        eval_dataset: held-out rows.
        algorithm: how it learns.
        auxiliary_models: frozen models by name: ``{"judge": {"base_url": …, "model": …}}``, as
            ``runtime_args.auxiliary_models``.
        config_path: a YAML of ours, ``template/grpo_fsdp.yaml`` for a cluster. None = one process
            on this machine, on its GPU if it has one.
        project_name: the run is put below ``outputs/{project_name}``.
        experiment_name: name of the run's folder; None = the workflow's name.
        monitor_type: ``tensorboard`` or ``wandb``.
        overrides: any key of docs/config.md, as on the command line: ``"runtime_args.seed=1"``.

    Returns:
        None on a machine that is not the first of a cluster: it has no run folder.

    Raises:
        ChatLearnError: what, where and what to do. Signatures are checked before a model is loaded.
    """
    refuse_while_importing()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line; read by torch
    setup_logging()
    workflow_spec, workflow = _workflow(workflow_func)
    judge_spec = _judge(judge_func)

    file = _read(config_path)
    below = file if config_path is not None else {**DEFAULTS, **_devices()}
    keys = of_monitor(monitor_type, project_name, experiment_name)
    if experiment_name is None and "runtime_args.exp_name" not in below:
        keys["runtime_args.exp_name"] = _folder_name(workflow)
    keys |= of_model(model, below)
    keys |= of_algorithm(algorithm, below)
    keys |= {_IMPORTS: [*below.get(_IMPORTS, ()), AGENT_MODULE]}
    if auxiliary_models is not None:
        keys["runtime_args.auxiliary_models"] = _auxiliary(auxiliary_models)

    folder = _inputs({**below, **keys}, overrides)
    service = _service(train_dataset) if is_class_form(workflow) else {}
    cfg_file = write_agent_cfg(folder, workflow=workflow_spec, judge=judge_spec, **service)
    writing = {
        "agent_cfg": cfg_file,
        "folder": folder,
        "any_columns": not is_class_form(workflow) and not isinstance(judge_func, str),
    }
    keys |= _training(train_dataset, keys, below, writing)
    keys |= _evaluation(eval_dataset, {**below, **keys}, writing)

    base = {} if config_path is not None else below
    for key, value in keys.items():
        if key in file and file[key] != value and key != _IMPORTS:
            logger.info("%s = %s (in %s: %s)", key, value, config_path, file[key])
    settings = [*_written({**base, **keys}), *overrides]
    cfg = load_config(config_path, settings)
    if AGENT_MODULE not in cfg.runtime_args.import_modules:  # an override named others
        modules = [*cfg.runtime_args.import_modules, AGENT_MODULE]
        cfg = load_config(config_path, [*settings, *_written({_IMPORTS: modules})])
    _check_reach(cfg, workflow_spec, judge_spec)
    return run_config(cfg)


def _workflow(given: Any) -> tuple[str, Any]:
    """Name and object of the workflow, checked."""
    where = "tune(workflow_func=…)"
    spec = resolve_spec(given, Path.cwd()) if isinstance(given, str) else name_of(given)
    workflow = load_object(spec, where)
    check_workflow(workflow, where)
    model_kind(workflow, where)
    return spec, workflow


def _judge(given: Any) -> str | None:
    """Name of the judge, checked."""
    if given is None:
        return None
    spec = resolve_spec(given, Path.cwd()) if isinstance(given, str) else name_of(given)
    with importing(spec):
        load_judge(known_object(spec) or spec, "tune(judge_func=…)")
    return spec


def _read(config_path: str | Path | None) -> dict[str, Any]:
    """The keys in the file, dotted; those that refer to another one have its value."""
    written = {} if config_path is None else dict(_flat(read_yaml(config_path)))
    references = {f"${{{key}}}": value for key, value in written.items()}
    return {
        key: references.get(value, value) if isinstance(value, str) else value
        for key, value in written.items()
    }


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _devices() -> dict[str, Any]:
    import torch

    gpus = int(torch.cuda.is_available())
    return {"models.policy.num_gpu": gpus, "models.policy_trainer.num_gpu": gpus}


def _folder_name(workflow: Any) -> str:
    name = getattr(workflow, "__name__", type(workflow).__name__)
    return re.sub(r"[^0-9A-Za-z_-]+", "", name) or "workflow"


def _auxiliary(models: Mapping[str, Any]) -> dict[str, Any]:
    made = {}
    for name, entry in models.items():
        if isinstance(entry, TunerModelConfig):
            raise ConfigError(
                f"auxiliary_models[{name!r}] is a TunerModelConfig: frozen models are not served "
                f"by the run; serve {entry.model_path} with SGLang and give "
                "{'base_url': …, 'model': …}"
            )
        if not isinstance(entry, Mapping):
            raise ConfigError(
                f"auxiliary_models[{name!r}] is {type(entry).__name__}; give {{'base_url': …, "
                "'model': …} or {'factory': 'pkg.mod:function'}"
            )
        made[name] = dict(entry)
    return made


def _inputs(keys: Mapping[str, Any], overrides: Sequence[str]) -> Path:
    """Where the run's data goes: beside the run, whose place ``keys`` decide."""
    settings = {key: keys[key] for key in _PLACE_KEYS if keys.get(key) is not None}
    settings |= {"runtime_args.data_path": "-", "models.policy_trainer.load": "-"}  # stand-ins
    mine = [o for o in overrides if o.partition("=")[0].strip() in _PLACE_KEYS]
    args = load_config(None, [*_written(settings), *mine]).runtime_args
    return inputs_folder(args.output_dir, args.exp_name)


def _service(dataset: DatasetConfig | None) -> dict[str, str]:
    """``environment`` of the agent's YAML, where the rows are the tasks of a service."""
    if dataset is None or dataset.source.kind != "environment":
        return {}
    return {"environment": dataset.path}


def _training(
    dataset: DatasetConfig | None,
    keys: Mapping[str, Any],
    below: Mapping[str, Any],
    writing: Mapping[str, Any],
) -> dict[str, Any]:
    """Keys of the training data, and of how long it lasts."""
    if dataset is None:
        raise ConfigError("tune(train_dataset=…) is not given; give DatasetConfig(path=…, split=…)")
    rows = dataset.read()
    file = write_rows(rows, name="train", fields=dataset.fields, **writing)
    length = episodes(
        len(rows), epochs=dataset.total_epochs, steps=dataset.total_steps, keys=keys, below=below
    )
    return {"runtime_args.data_path": str(file), **length}


def _evaluation(
    dataset: DatasetConfig | None, keys: Mapping[str, Any], writing: Mapping[str, Any]
) -> dict[str, Any]:
    """Keys of the evaluation; ``keys`` are all that hold so far."""
    interval = "runtime_args.eval_episode_interval"
    if dataset is None:
        return {}  # an interval without data is refused with the other keys
    file = write_rows(dataset.read(), name="eval", fields=dataset.fields, **writing)
    return {
        "runtime_args.eval_data_path": str(file),
        interval: keys.get(interval, EVAL_INTERVAL),
    }


def _written(keys: Mapping[str, Any]) -> list[str]:
    """Keys as overrides; JSON is YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]


def _check_reach(cfg: GrpoConfig, *specs: str | None) -> None:
    """Workers of a cluster must find workflow and judge, and importing them must train nothing."""
    if cfg.runtime_args.cluster != "ray":
        return
    for spec in specs:
        if spec is None or "->" not in spec:
            continue
        if is_in_process(spec):
            raise ConfigError(
                f"{spec.partition('->')[2]} is defined where workers of runtime_args.cluster=ray "
                "cannot find it (a notebook, a closure, a script from stdin); move it to the top "
                "level of a .py file, or set runtime_args.cluster=local"
            )
        if known_object(spec) is not None:
            import_object(spec, "tune()")


def run_config(cfg: GrpoConfig) -> TuneResult | None:
    """Run ``cfg`` to its end; also where an event loop runs already."""
    from chatlearn.launch import launch

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        run = launch(cfg)
    else:  # a notebook, whose event loop runs already
        run = _in_thread(cfg)
    if run is None:
        return None
    run = run.resolve()
    saved = complete_checkpoints(run / "checkpoints")
    checkpoint = saved[-1] / "hf" if saved else None
    return TuneResult(run, checkpoint, read_records(run / "metrics.jsonl"))


def _in_thread(cfg: GrpoConfig) -> Path | None:
    """``launch`` beside an event loop that runs already; an interrupt here ends the run there."""
    from chatlearn.launch import launch

    end: list[Callable[[], None]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="tune") as pool:
        running = pool.submit(launch, cfg, on_start=end.append)
        try:
            return running.result()
        except KeyboardInterrupt:
            for stop in end:
                stop()
            raise
