"""One optimizer update, as every trainer makes it: micro-batches in, metrics out.

Read ``BaseTrainer.step`` first. Left out of the textbook: a second policy forward for "old"
logprobs (the engine's own are the old ones) and a critic (advantages are group-relative).

A trainer of one process and one rank of many run the same lines. What differs is given to them: the
forward (whose parameters may be gathered first), and ``Ranks`` (who may be nobody else).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from math import isfinite
from typing import Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from chatlearn.algorithm.losses import clipped_surrogate, kl_k3
from chatlearn.algorithm.packing import collate
from chatlearn.errors import TrainerError
from chatlearn.models.policy.attention import Plan, Planner, attending_packed
from chatlearn.models.policy.optimizer import PolicyOptimizer
from chatlearn.models.policy.ranks import Ranks
from chatlearn.models.policy.scored import Placed, Scored, largest, row_not_finite, step_metrics
from chatlearn.models.policy.settings import TrainerSettings
from chatlearn.models.policy.token_logprobs import TokenLogprobs
from chatlearn.types import MicroBatch, Sample

_SCORED_AT_ONCE = 8192
"""Tokens of one forward in ``logprobs``; a longer sample is a forward of its own."""
_NOTHING = Sample([0], [False], [0.0], [0.0])
"""What a rank scores while others still have samples."""


class Forward(Protocol):
    """A model as (packed row, positions) -> logprobs: ``PolicyForward``, or one that is sharded."""

    model: PreTrainedModel
    body: nn.Module
    planner: Planner

    def __call__(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segments: Plan,
        chosen: torch.Tensor,
        *,
        temperature: float | torch.Tensor,
        entropy: bool = False,
    ) -> TokenLogprobs: ...

    def check(self, packed: AbstractContextManager[None]) -> None: ...


class BaseTrainer:
    """The step, the loss and the metrics; how weights are held and kept is its subclasses'.

    Args:
        policy: the forward of the model to train.
        settings: see ``TrainerSettings``.
        reference: the forward of a frozen model; needed only where ``kl_coef`` > 0.
        ranks: who else trains.
        device: of this rank.

    Raises:
        TrainerError: the model cannot be trained; see ``PolicyForward.check``.
    """

    def __init__(
        self,
        policy: Forward,
        settings: TrainerSettings,
        *,
        reference: Forward | None,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.model = policy.model
        self.settings = settings
        self.device = device
        self.updates = 0
        self._schedule = settings.schedule
        self._ranks = ranks
        self._recomputed = _recomputed_layers(self.model) if settings.gradient_checkpointing else []
        self._policy = policy
        self._reference = reference if settings.kl_coef > 0 else None
        if self._reference is not None:
            self._reference.check(attending_packed(self._reference.body.config))
        self._policy.check(self._training())
        self._optimizer = PolicyOptimizer(
            self.model, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )

    @property
    def ranks(self) -> int:
        """Processes that update the policy together."""
        return self._ranks.size

    async def step(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """One update with the gradient of ``sum(weight * loss) / denominator`` over all batches.

        Args:
            micro_batches: of this rank. Every rank has equally many, ``pack(..., ranks=N)[r::N]``,
                and the gradient is the sum over the batches of all ranks.

        Returns:
            Flat metrics, over all ranks. ``policy/logprob_gap_*`` is |policy - rollout| logprob on
            trained tokens: on the first step after a publish it is the mismatch of engine and
            trainer. ``policy/entropy_estimate`` is the mean of -log p of the sampled tokens, which
            costs nothing; ``policy/entropy`` is exact, where ``entropy_coef`` is not 0.

        Raises:
            TrainerError: nothing to train, or a loss or gradient that is not finite; then no
                update was made. Every rank raises the same.
        """
        trained = self._admit(micro_batches)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            placed = [self._place(batch) for batch in micro_batches if self._must_run(batch)]
            with self._training():
                references = self._reference_logprobs(placed)
                scored = [self._backward(*pair) for pair in zip(placed, references, strict=True)]
            norm = self._ranks.norm(self._optimizer.gradient_norm())
            metrics = self._metrics(scored, norm, trained)
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
        return metrics

    async def logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        """log p of every token of every sample under the current weights. [[L], ...], first 0.0

        Each token at its own ``Sample.temperatures``. Each rank gives samples of its own, as many
        as it likes.
        """
        groups = list(_in_groups(samples, _SCORED_AT_ONCE))
        turns = max(int(most) for [most] in self._ranks.gather([len(groups)]))
        rows: list[list[float]] = []
        with torch.no_grad(), attending_packed(self._policy.body.config):
            for group in [*groups, *[[_NOTHING]] * (turns - len(groups))]:
                batch = collate(group, 0.0)
                placed = self._place(batch, (batch.position_ids > 0).nonzero().squeeze(1))
                row = torch.zeros(len(batch.token_ids))
                if len(placed.chosen) or self._ranks.size > 1:
                    scored = self._policy(*placed.inputs, temperature=placed.temperature)
                    row[placed.chosen] = scored.logprobs.cpu()
                rows += [part.tolist() for part in row.split([len(s.token_ids) for s in group])]
        return rows[: len(samples)]

    def _admit(self, micro_batches: Sequence[MicroBatch]) -> int:
        """How many tokens all ranks train, after what would hang or mislead them was refused."""
        own = sum(int(batch.loss_mask.sum()) for batch in micro_batches)
        denominator = micro_batches[0].denominator if micro_batches else 0.0
        counts = self._ranks.gather([len(micro_batches), own, denominator])
        trained = sum(int(tokens) for _, tokens, _ in counts)
        if len({(batches, weight) for batches, _, weight in counts}) > 1:
            each = ", ".join(
                f"{int(batches)} of weight {weight:g}" for batches, _, weight in counts
            )
            raise TrainerError(
                f"Ranks must have equally many micro-batches and one denominator, but have {each}. "
                "Give rank r pack(samples, ..., ranks=N)[r::N]."
            )
        if trained == 0 or not denominator > 0:
            raise TrainerError("step() was given no trained token of positive weight.")
        return trained

    def _must_run(self, batch: MicroBatch) -> bool:
        """A batch without a trained token has no gradient, but other ranks wait for its layers."""
        return self._ranks.size > 1 or bool(batch.loss_mask.any())

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

    def _reference_at_hand(self) -> AbstractContextManager[None]:
        """Around the forwards of the reference."""
        return nullcontext()

    def _place(self, batch: MicroBatch, chosen: torch.Tensor | None = None) -> Placed:
        """``batch`` on the device, to be scored at ``chosen`` [N], else where it is trained."""
        if chosen is None:
            chosen = batch.loss_mask.nonzero().squeeze(1)
        to = self.device
        plan = self._policy.planner(batch.cu_seqlens.tolist(), to)
        inputs = (batch.token_ids.to(to), batch.position_ids.to(to), plan, chosen.to(to))
        temperature = _one_or_each(batch.temperatures[chosen])
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.to(to)
        return Placed(batch, chosen, inputs, temperature)

    def _reference_logprobs(self, placed: Sequence[Placed]) -> list[torch.Tensor | None]:
        """Of every batch before the first backward, so that the reference is needed once a step."""
        if self._reference is None:
            return [None] * len(placed)
        with torch.no_grad(), self._reference_at_hand():
            return [self._reference(*p.inputs, temperature=p.temperature).logprobs for p in placed]

    def _backward(self, placed: Placed, reference: torch.Tensor | None) -> Scored:
        """Forward and backward of one micro-batch; nothing here waits for the device.

        Args:
            reference: its logprobs at the chosen positions [N], where there is one.
        """
        settings, batch = self.settings, placed.batch
        rollout, advantages, weights = (
            values[placed.chosen].to(self.device)
            for values in (batch.rollout_logprobs, batch.advantages, batch.weights)
        )
        policy, entropy = self._policy(
            *placed.inputs, temperature=placed.temperature, entropy=settings.entropy_coef != 0
        )
        loss, clip = clipped_surrogate(
            policy,
            rollout,
            advantages,
            neg_clip_ratio=settings.neg_clip_ratio,
            pos_clip_ratio=settings.pos_clip_ratio,
        )
        kl = torch.zeros_like(rollout)
        if reference is not None:
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
            return Scored(
                placed,
                policy.detach(),
                loss.detach(),
                torch.stack([value.detach().float() for value in sums]),
                torch.stack([largest(clip.ratio), largest(gap)]),
            )

    def _metrics(
        self, scored: Sequence[Scored], norm: torch.Tensor, trained: int
    ) -> dict[str, float]:
        """Those of ``step_metrics`` that these settings have."""
        metrics = step_metrics(scored, norm, trained, self._ranks)
        if self._reference is None:
            del metrics["policy/kl_ref"]
        if self.settings.entropy_coef == 0:
            del metrics["policy/entropy"]
        return metrics

    def _diagnosis(self, scored: Sequence[Scored]) -> str:
        """Where a step stopped being finite, in words, the same on all ranks: rows, else
        parameters."""
        return (
            self._ranks.first(row_not_finite(scored, self._ranks))
            or self._ranks.first(self._gradient_not_finite())
            or "The sum of finite losses or gradients is not finite; no update was made."
        )

    def _gradient_not_finite(self) -> str | None:
        """The parameters whose gradient, in this rank's part of it, is not finite."""
        names = self._optimizer.non_finite_gradients()
        if not names:
            return None
        return (
            f"The loss is finite but the gradient of {len(names)} parameters is not, of "
            f"{', '.join(names[:3])} for instance; no update was made. Lower "
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


def _one_or_each(temperatures: torch.Tensor) -> float | torch.Tensor:
    """The number that all scored tokens share, else ``temperatures`` itself. [N], on the CPU

    Most runs have one temperature: then no tensor goes to the device, and at 1.0 no logit is
    divided.
    """
    if not len(temperatures):
        return 1.0
    first = temperatures[0]
    return first.item() if bool((temperatures == first).all()) else temperatures


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
