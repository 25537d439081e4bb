"""Declares the operators that a torchvision built for CUDA misses beside a CPU torch.

Runs at every start of the interpreter (``sglang_cpu.pth``), so it imports nothing heavy: torch is
imported when torchvision is.
"""

import importlib.abc
import sys

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareFirst(importlib.abc.MetaPathFinder):
    """Finds nothing; it only notices that torchvision is about to be imported, once."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for name in OPERATORS:
                torch.library.define(f"torchvision::{name}", SCHEMA)


def install():
    sys.meta_path.insert(0, DeclareFirst())
