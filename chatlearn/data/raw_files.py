"""Rows of one file as they were written: what ``row_files`` reads, and .csv and .arrow too."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatlearn.data.row_files import SUFFIXES, read_rows
from chatlearn.errors import DataError

RAW_SUFFIXES = (*SUFFIXES, ".csv", ".arrow")
_BATCH = 256
"""Rows decoded at a time: a preview of a large file reads its beginning only."""


def raw_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row with its place in words (``line 3``, ``row 3``; both count from 1).

    The cells of a .csv are text, as numbers read from text would lose ``007`` and ``1.50``.
    Raises ``DataError`` for a file that does not parse.
    """
    if path.suffix == ".csv":
        return _csv_rows(path)
    if path.suffix in (".parquet", ".arrow"):
        return _columnar_rows(path)
    return iter(read_rows(path))


def _columnar_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow

    number = 0
    try:
        for batch in _batches(path):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        kind = path.suffix.removeprefix(".")
        raise DataError(f"{path}: not a readable {kind} file: {error}") from error


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow.ipc
    import pyarrow.parquet

    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_BATCH)
        return
    with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        yield from stream


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            if len(set(columns)) != len(columns) or "" in columns:
                raise DataError(
                    f"{path}, line 1: the columns are {', '.join(map(repr, columns))}; each needs "
                    "a name of its own"
                )
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}, line {reader.line_num}: the row has "
                        f"{'more' if None in row else 'fewer'} cells than the {len(columns)} "
                        f"columns {', '.join(columns)}; quote text that holds commas"
                    )
                yield f"line {reader.line_num}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable CSV file in UTF-8: {error}") from error
