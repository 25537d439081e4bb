"""Rows on disk: .json, .jsonl and .parquet in, JSON lines out. Knows nothing of tasks."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chatlearn.errors import DataError

SUFFIXES = (".json", ".jsonl", ".parquet")


def check_files(paths: Iterable[Path]) -> None:
    """Refuse paths that are not readable datasets, all of them in one ``DataError``."""
    problems = []
    for path in paths:
        if not path.is_file():
            problems.append(f"{path}: {_why_missing(path)}")
        elif path.suffix not in SUFFIXES:
            problems.append(
                f"{path}: unknown suffix {path.suffix!r}; a dataset is one of {', '.join(SUFFIXES)}"
            )
    if problems:
        raise DataError("cannot read the dataset:\n  " + "\n  ".join(problems))


def read_rows(path: Path) -> list[tuple[str, Any]]:
    """Every row with its place in words (``line 3``, ``row 3``; both count from 1).

    A .json file is one JSON value a line or one JSON array; blank lines are skipped.
    Raises ``DataError`` for a file that is missing, empty or does not parse.
    """
    check_files([path])
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)
    if not rows:
        raise DataError(f"{path}: the file has no rows; write at least one, or leave it out")
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _why_missing(path: Path) -> str:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)
        return f"is a folder; name a file in it ({', '.join(inside[:8]) or 'it has no datasets'})"
    if not path.parent.is_dir():
        return f"no such file; the folder {path.parent} does not exist either"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES)
    stems = {Path(name).stem: name for name in names}
    close = difflib.get_close_matches(path.stem, stems, n=1)
    if close:
        return f"no such file; did you mean {stems[close[0]]!r}?"
    return f"no such file; {path.parent} holds {', '.join(names[:8]) or 'no datasets'}"


def _read_parquet(path: Path) -> list[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


def _read_json(path: Path) -> list[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        return [(f"row {number}", row) for number, row in enumerate(_parse(text, path, 1), start=1)]
    return [
        (f"line {number}", _parse(line, path, number))
        # not str.splitlines: JSON strings may hold U+2028, which it would cut
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        excerpt = text.splitlines()[error.lineno - 1 : error.lineno] or [""]
        raise DataError(
            f"{path}, line {line}, column {error.colno}: not JSON ({error.msg}): "
            f"{excerpt[0][:80]!r}; the file must be one object a line, or one array of objects"
        ) from error
