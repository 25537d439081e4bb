"""Our advantages, losses and corrections against the functions of verl 0.9.1 and TRL 1.16."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatlearn.algorithm.advantages import ADVANTAGES
from chatlearn.algorithm.aggregation import denominator, weighted
from chatlearn.algorithm.corrections import CORRECTIONS, Limits, LogRatios
from chatlearn.algorithm.losses import KL_ESTIMATORS, Bounds
from chatlearn.algorithm.objective import Objective
from chatlearn.algorithm.rollout_sums import sums_of
from chatlearn.types import Sample

pytestmark = pytest.mark.oracle

HERE = Path(__file__).parent
LOW, HIGH, DUAL, HORIZON = 0.2, 0.3, 1.7, 11
SEEDS = range(3)
MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def batch(seed: int) -> dict:
    """Six rollouts of two groups, padded to eight tokens; ratios within e^-1.5 to e^1.5."""
    dice = random.Random(seed)
    lengths = [dice.randint(1, 8) for _ in range(6)]

    def numbers(draw):
        return [[draw() for _ in range(8)] for _ in lengths]

    rollout = numbers(lambda: dice.uniform(-4.0, -0.1))
    return {
        "rollout": rollout,
        "policy": [[p + dice.gauss(0, 0.4) for p in row] for row in rollout],
        "reference": [[p + dice.gauss(0, 0.4) for p in row] for row in rollout],
        "mask": [[float(t < n) for t in range(8)] for n in lengths],
        "advantages": [dice.gauss(0, 1) for _ in lengths],
        "rewards": [dice.random() for _ in lengths],
        "groups": [0, 0, 0, 1, 1, 1],
    }


@pytest.fixture(scope="module")
def folder() -> str:
    made = subprocess.run(
        ["bash", str(HERE.parent / "oracles_env.sh")],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return made.stdout.splitlines()[-1]


@pytest.fixture(scope="module", params=SEEDS)
def both(request, folder) -> tuple[dict, dict]:
    """A random batch, and what the peers make of it."""
    given = batch(request.param)
    ran = subprocess.run(
        [sys.executable, str(HERE / "peers.py")],
        env={**os.environ, "PYTHONPATH": folder},
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return given, json.loads(ran.stdout.splitlines()[-1])


def flat(given: dict, name: str) -> torch.Tensor:
    """The trained tokens of all rollouts. [N]"""
    on = torch.tensor(given["mask"]).bool()
    values = torch.tensor(given[name], dtype=torch.float64)
    return (values if values.dim() == 2 else values[:, None].expand(on.shape))[on]


def owner(given: dict) -> torch.Tensor:
    counts = [int(sum(row)) for row in given["mask"]]
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def ours(given: dict, objective: Objective, aggregation: str) -> tuple[float, list[list[float]]]:
    """The loss of a step and its gradient in the policy's logprobs, laid out as the peers do."""
    samples = []
    for number, row in enumerate(given["mask"]):
        on = [False, *[True] * int(sum(row))]
        nothing = [0.0] * len(on)
        samples.append(Sample([1] * len(on), on, nothing, nothing, trajectory=str(number)))
    samples = weighted(samples, aggregation)
    weights = torch.tensor([s.weight for s in samples], dtype=torch.float64)[owner(given)]
    policy = flat(given, "policy").requires_grad_()
    rollout, advantages = flat(given, "rollout"), flat(given, "advantages")
    sums = sums_of(objective.columns(policy, rollout, advantages), owner(given), len(samples))
    terms = objective(
        policy,
        rollout,
        advantages,
        sums=sums[owner(given)],
        reference=flat(given, "reference") if objective.kl_coef else None,
    )
    loss = (weights * terms.loss).sum() / denominator(samples, aggregation, horizon=HORIZON)
    loss.backward()
    gradient = torch.zeros(len(given["mask"]), 8, dtype=torch.float64)
    gradient[torch.tensor(given["mask"]).bool()] = policy.grad
    return loss.item(), gradient.tolist()


def same(got, expected):
    got, expected = (torch.tensor(v, dtype=torch.float64) for v in (got, expected))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
)
def test_advantages(both, name):
    given, theirs = both
    rewards = [given["rewards"][:3], given["rewards"][3:]]
    got = [a for group in ADVANTAGES[name](rewards) for a in group]
    same(got, theirs[f"verl/{name}"])


def test_losses_and_their_gradients(both):
    """Every loss under every aggregation that a peer has it with."""
    given, theirs = both
    bounds = Bounds(LOW, HIGH)
    plain = Objective(bounds=bounds)
    objectives = {
        "clip": plain,
        "clip+kl": replace(plain, kl_coef=0.1),
        "dual": replace(plain, bounds=bounds._replace(dual_clip_ratio=DUAL)),
        **{
            loss: replace(plain, loss=loss)
            for loss in ("gspo", "gmpo", "cispo", "sapo", "reinforce")
        },
    }
    compared = 0
    for name, expected in theirs.items():
        peer, _, rest = name.partition("/")
        loss, _, aggregation = rest.partition("/")
        if aggregation not in MODES:
            continue
        # TRL's CISPO has no lower bound
        objective = objectives[loss]
        if (peer, loss) == ("trl", "cispo"):
            objective = replace(objective, bounds=bounds._replace(neg_clip_ratio=1.0))
        value, gradient = ours(given, objective, aggregation)
        same(value, expected["loss"])
        same(gradient, expected["gradient"])
        compared += 1
    assert compared == 30


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_kl_estimators_and_their_gradients(both, name):
    given, theirs = both
    policy = flat(given, "policy").requires_grad_()
    total = KL_ESTIMATORS[name](policy, flat(given, "reference")).sum()
    total.backward()
    same(total.item(), theirs[f"verl/kl/{name}"]["loss"])
    on = torch.tensor(given["mask"]).bool()
    same(
        policy.grad.tolist(),
        torch.tensor(theirs[f"verl/kl/{name}"]["gradient"], dtype=torch.float64)[on].tolist(),
    )


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections(both, name):
    given, theirs = both
    token = flat(given, "policy") - flat(given, "rollout")
    sums = sums_of(token[:, None], owner(given), len(given["mask"]))[owner(given)]
    ratios = LogRatios(token, sums[:, 0], sums[:, 0] / sums[:, 1])
    limits = Limits(high=1.25) if name.endswith("tis") else Limits(0.8, 1.25)
    on = torch.tensor(given["mask"]).bool()
    same(
        CORRECTIONS[name].weights(ratios, limits).tolist(),
        torch.tensor(theirs[f"verl/{name}"], dtype=torch.float64)[on].tolist(),
    )
