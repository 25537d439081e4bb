"""``chatlearn stop``: end one run, and only what that run started."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from chatlearn.errors import ConfigError
from chatlearn.observability.run_folder import Owner, running


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        nargs="?",
        default="outputs",
        help="a run folder, or one above it: the only run under it that is going on (outputs)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long the run may take to end by itself before it is killed (60)",
    )


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Terminate the run's driver, which ends as by Ctrl-C; engines, ranks and workers end with it.

    Raises:
        ConfigError: no run, several runs, or the run of another machine.
    """
    if overrides:
        raise ConfigError(f"chatlearn stop takes a folder and no settings, not {overrides[0]!r}")
    runs = running(Path(arguments.folder))
    if len(runs) != 1:
        listed = "".join(f"\n  {run} ({owner})" for run, owner in runs.items())
        raise ConfigError(
            f"{len(runs) or 'no'} runs are going on under {arguments.folder}"
            + (f"; name one of them:{listed}" if runs else "; name the folder of the run")
        )
    run, owner = next(iter(runs.items()))
    if owner is None or owner.host != socket.gethostname():
        raise ConfigError(f"the run {run} is that of {owner}; stop it on that machine")
    end_run(run, owner, arguments.grace)
    sys.stdout.write(f"{run} has ended; the same command continues it from its checkpoint\n")


def end_run(run: Path, owner: Owner, grace_s: float) -> None:
    """Signal the process until it has let go of the run's lock.

    Raises:
        ConfigError: it does not end.
    """
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(owner.pid, number)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if not running(run):
                return
            time.sleep(0.2)
    raise ConfigError(f"{owner} does not end, not even by SIGKILL")
