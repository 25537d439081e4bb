"""Datasets of Hugging Face and ModelScope as folders here, and the one error when none comes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from chatlearn.data.raw_files import RAW_SUFFIXES
from chatlearn.errors import DataError, boundary

logger = logging.getLogger(__name__)

Hub = Literal["huggingface", "modelscope"]
LEGACY_IDS = {"gsm8k": "openai/gsm8k"}
"""Hugging Face ids from before datasets had owners, as tutorials still write them."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*){1,2}", re.ASCII)
_PATTERNS = [*(f"*{suffix}" for suffix in RAW_SUFFIXES), "README.md"]
_SITES = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}


def is_hub_id(path: str) -> bool:
    """Whether ``path`` is spelled like ``owner/name``, ``owner/name/subset`` or an old id."""
    return bool(_ID.fullmatch(path)) or path in LEGACY_IDS


def snapshot(hub_id: str, *, hub: Hub, folder: Path | None = None) -> Path:
    """The folder of a dataset's files, downloaded unless it is here already.

    Args:
        hub_id: ``owner/name``.
        folder: where to put every file of the dataset; None keeps the data files and the card in
            the hub's own cache.

    Raises:
        DataError: the hub is unreachable or refuses, or ``modelscope`` is not installed.
    """
    if not _ID.fullmatch(hub_id):
        raise DataError(f"{hub_id!r} is not the id of a dataset; write owner/name")
    site = _SITES[hub]
    logger.info("getting %s from %s", hub_id, site)
    fetch = _modelscope(hub_id) if hub == "modelscope" else _huggingface
    try:
        with boundary(DataError, f"getting {hub_id} from {site}"):
            return fetch(hub_id, folder)
    except DataError as error:
        cause = error.__cause__
        if cause is None:
            raise
        said = str(cause).strip().splitlines() or [""]
        where = "modelscope://" if hub == "modelscope" else ""
        raise DataError(
            f"the dataset {hub_id} cannot be had from {site} ({type(cause).__name__}: "
            f"{said[0][:200]}), and there is no folder {hub_id} here. Check the id; if it is "
            f"right, run `chatlearn data download --target {where}{hub_id} --path D` on a machine "
            "that reaches the hub, copy D here and give its folder as the path of the dataset"
        ) from cause


def _huggingface(hub_id: str, folder: Path | None) -> Path:
    from huggingface_hub import snapshot_download

    if folder is None:
        found = snapshot_download(hub_id, repo_type="dataset", allow_patterns=_PATTERNS)
    else:
        found = snapshot_download(hub_id, repo_type="dataset", local_dir=folder)
    return Path(found)


def _modelscope(hub_id: str) -> Callable[[str, Path | None], Path]:
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download
    except ImportError as error:
        raise DataError(
            f"{hub_id} is to come from ModelScope, whose package is not installed; "
            "run `pip install 'chatlearn[modelscope]'`, or give a folder"
        ) from error

    def fetch(hub_id: str, folder: Path | None) -> Path:
        if folder is None:
            return Path(dataset_snapshot_download(hub_id, allow_patterns=_PATTERNS))
        return Path(dataset_snapshot_download(hub_id, local_dir=str(folder)))

    return fetch
