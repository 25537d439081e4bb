"""Trajectories to rows: each picture is drawn, its mask asserted literally (laws 1 and 2)."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.algorithm.samples import to_samples
from chatlearn.types import Completion, StopReason, Trajectory, Turn


def turn(id_, parent, prompt_ids, token_ids, versions=(0, 0)):
    """A turn whose token n has rollout logprob -n: every number can be found again."""
    logprobs = [-float(t) for t in token_ids]
    return Turn(id_, parent, prompt_ids, Completion(token_ids, logprobs, StopReason.STOP, versions))


def trajectory(*turns):
    return Trajectory(turns=list(turns), uid="g/0")


def mask(sample):
    return "".join("x" if trained else "." for trained in sample.loss_mask)


def test_two_turns_in_a_line_are_one_row():
    """
    [ prompt | completion 0 | tool result | completion 1 ]
      1 2 3    4 5            6             7
      . . .    x x            .             x
    """
    [sample] = to_samples(
        trajectory(
            turn(0, None, [1, 2, 3], [4, 5], versions=(3, 4)),
            turn(1, 0, [1, 2, 3, 4, 5, 6], [7], versions=(4, 5)),
        ),
        advantage=0.5,
    )
    assert sample.token_ids == [1, 2, 3, 4, 5, 6, 7]
    assert mask(sample) == "...xx.x"
    assert sample.rollout_logprobs == [0, 0, 0, -4, -5, 0, -7]
    assert sample.advantages == [0, 0, 0, 0.5, 0.5, 0, 0.5]
    assert (sample.weight, sample.trajectory, sample.min_version) == (1.0, "g/0", 3)


def test_a_fork_trains_the_shared_turn_once():
    """
    turn 0 ─┬─ turn 1     1 [2 3] 4 [5]       . x x . x
            └─ turn 2     1  2 3  6 [7 8]     . . . . x x
    """
    first, second = to_samples(
        trajectory(
            turn(0, None, [1], [2, 3], versions=(1, 1)),
            turn(1, 0, [1, 2, 3, 4], [5], versions=(2, 2)),
            turn(2, 0, [1, 2, 3, 6], [7, 8], versions=(2, 2)),
        ),
        advantage=1.0,
    )
    assert (first.token_ids, mask(first)) == ([1, 2, 3, 4, 5], ".xx.x")
    assert (second.token_ids, mask(second)) == ([1, 2, 3, 6, 7, 8], "....xx")
    # the old turn is context in the second row: its version and logprobs say nothing about it
    assert (first.min_version, second.min_version) == (1, 2)
    assert second.rollout_logprobs == [0, 0, 0, 0, -7, -8]


def test_edited_history_is_a_root_of_its_own():
    """
    turn 0     1 [2]        . x
    turn 1     3 [4]        . x
    """
    rows = to_samples(trajectory(turn(0, None, [1], [2]), turn(1, None, [3], [4])), 1.0)
    assert [(r.token_ids, mask(r)) for r in rows] == [([1, 2], ".x"), ([3, 4], ".x")]


def test_leaves_are_walked_by_id_not_by_place():
    """
    turn 0 ─┬─ turn 1 ── turn 3     row of leaf 2 comes first and trains turn 0
            └─ turn 2
    """
    rows = to_samples(
        trajectory(
            turn(3, 1, [1, 2, 3], [4]),
            turn(2, 0, [1, 2], [5]),
            turn(1, 0, [1, 2], [3]),
            turn(0, None, [1], [2]),
        ),
        1.0,
    )
    assert [(r.token_ids, mask(r)) for r in rows] == [([1, 2, 5], ".xx"), ([1, 2, 3, 4], "..xx")]


def test_an_empty_completion_leaves_no_trailing_context_and_no_empty_row():
    """
    turn 0 ─┬─ turn 1 (aborted)     1 [2]          . x
            └─ turn 2 (aborted)     nothing
    """
    rows = to_samples(
        trajectory(
            turn(0, None, [1], [2]), turn(1, 0, [1, 2, 3], []), turn(2, 0, [1, 2, 4, 4], [])
        ),
        1.0,
    )
    assert [(r.token_ids, mask(r)) for r in rows] == [([1, 2], ".x")]
    assert to_samples(trajectory(turn(0, None, [1], [])), 1.0) == []
    assert to_samples(trajectory(), 1.0) == []


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([turn(0, None, [1], [2]), turn(1, 0, [1, 9, 3], [4])], "turn 1 does not begin with"),
        ([turn(0, None, [1], [2]), turn(1, 0, [1], [4])], "turn 1 does not begin with"),
        ([turn(1, 0, [1], [2])], "unknown parent 0"),
        ([turn(0, 1, [1, 2], [3]), turn(1, None, [1], [2])], "comes before its parent"),
        ([turn(0, None, [1], [2]), turn(0, None, [1], [2])], "share an id"),
        ([turn(0, None, [], [2])], "empty prompt"),
    ],
)
def test_a_broken_tree_is_our_bug_and_says_where(turns, message):
    with pytest.raises(AssertionError, match=message):
        to_samples(trajectory(*turns), 1.0)


@st.composite
def trees(draw):
    """Random trees of turns in which every token id is used for one thing only."""
    turns: list[Turn] = []
    fresh = iter(range(1, 100_000))
    for id_ in range(draw(st.integers(0, 12))):
        parent = draw(st.one_of(st.none(), st.integers(0, id_ - 1))) if id_ else None
        history = turns[parent].token_ids if parent is not None else [next(fresh)]
        new = [next(fresh) for _ in range(draw(st.integers(0, 3)))]
        sampled = [next(fresh) for _ in range(draw(st.integers(0, 4)))]
        version = draw(st.integers(0, 5))
        turns.append(turn(id_, parent, history + new, sampled, versions=(version, version)))
    return Trajectory(turns=draw(st.permutations(turns)), uid="g/0")


@settings(max_examples=300, deadline=None)
@given(trees())
def test_every_sampled_token_is_trained_in_exactly_one_place(tree):
    rows = to_samples(tree, 2.0)
    trained = Counter(t for r in rows for t, on in zip(r.token_ids, r.loss_mask, strict=True) if on)
    sampled = Counter(t for turn_ in tree.turns for t in turn_.completion.token_ids)
    assert trained == sampled

    paths = [turn_.token_ids for turn_ in tree.turns]
    for row in rows:
        assert row.token_ids in paths  # law 1: a row is what the engine had, token for token
        assert row.loss_mask[-1]
        for t, on, logprob, advantage in zip(
            row.token_ids, row.loss_mask, row.rollout_logprobs, row.advantages, strict=True
        ):
            assert (logprob, advantage) == ((-t, 2.0) if on else (0.0, 0.0))
