"""One trainer rank of a cluster: a process that holds a shard of the policy.

Every rank is asked the same things in the same order; whatever gathers or reduces inside them
therefore meets its counterpart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from chatlearn.cluster.delivery import Delivery
from chatlearn.cluster.nodes import free_port
from chatlearn.cluster.settings import Vocabulary, sglang_engines, trainer_settings
from chatlearn.config import GrpoConfig
from chatlearn.models.policy.fsdp import FSDPTrainer
from chatlearn.models.policy.loading import eos_token_ids, load_tokenizer
from chatlearn.models.policy.weight_buckets import Sent
from chatlearn.types import MicroBatch, Sample

_TIMEOUT = timedelta(minutes=30)
"""Of one collective: a rank may wait that long for another that loads or writes."""

Result = TypeVar("Result")


class TrainerRank:
    """What an actor of the cluster wraps; ``FSDPTrainer`` with an event loop and a network.

    Args:
        cfg: the run's configuration.
    """

    def __init__(self, cfg: GrpoConfig) -> None:
        self._cfg = cfg
        self._loop = asyncio.new_event_loop()
        self._trainer: FSDPTrainer | None = None
        self._delivery: Delivery | None = None

    def meeting_point(self, host: str) -> str:
        """An address where the ranks can meet, on this machine; asked of rank 0."""
        return f"tcp://{host}:{free_port()}"

    def load(self, meeting_point: str, rank: int) -> dict[str, Any]:
        """Join the other ranks as number ``rank`` and load a shard of the policy.

        Returns: its ``vocabulary``, whether it ``packs_trees`` and a ``description`` of it.
        """
        cfg, settings = self._cfg, self._cfg.models.policy_trainer
        device = torch.device("cuda", 0) if settings.num_gpu else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(settings.cpu_per_process)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method=meeting_point,
            rank=rank,
            world_size=settings.num_rank,
            timeout=_TIMEOUT,
        )
        torch.manual_seed(cfg.runtime_args.seed)
        precision = cfg.precision(device.type)
        tokenizer = load_tokenizer(cfg.policy_path, trust_remote_code=settings.trust_remote_code)
        self._trainer = FSDPTrainer(
            cfg.policy_path,
            tokenizer,
            trainer_settings(cfg, precision),
            device=device,
            reference_path=(
                cfg.reference_path if settings.kl_coef > 0 and not cfg.reference_is_base else None
            ),
            trust_remote_code=settings.trust_remote_code,
            offload_reference=cfg.models.ref_policy.free_gpu_memory.offload_weights,
        )
        return {
            "vocabulary": Vocabulary(
                self._trainer.model.get_input_embeddings().num_embeddings,
                eos_token_ids(self._trainer.model, tokenizer),
            ),
            "packs_trees": self._trainer.packs_trees,
            "description": (
                f"{type(self._trainer.model).__name__}, {precision} on {settings.num_rank} × "
                f"{device.type}"
            ),
        }

    def connect(self, urls: Sequence[str], vocabulary: Vocabulary, folder: Path, host: str) -> None:
        """Learn where the engines are, where files for them may be written, and where they reach
        rank 0."""
        self._delivery = Delivery(
            self._cfg,
            sglang_engines(self._cfg, urls, vocabulary),
            rank=dist.get_rank(),
            ranks=dist.get_world_size(),
            folder=folder,
            host=host,
        )

    def step(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        return self._run(self._trainer.step(micro_batches))

    def logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        return self._run(self._trainer.logprobs(samples))

    def save(self, folder: Path) -> None:
        self._run(self._trainer.save(folder))

    def restore(self, folder: Path) -> None:
        self._run(self._trainer.restore(folder))

    def send(self, targets: Sequence[int], version: int) -> Sent:
        """This rank's part in bringing the current weights to the engines ``targets``."""
        if self._sends_adapters:
            sending = self._delivery.send_adapter(self._trainer.save_adapter, targets, version)
            return self._run(sending)
        return self._run(self._delivery.send(self._trainer.full_weights(), targets, version))

    def expected_checksums(self) -> dict[str, str] | None:
        """See ``Delivery.expected_checksums``; of rank 0."""
        if self._sends_adapters:
            return self._delivery.expected_checksums(self._trainer.base_weights())
        return self._delivery.expected_checksums(self._trainer.full_weights())

    def offload(self, *, weights: bool = False, rest: bool = False) -> None:
        """Give memory of the GPU back: the weights, and gradients and optimizer (``rest``), as far
        as ``models.policy_trainer.free_gpu_memory`` says."""
        free = self._cfg.models.policy_trainer.free_gpu_memory
        self._trainer.offload(
            weights=weights and free.offload_weights,
            gradients=rest and free.free_grad_buffers,
            optimizer=rest and free.offload_optimizer_states,
        )

    def onload(self, *, weights: bool = False, rest: bool = False) -> None:
        """Undo ``offload``."""
        self._trainer.onload(weights=weights, gradients=rest, optimizer=rest)

    @property
    def _sends_adapters(self) -> bool:
        return self._cfg.models.policy_trainer.lora_publish == "adapter"

    def _run(self, call: Coroutine[Any, Any, Result]) -> Result:
        return self._loop.run_until_complete(call)
