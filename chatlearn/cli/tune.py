"""``chatlearn tune``: train or debug a two-file project of AgentJet, astuner or ASTune."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from chatlearn.cluster.nodes import machine_count
from chatlearn.config import dump_config
from chatlearn.config.plan import plan
from chatlearn.errors import ConfigError
from chatlearn.observability.logs import setup_logging
from chatlearn.tuner.project import Project, is_theirs, read_project
from chatlearn.tuner.project_settings import Backbone, differences

_OTHERS = {
    "verl": "the cluster here trains with FSDP2 and samples with SGLang: --backbone=ray",
    "trinity": "the cluster here trains with FSDP2 and samples with SGLang: --backbone=ray",
}
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--conf", metavar="YAML", help="the project: its root is ajet, astuner or astune")
    add("--backbone", default="local", help="debug, local (one process) or ray (a cluster); local")
    add("--dry-run", action="store_true", help="print the configuration and the plan; run nothing")
    add("--tasks", type=int, metavar="N", help="tasks to debug (2)")
    add(
        "--engine",
        default="embedded",
        help="what answers while debugging: embedded (the model), scripted, or the URL of an "
        "OpenAI-compatible server (agent logic only)",
    )
    add("--engine-model", metavar="NAME", help="model at that URL; its first one")
    add("--answers", metavar="JSON", help="what --engine=scripted says: a list of texts")
    add("--with-tensorboard", action="store_true", help="start TensorBoard beside the run")
    add("--with-ray", action="store_true", help="accepted: --backbone=ray starts Ray itself")
    add("--with-logview", action="store_true", help="accepted: there is no log viewer yet")
    add(
        "--kill",
        metavar="PATTERN",
        help="first end runs of ours that match; other processes are listed and left alone",
    )
    parser.usage = "chatlearn tune --conf YAML --backbone=debug|local|ray [options] [key=value ...]"


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Read the project, say what became of its keys, and run it.

    Raises:
        ChatLearnError: what, where and what to do.
    """
    setup_logging()
    backbone = _backbone(arguments)
    theirs = [override for override in overrides if is_theirs(override)]
    ours = [override for override in overrides if not is_theirs(override)]
    project = read_project(arguments.conf, theirs) if arguments.conf else None
    if arguments.kill is not None:
        _kill(arguments.kill, project)
    if project is None:
        if arguments.kill is None:
            raise ConfigError("chatlearn tune needs the YAML of a project: --conf path/to.yaml")
        return
    _say(f"{project.path} ({project.root})", project.said)
    # Heavy imports come after the keys were accepted: a typo answers at once.
    from chatlearn.tuner.project_build import build

    built = build(project, backbone, ours, tasks=arguments.tasks)
    _say("to know", [*built.notes, *_asides(arguments)])
    if arguments.dry_run:
        text = plan(built.cfg, dict(built.rows), machines=machine_count(os.environ))
        sys.stdout.write(f"{dump_config(built.cfg)}\n{text}\n")
        return
    _say("settings, where they are not the defaults", differences(built.cfg, built.origin))
    sys.stdout.flush()
    if backbone == "debug":
        from chatlearn.tuner.debug import debug

        debug(
            built.cfg,
            engine=arguments.engine,
            engine_model=arguments.engine_model,
            answers=arguments.answers,
        )
        return
    from chatlearn.launch import launch
    from chatlearn.tuner.project_board import tensorboard

    if arguments.with_tensorboard:
        launch(built.cfg, beside=tensorboard)
    else:
        launch(built.cfg)


def _backbone(arguments: argparse.Namespace) -> Backbone:
    given = arguments.backbone
    if given in _OTHERS:
        raise ConfigError(f"--backbone={given} is not here: {_OTHERS[given]}, or --backbone=local")
    if given not in get_args(Backbone):
        raise ConfigError(f"--backbone={given}: write one of {', '.join(get_args(Backbone))}")
    if given != "debug":
        debugging = {
            "--engine": arguments.engine != "embedded",
            "--engine-model": arguments.engine_model is not None,
            "--answers": arguments.answers is not None,
            "--tasks": arguments.tasks is not None,
        }
        for option, is_given in debugging.items():
            if is_given:
                raise ConfigError(f"{option} is for --backbone=debug, not for {given}")
    if arguments.tasks is not None and arguments.tasks < 1:
        raise ConfigError(f"--tasks {arguments.tasks}: give a whole number above 0")
    return cast(Backbone, given)


def _asides(arguments: argparse.Namespace) -> list[str]:
    asides = []
    if arguments.with_ray:
        asides.append("--with-ray: Ray starts and ends with a run of --backbone=ray")
    if arguments.with_logview:
        asides.append(
            "--with-logview: there is no log viewer yet; runs are in rollouts/*.jsonl of the run "
            "folder, one a line"
        )
    if arguments.with_tensorboard and arguments.backbone == "debug":
        asides.append("--with-tensorboard: debugging trains nothing, so there is no curve")
    return asides


def _kill(pattern: str, project: Project | None) -> None:
    from chatlearn.tuner.project_leftovers import end_leftovers

    outputs = "outputs"
    if project is not None:
        outputs = str(project.settings.get("runtime_args.output_dir", outputs))
    found = end_leftovers(pattern, Path(outputs))
    lines = [f"ended {run}" for run in found.ended]
    if found.foreign:
        lines.append(f"not runs of {Path(outputs).resolve()}, and left alone:")
        lines += [f"  {process}" for process in found.foreign[:_SHOWN]]
        if len(found.foreign) > _SHOWN:
            lines.append(f"  and {len(found.foreign) - _SHOWN} more")
    _say(f"--kill {pattern}", lines or ["nothing matches"])


def _say(title: str, lines: Sequence[str]) -> None:
    if lines:
        sys.stdout.write(f"{title}\n" + "".join(f"  {line}\n" for line in lines))
