"""A model folder (Hugging Face, ModelScope, GGUF) or a hub id into a model and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from chatlearn.errors import TrainerError
from chatlearn.models.policy.optimizer import dtype_of

_KEY = "models.policy_trainer.load"
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def load_policy(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM, every weight from the file, none invented.

    Args:
        path: a folder, a ``.gguf`` file, a folder whose only weights are one, or a hub id.
            GGUF weights are unpacked to dense ones, so that they can be trained and saved.
        device: where the parameters go.
        precision: ``fp32`` or ``bf16``, the dtype parameters are held in.
        trust_remote_code: run code that the folder brings.

    Raises:
        TrainerError: there is no such folder, no config in it, no causal LM, or weights missing.
    """
    where, options = source(path)
    if "gguf_file" in options:
        options |= _dense_gguf()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype_of(precision),
            trust_remote_code=trust_remote_code,
            attn_implementation="sdpa",
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise TrainerError(f"{path} cannot be loaded as a causal LM: {error}") from error
    require_causal(model.config, path)
    missing = sorted(info["missing_keys"])
    if missing:
        raise TrainerError(
            f"{path} is not a whole {type(model).__name__}: {len(missing)} weights are missing, "
            f"{missing[0]!r} for one, and would be random. Set {_KEY} to a causal LM."
        )
    return model.to(device).eval()


def require_causal(config: PretrainedConfig, path: str | Path) -> None:
    """Refuse the config of a model that was made for something else than continuing text.

    Raises:
        TrainerError: its ``architectures`` say so; ``path``, where it came from, is named.
    """
    made_as = config.architectures or []
    if any("For" in name and not name.endswith(_CAUSAL) for name in made_as):
        raise TrainerError(
            f"{path} is a {', '.join(made_as)}, not a causal LM: it was not trained to continue "
            f"text. Set {_KEY} to a causal LM."
        )


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to ``path`` (see ``load_policy``).

    Raises:
        TrainerError: there is no such folder, or no tokenizer in it.
    """
    where, options = source(path)
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, ImportError) as error:
        raise TrainerError(f"{path} has no tokenizer that can be loaded: {error}") from error


def eos_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> frozenset[int]:
    """Every token that ends a turn: of the generation config (one or a list) and the tokenizer."""
    generation: Any = getattr(model, "generation_config", None)
    ids: Any = getattr(generation, "eos_token_id", None)
    found = {ids} if isinstance(ids, int) else set(ids or ())
    found.add(getattr(tokenizer, "eos_token_id", None))
    return frozenset(int(token) for token in found if token is not None)


def source(path: str | Path) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` is given for ``path``: a folder or hub id, and a GGUF file in it.

    Raises:
        TrainerError: there is no such folder, or no whole model in it.
    """
    here = Path(path).expanduser()
    if here.suffix == ".gguf" and here.is_file():
        return str(here.parent), {"gguf_file": here.name}
    if not here.is_dir():
        if _is_hub_id(str(path)):
            return str(path), {}
        raise TrainerError(f"{_KEY} is {path}, but there is no such folder or .gguf file.")
    if any(here.glob("*.safetensors")) or any(here.glob("pytorch_model*.bin")):
        if not (here / "config.json").is_file():
            raise TrainerError(f"{here} has weights but no config.json: it is not a whole model.")
        return str(here), {}
    packed = sorted(file.name for file in here.glob("*.gguf"))
    if len(packed) > 1:
        raise TrainerError(f"{here} has several .gguf files ({', '.join(packed)}): name the file.")
    if packed:
        return str(here), {"gguf_file": packed[0]}
    if not (here / "config.json").is_file():
        raise TrainerError(f"{here} has no config.json: it is not a model folder. Set {_KEY}.")
    return str(here), {}


def _is_hub_id(path: str) -> bool:
    """``name`` or ``owner/name``: neither absolute nor relative to a place."""
    return not path.startswith((".", "/", "~")) and path.count("/") <= 1 and ".gguf" not in path


def _dense_gguf() -> dict[str, Any]:
    """From transformers 5.20 or so GGUF weights stay packed (neither trainable nor savable) unless
    asked otherwise; before, they were always unpacked and there was no such setting."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
