"""What the documents say is true: their Python runs, and the files they name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chatlearn.models.agent.agent_module import AgentFactory

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_and_their_agents_build(page, monkeypatch, llm, tokenizer):
    registry: dict = {}
    monkeypatch.setattr("chatlearn.models.agent.agent_module._graph_registry", registry)
    monkeypatch.setattr("chatlearn.rewards.registry._functions", {})
    namespace: dict = {"__name__": page.stem}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), namespace)
    for name in registry:
        AgentFactory(llm, tokenizer).agent(name, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_tree_in_the_readme_is_there():
    tree = re.search(
        r"## Where things are\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    folders: list[tuple[int, Path]] = [(-1, ROOT)]
    seen = 0
    for line in tree[1].splitlines():
        indent = len(line) - len(line.lstrip())
        names = re.split(r"\s{2,}", line.strip())[0]
        while folders[-1][0] >= indent:
            folders.pop()
        for name in names.split(", "):
            path = folders[-1][1] / name
            assert path.exists(), f"README names {path.relative_to(ROOT)}"
            seen += 1
            if name.endswith("/"):
                folders.append((indent, path))
    assert seen > 40
