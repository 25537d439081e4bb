"""log p of chosen tokens of a packed row: one pass of the decoder body, the head where it is asked.

The LM head over a whole row is the largest tensor of a training step (T x vocabulary, in fp32), and
most of its rows are prompt tokens that nothing is learned from. So the body runs over the row, and
the head only at the positions that predict a chosen token, in pieces that are computed again in the
backward pass where one piece would not do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

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

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class TokenLogprobs(NamedTuple):
    """One number a chosen token."""

    logprobs: torch.Tensor  # [N] fp32, of softmax(logits / the token's temperature)
    entropy: torch.Tensor | None  # [N] fp32, in nats, of the same distribution


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
        chosen: torch.Tensor,
        *,
        temperature: float | torch.Tensor,
        entropy: bool = False,
    ) -> TokenLogprobs:
        """log p of the tokens at ``chosen``, each given the tokens before it in its segment.

        Args:
            token_ids: [T] the packed row.
            position_ids: [T] 0 at the start of each segment.
            segments: which positions belong together.
            chosen: [N] positions in the row, none of them the first of a segment.
            temperature: the logits are divided by it, in fp32: one number for all chosen tokens,
                or one for each. [N] fp32
            entropy: also compute the entropy of the distribution at each chosen position.
        """
        hidden = self.hidden(token_ids, position_ids, segments).index_select(0, chosen - 1)
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

    def check(self, packed: AbstractContextManager[None]) -> None:
        """Compare this way to the logits with the model's own, on two short packed segments.

        ``packed`` is entered around this way only; in it the model attends packed.

        Catches what would otherwise train silently on wrong numbers: a head that does more than a
        matrix product, dropout that is on, layers (linear attention, convolutions) that see from
        one segment into the next.

        Raises:
            TrainerError: they differ by more than rounding.
        """
        device = self.head.weight.device
        vocabulary = self.head.weight.shape[0]
        row = [(3 + 7 * i) % vocabulary for i in range(sum(_PROBE))]
        ids = torch.tensor(row, device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in _PROBE])
        segments = self.planner([0, _PROBE[0], sum(_PROBE)], device)
        with torch.no_grad():
            parts = [part.unsqueeze(0) for part in ids.split(list(_PROBE))]
            own = [self.model(part, use_cache=False).logits[0] for part in parts]
            theirs = torch.cat(own).float()
            try:
                with packed:
                    ours = self.logits(self.hidden(ids, positions, segments))
            except (TypeError, RuntimeError) as error:
                raise TrainerError(self._refusal(f"it raised: {error}")) from error
        tolerance = 1e-3 if self.head.weight.dtype == torch.float32 else 5e-2
        gap = ((ours - theirs).abs().mean() / theirs.std()).item()
        if not gap <= tolerance:
            raise TrainerError(self._refusal(f"the mean logit is off by {gap:.1e} deviations"))

    def _refusal(self, what: str) -> str:
        return (
            f"The head or the layers of {type(self.model).__name__} do more than packed training "
            f"knows: on a short text, {what}. Train a decoder-only model with softmax attention."
        )
