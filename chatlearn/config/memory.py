"""How much memory a run will want, from the model folder's own files; nothing is loaded."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatlearn.config.schema import GrpoConfig

_GIB = 1024**3
_LOGITS = 3 * 256 * 1024**2
"""Bytes. The trainer makes fp32 logits in pieces of 256 MiB, and a piece lives about three times:
itself, its softmax, its gradient."""


def estimate_memory(cfg: GrpoConfig) -> str:
    """The peak in GiB with its parts, or why there is none. Libraries and agents come on top."""
    folder = Path(cfg.models.policy_trainer.load).expanduser()
    if not folder.is_dir():
        return f"model folder not found locally: memory not estimated ({folder})"
    try:
        parameters = count_parameters(folder)
        shape = _model_shape(folder)
        held = dict(_held(cfg, parameters))
        cache, activations = _kv_cache(cfg, shape), _activations(cfg, shape)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not estimated: {folder}: {type(error).__name__}: {error}"
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in held.items())
    text = (
        f"about {_gib(sum(held.values()) + max(cache, activations))}: {listed}; and in turn KV "
        f"cache {_gib(cache)}, activations {_gib(activations)} "
        f"(rough; from {parameters:,} parameters in {folder})"
    )
    longest = shape.get("max_position_embeddings")
    context = _context(cfg)
    if longest is not None and context > longest:
        text += f"\n{'careful':<12}a context of {context:,} tokens, but the model knows {longest:,}"
    return text


def count_parameters(folder: Path) -> int:
    """Numbers in all tensors of ``folder/*.safetensors``, read from the headers alone.

    Raises:
        ValueError: there is no such file, or one of them is not in the safetensors format.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError("no *.safetensors file in it")
    return sum(math.prod(tensor["shape"]) for file in files for tensor in _tensors(file))


def _tensors(file: Path) -> Iterator[dict[str, Any]]:
    """The format begins with the header's length (8 bytes, little-endian) and its JSON."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length < min(file.stat().st_size, 100_000_000):
            raise ValueError(f"{file.name} is not a safetensors file")
        header = json.loads(stream.read(length))
    return (tensor for name, tensor in header.items() if name != "__metadata__")


def _model_shape(folder: Path) -> Mapping[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("text_config", config)


def _held(cfg: GrpoConfig, parameters: int) -> Iterator[tuple[str, int]]:
    """Name and bytes of what stays for the whole run."""
    half = _number(cfg) == 2
    yield "weights", _number(cfg) * parameters
    # Gradients of bf16 parameters are summed into fp32 ones.
    yield "gradients", (6 if half else 4) * parameters
    yield "AdamW moments", 8 * parameters
    if half:
        yield "fp32 masters", 4 * parameters
    if cfg.models.policy_trainer.kl_coef:
        yield "reference", _number(cfg) * parameters


def _kv_cache(cfg: GrpoConfig, shape: Mapping[str, Any]) -> int:
    """Bytes of the engine's slots, all full; freed while the trainer works."""
    heads = shape["num_attention_heads"]
    head_size = shape.get("head_dim") or shape["hidden_size"] // heads
    row = 2 * (shape.get("num_key_value_heads") or heads) * head_size * shape["num_hidden_layers"]
    return row * _context(cfg) * cfg.models.policy.max_concurrent_requests * _number(cfg)


def _activations(cfg: GrpoConfig, shape: Mapping[str, Any]) -> int:
    """Bytes that one micro-batch keeps for its backward pass.

    A layer keeps about twelve rows of hidden size (norms, q k v, attention, residuals) and three of
    the feed-forward's size. With checkpointing: one row of every layer, and one layer in full.
    """
    trainer = cfg.models.policy_trainer
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    layer = 12 * hidden + 3 * (shape.get("intermediate_size") or 4 * hidden)
    token = layers * hidden + layer if trainer.gradient_checkpointing else layers * layer
    return trainer.max_token_in_packing * token * _number(cfg) + _LOGITS


def _number(cfg: GrpoConfig) -> int:
    """Bytes of one parameter."""
    device = "cuda" if cfg.models.policy_trainer.num_gpu else "cpu"
    return 2 if cfg.precision(device) == "bf16" else 4


def _context(cfg: GrpoConfig) -> int:
    return max(cfg.train_budget().context_tokens, cfg.eval_budget().context_tokens)


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / 1024**2:.0f} MiB"
