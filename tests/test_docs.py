"""What the documents say is true: their Python runs, their commands and keys are known, the files
they name are there."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from chatlearn.config.schema import keys, sections
from chatlearn.entrypoint import VERBS
from chatlearn.models.agent.agent_module import AgentFactory
from chatlearn.tuner.keys import find
from chatlearn.tuner.keys_table import KEYS

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


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(), re.DOTALL)


def new_lines(diff: str) -> str:
    return "\n".join(line[1:] for line in diff.splitlines() if line.startswith("+"))


def is_key(dotted: str) -> bool:
    """Of a configuration, or of a project that ``chatlearn tune`` reads; dictionaries end there."""
    nodes = dict(sections())
    parts = dotted.split(".")
    return (
        dotted in nodes
        or any(".".join(parts[:n]) in keys() for n in range(1, len(parts) + 1))
        or bool(find(dotted, KEYS))
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_known(page):
    """Shell that parses, scripts that are there, options and keys that exist."""
    shell = [*blocks(page, "bash"), *map(new_lines, blocks(page, "diff"))]
    for block in shell:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for word in words:
                if re.fullmatch(r"(scripts|template|benchmarks|tests|chatlearn)/[\w./-]+", word):
                    assert (ROOT / word).exists(), line
            if words[:1] != ["chatlearn"] or "…" in words:
                continue
            assert words[1] in VERBS, line
            parser = argparse.ArgumentParser(exit_on_error=False)
            importlib.import_module(f"chatlearn.cli.{words[1]}").add_arguments(parser)
            _, rest = parser.parse_known_args([w for w in words[2:] if w != "&"])
            assert not [word for word in rest if word.startswith("-")], line
            assert all(is_key(word.partition("=")[0]) for word in rest), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_and_json_are_read(page):
    for block in blocks(page, "json"):
        json.loads(block)
    for block in blocks(page, "yaml"):
        read = yaml.safe_load(block)
        for root in {"runtime_args", "models"} & set(read):
            assert all(is_key(f"{root}.{key}") for key in read[root]), block


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
