"""Reward functions: ``@reward("data_source")`` registers one, ``score`` calls it.

Importing the package registers the functions of ``math.py``.
"""

from chatlearn.rewards import math as _built_in
from chatlearn.rewards.registry import RewardFunction, lookup, resolve_reward, reward
from chatlearn.rewards.score import final_response, score

BUILT_IN = (_built_in.math_reward, _built_in.gsm8k_reward, _built_in.arithmetic_reward)

__all__ = [
    "BUILT_IN",
    "RewardFunction",
    "final_response",
    "lookup",
    "resolve_reward",
    "reward",
    "score",
]
