"""Whether the weights in an engine are the trainer's: the hashes that SGLang's ``check_weights``
would give, computed from the Hugging Face tensors.

A CPU engine hashes each parameter with SHA-256, which can be repeated. A GPU engine uses a Triton
kernel of its own, and one split over GPUs hashes shards: of those, ``require_equal`` asks only that
engines which were sent the same weights agree.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from chatlearn.errors import EngineError
from chatlearn.interfaces import Weights

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""SGLang's parameter, and the ones it lays end to end in it."""
_PART = re.compile(r"(?<=\.)(q_proj|k_proj|v_proj|gate_proj|up_proj)(?=\.(?:weight|bias)$)")
_PADDED = re.compile(r"(^|\.)(embed_tokens|lm_head)\.weight$")
_VOCAB_MULTIPLE = 64


def expected_checksums(named: Weights, *, dtype: torch.dtype) -> dict[str, str]:
    """Hash of every parameter of a CPU engine without tensor parallelism, by SGLang's names."""
    found: dict[str, str] = {}
    waiting: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in named:
        tensor = tensor.detach().cpu()
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        part = _PART.search(name)
        if part is None:
            found[name] = _hash([_padded(tensor) if _PADDED.search(name) else tensor])
            continue
        fused, parts = next((f, p) for f, p in _FUSED.items() if part[1] in p)
        whole = name[: part.start()] + fused + name[part.end() :]
        waiting[whole][part[1]] = tensor.clone()
        if len(waiting[whole]) == len(parts):
            kept = waiting.pop(whole)
            found[whole] = _hash([kept[p] for p in parts])
    return found


def require_expected(expected: Mapping[str, str], found: Mapping[str, str], *, url: str) -> None:
    """Raise ``EngineError`` naming every parameter of the engine at ``url`` that differs."""
    common = expected.keys() & found.keys()
    if not common:
        raise EngineError(
            f"none of the {len(found)} parameters of {url} has a name that the trainer's would "
            "have there, so nothing can be compared; set models.policy.check_weights_interval=0"
        )
    wrong = sorted(name for name in common if expected[name] != found[name])
    if wrong:
        raise EngineError(
            f"{url} does not have the trainer's weights: {len(wrong)} of {len(common)} parameters "
            f"differ, {_some(wrong)}"
        )


def require_equal(by_url: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ``EngineError`` naming every parameter that not all engines have equally."""
    urls = sorted(by_url)
    for url in urls[1:]:
        first, other = by_url[urls[0]], by_url[url]
        wrong = sorted(n for n in first.keys() | other.keys() if first.get(n) != other.get(n))
        if wrong:
            raise EngineError(
                f"{urls[0]} and {url} were sent the same weights and have different ones: "
                f"{len(wrong)} of {len(first)} parameters, {_some(wrong)}"
            )


def _hash(tensors: Sequence[torch.Tensor]) -> str:
    """The first 64 bits of the SHA-256 of tensors that lie end to end, as 16 hex digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """SGLang rounds the vocabulary up and fills it with zeros. [V, H] -> [V', H]"""
    missing = -tensor.shape[0] % _VOCAB_MULTIPLE
    return torch.nn.functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
