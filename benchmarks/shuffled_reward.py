"""A reward that says nothing: right or wrong as often as the policy is, but of another rollout.

The control of ``quickstart_seeds.py``: whatever rises under it did not rise by learning the task.
"""

from __future__ import annotations

import random
from typing import Any

from chatlearn.rewards.math import arithmetic_reward

_pool: list[float] = []
_choice = random.Random(0)


def shuffled(response: str, ground_truth: Any) -> tuple[float, dict[str, float]]:
    """The reward some earlier rollout earned, drawn from all of them; the true one is a metric."""
    true, metrics = arithmetic_reward(response, ground_truth)
    _pool.append(true)
    return _choice.choice(_pool), {**metrics, "true_reward": true}
