"""What the preprocessing scripts share: finding the downloaded splits, and writing ours."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatlearn.data.row_files import SUFFIXES, read_rows, write_rows
from chatlearn.errors import DataError

SPLITS = ("train", "test")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclass(frozen=True, slots=True)
class Source:
    """A public question-and-answer dataset, and how its rows become ours."""

    data_source: str
    """Name the reward function is registered for."""
    modelscope_id: str
    """For the download command in error messages."""
    folder: str
    """Where the download keeps the parquet files, inside the dataset's folder."""
    question: str
    """Column of the question."""
    solution: str
    """Column of the worked solution; it is not written, so that no agent can read it."""
    answer: Callable[[str], str | None]
    """Solution to ground truth; None when the solution has no answer."""
    system_prompt: str


def preprocess(source: Source, argv: Sequence[str] | None) -> int:
    """The command line of a ``Source``: read both splits, write both files, print a summary."""
    arguments = _arguments(source, argv)
    try:
        rows = {split: _convert(source, split, arguments) for split in SPLITS}
        write_splits(Path(arguments.local_dir), {split: kept for split, (kept, _) in rows.items()})
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
    for split, (kept, skipped) in rows.items():
        print(f"{split}: {len(kept)} rows, {skipped} skipped (no answer in the solution)")
    print_first_row(rows["train"][0])
    return 0


def add_agent_options(
    parser: argparse.ArgumentParser, *, agent_name: str, agent_cfg_path: str, system_prompt: str
) -> None:
    """The options every script has, with the script's defaults."""
    parser.add_argument("--local_dir", required=True, help="folder to write train_agent.json to")
    parser.add_argument("--agent_name", default=agent_name, help="name given to @register(...)")
    parser.add_argument(
        "--agent_cfg_path",
        default=agent_cfg_path,
        help="YAML of the agent, relative to where training starts; '' for none",
    )
    parser.add_argument("--system_prompt", default=system_prompt, help="'' for none")


def make_row(
    arguments: argparse.Namespace,
    *,
    data_source: str,
    question: str,
    ground_truth: str,
    ability: str,
    extra_info: dict[str, Any],
) -> dict[str, Any]:
    """One row in the layout that ``prompt_dataset`` reads."""
    system = [{"role": "system", "content": arguments.system_prompt}]
    return {
        "agent_name": arguments.agent_name,
        "agent_cfg_path": arguments.agent_cfg_path or None,
        "data_source": data_source,
        "prompt": [
            *(system if arguments.system_prompt else []),
            {"role": "user", "content": question},
        ],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": extra_info,
    }


def write_splits(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Write ``{split}_agent.json`` for every split; a split without rows is refused."""
    for split, kept in rows.items():
        if not kept:
            raise DataError(f"the {split} split would be empty; nothing was written")
    for split, kept in rows.items():
        path = folder / f"{split}_agent.json"
        write_rows(path, kept)
        print(f"wrote {path}")


def print_first_row(rows: Sequence[dict[str, Any]]) -> None:
    """Question and ground truth of the first row, to look at before training on it."""
    print(f"first question: {rows[0]['prompt'][-1]['content']}")
    print(f"first ground truth: {rows[0]['reward_model']['ground_truth']}")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of rows; give 1 or more")
    return value


def find_split(input_dir: Path, split: str, *, folder: str, download: str) -> list[Path]:
    """The files of one split, in order: a single file, or all shards ``{split}-0000i-of-0000n``.

    They lie in ``input_dir/folder``, as a download leaves them, or in ``input_dir`` itself.

    Args:
        download: command that fetches the dataset, for the error message.

    Raises:
        DataError: nothing is found, shards are missing, or several files could be meant.
    """
    places = [place for place in (input_dir / folder, input_dir) if place.is_dir()]
    found = [path for place in places for path in sorted(place.iterdir()) if _is_of(path, split)]
    shards = [path for path in found if _SHARD.search(path.stem)]
    if len(found) == 1 and not shards:
        return found
    if not found:
        listing = "\n  ".join(_listing(input_dir))
        raise DataError(
            f"no {split} split in {input_dir}: looked for {split}.parquet, {split}.json, "
            f"{split}.jsonl and {split}-00000-of-0000n.parquet there and in {folder}/; found:\n"
            f"  {listing}\nget it with: {download}"
        )
    wanted = {int(_SHARD.search(path.stem)[2]) for path in shards}  # type: ignore[index]
    numbers = [int(_SHARD.search(path.stem)[1]) for path in shards]  # type: ignore[index]
    names = ", ".join(str(path.relative_to(input_dir)) for path in found)
    if len(shards) != len(found) or len(wanted) != 1 or len(set(numbers)) != len(numbers):
        raise DataError(
            f"several files could be the {split} split of {input_dir}: {names}; keep one"
        )
    if numbers != list(range(wanted.pop())):
        raise DataError(f"shards of the {split} split of {input_dir} are missing: found {names}")
    return shards


def _is_of(path: Path, split: str) -> bool:
    stem = _SHARD.sub("", path.stem)
    return path.is_file() and path.suffix in SUFFIXES and stem == split


def _listing(folder: Path) -> list[str]:
    if not folder.is_dir():
        return ["(no such folder)"]
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    more = [f"... and {len(files) - 12} more"] if len(files) > 12 else []
    return files[:12] + more or ["(nothing)"]


def _arguments(source: Source, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"{source.data_source} as agent tasks")
    parser.add_argument(
        "--input_dir", required=True, help=f"folder of the downloaded {source.modelscope_id}"
    )
    add_agent_options(
        parser,
        agent_name="math_eval",
        agent_cfg_path="template/agent/math_eval.yaml",
        system_prompt=source.system_prompt,
    )
    parser.add_argument("--max_rows", type=positive, help="only the first rows of each split")
    return parser.parse_args(argv)


def _convert(
    source: Source, split: str, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], int]:
    """The rows of one split, and how many were skipped because their solution has no answer."""
    input_dir = Path(arguments.input_dir)
    download = (
        f"modelscope download --dataset {source.modelscope_id} --local_dir {arguments.input_dir}"
    )
    files = find_split(input_dir, split, folder=source.folder, download=download)
    placed = [(file, place, row) for file in files for place, row in read_rows(file)]
    kept: list[dict[str, Any]] = []
    skipped = 0
    for index, (file, place, row) in enumerate(placed[: arguments.max_rows]):
        columns = sorted(row) if isinstance(row, dict) else []
        for column in (source.question, source.solution):
            if column not in columns or not isinstance(row[column], str):
                raise DataError(
                    f"{file}, {place}: {column!r} is missing or not text; the row has "
                    f"{', '.join(columns) or 'no columns'}; is this {source.modelscope_id}?"
                )
        ground_truth = source.answer(row[source.solution])
        if not ground_truth:
            skipped += 1
            continue
        new = make_row(
            arguments,
            data_source=source.data_source,
            question=row[source.question],
            ground_truth=ground_truth,
            ability="math",
            extra_info={"split": split, "index": index},
        )
        rest = {k: v for k, v in row.items() if k not in (source.question, source.solution, *new)}
        kept.append(new | rest)
    return kept, skipped
