"""Refuses models that the slot memory would not compute exactly, before a token is sampled."""

from __future__ import annotations

import inspect

import torch

from chatlearn.errors import EngineError, boundary
from chatlearn.models.engine.slots import Segment, SlotModel

INSTEAD = "use runtime_args.rollout_backend=sglang for this model"


def require_exact(slots: SlotModel) -> None:
    """Compare ``slots`` with the plain forward of its model on a short prompt; leaves it empty.

    Raises ``EngineError`` naming what is not supported, or by how much the logits differ.
    """
    model = slots.model
    name = type(model).__name__
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise EngineError(f"the embedded engine needs a causal language model, {name} is not one")
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise EngineError(f"{name} has layers of type {sorted(kinds)}; {INSTEAD}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        # their frequencies follow the longest row of a batch, so rows would change one another
        raise EngineError(f"{name} has rope_type={rope['rope_type']!r}; {INSTEAD}")
    try:
        with boundary(EngineError, f"{name} in the embedded engine"):
            gap, size = _largest_gap(slots)
    finally:
        slots.release()
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    if not gap <= tolerance * max(1.0, size):
        raise EngineError(
            f"the embedded engine computes other logits than {name} itself: they differ by "
            f"{gap:.2g} where the largest is {size:.2g}; {INSTEAD}"
        )


def _largest_gap(slots: SlotModel) -> tuple[float, float]:
    """Largest difference of the logits and largest logit: a prompt in pieces, a copy, decoding."""
    model = slots.model
    vocab = model.get_input_embeddings().num_embeddings
    prompt = torch.randint(vocab, (12,), generator=torch.Generator().manual_seed(0)).tolist()

    def piece(slot: int, start: int, end: int, source: int | None = None) -> Segment:
        return Segment(slot, start, prompt[start:end], True, source)

    with slots.borrowed(model.config._attn_implementation):
        inputs = torch.tensor([prompt], device=slots.device)
        expected = model(input_ids=inputs, use_cache=False).logits[0].float()
    gap = 0.0
    for segments in (
        [piece(0, 0, 7), piece(1, 3, 9, source=0)],
        [piece(0, 7, 11), piece(1, 9, 10)],
        [piece(1, 10, 11), piece(0, 11, 12)],
    ):
        done, logits = slots.forward(segments)
        ends = [s.start + len(s.token_ids) - 1 for s in done]
        gap = max(gap, (logits.float() - expected[ends]).abs().max().item())
    return gap, expected.abs().max().item()
