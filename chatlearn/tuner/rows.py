"""The files a workflow is trained from: the agent's YAML and rows in our dataset layout.

Both are named by what is in them, so that the same call finds the same files and a run can resume.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatlearn.config.yaml_file import dump_yaml
from chatlearn.data.field_map import FieldMap, to_rows
from chatlearn.data.row_files import write_rows as write_lines
from chatlearn.errors import DataError

logger = logging.getLogger(__name__)

AGENT_NAME = "workflow"
DATA_SOURCE = "workflow"
"""``data_source`` of rows that bring none; no reward is registered for it."""


def inputs_folder(output_dir: str | Path, exp_name: str) -> Path:
    """Where the files of an experiment are put; beside its run folders."""
    return Path(output_dir).resolve() / exp_name / "inputs"


def write_agent_cfg(
    folder: Path, *, workflow: str, judge: str | None = None, **settings: Any
) -> Path:
    """The YAML of the ``workflow`` agent (``WorkflowAgentConfig`` has its keys).

    Returns:
        ``{folder}/agent-{digest}.yaml``.
    """
    text = dump_yaml({"workflow": workflow, "judge": judge, **settings})
    path = folder / f"agent-{_digest(text)}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_rows(
    rows: Sequence[Mapping[str, Any]],
    *,
    agent_cfg: Path,
    folder: Path,
    name: str = "train",
    fields: FieldMap | Mapping[str, str] | None = None,
    data_source: str | None = None,
    any_columns: bool = False,
) -> Path:
    """Raw rows as a dataset file of the ``workflow`` agent.

    Args:
        rows: as they were read; each stays whole in the column ``task``.
        agent_cfg: what ``write_agent_cfg`` returned.
        fields: columns of the question and the answer; None takes a known layout.
        data_source: of rows that bring none.
        any_columns: rows that fit no layout are taken too, the whole row as the prompt's text: for
            workflows that read the row and nothing else.

    Returns:
        ``{folder}/{name}-{digest}.jsonl``.

    Raises:
        DataError: rows do not have the columns; names row, column and what there is.
    """
    own = {"agent_name": AGENT_NAME, "agent_cfg_path": str(agent_cfg)}
    source = data_source or DATA_SOURCE
    try:
        made = to_rows(rows, fields, **own)
        made = [{**row, "data_source": row["data_source"] or source} for row in made]
    except DataError as error:
        if fields is not None or not any_columns:
            raise
        logger.info("rows are given to the workflow as they are (%s)", str(error).split("\n")[0])
        made = [{**own, "data_source": source, **_untouched(row)} for row in rows]
    digest = _digest(json.dumps([row["task"] for row in made], ensure_ascii=False))
    path = folder / f"{name}-{digest}.jsonl"
    write_lines(path, made)
    return path


def _untouched(row: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(dict(row), ensure_ascii=False, default=str)
    return {"prompt": [{"role": "user", "content": text}], "task": json.loads(text)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
