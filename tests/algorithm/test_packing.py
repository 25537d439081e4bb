"""Packing: what is laid where, under which limit, with which denominator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.algorithm.aggregation import step_batches
from chatlearn.algorithm.packing import collate, cost, pack
from chatlearn.errors import TrainerError
from chatlearn.types import Sample


def sample(length: int, trained: int = 1, name: str = "g/0", weight: float = 1.0, first: int = 0):
    """``first, first + 1, ...``, the last ``trained`` of them trained."""
    on = [i >= length - trained for i in range(length)]
    numbers = [float(first + i) if o else 0.0 for i, o in enumerate(on)]
    ids = list(range(first, first + length))
    return Sample(ids, on, [-n for n in numbers], numbers, weight=weight, trajectory=name)


def test_two_samples_in_one_row():
    """
    samples   [10 11 12]  [20 21]        weights 1 and 2
    packed     10 11 12    20 21
    """
    second = sample(2, 1, weight=2.0, first=20)
    second.temperatures = [1.0, 0.5]
    [batch] = pack([second, sample(3, 2, first=10)], max_tokens=5)
    assert batch.token_ids.tolist() == [10, 11, 12, 20, 21]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.parents.tolist() == [-1, -1]
    assert batch.targets.tolist() == [1, 2, 4]
    assert batch.predictors.tolist() == [0, 1, 3]
    assert batch.rollout_logprobs.tolist() == [-11, -12, -21]
    assert batch.advantages.tolist() == [11, 12, 21]
    assert batch.temperatures.tolist() == [1, 1, 0.5]
    assert batch.weights.tolist() == [1, 1, 2]
    assert batch.owners.tolist() == [0, 0, 0]
    assert batch.trajectories == ["g/0"]
    assert batch.denominator == 1 + 1 + 2
    assert batch.distinct_tokens == 5
    dtypes = (batch.token_ids, batch.position_ids, batch.cu_seqlens, batch.targets)
    assert [str(t.dtype)[6:] for t in dtypes] == ["int64", "int64", "int32", "int64"]


def test_first_fit_decreasing():
    batches = pack([sample(n) for n in (2, 5, 4, 3, 6)], max_tokens=10)
    assert [batch.cu_seqlens.diff().tolist() for batch in batches] == [[6, 4], [5, 3, 2]]


def test_a_sample_above_the_limit_is_named():
    with pytest.raises(TrainerError) as caught:
        pack([sample(3), sample(9, name="train:4/1")], max_tokens=8)
    for word in ("train:4/1", "9", "8", "models.policy_trainer.max_token_in_packing"):
        assert word in str(caught.value)


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-60])
def test_a_temperature_that_cannot_divide_is_named(temperature):
    cold = sample(3, name="train:4/1")
    cold.temperatures = [1.0, 1.0, temperature]
    with pytest.raises(TrainerError) as caught:
        pack([sample(3), cold], max_tokens=8)
    for word in ("train:4/1", str(temperature), "models.policy.temperature"):
        assert word in str(caught.value)


def test_rows_without_advantage_can_be_left_out_but_count_in_the_denominator():
    rows = [sample(3, 2, first=10), sample(4, 3, first=20)]
    rows[1].advantages = [0.0] * 4
    settings = {"aggregation": "token-mean", "horizon": 1, "max_tokens": 10}
    [batch] = step_batches(rows, **settings)
    assert batch.token_ids.tolist() == [10, 11, 12]
    assert batch.denominator == 2 + 3
    [whole] = step_batches(rows, **settings, all_rows=True)
    assert (len(whole.token_ids), whole.denominator) == (7, 5)
    assert step_batches(rows[1:], **settings) == []


def test_nothing_packs_to_nothing():
    assert pack([], max_tokens=8) == []


@given(
    st.lists(st.tuples(st.integers(2, 9), st.floats(0.25, 2.0)), min_size=1, max_size=30),
    st.integers(9, 30),
)
def test_nothing_is_lost_and_the_limit_holds(shapes, limit):
    samples = [
        sample(n, n - 1, weight=w, first=100 * i) for i, (n, w) in enumerate(shapes, start=1)
    ]
    batches = pack(samples, limit)
    assert all(len(batch.token_ids) <= limit for batch in batches)
    found = [
        tuple(batch.token_ids[a:b].tolist())
        for batch in batches
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
    ]
    assert sorted(found) == sorted(tuple(s.token_ids) for s in samples)
    [denominator] = {batch.denominator for batch in batches}
    assert denominator == pytest.approx(sum(w * (n - 1) for n, w in shapes))
    again = pack(samples, limit)
    assert [b.token_ids.tolist() for b in again] == [b.token_ids.tolist() for b in batches]


def test_collate_keeps_the_order():
    batch = collate([sample(2, first=5), sample(3, first=1)], denominator=7.0)
    assert batch.token_ids.tolist() == [5, 6, 1, 2, 3]
    assert batch.denominator == 7.0


def test_two_ranks_by_hand():
    """
    rows 9 8 5 4 2 1, room 20      first fit   [9 8 2 1] [5 4]      20 and 9 tokens
                                   balanced    [8 5 2] [9 4 1]      15 and 14
    """
    rows = [*map(sample, (2, 5, 9, 4, 8)), sample(1, trained=0)]
    batches = pack(rows, max_tokens=20, ranks=2)
    assert [batch.cu_seqlens.diff().tolist() for batch in batches] == [[8, 5, 2], [9, 4, 1]]
    assert {batch.denominator for batch in batches} == {5.0}


def test_turns_go_back_and_forth():
    """The rank that has the longest row of the first turn has the shortest of the second."""
    batches = pack([sample(n) for n in (10, 9, 8, 7)], max_tokens=10, ranks=2)
    assert [len(batch.token_ids) for batch in batches] == [10, 9, 7, 8]


def test_ranks_without_a_row_get_one_that_trains_nothing():
    batches = pack([sample(6, 2, first=10)], max_tokens=8, ranks=3)
    assert [batch.token_ids.tolist() for batch in batches[1:]] == [[10, 11], [10, 11]]
    assert not any(len(batch.targets) for batch in batches[1:])
    assert {batch.denominator for batch in batches} == {2.0}
    assert pack([], max_tokens=8, ranks=2) == []


ROWS = st.lists(st.tuples(st.integers(2, 60), st.floats(0.25, 2.0)), min_size=1, max_size=40)


def rows_of(batches):
    return sorted(
        tuple(batch.token_ids[a:b].tolist())
        for batch in batches
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
        if len(batch.targets)
    )


@given(ROWS, st.integers(60, 200), st.integers(2, 9))
def test_any_number_of_ranks_shares_all_rows(shapes, limit, ranks):
    samples = [
        sample(n, n - 1, weight=w, first=100 * i) for i, (n, w) in enumerate(shapes, start=1)
    ]
    batches = pack(samples, limit, ranks=ranks)
    assert len({len(batches[r::ranks]) for r in range(ranks)}) == 1
    assert all(len(batch.token_ids) <= limit for batch in batches)
    assert rows_of(batches) == sorted(tuple(s.token_ids) for s in samples)
    [denominator] = {batch.denominator for batch in batches}
    assert denominator == pack(samples, limit)[0].denominator
    again = pack(samples, limit, ranks=ranks)
    assert [b.token_ids.tolist() for b in again] == [b.token_ids.tolist() for b in batches]
    fewest = len(pack(samples, limit))
    assert len(batches) < 2 * fewest + 2 * ranks


@given(st.lists(st.integers(2, 20_000), min_size=1, max_size=60), st.integers(2, 8))
def test_ranks_differ_by_one_row_at_most(lengths, ranks):
    """Where the limit leaves room to choose; long rows weigh more than their tokens."""
    samples = [sample(n) for n in lengths]
    batches = pack(samples, max_tokens=10**6, ranks=ranks)
    dearest = max(map(cost, samples))

    def work(batches):
        rows = (n for b in batches for n in b.cu_seqlens.diff().tolist() if len(b.targets))
        return sum(cost(sample(n)) for n in rows)

    totals = [work(batches[r::ranks]) for r in range(ranks)]
    assert max(totals) - min(totals) <= dearest + 1e-6
    for turn in range(0, len(batches), ranks):
        costs = [work([batch]) for batch in batches[turn : turn + ranks]]
        assert max(costs) - min(costs) <= dearest + 1e-6


@given(ROWS, st.integers(60, 200))
def test_one_rank_is_packed_as_ever(shapes, limit):
    samples = [sample(n, first=100 * i) for i, (n, _) in enumerate(shapes)]
    one, plain = pack(samples, limit, ranks=1), pack(samples, limit)
    assert [b.token_ids.tolist() for b in one] == [b.token_ids.tolist() for b in plain]
