"""JSON lines that survive a killed process: written whole, read leniently."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def to_line(record: dict[str, Any]) -> str:
    """One object as compact JSON with a newline.

    NaN and infinity become ``null``: Python would write words that no other JSON reader accepts.
    Values JSON has no word for (a date in a user's row) become their ``str``.
    """
    try:
        text = _dumps(record)
    except ValueError:
        text = _dumps(_finite(record))
    return text + "\n"


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Write ``lines`` so that ``path`` is either its old self or complete, never in between."""
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, one a line; no file is no objects.

    A line that is not an object is left out with a warning: a process killed while it wrote leaves
    such a line at the end.
    """
    if not path.exists():
        return []
    records = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                logger.warning("%s:%d is not a JSON object and is left out", path, number)
    return records


def _dumps(value: Any) -> str:
    return json.dumps(
        value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
