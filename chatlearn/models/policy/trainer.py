"""The trainer of one process: micro-batches in, one optimizer update, metrics out.

Read ``PolicyTrainer.step`` first. Left out of the textbook: a second policy forward for "old"
logprobs (the engine's own are the old ones) and a critic (advantages are group-relative).

The embedded engine samples from the very module that is trained: parameters are written in place
and never replaced, dropout is never on, and the attention of the module is as the engine left it
outside a step. No method yields to the event loop half-way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from chatlearn.algorithm.losses import clipped_surrogate, kl_k3
from chatlearn.algorithm.packing import collate
from chatlearn.errors import TrainerError
from chatlearn.interfaces import Weights
from chatlearn.models.policy.attention import Segments, attending_packed
from chatlearn.models.policy.checkpoint import load_state, save_hf, save_state
from chatlearn.models.policy.optimizer import PolicyOptimizer, Schedule, dtype_of
from chatlearn.models.policy.token_logprobs import PolicyForward
from chatlearn.types import MicroBatch, Sample

_SCORED_AT_ONCE = 8192
"""Tokens of one forward in ``logprobs``; a longer sample is a forward of its own."""


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """How the policy is updated. Plain values; the configuration is read elsewhere."""

    lr: float = 1e-6
    min_lr: float = 0.0
    weight_decay: float = 0.01
    """Of matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float = 1.0
    """Largest L2 norm of the gradient; 0 leaves it as it is."""
    lr_schedule: str = "constant"
    """constant, linear or cosine."""
    warmup_steps: int = 0
    total_steps: int = 0
    """Optimizer steps of the whole run; linear and cosine need it."""
    kl_coef: float = 0.0
    """Weight of KL(policy ‖ reference); 0 never runs the reference."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 does not compute it."""
    pos_clip_ratio: float = 0.2
    neg_clip_ratio: float = 0.2
    temperature: float = 1.0
    """The engine's, of training rollouts."""
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs and compute the rest again: less memory, about 1/3 slower."""
    precision: str = "fp32"
    """fp32, or bf16: parameters in bf16 with fp32 masters, gradients summed in fp32."""

    def __post_init__(self) -> None:
        dtype_of(self.precision)
        if self.temperature <= 0:
            raise TrainerError(
                f"temperature is {self.temperature}: greedy rollouts have no gradient. "
                "Set models.policy.temperature above 0."
            )

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.lr, self.min_lr, self.lr_schedule, self.warmup_steps, self.total_steps)


@dataclass(slots=True)
class _Scored:
    """What one micro-batch gave, without gradient; kept on the device until the step's one sync."""

    batch: MicroBatch
    chosen: torch.Tensor  # [N] packed positions that are trained, on the CPU
    policy_logprobs: torch.Tensor  # [N]
    loss: torch.Tensor  # [N]
    sums: torch.Tensor  # [len(_SUMS)]
    peaks: torch.Tensor  # [len(_PEAKS)]


_SUMS = ("loss", "clip_fraction_low", "clip_fraction_high", "logprob_gap_mean")
_SUMS += ("entropy_estimate", "kl_ref", "entropy")
_PEAKS = ("ratio_max", "logprob_gap_max")


class PolicyTrainer:
    """Implements ``interfaces.Trainer`` in one process, on a CPU or one GPU.

    Args:
        model: a causal LM in the dtype of ``settings.precision``; updated in place.
        tokenizer: written beside the model in ``save``; may be None.
        settings: see ``TrainerSettings``.
        reference: a frozen model of the same vocabulary; needed only where ``kl_coef`` > 0.

    Raises:
        TrainerError: the settings or the model cannot be trained; see ``PolicyForward.check``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any | None,
        settings: TrainerSettings,
        *,
        reference: PreTrainedModel | None = None,
    ) -> None:
        if settings.kl_coef > 0 and reference is None:
            raise TrainerError("kl_coef is above 0 but no reference model was given.")
        held = next(model.parameters()).dtype
        if held != dtype_of(settings.precision):
            raise TrainerError(
                f"precision is {settings.precision!r}, but the model is held in {held}. "
                f"Load it with load_policy(..., precision={settings.precision!r})."
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.settings = settings
        self.updates = 0
        self._schedule = settings.schedule
        self._recomputed = _recomputed_layers(model) if settings.gradient_checkpointing else []
        self._policy = PolicyForward(model)
        self._reference: PolicyForward | None = None
        if settings.kl_coef > 0 and reference is not None:
            self._reference = PolicyForward(reference.eval().requires_grad_(False))
            self._reference.check(attending_packed(self._reference.body.config))
        self._policy.check(self._training())
        self._optimizer = PolicyOptimizer(
            model, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )

    @property
    def device(self) -> torch.device:
        return self._optimizer.parameters[0].device

    async def step(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """One update with the gradient of ``sum(weight * loss) / denominator`` over all batches.

        Returns:
            Flat metrics. ``policy/logprob_gap_*`` is |policy - rollout| logprob on trained tokens:
            on the first step after a publish it is the mismatch of engine and trainer.
            ``policy/entropy_estimate`` is the mean of -log p of the sampled tokens, which costs
            nothing; ``policy/entropy`` is exact, where ``entropy_coef`` is not 0.

        Raises:
            TrainerError: nothing to train, or a loss or gradient that is not finite; then no
                update was made.
        """
        trained = sum(int(batch.loss_mask.sum()) for batch in micro_batches)
        if trained == 0 or not micro_batches[0].denominator > 0:
            raise TrainerError("step() was given no trained token of positive weight.")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            with self._training():
                scored = [self._backward(b) for b in micro_batches if bool(b.loss_mask.any())]
            norm = self._optimizer.gradient_norm()
            metrics = self._reduce(scored, norm, trained)
            if not isfinite(metrics["policy/loss"] + metrics["policy/grad_norm"]):
                raise TrainerError(self._diagnosis(scored))
            self._optimizer.clip(self.settings.clip_grad, norm)
            metrics["policy/lr"] = self._schedule.at(self.updates)
            self._optimizer.update(metrics["policy/lr"])
        except torch.OutOfMemoryError as error:
            raise TrainerError(
                f"Out of GPU memory. Lower models.policy_trainer.max_token_in_packing: {error}"
            ) from error
        finally:
            self._optimizer.discard()
        self.updates += 1
        metrics["tokens/trained"] = float(trained)
        metrics["tokens/computed"] = float(sum(len(s.batch.token_ids) for s in scored))
        metrics["memory/peak_gb"] = _peak_gb(self.device)
        return metrics

    async def logprobs(self, samples: Sequence[Sample], temperature: float) -> list[list[float]]:
        """log p of every token of every sample under the current weights. [[L], ...], first 0.0"""
        rows: list[list[float]] = []
        with torch.no_grad(), attending_packed(self._policy.body.config):
            for group in _in_groups(samples, _SCORED_AT_ONCE):
                batch = collate(group, 0.0)
                chosen = (batch.position_ids > 0).nonzero().squeeze(1)
                row = torch.zeros(len(batch.token_ids))
                if len(chosen):
                    ids, positions, segments, at = self._place(batch, chosen)
                    scored = self._policy(ids, positions, segments, at, temperature=temperature)
                    row[chosen] = scored.logprobs.cpu()
                rows += [part.tolist() for part in row.split([len(s.token_ids) for s in group])]
        return rows

    async def weights(self) -> Weights:
        """The parameters themselves under their Hugging Face names; tied ones once, first name."""
        return ((name, tensor.detach()) for name, tensor in self.model.named_parameters())

    async def save(self, folder: Path) -> None:
        """Write ``folder/hf`` (loads with ``from_pretrained``) and ``folder/state``.

        ``state`` has the fp32 masters, the moments of AdamW, the number of updates and torch's
        random states. Raises CheckpointError.
        """
        save_hf(folder / "hf", self.model, self.tokenizer)
        save_state(folder / "state", self._optimizer.state(), self.updates)

    async def restore(self, folder: Path) -> None:
        """Continue from what ``save`` wrote, to the same bits. Raises CheckpointError."""
        own = {n: t for n, t in self._optimizer.state().items() if n.startswith("master.")}
        tensors, self.updates = load_state(folder / "state", own)
        self._optimizer.load(tensors)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Packed attention, and recomputation where it is set, in the block and only there.

        transformers recomputes a layer whose own ``training`` is True; its children keep theirs,
        so no dropout goes on.
        """
        with ExitStack() as stack:
            for forward in filter(None, (self._policy, self._reference)):
                stack.enter_context(attending_packed(forward.body.config))
            for layer in self._recomputed:
                layer.training = layer.gradient_checkpointing = True
                stack.callback(setattr, layer, "training", False)
                stack.callback(setattr, layer, "gradient_checkpointing", False)
            yield

    def _place(
        self, batch: MicroBatch, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Segments, torch.Tensor]:
        """What a forward needs of ``batch``, on the device."""
        to = self.device
        segments = Segments.of(batch.cu_seqlens.tolist(), to)
        return batch.token_ids.to(to), batch.position_ids.to(to), segments, chosen.to(to)

    def _backward(self, batch: MicroBatch) -> _Scored:
        """Forward and backward of one micro-batch; nothing here waits for the device."""
        settings = self.settings
        chosen = batch.loss_mask.nonzero().squeeze(1)
        row = self._place(batch, chosen)
        rollout, advantages, weights = (
            values[chosen].to(self.device)
            for values in (batch.rollout_logprobs, batch.advantages, batch.weights)
        )
        policy, entropy = self._policy(
            *row, temperature=settings.temperature, entropy=settings.entropy_coef != 0
        )
        loss, clip = clipped_surrogate(
            policy,
            rollout,
            advantages,
            neg_clip_ratio=settings.neg_clip_ratio,
            pos_clip_ratio=settings.pos_clip_ratio,
        )
        kl = torch.zeros_like(rollout)
        if self._reference is not None:
            with torch.no_grad():
                reference = self._reference(*row, temperature=settings.temperature).logprobs
            kl = kl_k3(policy, reference)
            loss = loss + settings.kl_coef * kl
        if entropy is not None:
            loss = loss - settings.entropy_coef * entropy
        total = (weights * loss).sum() / batch.denominator
        total.backward()
        self._optimizer.accumulate()
        with torch.no_grad():
            gap = (policy - rollout).abs()
            low, high = clip.clipped_low.sum(), clip.clipped_high.sum()
            bonus = rollout if entropy is None else entropy
            sums = [total, low, high, gap.sum(), -policy.sum(), kl.sum(), bonus.sum()]
            return _Scored(
                batch,
                chosen,
                policy.detach(),
                loss.detach(),
                torch.stack([value.detach().float() for value in sums]),
                torch.stack([clip.ratio.max(), gap.max()]),
            )

    def _reduce(
        self, scored: Sequence[_Scored], norm: torch.Tensor, trained: int
    ) -> dict[str, float]:
        """All numbers of the step with one sync of the device."""
        sums = torch.stack([s.sums for s in scored]).sum(0)
        peaks = torch.stack([s.peaks for s in scored]).amax(0)
        numbers = torch.cat([sums, peaks, norm.reshape(1)]).tolist()
        named = dict(zip((*_SUMS, *_PEAKS, "grad_norm"), numbers, strict=True))
        for name in _SUMS[1:]:
            named[name] /= trained
        if self._reference is None:
            del named["kl_ref"]
        if self.settings.entropy_coef == 0:
            del named["entropy"]
        return {f"policy/{name}": value for name, value in named.items()}

    def _diagnosis(self, scored: Sequence[_Scored]) -> str:
        """Where a step stopped being finite, in words: rows, else parameters."""
        for number, part in enumerate(scored):
            bad = (~part.loss.isfinite()).nonzero().squeeze(1).tolist()
            if not bad:
                continue
            at = int(part.chosen[bad[0]])
            bounds = part.batch.cu_seqlens.tolist()
            row, (start, end) = next(
                (i, span) for i, span in enumerate(pairwise(bounds)) if at < span[1]
            )
            return (
                f"The loss of {len(bad)} tokens is not finite; no update was made. The first is of "
                f"trajectory {part.batch.trajectories[row]!r} (micro-batch {number}, row {row}), "
                f"token {at - start} of {end - start} "
                f"(id {int(part.batch.token_ids[at])}): policy logprob "
                f"{part.policy_logprobs[bad[0]]:.4g}, rollout logprob "
                f"{part.batch.rollout_logprobs[at]:.4g}, advantage "
                f"{part.batch.advantages[at]:.4g}, weight {part.batch.weights[at]:.4g}. "
                "A policy logprob that is not finite means the weights diverged: restore a "
                "checkpoint and lower models.policy_trainer.optimizer.lr."
            )
        names = self._optimizer.non_finite_gradients()
        return (
            f"The loss is finite but the gradient of {len(names)} parameters is not, of "
            f"{', '.join(names[:3]) or 'none alone'} for instance; no update was made. Lower "
            "models.policy_trainer.optimizer.lr, or train in fp32."
        )


def _recomputed_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers of ``model`` that can be recomputed, told how to be."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise TrainerError(f"{type(model).__name__} has no layers for gradient_checkpointing.")
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return layers


def _in_groups(samples: Sequence[Sample], limit: int) -> Iterator[list[Sample]]:
    """Neighbours of together at most ``limit`` tokens, in order."""
    group: list[Sample] = []
    tokens = 0
    for sample in samples:
        if group and tokens + len(sample.token_ids) > limit:
            yield group
            group, tokens = [], 0
        group.append(sample)
        tokens += len(sample.token_ids)
    if group:
        yield group


def _peak_gb(device: torch.device) -> float:
    """Most memory held: by tensors of this step on a GPU, by the process so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # absent on Windows, where GPUs are not this trainer's concern either

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
