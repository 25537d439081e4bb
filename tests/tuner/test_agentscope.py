"""AgentScope 1.0.21 from PyPI: its tuner's complete example, and its agents in every form.

AgentScope needs an OpenAI SDK older than the one beside this suite, so these are processes of their
own with the folder of ``tests/agentscope_env.sh`` before the other packages.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.agentscope


@dataclass(frozen=True)
class Example:
    """A script that trains for three steps, and the folders that it names."""

    source: str
    workflow: str
    model: str
    dataset: str  # its file of rows, below the current directory
    row: dict[str, str]
    rows: int


def complete_example(page: str) -> str:
    """Last Python example of the page. The stored copy has bars between its lines, and its blocks
    are not indented: statements in a function are here, which is one level and the only one."""
    lines = [line for line in page.splitlines() if line.strip("|").strip()]
    code = re.findall(r"^```python\n(.*?)^```$", "\n".join(lines), re.M | re.S)[-1]
    if re.search(r"^ ", code, re.M):
        return code
    return re.sub(r"^(?!from |async def |if __name__)", "    ", code, flags=re.M)


@pytest.fixture(params=["ours", "the page's"])
def example(request, page) -> Example:
    if request.param == "ours":
        return Example(
            (HERE / "agentscope_letters.py").read_text(),
            workflow="name_a_letter",
            model="school/speller",
            dataset="alphabet/train.jsonl",
            row={"riddle": "Which letter follows d?", "letter": "e"},
            rows=24,
        )
    theirs = complete_example(page("002"))
    assert theirs.count("agentscope.tuner") == 1
    return Example(
        theirs.replace("from agentscope.tuner import", "from chatlearn.tuner import"),
        workflow="run_react_agent",
        model="Qwen/Qwen3-0.6B",
        dataset="my_dataset/train.jsonl",
        row={"question": "d + 1?", "answer": "e"},
        rows=96,
    )


def test_the_complete_example_trains_with_only_its_imports_changed(
    example, tmp_path, tiny_policy, agentscope_environment
):
    """Model id and batch stay too: the id is a folder here, and so is the dataset. Ours are three
    steps of 32 runs, the page's three of 256."""
    policy = tmp_path / example.model
    shutil.copytree(tiny_policy, policy)
    # an untrained model ends a turn by chance: more tokens that do make it some 30 tokens long
    (policy / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(8))}))
    rows = tmp_path / example.dataset
    rows.parent.mkdir()
    # it says letters at random: the one that is asked for is in a part of its answers
    rows.write_text(example.rows * (json.dumps(example.row) + "\n"))
    (tmp_path / "main.py").write_text(example.source)

    done = subprocess.run(
        [sys.executable, "main.py"],
        cwd=tmp_path,
        env=agentscope_environment,
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    run = (tmp_path / "outputs" / example.workflow / "latest").resolve()
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in curve] == [1, 2, 3]
    assert all(0 < row["reward/mean"] < 1 for row in curve)
    assert (run / "checkpoints/episode_000003/hf/model.safetensors").is_file()
    assert list((run / "tensorboard").glob("events.*"))


def test_its_agents_in_every_form(agentscope_environment):
    files = [HERE / "agentscope_forms.py", HERE.parent / "models/agent/test_endpoint_agentscope.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        cwd=HERE.parent.parent,
        env=agentscope_environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout
