"""What is known of micro-batches after their backward: metrics, and where a number went wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from chatlearn.models.policy.attention import Plan
from chatlearn.models.policy.ranks import Ranks
from chatlearn.types import MicroBatch


@dataclass(slots=True)
class Placed:
    """One micro-batch with what a forward needs of it, on the device."""

    batch: MicroBatch
    chosen: torch.Tensor  # [N] packed positions that are scored, on the CPU
    inputs: tuple[torch.Tensor, torch.Tensor, Plan, torch.Tensor]
    """The positional arguments of ``Forward``."""
    temperature: float | torch.Tensor
    """Of the scored tokens: one number where they share it, else [N] on the device."""


@dataclass(slots=True)
class Scored:
    """What one micro-batch gave, without gradient; kept on the device until the step's one sync."""

    placed: Placed
    policy_logprobs: torch.Tensor  # [N]
    loss: torch.Tensor  # [N]
    sums: torch.Tensor  # [len(SUMS)]
    peaks: torch.Tensor  # [len(PEAKS)]


SUMS = ("loss", "clip_fraction_low", "clip_fraction_high", "logprob_gap_mean")
SUMS += ("entropy_estimate", "kl_ref", "entropy")
PEAKS = ("ratio_max", "logprob_gap_max")


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
    *own, grad_norm = torch.cat([sums, peaks, norm.reshape(1)]).tolist()
    computed = sum(len(s.placed.batch.token_ids) for s in scored)
    rows = ranks.gather([*own, computed, peak_gb(norm.device)])
    names = (*SUMS, *PEAKS, "computed", "peak_gb")
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    metrics = {f"policy/{name}": sum(columns[name]) / trained for name in SUMS}
    metrics["policy/loss"] = sum(columns["loss"])
    metrics |= {f"policy/{name}": max(columns[name]) for name in PEAKS}
    metrics["policy/grad_norm"] = grad_norm
    metrics["tokens/trained"] = float(trained)
    metrics["tokens/computed"] = float(sum(columns["computed"]))
    metrics["memory/peak_gb"] = max(columns["peak_gb"])
    return metrics


def row_not_finite(scored: Sequence[Scored], ranks: Ranks) -> str | None:
    """The first trained token of this rank whose loss is not finite, in words."""
    rank = f"rank {ranks.rank}, " if ranks.size > 1 else ""
    for number, part in enumerate(scored):
        bad = (~part.loss.isfinite()).nonzero().squeeze(1).tolist()
        if not bad:
            continue
        batch, at = part.placed.batch, int(part.placed.chosen[bad[0]])
        row, (start, end) = next(
            (i, span) for i, span in enumerate(pairwise(batch.cu_seqlens.tolist())) if at < span[1]
        )
        return (
            f"The loss of {len(bad)} tokens is not finite; no update was made. The first is of "
            f"trajectory {batch.trajectories[row]!r} ({rank}micro-batch {number}, row {row}), "
            f"token {at - start} of {end - start} "
            f"(id {int(batch.token_ids[at])}): policy logprob "
            f"{part.policy_logprobs[bad[0]]:.4g}, rollout logprob "
            f"{batch.rollout_logprobs[at]:.4g}, advantage "
            f"{batch.advantages[at]:.4g}, weight {batch.weights[at]:.4g}, temperature "
            f"{batch.temperatures[at]:.4g}. "
            "A policy logprob that is not finite means the weights diverged: restore a "
            "checkpoint and lower models.policy_trainer.optimizer.lr."
        )
    return None


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
