"""Token-wise losses. The caller aggregates ``sum(weight * loss) / denominator``, so that how rows
are cut, packed or spread over ranks changes nothing (law 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ClipMetrics(NamedTuple):
    """What the clipped surrogate did, token by token, without gradient."""

    ratio: torch.Tensor  # [N] p_policy / p_rollout
    clipped_low: torch.Tensor  # [N] bool: the lower bound cut this token's gradient
    clipped_high: torch.Tensor  # [N] bool: the upper bound cut this token's gradient


def clipped_surrogate(
    policy_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    neg_clip_ratio: float,
    pos_clip_ratio: float,
) -> tuple[torch.Tensor, ClipMetrics]:
    """``-min(ratio * A, clip(ratio, 1 - neg_clip_ratio, 1 + pos_clip_ratio) * A)``. [N] -> [N]

    The pessimistic surrogate of PPO (https://arxiv.org/abs/1707.06347, equation 7), with a bound
    of its own on either side ("clip-higher" of DAPO, https://arxiv.org/abs/2503.14476). The ratio
    is against what the engine reported when it sampled, not against a second trainer forward.

    Args:
        policy_logprobs: log p of each trained token under the current weights, with gradient. [N]
        rollout_logprobs: the engine's, at sampling time. [N]
        advantages: [N]
        neg_clip_ratio: how far below 1 the ratio still carries gradient, 0 to 1.
        pos_clip_ratio: how far above 1 the ratio still carries gradient.

    Returns:
        The loss of each token [N], and ``ClipMetrics``.
    """
    ratio = torch.exp(policy_logprobs - rollout_logprobs)
    low, high = 1.0 - neg_clip_ratio, 1.0 + pos_clip_ratio
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    fixed = ratio.detach()
    metrics = ClipMetrics(
        ratio=fixed,
        clipped_low=(fixed < low) & (advantages < 0),
        clipped_high=(fixed > high) & (advantages > 0),
    )
    return loss, metrics


def kl_k3(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Estimate KL(policy ‖ reference) at tokens the policy sampled. [N] -> [N]

    The k3 estimator, ``r - 1 - log r`` with ``r = p_ref / p_policy``: unbiased, of low variance
    and never negative (http://joschu.net/blog/kl-approx.html).
    """
    log_ratio = ref_logprobs - policy_logprobs
    return torch.expm1(log_ratio) - log_ratio
