"""Sums made here, nothing to download: train_agent.json and test_agent.json.

    python chatlearn/data/data_preprocess/arithmetic_agent.py --local_dir D --kind two_digit

``two_digit`` has 24,300 problems (10..99 with + - *), ``one_digit`` 243 (1..9): small enough for a
tiny model to improve on within minutes, and no problem is in both splits.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: its folder is on the path instead of the repository
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from chatlearn.data.data_preprocess.source_files import (
    add_agent_options,
    make_row,
    positive,
    print_first_row,
    write_splits,
)
from chatlearn.errors import DataError

RANGES = {"two_digit": range(10, 100), "one_digit": range(1, 10)}
TEST_ROWS = {"two_digit": 256, "one_digit": 48}
_OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def problems(kind: str, seed: int) -> list[tuple[str, int]]:
    """Every (expression, value) of a kind, for example ``("37*24", 888)``, in a seeded order."""
    numbers = RANGES[kind]
    found = [
        (f"{a}{sign}{b}", compute(a, b))
        for a in numbers
        for b in numbers
        for sign, compute in _OPERATIONS.items()
    ]
    random.Random(seed).shuffle(found)
    return found


def split(
    found: Sequence[tuple[str, int]], *, train_rows: int | None, test_rows: int
) -> dict[str, Sequence[tuple[str, int]]]:
    """Disjoint splits. The test rows come first, so ``train_rows`` does not change them."""
    left = len(found) - test_rows
    if left < (train_rows or 1):
        raise DataError(
            f"--train_rows {train_rows or 1} and --test_rows {test_rows} are more than the "
            f"{len(found)} problems there are"
        )
    end = len(found) if train_rows is None else test_rows + train_rows
    return {"train": found[test_rows:end], "test": found[:test_rows]}


def main(argv: Sequence[str] | None = None) -> int:
    """Read ``argv`` (default: the command line) and write the two files."""
    arguments = _arguments(argv)
    try:
        if "{expression}" not in arguments.prompt_template:
            raise DataError("--prompt_template must contain {expression}")
        splits = split(
            problems(arguments.kind, arguments.seed),
            train_rows=arguments.train_rows,
            test_rows=arguments.test_rows or TEST_ROWS[arguments.kind],
        )
        rows = {name: _rows(name, found, arguments) for name, found in splits.items()}
        write_splits(Path(arguments.local_dir), rows)
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
    for name, made in rows.items():
        print(f"{name}: {len(made)} rows")
    print_first_row(rows["train"])
    return 0


def _rows(
    name: str, found: Sequence[tuple[str, int]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    return [
        make_row(
            arguments,
            data_source="chatlearn/arithmetic",
            question=arguments.prompt_template.replace("{expression}", expression),
            ground_truth=str(value),
            ability="arithmetic",
            extra_info={"split": name, "index": index, "expression": expression},
        )
        for index, (expression, value) in enumerate(found)
    ]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="sums as agent tasks")
    add_agent_options(parser, agent_name="calculator", agent_cfg_path="", system_prompt="")
    parser.add_argument("--kind", choices=sorted(RANGES), default="two_digit")
    parser.add_argument("--seed", type=int, default=0, help="order, and what is in which split")
    parser.add_argument("--train_rows", type=positive, help="default: all that are left")
    parser.add_argument(
        "--test_rows", type=positive, help=f"default: {TEST_ROWS} for the kinds of problem"
    )
    parser.add_argument("--prompt_template", default="Compute {expression}.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
