"""What is known of micro-batches after their backward: metrics, and where a number went wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chatlearn.algorithm.objective import Terms
from chatlearn.models.policy.attention import Plan
from chatlearn.models.policy.ranks import Ranks
from chatlearn.types import MicroBatch

Inputs = tuple[torch.Tensor, torch.Tensor, Plan, torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class Placed:
    """One micro-batch with what a forward needs of it, on the device."""

    batch: MicroBatch
    inputs: Inputs
    """The positional arguments of ``Forward``."""
    temperature: float | torch.Tensor
    """Of the trained tokens: one number where they share it, else [M] on the device."""
    owners: torch.Tensor  # [M] ``MicroBatch.owners``, on the device
    trained: frozenset[str]
    """The trajectories that have a trained token here."""


@dataclass(slots=True)
class Scored:
    """What one micro-batch gave, without gradient; kept on the device until the step's one sync."""

    placed: Placed
    policy_logprobs: torch.Tensor  # [N]
    loss: torch.Tensor  # [N]
    sums: torch.Tensor  # [len(SUMS)]
    peaks: torch.Tensor  # [len(PEAKS)]
    gaps: torch.Tensor
    """[len(GAP_BINS) + 1] tokens by |policy - rollout| logprob."""


SUMS = ("loss", "clip_fraction_low", "clip_fraction_high", "logprob_gap_mean")
SUMS += ("entropy_estimate", "kl_ref", "entropy", "kl_rollout", "ratio_mean", "ratio_square")
SUMS += ("correction_mean", "correction_zero_fraction")
PEAKS = ("ratio_max", "logprob_gap_max")
GAP_BINS = torch.logspace(-8, 2, 241)
"""Edges of the histogram that quantiles are read from: 24 a decade, so to 5 %."""
QUANTILES = {"p50": 0.5, "p99": 0.99}


@torch.no_grad()
def summed(
    placed: Placed,
    policy: torch.Tensor,
    rollout: torch.Tensor,
    entropy: torch.Tensor | None,
    terms: Terms,
    total: torch.Tensor,
) -> Scored:
    """What a backward leaves for the metrics, in the order of ``SUMS`` and ``PEAKS``."""
    log_ratio = policy - rollout
    gap, ratio = log_ratio.abs(), log_ratio.exp()
    nothing = rollout.new_zeros(())
    weights = terms.weights
    sums = [
        total,
        terms.clip.clipped_low.sum(),
        terms.clip.clipped_high.sum(),
        gap.sum(),
        -policy.sum(),
        nothing if terms.kl is None else terms.kl.sum(),
        nothing if entropy is None else entropy.sum(),
        (torch.expm1(log_ratio) - log_ratio).sum(),
        ratio.sum(),
        ratio.square().sum(),
        nothing if weights is None else weights.sum(),
        nothing if weights is None else (weights == 0).sum(),
    ]
    places = torch.bucketize(gap, GAP_BINS.to(gap.device))
    return Scored(
        placed,
        policy,
        terms.loss.detach(),
        torch.stack([value.detach().float() for value in sums]),
        torch.stack([largest(terms.clip.ratio), largest(gap)]),
        torch.zeros(len(GAP_BINS) + 1, device=gap.device).scatter_add_(
            0, places, torch.ones_like(gap, dtype=torch.float32)
        ),
    )


def step_metrics(
    scored: Sequence[Scored], norm: torch.Tensor, trained: int, ranks: Ranks
) -> dict[str, float]:
    """All numbers of a step, over all ranks, with one sync of the device.

    Args:
        scored: this rank's micro-batches.
        norm: of the gradient of all ranks, a scalar on the device.
        trained: tokens of all ranks; every sum but the loss becomes a mean over them.
    """
    sums = torch.stack([s.sums for s in scored]).sum(0)
    peaks = torch.stack([s.peaks for s in scored]).amax(0)
    gaps = torch.stack([s.gaps for s in scored]).sum(0)
    *own, grad_norm = torch.cat([sums, peaks, gaps, norm.reshape(1)]).tolist()
    computed = sum(len(s.placed.batch.token_ids) for s in scored)
    distinct = scored[0].placed.batch.distinct_tokens
    rows = ranks.gather([*own, computed, peak_gb(norm.device)])
    bins = tuple(f"gap_{i}" for i in range(len(gaps)))
    names = (*SUMS, *PEAKS, *bins, "computed", "peak_gb")
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    metrics = {f"policy/{name}": sum(columns[name]) / trained for name in SUMS}
    square = metrics.pop("policy/ratio_square")
    metrics["policy/effective_sample_size"] = metrics["policy/ratio_mean"] ** 2 / square
    counts = torch.tensor([sum(columns[name]) for name in bins])
    metrics |= {
        f"policy/logprob_gap_{name}": _quantile(counts, share) for name, share in QUANTILES.items()
    }
    metrics["policy/loss"] = sum(columns["loss"])
    metrics |= {f"policy/{name}": max(columns[name]) for name in PEAKS}
    metrics["policy/grad_norm"] = grad_norm
    metrics["tokens/trained"] = float(trained)
    metrics["tokens/computed"] = float(sum(columns["computed"]))
    if distinct:
        metrics["tokens/computed_per_distinct"] = metrics["tokens/computed"] / distinct
    metrics["memory/peak_gb"] = max(columns["peak_gb"])
    return metrics


def _quantile(counts: torch.Tensor, share: float) -> float:
    """Of what ``GAP_BINS`` counted: the middle of the bin, as a factor, that has ``share`` in it or
    below. [241 + 1] Gaps below 1e-8 are 0."""
    wanted = share * float(counts.sum())
    place = int((counts.cumsum(0) >= wanted).nonzero()[0])
    if place == 0:
        return 0.0
    if place == len(GAP_BINS):
        return GAP_BINS[-1].item()
    return (GAP_BINS[place - 1] * GAP_BINS[place]).sqrt().item()


def row_not_finite(scored: Sequence[Scored], ranks: Ranks) -> str | None:
    """The first trained token of this rank whose loss is not finite, in words."""
    rank = f"rank {ranks.rank}, " if ranks.size > 1 else ""
    for number, part in enumerate(scored):
        bad = (~part.loss.isfinite()).nonzero().squeeze(1).tolist()
        if not bad:
            continue
        batch, first = part.placed.batch, bad[0]
        at = int(batch.targets[first])
        return (
            f"The loss of {len(bad)} tokens is not finite; no update was made. The first is of "
            f"trajectory {batch.trajectories[int(batch.owners[first])]!r} ({rank}micro-batch "
            f"{number}), token {int(batch.position_ids[at])} of its row "
            f"(id {int(batch.token_ids[at])}): policy logprob "
            f"{part.policy_logprobs[first]:.4g}, rollout logprob "
            f"{batch.rollout_logprobs[first]:.4g}, advantage "
            f"{batch.advantages[first]:.4g}, weight {batch.weights[first]:.4g}, temperature "
            f"{batch.temperatures[first]:.4g}. "
            "A policy logprob that is not finite means the weights diverged: restore a "
            "checkpoint and lower models.policy_trainer.optimizer.lr."
        )
    return None


def one_or_each(temperatures: torch.Tensor) -> float | torch.Tensor:
    """The number that all scored tokens share, else ``temperatures`` itself. [N], on the CPU

    Most runs have one temperature: then no tensor goes to the device, and at 1.0 no logit is
    divided.
    """
    if not len(temperatures):
        return 1.0
    first = temperatures[0]
    return first.item() if bool((temperatures == first).all()) else temperatures


def largest(values: torch.Tensor) -> torch.Tensor:
    """Of non-negative numbers [N]; 0 where there are none."""
    return values.amax() if len(values) else values.new_zeros(())


def peak_gb(device: torch.device) -> float:
    """Most memory held: by tensors of this step on a GPU, by the process so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # absent on Windows, where GPUs are not this trainer's concern either

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
