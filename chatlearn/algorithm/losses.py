"""Token-wise losses. The caller aggregates ``sum(weight * loss) / denominator``, so that how rows
are cut, packed or spread over ranks changes nothing (law 3). ``LOSSES`` has every policy loss.

A loss with a ratio of its whole rollout is token-wise too: the ratio is a number without gradient
(``Tokens.rollout_mean``), and each token brings the gradient of its own part of it. "Rollout" is
what papers call a sequence: all trained tokens of a trajectory, in however many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

SAPO_TAU_POSITIVE = 1.0
SAPO_TAU_NEGATIVE = 1.05


class Bounds(NamedTuple):
    """How far a ratio may go."""

    neg_clip_ratio: float = 0.2
    """Below 1, 0 to 1."""
    pos_clip_ratio: float = 0.2
    """Above 1."""
    dual_clip_ratio: float | None = None
    """Largest ratio that still carries gradient where the advantage is negative, above 1; None =
    there is no such bound."""


class Tokens(NamedTuple):
    """The trained tokens of a micro-batch."""

    policy_logprobs: torch.Tensor  # [N] under the current weights, with gradient
    old_logprobs: torch.Tensor  # [N] the ratio is against these
    advantages: torch.Tensor  # [N]
    rollout_mean: torch.Tensor | None = None
    """[N] mean over the token's whole rollout of what ``Loss.log_ratio`` gives; no gradient."""


class ClipMetrics(NamedTuple):
    """What a loss did, token by token, without gradient."""

    ratio: torch.Tensor  # [N] p_policy / p_old, of the token or of its rollout
    clipped_low: torch.Tensor  # [N] bool: the lower bound cut this token's gradient, or weight
    clipped_high: torch.Tensor  # [N] bool: an upper bound did


Result = tuple[torch.Tensor, ClipMetrics]


def clipped_surrogate(
    policy_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    neg_clip_ratio: float,
    pos_clip_ratio: float,
    dual_clip_ratio: float | None = None,
) -> Result:
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
        dual_clip_ratio: where A < 0 the loss is at most ``-dual_clip_ratio * A`` (dual-clip PPO,
            https://arxiv.org/abs/1912.09729): a ratio beyond it has no gradient. None = no bound.

    Returns:
        The loss of each token [N], and ``ClipMetrics``.
    """
    ratio = torch.exp(policy_logprobs - rollout_logprobs)
    bounds = Bounds(neg_clip_ratio, pos_clip_ratio, dual_clip_ratio)
    return _pessimistic(ratio, advantages, bounds)


def _clip(tokens: Tokens, bounds: Bounds) -> Result:
    return clipped_surrogate(*tokens[:3], **bounds._asdict())


def _pessimistic(ratio: torch.Tensor, advantages: torch.Tensor, bounds: Bounds) -> Result:
    low, high = 1.0 - bounds.neg_clip_ratio, 1.0 + bounds.pos_clip_ratio
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    fixed = ratio.detach()
    cut_above = (fixed > high) & (advantages > 0)
    if bounds.dual_clip_ratio is not None:
        most = -bounds.dual_clip_ratio * advantages
        loss = torch.where(advantages < 0, torch.minimum(loss, most), loss)
        cut_above |= (fixed > bounds.dual_clip_ratio) & (advantages < 0)
    return loss, ClipMetrics(fixed, (fixed < low) & (advantages < 0), cut_above)


def gspo(tokens: Tokens, bounds: Bounds) -> Result:
    """The clipped surrogate with one ratio for a whole rollout. [N] -> [N]

    GSPO (https://arxiv.org/abs/2507.18071, equation 7): ``s = exp(mean of log ratios)``, the
    geometric mean over the rollout's tokens. In the paper's token form (equation 13),
    ``s_t = sg[s] * p_t / sg[p_t]``, so tokens may have advantages of their own. The paper's bounds
    are about 3e-4 and 4e-4, a thousandth of PPO's. No dual clip. Its aggregation is
    ``seq-mean-token-mean``; others are allowed, as in verl.
    """
    ratio = torch.exp(_joined(_log_ratio(tokens, bounds), tokens.rollout_mean))
    return _pessimistic(ratio, tokens.advantages, bounds._replace(dual_clip_ratio=None))


def gmpo(tokens: Tokens, bounds: Bounds) -> Result:
    """``-A * geometric mean over the rollout of clipped ratios``. [N] -> [N]

    GMPO (https://arxiv.org/abs/2507.20673): each token's log ratio is clipped, pessimistically, to
    ``[-neg_clip_ratio, pos_clip_ratio]``; the paper has 0.4 on both sides. The mean of these token
    losses over a rollout has the paper's value and gradient, so the aggregation is
    ``seq-mean-token-mean``. Deviation: tokens of one rollout may have advantages of their own.
    """
    plain = tokens.policy_logprobs - tokens.old_logprobs
    loss = -tokens.advantages * torch.exp(
        _joined(_clipped_log_ratio(tokens, bounds), tokens.rollout_mean)
    )
    fixed = plain.detach()
    metrics = ClipMetrics(
        ratio=fixed.exp(),
        clipped_low=(fixed < -bounds.neg_clip_ratio) & (tokens.advantages < 0),
        clipped_high=(fixed > bounds.pos_clip_ratio) & (tokens.advantages > 0),
    )
    return loss, metrics


def cispo(tokens: Tokens, bounds: Bounds) -> Result:
    """``-sg[clip(ratio, 1 - neg_clip_ratio, 1 + pos_clip_ratio)] * A * log p``. [N] -> [N]

    CISPO (MiniMax-M1, https://arxiv.org/abs/2506.13585, equation 4): the weight is clipped and no
    token loses its gradient. The paper leaves the lower bound out; ``neg_clip_ratio`` 1 does. TRL
    gives the upper bound itself (its ``epsilon_high`` is our ``1 + pos_clip_ratio``).
    """
    ratio = torch.exp(tokens.policy_logprobs - tokens.old_logprobs).detach()
    low, high = 1.0 - bounds.neg_clip_ratio, 1.0 + bounds.pos_clip_ratio
    loss = -ratio.clamp(low, high) * tokens.advantages * tokens.policy_logprobs
    return loss, ClipMetrics(ratio, ratio < low, ratio > high)


def sapo(tokens: Tokens, bounds: Bounds) -> Result:
    """``-4 / tau * sigmoid(tau * (ratio - 1)) * A``. [N] -> [N]

    SAPO (https://arxiv.org/abs/2511.20347): a soft gate instead of a clip; ``tau`` is the paper's
    1.0 where A > 0 and 1.05 elsewhere. ``bounds`` do nothing.
    """
    ratio = torch.exp(tokens.policy_logprobs - tokens.old_logprobs)
    tau = torch.where(tokens.advantages > 0, SAPO_TAU_POSITIVE, SAPO_TAU_NEGATIVE)
    loss = -torch.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau) * tokens.advantages
    return loss, _unclipped(ratio)


def reinforce(tokens: Tokens, bounds: Bounds) -> Result:
    """``-A * log p``. [N] -> [N]

    REINFORCE (Williams 1992, https://doi.org/10.1007/BF00992696): there is no ratio, so tokens that
    other weights sampled need a correction. ``bounds`` do nothing; the ratio is for the metrics.
    """
    loss = -tokens.advantages * tokens.policy_logprobs
    return loss, _unclipped(torch.exp(tokens.policy_logprobs - tokens.old_logprobs))


def _unclipped(ratio: torch.Tensor) -> ClipMetrics:
    none = torch.zeros_like(ratio, dtype=torch.bool)
    return ClipMetrics(ratio.detach(), none, none)


def _log_ratio(tokens: Tokens, bounds: Bounds) -> torch.Tensor:
    return tokens.policy_logprobs - tokens.old_logprobs


def _clipped_log_ratio(tokens: Tokens, bounds: Bounds) -> torch.Tensor:
    """The smaller of ``A * log ratio`` and ``A *`` the clipped one, without ``A``."""
    plain = tokens.policy_logprobs - tokens.old_logprobs
    sign = torch.sign(tokens.advantages)
    clipped = plain.clamp(-bounds.neg_clip_ratio, bounds.pos_clip_ratio)
    return sign * torch.minimum(sign * plain, sign * clipped)


def _joined(own: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
    """``mean`` with the gradient of ``own``."""
    assert mean is not None, "a loss over rollouts was not given their means"
    return mean + (own - own.detach())


class Loss(NamedTuple):
    """A policy loss."""

    of_tokens: Callable[[Tokens, Bounds], Result]
    has_ratio: bool = True
    """Whether it corrects for the difference to the old logprobs by itself."""
    log_ratio: Callable[[Tokens, Bounds], torch.Tensor] | None = None
    """[N] what it needs the mean of over each whole rollout."""


LOSSES: Mapping[str, Loss] = {
    "clip": Loss(_clip),
    "gspo": Loss(gspo, log_ratio=_log_ratio),
    "gmpo": Loss(gmpo, log_ratio=_clipped_log_ratio),
    "cispo": Loss(cispo),
    "sapo": Loss(sapo),
    "reinforce": Loss(reinforce, has_ratio=False),
}
"""The values of ``models.policy_trainer.loss``."""


def kl_k1(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """``log p - log p_ref``, with the gradient of ``kl_k2``. [N] -> [N]

    The plain estimator (http://joschu.net/blog/kl-approx.html), unbiased and of high variance. Its
    own gradient is that of ``log p``, which is 0 in expectation and would pull nowhere; the
    gradient of the KL that it estimates is the one of k2 (https://arxiv.org/abs/2506.09477).
    """
    squared = kl_k2(policy_logprobs, ref_logprobs)
    return squared - squared.detach() + (policy_logprobs - ref_logprobs).detach()


def kl_k2(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """``(log p - log p_ref)^2 / 2``: biased, and its gradient is that of the KL. [N] -> [N]

    Same sources as ``kl_k1``.
    """
    return 0.5 * (policy_logprobs - ref_logprobs).square()


def kl_k3(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Estimate KL(policy ‖ reference) at tokens the policy sampled. [N] -> [N]

    The k3 estimator, ``r - 1 - log r`` with ``r = p_ref / p_policy``: unbiased, of low variance
    and never negative (http://joschu.net/blog/kl-approx.html).
    """
    log_ratio = ref_logprobs - policy_logprobs
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATORS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
}
"""The values of ``models.policy_trainer.kl_estimator``."""
