"""Bad input gets one clear error: what, where and what to do. Nothing is lost, exit code 1.

Each row breaks one thing of a project that works, and quotes what the user must be told.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest

from chatlearn.entrypoint import main

ROW = {
    "agent_name": "asks_twice",
    "data_source": "letters",
    "prompt": [{"role": "user", "content": "x"}],
}


def file(name, text):
    """Write a file of the project."""
    return lambda folder: (folder / name).write_text(text)


def row(**changes):
    """One dataset row, changed; a value of None removes the column."""
    changed = {k: v for k, v in {**ROW, **changes}.items() if v is not None}
    return file("train.jsonl", json.dumps(changed) + "\n")


def model_without_template(folder):
    shutil.copytree(folder.parent / "model", folder / "model", dirs_exist_ok=True)
    (folder / "model" / "chat_template.jinja").unlink()


CASES = {
    "unknown key": (
        None,
        ["models.policy.temprature=1"],
        r"models\.policy\.temprature.*models\.policy\.temperature",
    ),
    "mistyped value": (None, ["runtime_args.num_episode=many"], r"runtime_args\.num_episode.*many"),
    "value out of range": (None, ["models.policy.top_p=1.5"], r"models\.policy\.top_p.*1\.5"),
    "greedy training": (None, ["models.policy.temperature=0"], r"models\.policy\.temperature"),
    "indivisible batch": (
        None,
        ["runtime_args.sample_per_episode=10"],
        r"sample_per_episode.*10.*num_inference_per_prompt",
    ),
    "old spelling": (
        None,
        ["runtime_args.num_inference_per_prompt=8"],
        r"models\.policy\.num_inference_per_prompt",
    ),
    "a Python without SGLang": (
        None,
        ["runtime_args.rollout_backend=sglang"],
        r"sglang_python=\S+ has no SGLang .*set models\.policy\.sglang_python to a Python with",
    ),
    "a cluster without SGLang": (
        None,
        ["runtime_args.cluster=ray"],
        r"rollout_backend = embedded.*set runtime_args\.rollout_backend=sglang",
    ),
    "missing dataset": (
        None,
        ["runtime_args.data_path=trian.jsonl"],
        r"trian\.jsonl.*train\.jsonl",
    ),
    "empty dataset": (file("train.jsonl", ""), [], r"train\.jsonl.*(empty|no rows)"),
    "json that does not parse": (file("train.jsonl", '{"a": 1\n'), [], r"train\.jsonl.*line 1"),
    "row without agent_name": (row(agent_name=None), [], r"train\.jsonl.*line 1.*agent_name"),
    "row without prompt": (row(prompt=None), [], r"line 1.*prompt"),
    "unknown agent": (
        row(agent_name="ask_twice"),
        [],
        r"'ask_twice' is not registered.*'asks_twice'",
    ),
    "missing agent yaml": (row(agent_cfg_path="no.yaml"), [], r"no\.yaml"),
    "agent yaml that does not parse": (
        lambda f: (row(agent_cfg_path="bad.yaml")(f), file("bad.yaml", "a: [1\n")(f)),
        [],
        r"bad\.yaml.*line",
    ),
    "no reward": (row(data_source="nobody"), [], r"no reward.*'nobody'.*reward_fn"),
    "reward function that is not there": (
        row(reward_fn="my_agent.py:leters"),
        [],
        r"leters.*letters",
    ),
    "user file with an error": (
        file("my_agent.py", "import nothing_of_the_kind\n"),
        [],
        r"my_agent\.py.*nothing_of_the_kind",
    ),
    "user file that is not there": (
        None,
        ["runtime_args.import_modules=[mine.py]"],
        r"no file .*mine\.py",
    ),
    "model that is not there": (None, ["models.policy_trainer.load=no/model"], r"no/model"),
    "model without a chat template": (
        model_without_template,
        ["models.policy_trainer.load=model"],
        r"chat template",
    ),
    "prompts longer than allowed": (
        None,
        ["models.policy.max_prompt_tokens_length=5"],
        r"all 12 prompts.*max_prompt_tokens_length",
    ),
    "config file that is not there": (None, ["--config-file", "no.yaml"], r"no\.yaml"),
    "config that does not parse": (
        file("bad.yaml", "runtime_args: [\n"),
        ["--config-file", "bad.yaml"],
        r"bad\.yaml.*line",
    ),
    "graph that always raises": (
        lambda f: (f / "my_agent.py").write_text(
            (f / "my_agent.py").read_text().replace('("user", "again")', "1 / 0")
        ),
        [],
        r"agent_error.*max_failed_fraction.*ZeroDivisionError",
    ),
    "reward that is not a number": (
        lambda f: (f / "my_agent.py").write_text(
            re.sub(r"return sum.*", 'return float("nan")', (f / "my_agent.py").read_text())
        ),
        [],
        r"judge_error.*letters.*nan",
    ),
    "reward that returns nothing": (
        lambda f: (f / "my_agent.py").write_text(
            re.sub(r"return sum.*", "return None", (f / "my_agent.py").read_text())
        ),
        [],
        r"judge_error.*letters.*None",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_error(case, project, tmp_path, monkeypatch, capfd):
    breaks, overrides, told = CASES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("chatlearn.models.agent.agent_module._graph_registry", {})
    monkeypatch.setattr("chatlearn.rewards.registry._functions", {})
    if breaks is model_without_template:
        shutil.copytree(project.policy, tmp_path.parent / "model", dirs_exist_ok=True)
    if breaks:
        breaks(tmp_path)

    code = main(["grpo", *project.settings, "runtime_args.num_episode=1", *overrides])

    error = capfd.readouterr().err
    assert code == 1
    assert re.search(told, error, re.DOTALL), error
    assert "Traceback (most recent call last)" not in error.split("Error: ")[0]
    assert not list(tmp_path.glob("outputs/*/*/checkpoints/*"))
