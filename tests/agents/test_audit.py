"""The audit must be seen to fail: one rollout file is corrupted in one place, and it names it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from audit import audit

FILE = "episode_000001.jsonl"
Corrupt = Callable[[dict], None]


@pytest.fixture
def corrupted(trained, tmp_path):
    """Audit a copy of episode 1 that holds only one agent's group, whose first run is changed."""

    def check(agent: str, corrupt: Corrupt | None) -> list[str]:
        lines = (trained.folder / "rollouts" / FILE).read_text().splitlines()
        group = [r for r in map(json.loads, lines) if r["agent_name"] == agent]
        run = max(group, key=lambda r: (any(t["excluded"] for t in r["turns"]), len(r["turns"])))
        group.sort(key=lambda r: r is not run)
        if corrupt is not None:
            corrupt(run)
        folder = tmp_path / "run"
        (folder / "rollouts").mkdir(parents=True)
        (folder / "checkpoints").symlink_to(trained.folder / "checkpoints")
        text = "".join(json.dumps(record) + "\n" for record in group)
        (folder / "rollouts" / FILE).write_text(text)
        return audit(folder, Path(trained.start)).problems

    return check


def sample_of(run: dict) -> tuple[dict, int, int]:
    """The first sample, and where in it the first run of trained tokens begins and ends."""
    mask = run["samples"][0]["loss_mask"]
    start = mask.index(1)
    return run["samples"][0], start, start + [*mask[start:], 0].index(0)


def shifted_logprob(run):
    run["turns"][1]["logprobs"][2] += 3e-4


def another_temperature(run):
    run["turns"][1]["temperature"] = 1.0


def another_version(run):
    run["turns"][1]["versions"] = [1, 1]


def another_token_in_a_prompt(run):
    run["turns"][1]["prompt_ids"][3] += 1


def no_parent(run):
    run["turns"][2]["parent"] = None


def parent_too_high(run):
    run["turns"][2]["parent"] = 0


def parent_of_another_branch(run):
    run["turns"][4]["parent"] = 2


def mask_moved_by_one(run):
    sample, start, _ = sample_of(run)
    for key in ("loss_mask", "rollout_logprobs", "advantages"):
        sample[key].insert(start, 0)
        sample[key].pop()


def trained_twice(run):
    run["samples"].append(run["samples"][0])


def sample_lost(run):
    run["samples"].pop()


def token_not_trained(run):
    sample, start, _ = sample_of(run)
    for key in ("loss_mask", "rollout_logprobs", "advantages"):
        sample[key][start + 1] = 0


def prompt_trained(run):
    sample, start, _ = sample_of(run)
    sample["loss_mask"][start - 1] = 1


def logprobs_swapped(run):
    sample, start, _ = sample_of(run)
    row = sample["rollout_logprobs"]
    row[start], row[start + 1] = row[start + 1], row[start]


def trained_at_another_temperature(run):
    run["samples"][0]["temperatures"] = 1.0


def another_advantage_in_a_sample(run):
    sample, start, _ = sample_of(run)
    sample["advantages"][start + 1] += 0.1


def excluded_but_trained(run):
    run["turns"][1]["excluded"] = "superseded"


def superseded_but_not_trained(run):
    next(turn for turn in run["turns"] if turn["excluded"])["excluded"] = ""


def another_advantage(run):
    run["advantage"] += 0.1
    for sample in run["samples"]:
        sample["advantages"] = [a + 0.1 if a else a for a in sample["advantages"]]


def message_changed(run):
    tool = next(message for message in run["messages"] if message["role"] == "tool")
    tool["content"] += "!"


def newline_lost(run):
    """The boundary between two turns lacks the newline after the end-of-turn token."""
    first, second = run["turns"][:2]
    del second["prompt_ids"][len(first["prompt_ids"]) + len(first["completion_ids"])]


@pytest.mark.parametrize(
    ("agent", "corrupt", "named"),
    [
        ("summarising_memory", shifted_logprob, r"logprob: .*:1 \w+, turn 1: completion token 2 "),
        ("summarising_memory", another_temperature, r"logprob: .*:1 \w+, turn 1: "),
        ("summarising_memory", another_version, r"logprob: .*:1 \w+, turn 1: "),
        ("summarising_memory", another_token_in_a_prompt, r"parent: .*:1 \w+, turn 1: its prompt"),
        ("summarising_memory", no_parent, r"parent: .*:1 \w+, turn 2: turn 0 begins more"),
        ("summarising_memory", parent_too_high, r"parent: .*:1 \w+, turn 2: turn 1 begins more"),
        ("summarising_memory", parent_of_another_branch, r"parent: .*:1 \w+, turn 4: its prompt"),
        ("summarising_memory", mask_moved_by_one, r"sample: .*, turn 0: completion token 0 .*nev"),
        ("summarising_memory", mask_moved_by_one, r"sample: .*, sample 0, position \d+: "),
        ("summarising_memory", trained_twice, r"sample: .*, sample \d+, position \d+: .* before"),
        ("summarising_memory", sample_lost, r"sample: .*, turn \d: completion token 0 .*never"),
        ("summarising_memory", token_not_trained, r"sample: .*, turn 0: completion token 1 .*nev"),
        ("summarising_memory", prompt_trained, r"sample: .*, position \d+: .*no turn sampled it"),
        ("summarising_memory", logprobs_swapped, r"sample: .*, position \d+: logprob "),
        ("summarising_memory", trained_at_another_temperature, r"sample: .*: temperature 1.0;"),
        ("summarising_memory", another_advantage_in_a_sample, r"sample: .*: advantage "),
        ("summarising_memory", excluded_but_trained, r"sample: .*turn 1 .* but it is superseded"),
        ("plan_and_execute", superseded_but_not_trained, r"sample: .*, turn \d+: .*never trained"),
        ("summarising_memory", another_advantage, r"advantage: .*:1 summarising_memory: "),
        ("react", message_changed, r"template: .*:1 react, turn 1: '"),
        ("summarising_memory", newline_lost, r"template: .*:1 \w+, turn 1: "),
    ],
)
def test_a_corrupted_file_is_found_and_the_place_named(corrupted, agent, corrupt, named):
    problems = corrupted(agent, corrupt)
    assert any(re.match(named, problem) for problem in problems), problems


@pytest.mark.parametrize("agent", ["summarising_memory", "plan_and_execute", "react"])
def test_the_same_files_uncorrupted_are_sound(corrupted, agent):
    assert corrupted(agent, None) == []
