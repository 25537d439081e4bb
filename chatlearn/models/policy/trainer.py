"""The trainer of one process: micro-batches in, one optimizer update, metrics out.

The step itself is in ``step.py``. The embedded engine samples from the very module that is trained:
parameters are written in place and never replaced, dropout is never on, and the attention of the
module is as the engine left it outside a step. No method yields to the event loop half-way.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from chatlearn.errors import TrainerError
from chatlearn.interfaces import Weights
from chatlearn.models.policy.attention_kernels import find_planner
from chatlearn.models.policy.checkpoint import load_state, save_hf, save_state
from chatlearn.models.policy.hf_export import write_hf
from chatlearn.models.policy.lora import (
    Base,
    BaseForward,
    adapter_weights,
    base_parameters,
    inject,
    merged_weights,
    save_adapter,
)
from chatlearn.models.policy.optimizer import dtype_of
from chatlearn.models.policy.ranks import Alone
from chatlearn.models.policy.settings import TrainerSettings
from chatlearn.models.policy.sharded import persistent_buffers
from chatlearn.models.policy.step import BaseTrainer, Forward
from chatlearn.models.policy.token_logprobs import PolicyForward

__all__ = ["PolicyTrainer", "TrainerSettings"]


class PolicyTrainer(BaseTrainer):
    """Implements ``interfaces.Trainer`` in one process, on a CPU or one GPU.

    Args:
        model: a causal LM in the dtype of ``settings.precision``; updated in place.
        tokenizer: written beside the model in ``save``; may be None.
        settings: see ``TrainerSettings``.
        reference: a frozen model of the same vocabulary; needed only where ``kl_coef`` > 0. None
            with LoRA: it is ``model`` without its adapters.
        is_shared: the engine samples from ``model`` itself, so ``weights`` are its own parameters
            and nothing is merged. Matters only with LoRA.

    Raises:
        TrainerError: the settings or the model cannot be trained; see ``PolicyForward.check`` and
            ``lora.inject``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any | None,
        settings: TrainerSettings,
        *,
        reference: PreTrainedModel | None = None,
        is_shared: bool = False,
    ) -> None:
        if settings.kl_coef > 0 and reference is None and settings.lora is None:
            raise TrainerError("kl_coef is above 0 but no reference model was given.")
        held = next(model.parameters())
        if held.dtype != dtype_of(settings.precision):
            raise TrainerError(
                f"precision is {settings.precision!r}, but the model is held in {held.dtype}. "
                f"Load it with load_policy(..., precision={settings.precision!r})."
            )
        self.tokenizer, self._is_shared = tokenizer, is_shared
        if settings.lora is not None:
            inject(model, settings.lora)
        planner = find_planner(settings.attention, held.device, held.dtype, model.config)
        policy = PolicyForward(model.eval(), planner)
        frozen: Forward | None = None
        if settings.kl_coef > 0:
            frozen = BaseForward(policy)
            if reference is not None:
                frozen = PolicyForward(reference.eval().requires_grad_(False), planner)
        super().__init__(
            policy,
            settings,
            reference=frozen,
            ranks=Alone(),
            device=held.device,
        )
        self._base = settings.lora and Base.of(model, settings.lora, self._ranks)

    async def weights(self) -> Weights:
        """The parameters themselves under their Hugging Face names; tied ones once, first name.

        With LoRA the merged ones, made anew whenever they are asked for.
        """
        if self.settings.lora is not None and not self._is_shared:
            return Merged(self.model)
        return {name: tensor.detach() for name, tensor in self.model.named_parameters()}.items()

    async def save(self, folder: Path) -> None:
        """Write ``folder/hf`` (loads with ``from_pretrained``) and ``folder/state``.

        ``state`` has the fp32 masters, the moments of AdamW, the number of updates and torch's
        random states. With LoRA ``hf`` is the merged model, ``state`` is of the adapters only, and
        ``folder/adapter`` is what ``peft`` loads. Raises CheckpointError.
        """
        if self.settings.lora is None:
            save_hf(folder / "hf", self.model, self.tokenizer)
        else:
            weights = chain(self._stored(), persistent_buffers(self.model).items())
            dtype = dtype_of(self.settings.precision)
            write_hf(folder / "hf", weights, self.model, dtype, self.tokenizer, write=True)
            self.save_adapter(folder / "adapter")
        save_state(folder / "state", self._optimizer.state(), self.updates)
        if self._base is not None:
            self._base.write(folder / "state")

    def save_adapter(self, folder: Path) -> int:
        """Write the adapters as ``peft`` loads them; how many bytes. Raises CheckpointError."""
        assert self.settings.lora is not None
        return save_adapter(
            folder, dict(adapter_weights(self.model)), self.model, self.settings.lora
        )

    def base_weights(self) -> Weights:
        """The parameters without the adapters, under their Hugging Face names."""
        return base_parameters(self.model).items()

    async def restore(self, folder: Path) -> None:
        """Continue from what ``save`` wrote, to the same bits. Raises CheckpointError."""
        if self._base is not None:
            self._base.require(folder / "state")
        own = {n: t for n, t in self._optimizer.state().items() if n.startswith("master.")}
        tensors, self.updates = load_state(folder / "state", own)
        self._optimizer.load(tensors)

    def _stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Merged weights as the model's files have them: of a mixture of experts transformers
        computes with other tensors than it stores."""
        for name, weight in merged_weights(self.model):
            yield from revert_weight_conversion(self.model, {name: weight}).items()


class Merged:
    """Merged weights of a policy, one at a time, as often as they are iterated."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return merged_weights(self._model)
