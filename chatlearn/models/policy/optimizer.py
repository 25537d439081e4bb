"""AdamW on the policy's parameters in place, with fp32 masters where those are bf16."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from chatlearn.errors import TrainerError

_SCHEDULES = ("constant", "linear", "cosine")
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dtype_of(precision: str) -> torch.dtype:
    """The dtype parameters are held in. Raises TrainerError for an unknown word."""
    if precision not in _PRECISIONS:
        raise TrainerError(f"precision is {precision!r}; it must be one of {list(_PRECISIONS)}")
    return _PRECISIONS[precision]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate of each optimizer step.

    Rises linearly to ``lr`` over ``warmup_steps``, then stays (``constant``) or falls to
    ``min_lr`` at ``total_steps`` along a line or half a cosine; after that it stays at ``min_lr``.
    """

    lr: float
    min_lr: float = 0.0
    kind: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _SCHEDULES:
            raise TrainerError(f"lr_schedule is {self.kind!r}; it must be one of {_SCHEDULES}")
        if self.kind != "constant" and self.total_steps <= self.warmup_steps:
            raise TrainerError(
                f"lr_schedule {self.kind!r} needs total_steps ({self.total_steps}) above "
                f"warmup_steps ({self.warmup_steps})"
            )

    def at(self, step: int) -> float:
        """The rate of update number ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        left = 1.0 - done if self.kind == "linear" else (1.0 + cos(pi * done)) / 2
        return self.min_lr + (self.lr - self.min_lr) * left


class PolicyOptimizer:
    """Owns masters, moments and gradients; the parameters are written in place, never replaced.

    Parameters in fp32 are their own masters. Parameters in bf16 have fp32 masters: gradients of
    micro-batches are summed in fp32, AdamW moves the masters, and the parameters become their
    rounding. Without masters an update below 1/256 of a weight is lost to rounding.

    Of a sharded parameter (a ``DTensor``, in fp32) the master is this rank's shard itself, in the
    same memory, so everything here is about ordinary tensors; norms are of this rank's part.

    Args:
        model: its trainable parameters are updated, each once however often it is tied.
        weight_decay: of matrices; norms and biases (fewer than two dimensions) have none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise TrainerError("The policy has no trainable parameter: all of them are frozen.")
        self.names = list(named)
        self.parameters = list(named.values())
        self.masters = [_master(p) for p in self.parameters]
        matrices = [m for m in self.masters if m.dim() >= 2]
        vectors = [m for m in self.masters if m.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        fused = self.parameters[0].device.type in ("cpu", "cuda")
        groups = [group for group in groups if group["params"]]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)

    def accumulate(self) -> None:
        """Add the gradients of a micro-batch to those of the step."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is master or parameter.grad is None:
                continue
            gradient = local(parameter.grad)
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad.add_(gradient)
            parameter.grad = None

    def gradient_norm(self) -> torch.Tensor:
        """L2 norm of the gradients of the step, a scalar on the device, without a sync."""
        return torch.nn.utils.get_total_norm(
            [m.grad for m in self.masters if m.grad is not None], foreach=True
        )

    def clip(self, limit: float, norm: torch.Tensor) -> None:
        """Scale the gradients, of L2 norm ``norm``, to one of at most ``limit``; 0 leaves them."""
        if limit > 0:
            torch.nn.utils.clip_grads_with_norm_(self.masters, limit, norm, foreach=True)

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """One AdamW update at rate ``lr``; the gradients are gone after it."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.publish()
        self.discard()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master and not isinstance(parameter, DTensor):
                parameter.copy_(master)

    def discard(self) -> None:
        """Forget the gradients."""
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def non_finite_gradients(self) -> list[str]:
        """Names of the parameters whose gradient of this step is not finite; syncs the device."""
        pairs = zip(self.names, self.masters, strict=True)
        return [n for n, m in pairs if m.grad is not None and not m.grad.isfinite().all()]

    def moments(self) -> list[torch.Tensor]:
        """Running means of the gradients and their squares; none before the first update."""
        keys = ("exp_avg", "exp_avg_sq")
        return [state[key] for state in self.adamw.state.values() for key in keys if key in state]

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments, named ``master.{name}``, ``exp_avg.{name}``, ``exp_avg_sq.{name}``
        and ``step.{name}``; a parameter that was never updated has no moments."""
        tensors = {}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"master.{name}"] = master.detach()
            moments = self.adamw.state.get(master, {})
            tensors |= {f"{key}.{name}": value for key, value in moments.items()}
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what ``state`` returned; the names and shapes were checked before."""
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(tensors[f"master.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            moments = {k: tensors[f"{k}.{name}"] for k in keys if f"{k}.{name}" in tensors}
            self.adamw.state.pop(master, None)
            if moments:
                self.adamw.state[master] = {k: v.to(master.device) for k, v in moments.items()}
        self.publish()
        self.discard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of ``tensor``, in the same memory; ``tensor`` itself where it has none."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def _master(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.dtype == torch.float32:
        return local(parameter)
    return parameter.detach().to(torch.float32, copy=True)
