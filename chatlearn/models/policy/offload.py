"""Tensors whose memory can be given back for a while, without the tensors being replaced.

FSDP, the optimizer and autograd hold on to the very tensors they know, so nothing is moved: the
storage behind a tensor is copied to the CPU and emptied, and later filled again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


class Offloadable:
    """Some tensors of a device, and whether their contents are there or aside.

    Args:
        tensors: which; asked at every ``offload``, since an optimizer makes its moments late.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]]) -> None:
        self._tensors = tensors
        self._aside: list[tuple[torch.UntypedStorage, torch.Tensor]] | None = None

    @property
    def is_offloaded(self) -> bool:
        return self._aside is not None

    def offload(self) -> int:
        """Copy the contents to the CPU (pinned memory, of a GPU's) and empty the storages.

        Returns:
            Bytes given back; 0 where they are offloaded already.
        """
        if self._aside is not None:
            return 0
        storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in self._tensors())}
        aside = []
        for storage in storages.values():
            if storage.nbytes() == 0:
                continue
            cuda = storage.device.type == "cuda"
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=cuda)
            aside.append((storage, host.copy_(_bytes(storage), non_blocking=cuda)))
        _synchronize(aside)
        for storage, _ in aside:
            storage.resize_(0)
        self._aside = aside
        return sum(host.numel() for _, host in aside)

    def onload(self) -> int:
        """Fill the storages again.

        Returns:
            Bytes taken; 0 where they were not offloaded.
        """
        if self._aside is None:
            return 0
        for storage, host in self._aside:
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=host.is_pinned())
        _synchronize(self._aside)
        taken = sum(host.numel() for _, host in self._aside)
        self._aside = None
        return taken


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """The storage as a tensor [nbytes] of uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronize(aside: Iterable[tuple[torch.UntypedStorage, torch.Tensor]]) -> None:
    for device in {storage.device for storage, _ in aside if storage.device.type == "cuda"}:
        torch.cuda.synchronize(device)
