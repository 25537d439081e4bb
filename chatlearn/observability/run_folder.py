"""The folder a run leaves: which one to write into, and everything that is written into it.

{output_dir}/{exp_name}/{YYYYmmdd-HHMMSS}/     `latest` beside it links to the newest
  config.yaml   run.log   metrics.jsonl   tensorboard/
  logs/         engine_0.log, ...: one a server that the run started
  rollouts/episode_000001.jsonl
  checkpoints/episode_000010/{hf/, state/}
  lock          held by the process that writes
  finished      there when the run reached its last episode
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml

from chatlearn.errors import ConfigError
from chatlearn.observability.checkpoints import (
    CheckpointWriter,
    complete_checkpoints,
    episode_of,
    remove_leftovers,
)
from chatlearn.observability.jsonl import read_records, to_line, write_atomically
from chatlearn.observability.rollout_files import write_rollouts
from chatlearn.types import Group, Sample

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{8}-\d{6})(?:-(\d+))?")
_ROLLOUT_FILE = re.compile(r"[a-z_]+_(\d{6,})\.jsonl(\.zst)?")


class Owner(NamedTuple):
    """The process that writes a run folder."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def running(folder: Path) -> dict[Path, Owner | None]:
    """The runs in or below ``folder`` that a process is writing right now, and which one."""
    found = {}
    locks = [path for depth in ("lock", "*/lock", "*/*/lock") for path in folder.glob(depth)]
    for path in sorted({lock.resolve() for lock in locks}):
        with path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                found[path.parent] = _owner(file.read())
    return found


def _owner(text: str) -> Owner | None:
    match = re.fullmatch(r"(\d+) on (\S+)\s*", text)
    return Owner(int(match[1]), match[2]) if match else None


class RunFolder:
    """One run on disk, locked for this process until ``close`` or the end of the process."""

    def __init__(self, path: Path, *, said: str, changed: list[str], lock: IO[str]) -> None:
        self.path = path
        self.said = said
        """One sentence: what was decided, the first line of a run's output."""
        self.changed = changed
        """Settings that differ from the run being continued: ``key: old -> new``."""
        self._lock = lock

    @classmethod
    def open(
        cls, output_dir: str | Path, exp_name: str, *, resume: bool, config_text: str
    ) -> RunFolder:
        """Continue the newest unfinished run of ``exp_name``, or begin a new one.

        Args:
            output_dir: where all experiments are.
            exp_name: folder of this experiment.
            resume: False begins a new run in any case.
            config_text: the resolved configuration as YAML; becomes ``config.yaml``.

        Raises:
            ConfigError: another process writes that run.
        """
        parent = Path(output_dir) / exp_name
        parent.mkdir(parents=True, exist_ok=True)
        runs = _runs(parent)
        unfinished = [run for run in runs if not (run / "finished").exists()]
        if resume and unfinished:
            path = unfinished[-1]
            lock = _acquire(path)
            checkpoints = path / "checkpoints"
            remove_leftovers(checkpoints)
            done = complete_checkpoints(checkpoints)
            said = f"Continuing {path} " + (
                f"from episode {episode_of(done[-1])} of its checkpoint."
                if done
                else "from its start: it has no checkpoint yet."
            )
        else:
            path = _create(parent)
            lock = _acquire(path)
            said = f"New run {path}."
            if resume and runs:
                said = f"The newest run {runs[-1]} is finished; starting a new one: {path}."
        changed = _save_config(path / "config.yaml", config_text)
        _link(parent / "latest", path)
        return cls(path, said=said, changed=changed, lock=lock)

    @property
    def checkpoint(self) -> Path | None:
        """The newest complete checkpoint, None before the first."""
        return next(reversed(complete_checkpoints(self.path / "checkpoints")), None)

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log_file(self) -> Path:
        return self.path / "run.log"

    @property
    def logs(self) -> Path:
        """Logs of the processes that this run starts, its engines for instance."""
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def rollouts_file(self, episode: int, *, name: str = "episode") -> Path:
        """``rollouts/episode_000010.jsonl``; ``name="eval"`` gives those of an evaluation."""
        return self.path / "rollouts" / f"{name}_{episode:06d}.jsonl"

    def write_checkpoint(self, episode: int, *, keep: int | None = None) -> CheckpointWriter:
        """``with run.write_checkpoint(10) as folder:`` fill it; complete when the block ends.

        ``keep`` newest checkpoints stay, None for all. Raises ``CheckpointError``; the earlier
        checkpoints are then as they were.
        """
        return CheckpointWriter(self.path / "checkpoints", episode, keep=keep)

    def write_rollouts(
        self,
        episode: int,
        groups: Sequence[Group],
        advantages: Mapping[str, float],
        samples: Sequence[Sample],
        *,
        name: str = "episode",
    ) -> Path:
        """Write one trajectory a line (``rollout_files.write_rollouts``); returns the file."""
        path = self.rollouts_file(episode, name=name)
        write_rollouts(path, groups, advantages, samples)
        return path

    def rewind(self, episode: int) -> None:
        """Forget what came after ``episode``, which a resume will do again.

        Later lines of ``metrics.jsonl`` and later rollout files go, and the half line or file a
        killed process left. TensorBoard is told by ``tracker.TensorBoard(first_episode=...)``.
        """
        records = [r for r in read_records(self.metrics_file) if r.get("episode", 0) <= episode]
        if self.metrics_file.exists():
            write_atomically(self.metrics_file, map(to_line, records))
        for path in (self.path / "rollouts").glob("*.jsonl*"):
            match = _ROLLOUT_FILE.fullmatch(path.name)
            if path.suffix == ".tmp" or (match and int(match[1]) > episode):
                path.unlink()

    def finish(self) -> None:
        """Mark the run as finished: it is never continued or overwritten."""
        write_atomically(self.path / "finished", [time.strftime("%Y-%m-%d %H:%M:%S\n")])

    def close(self) -> None:
        """Let go of the lock."""
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _runs(parent: Path) -> list[Path]:
    """Run folders inside ``parent``, oldest first."""
    found = []
    for path in parent.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found.append((match[1], int(match[2] or 0), path))
    return [path for _, _, path in sorted(found)]


def _create(parent: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path, attempt = parent / stamp, 0
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            attempt += 1
            path = parent / f"{stamp}-{attempt}"


def _acquire(path: Path) -> IO[str]:
    """Take the run's lock. The kernel gives it back when the process dies, even by kill -9."""
    file = (path / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            logger.warning("%s cannot be locked (%s); start no second process on it", path, error)
            return file
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise ConfigError(
            f"the run {path} is being written by process {owner}. Wait for it or stop it; or give "
            "this run another runtime_args.exp_name, or a folder of its own with "
            "runtime_args.enable_resume_training=False."
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _link(link: Path, target: Path) -> None:
    """Point ``link`` at ``target`` without a moment in which it is absent."""
    partial = link.with_name(f".latest-{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(target.name, target_is_directory=True)
        os.replace(partial, link)
    except OSError as error:  # object stores mounted as folders have no links
        logger.warning("cannot link %s to %s: %s", link, target.name, error)
        partial.unlink(missing_ok=True)


def _save_config(path: Path, text: str) -> list[str]:
    """Write ``config.yaml``; a different one that was there is kept as ``config.1.yaml``."""
    if not path.exists():
        write_atomically(path, [text])
        return []
    saved = path.read_text(encoding="utf-8")
    changed = _differences(saved, text, where=path)
    if changed:
        number = 1
        while (kept := path.with_name(f"config.{number}.yaml")).exists():
            number += 1
        shutil.copyfile(path, kept)
        write_atomically(path, [text])
    return changed


def _differences(saved: str, text: str, *, where: Path) -> list[str]:
    try:
        old = _flat(yaml.safe_load(saved))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML any more: {error}. Repair or remove it.") from error
    new = _flat(yaml.safe_load(text))
    return [
        f"{key}: {_shown(old, key)} -> {_shown(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if _shown(old, key) != _shown(new, key)
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a configuration by dotted key; a list is one leaf."""
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix: tree} if prefix else {}
    return {
        key: leaf
        for name, branch in tree.items()
        for key, leaf in _flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _shown(flat: dict[str, Any], key: str) -> str:
    if key not in flat:
        return "(absent)"
    value = flat[key]
    return value if isinstance(value, str) else json.dumps(value, default=str)
