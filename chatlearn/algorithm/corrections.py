"""Weights for tokens that other weights sampled, or an engine whose numbers differ from the
trainer's. ``CORRECTIONS`` has every one.

The ratio is ``p / p_rollout``: p is the trainer's, p_rollout what the engine reported when it
sampled. A weight multiplies the policy loss of its token, not the KL and entropy terms, and has no
gradient. A token of weight 0 stays in the denominator, so that what is left does not weigh more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple

import torch

from chatlearn.types import Sample


class LogRatios(NamedTuple):
    """Of the trained tokens, without gradient."""

    token: torch.Tensor  # [N] log p - log p_rollout
    rollout_sum: torch.Tensor  # [N] its sum over the token's whole rollout
    rollout_mean: torch.Tensor  # [N] its mean over the token's whole rollout


class Limits(NamedTuple):
    """Of a ratio."""

    low: float = 0.0
    high: float = inf


def token_tis(ratios: LogRatios, limits: Limits) -> torch.Tensor:
    """``min(ratio, high)``. [N]

    Truncated importance sampling (https://fengyao.notion.site/off-policy-rl), with the ratio of a
    token in place of that of its prefix.
    """
    return ratios.token.exp().clamp(max=limits.high)


def sequence_tis(ratios: LogRatios, limits: Limits) -> torch.Tensor:
    """``min(product of the rollout's ratios, high)`` at each of its tokens. [N]

    Unbiased but for the truncation (https://richardli.xyz/rl-collapse), and of a variance that
    grows with the length: for short rollouts.
    """
    return ratios.rollout_sum.exp().clamp(max=limits.high)


def icepop(ratios: LogRatios, limits: Limits) -> torch.Tensor:
    """``ratio`` where ``low <= ratio <= high``, else 0. [N]

    IcePop (Ring-1T, https://arxiv.org/abs/2510.18855): a token on which engine and trainer disagree
    too much has no gradient. The paper's limits are 0.5 and 5.
    """
    ratio = ratios.token.exp()
    return torch.where(_inside(ratio, limits), ratio, 0.0)


def token_mask(ratios: LogRatios, limits: Limits) -> torch.Tensor:
    """1 where ``low <= ratio <= high``, else 0. [N]

    IcePop's rule for losses that have the ratio in them already.
    """
    return _inside(ratios.token.exp(), limits).to(ratios.token.dtype)


def sequence_mask(ratios: LogRatios, limits: Limits) -> torch.Tensor:
    """1 at all tokens of a rollout whose geometric mean ratio is within the limits, else 0. [N]

    Masked importance sampling over sequences (https://richardli.xyz/rl-collapse); the geometric
    mean does not drift with the length, as the product does.
    """
    return _inside(ratios.rollout_mean.exp(), limits).to(ratios.token.dtype)


def _inside(ratio: torch.Tensor, limits: Limits) -> torch.Tensor:
    return (ratio >= limits.low) & (ratio <= limits.high)


class Correction(NamedTuple):
    """A correction and what may be said of it."""

    weights: Callable[[LogRatios, Limits], torch.Tensor]
    limits: Limits
    """The defaults."""
    is_ratio: bool
    """Whether the weight contains the ratio, and would count it twice beside a loss with one."""
    of_rollouts: bool = False
    """Whether it needs sums over whole rollouts."""


CORRECTIONS: Mapping[str, Correction] = {
    "token-tis": Correction(token_tis, Limits(high=2.0), is_ratio=True),
    "sequence-tis": Correction(sequence_tis, Limits(high=2.0), is_ratio=True, of_rollouts=True),
    "icepop": Correction(icepop, Limits(0.5, 5.0), is_ratio=True),
    "token-mask": Correction(token_mask, Limits(0.5, 5.0), is_ratio=False),
    "sequence-mask": Correction(sequence_mask, Limits(0.5, 2.0), is_ratio=False, of_rollouts=True),
}
"""The values of ``models.policy_trainer.correction``, beside ``none``."""


def limits_of(name: str, *, low: float | None, high: float | None) -> Limits:
    """Those of the correction ``name``, with its defaults where they are None."""
    default = CORRECTIONS[name].limits
    return Limits(default.low if low is None else low, default.high if high is None else high)


def decoupled(
    samples: Sequence[Sample],
    proximal_logprobs: Sequence[Sequence[float]],
    name: str = "none",
    *,
    low: float | None = None,
    high: float | None = None,
) -> list[Sample]:
    """The samples for a loss whose ratio is against a proximal policy. [[L], ...]

    Decoupled PPO (https://arxiv.org/abs/2110.00641): ``w * loss(p / p_proximal)``, with the weight
    ``w`` from ``p_proximal / p_rollout``. Every policy loss here is linear in an advantage of one
    sign, so ``w`` goes into the advantages, and the proximal logprobs take the place of the
    engine's.

    Args:
        samples: every row of each trajectory in them.
        proximal_logprobs: of the trainer before the first update. [[L], ...]
        name: of the correction, or none: then all weights are 1.
        low, high: its limits; None = its defaults.
    """
    on = torch.tensor([o for s in samples for o in s.loss_mask], dtype=torch.bool)
    flat = {
        "rollout": torch.tensor([p for s in samples for p in s.rollout_logprobs]),
        "proximal": torch.tensor([p for row in proximal_logprobs for p in row]),
        "advantages": torch.tensor([a for s in samples for a in s.advantages]),
    }
    rollout, proximal, advantages = (values.double() for values in flat.values())
    if name != "none":
        names = {name: i for i, name in enumerate(dict.fromkeys(s.trajectory for s in samples))}
        lengths = torch.tensor([len(s.token_ids) for s in samples])
        owners = torch.tensor([names[s.trajectory] for s in samples]).repeat_interleave(lengths)[on]
        log_ratio = (proximal - rollout)[on]
        sums = log_ratio.new_zeros(len(names)).index_add(0, owners, log_ratio)[owners]
        counts = torch.bincount(owners, minlength=len(names))[owners]
        ratios = LogRatios(log_ratio, sums, sums / counts)
        advantages[on] *= CORRECTIONS[name].weights(ratios, limits_of(name, low=low, high=high))
    proximal[~on] = 0.0
    sizes = [len(s.token_ids) for s in samples]
    return [
        replace(sample, rollout_logprobs=old.tolist(), advantages=new.tolist())
        for sample, old, new in zip(
            samples, proximal.split(sizes), advantages.split(sizes), strict=True
        )
    ]
