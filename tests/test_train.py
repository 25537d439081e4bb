"""The whole loop, as a user runs it: a process of its own, real LangGraph, a real tiny model."""

from __future__ import annotations

import signal

import pytest

from chatlearn.algorithm.advantages import group_advantages, turn_advantages
from chatlearn.algorithm.scoring import Scoring
from chatlearn.observability.rollout_files import read_rollouts
from chatlearn.types import Completion, Group, StopReason, Task, Trajectory, Turn

GAP = 1e-4
"""Most that engine and trainer may disagree on a logprob, in fp32 (nats)."""


def test_reward_rises_and_engine_and_trainer_agree(project):
    project.run(
        "runtime_args.num_episode=30",
        "runtime_args.save_episode_interval=0",
        "runtime_args.eval_data_path=test.jsonl",
        "runtime_args.enable_eval_before_training=True",
        "models.policy.eval_temperature=1.0",
        "models.policy.eval_top_p=1.0",
        "models.policy.eval_num_inference_per_prompt=4",
    )
    metrics = project.metrics(project.runs[0])
    assert [m["episode"] for m in metrics] == list(range(31))
    before, after = metrics[0]["eval/reward_mean"], metrics[-1]["eval/reward_mean"]
    assert after > before + 0.3, (before, after)
    gaps = [m["policy/logprob_gap_max"] for m in metrics if "policy/logprob_gap_max" in m]
    assert len(gaps) > 10
    assert max(gaps) <= GAP
    assert all(m["turns/mean"] == 2 for m in metrics[1:])


def test_a_killed_run_continues_to_the_same_bits(project, tmp_path):
    """16 runs an episode: the 40th is in the middle of the third episode's rollouts."""
    project.run()
    [whole] = project.runs
    expected = project.weights(whole, 4)

    killed = project.run("runtime_args.exp_name=killed", check=False, KILL_AT_RUN="40")
    assert killed.returncode == -signal.SIGKILL
    again = project.run("runtime_args.exp_name=killed")
    assert "Continuing outputs/killed/" in again.stderr.splitlines()[0]
    assert "episode 2" in again.stderr.splitlines()[0]

    [run] = [p for p in (tmp_path / "outputs/killed").iterdir() if not p.is_symlink()]
    assert project.weights(run, 4) == expected
    assert [m["episode"] for m in project.metrics(run)] == [1, 2, 3, 4]
    assert sorted(p.name for p in (run / "rollouts").iterdir()) == [
        f"episode_{episode:06d}.jsonl" for episode in (1, 2, 3, 4)
    ]
    for episode in (3, 4):  # what was rolled out again is what had been rolled out
        name = f"rollouts/episode_{episode:06d}.jsonl"
        assert tokens(run / name) == tokens(whole / name)


def test_the_same_seed_repeats_and_another_does_not(project):
    project.run("runtime_args.num_episode=2", "runtime_args.exp_name=letters")
    project.run("runtime_args.num_episode=2", "runtime_args.enable_resume_training=False")
    project.run(
        "runtime_args.num_episode=2",
        "runtime_args.enable_resume_training=False",
        "runtime_args.seed=7",
    )
    first, second, other = project.runs
    assert project.weights(first, 2) == project.weights(second, 2)
    assert project.weights(first, 2) != project.weights(other, 2)


def test_a_finished_run_is_kept_and_a_new_one_begun(project):
    project.run("runtime_args.num_episode=1")
    again = project.run("runtime_args.num_episode=1")
    assert "finished" in again.stderr.splitlines()[0]
    assert len(project.runs) == 2


def test_every_checkpoint_loads_with_transformers(project):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    project.run("runtime_args.num_episode=1")
    folder = project.runs[0] / "checkpoints/episode_000001/hf"
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 64
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_stale_rollouts_are_bounded(project):
    project.run("runtime_args.max_staleness=1", "runtime_args.num_episode=3")
    import json

    run = project.runs[0]
    for episode in (1, 2, 3):
        lines = (run / f"rollouts/episode_{episode:06d}.jsonl").read_text().splitlines()
        versions = [v for line in lines for t in json.loads(line)["turns"] for v in t["versions"]]
        assert min(versions) >= episode - 2


@pytest.mark.parametrize(
    "setting", ["models.policy_trainer.kl_coef=0.1", "models.policy_trainer.entropy_coef=0.01"]
)
def test_a_reference_and_an_entropy_bonus_act(project, setting):
    project.run("runtime_args.num_episode=2")
    project.run("runtime_args.num_episode=2", setting)
    plain, changed = project.runs
    assert project.weights(plain, 2) != project.weights(changed, 2)


def test_nodes_of_two_temperatures_are_trained_as_they_were_sampled(project):
    """Engine and trainer agree on every token, and the rollout file says which had which."""
    project.run(
        "runtime_args.num_episode=2",
        "models.policy.temperature=0.8",
        "models.policy.node_sampling={second: {temperature: 1.3}}",
    )
    [run] = project.runs
    metrics = project.metrics(run)
    assert all(m["policy/logprob_gap_max"] <= GAP for m in metrics)
    assert all(m["node/first/tokens"] > 0 and m["node/second/tokens"] > 0 for m in metrics)
    rollouts = read_rollouts(run / "rollouts/episode_000001.jsonl")
    found = {(t.node, t.temperature) for rollout in rollouts for t in rollout.trajectory.turns}
    assert found == {("first", 0.8), ("second", 1.3)}
    samples = [sample for rollout in rollouts for sample in rollout.samples]
    assert {t for sample in samples for t in sample.temperatures} == {1.0, 0.8, 1.3}


def test_a_turn_with_a_reward_of_its_own_is_trained_on_it():
    """
    run a, reward 1   first [2]   second [4], own reward 0      advantages  . + . -
    run b, reward 0   first [2]   second [4], own reward 1                  . - . +
    """
    task = Task("t:0", [], "agent", None, "src", None)

    def run(uid, reward, own):
        def said(token):
            return Completion([token], [-1.0], StopReason.STOP, (0, 0))

        turns = [
            Turn(0, None, [1], said(2), node="first"),
            Turn(1, 0, [1, 2, 3], said(4), node="second", reward=own),
        ]
        return Trajectory(task, turns, reward, uid=uid)

    group = Group(task, [run("a", 1.0, 0.0), run("b", 0.0, 1.0)])
    advantages, rows = Scoring()([group])
    assert advantages == group_advantages(group)
    own = turn_advantages(group)
    a, b = advantages["a"], own["b"][1]
    assert a == b > 0.7
    assert [row.advantages for [row] in rows] == [[0, a, 0, -a], [0, -a, 0, a]]


def tokens(path):
    import json

    return [
        [turn["prompt_ids"] + turn["completion_ids"] for turn in json.loads(line)["turns"]]
        for line in path.read_text().splitlines()
    ]
