"""The table in docs/langgraph.md has every feature, and none that fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("table", Path(__file__).with_name("table.py"))
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)


def test_the_table_lists_every_feature_as_it_is():
    rows = table.in_doc(table.DOC.read_text())
    assert [row[0] for row in rows] == table.features(), (
        "write it anew: scripts/test_langgraph_versions.sh --table"
    )
    assert all(cell == "yes" or cell.startswith("no (") for row in rows for cell in row[1:])


def test_features_have_one_test_each():
    assert len(set(table.features())) == len(table.features())
