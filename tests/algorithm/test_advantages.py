"""Advantages: numbers by hand, and who is in the statistics."""

from __future__ import annotations

import pytest
import torch

from chatlearn.algorithm.advantages import group_advantages, grpo
from chatlearn.types import Completion, Group, Outcome, StopReason, Task, Trajectory, Turn

TASK = Task("t:0", [], "agent", None, "src", None)


def run(uid: str, reward: float | None, outcome: Outcome = Outcome.FINISHED, turns: int = 1):
    completion = Completion([1], [-0.5], StopReason.STOP, (0, 0))
    made = [Turn(i, None, [0], completion) for i in range(turns)]
    return Trajectory(TASK, made, reward, outcome, uid=uid)


def test_grpo_by_hand():
    # mean 1, sample std sqrt((1 + 0 + 1) / 2) = 1
    assert grpo([0.0, 1.0, 2.0]) == pytest.approx([-1.0, 0.0, 1.0], abs=2e-6)


def test_grpo_equals_the_formula_of_trl_and_verl():
    rewards = torch.tensor([0.25, 1.0, -3.0, 0.5, 0.5])
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    assert grpo(rewards.tolist()) == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("rewards", [[0.1] * 7, [1e30] * 3, [2.0], []])
def test_equal_rewards_are_exactly_zero(rewards):
    assert grpo(rewards) == [0.0] * len(rewards)


def test_failed_siblings_are_in_neither_mean_nor_std():
    group = Group(
        TASK,
        [
            run("a", 1.0),
            run("b", 0.0, Outcome.TRUNCATED),
            run("c", 0.0, Outcome.JUDGE_ERROR),  # a failure, whatever reward it carries
            run("d", None, Outcome.TIMEOUT),
            run("e", None),  # finished, never scored
        ],
    )
    # mean 0.5, sample std sqrt(0.5)
    expected = {"a": 0.5 / 0.5**0.5, "b": -0.5 / 0.5**0.5}
    assert group_advantages(group) == pytest.approx(expected, rel=1e-5)


def test_a_run_of_many_turns_counts_once():
    one = group_advantages(Group(TASK, [run("a", 1.0), run("b", 0.0), run("c", 0.0)]))
    many = group_advantages(Group(TASK, [run("a", 1.0, turns=9), run("b", 0.0), run("c", 0.0)]))
    assert one == many


def test_fewer_than_two_trainable_is_empty():
    assert group_advantages(Group(TASK, [])) == {}
    assert group_advantages(Group(TASK, [run("a", 1.0), run("b", None)])) == {}


def test_siblings_need_names_of_their_own():
    with pytest.raises(AssertionError, match="share a uid"):
        group_advantages(Group(TASK, [run("a", 1.0), run("a", 0.0)]))
