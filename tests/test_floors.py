"""The house has floors: imports go downwards only, and heavy libraries stay in their room."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "chatlearn"

FLOORS = {
    "chatlearn.types": 0,
    "chatlearn.interfaces": 0,
    "chatlearn.errors": 0,
    "chatlearn.config": 1,
    "chatlearn.observability": 1,
    "chatlearn.algorithm": 2,
    "chatlearn.data": 2,
    "chatlearn.rewards": 2,
    "chatlearn.models.agent": 3,
    "chatlearn.models.engine": 3,
    "chatlearn.models.policy": 3,
    "chatlearn.cluster": 4,
    "chatlearn.train": 5,
    "chatlearn.launch": 6,
    "chatlearn.cli": 6,
    "chatlearn.tuner": 6,
    "chatlearn.entrypoint": 6,
    "chatlearn.__main__": 6,
}
"""Rooms of one floor do not know each other, except on the lowest and the highest."""

ALLOWED = {
    "torch": ("chatlearn.algorithm", "chatlearn.models", "chatlearn.cluster"),
    "transformers": ("chatlearn.models", "chatlearn.cluster"),
    "langchain_core": ("chatlearn.models.agent",),
    "langgraph": ("chatlearn.models.agent",),
    "ray": ("chatlearn.cluster.ray", "chatlearn.cluster.ray_actors", "chatlearn.cluster.ray_place"),
    "math_verify": ("chatlearn.rewards",),
    "wandb": ("chatlearn.observability",),
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def room(module: str) -> str | None:
    fits = [r for r in FLOORS if module == r or module.startswith(r + ".")]
    return max(fits, key=len, default=None)


def imports(path: Path, *, at_import_time: bool = False):
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    nodes = tree.body if at_import_time else ast.walk(tree)
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


MODULES = list(modules())


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[m for m, _ in MODULES])
def test_imports_go_downwards(module, path):
    own = room(module)
    for name in imports(path):
        other = room(name)
        if own is None or other is None or own == other:
            continue
        below = FLOORS[other] < FLOORS[own]
        same = FLOORS[own] == FLOORS[other] and FLOORS[own] in (0, 6)
        assert below or same, f"{module} imports {name}"


@pytest.mark.parametrize(("library", "rooms"), ALLOWED.items(), ids=ALLOWED)
def test_libraries_stay_in_their_rooms(library, rooms):
    for module, path in MODULES:
        if module.startswith(rooms):
            continue
        users = [n for n in imports(path, at_import_time=True) if n.split(".")[0] == library]
        assert not users, f"{module} imports {library}"


@pytest.mark.parametrize("module", ["chatlearn", "chatlearn.config", "chatlearn.entrypoint"])
def test_light_imports_stay_light(module):
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'ray', 'transformers', 'langgraph', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
