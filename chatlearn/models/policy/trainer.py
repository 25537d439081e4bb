"""The trainer of one process: micro-batches in, one optimizer update, metrics out.

The step itself is in ``step.py``. The embedded engine samples from the very module that is trained:
parameters are written in place and never replaced, dropout is never on, and the attention of the
module is as the engine left it outside a step. No method yields to the event loop half-way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from chatlearn.errors import TrainerError
from chatlearn.interfaces import Weights
from chatlearn.models.policy.attention_kernels import find_planner
from chatlearn.models.policy.checkpoint import load_state, save_hf, save_state
from chatlearn.models.policy.optimizer import dtype_of
from chatlearn.models.policy.ranks import Alone
from chatlearn.models.policy.settings import TrainerSettings
from chatlearn.models.policy.step import BaseTrainer
from chatlearn.models.policy.token_logprobs import PolicyForward

__all__ = ["PolicyTrainer", "TrainerSettings"]


class PolicyTrainer(BaseTrainer):
    """Implements ``interfaces.Trainer`` in one process, on a CPU or one GPU.

    Args:
        model: a causal LM in the dtype of ``settings.precision``; updated in place.
        tokenizer: written beside the model in ``save``; may be None.
        settings: see ``TrainerSettings``.
        reference: a frozen model of the same vocabulary; needed only where ``kl_coef`` > 0.

    Raises:
        TrainerError: the settings or the model cannot be trained; see ``PolicyForward.check``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any | None,
        settings: TrainerSettings,
        *,
        reference: PreTrainedModel | None = None,
    ) -> None:
        if settings.kl_coef > 0 and reference is None:
            raise TrainerError("kl_coef is above 0 but no reference model was given.")
        held = next(model.parameters())
        if held.dtype != dtype_of(settings.precision):
            raise TrainerError(
                f"precision is {settings.precision!r}, but the model is held in {held.dtype}. "
                f"Load it with load_policy(..., precision={settings.precision!r})."
            )
        self.tokenizer = tokenizer
        planner = find_planner(settings.attention, held.device, held.dtype, model.config)
        frozen = None
        if reference is not None and settings.kl_coef > 0:
            frozen = PolicyForward(reference.eval().requires_grad_(False), planner)
        super().__init__(
            PolicyForward(model.eval(), planner),
            settings,
            reference=frozen,
            ranks=Alone(),
            device=held.device,
        )

    async def weights(self) -> Weights:
        """The parameters themselves under their Hugging Face names; tied ones once, first name."""
        return {name: tensor.detach() for name, tensor in self.model.named_parameters()}.items()

    async def save(self, folder: Path) -> None:
        """Write ``folder/hf`` (loads with ``from_pretrained``) and ``folder/state``.

        ``state`` has the fp32 masters, the moments of AdamW, the number of updates and torch's
        random states. Raises CheckpointError.
        """
        save_hf(folder / "hf", self.model, self.tokenizer)
        save_state(folder / "state", self._optimizer.state(), self.updates)

    async def restore(self, folder: Path) -> None:
        """Continue from what ``save`` wrote, to the same bits. Raises CheckpointError."""
        own = {n: t for n, t in self._optimizer.state().items() if n.startswith("master.")}
        tensors, self.updates = load_state(folder / "state", own)
        self._optimizer.load(tensors)
