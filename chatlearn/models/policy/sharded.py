"""A causal LM in shards: built without memory, cut over the ranks, and read row by row.

``fully_shard`` (FSDP2) cuts every parameter along its first dimension. The model is built with its
parameters on the meta device; then each rank reads only its own rows of the safetensors files, so
nobody ever holds the whole model. Where the files do not say it as plainly as that (GGUF, .bin,
mixtures of experts that transformers stores otherwise than it computes), rank 0 loads the model as
``load_policy`` would and sends every parameter round.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.modeling_layers import GradientCheckpointingLayer

from chatlearn.errors import TrainerError
from chatlearn.models.policy.attention import Plan
from chatlearn.models.policy.loading import load_policy, require_causal, source
from chatlearn.models.policy.lora import Lora, base_parameters, initialise, inject
from chatlearn.models.policy.optimizer import local
from chatlearn.models.policy.ranks import World
from chatlearn.models.policy.token_logprobs import PolicyForward, TokenLogprobs

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

_log = logging.getLogger(__name__)


class Root(nn.Module):
    """What FSDP sees as the whole: calls anything while embedding, norm and head are gathered.

    The head is used at chosen positions only, outside the model's own ``forward``, so the hooks
    that gather its weights (and those of tied embeddings) must surround more than the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


class ShardedForward:
    """``PolicyForward`` of a model in shards; see there for the arguments."""

    def __init__(self, root: Root, forward: PolicyForward) -> None:
        self.root = root
        self.model = forward.model
        self.body = forward.body
        self.planner = forward.planner
        self._forward = forward

    def __call__(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segments: Plan,
        predictors: torch.Tensor,
        chosen: torch.Tensor,
        *,
        temperature: float | torch.Tensor,
        entropy: bool = False,
    ) -> TokenLogprobs:
        inputs = (token_ids, position_ids, segments, predictors, chosen)
        scored = self.root(
            partial(self._forward, *inputs, temperature=temperature, entropy=entropy)
        )
        if not torch.is_grad_enabled():
            reshard(self.root)
        return scored

    def check(self, packed: AbstractContextManager[None]) -> str:
        with torch.no_grad():
            refusal = self.root(partial(self._forward.check, packed))
        reshard(self.root)
        return refusal


def reshard(root: Root) -> None:
    """Let go of embedding, norm and head, which FSDP keeps gathered for a backward that may never
    come: the next forward would see them as they were."""
    assert isinstance(root, FSDPModule)
    root.reshard()


def load_sharded(
    path: str | Path,
    *,
    mesh: DeviceMesh,
    device: torch.device,
    ranks: World,
    dtype: torch.dtype,
    compute: torch.dtype,
    trust_remote_code: bool = False,
    lora: Lora | None = None,
) -> Root:
    """Load a causal LM in shards over all ranks, every weight from the file, none invented.

    Args:
        path: see ``load_policy``.
        mesh: one dimension, all ranks.
        device: of this rank.
        dtype: shards are held in.
        compute: gathered parameters and activations; gradients are reduced in fp32.
        lora: put adapters into it, in fp32, and freeze the rest.

    Raises:
        TrainerError: as ``load_policy``, and of ``lora`` as ``inject``; every rank raises the same.
    """
    with ranks.together():
        model = _skeleton(path, dtype, trust_remote_code)
        if lora is not None:
            inject(model, lora)
    root = _shard(Root(model), mesh, compute)
    kept = {name: buffer.clone() for name, buffer in root.named_buffers()}
    root.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in root.named_buffers():
            buffer.copy_(kept[name])
    with ranks.together():
        files = _files(path, model)
    if ranks.first("no" if files is None else None) is None and files is not None:
        with ranks.together():
            _read_own_rows(files, model, ranks)
    else:
        _log.info("%s cannot be read in shards: rank 0 loads it whole and sends it round.", path)
        _receive(path, model, device, ranks, trust_remote_code)
    if lora is not None:
        initialise(
            model,
            lora.seed,
            lambda parameter, value: local(parameter).copy_(value[_rows(parameter, ranks)]),
        )
    model.eval()
    return root


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made in the block have parameters without memory, and real buffers.

    ``torch.device("meta")`` would empty the buffers too, and those that no file has (the
    frequencies of rotary embeddings) would have to be invented again.
    """

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _skeleton(path: str | Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model of ``path`` without weights. Raises TrainerError."""
    where, options = source(path)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
        require_causal(config, path)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation="sdpa",
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ValueError, ImportError) as error:
        raise TrainerError(f"{path} cannot be loaded as a causal LM: {error}") from error
    with suppress(OSError):  # no such file: the one that the model's own config made stays
        model.generation_config = GenerationConfig.from_pretrained(where)
    return model


def _shard(root: Root, mesh: DeviceMesh, compute: torch.dtype) -> Root:
    """Cut every layer's parameters, then what is left, over the ranks of ``mesh``."""
    policy = MixedPrecisionPolicy()
    if any(parameter.dtype != compute for parameter in root.parameters()):
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    layers = [m for m in root.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        name = type(root.model).__name__
        _log.warning("%s has no layers that are known: it is gathered whole in every pass.", name)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # a sum, as the denominator is global already; and gloo cannot average
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root


def persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The buffers that belong to a checkpoint; most models have none."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _files(path: str | Path, model: PreTrainedModel) -> dict[str, Path] | None:
    """Which safetensors file has each parameter, or None where they do not have all of them under
    its own name and in its own shape. Raises TrainerError for a damaged file."""
    folder = _folder(path)
    if folder is None or getattr(model.config, "quantization_config", None) is not None:
        return None
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(conversion, WeightConverter) for conversion in conversions):
        return None
    try:
        if (folder / _INDEX).is_file():
            found = json.loads((folder / _INDEX).read_text())["weight_map"]
            held = {name: folder / file for name, file in found.items()}
        elif (folder / _SINGLE).is_file():
            with safe_open(folder / _SINGLE, framework="pt") as file:
                held = dict.fromkeys(file.keys(), folder / _SINGLE)
        else:
            return None
        wanted = base_parameters(model) | persistent_buffers(model)
        if not wanted.keys() <= held.keys():
            return None
        files = {name: held[name] for name in wanted}
        for file, names in _by_file(files).items():
            with safe_open(file, framework="pt") as opened:
                for name in names:
                    if opened.get_slice(name).get_shape() != list(wanted[name].shape):
                        return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainerError(f"The weights in {folder} cannot be read: {error}") from error
    return files


def _folder(path: str | Path) -> Path | None:
    """Where the files of ``path`` are on this machine; of a hub id, fetched if need be."""
    where, options = source(path)
    if "gguf_file" in options:
        return None
    if Path(where).is_dir():
        return Path(where)
    try:
        return Path(snapshot_download(where, allow_patterns=["*.safetensors", _INDEX]))
    except (OSError, ValueError):
        return None  # from_pretrained has its own ways, and its own words


def _by_file(files: Mapping[str, Path]) -> dict[Path, list[str]]:
    found: dict[Path, list[str]] = {}
    for name, file in files.items():
        found.setdefault(file, []).append(name)
    return found


def _rows(parameter: torch.Tensor, ranks: World) -> slice:
    """The rows of a whole parameter that this rank has: FSDP cuts as ``torch.chunk`` does."""
    total = parameter.shape[0]
    each = -(-total // ranks.size)
    start = min(ranks.rank * each, total)
    rows = slice(start, min(start + each, total))
    assert local(parameter).shape[0] == rows.stop - rows.start, "FSDP cuts otherwise than thought"
    return rows


@torch.no_grad()
def _read_own_rows(files: Mapping[str, Path], model: PreTrainedModel, ranks: World) -> None:
    """Fill this rank's shards. Raises TrainerError for a damaged file."""
    parameters, buffers = base_parameters(model), persistent_buffers(model)
    for file, names in _by_file(files).items():
        try:
            with safe_open(file, framework="pt") as opened:
                for name in names:
                    if name in buffers:
                        buffers[name].copy_(opened.get_tensor(name))
                        continue
                    rows = _rows(parameters[name], ranks)
                    if rows.stop > rows.start:
                        local(parameters[name]).copy_(opened.get_slice(name)[rows])
        except (OSError, SafetensorError) as error:
            raise TrainerError(f"{file} cannot be read: {error}") from error


@torch.no_grad()
def _receive(
    path: str | Path,
    model: PreTrainedModel,
    device: torch.device,
    ranks: World,
    trust_remote_code: bool,
) -> None:
    """Fill this rank's shards from a whole model on rank 0, one parameter at a time."""
    whole: dict[str, torch.Tensor] = {}
    own = base_parameters(model) | persistent_buffers(model)
    with ranks.together():
        if ranks.rank == 0:
            loaded = load_policy(path, precision="fp32", trust_remote_code=trust_remote_code)
            whole = dict(loaded.named_parameters()) | persistent_buffers(loaded)
            odd = sorted(whole.keys() ^ own.keys())
            if odd:
                raise TrainerError(
                    f"{path} cannot be trained in shards: its weights do not become the parameters "
                    f"of {type(model).__name__}, {odd[0]!r} for one. Save it as plain safetensors."
                )
    parameters = base_parameters(model)
    for name, target in own.items():
        full = torch.empty(target.shape, dtype=torch.float32, device=device)
        if ranks.rank == 0:
            full.copy_(whole.pop(name))
        dist.broadcast(full, src=0)
        if name in parameters:
            local(target).copy_(full[_rows(target, ranks)])
        else:
            target.copy_(full)
