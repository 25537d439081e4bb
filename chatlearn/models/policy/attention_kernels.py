"""Attention kernels for GPUs that take packed segments as they are, where one is installed.

Order of ``auto``: the ``flash_attn`` package, FlashAttention through the ``kernels`` package (which
fetches a build from the Hugging Face hub, or has it cached), PyTorch's FlexAttention, and last the
buckets of ``attention.Segments``. A kernel is used only after it agreed with the buckets, forward
and backward, on a short row and a short tree of the model's own shape. FlashAttention knows no
trees: beside it they are FlexAttention's, or the buckets'.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from transformers import PretrainedConfig

from chatlearn.errors import TrainerError
from chatlearn.models.policy.attention import Plan, Planner, Segments, spans

ATTENTIONS = ("auto", "flash", "flex", "sdpa")
_HUB_FLASH = "kernels-community/flash-attn2"
_HUB_FLASH_VERSION = 4
"""The one with builds for torch 2.10 and up."""
_BLOCK = 128
"""Tokens of FlexAttention's blocks."""
_PROBE = (37, 5, 150)
"""Lengths of the segments a kernel is tried on: below and above one block."""
_PROBE_PARENTS = (-1, 36, 20)
"""Where they branch off in the tree that it is tried on."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class FlashPlan:
    """Segments for ``flash_attn_varlen_func`` (https://github.com/Dao-AILab/flash-attention)."""

    kernel: Callable[..., Any]
    cu_seqlens: torch.Tensor  # [N + 1] int32, on the device
    longest: int

    @classmethod
    def of(
        cls,
        kernel: Callable[..., Any],
        trees: Planner,
        cu_seqlens: Sequence[int],
        device: torch.device | str,
        parents: Sequence[int] = (),
    ) -> Plan:
        """See ``Planner``. A row of trees is given to ``trees``."""
        if any(parent >= 0 for parent in parents):
            return trees(cu_seqlens, device, parents)
        bounds = torch.tensor(list(cu_seqlens), dtype=torch.int32).to(device)
        return cls(kernel, bounds, max(b - a for a, b in pairwise(cu_seqlens)))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """See ``Plan``. The kernel wants [T, heads, dim] in bf16, and counts a window without the
        token itself."""
        out = self.kernel(
            *(states[0].transpose(0, 1) for states in (query, key, value)),
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_k=self.cu_seqlens,
            max_seqlen_q=self.longest,
            max_seqlen_k=self.longest,
            softmax_scale=scaling,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
        )
        return out.unsqueeze(0)


@dataclass(slots=True)
class FlexPlan:
    """Segments for ``torch.nn.attention.flex_attention``, as blocks that may hold a pair of tokens.

    The tokens below any token lie together right after it (``layout.lay``), so one number a token
    says who sees it. The blocks follow from those numbers: the T x T mask from which
    ``create_block_mask`` would find them is never made.
    """

    ends: torch.Tensor  # [T] token k is seen by the tokens [k, ends[k])
    depths: torch.Tensor  # [T] tokens before it in its sample
    masks: dict[int | None, Any] = field(default_factory=dict)
    """The ``BlockMask`` of a sliding window, by window."""

    @classmethod
    def of(
        cls, cu_seqlens: Sequence[int], device: torch.device | str, parents: Sequence[int] = ()
    ) -> FlexPlan:
        """See ``Planner``."""
        ends = torch.empty(cu_seqlens[-1], dtype=torch.int64)
        depths = torch.empty(cu_seqlens[-1], dtype=torch.int64)
        for span in spans(cu_seqlens, parents):
            end = span.start + span.length
            ends[span.path] = end  # the last that passes by is the last below
            ends[span.start : end] = end
            depths[span.start : end] = torch.arange(span.depth, span.seen)
        return cls(ends.to(device), depths.to(device))

    def mask(self, window: int | None) -> Any:
        """The block mask. A block of queries meets a block of keys that is not after it and that
        one of them may see; it is whole where all of them see all of it."""
        if window in self.masks:
            return self.masks[window]
        from torch.nn.attention.flex_attention import BlockMask

        ends, depths, tokens = self.ends, self.depths, len(self.ends)

        def sees(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            below = (k <= q) & (q < ends[k])
            return below if window is None else below & (depths[q] - depths[k] < window)

        block = torch.arange(-(-tokens // _BLOCK), device=ends.device)
        first, earlier = block[:, None] * _BLOCK, block[None, :] < block[:, None]
        meets = (_in_blocks(ends, 0).amax(1) > first) & earlier
        whole = (_in_blocks(ends, 0).amin(1) >= first + _BLOCK) & earlier
        if window is not None:  # a block too many is masked in the kernel
            shallowest = _in_blocks(depths, tokens).amin(1)
            meets &= _in_blocks(depths, -1).amax(1) > shallowest[:, None] - window
            whole = torch.zeros_like(whole)
        partly = (meets & ~whole) | (block[None, :] == block[:, None])
        self.masks[window] = BlockMask.from_kv_blocks(
            *_listed(partly),
            *_listed(whole),
            BLOCK_SIZE=_BLOCK,
            mask_mod=sees,
            seq_lengths=(tokens, tokens),
        )
        return self.masks[window]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """See ``Plan``."""
        out = _flex_attention(query.device.type)(
            query,
            key,
            value,
            block_mask=self.mask(window),
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return out.transpose(1, 2)


def _in_blocks(values: torch.Tensor, padding: int) -> torch.Tensor:
    """[T] -> [n, block]"""
    short = -len(values) % _BLOCK
    return torch.nn.functional.pad(values, (0, short), value=padding).view(-1, _BLOCK)


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which key blocks each query block has: how many, and their numbers first. [n, n] bool"""
    counts = blocks.sum(1, dtype=torch.int32)
    order = torch.argsort(blocks.to(torch.int8), dim=1, descending=True, stable=True)
    return counts[None, None], order.to(torch.int32)[None, None]


@cache
def _flex_attention(device_type: str) -> Callable[..., Any]:
    """Compiled on a GPU, where it is a kernel only then; eager on a CPU, where it is for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def _flash_package() -> Planner:
    from flash_attn import flash_attn_varlen_func

    return partial(FlashPlan.of, flash_attn_varlen_func, _trees())


def _flash_from_hub() -> Planner:
    from kernels import get_kernel

    kernel = get_kernel(_HUB_FLASH, version=_HUB_FLASH_VERSION)
    return partial(FlashPlan.of, kernel.flash_attn_varlen_func, _trees())


def _trees() -> Planner:
    """Of the rows that FlashAttention cannot have."""
    return Segments.of if find_spec("triton") is None else FlexPlan.of


def _flex() -> Planner:
    if find_spec("triton") is None:
        raise ImportError("triton is not installed")
    return FlexPlan.of


_KERNELS: tuple[tuple[str, str, Callable[[], Planner]], ...] = (
    ("flash", "flash_attn", _flash_package),
    ("flash", f"kernels ({_HUB_FLASH})", _flash_from_hub),
    ("flex", "FlexAttention", _flex),
)


def find_planner(
    attention: str, device: torch.device, dtype: torch.dtype, config: PretrainedConfig
) -> Planner:
    """The planner of the first kernel that is there and computes what the buckets compute.

    Args:
        attention: ``auto``, or ``flash``, ``flex`` or ``sdpa`` to have that one or an error.
        device: of the trainer; every kernel is for CUDA, so ``auto`` on a CPU is ``sdpa``.
        dtype: the model computes in.
        config: of the model, for the shape of its heads.

    Raises:
        TrainerError: the kernel that was asked for cannot be used; why is said.
    """
    if attention == "sdpa" or (attention == "auto" and device.type != "cuda"):
        return Segments.of
    if device.type != "cuda":
        raise TrainerError(
            f"models.policy_trainer.attention is {attention!r}, a kernel for CUDA devices, but "
            f"this trainer is on {device}. Set it to 'auto' or 'sdpa'."
        )
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return _first_that_works(attention, device, dtype, (heads, kv_heads, dim))


@cache
def _first_that_works(
    attention: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> Planner:
    """Looked for once for every ``shape`` (heads, key and value heads, dim) of a process."""
    refusals = []
    for kind, name, load in _KERNELS:
        if attention not in ("auto", kind):
            continue
        try:
            planner = load()
            _try(planner, kind, device, dtype, shape)
        # whatever an optional binary raises when it does not fit this machine
        except (ImportError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            refusals.append(f"{name}: {type(error).__name__}: {reason}")
            continue
        _log.info("Packed attention by %s.", name)
        return planner
    if attention == "auto":
        _log.info("Packed attention by PyTorch's SDPA, in buckets. %s", "; ".join(refusals))
        return Segments.of
    raise TrainerError(
        f"models.policy_trainer.attention is {attention!r}, but no such kernel can be used on "
        f"{device} in {dtype}: {'; '.join(refusals)}. Set it to 'auto' or 'sdpa', or install one."
    )


def _try(
    planner: Planner,
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
) -> None:
    """Compare outputs and gradients with those of the buckets on a row and on a tree.

    Raises:
        ValueError: they differ, or the kernel is not for this dtype.
    """
    if kind == "flash" and dtype != torch.bfloat16:
        raise ValueError("it computes in bf16 only (models.policy_trainer.precision)")
    heads, kv_heads, dim = shape
    bounds = [sum(_PROBE[:n]) for n in range(len(_PROBE) + 1)]
    seeded = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, h, bounds[-1], dim, generator=seeded).to(device, dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]
    upstream = torch.randn(1, bounds[-1], heads, dim, generator=seeded).to(device, dtype)
    for parents in ((), _PROBE_PARENTS):
        found = [
            _with_gradients(plan, states, upstream)
            for plan in (planner(bounds, device, parents), Segments.of(bounds, device, parents))
        ]
        for ours, theirs in zip(*found, strict=True):
            gap = ((ours - theirs).float().abs().mean() / theirs.float().std()).item()
            if not gap <= _TOLERANCE[dtype]:
                raise ValueError(f"it differs from PyTorch's attention by {gap:.1e} deviations")


def _with_gradients(
    plan: Plan, states: Sequence[torch.Tensor], upstream: torch.Tensor
) -> list[torch.Tensor]:
    out = plan.attend(*states, scaling=None, window=None)
    return [out.detach(), *torch.autograd.grad(out, states, upstream)]
