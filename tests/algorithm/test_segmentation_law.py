"""Law 3 over every estimator, loss, correction and aggregation: however trajectories are cut into
rows, and rows reordered, packed, laid out as trees and spread over ranks, the gradient is the same.

The same turns are cut in two ways: as they follow each other (one row a run, or a fork), and with
random turns made roots, each then a row of its own with the same tokens before it as context. The
ranks are threads that meet at a barrier; each has a copy of the model, and their gradients add up.
"""

from __future__ import annotations

import asyncio
import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen3Config

from chatlearn.algorithm.advantages import ADVANTAGES
from chatlearn.algorithm.aggregation import AGGREGATIONS, step_batches
from chatlearn.algorithm.corrections import CORRECTIONS
from chatlearn.algorithm.losses import KL_ESTIMATORS, LOSSES
from chatlearn.algorithm.objective import is_of_rollouts
from chatlearn.algorithm.scoring import Scoring
from chatlearn.models.policy.trainer import PolicyTrainer, TrainerSettings
from chatlearn.types import Completion, Group, StopReason, Task, Trajectory, Turn

TASK = Task("t:0", [], "agent", None, "src", None)
HORIZON = 40
MODEL = Qwen3Config(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    tie_word_embeddings=True,
    initializer_range=0.3,
)
PAIRS = [
    (loss, correction)
    for loss in LOSSES
    for correction in ("none", *CORRECTIONS)
    if correction == "none" or loss == "reinforce" or not CORRECTIONS[correction].is_ratio
]


@cache
def model(seed: int):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(MODEL)


@cache
def trainer(config: TrainerSettings, rank: int) -> PolicyTrainer:
    """It never moves: its learning rate is 0."""
    return PolicyTrainer(copy.deepcopy(model(0)), None, config, reference=copy.deepcopy(model(1)))


class Meeting:
    """What ranks that are threads share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=10)
        self.said: list = [None] * size

    def exchange(self, rank: int, word):
        self.said[rank] = word
        self.barrier.wait()
        everything = list(self.said)
        self.barrier.wait()
        return everything


class ThreadRank:
    """``Ranks`` of one thread."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.size

    def gather(self, numbers):
        rows = self.meeting.exchange(self.rank, list(numbers))
        assert len({len(row) for row in rows}) == 1
        return rows

    def norm(self, own):
        return own

    def first(self, word):
        return next((w for w in self.meeting.exchange(self.rank, word) if w is not None), None)


def gradient(config, batches, ranks):
    """The sum of the gradients of all ranks, by parameter name."""
    meeting = Meeting(ranks)

    def of_rank(rank):
        policy, caught = trainer(config, rank), {}
        policy._ranks = ThreadRank(meeting, rank)
        optimizer = policy._optimizer
        optimizer.clip = lambda limit, norm: caught.update(
            (name, master.grad.clone())
            for name, master in zip(optimizer.names, optimizer.masters, strict=True)
        )
        asyncio.run(policy.step(batches[rank::ranks]))
        return caught

    with ThreadPoolExecutor(ranks) as pool:
        parts = list(pool.map(of_rank, range(ranks)))
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def groups(dice: random.Random, *, noise: float) -> list[Group]:
    """Two or three groups of runs that speak one to four times; some fork, some fail."""
    made = []
    for g in range(dice.randint(2, 3)):
        opening = [dice.randrange(3, 32) for _ in range(dice.randint(1, 4))]
        runs = [run(dice, f"g{g}/{i}", opening, noise) for i in range(dice.randint(2, 4))]
        made.append(Group(TASK, runs))
    return made


def run(dice, uid, opening, noise):
    turns: list[Turn] = []
    for number in range(dice.randint(1, 4)):
        parent = dice.choice(turns) if turns and dice.random() < 0.9 else None
        before = [*parent.token_ids, dice.randrange(3, 32)] if parent else opening
        tokens = [dice.randrange(3, 32) for _ in range(dice.randint(1, 4))]
        logprobs = [p + dice.gauss(0, noise) for p in scored(before, tokens)]
        turns.append(
            Turn(
                number,
                parent.id if parent else None,
                list(before),
                Completion(tokens, logprobs, StopReason.STOP, (0, 0)),
                node=dice.choice(["writer", "judge"]),
                temperature=1.0,
                reward=dice.choice([None, None, dice.random()]),
                excluded=dice.choice(["", "", "", "superseded"]),
            )
        )
    reward = dice.choice([0.0, 1.0, dice.random(), None])
    return Trajectory(TASK, turns, reward, uid=uid)


@torch.no_grad()
def scored(before, tokens):
    ids = torch.tensor(before + tokens)
    every = torch.log_softmax(model(0)(ids[None]).logits[0, :-1], -1)
    return every.gather(1, ids[1:, None])[len(before) - 1 :, 0].tolist()


def cut(dice, made: list[Group]) -> list[Group]:
    """The same, with some turns the roots of trees of their own."""

    def in_pieces(trajectory):
        turns = [replace(t, parent=dice.choice([t.parent, None])) for t in trajectory.turns]
        return replace(trajectory, turns=turns)

    return [Group(g.task, [in_pieces(t) for t in g.trajectories]) for g in made]


def batches(config, scoring, made, *, max_tokens, ranks, tree=False, dice=None):
    _, rows = scoring(made)
    samples = [sample for row in rows for sample in row]
    if dice is not None:
        dice.shuffle(samples)
    return step_batches(
        samples,
        scoring.aggregation,
        horizon=HORIZON,
        max_tokens=max_tokens,
        ranks=ranks,
        tree=tree,
        all_rows=config.kl_coef > 0,
        whole_rollouts=is_of_rollouts(config.loss, config.correction),
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("loss", "correction"), PAIRS)
# The same examples every time: about one in 20,000 has a ratio so near a bound that rounding moves
# it to the other side.
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_however_rollouts_are_cut_the_gradient_is_the_same(loss, correction, aggregation, data):
    dice = random.Random(data.draw(st.integers(0, 10**6), label="seed"))
    estimator = data.draw(st.sampled_from(list(ADVANTAGES)), label="estimator")
    ranks = data.draw(st.integers(1, 3), label="ranks")
    penalised = data.draw(st.booleans(), label="kl and entropy")
    config = TrainerSettings(
        lr=0.0,
        weight_decay=0.0,
        loss=loss,
        correction=correction,
        correction_high=1.3 if correction != "none" else None,
        dual_clip_ratio=3.0 if loss == "clip" else None,
        kl_coef=0.1 if penalised else 0.0,
        kl_estimator=data.draw(st.sampled_from(list(KL_ESTIMATORS))) if penalised else "k3",
        entropy_coef=0.05 if penalised else 0.0,
    )
    scoring = Scoring(
        advantage=estimator,
        turn_discount=0.9 if estimator == "gigpo" else data.draw(st.sampled_from([0.0, 0.7])),
        overlong_buffer=data.draw(st.sampled_from([0, 5])),
        max_tokens=12,
        aggregation=aggregation,
    )
    made = groups(dice, noise=0.3)
    one = batches(config, scoring, made, max_tokens=10**6, ranks=1)
    many = batches(
        config,
        scoring,
        cut(dice, made),
        max_tokens=data.draw(st.integers(26, 90), label="max_tokens"),
        ranks=ranks,
        tree=data.draw(st.booleans(), label="as trees"),
        dice=dice,
    )
    assert bool(one) == bool(many)
    if not one:
        return
    assert len(one) == 1
    expected, got = gradient(config, one, 1), gradient(config, many, ranks)
    largest = max(value.abs().max().item() for value in expected.values())
    assert largest < inf
    for name, value in got.items():
        torch.testing.assert_close(
            value,
            expected[name],
            atol=1e-5 * max(1.0, largest),
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )
