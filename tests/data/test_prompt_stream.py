"""Law 5: kill and restart at any point, and every prompt is trained or dropped exactly once."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chatlearn.data.prompt_stream import PromptStream
from chatlearn.errors import CheckpointError, DataError
from chatlearn.types import Task

TASKS = [
    Task(f"d:{n}", [{"role": "user", "content": f"prompt {n}"}], "a", None, "", n) for n in range(5)
]


def stream(tasks=TASKS, seed=3, shuffle=True):
    return PromptStream(tasks, seed=seed, shuffle=shuffle)


def uids(prompts, count):
    return [prompts.take()[1].uid for _ in range(count)]


def test_every_epoch_is_a_permutation_and_the_order_repeats():
    first = uids(stream(), 50)
    assert first == uids(stream(), 50)
    epochs = [tuple(first[start : start + 5]) for start in range(0, 50, 5)]
    assert all(sorted(epoch) == [task.uid for task in TASKS] for epoch in epochs)
    assert len(set(epochs)) > 5, "every epoch has an order of its own"
    assert uids(stream(seed=4), 50) != first


def test_the_order_of_a_seed_never_changes():
    """A new version of this package must resume an old run: the numbers are literal."""
    prompts = stream()
    assert [prompts.take()[1].ground_truth for _ in range(10)] == [2, 3, 1, 0, 4, 1, 3, 0, 4, 2]


def test_without_shuffle_the_given_order_is_kept():
    assert uids(stream(shuffle=False), 7) == ["d:0", "d:1", "d:2", "d:3", "d:4", "d:0", "d:1"]


def test_a_prompt_goes_through_its_states():
    prompts = stream()
    (a, _), (b, _), (c, task_c), (d, _) = (prompts.take() for _ in range(4))
    assert [a, b, c, d] == [0, 1, 2, 3]
    prompts.finish(a)
    prompts.finish(b)
    prompts.trained(a)
    prompts.give_back(c)
    prompts.drop(d)
    assert prompts.counts() == {
        "pending": 1,
        "running": 0,
        "finished": 1,
        "trained": 1,
        "dropped": 1,
    }
    assert prompts.take() == (2, task_c), "given back, so issued before new ones"
    assert prompts.take()[0] == 4


def test_open_prompts_are_issued_again_in_order_after_a_restart():
    before = stream()
    taken = dict(before.take() for _ in range(12))
    for ticket in (0, 3, 5, 7):
        before.finish(ticket)
    before.trained(0)
    before.trained(5)
    before.drop(7)
    before.drop(8)
    before.give_back(9)
    after = stream()
    after.restore(json.loads(json.dumps(before.state())))
    assert after.counts() == {
        "pending": 8,
        "running": 0,
        "finished": 0,
        "trained": 2,
        "dropped": 2,
    }
    again = dict(after.take() for _ in range(8))
    assert list(again) == [1, 2, 3, 4, 6, 9, 10, 11]
    assert all(taken[ticket] is task for ticket, task in again.items())
    assert before.take()[0] == 9, "only what was given back"
    assert after.take() == before.take(), "then both go on with ticket 12"


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (stream(TASKS[:4]), "number of tasks (5 then, 4 now)"),
        (stream([*TASKS[:4], replace(TASKS[4], uid="e:4")]), "row names"),
        (stream([*TASKS[:4], replace(TASKS[4], messages=[])]), "prompts ("),
        (stream([TASKS[1], TASKS[0], *TASKS[2:]]), "row names"),
        (stream(seed=4), "seed (3 then, 4 now)"),
        (stream(shuffle=False), "shuffle (True then, False now)"),
    ],
)
def test_another_dataset_or_order_is_refused(other, what):
    with pytest.raises(CheckpointError) as error:
        other.restore(stream().state())
    assert what in str(error.value)
    assert "runtime_args.enable_resume_training=False" in str(error.value)


@pytest.mark.parametrize(
    "damage", [{"open": [0, 1]}, {"next": 9}, {"trained": None}, {"dataset": 3}]
)
def test_a_damaged_state_is_refused(damage):
    with pytest.raises(CheckpointError, match="enable_resume_training=False"):
        stream().restore({**stream().state(), **damage})


def test_illegal_moves_are_broken_invariants():
    prompts = stream()
    running, finished, trained, pending = (prompts.take()[0] for _ in range(4))
    for ticket in (finished, trained):
        prompts.finish(ticket)
    prompts.trained(trained)
    prompts.give_back(pending)
    for move, ticket, message in [
        (prompts.trained, running, r"trained\(0\): it is running, not finished"),
        (prompts.finish, finished, r"finish\(1\): it is finished"),
        (prompts.trained, trained, "it was trained or dropped"),
        (prompts.drop, pending, r"drop\(3\): it is pending"),
        (prompts.give_back, trained, "it was trained or dropped"),
        (prompts.finish, 99, "never issued"),
    ]:
        with pytest.raises(AssertionError, match=message):
            move(ticket)


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match=r"runtime_args\.data_path"):
        stream([])


class Crashes(RuleBasedStateMachine):
    """A driver that is killed at any time and goes on from its last checkpoint.

    ``learned`` stands for the weights: which tickets they have been trained on. They are saved with
    the ledger, and lost with it.
    """

    def __init__(self):
        super().__init__()
        self.stream = stream()
        self.learned = Counter()
        self.dropped = Counter()
        self.running = set()
        self.finished = set()
        self.seen = {}
        self.save()

    @rule()
    def take(self):
        ticket, task = self.stream.take()
        assert ticket not in self.running | self.finished
        assert self.seen.setdefault(ticket, task) is task
        self.running.add(ticket)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.running)))
        self.stream.finish(ticket)
        self.running.remove(ticket)
        self.finished.add(ticket)

    @precondition(lambda self: self.finished)
    @rule(data=st.data())
    def train(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.finished)))
        self.stream.trained(ticket)
        self.finished.remove(ticket)
        self.learned[ticket] += 1

    @precondition(lambda self: self.running or self.finished)
    @rule(data=st.data(), give_back=st.booleans())
    def give_up(self, data, give_back):
        ticket = data.draw(st.sampled_from(sorted(self.running | self.finished)))
        self.running.discard(ticket)
        self.finished.discard(ticket)
        if give_back:
            self.stream.give_back(ticket)
        else:
            self.stream.drop(ticket)
            self.dropped[ticket] += 1

    @rule()
    def save(self):
        self.saved = json.dumps(self.stream.state()), self.learned.copy(), self.dropped.copy()

    @rule()
    def kill(self):
        state, learned, dropped = self.saved
        self.stream = stream()
        self.stream.restore(json.loads(state))
        self.learned, self.dropped = learned.copy(), dropped.copy()
        self.running, self.finished = set(), set()

    @invariant()
    def counts_agree(self):
        counts = self.stream.counts()
        assert counts["running"] == len(self.running)
        assert counts["finished"] == len(self.finished)
        assert counts["trained"] == self.learned.total()
        assert counts["dropped"] == self.dropped.total()

    def teardown(self):
        """Train what is left: then every ticket was trained or dropped once, and none is lost."""
        last = max(self.seen, default=-1)
        for ticket in sorted(self.finished):
            self.stream.trained(ticket)
            self.learned[ticket] += 1
        for ticket in sorted(self.running):
            self.stream.give_back(ticket)
        while True:
            ticket, _ = self.stream.take()
            if ticket > last:
                break
            self.stream.finish(ticket)
            self.stream.trained(ticket)
            self.learned[ticket] += 1
        assert self.learned + self.dropped == Counter(range(last + 1))


TestCrashes = Crashes.TestCase
TestCrashes.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, database=None
)
