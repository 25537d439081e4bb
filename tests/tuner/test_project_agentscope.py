"""A project of AgentJet's two files, of which only an import is changed: debugged and trained.

The project is ours (``ajet_project``), and then the one that AgentJet's first tutorial tells its
reader to write, put together from the page where a copy is there. Both are a ReActAgent with a
Python tool, a judge by AgentJet's own name for it, the model and the rows by their hub ids. Here
the ids are folders of the current directory. AgentScope 1.0.21 from PyPI, in its own processes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

HERE = Path(__file__).parent

pytestmark = pytest.mark.agentscope


@dataclass(frozen=True)
class Project:
    """What a project's two files say, and two rows for it."""

    config: str  # text of {name}/{name}.yaml
    workflow: str  # text of {name}/workflow.py
    name: str
    model: str
    dataset: str
    splits: tuple[str, str]
    rows: tuple[dict[str, str], dict[str, str]]
    repeats: int  # runs of a task
    madness: float  # reward of a run of nonsense
    sampling: str  # as debugging prints it
    code: str  # Python that answers the first row
    answer: str  # of the first row


def ours() -> Project:
    return Project(
        config=(HERE / "ajet_project" / "timetable.yaml").read_text(),
        workflow=(HERE / "ajet_project" / "workflow.py").read_text(),
        name="timetable",
        model="railway/clerk",
        dataset="railway/minutes",
        splits=("train", "validation"),
        rows=(
            {"question": "From 9:10 to 9:48: how long?", "answer": "48-10=38\n#### 38"},
            {"question": "Three stops of 4 minutes: how long?", "answer": "3*4=12\n#### 12"},
        ),
        repeats=2,
        madness=-0.25,
        sampling="temperature 0.9, top_p 1, top_k -1, at most 640 tokens a call",
        code="print(48 - 10)",
        answer="38",
    )


def the_pages(text: str) -> Project:
    """Its YAML blocks merged in their order, and its last block of workflow.py."""
    workflow = blocks(text, "workflow.py")[-1]
    assert workflow.count("from ajet import") == workflow.count("ajet") == 1
    config: dict = {}
    for block in blocks(text, "math_agent.yaml"):
        config = merged(config, yaml.safe_load(block))
    return Project(
        config=yaml.safe_dump(config, sort_keys=False),
        workflow=workflow.replace("from ajet import", "from chatlearn.tuner import"),
        name="math_agent",
        model="Qwen/Qwen2.5-14B-Instruct",
        dataset="gsm8k/main",
        splits=("train", "test"),
        rows=(
            {"question": "Two boxes of 36 pens: how many?", "answer": "2*36=72\n#### 72"},
            {"question": "Half of 48 pens: how many?", "answer": "48/2=24\n#### 24"},
        ),
        repeats=4,
        madness=0.0,
        sampling="temperature 0.7, top_p 1, top_k -1, at most 1024 tokens a call",
        code="print(2 * 36)",
        answer="72",
    )


def blocks(text: str, file: str) -> list[str]:
    """Code blocks of a page that are titled so."""
    return re.findall(rf'^```\w+ title="{re.escape(file)}"\n(.*?)^```$', text, re.M | re.S)


def merged(below: Mapping, above: Mapping) -> dict:
    """``above`` added to ``below``, key by key: what ``# ...`` in a block stands for."""
    both = {key: merged(below[key], above[key]) for key in below if is_tree(below, above, key)}
    return {**below, **above, **both}


def is_tree(below: Mapping, above: Mapping, key: str) -> bool:
    return isinstance(below[key], Mapping) and isinstance(above.get(key), Mapping)


@pytest.fixture(params=["ours", "the page's"])
def project(request, page) -> Project:
    return ours() if request.param == "ours" else the_pages(page("000"))


@pytest.fixture
def folder(project, tmp_path, tiny_policy) -> Path:
    """The folder that the commands are given in."""
    files = tmp_path / project.name
    files.mkdir()
    (files / f"{project.name}.yaml").write_text(project.config)
    (files / "workflow.py").write_text(project.workflow)
    policy = tmp_path / project.model
    shutil.copytree(tiny_policy, policy)
    # an untrained model ends a turn by chance: more tokens that do make it some 30 tokens long
    (policy / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(8))}))
    rows = tmp_path / project.dataset
    rows.mkdir(parents=True)
    for split in project.splits:
        table = pa.Table.from_pylist(list(project.rows))
        pq.write_table(table, rows / f"{split}-00000-of-00001.parquet")
    return tmp_path


@pytest.fixture
def tune(project, folder, agentscope_environment):
    """``chatlearn tune --conf`` of the project: what it prints."""

    def run(*options: str) -> str:
        command = ["tune", "--conf", f"{project.name}/{project.name}.yaml", *options]
        done = subprocess.run(
            [sys.executable, "-m", "chatlearn", *command],
            cwd=folder,
            env=agentscope_environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_debug_as_written(project, tune):
    said = tune("--backbone=debug", "--with-logview")
    assert "there is no log viewer yet" in said
    assert f"Debugging 2 tasks × {project.repeats} runs; {project.model} answers" in said
    assert project.sampling in said
    assert f"[user] {project.rows[0]['question']}" in said
    assert f"{2 * project.repeats} runs of 2 tasks" in said


def test_its_agent_calls_its_tool_and_its_judge_reads_the_answer(project, folder, tune):
    call = {"name": "execute_python_code", "arguments": {"code": project.code}}
    right = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>", f"It is \\boxed{{{project.answer}}}"]
    (folder / "answers.json").write_text(json.dumps([right, ["It is \\boxed{5}."]]))
    options = ["--backbone=debug", "--tasks=1", "--engine=scripted", "--answers=answers.json"]

    said = tune(*options)

    assert "calls execute_python_code(" in said
    printed = f"<returncode>0</returncode><stdout>{project.answer}\n</stdout><stderr></stderr>"
    assert f"[tool] {printed}" in said
    runs = project.repeats
    assert said.count("outcome finished, reward 1, success 1") == runs // 2
    assert f"{runs} runs of 1 tasks: {runs} finished; reward mean 0.500" in said
    assert "1 of 1 tasks would teach" in said


def test_local_trains_it(project, folder, tune):
    """All that is given beside the project's files is how little to do."""
    little = ["ajet.data.train_batch_size=2", "runtime_args.num_episode=2"]
    tune("--backbone=local", "--with-ray", *little)
    run = (folder / "outputs" / project.name / "latest").resolve()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in rows] == [1, 2]
    # it says letters at random: no answer is right, and some are nonsense
    assert all(project.madness <= row["reward/mean"] <= 0 for row in rows)
    assert {"checks/nonsense", "checks/wrong_toolcall"} <= rows[0].keys()
    assert (run / "checkpoints" / "episode_000002" / "hf" / "model.safetensors").exists()
    assert list((run / "tensorboard").iterdir())
