"""Advantages: numbers by hand, and who is in the statistics."""

from __future__ import annotations

import pytest
import torch

from chatlearn.algorithm.advantages import (
    ADVANTAGES,
    anchored_advantages,
    group_advantages,
    grpo,
    overlong_penalty,
    turn_advantages,
)
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # rewards [0, 1, 2] and [4, 4]; sample std of the first group 1; over all five rewards the
        # mean is 2.2 and the variance (4.84 + 1.44 + 0.04 + 2 * 3.24) / 4 = 3.2
        ("grpo", [[-1, 0, 1], [0, 0]]),
        ("dr_grpo", [[-1, 0, 1], [0, 0]]),
        ("rloo", [[0 - 1.5, 1 - 1, 2 - 0.5], [0, 0]]),
        ("reinforce_pp", [[x / 3.2**0.5 for x in (-2.2, -1.2, -0.2)], [1.8 / 3.2**0.5] * 2]),
        # deviations -1 0 1 0 0: variance 2 / 4
        ("reinforce_pp_baseline", [[-(2**0.5), 0, 2**0.5], [0, 0]]),
    ],
)
def test_estimators_by_hand(name, expected):
    got = ADVANTAGES[name]([[0.0, 1.0, 2.0], [4.0, 4.0]])
    for group, wanted in zip(got, expected, strict=True):
        assert group == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_no_estimator_divides_by_nothing(name):
    assert ADVANTAGES[name]([]) == []
    assert ADVANTAGES[name]([[0.3] * 3, [0.3] * 2]) == [[0.0] * 3, [0.0] * 2]
    if name != "reinforce_pp":
        assert ADVANTAGES[name]([[5.0]]) == [[0.0]]


def test_batch_estimators_see_the_groups_of_the_episode_that_can_be_compared():
    one = Group(TASK, [run("a", 0.0), run("b", 1.0)])
    two = Group(TASK, [run("c", 4.0), run("d", 4.0)])
    alone = Group(TASK, [run("e", 99.0), run("f", None)])
    got = group_advantages(one, two, alone, estimator="reinforce_pp")
    values = ADVANTAGES["reinforce_pp"]([[0.0, 1.0], [4.0, 4.0]])
    assert got == dict(zip("abcd", values[0] + values[1], strict=True))


def test_turns_are_compared_over_the_batch_where_the_estimator_is():
    one = Group(TASK, [spoken("a", 1.0, ("n", 0.0)), spoken("b", 1.0, ("n", 1.0))])
    two = Group(TASK, [spoken("c", 1.0, ("n", 4.0)), spoken("d", 1.0, ("m", 7.0))])
    own = turn_advantages(one, two, estimator="reinforce_pp")
    [[a, b], [c]] = ADVANTAGES["reinforce_pp"]([[0.0, 1.0], [4.0]])
    assert own == {"a": {0: a}, "b": {0: b}, "c": {0: c}, "d": {0: 0.0}}
    apart = turn_advantages(one, two, estimator="rloo")
    assert apart == {"a": {0: -1.0}, "b": {0: 1.0}, "c": {0: 0.0}, "d": {0: 0.0}}


def test_a_rewarded_turn_is_credited_with_the_next_ones():
    """
    run a   n 1.0   n -   n 0.5   n! 9.0      returns  1 + 0.5 * 0.5 = 1.25,  0.5
    run b   n 0.0                             returns  0
    """
    group = Group(
        TASK,
        [
            spoken("a", 1.0, ("n", 1.0), ("n", None), ("n", 0.5), ("!n", 9.0)),
            spoken("b", 0.0, ("n", 0.0)),
        ],
    )
    own = turn_advantages(group, estimator="dr_grpo", discount=0.5)
    mean = 1.75 / 3
    assert own["a"] == pytest.approx({0: 1.25 - mean, 2: 0.5 - mean})
    assert own["b"] == pytest.approx({0: -mean})


def test_gigpo_compares_turns_that_stood_before_the_same_prompt():
    """
    run a, reward 1   n [0]   n [0]      returns 0.5 and 1; both prompts are the same state
    run b, reward 0   n [0]              return 0

    runs: mean 0.5, std sqrt(0.5): +- sqrt(0.5); turns 0.5 1 0: mean 0.5, std 0.5: 0, 1, -1
    """
    group = Group(TASK, [spoken("a", 1.0, ("n", None), ("n", None)), spoken("b", 0.0, ("n", None))])
    of_run = group_advantages(group, estimator="gigpo")
    own = anchored_advantages(group, of_run=of_run, discount=0.5)
    half = 0.5**0.5
    assert own["a"] == pytest.approx({0: half, 1: half + 1}, abs=1e-5)
    assert own["b"] == pytest.approx({0: -half - 1}, abs=1e-5)


def test_gigpo_turns_alone_in_their_state_have_the_runs_advantage():
    group = Group(TASK, [spoken("a", 1.0, ("n", None)), spoken("b", 0.0, ("m", None))])
    of_run = group_advantages(group)
    own = anchored_advantages(group, of_run=of_run, discount=0.9)
    assert own == {"a": {0: of_run["a"]}, "b": {0: of_run["b"]}}


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(0, 0), (60, 0), (70, -0.25), (100, -1), (130, -1)]
)
def test_overlong_rollouts_lose(tokens, penalty):
    assert overlong_penalty(tokens, 100, 40) == penalty
    assert overlong_penalty(tokens, 100, 0) == 0
