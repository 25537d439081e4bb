"""Dataset files to ``Task``s; a wrong row is found before the first token is sampled.

A row is what ``data_preprocess`` writes and users write by hand::

    {"agent_name": "calculator", "agent_cfg_path": null, "data_source": "my/sums",
     "prompt": [{"role": "user", "content": "Compute 3*4."}],
     "reward_model": {"style": "rule", "ground_truth": "12"}, "anything": "else"}

Columns that are not fields of ``Task`` end in ``Task.fields`` and reach the agent's ``run``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chatlearn.data.row_files import check_files, read_rows
from chatlearn.errors import DataError
from chatlearn.types import Message, Task

logger = logging.getLogger(__name__)

ROLES = ("system", "developer", "user", "assistant", "tool")
SHOWN_PROBLEMS = 5
_OWN_COLUMNS = (
    "agent_name",
    "agent_cfg_path",
    "data_source",
    "prompt",
    "messages",
    "ground_truth",
)


class _Bad(Exception):
    """What is wrong with one row; the reader adds file and line."""


def read_tasks(paths: Sequence[str]) -> list[Task]:
    """Read .json, .jsonl and .parquet files into tasks, in file and row order.

    Args:
        paths: dataset files; each may be given once. None at all (no evaluation data) is no task.

    Returns:
        One task a row. ``uid`` is ``{file stem}:{row number}``, counted from 0; files of the same
        stem are told apart by their folders.

    Raises:
        DataError: a file is missing, of an unknown suffix, empty or unparsable; or rows are wrong:
            then the first few are listed with file, line, field and remedy.
    """
    files = [Path(path) for path in paths]
    check_files(files)
    tasks: list[Task] = []
    problems: list[str] = []
    for file, label in zip(files, _labels(files), strict=True):
        resolve = _ConfigPaths(file)
        for number, (place, row) in enumerate(read_rows(file)):
            try:
                tasks.append(_task(f"{label}:{number}", row, resolve))
            except _Bad as problem:
                problems.append(f"{file}, {place}: {problem}")
    if problems:
        raise DataError(listed("wrong rows in the dataset", problems))
    return tasks


def listed(what: str, problems: Sequence[str]) -> str:
    """The first few of many problems, one a row, below ``what``."""
    more = len(problems) - SHOWN_PROBLEMS
    lines = [*problems[:SHOWN_PROBLEMS], *([f"... and {more} more rows"] if more > 0 else [])]
    return "\n  ".join([f"{what}:", *lines])


def drop_long(
    tasks: Sequence[Task], count_tokens: Callable[[Task], int], limit: int
) -> tuple[list[Task], int]:
    """Keep the tasks whose prompt has at most ``limit`` tokens.

    Args:
        count_tokens: tokens of a task's rendered prompt.
        limit: ``models.policy.max_prompt_tokens_length``.

    Returns:
        The kept tasks in order, and how many were dropped (also logged).

    Raises:
        DataError: nothing would be left.
    """
    lengths = [count_tokens(task) for task in tasks]
    kept = [task for task, length in zip(tasks, lengths, strict=True) if length <= limit]
    if tasks and not kept:
        raise DataError(
            f"all {len(tasks)} prompts are longer than models.policy.max_prompt_tokens_length="
            f"{limit} tokens (the shortest has {min(lengths)}); raise that key"
        )
    dropped = len(tasks) - len(kept)
    if dropped:
        logger.warning(
            "dropped %d of %d prompts longer than models.policy.max_prompt_tokens_length=%d tokens",
            dropped,
            len(tasks),
            limit,
        )
    return kept, dropped


def _labels(files: Sequence[Path]) -> list[str]:
    """The shortest unique name of each file: its stem, with as many parent folders as needed."""
    resolved = [file.resolve() for file in files]
    twice = {str(file) for file in resolved if resolved.count(file) > 1}
    if twice:
        raise DataError(f"the same dataset file is listed twice: {', '.join(sorted(twice))}")
    labels = [file.stem for file in resolved]
    for name in (lambda file: f"{file.parent.name}/{file.stem}", Path.as_posix):
        clashing = {label for label in labels if labels.count(label) > 1}
        labels = [
            name(file) if label in clashing else label
            for file, label in zip(resolved, labels, strict=True)
        ]
    return labels


class _ConfigPaths:
    """``agent_cfg_path`` of one file's rows, as existing absolute paths; each is looked up once."""

    def __init__(self, file: Path) -> None:
        self._folder = file.resolve().parent
        self._known: dict[str, str | None] = {}

    def __call__(self, value: str) -> str:
        if value not in self._known:
            places = [Path.cwd() / value, self._folder / value]
            found = next((place for place in places if place.is_file()), None)
            self._known[value] = str(found.resolve()) if found else None
        path = self._known[value]
        if path is None:
            raise _Bad(
                f"agent_cfg_path: {value!r} does not exist, neither as {Path.cwd() / value} nor as "
                f"{self._folder / value}; run from the folder it is relative to, write an absolute "
                "path, or null when the agent needs no YAML"
            )
        return path


def _task(uid: str, row: Any, resolve: Callable[[str], str]) -> Task:
    if not isinstance(row, dict):
        raise _Bad(f"is {_found(row)}, not an object; write one object with agent_name and prompt")
    agent_name = row.get("agent_name")
    if not isinstance(agent_name, str) or not agent_name:
        raise _Bad(
            f"agent_name: found {_found(agent_name)}; write the name given to @register(...)"
        )
    config_path = _text(
        row, "agent_cfg_path", 'write the path of the agent\'s YAML as "...", or null'
    )
    return Task(
        uid=uid,
        messages=_messages(row),
        agent_name=agent_name,
        agent_cfg_path=resolve(config_path) if config_path else None,
        data_source=_text(row, "data_source", "write the name the reward is registered for"),
        ground_truth=_ground_truth(row),
        fields={key: value for key, value in row.items() if key not in _OWN_COLUMNS},
    )


def _text(row: dict[str, Any], key: str, remedy: str) -> str:
    """A column that is a string or absent; absent is ''."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise _Bad(f"{key}: found {_found(value)}; {remedy}")
    return value or ""


def _ground_truth(row: dict[str, Any]) -> Any:
    """``reward_model.ground_truth``, or the top-level column; None when the row has neither."""
    judge = row.get("reward_model")
    if judge is None:
        return row.get("ground_truth")
    if not isinstance(judge, dict):
        raise _Bad(
            f"reward_model: found {_found(judge)}; "
            'write {"style": "rule", "ground_truth": ...} or leave it out'
        )
    nested, top = judge.get("ground_truth"), row.get("ground_truth")
    if nested is not None and top is not None and nested != top:
        raise _Bad(
            f"ground_truth: found {_found(top)}, but reward_model.ground_truth is "
            f"{_found(nested)}; keep one of them"
        )
    return top if nested is None else nested


def _messages(row: dict[str, Any]) -> list[Message]:
    """The checked prompt. Keys that are null are left out: parquet fills every struct field."""
    given = [key for key in ("prompt", "messages") if row.get(key) is not None]
    remedy = 'write [{"role": "user", "content": "..."}]'
    if not given:
        raise _Bad(f"prompt: missing; {remedy}")
    if len(given) == 2:
        raise _Bad("prompt and messages: both are set, and they mean the same; keep one of them")
    key = given[0]
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        raise _Bad(f"{key}: found {_found(messages)}; {remedy}")
    return [_message(f"{key}[{index}]", message) for index, message in enumerate(messages)]


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise _Bad(f'{where}: found {_found(message)}; write {{"role": ..., "content": ...}}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _Bad(f"{where}.role: found {_found(role)}; write one of {', '.join(ROLES)}")
    calls_only = content is None and role == "assistant" and message.get("tool_calls")
    if not calls_only and not isinstance(content, (str, list)):
        raise _Bad(f"{where}.content: found {_found(content)}; write a string or a list of blocks")
    for index, block in enumerate(content if isinstance(content, list) else ()):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise _Bad(
                f"{where}.content[{index}]: found {_found(block)}; "
                'write a block such as {"type": "text", "text": "..."}'
            )
    clean = {key: value for key, value in message.items() if value is not None}
    return {**clean, "content": ""} if calls_only else clean


def _found(value: Any) -> str:
    """A value in an error message: what it is and how it starts."""
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
