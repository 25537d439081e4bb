"""``state/`` of a sharded trainer, by ``torch.distributed.checkpoint``, for any number of ranks.

Masters and moments are saved as ``DTensor`` shards, each rank its own, so a checkpoint of two ranks
resumes on one or on eight. Every rank must see the same folder. Random states are saved by rank,
and taken back where there are as many ranks as there were.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from chatlearn.errors import CheckpointError
from chatlearn.models.policy.checkpoint import NUMBERS, REMEDY, TENSORS, refuse_other_model
from chatlearn.models.policy.optimizer import PolicyOptimizer, local
from chatlearn.models.policy.ranks import World


def save_sharded(
    folder: Path, optimizer: PolicyOptimizer, updates: int, ranks: World, device: torch.device
) -> None:
    """Write this rank's part of ``folder``; a collective.

    Raises:
        CheckpointError: the disk is full or refuses, on any rank; every rank raises.
    """
    like = dict(zip(optimizer.names, optimizer.parameters, strict=True))
    state = {key: _shard_of(like, key, part) for key, part in optimizer.state().items()}
    with ranks.together():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(_rng_states(device), folder / _rng_file(ranks.rank))
            if ranks.rank == 0:
                numbers = {"updates": updates, "ranks": ranks.size}
                (folder / NUMBERS).write_text(json.dumps(numbers) + "\n")
        except (OSError, SafetensorError) as error:
            raise _cannot_write(folder, error) from error
    with ranks.together():
        try:
            dcp.save(state, checkpoint_id=folder)
        except (CheckpointException, OSError, RuntimeError) as error:
            raise _cannot_write(folder, error) from error


def load_sharded_state(
    folder: Path, optimizer: PolicyOptimizer, ranks: World, device: torch.device
) -> int:
    """Take back what ``save_sharded`` wrote, with any number of ranks; a collective.

    Returns:
        The number of updates made.

    Raises:
        CheckpointError: a file is missing or damaged, or is of another model or another kind of
            trainer; every rank raises, and the optimizer is as it was.
    """
    like = dict(zip(optimizer.names, optimizer.parameters, strict=True))
    with ranks.together():
        numbers, shapes = _contents(folder)
        own = {f"master.{name}": parameter.shape for name, parameter in like.items()}
        refuse_other_model(folder, shapes, own)
        state = {key: _empty(like, key, shape) for key, shape in shapes.items()}
    with ranks.together():
        try:
            dcp.load(state, checkpoint_id=folder)
            rng = _saved_rng(folder, ranks) if numbers["ranks"] == ranks.size else None
        except (CheckpointException, OSError, RuntimeError, SafetensorError) as error:
            raise _cannot_read(folder, error) from error
    optimizer.load({key: local(tensor) for key, tensor in state.items()})
    if rng is not None:
        torch.set_rng_state(rng["cpu"])
        if device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], device)
    return numbers["updates"]


def _shard_of(like: Mapping[str, torch.Tensor], key: str, part: torch.Tensor) -> torch.Tensor:
    """``part``, this rank's rows of a master or moment, cut as its parameter is. ``step.*`` is a
    number, and the same on every rank."""
    kind, _, name = key.partition(".")
    if kind == "step":
        return part
    parameter = like[name]
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _empty(like: Mapping[str, torch.Tensor], key: str, shape: torch.Size) -> torch.Tensor:
    """A place for the tensor ``key`` of a checkpoint to be read into."""
    kind, _, name = key.partition(".")
    if kind == "step":
        return torch.zeros(shape)
    return _shard_of(like, key, torch.zeros_like(local(like[name])))


def _contents(folder: Path) -> tuple[dict[str, int], dict[str, torch.Size]]:
    """The numbers of a checkpoint, and the shapes of its tensors. Raises CheckpointError."""
    if (folder / TENSORS).is_file():
        raise CheckpointError(
            f"{folder} was written by a trainer of one process (runtime_args.cluster=local), and "
            "sharded ranks (runtime_args.cluster=ray) cannot read it. Set runtime_args.cluster to "
            "local, or start a new run from the hf/ folder beside it (models.policy_trainer.load)."
        )
    for file in (folder / NUMBERS, folder / ".metadata"):
        if not file.is_file():
            raise CheckpointError(f"The checkpoint is incomplete: {file} is missing. {REMEDY}")
    try:
        read = json.loads((folder / NUMBERS).read_text())
        numbers = {key: int(read[key]) for key in ("updates", "ranks")}
        metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise _cannot_read(folder, error) from error
    tensors = {k: v.size for k, v in metadata.items() if isinstance(v, TensorStorageMetadata)}
    return numbers, tensors


def _rng_file(rank: int) -> str:
    return f"rng_{rank:05d}.safetensors"


def _rng_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _saved_rng(folder: Path, ranks: World) -> dict[str, torch.Tensor]:
    return load_file(folder / _rng_file(ranks.rank))


def _cannot_write(folder: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"Cannot write the trainer's state to {folder}: {_reason(error)}")


def _cannot_read(folder: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{folder} cannot be read: {_reason(error)}. {REMEDY}")


def _reason(error: BaseException) -> str:
    """In words; of a ``CheckpointException`` the failure of the lowest rank, not all tracebacks."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"
