"""docs/coming_from.md keeps its promises: every row once, its test, commands and keys are there."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from chatlearn.config.schema import keys
from chatlearn.entrypoint import VERBS
from chatlearn.tuner.keys import find
from chatlearn.tuner.keys_table import KEYS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "coming_from.md").read_text()
ROWS = re.findall(r"^\| ([CDWJTV]\d+) \| (.+) \| (.+) \| (.+) \|$", PAGE, re.M)
PROMISED = [
    *(f"C{i}" for i in range(1, 13)),
    *(f"D{i}" for i in range(1, 8)),
    *(f"W{i}" for i in range(1, 11)),
    *(f"J{i}" for i in range(1, 10)),
    *(f"T{i}" for i in range(1, 16)),
    *(f"V{i}" for i in range(1, 7)),
]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_every_promise_is_there_once():
    assert [row[0] for row in ROWS] == PROMISED


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_its_test_and_its_files_are_there(row):
    _, _, here, test = row
    [named] = code(test)
    file, _, function = named.partition("::")
    assert re.search(rf"^(?:async )?def {function}\(", (ROOT / file).read_text(), re.M), named
    for path in re.findall(r"\b(?:template|scripts)/[\w./]+", here):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_keys_it_names_exist(row):
    ours = keys()
    for named in code(row[2]):
        root, _, name = named.partition(".")
        if root in ("ajet", "trinity") and " " not in named:
            assert find(name if root == "ajet" else named, KEYS), named
        elif root in ("runtime_args", "models"):
            assert named in ours, named


def commands() -> list[str]:
    found = [c for row in ROWS for c in code(row[2]) if c.startswith("chatlearn ")]
    return sorted({command.rstrip("… ").strip() for command in found})


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    _, verb, *words = shlex.split(command)
    assert verb in VERBS
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"chatlearn.cli.{verb}").add_arguments(parser)
    _, rest = parser.parse_known_args(words)
    assert not [word for word in rest if word.startswith("-")]
