"""Checkpoint folders that are complete or absent, whatever kills the process that writes them.

A checkpoint is written beside its place under a name no reader looks for, synced to disk, and
renamed. So a folder called ``episode_000010`` is complete: there is no other test, and none is
needed. Removal goes the other way round, first the name, then the files.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from chatlearn.errors import CheckpointError
from chatlearn.observability.jsonl import to_line, write_atomically

_COMPLETE = re.compile(r"episode_(\d{6,})")
_PARTIAL = ".tmp"
_REPLACED = ".replaced"
_LOOP_STATE = Path("state") / "loop.json"


def episode_of(checkpoint: Path) -> int:
    """How many episodes the policy of a checkpoint has been trained for."""
    match = _COMPLETE.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: no name like episode_000010")
    return int(match[1])


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints inside ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _COMPLETE.fullmatch(p.name)), key=episode_of)


def remove_leftovers(folder: Path) -> None:
    """Clear what a killed process left half done. Nobody else may be writing into ``folder``."""
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        place = path.with_suffix("")
        if path.suffix == _REPLACED and not place.exists():
            path.rename(place)  # killed between the two renames: the old one is still the newest
        elif path.suffix in (_PARTIAL, _REPLACED):
            shutil.rmtree(path, ignore_errors=True)


class CheckpointWriter:
    """``with CheckpointWriter(folder, episode) as partial:`` fill ``partial``; done when it ends.

    A failure inside, or of the disk at the end, removes the partial folder and is raised as
    ``CheckpointError``; cancellation and interrupts remove it too and pass through.
    (A class, not a generator: it needs no broad ``except`` to see every failure.)

    Args:
        folder: the ``checkpoints`` folder of a run.
        episode: names the checkpoint; a complete one of the same name is replaced.
        keep: how many of the newest stay, None for all.
    """

    def __init__(self, folder: Path, episode: int, *, keep: int | None = None) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1 or None, not {keep}")
        self._folder, self._keep = folder, keep
        self._place = folder / f"episode_{episode:06d}"
        self._partial = self._place.with_suffix(_PARTIAL)

    def __enter__(self) -> Path:
        try:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise self._failed(error) from error
        return self._partial

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            try:
                self._commit()
            except OSError as failure:
                raise self._failed(failure) from failure
        elif isinstance(error, Exception):
            raise self._failed(error) from error
        else:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _commit(self) -> None:
        for root, _, names in os.walk(self._partial, topdown=False):
            for name in names:
                _sync(Path(root) / name)
            _sync(Path(root))
        replaced = self._place.with_suffix(_REPLACED)
        if self._place.exists():
            self._place.rename(replaced)
        self._partial.rename(self._place)
        _sync(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)
        if self._keep is not None:
            for old in complete_checkpoints(self._folder)[: -self._keep]:
                doomed = old.with_suffix(_PARTIAL)
                shutil.rmtree(doomed, ignore_errors=True)
                old.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _failed(self, error: Exception) -> CheckpointError:
        free = _free_space(self._folder)  # asked before the partial folder gives its bytes back
        shutil.rmtree(self._partial, ignore_errors=True)
        earlier = complete_checkpoints(self._folder)
        intact = (
            f"The earlier checkpoints are intact; the newest is {earlier[-1]}."
            if earlier
            else "There was no earlier checkpoint."
        )
        return CheckpointError(
            f"cannot write the checkpoint {self._place}: {type(error).__name__}: {error} "
            f"({free}). The partial folder was removed. {intact} Make room on that disk, keep "
            "fewer checkpoints, or repair the cause above; then run the same command again: it "
            "continues from the newest checkpoint."
        )


def write_loop_state(folder: Path, state: dict[str, Any]) -> None:
    """Put the loop's own state (JSON) into a checkpoint that is being written."""
    path = folder / _LOOP_STATE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [to_line(state)])


def read_loop_state(checkpoint: Path) -> dict[str, Any]:
    """What ``write_loop_state`` wrote.

    Raises:
        CheckpointError: it is missing or unreadable, so a resume could not be exact.
    """
    path = checkpoint / _LOOP_STATE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {type(error).__name__}: {error}. Without it a resume would not "
            "be exact. Remove that checkpoint folder to continue from the one before, or set "
            "runtime_args.enable_resume_training=False to start a new run."
        ) from error


def _sync(path: Path) -> None:
    """Force a file or folder to disk; file systems that cannot sync a folder say EINVAL."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _free_space(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free:,} bytes free on the disk of {folder}"
