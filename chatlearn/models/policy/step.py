"""One optimizer update, as every trainer makes it: micro-batches in, metrics out.

Read ``BaseTrainer.step`` first. Left out of the textbook: a second policy forward for "old"
logprobs (the engine's own are the old ones) and a critic (rewards are compared with each other).

A trainer of one process and one rank of many run the same lines. What differs is given to them: the
forward (whose parameters may be gathered first), and ``Ranks`` (who may be nobody else).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from math import isfinite

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from chatlearn.algorithm.rollout_sums import added, spread, sums_of
from chatlearn.errors import TrainerError
from chatlearn.models.policy.attention import attending_packed
from chatlearn.models.policy.optimizer import PolicyOptimizer
from chatlearn.models.policy.ranks import Ranks
from chatlearn.models.policy.row_logprobs import row_logprobs
from chatlearn.models.policy.scored import (
    Placed,
    Scored,
    one_or_each,
    row_not_finite,
    step_metrics,
    summed,
)
from chatlearn.models.policy.settings import TrainerSettings
from chatlearn.models.policy.token_logprobs import Forward
from chatlearn.types import MicroBatch, Sample

_log = logging.getLogger(__name__)


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
        self._objective = settings.objective
        self._ranks = ranks
        self._recomputed = _recomputed_layers(self.model) if settings.gradient_checkpointing else []
        self._policy = policy
        self._reference = reference if settings.kl_coef > 0 else None
        refusals = [self._policy.check(self._training())]
        if self._reference is not None:
            packed = attending_packed(self._reference.body.config)
            refusals.append(self._reference.check(packed))
        self._refusal_of_trees = next(filter(None, refusals), "")
        if settings.tree_packing and self._refusal_of_trees:
            _log.warning(
                "Rows are not packed as trees (models.policy_trainer.tree_packing): %s cannot, on "
                "a short tree %s.",
                type(self.model).__name__,
                self._refusal_of_trees,
            )
        self._optimizer = PolicyOptimizer(
            self.model, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )

    @property
    def ranks(self) -> int:
        """Processes that update the policy together."""
        return self._ranks.size

    @property
    def packs_trees(self) -> bool:
        """Whether micro-batches should share what samples begin with: it is set, and the model
        computes the same on trees."""
        return self.settings.tree_packing and not self._refusal_of_trees

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
            ``policy/kl_rollout`` estimates KL(rollout ‖ policy) by k3;
            ``policy/effective_sample_size`` is ``(sum of ratios)^2 / (N * sum of squares)``, 1 when
            all are equal.

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
                sums = self._rollout_sums(placed)
                scored = [
                    self._backward(*parts) for parts in zip(placed, references, sums, strict=True)
                ]
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
        with torch.no_grad(), attending_packed(self._policy.body.config):
            return row_logprobs(
                self._policy,
                samples,
                device=self.device,
                ranks=self._ranks,
                tree=self.packs_trees,
            )

    def _admit(self, micro_batches: Sequence[MicroBatch]) -> int:
        """How many tokens all ranks train, after what would hang or mislead them was refused."""
        own = sum(len(batch.targets) for batch in micro_batches)
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
        return self._ranks.size > 1 or len(batch.targets) > 0

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

    def _place(self, batch: MicroBatch) -> Placed:
        """``batch`` on the device."""
        to = self.device
        plan = self._policy.planner(batch.cu_seqlens.tolist(), to, batch.parents.tolist())
        rows = (batch.token_ids, batch.position_ids, batch.predictors, batch.targets)
        token_ids, position_ids, predictors, targets = (column.to(to) for column in rows)
        temperature = one_or_each(batch.temperatures)
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.to(to)
        return Placed(
            batch,
            (token_ids, position_ids, plan, predictors, targets),
            temperature,
            batch.owners.to(to),
            frozenset(batch.trajectories[i] for i in batch.owners.unique().tolist()),
        )

    def _reference_logprobs(self, placed: Sequence[Placed]) -> list[torch.Tensor | None]:
        """Of every batch before the first backward, so that the reference is needed once a step."""
        if self._reference is None:
            return [None] * len(placed)
        with torch.no_grad(), self._reference_at_hand():
            return [self._reference(*p.inputs, temperature=p.temperature).logprobs for p in placed]

    def _rollout_sums(self, placed: Sequence[Placed]) -> list[torch.Tensor | None]:
        """What the loss needs of whole rollouts, for each batch whose own forward cannot tell.

        Most rollouts lie whole in one micro-batch, which then needs nothing of the others. Where
        one does not, a forward without gradient comes first. [N, 3], see ``Objective``
        """
        nothing: list[torch.Tensor | None] = [None] * len(placed)
        if not self._objective.of_rollouts:
            return nothing
        split = spread([p.trained for p in placed], self._ranks.gather)
        if self._ranks.first("split" if split else None) is None:
            return nothing
        # other ranks wait for this one's layers
        asked = [self._ranks.size > 1 or bool(split & p.trained) for p in placed]
        with torch.no_grad():
            own = [
                self._own_sums(p, self._policy(*p.inputs, temperature=p.temperature).logprobs)
                for p, is_asked in zip(placed, asked, strict=True)
                if is_asked
            ]
        names = [
            p.batch.trajectories for p, is_asked in zip(placed, asked, strict=True) if is_asked
        ]
        totals = added(zip(names, own, strict=True), self._ranks.gather)
        return [
            torch.tensor([totals[name] for name in p.batch.trajectories]).to(self.device)[p.owners]
            if is_asked
            else None
            for p, is_asked in zip(placed, asked, strict=True)
        ]

    def _own_sums(self, placed: Placed, policy: torch.Tensor) -> torch.Tensor:
        """Over the tokens that each trajectory has in this batch. [S, 3] fp64"""
        rollout, advantages, _ = self._numbers(placed)
        columns = self._objective.columns(policy, rollout, advantages)
        return sums_of(columns, placed.owners, len(placed.batch.trajectories))

    def _numbers(self, placed: Placed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rollout logprobs, advantages and weights of the trained tokens. [M] each"""
        batch = placed.batch
        columns = (batch.rollout_logprobs, batch.advantages, batch.weights)
        rollout, advantages, weights = (column.to(self.device) for column in columns)
        return rollout, advantages, weights

    def _backward(
        self, placed: Placed, reference: torch.Tensor | None, sums: torch.Tensor | None
    ) -> Scored:
        """Forward and backward of one micro-batch; nothing here waits for the device.

        Args:
            reference: its logprobs of the trained tokens [M], where there is one.
            sums: over the whole rollout of each trained token [M, 3]; None = this batch has all of
                it.
        """
        rollout, advantages, weights = self._numbers(placed)
        policy, entropy = self._policy(
            *placed.inputs,
            temperature=placed.temperature,
            entropy=self.settings.entropy_coef != 0,
        )
        if sums is None and self._objective.of_rollouts:
            sums = self._own_sums(placed, policy.detach())[placed.owners]
        terms = self._objective(
            policy, rollout, advantages, sums=sums, reference=reference, entropy=entropy
        )
        total = (weights * terms.loss).sum() / placed.batch.denominator
        total.backward()
        self._optimizer.accumulate()
        return summed(placed, policy.detach(), rollout, entropy, terms, total.detach())

    def _metrics(
        self, scored: Sequence[Scored], norm: torch.Tensor, trained: int
    ) -> dict[str, float]:
        """Those of ``step_metrics`` that these settings have."""
        metrics = step_metrics(scored, norm, trained, self._ranks)
        if self._reference is None:
            del metrics["policy/kl_ref"]
        if self.settings.entropy_coef == 0:
            del metrics["policy/entropy"]
        if self.settings.correction == "none":
            del metrics["policy/correction_mean"], metrics["policy/correction_zero_fraction"]
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
