"""The table: every known key of ``ajet:``, ``astuner:`` and ``astune:`` projects.

Names of all three generations are in one table, because their files are mixed in practice. The rows
without a root stand below any of the three; ``trinity.`` and the other roots are named.
"""

from __future__ import annotations

from collections.abc import Mapping

from chatlearn.tuner.keys import Key
from chatlearn.tuner.keys_rollout import PROJECT, READER, ROLLOUT, WORKFLOW
from chatlearn.tuner.keys_trainer import PASS_THROUGH, REST, TRAINER

ROOTS = ("ajet", "astuner", "astune")
"""A project has exactly one of them."""
OWN_ROOT = "chatlearn"
"""Our own keys beside theirs; they win."""
PASSIVE_ROOTS: Mapping[str, str] = {
    "hydra": "where hydra finds defaults: ours are built in",
    "defaults": "which defaults are merged: ours are built in",
    "backbone": "which engine trains: --backbone=debug|local|ray says it",
}
"""Roots that are accepted whole, and why they mean nothing here."""
OTHER_ROOTS = ("trinity", "actor_rollout_ref", "algorithm", "critic", "trainer")

KEYS: tuple[Key, ...] = (
    *PROJECT,
    *WORKFLOW,
    *READER,
    *ROLLOUT,
    *TRAINER,
    *REST,
    *PASS_THROUGH,
)
"""In the order of docs/projects.md; the first that matches counts."""

_WORDS = {"acts": "acts", "said": "no meaning here", "only": "one value", "refused": "refused"}


def table() -> str:
    """``KEYS`` as the Markdown table of docs/projects.md."""
    lines = ["| their key | here | |", "|---|---|---|"]
    for key in KEYS:
        if key.fate == "acts":
            ours = f"`{key.ours}`" if "." in key.ours or key.ours.startswith("-") else key.ours
            note = key.note
        elif key.fate == "only":
            ours, note = f"only `{str(key.value).lower()}`", f"else refused: {key.note}"
        else:
            ours, note = _WORDS[key.fate], key.note
        lines.append(f"| `{key.name}` | {ours} | {note} |")
    return "\n".join(lines)
