"""What benchmarks of several sides have in common: turns in processes of their own, and the load.

Sides take turns, A B A B, so that a change of the machine's load does not favour one of them, and
each turn is a process that starts from nothing, so that none pays for what another imported.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # TRL's calls of transformers
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # shared cores: do not spin

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from chatlearn.types import Sample

Gradient = dict[str, torch.Tensor]
Result = TypeVar("Result")


def alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)`` in a process of its own that starts from nothing."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def loads() -> str:
    """The machine's load averages of 1, 5 and 15 minutes."""
    return "load " + " ".join(f"{load:.1f}" for load in os.getloadavg())


def median_and_best(seconds: Sequence[float]) -> str:
    """``1.234 (1.200)``"""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f})"


def random_qwen3(dtype: torch.dtype, *, seed: int = 0) -> PreTrainedModel:
    """A random Qwen3 of 3M parameters and 512 tokens."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).to(dtype).eval()


def keep(samples: Sequence[Sample], file: Path) -> None:
    """Write ``samples`` for another process of this benchmark."""
    file.write_bytes(pickle.dumps(list(samples)))


def kept(file: str | Path) -> list[Sample]:
    """What ``keep`` wrote."""
    return pickle.loads(Path(file).read_bytes())


def gradient_of(model: PreTrainedModel) -> tuple[Gradient, Callable[[], None]]:
    """A dict that is filled by backward passes, before anything is clipped; and its end.

    Gradients of several backward passes that add up are there as their sum.
    """
    found: Gradient = {}
    hooks = [
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: found.__setitem__(name, p.grad.clone())
        )
        for name, parameter in model.named_parameters()
    ]

    def end() -> None:
        for hook in hooks:
            hook.remove()

    return found, end


def apart(ours: Gradient, theirs: Gradient) -> float:
    """Norm of the difference of two gradients over the norm of the second."""
    if ours.keys() != theirs.keys():
        raise SystemExit(f"gradients of other parameters: {sorted(ours.keys() ^ theirs.keys())}")
    difference = torch.stack([(ours[key] - theirs[key]).norm() for key in ours]).norm()
    return float(difference / torch.stack([value.norm() for value in theirs.values()]).norm())


def padded(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """``samples`` as TRL's generation leaves them: prompts padded left, the rest right.

    Everything from the first trained token of a row on is its completion; tokens of tools in it
    are masked.
    """
    starts = [sample.loss_mask.index(True) for sample in samples]
    width = max(starts)
    length = max(len(s.token_ids) - start for s, start in zip(samples, starts, strict=True))

    def rectangle(rows: list[list[Any]], dtype: torch.dtype, *, left: bool) -> torch.Tensor:
        to = width if left else length
        gaps = [[0] * (to - len(row)) for row in rows]
        pairs = zip(rows, gaps, strict=True)
        return torch.tensor([gap + row if left else row + gap for row, gap in pairs], dtype=dtype)

    def completions(field: str, dtype: torch.dtype) -> torch.Tensor:
        pairs = zip(samples, starts, strict=True)
        return rectangle([getattr(s, field)[start:] for s, start in pairs], dtype, left=False)

    prompts = [s.token_ids[:start] for s, start in zip(samples, starts, strict=True)]
    answers = [s.token_ids[start:] for s, start in zip(samples, starts, strict=True)]
    tool_mask = completions("loss_mask", torch.long)
    return {
        "prompt_ids": rectangle(prompts, torch.long, left=True),
        "prompt_mask": rectangle([[1] * len(p) for p in prompts], torch.long, left=True),
        "completion_ids": completions("token_ids", torch.long),
        "completion_mask": rectangle([[1] * len(a) for a in answers], torch.long, left=False),
        "tool_mask": tool_mask,
        "old_per_token_logps": completions("rollout_logprobs", torch.float32),
        "advantages": torch.tensor(
            [s.advantages[start] for s, start in zip(samples, starts, strict=True)]
        ),
        "num_items_in_batch": tool_mask.sum(),
    }
