"""Groups of one episode in, samples ready to be packed out: advantages and weights together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chatlearn.algorithm.advantages import (
    anchored_advantages,
    group_advantages,
    overlong_penalty,
    turn_advantages,
)
from chatlearn.algorithm.aggregation import weighted
from chatlearn.algorithm.samples import to_samples
from chatlearn.types import Group, Sample, Trajectory


@dataclass(frozen=True, slots=True)
class Scoring:
    """How rollouts are judged; names and numbers as in ``models.policy_trainer``."""

    advantage: str = "grpo"
    turn_discount: float = 0.0
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    max_tokens: int = 0
    """That a rollout may sample; needed with an ``overlong_buffer``."""
    aggregation: str = "token-mean"

    def __call__(self, groups: Sequence[Group]) -> tuple[dict[str, float], list[list[Sample]]]:
        """Advantage of every trainable trajectory by uid, and its samples as one row of a list.

        Tokens of turns with a reward of their own have that turn's advantage in them instead.
        """
        advantages = group_advantages(*groups, estimator=self.advantage, shape=self._overlong)
        if self.advantage == "gigpo":
            own = anchored_advantages(
                *groups,
                of_run=advantages,
                discount=self.turn_discount,
                shape=self._overlong,
            )
        else:
            own = turn_advantages(*groups, estimator=self.advantage, discount=self.turn_discount)
        rows = [
            weighted(to_samples(t, advantages[t.uid], own[t.uid]), self.aggregation)
            for group in groups
            for t in group.trajectories
            if t.uid in advantages
        ]
        return advantages, rows

    def _overlong(self, trajectory: Trajectory) -> float:
        sampled = trajectory.sampled_tokens
        return self.overlong_penalty * overlong_penalty(
            sampled, self.max_tokens, self.overlong_buffer
        )
