"""LoRA: small trained matrices beside the frozen linear layers of the policy, through ``peft``.

    y = W x + (alpha / rank) B A x        A [rank, in] random, B [out, rank] zero at the start

(arXiv 2106.09685.) The adapters are injected into the module in place, so whatever else holds the
module, an embedded engine for one, computes with them too. The base is never written: a merged
weight is made for whoever asks and forgotten, and there is no merging back that could drift.

A parameter has two names: the module's own, in which ``peft`` shows (``q_proj.base_layer.weight``),
and that of the model's files (``q_proj.weight``), which everybody outside knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from math import isclose
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from chatlearn.errors import CheckpointError, TrainerError
from chatlearn.models.policy.checkpoint import REMEDY
from chatlearn.models.policy.optimizer import local
from chatlearn.models.policy.ranks import Ranks

ALL_LINEAR = "all-linear"
_RANK = "models.policy_trainer.lora_rank"
_TARGETS = "models.policy_trainer.lora_target_modules"
_ADAPTER = "default"
"""The name under which ``peft`` keeps the one adapter."""
_BASE = "lora.json"
_PREFIX = "base_model.model."
"""What the names in ``peft``'s files begin with."""


@dataclass(frozen=True, slots=True)
class Lora:
    """What is trained beside the frozen policy.

    There is no dropout: a policy gradient is of the distribution that was sampled from.

    Raises:
        TrainerError: a number below its least.
    """

    rank: int
    alpha: float = 32.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """``all-linear`` is every linear layer but the head; else names, or their last parts."""
    seed: int = 0
    """Of the matrices A."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise TrainerError(
                f"lora_rank is {self.rank} and lora_alpha is {self.alpha:g}; both must be above 0. "
                f"Set {_RANK} and models.policy_trainer.lora_alpha, or {_RANK}=0 for none."
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def inject(model: PreTrainedModel, lora: Lora) -> None:
    """Put adapters into ``model``, in place; afterwards only they ask for gradients.

    They are fp32 whatever the model is held in, and without values yet where the model's parameters
    are on the meta device; see ``initialise``.

    Raises:
        TrainerError: ``peft`` is not installed, or a target is no linear layer of the model.
    """
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise TrainerError(
            f"{_RANK} is {lora.rank}, and LoRA needs peft, which cannot be imported ({error}). "
            f"Install chatlearn[lora], or set {_RANK}=0 to train all parameters."
        ) from error
    targets = _targets(model, lora.target_modules)
    on_meta = next(model.parameters()).is_meta
    inject_adapter_in_model(
        _peft_config(lora, targets), model, adapter_name=_ADAPTER, low_cpu_mem_usage=on_meta
    )
    model.requires_grad_(False)
    for layer in _layers(model).values():
        for matrix in (layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]):
            matrix.to(torch.float32).requires_grad_(True)
    if not on_meta:
        initialise(model, lora.seed, lambda parameter, value: parameter.copy_(value))


@torch.no_grad()
def initialise(
    model: PreTrainedModel, seed: int, place: Callable[[nn.Parameter, torch.Tensor], Any]
) -> None:
    """Give every adapter its first values, the same for any number of ranks.

    Args:
        place: writes a whole value, made on the CPU, to a parameter or to this rank's part of it.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in _layers(model).values():
        first, second = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        bound = first.shape[1] ** -0.5  # of nn.Linear, and of peft
        place(first, torch.empty(first.shape).uniform_(-bound, bound, generator=generator))
        place(second, torch.zeros(second.shape))


def base_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that the model's files have, under their names there; a tied one once."""
    layers = _layers(model)
    renamed = {
        f"{name}.base_layer.{part}": f"{name}.{part}"
        for name, layer in layers.items()
        for part, _ in layer.base_layer.named_parameters()
    }
    added = {
        f"{name}.{matrix}.{_ADAPTER}.weight" for name in layers for matrix in ("lora_A", "lora_B")
    }
    return {
        renamed.get(name, name): parameter
        for name, parameter in model.named_parameters()
        if name not in added
    }


@torch.no_grad()
def merged_weights(
    model: PreTrainedModel, whole: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter as an engine without LoRA needs it, one at a time, under its file name.

    Args:
        whole: all of a parameter, of which this rank may hold a part. It is asked for every
            parameter, in the same order on every rank.

    Returns:
        Base parameters themselves, and ``W + scale B A`` of the adapted ones: computed in fp32,
        rounded once, to the dtype of W.
    """
    layers = _layers(model)
    for name, parameter in base_parameters(model).items():
        weight = whole(parameter)
        module, _, part = name.rpartition(".")
        if module in layers and part == "weight":
            first, second = _matrices(layers[module])
            update = whole(second) @ whole(first)
            scale = layers[module].scaling[_ADAPTER]
            weight = weight.float().add(update, alpha=scale).to(weight.dtype)
        yield name, weight


@torch.no_grad()
def adapter_weights(
    model: PreTrainedModel, whole: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
) -> Iterator[tuple[str, torch.Tensor]]:
    """The trained matrices under the names of ``peft``'s files; see ``merged_weights``."""
    for name, layer in _layers(model).items():
        for matrix, value in zip(("lora_A", "lora_B"), _matrices(layer), strict=True):
            yield f"{_PREFIX}{name}.{matrix}.weight", whole(value)


def save_adapter(
    folder: Path, weights: Mapping[str, torch.Tensor], model: PreTrainedModel, lora: Lora
) -> int:
    """Write ``weights`` so that ``PeftModel.from_pretrained(base, folder)`` loads them.

    Returns:
        Bytes of the weights.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    config = _peft_config(lora, _short(list(_layers(model)), model))
    config.inference_mode = True
    config.base_model_name_or_path = model.config._name_or_path or None
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot write the adapter to {folder}: {error}") from error
    return sum(tensor.nbytes for tensor in tensors.values())


@dataclass(frozen=True, slots=True)
class Base:
    """What trained adapters belong to, kept beside them: on anything else they mean nothing."""

    scale: float
    size: float
    """Sum of the magnitudes of the base's parameters."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, lora: Lora, ranks: Ranks) -> Base:
        """A collective: every rank sums what it holds."""
        parts = (local(parameter) for parameter in base_parameters(model).values())
        norms = (torch.linalg.vector_norm(part, 1, dtype=torch.float64) for part in parts)
        sizes = ranks.gather([sum(norm.item() for norm in norms)])
        return cls(lora.scale, sum(size for [size] in sizes))

    def write(self, folder: Path) -> None:
        """Raises CheckpointError."""
        try:
            (folder / _BASE).write_text(json.dumps(asdict(self)) + "\n")
        except OSError as error:
            raise CheckpointError(f"Cannot write {folder / _BASE}: {error}") from error

    def require(self, folder: Path) -> None:
        """Raise CheckpointError unless the adapters of ``folder`` belong to this."""
        path = folder / _BASE
        try:
            saved = Base(**json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{folder} was written without LoRA, and {_RANK} is above 0. {REMEDY}"
            ) from error
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}. {REMEDY}") from error
        if not isclose(saved.scale, self.scale):
            raise CheckpointError(
                f"The adapters in {folder} were trained with lora_alpha / lora_rank = "
                f"{saved.scale:g}, which is {self.scale:g} now. Set models.policy_trainer."
                "lora_alpha and lora_rank as they were."
            )
        if not isclose(saved.size, self.size, rel_tol=1e-9):
            raise CheckpointError(
                f"The adapters in {folder} were trained on another base: its parameters sum to "
                f"{saved.size:.10g} in magnitude, and these to {self.size:.10g}. Set "
                "models.policy_trainer.load and precision as they were."
            )


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """In the block ``model`` computes as its base does.

    Not by ``peft``'s own switch: that also turns off gradients, which FSDP asks for when it first
    gathers a parameter, and not again.
    """
    layers = _layers(model).values()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class BaseForward:
    """The forward of a policy without its adapters: the reference of a KL penalty, without a second
    model in memory. Has the methods of ``step.Forward``.

    Args:
        forward: of the policy.
    """

    def __init__(self, forward: Any) -> None:
        self.model, self.body, self.planner = forward.model, forward.body, forward.planner
        self._forward = forward

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        with without_adapters(self.model):
            return self._forward(*inputs, **options)

    def check(self, packed: AbstractContextManager[None]) -> Any:
        with without_adapters(self.model):
            return self._forward.check(packed)


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    """The adapted layers by name, in the order of the model; none without LoRA."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    }


def _matrices(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


def _targets(model: PreTrainedModel, wanted: str | tuple[str, ...]) -> list[str]:
    """The layers to adapt, by their whole names. Raises TrainerError."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = model.get_output_embeddings()
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    if wanted == ALL_LINEAR:
        found = [name for name, module in linear.items() if module is not head]
        if not found:
            raise TrainerError(
                f"{type(model).__name__} has no linear layer but its head, and {_TARGETS} is "
                f"{ALL_LINEAR}. Set {_RANK}=0 to train all parameters."
            )
        return found
    names = (wanted,) if isinstance(wanted, str) else wanted
    unknown = [t for t in names if not any(_is(name, t) for name in linear)]
    if unknown or not names:
        raise TrainerError(
            f"{_TARGETS} is {list(names)}, but {type(model).__name__} has no linear layer "
            f"{' or '.join(map(repr, unknown)) or 'of no name'}. It has {', '.join(kinds)}; set "
            f"some of them, or {ALL_LINEAR}."
        )
    found = [name for name in linear if any(_is(name, t) for t in names)]
    tables = model.get_input_embeddings()
    tied = [n for n in found if linear[n].weight is getattr(tables, "weight", None)]
    if tied:
        raise TrainerError(
            f"{_TARGETS} has {tied[0]!r}, whose weights are also the input embeddings of "
            f"{type(model).__name__}: merged, they would no longer be the same. Leave it out."
        )
    return found


def _is(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _short(names: list[str], model: PreTrainedModel) -> list[str]:
    """The last parts of ``names`` where those mean these layers and no others, else ``names``."""
    kinds = {name.rpartition(".")[2] for name in names}
    others = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".base_layer" not in name and ".lora_" not in name
    }
    if any(name.rpartition(".")[2] in kinds for name in others - set(names)):
        return sorted(names)
    return sorted(kinds)


def _peft_config(lora: Lora, targets: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
