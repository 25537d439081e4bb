"""LoRA for SGLang on a CPU; loaded by SGLang in each of its processes.

SGLang asks for pinned memory wherever it handles adapters, and torch has none without an
accelerator. Ordinary memory does as well: there is no device to copy to.
"""

import functools

import torch

_MAKERS = ("arange", "empty", "tensor", "zeros")


def register():
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    for name in _MAKERS:
        setattr(torch, name, _unpinned(getattr(torch, name)))


def _unpinned(make):
    @functools.wraps(make)
    def made(*args, pin_memory=False, **kwargs):
        return make(*args, **kwargs)

    return made
