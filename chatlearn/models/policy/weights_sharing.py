"""A bucket of weights as a handle that an SGLang server of this machine can open.

The payload is made without SGLang and names none of its classes: the server reads attributes off
the metadata, and its unpickler admits ``SimpleNamespace`` and torch's own rebuilding functions
(``sglang/srt/utils/common.py``, ``SafeUnpickler``, the same in every supported version).
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import pickle
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.multiprocessing import get_sharing_strategy, reductions, set_sharing_strategy

_UUID_ARG = 6
"""Where ``rebuild_cuda_tensor`` takes the device. SGLang accepts a GPU's UUID there, which means
the same in processes that see different devices (its ``patch_torch``)."""


def payload(
    data: torch.Tensor,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
) -> str:
    """Tensors end to end as SGLang's ``flattened_bucket``, for *one* opening.

    Args:
        data: [B] uint8 from ``shared_memory``.

    Returns: base64 of a pickle that holds no weights, only where they are.
    """
    metadata, start, item = [], 0, dtype.itemsize
    for name, shape in zip(names, shapes, strict=True):
        size = torch.Size(shape).numel() * item
        metadata.append(
            SimpleNamespace(
                name=name,
                shape=shape,
                dtype=dtype,
                start_idx=start,
                end_idx=start + size,
                numel=size,
            )
        )
        start += size
    buffer = io.BytesIO()
    with _shared_by_file():
        _SharingPickler(buffer, protocol=4).dump({"flattened_tensor": data, "metadata": metadata})
    return base64.b64encode(buffer.getvalue()).decode()


class _SharingPickler(pickle.Pickler):
    """Pickles tensors as handles of their memory, the way ``torch.multiprocessing`` does."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            rebuild, args = reductions.reduce_tensor(obj)
            if obj.is_cuda:
                uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
                args = (*args[:_UUID_ARG], uuid, *args[_UUID_ARG + 1 :])
            return rebuild, args
        if isinstance(obj, torch.storage.TypedStorage):
            return reductions.reduce_typed_storage(obj)
        if isinstance(obj, torch.UntypedStorage):
            return reductions.reduce_storage(obj)
        return NotImplemented


def shared_memory(size: int, device: torch.device) -> torch.Tensor:
    """[size] uint8 in memory that another process can open. On a GPU all of it is."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    with _shared_by_file(), _quiet_daemon():
        storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


@contextlib.contextmanager
def _shared_by_file() -> Iterator[None]:
    """CPU memory is shared by file name. torch's default, a file descriptor, needs a common
    ancestor with the receiver, and SGLang dies of a sender without one."""
    before = get_sharing_strategy()
    set_sharing_strategy("file_system")
    try:
        yield
    finally:
        set_sharing_strategy(before)


_has_daemon = False


@contextlib.contextmanager
def _quiet_daemon() -> Iterator[None]:
    """The first use of shared memory starts ``torch_shm_manager``, which lives on and keeps what
    it inherits: with our stdout a reader of a pipe would never see its end."""
    global _has_daemon
    if _has_daemon:
        yield
        return
    kept = [(fd, os.dup(fd)) for fd in (1, 2)]
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        for fd, _ in kept:
            os.dup2(nothing, fd)
        yield
        _has_daemon = True
    finally:
        os.close(nothing)
        for fd, copy in kept:
            os.dup2(copy, fd)
            os.close(copy)
