"""``--kill PATTERN``: ends runs of ours that match, and lists what else does without touching it.

A pattern such as ``python|ray`` matches half the machine. What may be ended is what a run folder's
lock says is a run of ours; its engines, ranks and workers end with it.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chatlearn.cli.stop import end_run
from chatlearn.errors import ConfigError
from chatlearn.observability.run_folder import running

_GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Process:
    """One process of this machine."""

    pid: int
    parent: int
    command: str

    def __str__(self) -> str:
        return f"{self.pid} {self.command[:100]}"


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What a pattern matched."""

    ended: tuple[Path, ...]
    """Runs that were ended."""
    foreign: tuple[Process, ...]
    """Processes that match and belong to no run of ours; they go on."""


def end_leftovers(pattern: str, outputs: Path) -> Leftovers:
    """End every run below ``outputs`` of which a process matches ``pattern``.

    Args:
        pattern: a regular expression, searched in command lines: ``python|ray``.

    Raises:
        ConfigError: it is no regular expression, or a run does not end.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--kill {pattern!r} is no regular expression: {error}") from error
    before = processes()
    own = _line_of(os.getpid(), before)
    matching = {pid for pid, p in before.items() if expression.search(p.command)} - own
    ours: set[int] = set()
    ended = []
    for run, owner in running(outputs).items():
        if owner is None or owner.host != socket.gethostname() or owner.pid == os.getpid():
            continue
        family = {owner.pid} | {
            pid for pid in before if owner.pid in _line_of(pid, before) and pid != owner.pid
        }
        ours |= family
        if family & matching:
            end_run(run, owner, _GRACE_S)
            ended.append(run)
    left = [before[pid] for pid in sorted(matching - ours)]
    return Leftovers(tuple(ended), tuple(left))


def processes() -> dict[int, Process]:
    """Every process with a command line, by its id; none where there is no /proc."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (
                (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it has ended meanwhile
            continue
        if command.strip():
            found[int(folder.name)] = Process(int(folder.name), parent, command.strip())
    return found


def _line_of(pid: int, known: Mapping[int, Process]) -> set[int]:
    """``pid`` and its ancestors."""
    line = set()
    while pid in known and pid not in line:
        line.add(pid)
        pid = known[pid].parent
    return line
