"""``tune()`` itself: real runs of a tiny model, as a user writes them."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from chatlearn.errors import ConfigError
from chatlearn.tuner import AlgorithmConfig, DatasetConfig, TunerModelConfig, WorkflowOutput, tune
from chatlearn.tuner.naming import load_object

WORKFLOWS = Path(__file__).with_name("workflows.py")
answers, asks_by_openai, contains_answer, Remembers = (
    load_object(f"{WORKFLOWS}->{name}", "the tests")
    for name in ("answers", "asks_by_openai", "contains_answer", "Remembers")
)
ROWS = [{"question": f"say {letter}", "answer": letter} for letter in "abcdefgh"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory of a user, with ``my_dataset/{train,test}.jsonl``."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "my_dataset"
    data.mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:2])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def small(folder, tiny_policy):
    """Arguments of a run of two steps."""
    return {
        "model": TunerModelConfig(model_path=tiny_policy, max_model_len=96, max_tokens=8),
        "train_dataset": DatasetConfig(path="my_dataset", split="train"),
        "algorithm": AlgorithmConfig(group_size=2, batch_size=4, learning_rate=0.01),
    }


def test_a_function_a_judge_a_dataset_one_call(folder, small):
    result = tune(
        answers, contains_answer, **small, eval_dataset=DatasetConfig("my_dataset", split="test")
    )

    assert result.run == (folder / "outputs/answers/latest").resolve()
    assert result.checkpoint == result.run / "checkpoints/episode_000002/hf"
    assert (result.checkpoint / "model.safetensors").is_file()
    assert list((result.run / "tensorboard").iterdir())
    assert [row["episode"] for row in result.curve] == [1, 2]
    for row in result.curve:
        assert 0 <= row["reward/mean"] <= 1
        assert row["agent/judged"] == 1.0
        assert row["agent/letters"] > 0
    assert "eval/reward_mean" in result.curve[-1]
    saved = yaml.safe_load((result.run / "config.yaml").read_text())
    assert saved["runtime_args"]["sample_per_episode"] == 8
    assert saved["models"]["policy"]["max_tokens_per_turn"] == 8
    assert saved["runtime_args"]["import_modules"] == ["chatlearn.tuner.workflow_agent"]


def test_an_openai_client_and_a_closure_inside_a_running_loop(small):
    """As in a notebook: an event loop runs already, and the workflow is in no file."""

    async def notebook():
        async def cell(task, model):
            return await asks_by_openai(task, model)

        cell.__annotations__ = {"model": "AsyncOpenAI"}
        return tune(cell, contains_answer, **small, experiment_name="cell")

    result = asyncio.run(notebook())

    assert [row["outcome/finished"] + row["outcome/truncated"] for row in result.curve] == [8, 8]


def test_a_class_and_a_judge_by_name(small):
    small["train_dataset"] = DatasetConfig("my_dataset", split="train", total_steps=1)
    result = tune(Remembers, "math_answer", **small)

    assert len(result.curve) == 1
    assert result.curve[0]["agent/runs_of_this_object"] == 1.0
    assert result.curve[0]["node/solver/turns"] == 8.0


def test_a_script_trains_once_and_finished_runs_are_kept(folder, tiny_policy):
    """``python main.py``: the file is not imported a second time."""
    (folder / "main.py").write_text(
        f"""
from chatlearn.tuner import *

print("imported as", __name__)

async def workflow(task, model):
    reply = await model.ainvoke(task["question"])
    return WorkflowOutput(reward=len(set(reply.content)) / 8)

if __name__ == "__main__":
    result = tune(
        workflow,
        model=TunerModelConfig({tiny_policy!r}, max_model_len=64, max_tokens=8),
        train_dataset=DatasetConfig("my_dataset/train.jsonl"),
        algorithm=AlgorithmConfig("rloo", group_size=2, batch_size=8),
    )
    print("rewards", len(result.curve))
"""
    )
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["imported as __main__", "rewards 1"]
    cfg = yaml.safe_load(next(folder.glob("outputs/workflow/inputs/agent-*.yaml")).read_text())
    assert cfg == {"workflow": f"{(folder / 'main.py').resolve()}->workflow", "judge": None}


def test_arguments_win_over_the_file_and_overrides_over_both(folder, small, tiny_policy, caplog):
    Path("mine.yaml").write_text(
        "runtime_args:\n  num_episode: 1\n  exp_name: from_file\n  seed: 1\n"
        "models:\n  policy:\n    temperature: 0.5\n    max_seq_len: 96\n"
        "    max_prompt_tokens_length: 64\n    max_response_tokens_length: 16\n"
    )
    with caplog.at_level(logging.INFO):
        result = tune(
            answers,
            contains_answer,
            TunerModelConfig(tiny_policy, temperature=0.9),
            DatasetConfig("my_dataset", split="train"),
            algorithm=small["algorithm"],
            config_path="mine.yaml",
            overrides=["runtime_args.seed=3"],
        )
    assert "models.policy.temperature = 0.9 (in mine.yaml: 0.5)" in caplog.text
    saved = yaml.safe_load((result.run / "config.yaml").read_text())
    assert result.run.parent.name == "from_file"
    assert saved["runtime_args"]["num_episode"] == 1
    assert saved["runtime_args"]["seed"] == 3
    assert saved["models"]["policy"]["temperature"] == 0.9


async def sums(task, model): ...


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"workflow_func": len}, "is not async"),
        ({"judge_func": lambda task, answer_text: 1.0}, "nobody supplies answer_text"),
        ({"judge_func": "math_anwser"}, "math_answer"),
        ({"train_dataset": None}, "tune(train_dataset=…) is not given"),
        ({"model": None}, "models.policy_trainer.load: is not set"),
        (
            {"auxiliary_models": {"judge": TunerModelConfig("my/judge")}},
            "serve my/judge with SGLang and give {'base_url': …, 'model': …}",
        ),
        ({"overrides": ["runtime_args.sed=1"]}, "did you mean `runtime_args.seed`"),
    ],
)
def test_bad_arguments_are_one_clear_error(small, arguments, says):
    with pytest.raises(ConfigError) as error:
        tune(**{"workflow_func": sums, **small, **arguments})
    assert says in str(error.value)


def test_a_closure_is_refused_on_a_cluster(small):
    Path("ray.yaml").write_text("runtime_args: {cluster: ray, rollout_backend: sglang}\n")

    async def closure(task, model):
        return WorkflowOutput(reward=1.0)

    with pytest.raises(ConfigError, match=r"workers of runtime_args\.cluster=ray cannot"):
        tune(closure, **small, config_path="ray.yaml")


def test_rows_of_any_columns_reach_a_function(folder, small):
    Path("odd.jsonl").write_text('{"left": 2, "right": {"deep": [3]}}\n' * 4)
    seen = []

    async def reads(task, model):
        seen.append(task)
        await model.ainvoke("say")
        return WorkflowOutput(reward=float(len(seen) % 2))

    small["train_dataset"] = DatasetConfig("odd.jsonl")
    tune(reads, **small)

    assert seen[0] == {"left": 2, "right": {"deep": [3]}}
