"""``chatlearn grpo``: train with GRPO."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from chatlearn.cluster.nodes import machine_count
from chatlearn.config import GrpoConfig, dump_config, load_config
from chatlearn.config.plan import plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", metavar="YAML", help="template/local_cpu.yaml, …")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the configuration and the plan; run nothing"
    )
    parser.usage = "chatlearn grpo --config-file YAML [--dry-run] [key=value ...]"


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    cfg = load_config(arguments.config_file, overrides)
    if arguments.dry_run:
        text = plan(cfg, _rows(cfg), machines=machine_count(os.environ))
        sys.stdout.write(f"{dump_config(cfg)}\n{text}\n")
        return
    # Heavy imports come after the configuration was accepted: a typo answers at once.
    from chatlearn.launch import launch

    launch(cfg)


def _rows(cfg: GrpoConfig) -> dict[str, int | None]:
    """Rows of every file; None where there is no such file, as a plan may be made elsewhere."""
    from chatlearn.data.prompt_dataset import read_tasks

    args = cfg.runtime_args
    files = [*args.data_files, *args.eval_files]
    return {path: len(read_tasks([path])) if Path(path).exists() else None for path in files}
