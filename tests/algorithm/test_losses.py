"""Losses: numbers and gradients by hand."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from chatlearn.algorithm.aggregation import AGGREGATIONS, denominator, step_batches, weighted
from chatlearn.algorithm.corrections import CORRECTIONS, Limits, LogRatios, decoupled
from chatlearn.algorithm.losses import (
    KL_ESTIMATORS,
    LOSSES,
    Bounds,
    Tokens,
    clipped_surrogate,
    kl_k1,
    kl_k3,
)
from chatlearn.algorithm.objective import Objective
from chatlearn.config.models import PolicyTrainerConfig
from chatlearn.errors import TrainerError
from chatlearn.types import Sample

CLIP = {"neg_clip_ratio": 0.2, "pos_clip_ratio": 0.5}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "low", "high"),
    [
        # gradient: d loss / d policy_logprob = -ratio * advantage, or 0 where the bound cuts it
        (1.0, 2.0, -2.0, -2.0, False, False),
        (1.0, -2.0, 2.0, 2.0, False, False),
        (2.0, 1.0, -1.5, 0.0, False, True),  # likely enough already: upper bound
        (2.0, -1.0, 2.0, 2.0, False, False),  # pessimistic: a worse ratio is never forgiven
        (0.5, -1.0, 0.8, 0.0, True, False),  # unlikely enough already: lower bound
        (0.5, 1.0, -0.5, -0.5, False, False),
        (1.4, 1.0, -1.4, -1.4, False, False),  # above 1 + 0.2: the bounds differ
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, gradient, low, high):
    policy = torch.tensor([log(ratio) - 3.0], requires_grad=True)
    got, metrics = clipped_surrogate(
        policy, torch.tensor([-3.0]), torch.tensor([advantage]), **CLIP
    )
    got.sum().backward()
    assert got.item() == pytest.approx(loss, rel=1e-5)
    assert policy.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert metrics.ratio.item() == pytest.approx(ratio, rel=1e-5)
    assert (metrics.clipped_low.item(), metrics.clipped_high.item()) == (low, high)
    assert not metrics.ratio.requires_grad


def test_on_policy_the_gradient_is_reinforce():
    policy = torch.tensor([-1.0, -2.0, -0.1], requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 0.0])
    loss, _ = clipped_surrogate(policy, policy.detach().clone(), advantages, **CLIP)
    loss.sum().backward()
    assert torch.equal(policy.grad, -advantages)


def test_k3_by_hand():
    # r = p_ref / p_policy = e^-0.5: r - 1 - log r; its gradient in the policy's logprob is 1 - r
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    kl = kl_k3(policy, torch.tensor([-1.5, -2.0]))
    kl.sum().backward()
    assert kl.tolist() == pytest.approx([exp(-0.5) - 1 + 0.5, 0.0], abs=1e-6)
    assert policy.grad.tolist() == pytest.approx([1 - exp(-0.5), 0.0], abs=1e-6)


def test_k3_is_an_unbiased_estimate_of_kl():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (policy * (policy / reference).log()).sum()
    estimate = (policy * kl_k3(policy.log(), reference.log())).sum()  # expectation, exactly
    assert estimate.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [(4.0, -1.0, 3.0, 0.0), (2.0, -1.0, 2.0, 2.0), (4.0, 1.0, -1.5, 0.0)],
)
def test_dual_clip_bounds_what_a_bad_token_can_do(ratio, advantage, loss, gradient):
    policy = torch.tensor([log(ratio)], requires_grad=True)
    got, metrics = clipped_surrogate(
        policy, torch.zeros(1), torch.tensor([advantage]), **CLIP, dual_clip_ratio=3.0
    )
    got.sum().backward()
    assert got.item() == pytest.approx(loss, rel=1e-5)
    assert policy.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert metrics.clipped_high.item() == (gradient == 0.0)


@pytest.mark.parametrize(
    ("loss", "values", "gradients"),
    [
        # two tokens of one rollout, ratios 2 and 1/2, advantages 1: their geometric mean is 1
        ("gspo", [-1.0, -1.0], [-1.0, -1.0]),
        # log ratios clipped to log 2 -> 0.5 and -log 2 (the smaller one is kept): the mean of
        # 0.5 - 0.693 over two, e^-0.0966; the first token has no gradient
        ("gmpo", [-0.9079, -0.9079], [0.0, -0.9079]),
        # weights 1.5 and 0.8
        ("cispo", [-1.5 * log(2), 0.8 * log(2)], [-1.5, -0.8]),
        # 4 sigmoid(1) and 4 sigmoid(-0.5); gradient 4 s (1 - s) ratio
        ("sapo", [-2.92423, -1.51016], [-4 * 0.731059 * 0.268941 * 2, -4 * 0.37754 * 0.62246 / 2]),
        ("reinforce", [-log(2), log(2)], [-1.0, -1.0]),
    ],
)
def test_losses_by_hand(loss, values, gradients):
    policy = torch.tensor([log(2), -log(2)], requires_grad=True)
    tokens = Tokens(policy, torch.zeros(2), torch.ones(2))
    bounds = Bounds(neg_clip_ratio=0.2, pos_clip_ratio=0.5)
    if LOSSES[loss].log_ratio is not None:
        mean = LOSSES[loss].log_ratio(tokens, bounds).detach().mean().expand(2)
        tokens = tokens._replace(rollout_mean=mean)
    got, _ = LOSSES[loss].of_tokens(tokens, bounds)
    got.sum().backward()
    assert got.tolist() == pytest.approx(values, abs=1e-4)
    assert policy.grad.tolist() == pytest.approx(gradients, abs=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_every_loss_has_the_gradient_of_reinforce(loss):
    policy = torch.tensor([-1.0, -2.0, -0.1], requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 0.3])
    objective = Objective(loss=loss)
    sums = objective.columns(policy, policy.detach(), advantages).sum(0)
    sums = torch.cat([sums, torch.tensor([3.0])]).expand(3, 3)
    objective(policy, policy.detach().clone(), advantages, sums=sums).loss.sum().backward()
    assert policy.grad.tolist() == pytest.approx((-advantages).tolist(), abs=1e-6)


def test_k1_has_the_value_of_k1_and_the_gradient_of_the_kl():
    """Its own gradient would be 1 at every token, and 0 in expectation."""
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    kl = kl_k1(policy, torch.tensor([-1.5, -2.5]))
    kl.sum().backward()
    assert kl.tolist() == policy.grad.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "limits", "weights"),
    [
        # ratios 2, 1/2 and 3 of one rollout: product 3, geometric mean 3^(1/3) = 1.44
        ("token-tis", Limits(high=2.5), [2.0, 0.5, 2.5]),
        ("sequence-tis", Limits(high=2.5), [2.5] * 3),
        ("icepop", Limits(0.8, 2.5), [2.0, 0.0, 0.0]),
        ("token-mask", Limits(0.8, 2.5), [1.0, 0.0, 0.0]),
        ("sequence-mask", Limits(0.8, 1.5), [1.0] * 3),
        ("sequence-mask", Limits(0.8, 1.4), [0.0] * 3),
    ],
)
def test_corrections_by_hand(name, limits, weights):
    token = torch.tensor([2.0, 0.5, 3.0]).log()
    ratios = LogRatios(token, token.sum().expand(3), token.mean().expand(3))
    assert CORRECTIONS[name].weights(ratios, limits).tolist() == pytest.approx(weights, rel=1e-5)


def test_decoupled_moves_the_ratio_and_weighs_the_advantage():
    """Two rows of one rollout: proximal over rollout is 2 and 1/4, so the product is 1/2."""
    one = Sample([1, 2], [False, True], [0.0, -1.0], [0.0, 3.0], trajectory="a")
    two = Sample([1, 2, 3], [False, False, True], [0.0, 0.0, -1.0], [0.0, 0.0, 3.0], trajectory="a")
    proximal = [[0.0, -1.0 + log(2)], [0.0, -9.0, -1.0 - log(4)]]
    plain = decoupled([one, two], proximal)
    assert [s.advantages for s in plain] == [one.advantages, two.advantages]
    assert plain[1].rollout_logprobs == pytest.approx([0.0, 0.0, -1.0 - log(4)])
    got = decoupled([one, two], proximal, "sequence-tis", high=2.0)
    assert got[0].advantages == pytest.approx([0.0, 1.5])
    assert got[1].advantages == pytest.approx([0.0, 0.0, 1.5])
    got = decoupled([one, two], proximal, "token-tis", high=1.5)
    assert got[0].advantages == pytest.approx([0.0, 4.5])
    assert got[1].advantages == pytest.approx([0.0, 0.0, 0.75])


@pytest.mark.parametrize(
    ("aggregation", "of_long", "of_short"),
    [
        ("token-mean", 1 / 4, 1 / 4),
        ("seq-mean-token-mean", 1 / 6, 1 / 2),
        ("seq-mean-token-sum", 1 / 2, 1 / 2),
        ("seq-mean-token-sum-norm", 1 / 20, 1 / 20),
    ],
)
def test_aggregations_by_hand(aggregation, of_long, of_short):
    """What one token counts: of a rollout of three tokens in two rows, and of one of one token."""

    def row(trained, uid):
        on = [False, *[True] * trained]
        return Sample([1] * len(on), on, [0.0] * len(on), [1.0 * o for o in on], trajectory=uid)

    samples = weighted([row(1, "a"), row(2, "a"), row(1, "b")], aggregation)
    total = denominator(samples, aggregation, horizon=10)
    shares = [sample.weight / total for sample in samples]
    assert shares == pytest.approx([of_long, of_long, of_short])
    batches = step_batches(samples, aggregation, horizon=10, max_tokens=50)
    assert {batch.denominator for batch in batches} == {total}


def test_rows_without_advantage_stay_in_the_denominator():
    """And where a ratio is over a rollout, they stay with the rows that have one."""

    def row(advantage, uid):
        return Sample([1, 2], [False, True], [0.0] * 2, [0.0, advantage], trajectory=uid)

    samples = [row(1.0, "a"), row(0.0, "a"), row(0.0, "b")]
    keep = {"horizon": 10, "max_tokens": 50}
    [some] = step_batches(samples, "token-mean", **keep)
    [whole] = step_batches(samples, "token-mean", whole_rollouts=True, **keep)
    [every] = step_batches(samples, "token-mean", all_rows=True, **keep)
    assert (some.denominator, whole.denominator, every.denominator) == (3.0, 3.0, 3.0)
    assert (some.advantages.tolist(), some.trajectories) == ([1.0], ["a"])
    assert (whole.advantages.tolist(), whole.trajectories) == ([1.0, 0.0], ["a"])
    assert (every.advantages.tolist(), every.trajectories) == ([1.0, 0.0, 0.0], ["a", "b"])


def test_a_ratio_is_not_counted_twice():
    with pytest.raises(TrainerError, match="twice; set decoupled=true"):
        Objective(loss="clip", correction="token-tis")
    Objective(loss="reinforce", correction="token-tis")
    with pytest.raises(TrainerError, match=r"models\.policy_trainer\.loss is 'ppo'"):
        Objective(loss="ppo")


def test_the_configuration_has_every_name():
    from typing import get_args

    from chatlearn.algorithm.advantages import ADVANTAGES

    tables = {
        "advantage": ADVANTAGES,
        "loss": LOSSES,
        "aggregation": AGGREGATIONS,
        "correction": ("none", *CORRECTIONS),
        "kl_estimator": KL_ESTIMATORS,
    }
    for key, names in tables.items():
        field = PolicyTrainerConfig.model_fields[key]
        assert set(get_args(field.annotation)) == set(names), key
