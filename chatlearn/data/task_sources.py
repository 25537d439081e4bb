"""Raw rows from wherever they are: a file, a folder, a hub, an environment service.

    file          my_dataset.jsonl, my_dataset/{train,test}.jsonl, a folder as a hub leaves it
    huggingface   openai/gsm8k, openai/gsm8k/main (the subset), gsm8k/main
    modelscope    modelscope://AI-ModelScope/gsm8k
    environment   http://127.0.0.1:8765 (``GET /tasks``)

A row is the dict it was where it came from. ``field_map`` turns rows into ours.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from chatlearn.data.dataset_folder import files_of
from chatlearn.data.hub import LEGACY_IDS, is_hub_id, snapshot
from chatlearn.data.raw_files import RAW_SUFFIXES, raw_rows
from chatlearn.errors import DataError

logger = logging.getLogger(__name__)

Kind = Literal["file", "huggingface", "modelscope", "environment"]
MODELSCOPE_PREFIX = "modelscope://"


@dataclass(frozen=True, slots=True)
class TaskSource:
    """Where raw rows are. ``TaskSource.of("openai/gsm8k", split="train")`` finds the kind."""

    kind: Kind
    path: str
    """File, folder, hub id (``owner/name`` or ``owner/name/subset``) or URL of the service."""
    subset: str | None = None
    """A folder of the dataset, or a configuration its card names."""
    split: str | None = None
    """None: the whole of a file; of anything else its only split, or ``train``."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise DataError(
                f"kind of the dataset {self.path!r} is {self.kind!r}; "
                f"write one of {', '.join(get_args(Kind))}"
            )
        if not isinstance(self.path, str) or not self.path.strip():
            raise DataError(
                f"path of a {self.kind} dataset is {self.path!r}; give a file, a folder, a hub id "
                "or the URL of an environment service"
            )

    @classmethod
    def of(
        cls,
        path: str,
        *,
        split: str | None = None,
        subset: str | None = None,
        kind: Kind | None = None,
    ) -> TaskSource:
        """The source that ``path`` means. What exists here wins over a hub id of that spelling."""
        if kind is None:
            kind, path = _kind(str(path))
        return cls(kind, str(path), subset, split)

    def __str__(self) -> str:
        parts = (self.path, self.subset and f"subset {self.subset}", self.split)
        return ", ".join(part for part in parts if part)


def read_source(source: TaskSource, *, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of one split, in the order of its files.

    Args:
        limit: read at most so many.

    Raises:
        DataError: nothing is there, it does not say which of several splits or subsets is meant,
            it holds no rows, a row is not an object, or the hub or service does not answer.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{limit} rows of {source} were asked for; ask for 1 or more")
    if source.kind == "environment":
        rows = _from_environment(source)[:limit]
    else:
        rows = _from_files(_local(source), limit)
    if not rows:
        raise DataError(f"{source}: there are no rows in it")
    return rows


def _kind(path: str) -> tuple[Kind, str]:
    if path.startswith(("http://", "https://")):
        return "environment", path
    if path.startswith(MODELSCOPE_PREFIX):
        return "modelscope", path.removeprefix(MODELSCOPE_PREFIX)
    if not _here(path).exists() and is_hub_id(path) and Path(path).suffix not in RAW_SUFFIXES:
        return "huggingface", path
    return "file", path


def _here(path: str) -> Path:
    return Path(path).expanduser()


def _local(source: TaskSource) -> TaskSource:
    """The source as files of this machine; a hub is asked only for what is not here."""
    if source.kind == "file" or _here(source.path).exists():
        return source
    hub_id, subset = _split_id(source.path)
    if subset and source.subset and subset != source.subset:
        raise DataError(
            f"{source.path} names the subset {subset!r}, and subset={source.subset!r} another one; "
            "give one of them"
        )
    folder = snapshot(hub_id, hub="modelscope" if source.kind == "modelscope" else "huggingface")
    return replace(source, kind="file", path=str(folder), subset=source.subset or subset)


def _split_id(path: str) -> tuple[str, str | None]:
    """Hub id and subset: ``openai/gsm8k/main`` and the old ``gsm8k/main`` name one too."""
    owner, _, rest = path.strip("/").partition("/")
    if owner in LEGACY_IDS:
        return LEGACY_IDS[owner], rest or None
    name, _, subset = rest.partition("/")
    return f"{owner}/{name}", subset or None


def _from_files(source: TaskSource, limit: int | None) -> list[dict[str, Any]]:
    path = _here(source.path)
    rows: list[dict[str, Any]] = []
    for file in files_of(path, subset=source.subset, split=source.split):
        left = None if limit is None else limit - len(rows)
        for place, row in islice(raw_rows(file), left):
            if not isinstance(row, dict):
                raise DataError(
                    f"{file}, {place}: is {type(row).__name__} {str(row)[:60]!r}, not an object; "
                    'a row is an object of named columns: {"question": ..., "answer": ...}'
                )
            rows.append(row)
        if len(rows) == limit:
            break
    return rows


def _from_environment(source: TaskSource) -> list[dict[str, Any]]:
    from chatlearn.data.environment.client import read_tasks  # aiohttp: loaded when it is needed

    if source.subset:
        raise DataError(f"{source}: an environment service has no subsets; leave subset out")
    return read_tasks(source.path, source.split or "train")
