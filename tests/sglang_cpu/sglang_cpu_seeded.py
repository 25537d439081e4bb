"""Seeded sampling for SGLang on a CPU; loaded by SGLang in each of its processes."""

import torch

_WORD = 0xFFFFFFFF
_library = None


def register():
    global _library
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups.choices import add_deterministic_attention_backend_choices

    add_deterministic_attention_backend_choices(["torch_native"])
    # Triton kernels, for GPUs. Without them logprobs may differ in the last bits between batches.
    batch_invariant_ops.enable_batch_invariant_mode = lambda *args, **kwargs: None
    _library = torch.library.Library("sgl_kernel", "FRAGMENT")
    _library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor cols) -> Tensor")
    _library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")


def murmur_hash32(seed, positions, cols):
    """MurmurHash3 (32 bit, seed 0) of the 16 bytes seed, position, column. [N], [N], [V] -> [N, V]

    Public domain algorithm by Austin Appleby; in int64, whose low 32 bits survive every overflow.
    """
    wide = seed.view(torch.int64)[:, None]
    blocks = (
        wide & _WORD,
        (wide >> 32) & _WORD,
        positions.to(torch.int64)[:, None] & _WORD,
        cols.to(torch.int64)[None, :] & _WORD,
    )
    state = torch.zeros_like(wide)
    for block in blocks:
        block = (_rotate((block * 0xCC9E2D51) & _WORD, 15) * 0x1B873593) & _WORD
        state = (_rotate(state ^ block, 13) * 5 + 0xE6546B64) & _WORD
    state = state ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = ((state ^ (state >> shift)) * factor) & _WORD
    return (state ^ (state >> 16)).to(torch.uint32)


def _rotate(word, by):
    return ((word << by) | (word >> (32 - by))) & _WORD
