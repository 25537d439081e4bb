"""How much memory a run will want, from the model folder's own files; nothing is loaded."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from chatlearn.config.schema import GrpoConfig

_GIB = 1024**3
_LOGITS = 3 * 256 * 1024**2
"""Bytes. The trainer makes fp32 logits in pieces of 256 MiB, and a piece lives about three times:
itself, its softmax, its gradient."""


def estimate_memory(cfg: GrpoConfig, *, machines: int = 1) -> str:
    """The peak in GiB with its parts, or why there is none. Libraries and agents come on top.

    Args:
        machines: how many share the run; matters only with ``cluster=ray``.
    """
    folder = Path(cfg.models.policy_trainer.load).expanduser()
    if not folder.is_dir():
        return f"model folder not found locally: memory not estimated ({folder})"
    estimate = _one_process
    if cfg.runtime_args.rollout_backend == "sglang":
        estimate = partial(_apart, machines=machines)
    try:
        parameters = count_parameters(folder)
        shape = _model_shape(folder)
        lines = estimate(cfg, parameters, shape)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not estimated: {folder}: {type(error).__name__}: {error}"
    lines[-1] += f" (rough; from {parameters:,} parameters in {folder})"
    text = f"\n{'':<12}".join(lines)
    longest = shape.get("max_position_embeddings")
    if longest is not None and cfg.max_context > longest:
        context = f"a context of {cfg.max_context:,} tokens"
        text += f"\n{'careful':<12}{context}, but the model knows {longest:,}"
    return text


def _one_process(cfg: GrpoConfig, parameters: int, shape: Mapping[str, Any]) -> list[str]:
    """Trainer and embedded engine on one device, sharing the weights."""
    held = dict(_held(cfg, parameters, shape))
    cache, activations = _kv_cache(cfg, shape), _activations(cfg, shape)
    total = sum(held.values()) + max(cache, activations)
    in_turn = f"and in turn KV cache {_gib(cache)}, activations {_gib(activations)}"
    return [f"about {_gib(total)}: {_listed(held)}; {in_turn}"]


def _apart(
    cfg: GrpoConfig, parameters: int, shape: Mapping[str, Any], *, machines: int
) -> list[str]:
    """A trainer process, an SGLang engine, and what waits on the CPU while engines sample."""
    trainer, on_ray = cfg.models.policy_trainer, cfg.runtime_args.cluster == "ray"
    held = dict((_sharded if on_ray else _held)(cfg, parameters, shape))
    step = {"activations": _activations(cfg, shape)}
    if on_ray:
        step["gathered weights"] = _number(cfg) * _gathered(parameters, shape)
    total = _gib(sum(held.values()) + sum(step.values()))
    who = "a trainer rank" if on_ray else "the trainer"
    lines = [
        f"{who} {total}: {_listed(held)}; in a step {_listed(step)}",
        _engine(cfg, parameters, shape),
    ]
    moved = _offloaded(cfg, held)
    if moved:
        ranks = ceil(trainer.num_rank / machines)
        whose = f"{ranks} ranks of a machine hold" if ranks > 1 else "the rank of a machine holds"
        lines.append(f"while engines sample, the {whose} {_gib(moved * ranks)} on the CPU")
    return lines


def _engine(cfg: GrpoConfig, parameters: int, shape: Mapping[str, Any]) -> str:
    policy = cfg.models.policy
    split, calls = policy.tensor_model_parallel_size, policy.max_concurrent_requests
    share, part = "", ""
    if policy.num_gpu:
        share = f" takes {policy.gpu_memory_utilization:.0%} of a GPU"
        part = ", on each GPU" if split > 1 else ""
    weights = _number(cfg) * parameters // split
    cache = _kv_cache(cfg, shape) // split
    return (
        f"an engine{share}: weights {_gib(weights)}, the rest KV cache; {calls:,} full contexts "
        f"would want {_gib(cache)} of it{part}"
    )


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


def _held(cfg: GrpoConfig, parameters: int, shape: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Name and bytes of what stays for the whole run."""
    adapters = _adapters(cfg, shape)
    trained, half = adapters or parameters, _number(cfg) == 2 and not adapters
    yield "weights", _number(cfg) * parameters
    if adapters:
        yield "adapters", 4 * adapters
    # Gradients of bf16 parameters are summed into fp32 ones.
    yield "gradients", (6 if half else 4) * trained
    yield "AdamW moments", 8 * trained
    if half:
        yield "fp32 masters", 4 * trained
    if _has_reference(cfg):
        yield "reference", _number(cfg) * parameters


def _sharded(
    cfg: GrpoConfig, parameters: int, shape: Mapping[str, Any]
) -> Iterator[tuple[str, int]]:
    """Name and bytes of what one FSDP2 rank holds between steps, divided: what is trained in fp32,
    what is frozen in ``precision``."""
    ranks, adapters = cfg.models.policy_trainer.num_rank, _adapters(cfg, shape)
    share, trained = ceil(parameters / ranks), ceil((adapters or parameters) / ranks)
    yield "weights", (_number(cfg) if adapters else 4) * share
    if adapters:
        yield "adapters", 4 * trained
    yield "gradients", 4 * trained
    yield "AdamW moments", 8 * trained
    if _has_reference(cfg):
        yield "reference", _number(cfg) * share


def _has_reference(cfg: GrpoConfig) -> bool:
    return bool(cfg.models.policy_trainer.kl_coef) and not cfg.reference_is_base


def _adapters(cfg: GrpoConfig, shape: Mapping[str, Any]) -> int:
    """Numbers in the LoRA adapters, 0 without LoRA: a rank's worth of each side of a layer."""
    trainer, hidden = cfg.models.policy_trainer, shape["hidden_size"]
    if not trainer.lora_rank:
        return 0
    heads = shape["num_attention_heads"]
    head_size = shape.get("head_dim") or hidden // heads
    keys = (shape.get("num_key_value_heads") or heads) * head_size
    inner = shape.get("intermediate_size") or 4 * hidden
    other = {"q_proj": heads * head_size, "o_proj": heads * head_size}
    other |= {"k_proj": keys, "v_proj": keys}
    other |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), inner)
    targets = trainer.lora_target_modules
    wanted = [t.rpartition(".")[2] for t in targets] if isinstance(targets, tuple) else other
    sides = sum(hidden + other.get(name, hidden) for name in wanted)
    return trainer.lora_rank * sides * shape["num_hidden_layers"]


def _gathered(parameters: int, shape: Mapping[str, Any]) -> int:
    """Numbers that a rank holds whole in a step: embedding and head, the layer that works, and the
    next one on its way."""
    tables = 1 if shape.get("tie_word_embeddings") else 2
    ends = min(parameters, tables * shape.get("vocab_size", 0) * shape["hidden_size"])
    return (
        ends
        + min(2, shape["num_hidden_layers"]) * (parameters - ends) // shape["num_hidden_layers"]
    )


def _offloaded(cfg: GrpoConfig, state: Mapping[str, int]) -> int:
    """Bytes of one rank that wait on the CPU while engines sample on the same GPUs."""
    if not (cfg.is_colocated and cfg.models.policy_trainer.num_gpu):
        return 0
    free = cfg.models.policy_trainer.free_gpu_memory
    weights = state["weights"] * free.offload_weights
    return weights + state["AdamW moments"] * free.offload_optimizer_states


def _kv_cache(cfg: GrpoConfig, shape: Mapping[str, Any]) -> int:
    """Bytes of all the calls that one engine works on at once, each with a full context."""
    heads = shape["num_attention_heads"]
    head_size = shape.get("head_dim") or shape["hidden_size"] // heads
    row = 2 * (shape.get("num_key_value_heads") or heads) * head_size * shape["num_hidden_layers"]
    return row * cfg.max_context * cfg.models.policy.max_concurrent_requests * _number(cfg)


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


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / 1024**2:.0f} MiB"
