"""Fetches a dataset whole: from a hub, or from a folder here (a mirror)."""

from __future__ import annotations

import shutil
from pathlib import Path

from chatlearn.data.hub import snapshot
from chatlearn.data.task_sources import MODELSCOPE_PREFIX, TaskSource
from chatlearn.errors import DataError


def download(target: str, folder: Path) -> Path:
    """Bring a dataset under ``folder``, into a folder of its own id or name.

    Args:
        target: ``owner/name`` of Hugging Face, ``modelscope://owner/name``, or a local folder,
            which is copied.

    Returns:
        The dataset's folder: ``folder/owner/name``.

    Raises:
        DataError: there is no such dataset, the hub does not answer, or it cannot be written.
    """
    source = TaskSource.of(target)
    try:
        folder = folder.expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if source.kind == "file":
            return _copy(Path(target).expanduser().resolve(), folder)
        if source.kind == "environment":
            raise DataError(f"{target} is an environment service: it has nothing to download")
        hub = "modelscope" if target.startswith(MODELSCOPE_PREFIX) else "huggingface"
        return snapshot(source.path, hub=hub, folder=folder / source.path)
    except (OSError, shutil.Error) as error:
        raise DataError(f"{folder} cannot be written: {error}; choose another --path") from error


def data_files(folder: Path) -> list[Path]:
    """Every file of a downloaded dataset in order, without what the hub's client keeps for
    itself."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [f for f in files if not any(p.startswith(".") for p in f.relative_to(folder).parts)]


def _copy(source: Path, folder: Path) -> Path:
    if not source.is_dir():
        raise DataError(
            f"{source} is no folder here, and not the id of a dataset; "
            "write owner/name, modelscope://owner/name or a folder"
        )
    target = folder.resolve() / source.name
    if target == source:
        return source
    if target.is_relative_to(source):
        raise DataError(f"--path {folder} is inside {source}; choose a folder outside of it")
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target
