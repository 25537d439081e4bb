"""Trajectories to rows: each picture is drawn, its mask asserted literally (laws 1 and 2)."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.algorithm.samples import to_samples
from chatlearn.errors import TrainerError
from chatlearn.types import Completion, StopReason, Trajectory, Turn


def turn(id_, parent, prompt_ids, token_ids, versions=(0, 0), **fields):
    """A turn whose token n has rollout logprob -n: every number can be found again."""
    logprobs = [-float(t) for t in token_ids]
    completion = Completion(token_ids, logprobs, StopReason.STOP, versions)
    return Turn(id_, parent, prompt_ids, completion, **fields)


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
    assert sample.temperatures == [1.0] * 7


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


def test_an_excluded_turn_in_the_middle_is_context():
    """
    turn 0 ── turn 1 ── turn 2     1 [2] 3  4  5 [6]
             excluded              .  x  .  .  .  x
    """
    [row] = to_samples(
        trajectory(
            turn(0, None, [1], [2], versions=(5, 5)),
            turn(1, 0, [1, 2, 3], [4], versions=(1, 1), excluded="not trainable", temperature=0.0),
            turn(2, 1, [1, 2, 3, 4, 5], [6], versions=(6, 6)),
        ),
        0.5,
    )
    assert (row.token_ids, mask(row)) == ([1, 2, 3, 4, 5, 6], ".x...x")
    assert row.advantages == [0, 0.5, 0, 0, 0, 0.5]
    assert row.rollout_logprobs == [0, -2, 0, 0, 0, -6]
    # greedy and old as it is, nothing of it is trained
    assert (row.temperatures, row.min_version) == ([1.0] * 6, 5)


def test_an_excluded_leaf_is_not_there():
    """A call that was tried again, and one of a node that is not trained.

    turn 0 ─┬─ turn 1 superseded        no row
            ├─ turn 2                   1 [2] 4 [5]        . x . x
            └─ turn 3 ── turn 4         1  2  6 [7]        . . . x       turn 4 is excluded
    """
    rows = to_samples(
        trajectory(
            turn(0, None, [1], [2]),
            turn(1, 0, [1, 2, 3], [9, 9], excluded="superseded"),
            turn(2, 0, [1, 2, 4], [5]),
            turn(3, 0, [1, 2, 6], [7]),
            turn(4, 3, [1, 2, 6, 7, 8], [9], excluded="node judge is not trained"),
        ),
        1.0,
    )
    assert [(r.token_ids, mask(r)) for r in rows] == [
        ([1, 2, 4, 5], ".x.x"),
        ([1, 2, 6, 7], "...x"),
    ]
    assert to_samples(trajectory(turn(0, None, [1], [2], excluded="superseded")), 1.0) == []


def test_a_turn_with_a_reward_of_its_own_has_its_own_advantage():
    """
    turn 0 ─┬─ turn 1      1 [2] 3 [4 5]      advantages   . R . A A       R of the run
            └─ turn 2      1  2  6 [7]                     . . . B
    """
    first, second = to_samples(
        trajectory(
            turn(0, None, [1], [2]), turn(1, 0, [1, 2, 3], [4, 5]), turn(2, 0, [1, 2, 6], [7])
        ),
        0.5,
        own={1: -1.0, 2: 0.25},
    )
    assert first.advantages == [0, 0.5, 0, -1, -1]
    assert second.advantages == [0, 0, 0, 0.25]


def test_each_token_keeps_the_temperature_it_was_sampled_at():
    """
    turn 0 at 0.7 ─┬─ turn 1 at 1.2    1 [2] 3 [4 5]     1 0.7 1 1.2 1.2
                   └─ turn 2 at 0.4    1  2  6 [7]       1  1  1 0.4
    """
    first, second = to_samples(
        trajectory(
            turn(0, None, [1], [2], temperature=0.7),
            turn(1, 0, [1, 2, 3], [4, 5], temperature=1.2),
            turn(2, 0, [1, 2, 6], [7], temperature=0.4),
        ),
        1.0,
    )
    assert first.temperatures == [1, 0.7, 1, 1.2, 1.2]
    assert second.temperatures == [1, 1, 1, 0.4]


def test_greedy_tokens_are_refused_by_name():
    cold = turn(3, None, [1], [2], temperature=0.0, checkpoint_ns="team:4f|writer:77")
    with pytest.raises(
        TrainerError, match=r"Turn 3 \(node 'team/writer'\) .*'g/0'.*models\.policy\.temperature"
    ):
        to_samples(trajectory(cold), 1.0)
    cold.completion = Completion([], [], StopReason.ABORT, (0, 0))
    assert to_samples(trajectory(cold), 1.0) == []


def test_an_advantage_for_no_turn_is_our_bug():
    with pytest.raises(AssertionError, match=r"g/0 has no turns \[7\]"):
        to_samples(trajectory(turn(0, None, [1], [2])), 1.0, own={7: 1.0})


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
        fields = {
            "versions": (version, version),
            "temperature": draw(st.sampled_from([1.0, 0.7, 1.3])),
            "excluded": draw(st.sampled_from(["", "", "superseded", "not trained"])),
        }
        turns.append(turn(id_, parent, history + new, sampled, **fields))
    return Trajectory(turns=draw(st.permutations(turns)), uid="g/0")


@settings(max_examples=500, deadline=None)
@given(trees(), st.data())
def test_every_sampled_token_is_trained_in_exactly_one_place(tree, data):
    """But those of excluded turns in none."""
    ids = [turn_.id for turn_ in tree.turns]
    own = data.draw(st.dictionaries(st.sampled_from(ids), st.floats(-2, 2))) if ids else {}
    rows = to_samples(tree, 2.0, own)
    trained = Counter(t for r in rows for t, on in zip(r.token_ids, r.loss_mask, strict=True) if on)
    origin = {t: turn_ for turn_ in tree.turns for t in turn_.completion.token_ids}
    assert trained == Counter(t for t, turn_ in origin.items() if not turn_.excluded)

    paths = [turn_.token_ids for turn_ in tree.turns if not turn_.excluded]
    ends = [row.token_ids[-1] for row in rows]
    assert len(rows) == len(set(ends))
    for row in rows:
        assert row.token_ids in paths  # law 1: a row is what the engine had, token for token
        assert row.loss_mask[-1]
        assert sum(end in row.token_ids for end in ends) == 1  # no row is the beginning of another
        versions = [origin[t].completion.versions[0] for t in row.token_ids if t in origin]
        assert row.min_version in versions
        columns = (row.rollout_logprobs, row.advantages, row.temperatures)
        for t, on, *numbers in zip(row.token_ids, row.loss_mask, *columns, strict=True):
            if on:
                source = origin[t]
                assert numbers == [-t, own.get(source.id, 2.0), source.temperature]
            else:
                assert numbers == [0.0, 0.0, 1.0]
