"""Rules of the LoRA keys: what would do nothing, and what an adapter alone cannot be sent to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatlearn.config.schema import GrpoConfig

_SECTION = "models.policy_trainer"
_RANK = f"{_SECTION}.lora_rank"
_PUBLISH = f"{_SECTION}.lora_publish"


def lora_conflicts(cfg: GrpoConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """The fields of a ``rules.Conflict``, for each."""
    trainer = cfg.models.policy_trainer
    if trainer.lora_rank == 0:
        yield from _idle(cfg)
        return
    if trainer.lora_target_modules == ():
        yield (
            (f"{_SECTION}.lora_target_modules",),
            f"{_SECTION}.lora_target_modules = [] with {_RANK} = {trainer.lora_rank}: nothing "
            "would be trained; name layers, or set it to all-linear",
        )
    if trainer.lora_publish == "adapter":
        yield from _adapter(cfg)


def _idle(cfg: GrpoConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Without a rank nothing else of LoRA acts."""
    trainer = cfg.models.policy_trainer
    fields = type(trainer).model_fields
    for name in ("lora_alpha", "lora_target_modules", "lora_publish"):
        value = getattr(trainer, name)
        if value != fields[name].default:
            yield (
                (f"{_SECTION}.{name}", _RANK),
                f"{_SECTION}.{name} = {_shown(value)} does nothing with {_RANK} = 0; set a rank, "
                f"16 for instance, or leave {name} out",
            )


def _adapter(cfg: GrpoConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """``lora_publish=adapter``: the engines keep the base that they were started with."""
    way = cfg.models.policy.publish
    if way not in ("auto", "disk"):
        yield (
            (_PUBLISH, "models.policy.publish"),
            f"{_PUBLISH} = adapter with models.policy.publish = {way}: adapters are files that the "
            "engines read; set models.policy.publish to auto or disk",
        )
    run = cfg.runtime_args
    reasons = {
        "rollout_backend": (
            run.rollout_backend == "embedded",
            "that engine samples from the trainer's own adapters and needs none sent",
        ),
        "colocation": (
            cfg.is_colocated,
            "an engine that slept has lost all its weights, not the adapters alone",
        ),
        "max_staleness": (
            run.max_staleness > 0,
            "SGLang replaces an adapter only when no request runs with it",
        ),
    }
    for name, (is_refused, why) in reasons.items():
        if is_refused:
            key = f"runtime_args.{name}"
            yield (
                (_PUBLISH, key),
                f"{_PUBLISH} = adapter with {key} = {_shown(getattr(run, name))}: {why}; set "
                f"{_PUBLISH}=merged",
            )


def _shown(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else f"{value}"
