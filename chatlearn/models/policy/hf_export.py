"""Full tensors, one at a time, into a folder that ``from_pretrained`` loads.

At most one file's worth of tensors is held: what does not fit is on the disk already.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from chatlearn.errors import CheckpointError

SHARD_BYTES = 4 * 10**9
"""Largest weight file, unless one tensor alone is larger."""


class HfWriter:
    """Writes safetensors files and their index.

    Args:
        folder: made if need be.
        shard_bytes: a file is written before it would grow above this.

    Raises:
        CheckpointError: from any method; the disk is full or refuses.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._limit = shard_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0
        self._total_bytes = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it may be overwritten by the caller afterwards."""
        if self._held and self._held_bytes + tensor.nbytes > self._limit:
            self._flush()
        self._held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._held_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self, model: PreTrainedModel, dtype: torch.dtype, tokenizer: Any | None) -> None:
        """Write the rest, the index, the tokenizer, and the configs of ``model`` with ``dtype``."""
        self._flush()
        count = len(self._files)
        weight_map = {}
        try:
            for number, names in enumerate(self._files, start=1):
                final = f"model-{number:05d}-of-{count:05d}.safetensors"
                final = "model.safetensors" if count == 1 else final
                self._part(number).rename(self._folder / final)
                weight_map |= dict.fromkeys(names, final)
            if count > 1:
                index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
                text = json.dumps(index, indent=2, sort_keys=True) + "\n"
                (self._folder / "model.safetensors.index.json").write_text(text)
            config = copy.deepcopy(model.config)
            config.dtype = str(dtype).removeprefix("torch.")
            config.architectures = [type(model).__name__]
            if model.is_remote_code():
                custom_object_save(model, self._folder, config=config)
            config.save_pretrained(self._folder)
            if model.can_generate():
                model.generation_config.save_pretrained(self._folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(self._folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"Cannot write the model to {self._folder}: {error}") from error

    def _part(self, number: int) -> Path:
        """The name of a file while it is not known how many there will be."""
        return self._folder / f"model-{number:05d}.safetensors.part"

    def _flush(self) -> None:
        if not self._held:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(self._held, self._part(len(self._files) + 1), metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"Cannot write the model to {self._folder}: {error}") from error
        self._files.append(list(self._held))
        self._held, self._held_bytes = {}, 0


def write_hf(
    folder: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    model: PreTrainedModel,
    dtype: torch.dtype,
    tokenizer: Any | None,
    *,
    write: bool,
) -> None:
    """Iterate ``weights`` to the end, whatever happens, and write them where ``write``.

    Making the weights is a collective: a rank whose disk is full must not leave the others waiting,
    so its error is raised only after the last tensor.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    writer = HfWriter(folder)
    failure: CheckpointError | None = None
    for name, tensor in weights:
        if not write or failure is not None:
            continue
        try:
            writer.add(name, tensor)
        except CheckpointError as error:
            failure = error
    if failure is not None:
        raise failure
    if write:
        writer.close(model, dtype, tokenizer)
