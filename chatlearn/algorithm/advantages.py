"""Rewards of siblings in, advantages out."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt

from chatlearn.types import Group

_EPSILON = 1e-6


def grpo(rewards: Sequence[float]) -> list[float]:
    """Group-relative advantages: ``(reward - mean) / (std + 1e-6)``. [G] -> [G]

    GRPO, DeepSeekMath section 4.1 (https://arxiv.org/abs/2402.03300). The paper does not say which
    standard deviation it means; this is the sample one (divisor G - 1), as in TRL and verl.
    Equal rewards, and a group of one, give exactly 0.0 for every sibling.
    """
    if not rewards or min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = fsum(rewards) / len(rewards)
    std = sqrt(fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
    return [(reward - mean) / (std + _EPSILON) for reward in rewards]


def group_advantages(group: Group) -> dict[str, float]:
    """The advantage of every trainable trajectory of ``group``, by ``Trajectory.uid``.

    The statistics are over rollouts, never over rows: a run that forked into many samples counts
    once. Failed siblings are absent from mean and std (law 4: a failure is not a reward of 0).
    Fewer than two trainable siblings have nothing to be compared with: the result is empty.
    """
    trained = group.trainable
    if len(trained) < 2:
        return {}
    uids = [trajectory.uid for trajectory in trained]
    assert len(set(uids)) == len(uids), f"siblings of {group.task.uid} share a uid: {uids}"
    rewards = [trajectory.reward for trajectory in trained if trajectory.reward is not None]
    return dict(zip(uids, grpo(rewards), strict=True))
