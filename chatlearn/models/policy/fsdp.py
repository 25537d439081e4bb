"""The trainer of one rank among many: FSDP2, the same step as in one process.

Every method is a collective: all ranks call it, in the same order. The gradients of a micro-batch
are reduced at once (reduce-scatter, in fp32, as a sum): the alternative, a reduction at the end of
the step only, saves that traffic but keeps a whole fp32 gradient on every rank, which at 8B
parameters is 32 GB, and its sums would be the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from chatlearn.errors import TrainerError
from chatlearn.models.policy.attention_kernels import find_planner
from chatlearn.models.policy.hf_export import write_hf
from chatlearn.models.policy.lora import (
    Base,
    BaseForward,
    Lora,
    adapter_weights,
    base_parameters,
    merged_weights,
    save_adapter,
)
from chatlearn.models.policy.offload import Offloadable
from chatlearn.models.policy.optimizer import dtype_of, local
from chatlearn.models.policy.ranks import World
from chatlearn.models.policy.settings import TrainerSettings
from chatlearn.models.policy.sharded import (
    Root,
    ShardedForward,
    load_sharded,
    persistent_buffers,
    reshard,
)
from chatlearn.models.policy.sharded_checkpoint import load_sharded_state, save_sharded
from chatlearn.models.policy.step import BaseTrainer, Forward
from chatlearn.models.policy.token_logprobs import PolicyForward
from chatlearn.types import MicroBatch, Sample


class FSDPTrainer(BaseTrainer):
    """One rank; the caller has initialised ``torch.distributed`` with gloo for the CPU, and NCCL
    for CUDA (``cpu:gloo,cuda:nccl``).

    The shards are fp32 and are the masters. With ``precision`` bf16 they are rounded where they are
    gathered, so that a forward computes what the engine computes with. With LoRA that is so of the
    adapters; the frozen rest is held in ``precision``.

    Args:
        path: model folder, ``.gguf`` file or hub id; see ``load_policy``.
        tokenizer: written beside the model in ``save``; may be None.
        settings: see ``TrainerSettings``.
        device: of this rank.
        reference_path: of the frozen model; needed where ``kl_coef`` > 0, else not loaded. None
            with LoRA: it is the policy without its adapters.
        trust_remote_code: run code that the folders bring.
        offload_reference: hold the reference on the CPU except while it scores.

    Raises:
        TrainerError: a model cannot be loaded or trained; every rank raises the same.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Any | None,
        settings: TrainerSettings,
        *,
        device: torch.device | str,
        reference_path: str | Path | None = None,
        trust_remote_code: bool = False,
        offload_reference: bool = False,
    ) -> None:
        if settings.kl_coef > 0 and reference_path is None and settings.lora is None:
            raise TrainerError("kl_coef is above 0 but no reference model was given.")
        device = torch.device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.tokenizer = tokenizer
        self._world = World()
        self._compute = dtype_of(settings.precision)
        self._trust_remote_code = trust_remote_code
        self._mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        held = torch.float32 if settings.lora is None else self._compute
        self._root = self._load(path, device, held, settings.lora)
        policy = self._forward(self._root, settings, device)
        reference: Forward | None = None
        self._frozen: Offloadable | None = None
        if settings.kl_coef > 0 and reference_path is None:
            reference = BaseForward(policy)
        elif reference_path is not None and settings.kl_coef > 0:
            frozen = self._load(reference_path, device, self._compute)
            frozen.requires_grad_(False)
            reference = self._forward(frozen, settings, device)
            if offload_reference:
                self._frozen = Offloadable(lambda: map(local, frozen.parameters()))
        super().__init__(
            policy,
            settings,
            reference=reference,
            ranks=self._world,
            device=device,
        )
        self._base = settings.lora and Base.of(self.model, settings.lora, self._world)
        self._parts = {
            "weights": Offloadable(lambda: map(local, self.model.parameters())),
            "gradients": Offloadable(
                lambda: [m.grad for m in self._optimizer.masters if m.grad is not None]
            ),
            "optimizer": Offloadable(self._optimizer.moments),
        }
        if self._frozen is not None:
            self._frozen.offload()

    async def step(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """See ``BaseTrainer.step``; the batches are this rank's, the metrics everybody's."""
        self._require("weights", "gradients", "optimizer")
        return await super().step(micro_batches)

    async def logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        """See ``BaseTrainer.logprobs``."""
        self._require("weights")
        return await super().logprobs(samples)

    @torch.no_grad()
    def full_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter whole, one at a time, on the device, under its name in the model's files;
        a tied one once. With LoRA the merged ones.

        A collective: every rank iterates to the end, even one that needs nothing of it.

        Args:
            dtype: None is the one of ``precision``, which the forward computes with.
        """
        self._require("weights")
        for name, whole in self._whole(dtype or self._compute):
            # of a mixture of experts transformers computes with other tensors than it stores
            yield from revert_weight_conversion(self.model, {name: whole}).items()

    async def save(self, folder: Path) -> None:
        """Write ``folder/hf`` (loads with ``from_pretrained``) and ``folder/state``.

        ``hf`` is written by rank 0, in the dtype of ``precision``; ``state`` by all ranks, to a
        folder that all of them see. With LoRA ``hf`` is the merged model, ``state`` is of the
        adapters only, and ``folder/adapter`` is what ``peft`` loads. Returns when all are whole.
        Raises CheckpointError.
        """
        self._require("weights", "optimizer")
        with self._world.together():
            write_hf(
                folder / "hf",
                self._exported(),
                self.model,
                self._compute,
                self.tokenizer,
                write=self._world.rank == 0,
            )
        if self.settings.lora is not None:
            self.save_adapter(folder / "adapter")
        save_sharded(folder / "state", self._optimizer, self.updates, self._world, self.device)
        with self._world.together():
            if self._base is not None and self._world.rank == 0:
                self._base.write(folder / "state")

    def save_adapter(self, folder: Path) -> int:
        """Write the adapters, on rank 0, as ``peft`` loads them; how many bytes it wrote.

        A collective. Raises CheckpointError.
        """
        assert self.settings.lora is not None
        self._require("weights")
        weights = dict(adapter_weights(self.model, _gathered))
        with self._world.together():
            if self._world.rank == 0:
                return save_adapter(folder, weights, self.model, self.settings.lora)
        return 0

    @torch.no_grad()
    def base_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As ``full_weights``, without the adapters."""
        self._require("weights")
        for name, parameter in base_parameters(self.model).items():
            yield name, _gathered(parameter)

    async def restore(self, folder: Path) -> None:
        """Continue from what ``save`` wrote, with as many ranks or another number of them.

        With as many ranks, and on a CPU, to the same bits. Raises CheckpointError.
        """
        self._require("weights", "optimizer")
        with self._world.together():
            if self._base is not None:
                self._base.require(folder / "state")
        self.updates = load_sharded_state(
            folder / "state", self._optimizer, self._world, self.device
        )

    def offload(self, *, weights: bool, gradients: bool, optimizer: bool) -> None:
        """Move the parts that are True to the CPU's memory, pinned, and give the device's back.

        Gradients exist only inside a step, so between steps there are none to move.
        """
        reshard(self._root)
        for name, wanted in self._named(weights, gradients, optimizer):
            if wanted:
                self._parts[name].offload()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def onload(self, *, weights: bool, gradients: bool, optimizer: bool) -> None:
        """Undo ``offload`` for the parts that are True."""
        for name, wanted in self._named(weights, gradients, optimizer):
            if wanted:
                self._parts[name].onload()

    def _load(
        self, path: str | Path, device: torch.device, dtype: torch.dtype, lora: Lora | None = None
    ) -> Root:
        return load_sharded(
            path,
            mesh=self._mesh,
            device=device,
            ranks=self._world,
            dtype=dtype,
            compute=self._compute,
            trust_remote_code=self._trust_remote_code,
            lora=lora,
        )

    def _forward(
        self, root: Root, settings: TrainerSettings, device: torch.device
    ) -> ShardedForward:
        planner = find_planner(settings.attention, device, self._compute, root.model.config)
        return ShardedForward(root, PolicyForward(root.model, planner))

    @contextmanager
    def _reference_at_hand(self) -> Iterator[None]:
        if self._frozen is None:
            yield
            return
        self._frozen.onload()
        try:
            yield
        finally:
            self._frozen.offload()

    def _whole(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter in ``dtype``, gathered; a collective."""
        if self.settings.lora is not None:
            for name, weight in merged_weights(self.model, _gathered):
                yield name, weight.to(dtype)
            return
        for name, parameter in self.model.named_parameters():
            yield name, _gathered(parameter.to(dtype))

    def _exported(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.full_weights()
        yield from persistent_buffers(self.model).items()

    def _require(self, *parts: str) -> None:
        away = [name for name in parts if self._parts[name].is_offloaded]
        if away:
            raise TrainerError(
                f"The trainer's {' and '.join(away)} are offloaded to the CPU: call onload() first."
            )

    @staticmethod
    def _named(weights: bool, gradients: bool, optimizer: bool) -> list[tuple[str, bool]]:
        return [("weights", weights), ("gradients", gradients), ("optimizer", optimizer)]


def _gathered(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter of which every rank holds a part; a collective."""
    assert isinstance(parameter, DTensor), "a parameter is not in shards"
    return parameter.detach().full_tensor()
