"""Advantages: numbers by hand, and who is in the statistics."""

from __future__ import annotations

import pytest
import torch

from chatlearn.algorithm.advantages import group_advantages, grpo, turn_advantages
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


def spoken(uid: str, reward: float, *turns: tuple[str, float | None]) -> Trajectory:
    """A run whose turns are (path, own reward); a path with ``!`` before it is excluded."""
    completion = Completion([1], [-0.5], StopReason.STOP, (0, 0))
    made = [
        Turn(
            i,
            None,
            [0],
            completion,
            checkpoint_ns="|".join(f"{name}:{uid}{i}" for name in path.strip("!").split("/")),
            reward=own,
            excluded="superseded" if path[0] == "!" else "",
        )
        for i, (path, own) in enumerate(turns)
    ]
    return Trajectory(TASK, made, reward, uid=uid)


def test_turns_are_compared_with_turns_of_their_path():
    """
    run a   writer 1.0   team/writer 5.0   judge  -
    run b   writer 0.0   team/writer 3.0   writer 0.5   judge -

    writer        1.0 0.0 0.5     mean 0.5, sample std 0.5: 1, -1, 0
    team/writer   5.0 3.0         mean 4, sample std sqrt(2): a half of sqrt(2) and its negative
    judge         none has a reward of its own: the run's advantage is used
    """
    group = Group(
        TASK,
        [
            spoken("a", 1.0, ("writer", 1.0), ("team/writer", 5.0), ("judge", None)),
            spoken(
                "b", 1.0, ("writer", 0.0), ("team/writer", 3.0), ("writer", 0.5), ("judge", None)
            ),
        ],
    )
    own = turn_advantages(group)
    assert own == {
        "a": {0: pytest.approx(1.0, abs=3e-6), 1: pytest.approx(0.5**0.5, abs=1e-6)},
        "b": {
            0: pytest.approx(-1.0, abs=3e-6),
            1: pytest.approx(-(0.5**0.5), abs=1e-6),
            2: pytest.approx(0.0, abs=1e-9),
        },
    }
    assert group_advantages(group) == {"a": 0.0, "b": 0.0}
    assert group.has_signal


def test_a_run_that_speaks_often_has_as_many_entries():
    """Three zeros and a one: mean 0.25, sample std 0.5."""
    group = Group(
        TASK,
        [
            spoken("a", 1.0, ("n", 0.0), ("n", 0.0), ("n", 0.0)),
            spoken("b", 0.0, ("n", 1.0)),
        ],
    )
    own = turn_advantages(group)
    assert own["a"] == pytest.approx({0: -0.5, 1: -0.5, 2: -0.5}, abs=1e-5)
    assert own["b"] == pytest.approx({0: 1.5}, abs=1e-5)


def test_excluded_turns_and_failed_runs_are_not_in_the_statistics_of_turns():
    failed = spoken("c", 9.0, ("n", 9.0))
    failed.outcome = Outcome.AGENT_ERROR
    group = Group(
        TASK,
        [
            spoken("a", 0.0, ("n", 1.0), ("!n", 50.0)),
            spoken("b", 0.0, ("n", 0.0)),
            failed,
        ],
    )
    expected = 0.5 / 0.5**0.5
    own = turn_advantages(group)
    assert own == {
        "a": pytest.approx({0: expected}, rel=1e-5),
        "b": pytest.approx({0: -expected}, rel=1e-5),
    }


def test_a_turn_alone_on_its_path_is_compared_with_nobody():
    group = Group(TASK, [spoken("a", 1.0, ("n", 7.0)), spoken("b", 0.0, ("n", None))])
    assert turn_advantages(group) == {"a": {0: 0.0}, "b": {}}


def test_turns_of_one_trainable_run_are_not_compared():
    """As the run itself is not: the uids are those of ``group_advantages``."""
    alone = Group(TASK, [spoken("a", 1.0, ("n", 1.0), ("n", 0.0)), run("b", None)])
    assert turn_advantages(alone) == group_advantages(alone) == {}
    many = Group(TASK, [run("a", 1.0), run("b", 0.0), run("c", None)])
    assert turn_advantages(many).keys() == group_advantages(many).keys()
