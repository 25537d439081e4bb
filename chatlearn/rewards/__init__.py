"""Reward functions: ``@reward("data_source")`` registers one, ``score`` calls it.

Judges score runs of workflows (``judging.py``, ``judges.py``), checks find degenerate output
(``checks.py``).

Importing the package registers the functions of ``math.py``.
"""

from chatlearn.rewards import math as _built_in
from chatlearn.rewards.judge_names import judge
from chatlearn.rewards.judging import BaseJudge, JudgeCase, JudgeOutput, load_judge
from chatlearn.rewards.registry import RewardFunction, lookup, resolve_reward, reward
from chatlearn.rewards.responses import final_response
from chatlearn.rewards.score import score

BUILT_IN = (_built_in.math_reward, _built_in.gsm8k_reward, _built_in.arithmetic_reward)

__all__ = [
    "BUILT_IN",
    "BaseJudge",
    "JudgeCase",
    "JudgeOutput",
    "RewardFunction",
    "final_response",
    "judge",
    "load_judge",
    "lookup",
    "resolve_reward",
    "reward",
    "score",
]
