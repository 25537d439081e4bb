"""Trees of tokens: what lies where, what is computed once, and how trees are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.algorithm.layout import collate, lay, shared_length
from chatlearn.algorithm.packing import pack
from chatlearn.types import Sample


def row(text: str, trained: str = "", uid: str = "g/0") -> Sample:
    """A letter is a token; ``trained`` has an ``x`` below each that is trained."""
    on = [mark == "x" for mark in trained.ljust(len(text), ".")]
    numbers = [float(i) if o else 0.0 for i, o in enumerate(on)]
    return Sample([ord(c) for c in text], on, [-n for n in numbers], numbers, trajectory=uid)


def letters(batch) -> list[str]:
    """The segments."""
    text = "".join(map(chr, batch.token_ids.tolist()))
    return [text[a:b] for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)]


def test_shared_beginnings_are_there_once():
    """
    samples   a b c d        packed   a b c d | x y | p        x goes on after b, p after x
              a b x p                 0 1 2 3   4 5   6        (rows come in the order of tokens)
              a b x y
    """
    samples = [row("abxy", "..xx", "g/0"), row("abcd", "..xx", "g/1"), row("abxp", "...x", "g/2")]
    batch = collate(samples, 5.0, tree=True)
    assert letters(batch) == ["abcd", "xp", "y"]
    assert batch.parents.tolist() == [-1, 1, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 3]
    # in the order in which they were given: x y, then c d, then p
    assert batch.targets.tolist() == [4, 6, 2, 3, 5]
    assert batch.predictors.tolist() == [1, 4, 1, 2, 4]
    assert batch.advantages.tolist() == [2, 3, 2, 3, 3]
    assert batch.owners.tolist() == [0, 0, 1, 1, 2]
    assert batch.trajectories == ["g/0", "g/1", "g/2"]


def test_siblings_that_sampled_the_same_train_one_place_twice():
    """Twins, and one that is the beginning of another."""
    samples = [row("abc", ".xx", "g/0"), row("abc", ".xx", "g/1"), row("ab", ".x", "g/2")]
    batch = collate(samples, 5.0, tree=True)
    assert letters(batch) == ["ab", "c"]
    assert batch.parents.tolist() == [-1, 1]
    assert batch.targets.tolist() == [1, 2, 1, 2, 1]
    assert batch.owners.tolist() == [0, 0, 1, 1, 2]


def test_flat_is_in_the_order_given():
    batch = collate([row("abd", ".xx"), row("abc", "..x")], 3.0)
    assert letters(batch) == ["abd", "abc"]
    assert batch.parents.tolist() == [-1, -1]
    assert batch.targets.tolist() == [1, 2, 5]
    assert batch.predictors.tolist() == [0, 1, 4]


def test_rows_without_a_trained_token_have_no_target():
    batch = collate([row("ab"), row("ac")], 1.0, tree=True)
    assert letters(batch) == ["ab", "c"]
    assert len(batch.targets) == len(batch.owners) == 0


SAMPLES = st.lists(
    st.tuples(st.text("ab", min_size=2, max_size=9), st.integers(0, 2)), min_size=1, max_size=12
)


def path(layout, position):
    """Positions from the root to ``position``, by walking segments up."""
    found = []
    while position >= 0:
        number = max(n for n, start in enumerate(layout.cu_seqlens[:-1]) if start <= position)
        start = layout.cu_seqlens[number]
        found = [*range(start, position + 1), *found]
        position = layout.parents[number]
    return found


@given(SAMPLES)
def test_every_sample_is_a_path_and_no_prefix_is_there_twice(shapes):
    samples = [row(text, "." + "x" * (len(text) - 1), f"g/{n}") for text, n in shapes]
    layout = lay(samples, tree=True)
    for sample, place in zip(samples, layout.places, strict=True):
        assert [layout.token_ids[p] for p in place] == sample.token_ids
        assert place.tolist() == path(layout, int(place[-1]))
        assert [layout.position_ids[p] for p in place] == list(range(len(sample.token_ids)))
    prefixes = {text[: n + 1] for text, _ in shapes for n in range(len(text))}
    assert len(layout.token_ids) == len(prefixes)


@given(SAMPLES, st.integers(9, 20), st.integers(1, 3))
def test_a_cut_tree_keeps_every_trained_token_and_the_limit(shapes, limit, ranks):
    samples = [row(text, "." + "x" * (len(text) - 1), f"g/{n}") for text, n in shapes]
    batches = pack(samples, limit, ranks=ranks, tree=True)
    assert len(batches) % ranks == 0
    assert all(len(batch.token_ids) <= limit for batch in batches)
    expected = sorted(
        (s.trajectory, t, a)
        for s in samples
        for t, a in zip(s.token_ids[1:], s.advantages[1:], strict=True)
    )
    got = sorted(
        (batch.trajectories[o], int(batch.token_ids[t]), float(a))
        for batch in batches
        for o, t, a in zip(batch.owners, batch.targets, batch.advantages, strict=True)
    )
    assert got == expected
    prefixes = {text[: n + 1] for text, _ in shapes for n in range(len(text))}
    assert {batch.distinct_tokens for batch in batches} == {len(prefixes)}
    if len(batches) == 1 and sum(len(text) for text, _ in shapes) > 2 * len(prefixes):
        assert len(batches[0].token_ids) == len(prefixes)


def test_neighbours_are_cut_apart_where_the_room_ends():
    """
    room 7    p p p a a | b b      the third row would need 2 more
              p p p c c            and computes its beginning again
    """
    samples = [row("pppcc", "...xx"), row("pppaa", "...xx"), row("pppbb", "...xx")]
    assert [letters(b) for b in pack(samples, 7, tree=True)] == [["pppaa", "bb"], ["pppcc"]]
    [whole] = pack(samples, 9, tree=True)
    assert letters(whole) == ["pppaa", "bb", "cc"]
    assert whole.distinct_tokens == 9


def test_ranks_share_a_tree_fairly():
    """Eight siblings of two tokens after a prompt of three, four on each of two ranks."""
    samples = [row(f"ppp{c}{c}", "...xx") for c in "hgfedcba"]
    batches = pack(samples, 100, ranks=2, tree=True)
    assert [letters(b) for b in batches] == [
        ["pppaa", "bb", "cc", "dd"],
        ["pppee", "ff", "gg", "hh"],
    ]
    one = pack(samples, 100, ranks=3, tree=True)
    assert sorted(len(b.targets) for b in one) == [4, 6, 6]


def test_what_saves_little_stays_flat():
    """One token in common is not worth a tree."""
    samples = [row("a" + c * 20, "." + "x" * 20) for c in "bcd"]
    [batch] = pack(samples, 100, tree=True)
    assert batch.parents.tolist() == [-1, -1, -1]
    assert (len(batch.token_ids), batch.distinct_tokens) == (63, 61)


@pytest.mark.parametrize(
    ("one", "other", "shared"), [("", "ab", 0), ("abc", "abd", 2), ("ab", "abc", 2)]
)
def test_shared_length(one, other, shared):
    assert shared_length(one, other) == shared == shared_length(other, one)
