"""From a project to a run: its workflow and judge found, its rows read, our configuration made."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from chatlearn.config import GrpoConfig
from chatlearn.data.field_map import FieldMap
from chatlearn.data.task_sources import TaskSource, read_source
from chatlearn.errors import ConfigError
from chatlearn.rewards.judge_names import THEIRS
from chatlearn.rewards.judging import load_judge
from chatlearn.tuner.keys_table import ROOTS
from chatlearn.tuner.naming import load_object, resolve_spec
from chatlearn.tuner.project import Project
from chatlearn.tuner.project_settings import Backbone, Layers
from chatlearn.tuner.rows import inputs_folder, write_agent_cfg, write_rows
from chatlearn.tuner.signatures import check_workflow

_FILES, _HUB, _SERVICE = (
    ("jsonl_dataset_file", "dataset_file"),
    ("huggingface_dat_repo",),
    ("env_service",),
)
_NOT_READ = {
    "feedback_tracing": "traces are not read; write the tasks to a file: jsonl_dataset_file",
    "data_generation": "tasks are not generated; write them to a file and use jsonl_dataset_file",
    "random_dummy": "it was for their own tests; use jsonl_dataset_file",
}


@dataclass(frozen=True, slots=True)
class Built:
    """What a project comes to, ready to be launched or debugged."""

    cfg: GrpoConfig
    agent_cfg: Path
    """YAML of the workflow agent."""
    rows: Mapping[str, int]
    """Rows by dataset file."""
    origin: Mapping[str, str]
    """Where a setting comes from, by our key."""
    notes: tuple[str, ...]
    """What a user should know of how keys were read."""


def build(
    project: Project,
    backbone: Backbone,
    overrides: Sequence[str] = (),
    *,
    tasks: int | None = None,
) -> Built:
    """Check everything that can be checked before a model is loaded, and write the inputs.

    Args:
        overrides: ``key=value`` of ours.
        tasks: for debugging, how many of the training rows.

    Raises:
        ConfigError, AgentError: a setting, the workflow or the judge is refused.
        DataError: the rows cannot be had.
    """
    _own_rows(Layers(project, backbone, overrides))
    _source(project, "train")
    tasks = tasks or project.words.debug_tasks if backbone == "debug" else None
    evaluates = _reads_eval(project) and backbone != "debug"
    draft = Layers(project, backbone, overrides, tasks=tasks)
    first = draft.config(data_path="?", eval_data_path="?")
    _check_evaluation(first, project, evaluates)
    workflow, judge = _workflow(project), _judge(project)
    _check_judge_model(first, project)

    args = first.runtime_args
    folder = inputs_folder(args.output_dir, args.exp_name)
    is_service = project.words.reader.get("type") in _SERVICE
    agent_cfg = write_agent_cfg(
        folder,
        workflow=workflow,
        judge=judge,
        **({"environment": project.words.reader["env"]} if is_service else {}),
    )
    train, count = _write(project, "train", agent_cfg, folder, limit=tasks)
    files, rows = {"data_path": train}, {train: count}
    if evaluates:
        files["eval_data_path"], count_eval = _write(project, "eval", agent_cfg, folder)
        rows[files["eval_data_path"]] = count_eval
    layers = Layers(project, backbone, overrides, tasks=count)
    cfg = layers.config(**files)
    return Built(cfg, agent_cfg, rows, layers.origin, tuple(layers.notes))


def _own_rows(layers: Layers) -> None:
    for key in ("runtime_args.data_path", "runtime_args.eval_data_path"):
        if (value := layers.value(key)) is not None:
            raise ConfigError(
                f"{key} = {value!r}: the rows of a project come from {layers.project.root}."
                "task_reader; leave the key out, or run rows in our own layout with chatlearn grpo"
            )


def _check_evaluation(cfg: GrpoConfig, project: Project, evaluates: bool) -> None:
    args = cfg.runtime_args
    if not evaluates and (args.eval_episode_interval or args.enable_eval_before_training):
        raise ConfigError(
            f"{project.path}: an evaluation is asked for, but {project.root}.task_reader names no "
            "validation split or file; name one, or set trainer_common.test_freq: -1"
        )


def _workflow(project: Project) -> str:
    where = f"{project.root}.rollout.user_workflow"
    spec = project.words.workflow
    if spec is None:
        raise ConfigError(
            f"{project.path}: {where} is not set; name your workflow: workflow.py->MyWorkflow"
        )
    spec = _place(spec, project, project.origin["workflow"])
    with _missing_modules(project):
        workflow = load_object(spec, where)
    check_workflow(workflow, f"{where} ({spec})")
    return spec


_MISSING = {
    **dict.fromkeys(ROOTS, "write `from chatlearn.tuner import …` instead"),
    "agentscope": "install it: pip install 'agentscope<2' 'openai<2' 'mcp<2' greenlet",
}


@contextmanager
def _missing_modules(project: Project) -> Iterator[None]:
    """Around the import of a user's file: what its imports of theirs are here."""
    try:
        yield
    except ConfigError as error:
        cause = error.__cause__
        name = (getattr(cause, "name", None) or "").partition(".")[0]
        if isinstance(cause, ModuleNotFoundError) and name in _MISSING:
            raise ConfigError(f"{project.folder}: {cause}; {_MISSING[name]}\n{error}") from error
        raise


def _judge(project: Project) -> str | None:
    where = project.origin.get("judge", f"{project.root}.task_judge.judge_protocol")
    spec = project.words.judge
    if spec is None:
        return None
    module, arrow, name = (part.strip() for part in spec.rpartition("->"))
    if name == "EnvServiceJudge" and module.endswith("env_service_as_judge"):
        if project.words.reader.get("type") not in _SERVICE:
            raise ConfigError(
                f"{where} = {spec!r}: there is no environment to ask; set "
                f"{project.root}.task_reader.type: env_service, or name another judge"
            )
        return None  # without a judge the environment is asked
    if arrow and name not in THEIRS and module.partition(".")[0] in ROOTS:
        known = [*THEIRS, "EnvServiceJudge"]
        near = get_close_matches(name, known, 1, 0.6)
        raise ConfigError(
            f"{where} = {spec!r}: of {module.partition('.')[0]}'s own judges there are here "
            f"{', '.join(known)}"
            + (f"; did you mean {near[0]}?" if near else "; yours is judge.py->MyJudge")
        )
    spec = resolve_spec(spec, project.folder, Path.cwd())
    with _missing_modules(project):
        load_judge(spec, where)
    return spec


def _check_judge_model(cfg: GrpoConfig, project: Project) -> None:
    """Every run would end as a judge error: that is said before a model is loaded."""
    name = (project.words.judge or "").rpartition("->")[2].strip()
    asks = THEIRS.get(name, name) == "math_answer_and_llm"
    if asks and not cfg.runtime_args.auxiliary_models:
        raise ConfigError(
            f"{project.origin['judge']} = {project.words.judge!r} asks a language model, and there "
            f"is none; add to {project.path.name}:  chatlearn: {{runtime_args: {{auxiliary_models: "
            '{judge: {base_url: "http://…/v1", model: …}}}}, or name the judge math_answer'
        )


def _place(spec: str, project: Project, where: str) -> str:
    """``spec`` as every process finds it: an absolute file, or a module that can be imported.

    Files are looked up beside the YAML, then in the current directory; modules from the current
    directory, then beside the YAML and above it.
    """
    place, arrow, name = (part.strip() for part in spec.partition("->"))
    if not arrow or not name:
        raise ConfigError(
            f"{where} = {spec!r}: write file.py->Name or pkg.mod->Name, as in "
            "workflow.py->MathAgentWorkflow"
        )
    if place.endswith(".py"):
        found = resolve_spec(spec, project.folder, Path.cwd())
        if not Path(found.partition("->")[0]).is_file():
            raise ConfigError(
                f"{where} = {spec!r}: there is no {place}, neither in {project.folder} nor in "
                f"{Path.cwd()}" + _meant(project, name)
            )
        return found
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if _is_importable(place):
        return f"{place}->{name}"
    inside = Path(*place.split(".")).with_suffix(".py")
    for folder in (project.folder, project.folder.parent):
        if (folder / inside).is_file():
            return f"{(folder / inside).resolve()}->{name}"
    raise ConfigError(
        f"{where} = {spec!r}: there is no module {place} (looked from {Path.cwd()} and "
        f"{project.folder})" + _meant(project, name)
    )


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # a parent is missing, or __spec__ is
        return False


def _meant(project: Project, name: str) -> str:
    """A file beside the YAML that defines ``name``."""
    defines = re.compile(rf"^\s*(?:class|(?:async\s+)?def)\s+{re.escape(name)}\b", re.MULTILINE)
    for file in sorted(project.folder.glob("*.py")):
        if defines.search(file.read_text(encoding="utf-8", errors="replace")):
            return f"; did you mean {file.name}->{name}?"
    return ""


def _reads_eval(project: Project) -> bool:
    reader = project.words.reader
    key = {_FILES: "file_eval", _HUB: "hub_eval", _SERVICE: "env_eval"}
    return any(reader.get("type") in kinds and short in reader for kinds, short in key.items())


def _write(
    project: Project, part: str, agent_cfg: Path, folder: Path, *, limit: int | None = None
) -> tuple[str, int]:
    fields = project.words.fields
    rows = read_source(_source(project, part), limit=limit)
    path = write_rows(
        rows,
        agent_cfg=agent_cfg,
        folder=folder,
        name=part,
        fields=FieldMap.of(fields) if fields is not None else None,
    )
    return str(path), len(rows)


def _source(project: Project, part: str) -> TaskSource:
    """Where the ``train`` or ``eval`` rows are."""
    reader, section = project.words.reader, f"{project.root}.task_reader"
    kind = reader.get("type")
    if kind in _FILES:
        return TaskSource.of(_here(project, _need(reader, f"file_{part}", section, kind)))
    if kind in _HUB:
        path = _here(project, _need(reader, "hub", section, kind))
        split = reader.get(f"hub_{part}")
        return TaskSource.of(path, split=split, subset=reader.get("subset"))
    if kind in _SERVICE:
        url = _need(reader, "env", section, kind)
        return TaskSource.of(url, split=reader.get(f"env_{part}"), kind="environment")
    known = ", ".join((*_HUB, *_FILES, *_SERVICE))
    why = _NOT_READ.get(str(kind), f"known: {known}")
    raise ConfigError(f"{project.path}: {section}.type = {kind!r}: {why}")


_BLOCK_KEYS = {
    "file_train": "training.file_path",
    "file_eval": "validation.file_path",
    "hub": "dataset_path",
    "env": "env_url",
}


def _need(reader: Mapping[str, Any], short: str, section: str, kind: str) -> str:
    if short not in reader:
        raise ConfigError(
            f"{section}.{kind}.{_BLOCK_KEYS[short]} is not set; {section}.type is {kind}"
        )
    return reader[short]


def _here(project: Project, path: str) -> str:
    """A file or folder beside the YAML is meant before one in the current directory or a hub's."""
    beside = project.folder / Path(path).expanduser()
    return str(beside.resolve()) if beside.exists() else path
