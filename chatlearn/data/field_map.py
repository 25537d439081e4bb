"""Which columns of a raw row hold the question and the answer, and our rows made of them.

``FieldMap`` says it, or ``preset`` finds it by the columns there are:

    columns                           question         ground truth
    prompt, reward_model              the messages     reward_model.ground_truth   DAPO, verl, ours
    question, answer with ####        question         what follows the last ####  GSM8K
    problem, answer                   problem          answer                      MATH-500
    problem, solution                 problem          the last box                MATH
    messages | prompt                 the messages     answer, if there is one
    query | main_query | question | …                  answer, if there is one     environments

The raw row stays whole, in the column ``task``.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from chatlearn.data.data_preprocess.gsm8k_agent import SOURCE as GSM8K
from chatlearn.data.data_preprocess.math_lighteval_agent import SOURCE as MATH
from chatlearn.data.prompt_dataset import listed
from chatlearn.errors import DataError
from chatlearn.types import Message

logger = logging.getLogger(__name__)

_QUESTIONS = ("query", "main_query", "question", "problem", "prompt", "instruction")
_ANSWERS = ("ground_truth", "answer", "target")
_EXTRACT: dict[str, Callable[[str], str | None]] = {"marked": GSM8K.answer, "boxed": MATH.answer}
_MARKS = {"marked": "####", "boxed": "\\boxed{...}"}
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class FieldMap:
    """Columns by their meaning. A dot leads into an object: ``reward_model.ground_truth``."""

    query: str | None = None
    """Text of the question; it becomes the user's message."""
    messages: str | None = None
    """Or the whole prompt, a list of ``{"role", "content"}``."""
    ground_truth: str | None = None
    """What the judge compares with; None when the workflow or environment scores itself."""
    extract: str = "as_is"
    """How the ground truth is cut out of its column: ``as_is``, ``marked`` (after the last
    ``####``), ``boxed`` (in the last ``\\boxed{}``)."""
    system_prompt: str = ""
    """Text put before the question; '' for none."""

    def __post_init__(self) -> None:
        if bool(self.query) == bool(self.messages):
            raise DataError(
                f"the field map names query={self.query!r} and messages={self.messages!r}; "
                "name one of them: the column of the question, or of a list of messages"
            )
        if self.extract not in ("as_is", *_EXTRACT):
            raise DataError(
                f"extract of the field map is {self.extract!r}; "
                f"write one of as_is, {', '.join(_EXTRACT)}"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not isinstance(value, str):
                raise DataError(f"{field.name} of the field map is {value!r}; write a text")

    @classmethod
    def of(cls, mapping: Mapping[str, str]) -> FieldMap:
        """``{"query": "question", "ground_truth": "answer"}``. Raises ``DataError``."""
        known = [field.name for field in fields(cls)]
        for key in mapping:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                meant = f"; did you mean {close[0]!r}?" if close else ""
                raise DataError(
                    f"the field map has no {key!r}{meant}; it has {', '.join(known)}, and the "
                    'columns stand on the right: {"query": "question"}'
                )
        return cls(**mapping)


def preset(row: Mapping[str, Any]) -> tuple[FieldMap, str]:
    """The map for rows like ``row``, and the data source whose reward fits ('' when unknown).

    Raises:
        DataError: no layout known here fits; lists the columns.
    """
    has = row.keys()
    answer = next((name for name in _ANSWERS if name in has), None)
    if "prompt" in has and isinstance(row.get("reward_model"), Mapping):
        kind = "query" if isinstance(row["prompt"], str) else "messages"
        return FieldMap(**{kind: "prompt"}, ground_truth="reward_model.ground_truth"), ""
    if "question" in has and "####" in str(row.get("answer")):
        fitting = FieldMap(query="question", ground_truth="answer", extract="marked")
        return fitting, GSM8K.data_source
    if "problem" in has and (answer or "solution" in has):
        extract = "as_is" if answer else "boxed"
        fitting = FieldMap(query="problem", ground_truth=answer or "solution", extract=extract)
        return fitting, "" if answer else MATH.data_source
    for name in ("messages", "prompt"):
        if isinstance(row.get(name), list):
            return FieldMap(messages=name, ground_truth=answer), ""
    for name in _QUESTIONS:
        if name in has:
            return FieldMap(query=name, ground_truth=answer), ""
    raise DataError(
        f"no known layout has the columns {', '.join(has) or '(none)'}; say which is which: "
        'fields={"query": "the column of the question", "ground_truth": "that of the answer"}'
    )


def to_rows(
    rows: Sequence[Mapping[str, Any]],
    fields: FieldMap | Mapping[str, str] | None = None,
    *,
    agent_name: str,
    agent_cfg_path: str | None = None,
    data_source: str | None = None,
) -> list[dict[str, Any]]:
    """Raw rows in the layout that ``prompt_dataset`` reads.

    Args:
        fields: None takes the ``preset`` for the first row, and logs it.
        data_source: chooses the reward; None takes that of the row, else of the preset.

    Returns:
        One row each, in order: our columns, and the raw row in ``task``.

    Raises:
        DataError: a field is missing or empty, or has no answer; names row, field and the columns
            there are, for the first few such rows.
    """
    known_source = ""
    if fields is None:
        if not rows:
            return []
        fields, known_source = preset(rows[0])
        logger.info("columns %s: taken as %s", ", ".join(rows[0]), _in_words(fields))
    elif not isinstance(fields, FieldMap):
        fields = FieldMap.of(fields)
    made, problems = [], []
    for number, row in enumerate(rows, start=1):
        try:
            own = row.get("data_source")
            source = data_source or (own if isinstance(own, str) else "") or known_source
            ours = {
                "agent_name": agent_name,
                "agent_cfg_path": agent_cfg_path,
                "data_source": source,
                "prompt": _prompt(row, fields),
            }
            truth = _ground_truth(row, fields)
            if truth is not None:
                ours["reward_model"] = {"style": "rule", "ground_truth": truth}
            made.append({**ours, "task": _plain(row, "")})
        except _Bad as problem:
            problems.append(f"row {number}: {problem}")
    if problems:
        raise DataError(listed("rows do not have what the field map names", problems))
    return made


class _Bad(Exception):
    """What is wrong with one row."""


def _in_words(fields: FieldMap) -> str:
    question = f"question in {fields.query}" if fields.query else f"messages in {fields.messages}"
    if not fields.ground_truth:
        return f"{question}, no ground truth"
    mark = _MARKS.get(fields.extract)
    return f"{question}, ground truth in {fields.ground_truth}" + (f" ({mark})" if mark else "")


def _value(row: Mapping[str, Any], path: str, meaning: str) -> Any:
    value: Any = row
    if path in row:  # a column whose name has a dot
        return row[path]
    for part in path.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    if value is _ABSENT:
        raise _Bad(
            f"{meaning}: there is no column {path!r}; the columns are {', '.join(map(str, row))}"
        )
    return value


def _prompt(row: Mapping[str, Any], fields: FieldMap) -> list[Message]:
    system = [{"role": "system", "content": fields.system_prompt}] if fields.system_prompt else []
    if fields.messages:
        messages = _value(row, fields.messages, "messages")
        if not isinstance(messages, list) or not messages:
            raise _Bad(
                f"messages: {fields.messages} is {messages!r}; it must be a list of "
                '{"role": ..., "content": ...}; for plain text name the column as query'
            )
        return system + _plain(messages, fields.messages)
    query = _value(row, fields.query or "", "query")
    if not isinstance(query, str) or not query.strip():
        raise _Bad(f"query: {fields.query} is {query!r}; it must be the text of the question")
    return [*system, {"role": "user", "content": query}]


def _ground_truth(row: Mapping[str, Any], fields: FieldMap) -> Any:
    if not fields.ground_truth:
        return None
    value = _value(row, fields.ground_truth, "ground_truth")
    if value is None or value == "":
        raise _Bad(
            f"ground_truth: {fields.ground_truth} is {value!r}; drop the row, or leave "
            "ground_truth out of the field map when the run scores itself"
        )
    if fields.extract == "as_is":
        return _plain(value, fields.ground_truth)
    found = _EXTRACT[fields.extract](value) if isinstance(value, str) else None
    if found is None:
        raise _Bad(
            f"ground_truth: {fields.ground_truth} holds no {_MARKS[fields.extract]}: "
            f"{str(value)[-60:]!r}; drop the row, or choose extract: as_is"
        )
    return found


def _plain(value: Any, where: str) -> Any:
    """The value as JSON holds it: times become text; what has no text form is refused."""
    if isinstance(value, Mapping):
        below = f"{where}." if where else ""
        return {str(key): _plain(inner, f"{below}{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{where}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise _Bad(
        f"{where}: holds {type(value).__name__}, which JSON cannot; leave the column out of the "
        "dataset, or make text of it (images and sound are not read)"
    )
