"""Rewards of siblings, and of their turns, in; advantages out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import fsum, sqrt

from chatlearn.types import Group, Turn

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


def turn_advantages(group: Group) -> dict[str, dict[int, float]]:
    """The advantages of turns that have a reward of their own, by trajectory uid and turn id.

    Such a turn is compared, by ``grpo``, with every rewarded turn of the same ``Turn.path`` in all
    trainable siblings: what a writer earned says nothing about a judge. Two siblings::

        a   write 1.0   judge 0.0           write: 1.0 and 0.0 and 0.5 are compared
        b   write 0.0   write 0.5           judge: 0.0 is alone, its advantage is 0.0

    Each rewarded turn is an entry of its own, so a run with more of them has more say in mean and
    std. Excluded turns have none. The uids are those of ``group_advantages``; a turn that is not
    there is trained on the advantage of its run.
    """
    trained = group.trainable
    if len(trained) < 2:
        return {}
    by_path: defaultdict[str, list[tuple[str, Turn]]] = defaultdict(list)
    for trajectory in trained:
        for turn in trajectory.turns:
            if turn.reward is not None and not turn.excluded:
                by_path[turn.path].append((trajectory.uid, turn))
    found: dict[str, dict[int, float]] = {trajectory.uid: {} for trajectory in trained}
    for entries in by_path.values():
        rewards = [turn.reward for _, turn in entries if turn.reward is not None]
        for (uid, turn), advantage in zip(entries, grpo(rewards), strict=True):
            found[uid][turn.id] = advantage
    return found
