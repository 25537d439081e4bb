"""Losses: numbers and gradients by hand."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from chatlearn.algorithm.losses import clipped_surrogate, kl_k3

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
