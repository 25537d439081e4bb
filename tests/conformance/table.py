"""The table of features in docs/langgraph.md, made from what ``--conformance-table`` wrote."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
DOC = HERE.parent.parent / "docs" / "langgraph.md"
BEGIN, END = "<!-- the table is written by scripts/test_langgraph_versions.sh -->", "<!-- end -->"
_FEATURE = re.compile(r"""@pytest\.mark\.feature\((?:"(.+?)"|'(.+?)')\)\n""")


def features() -> list[str]:
    """Every feature that a test here is marked with, in order."""
    texts = [path.read_text() for path in sorted(HERE.glob("test_*.py"))]
    return [a or b for text in texts for a, b in _FEATURE.findall(text)]


def in_doc(text: str) -> list[list[str]]:
    """Cells of the rows of the table in the document, without its head."""
    table = text.partition(BEGIN)[2].partition(END)[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return rows[2:]


def table(results: Sequence[dict]) -> str:
    """Markdown: a row a feature, a column a version; what is skipped has its reason below."""
    results = sorted(results, key=lambda r: [int(n) for n in _version(r).split(".")])
    reasons: list[str] = []

    def cell(outcome: str) -> str:
        kind, _, reason = outcome.partition(": ")
        if kind != "skipped":
            return {"passed": "yes"}.get(kind, "**fails**")
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    head = ["feature"] + [
        f"langgraph {_version(r)}, langchain-core {r['versions']['langchain-core']}"
        for r in results
    ]
    rows = [head, ["---"] * len(head)]
    rows += [[name, *(cell(r["features"][name]) for r in results)] for name in features()]
    notes = [f"({i}) {reason}." for i, reason in enumerate(reasons, start=1)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _version(result: dict) -> str:
    return result["versions"]["langgraph"]


def main(files: Sequence[str]) -> None:
    written = table([json.loads(Path(file).read_text()) for file in files])
    text = DOC.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    DOC.write_text(f"{before}{BEGIN}\n\n{written}\n\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
