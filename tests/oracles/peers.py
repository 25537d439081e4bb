"""Runs beside verl and TRL, not in the tests' own process: numbers in on stdin, theirs on stdout.

Input: ``{"rollout": [B][T], "policy": …, "reference": …, "mask": …, "advantages": [B], "rewards":
[B], "groups": [B]}``. Output: by name, advantages ``[B]``, or a loss with its gradient in the
policy's logprobs, or weights ``[B][T]``.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos as verl
from verl.trainer.ppo.rollout_corr_helper import (
    compute_rollout_correction_weights,
    compute_rollout_rejection_mask,
)
from verl.workers.config import FSDPActorConfig

LOW, HIGH, DUAL, HORIZON = 0.2, 0.3, 1.7, 11


def main() -> None:
    data = json.load(sys.stdin)
    batch = SimpleNamespace(
        **{k: torch.tensor(v, dtype=torch.float64) for k, v in data.items() if k != "groups"}
    )
    found = {
        **advantages(batch, np.array(data["groups"])),
        **verl_losses(batch),
        **trl_losses(batch),
        **kl(batch),
        **corrections(batch),
    }
    json.dump(found, sys.stdout)


def advantages(batch, groups):
    rewards, mask = batch.rewards[:, None].clone(), torch.ones(len(groups), 1).double()
    asked = {
        "grpo": lambda: verl.compute_grpo_outcome_advantage(rewards, mask, groups),
        "dr_grpo": lambda: verl.compute_grpo_outcome_advantage(
            rewards, mask, groups, norm_adv_by_std_in_grpo=False
        ),
        "rloo": lambda: verl.compute_rloo_outcome_advantage(rewards, mask, groups),
        "reinforce_pp": lambda: verl.compute_reinforce_plus_plus_outcome_advantage(
            rewards, mask, AlgoConfig(gamma=1.0)
        ),
        "reinforce_pp_baseline": lambda: (
            verl.compute_reinforce_plus_plus_baseline_outcome_advantage(rewards, mask, groups)
        ),
    }
    return {f"verl/{name}": call()[0][:, 0].tolist() for name, call in asked.items()}


def with_gradient(batch, loss_of):
    policy = batch.policy.clone().requires_grad_()
    loss = loss_of(policy)
    loss.backward()
    return {"loss": loss.item(), "gradient": policy.grad.tolist()}


def verl_losses(batch):
    advantage = batch.advantages[:, None].expand_as(batch.mask)

    def config(dual):
        return FSDPActorConfig(
            strategy="fsdp",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio_low=LOW,
            clip_ratio_high=HIGH,
            clip_ratio_c=dual,
            tau_pos=1.0,
            tau_neg=1.05,
        )

    def of(name, aggregation, dual=1e9):
        def loss(policy):
            settings = config(dual)
            if aggregation == "seq-mean-token-sum-norm":
                settings.global_batch_info["loss_scale_factor"] = HORIZON
            call = verl.get_policy_loss_fn(name)
            return call(batch.rollout, policy, advantage, batch.mask, aggregation, settings)[0]

        return with_gradient(batch, loss)

    found = {}
    modes = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
    for mode in modes:
        found |= {f"verl/clip/{mode}": of("vanilla", mode), f"verl/gspo/{mode}": of("gspo", mode)}
        found[f"verl/dual/{mode}"] = of("vanilla", mode, DUAL)
        found[f"verl/cispo/{mode}"] = of("cispo", mode)
        found[f"verl/reinforce/{mode}"] = with_gradient(
            batch,
            lambda policy, mode=mode: verl.get_policy_loss_fn("gpg")(
                batch.rollout, policy, advantage, batch.mask, mode, reinforce_config(config, mode)
            )[0],
        )
    found["verl/sapo/seq-mean-token-mean"] = of("sapo", "seq-mean-token-mean")
    found["verl/gmpo/seq-mean-token-mean"] = of("geo_mean", "seq-mean-token-mean")
    return found


def reinforce_config(config, mode):
    settings = config(3.0)
    if mode == "seq-mean-token-sum-norm":
        settings.global_batch_info["loss_scale_factor"] = HORIZON
    return settings


def trl_losses(batch):
    """``GRPOTrainer._compute_loss`` itself, with everything but the arithmetic left out."""

    def of(kind, level="token", beta=0.0, high=HIGH):
        owner = SimpleNamespace(
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=level,
            beta=beta,
            loss_type=kind,
            epsilon_low=LOW,
            epsilon_high=high,
            use_vllm=False,
            model=SimpleNamespace(training=False),
            max_completion_length=HORIZON,
            _entropy_bonus_enabled=False,
            _metrics={"eval": defaultdict(list)},
            accelerator=SimpleNamespace(
                num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
            ),
            args=SimpleNamespace(
                delta=None,
                use_bias_correction_kl=False,
                sapo_temperature_pos=1.0,
                sapo_temperature_neg=1.05,
            ),
        )
        inputs = {
            "prompt_ids": torch.zeros(len(batch.mask), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(batch.mask), 1, dtype=torch.long),
            "completion_ids": torch.zeros_like(batch.mask, dtype=torch.long),
            "completion_mask": batch.mask,
            "advantages": batch.advantages,
            "old_per_token_logps": batch.rollout,
            "ref_per_token_logps": batch.reference,
            "num_items_in_batch": batch.mask.sum(),
        }

        def loss(policy):
            owner._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
                policy,
                torch.zeros_like(policy),
                None,
            )
            return GRPOTrainer._compute_loss(owner, None, inputs)

        return with_gradient(batch, loss)

    return {
        "trl/clip/seq-mean-token-mean": of("grpo"),
        "trl/clip/token-mean": of("dapo"),
        "trl/clip/seq-mean-token-sum-norm": of("dr_grpo"),
        "trl/clip/seq-mean-token-sum": of("luspo"),
        "trl/clip+kl/token-mean": of("dapo", beta=0.1),
        "trl/cispo/token-mean": of("cispo", high=1 + HIGH),
        "trl/sapo/seq-mean-token-mean": of("sapo"),
        "trl/gspo/seq-mean-token-mean": of("grpo", "sequence"),
    }


def kl(batch):
    return {
        f"verl/kl/{ours}": with_gradient(
            batch,
            lambda policy, theirs=theirs: (
                verl.kl_penalty(policy, batch.reference, theirs) * batch.mask
            ).sum(),
        )
        for ours, theirs in {"k1": "k1+", "k2": "k2", "k3": "k3"}.items()
    }


def corrections(batch):
    ratio, mask = batch.policy - batch.rollout, batch.mask

    def weights(level, threshold):
        return compute_rollout_correction_weights(ratio, mask, level, threshold)[0].tolist()

    def kept(option):
        # their bounds are of p_rollout / p
        bounds = f"{1 / 1.25!r}_{1 / 0.8!r}"
        return compute_rollout_rejection_mask(ratio, mask, option, bounds)[0].tolist()

    return {
        "verl/token-tis": weights("token", 1.25),
        "verl/sequence-tis": weights("sequence", 1.25),
        "verl/icepop": weights("token", "0.8_1.25"),
        "verl/token-mask": kept("token_k1"),
        "verl/sequence-mask": kept("seq_mean_k1"),
    }


if __name__ == "__main__":
    main()
