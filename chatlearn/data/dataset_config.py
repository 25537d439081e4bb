"""``DatasetConfig``: a dataset named in Python, to look at and to train on."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chatlearn.data.field_map import FieldMap
from chatlearn.data.task_sources import TaskSource, read_source
from chatlearn.errors import DataError


@dataclass(frozen=True, slots=True)
class DatasetConfig:
    """Which rows to take, from a file, a folder, a hub or an environment service.

    ::

        DatasetConfig(path="my_dataset", split="train").preview()
    """

    path: str
    """A file, a folder, a hub id (``openai/gsm8k``, ``modelscope://AI-ModelScope/gsm8k``) or the
    URL of an environment service."""
    split: str | None = None
    """None: the whole of a file; of anything else its only split, or ``train``."""
    subset: str | None = None
    """A folder of the dataset, or a configuration its card names: ``main``."""
    fields: FieldMap | Mapping[str, str] | None = None
    """Which columns hold question and answer; None finds known layouts, see ``field_map``."""
    name: str | None = None
    """The subset under AgentScope's name for it."""
    total_epochs: int = 1
    """Times to go through the rows, where the caller asks for no number of episodes."""
    total_steps: int | None = None
    """Optimizer steps to take; when given it wins over ``total_epochs``."""

    def __post_init__(self) -> None:
        if self.name and self.subset and self.name != self.subset:
            raise DataError(
                f"DatasetConfig of {self.path}: name={self.name!r} and subset={self.subset!r} "
                "mean the same; give one of them"
            )
        for key in ("total_epochs", "total_steps"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise DataError(f"DatasetConfig.{key} is {value!r}; give a whole number from 1 on")
        if self.fields is not None and not isinstance(self.fields, FieldMap):
            FieldMap.of(self.fields)  # a typing error is told here, not when training starts

    @property
    def source(self) -> TaskSource:
        """Where the rows are."""
        return TaskSource.of(self.path, split=self.split, subset=self.subset or self.name)

    def read(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The raw rows, each the dict it was; at most ``limit``. Raises ``DataError``."""
        return read_source(self.source, limit=limit)

    def preview(self, n: int = 5) -> list[dict[str, Any]]:
        """Print the first ``n`` rows as a JSON list, and return them. Raises ``DataError``."""
        rows = self.read(limit=n)
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False, default=str) + "\n")
        return rows
