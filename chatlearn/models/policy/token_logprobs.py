"""log p of chosen tokens of a packed row: one pass of the decoder body, the head where it is asked.

The LM head over a whole row is the largest tensor of a training step (T x vocabulary, in fp32), and
most of its rows are prompt tokens that nothing is learned from. So the body runs over the row, and
the head only at the positions that predict a chosen token, in pieces that are computed again in the
backward pass where one piece would not do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from chatlearn.errors import TrainerError
from chatlearn.models.policy.attention import Plan, Planner, Segments, body_inputs

_LOGITS_AT_ONCE = 2**26
"""Most fp32 logits that live at once (256 MiB): rows of a piece times vocabulary."""
_PROBE = (9, 5)
"""Lengths of the two segments that ``PolicyForward.check`` compares."""
_BRANCH = 4
"""Position in the first of them that the second goes on after, in the tree it compares."""

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class TokenLogprobs(NamedTuple):
    """One number a chosen token."""

    logprobs: torch.Tensor  # [N] fp32, of softmax(logits / the token's temperature)
    entropy: torch.Tensor | None  # [N] fp32, in nats, of the same distribution


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
        predictors: torch.Tensor,
        chosen: torch.Tensor,
        *,
        temperature: float | torch.Tensor,
        entropy: bool = False,
    ) -> TokenLogprobs: ...

    def check(self, packed: AbstractContextManager[None]) -> str: ...


class PolicyForward:
    """A causal language model as (packed row, positions) -> logprobs.

    Args:
        model: anything transformers loads as a causal LM whose logits are a linear head on the
            output of a decoder body, perhaps scaled or soft-capped by its config.
        planner: makes the plan of a packed row's attention.

    Raises:
        TrainerError: the body or the head cannot be found.
    """

    def __init__(self, model: PreTrainedModel, planner: Planner = Segments.of) -> None:
        self.model = model
        self.planner = planner
        self.body = model.get_decoder()
        self.head = model.get_output_embeddings()
        name = type(model).__name__
        if self.body is None or self.body is model or not isinstance(self.body, nn.Module):
            raise TrainerError(
                f"{name}.get_decoder() finds no body to train. Only decoder-only causal LMs work."
            )
        if self.head is None:
            raise TrainerError(f"{name} has no output embeddings, so it is not a causal LM.")
        config = model.config.get_text_config()
        layers = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
        if layers:
            raise TrainerError(
                f"{name} has {', '.join(sorted(layers))} layers, which would see from one packed "
                "sample into the next. Train a model with full or sliding attention."
            )
        self._soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale = float(getattr(config, "logit_scale", None) or 1.0)
        self._scale /= float(getattr(config, "logits_scaling", None) or 1.0)

    def __call__(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segments: Plan,
        predictors: torch.Tensor,
        chosen: torch.Tensor,
        *,
        temperature: float | torch.Tensor,
        entropy: bool = False,
    ) -> TokenLogprobs:
        """log p of chosen tokens, each given the tokens before it in its sample.

        Args:
            token_ids: [T] the packed row.
            position_ids: [T] how many tokens come before each.
            segments: which positions see which.
            predictors: [N] positions before those of the chosen tokens, in their samples.
            chosen: [N] positions of the chosen tokens.
            temperature: the logits are divided by it, in fp32: one number for all chosen tokens,
                or one for each. [N] fp32
            entropy: also compute the entropy of the distribution at each chosen position.
        """
        hidden = self.hidden(token_ids, position_ids, segments).index_select(0, predictors)
        targets = token_ids.index_select(0, chosen)
        piece = max(1, _LOGITS_AT_ONCE // self.head.weight.shape[0])
        if len(chosen) <= piece:
            return TokenLogprobs(*self._score(hidden, targets, temperature, entropy))
        rows, tokens = hidden.split(piece), targets.split(piece)
        each = isinstance(temperature, torch.Tensor)
        divisors = temperature.split(piece) if each else [temperature] * len(rows)
        parts = [
            checkpoint(self._score, *of_piece, entropy, use_reentrant=False)
            for of_piece in zip(rows, tokens, divisors, strict=True)
        ]
        logprobs = torch.cat([part[0] for part in parts])
        return TokenLogprobs(logprobs, torch.cat([p[1] for p in parts]) if entropy else None)

    def hidden(
        self, token_ids: torch.Tensor, position_ids: torch.Tensor, segments: Plan
    ) -> torch.Tensor:
        """The body's last hidden states. [T] -> [T, hidden]"""
        inputs: dict[str, Any] = body_inputs(position_ids, segments)
        return self.body(token_ids.unsqueeze(0), **inputs).last_hidden_state[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits as the model itself would make them. [N, hidden] -> [N, vocabulary]"""
        logits = self.head(hidden).float()
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._soft_cap:
            logits = torch.tanh(logits / self._soft_cap) * self._soft_cap
        return logits

    def _score(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        temperature: float | torch.Tensor,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self.logits(hidden)
        if isinstance(temperature, torch.Tensor):
            logits = logits / temperature.unsqueeze(1)
        elif temperature != 1.0:
            logits = logits / temperature
        log_sum = torch.logsumexp(logits, dim=-1)
        logprobs = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - log_sum
        if not entropy:
            return logprobs, None
        mean_logit = (torch.softmax(logits, dim=-1) * logits).sum(dim=-1)
        return logprobs, log_sum - mean_logit

    def check(self, packed: AbstractContextManager[None]) -> str:
        """Compare this way to the logits with the model's own, on a short row and a short tree.

        ``packed`` is entered around this way only; in it the model attends packed.

        Catches what would otherwise train silently on wrong numbers: a head that does more than a
        matrix product, dropout that is on, layers (linear attention, convolutions) that see from
        one segment into the next.

        Returns:
            Why this model cannot be trained on trees, in words; '' when it can.

        Raises:
            TrainerError: even on the row they differ by more than rounding.
        """
        device = self.head.weight.device
        vocabulary = self.head.weight.shape[0]
        row = [(3 + 7 * i) % vocabulary for i in range(sum(_PROBE))]
        first, second = row[: _PROBE[0]], row[_PROBE[0] :]
        with torch.no_grad():
            apart = self._own_logits([first, second], device)
            joined = self._own_logits([first, first[: _BRANCH + 1] + second], device)
            with packed:
                gap = self._gap(row, (), torch.cat(apart))
                tree = self._gap(
                    row, (-1, _BRANCH), torch.cat([joined[0], joined[1][_BRANCH + 1 :]])
                )
        tolerance = 1e-3 if self.head.weight.dtype == torch.float32 else 5e-2
        if isinstance(gap, str) or not gap <= tolerance:
            raise TrainerError(self._refusal(gap))
        return "" if isinstance(tree, float) and tree <= tolerance else _said(tree)

    def _own_logits(self, texts: list[list[int]], device: torch.device) -> list[torch.Tensor]:
        """The model's own fp32 logits of each text. [L, vocabulary] each"""
        inputs = [torch.tensor([text], device=device) for text in texts]
        return [self.model(ids, use_cache=False).logits[0].float() for ids in inputs]

    def _gap(self, row: list[int], parents: tuple[int, ...], own: torch.Tensor) -> float | str:
        """How far these logits of the probe are from ``own`` in the mean, in deviations; or what
        the model raised."""
        device = own.device
        starts = (0, parents[1] + 1 if parents else 0)
        positions = [
            torch.arange(n, device=device) + s for n, s in zip(_PROBE, starts, strict=True)
        ]
        try:
            segments = self.planner([0, _PROBE[0], sum(_PROBE)], device, parents)
            ids = torch.tensor(row, device=device)
            ours = self.logits(self.hidden(ids, torch.cat(positions), segments))
        except (TypeError, RuntimeError) as error:
            return str(error)
        return ((ours - own).abs().mean() / own.std()).item()

    def _refusal(self, gap: float | str) -> str:
        return (
            f"The head or the layers of {type(self.model).__name__} do more than packed training "
            f"knows: on a short text, {_said(gap)}. Train a decoder-only model with softmax "
            "attention."
        )


def _said(gap: float | str) -> str:
    if isinstance(gap, str):
        return f"it raised: {gap}"
    return f"the mean logit is off by {gap:.1e} deviations"
