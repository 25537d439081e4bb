"""What a trainer leaves on disk: ``hf/`` for the world, ``state/`` for going on to the same bits.

Whoever calls this makes the folder appear at once (written beside, then renamed); here files are
only written and read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from chatlearn.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TENSORS = "trainer.safetensors"
NUMBERS = "trainer.json"
_SHARDS = ".metadata"
"""Of ``torch.distributed.checkpoint``: the sharded trainer's ``state/`` has it."""
_RNG = "rng."
REMEDY = (
    "Restore from another checkpoint, or start a new run from the hf/ folder beside it "
    "(models.policy_trainer.load)."
)


def save_hf(folder: Path, model: PreTrainedModel, tokenizer: Any | None) -> None:
    """Write model and tokenizer so that ``from_pretrained(folder)`` loads them.

    Raises:
        CheckpointError: the disk is full or refuses, or transformers cannot write this model.
    """
    try:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"Cannot write the model to {folder}: {error}") from error


def save_state(folder: Path, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
    """Write the optimizer's tensors, the number of updates made and torch's random states.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    everything = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    everything |= _rng_states()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(everything, folder / TENSORS)
        (folder / NUMBERS).write_text(json.dumps({"updates": updates}) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot write the trainer's state to {folder}: {error}") from error


def load_state(
    folder: Path, masters: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], int]:
    """Read what ``save_state`` wrote, set torch's random states, and return tensors and updates.

    Args:
        folder: ``state/`` of a checkpoint.
        masters: the trainer's own ``master.{name}`` tensors; names and shapes must be the same.

    Raises:
        CheckpointError: a file is missing or damaged, or is of another model.
    """
    path = folder / TENSORS
    if (folder / _SHARDS).is_file():
        raise CheckpointError(
            f"{folder} was written by sharded ranks (runtime_args.cluster=ray), and a trainer of "
            f"one process (runtime_args.cluster=local) cannot read it. Set runtime_args.cluster to "
            "ray, or start a new run from the hf/ folder beside it (models.policy_trainer.load)."
        )
    for file in (path, folder / NUMBERS):
        if not file.is_file():
            raise CheckpointError(f"The checkpoint is incomplete: {file} is missing. {REMEDY}")
    try:
        tensors = load_file(path)
        updates = int(json.loads((folder / NUMBERS).read_text())["updates"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}. {REMEDY}") from error
    saved = {name: tensor.shape for name, tensor in tensors.items()}
    refuse_other_model(path, saved, {name: master.shape for name, master in masters.items()})
    _set_rng_states({n: tensors.pop(n) for n in list(tensors) if n.startswith(_RNG)})
    return tensors, updates


def refuse_other_model(
    path: Path, saved: Mapping[str, torch.Size], own: Mapping[str, torch.Size]
) -> None:
    """Compare the shapes of the ``master.{name}`` tensors of a checkpoint with the trainer's.

    Raises:
        CheckpointError: a parameter is only on one side, or has another shape; it is named.
    """
    odd = sorted({name for name in saved if name.startswith("master.")} ^ own.keys())
    if odd:
        where = "the model" if odd[0] in saved else "the checkpoint"
        raise CheckpointError(
            f"{path} is of another model: {len(odd)} parameters are only on one side, "
            f"{odd[0].removeprefix('master.')!r} for one is not in {where}. {REMEDY}"
        )
    for name, shape in own.items():
        if saved[name] != shape:
            raise CheckpointError(
                f"{path} is of another model: {name.removeprefix('master.')!r} has shape "
                f"{list(saved[name])} there and {list(shape)} here. {REMEDY}"
            )


def _rng_states() -> dict[str, torch.Tensor]:
    states = {f"{_RNG}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"{_RNG}cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_rng_states(states: Mapping[str, torch.Tensor]) -> None:
    """A checkpoint may come from a machine with more or fewer GPUs: what is there is set."""
    torch.set_rng_state(states[f"{_RNG}cpu"])
    for i in range(torch.cuda.device_count()):
        if f"{_RNG}cuda.{i}" in states:
            torch.cuda.set_rng_state(states[f"{_RNG}cuda.{i}"], i)
