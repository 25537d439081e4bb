"""Draws one token per row from logits, with uniforms that the rows bring along.

Every request owns its random numbers, so what it samples does not depend on its place in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chatlearn.types import SamplingParams


def uniforms(seed: int, count: int) -> list[float]:
    """``count`` numbers in [0, 1), a pure function of ``seed`` (taken modulo 2**63)."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(count, generator=generator).tolist()


def sample(
    logits: torch.Tensor, draws: Sequence[float], params: Sequence[SamplingParams]
) -> tuple[list[int], list[float]]:
    """Sample one token per row by inverting the cumulative distribution.

    Args:
        logits: [R, V] raw scores of the head, any float dtype.
        draws: [R] uniforms in [0, 1); unused by greedy rows.
        params: [R] how each row samples; temperature 0 is greedy.

    Returns:
        Token ids [R] and, in fp32, log softmax(logits / temperature) of each before top-k and top-p
        cut anything (greedy rows: of the plain softmax). [R]
    """
    scores = logits.float()
    if any(p.temperature not in (0.0, 1.0) for p in params):
        scale = torch.tensor([p.temperature or 1.0 for p in params], device=logits.device)
        scores = scores / scale[:, None]
    logprobs = torch.log_softmax(scores, dim=-1)
    points = torch.tensor(draws, dtype=torch.float32, device=logits.device)

    greedy = [row for row, p in enumerate(params) if p.temperature == 0]
    if len(greedy) == len(params):
        tokens = scores.argmax(dim=-1)
    else:
        tokens = _invert(logprobs.exp(), points)
        if greedy:
            tokens[greedy] = scores[greedy].argmax(dim=-1)
    cut = [row for row, p in enumerate(params) if p.temperature != 0 and _is_cut(p)]
    if cut:
        tokens[cut] = _cut_and_invert(logprobs[cut].exp(), points[cut], [params[r] for r in cut])
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    # float64 holds both exactly, and one copy to the host is one wait for the device
    ids, values = torch.stack([tokens.double(), chosen.double()]).tolist()
    return [int(token) for token in ids], values


def _is_cut(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.top_k > 0


def _invert(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds ``points`` of the total. [R, V], [R] -> [R]

    The comparison is strict, so a weight of zero, which does not raise the cumulative sum, is never
    picked; and a point is at most 1 - 2**-24, whose product with the total rounds to less than the
    total. A device that sums in parallel may round the sum down on the way; there a zero weight
    falls back to the likeliest token. The clamp is for rows of nan, which the caller refuses.
    """
    cumulative = weights.cumsum(dim=-1)
    target = points[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    tokens = tokens.clamp_(max=weights.shape[-1] - 1)
    if weights.device.type != "cpu":
        picked = weights.gather(1, tokens[:, None])[:, 0]
        tokens = torch.where(picked > 0, tokens, weights.argmax(dim=-1))
    return tokens


def _cut_and_invert(
    probs: torch.Tensor, points: torch.Tensor, params: Sequence[SamplingParams]
) -> torch.Tensor:
    """Sample from the top-k tokens, and among them from the smallest set of mass top-p. [R]

    The likeliest token always stays. Equal probabilities rank by token id (a stable sort).
    """
    vocab = probs.shape[-1]
    device = probs.device
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    limit = torch.tensor([p.top_k if p.top_k > 0 else vocab for p in params], device=device)
    ranked = ranked.masked_fill(torch.arange(vocab, device=device) >= limit[:, None], 0.0)
    before = ranked.cumsum(dim=-1) - ranked
    mass = torch.tensor([p.top_p for p in params], device=device) * ranked.sum(dim=-1)
    outside = before >= mass[:, None]
    outside[:, 0] = False
    ranks = _invert(ranked.masked_fill(outside, 0.0), points)
    return order.gather(1, ranks[:, None])[:, 0]
