"""What an update minimises at one token: policy loss, correction, KL and entropy terms together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from chatlearn.algorithm.corrections import CORRECTIONS, LogRatios, limits_of
from chatlearn.algorithm.losses import KL_ESTIMATORS, LOSSES, Bounds, ClipMetrics, Tokens
from chatlearn.errors import TrainerError


class Terms(NamedTuple):
    """Of the trained tokens of a micro-batch."""

    loss: torch.Tensor  # [N] with gradient
    clip: ClipMetrics
    kl: torch.Tensor | None  # [N] KL(policy ‖ reference), where it is a term
    weights: torch.Tensor | None  # [N] of the correction, where there is one


def is_of_rollouts(loss: str, correction: str) -> bool:
    """Whether a token's loss depends on numbers of its whole rollout."""
    corrects = correction != "none" and CORRECTIONS[correction].of_rollouts
    return corrects or LOSSES[loss].log_ratio is not None


@dataclass(frozen=True, slots=True)
class Objective:
    """Names and coefficients, as in ``models.policy_trainer``."""

    loss: str = "clip"
    bounds: Bounds = field(default_factory=Bounds)
    correction: str = "none"
    """At each step, of the engine's logprobs; "none" too where the proximal ones are known."""
    correction_low: float | None = None
    """None = as the correction has it."""
    correction_high: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        known = {
            "loss": LOSSES,
            "correction": {"none": None, **CORRECTIONS},
            "kl_estimator": KL_ESTIMATORS,
        }
        for key, values in known.items():
            if getattr(self, key) not in values:
                raise TrainerError(
                    f"models.policy_trainer.{key} is {getattr(self, key)!r}; it must be one of "
                    f"{list(values)}"
                )
        if self.correction != "none" and CORRECTIONS[self.correction].is_ratio and self.has_ratio:
            raise TrainerError(
                f"models.policy_trainer.correction={self.correction} with loss={self.loss} counts "
                "the ratio to the engine twice; set decoupled=true, loss=reinforce, or a mask"
            )

    @property
    def has_ratio(self) -> bool:
        return LOSSES[self.loss].has_ratio

    @property
    def of_rollouts(self) -> bool:
        """Whether a token's loss depends on numbers of its whole rollout."""
        return is_of_rollouts(self.loss, self.correction)

    def columns(
        self, policy: torch.Tensor, rollout: torch.Tensor, advantages: torch.Tensor
    ) -> torch.Tensor:
        """What is summed over whole rollouts, without gradient. [N], [N], [N] -> [N, 2]

        The log ratio that the loss needs, and the plain one.
        """
        plain = (policy - rollout).detach()
        wanted = LOSSES[self.loss].log_ratio
        tokens = Tokens(policy.detach(), rollout, advantages)
        own = plain if wanted is None else wanted(tokens, self.bounds)
        return torch.stack([own, plain], dim=1)

    def __call__(
        self,
        policy: torch.Tensor,
        rollout: torch.Tensor,
        advantages: torch.Tensor,
        *,
        sums: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        entropy: torch.Tensor | None = None,
    ) -> Terms:
        """The loss of each token. [N]

        Args:
            policy: logprobs under the current weights, with gradient. [N]
            rollout: logprobs that the ratio is against. [N]
            advantages: [N]
            sums: over the token's whole rollout, of ``columns`` and of its tokens; needed where
                ``of_rollouts``. [N, 3]
            reference: its logprobs, where ``kl_coef`` is not 0. [N]
            entropy: of the policy, where ``entropy_coef`` is not 0. [N]
        """
        mean = None if sums is None else (sums[:, 0] / sums[:, 2]).to(policy.dtype)
        loss, clip = LOSSES[self.loss].of_tokens(
            Tokens(policy, rollout, advantages, mean), self.bounds
        )
        weights = self._weights(policy, rollout, sums)
        if weights is not None:
            loss = loss * weights
        kl = None
        if reference is not None:
            kl = KL_ESTIMATORS[self.kl_estimator](policy, reference)
            loss = loss + self.kl_coef * kl
        if entropy is not None:
            loss = loss - self.entropy_coef * entropy
        return Terms(loss, clip, kl, weights)

    def _weights(
        self, policy: torch.Tensor, rollout: torch.Tensor, sums: torch.Tensor | None
    ) -> torch.Tensor | None:
        if self.correction == "none":
            return None
        correction = CORRECTIONS[self.correction]
        token = (policy - rollout).detach()
        whole = token if sums is None else sums[:, 1].to(token.dtype)
        mean = token if sums is None else (sums[:, 1] / sums[:, 2]).to(token.dtype)
        limits = limits_of(self.correction, low=self.correction_low, high=self.correction_high)
        return correction.weights(LogRatios(token, whole, mean), limits)
