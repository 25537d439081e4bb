"""The configuration as each room wants it: plain settings, without the tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from chatlearn.config import GrpoConfig
from chatlearn.models.engine.sglang import SGLangEngine
from chatlearn.models.engine.sglang_server import ServerSettings
from chatlearn.models.policy.lora import Lora
from chatlearn.models.policy.trainer import TrainerSettings

_ADAPTER = "policy"
"""SGLang's name for the adapter that it samples with, whatever its version."""
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What ``all-linear`` is in the models that SGLang serves adapters of."""


def trainer_settings(cfg: GrpoConfig, precision: str) -> TrainerSettings:
    """How the policy is updated."""
    trainer = cfg.models.policy_trainer
    optimizer = trainer.optimizer
    return TrainerSettings(
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        clip_grad=optimizer.clip_grad,
        lr_schedule=optimizer.lr_schedule,
        warmup_steps=optimizer.warmup_steps,
        total_steps=cfg.total_steps,
        loss=trainer.loss,
        dual_clip_ratio=trainer.dual_clip_ratio,
        # of the proximal policy, it is in the samples already
        correction="none" if trainer.decoupled else trainer.correction,
        correction_low=trainer.correction_low,
        correction_high=trainer.correction_high,
        kl_coef=trainer.kl_coef,
        kl_estimator=trainer.kl_estimator,
        entropy_coef=trainer.entropy_coef,
        pos_clip_ratio=trainer.pos_clip_ratio,
        neg_clip_ratio=trainer.neg_clip_ratio,
        gradient_checkpointing=trainer.gradient_checkpointing,
        precision=precision,
        attention=trainer.attention,
        lora=_lora(cfg),
        tree_packing=trainer.tree_packing,
    )


def _lora(cfg: GrpoConfig) -> Lora | None:
    trainer = cfg.models.policy_trainer
    if not trainer.lora_rank:
        return None
    return Lora(
        rank=trainer.lora_rank,
        alpha=trainer.lora_alpha,
        target_modules=trainer.lora_target_modules,
        seed=cfg.runtime_args.seed,
    )


def server_settings(cfg: GrpoConfig, *, gpu_ids: tuple[int, ...] = ()) -> ServerSettings:
    """How an SGLang server is started."""
    policy = cfg.models.policy
    device = "cuda" if policy.num_gpu else "cpu"
    return ServerSettings(
        model_path=cfg.policy_path,
        python=policy.sglang_python or "",
        device=device,
        dtype=cfg.precision(device),
        context_length=cfg.max_context,
        max_running_requests=policy.max_concurrent_requests,
        gpu_ids=gpu_ids,
        tensor_parallel=policy.tensor_model_parallel_size,
        mem_fraction_static=policy.gpu_memory_utilization,
        trust_remote_code=cfg.models.policy_trainer.trust_remote_code,
        enforce_eager=policy.enforce_eager,
        memory_saver=cfg.is_colocated and device == "cuda",
        deterministic=policy.deterministic,
        rl_on_policy_target=policy.rl_on_policy_target,
        seed=cfg.runtime_args.seed,
        cpu_threads=policy.cpu_per_process,
        extra_args={**_adapter_args(cfg, device), **policy.sglang_args},
    )


def _adapter_args(cfg: GrpoConfig, device: str) -> dict[str, Any]:
    """Flags of a server that is sent adapters."""
    trainer = cfg.models.policy_trainer
    if trainer.lora_publish != "adapter":
        return {}
    targets = trainer.lora_target_modules
    names = [t.rpartition(".")[2] for t in targets] if isinstance(targets, tuple) else _LINEAR
    return {
        "enable_lora": True,
        "max_lora_rank": trainer.lora_rank,
        "lora_target_modules": sorted(set(names)),
        "max_loras_per_batch": 2,  # and the base alone, for requests that ask after its health
        "lora_backend": "torch_native" if device == "cpu" else None,
    }


class Vocabulary(NamedTuple):
    """What an engine's client must know of the policy's tokens."""

    size: int
    eos: frozenset[int]
    """Tokens that end a turn."""


def sglang_engines(
    cfg: GrpoConfig, urls: Sequence[str], vocabulary: Vocabulary
) -> list[SGLangEngine]:
    """Clients of the servers at ``urls``."""
    return [
        SGLangEngine(
            url,
            eos_token_ids=vocabulary.eos,
            vocab_size=vocabulary.size,
            max_context=cfg.max_context,
            deterministic=cfg.models.policy.deterministic,
            adapter=_ADAPTER if cfg.models.policy_trainer.lora_publish == "adapter" else None,
        )
        for url in urls
    ]
