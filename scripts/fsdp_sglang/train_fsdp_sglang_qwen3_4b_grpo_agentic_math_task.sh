#!/usr/bin/env bash
# Qwen3-4B learns MATH as an agent that checks its answers: GRPO, SGLang, FSDP2, one machine of 4 or 8 GPUs.
# Model and data: docs/tutorial.md. Settings: template/grpo_fsdp.yaml, then these, then yours (key=value).
# --dry-run only says what it would do, on any machine.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../base_env.sh" || exit 1

python chatlearn/entrypoint.py grpo --config-file template/grpo_fsdp.yaml \
    runtime_args.task_type=agent \
    runtime_args.rollout_backend=sglang \
    runtime_args.use_rollout_manager=True \
    models.policy.is_sync_mode=False \
    models.policy.num_gpu="$num_device" \
    models.policy_trainer.num_gpu="$num_device" \
    models.policy_trainer.load=pretrained_models/Qwen3-4B \
    runtime_args.exp_name=qwen3_4b_grpo_agentic_math \
    runtime_args.data_path=dataset/MATH-lighteval/train_agent.json \
    runtime_args.eval_data_path=dataset/MATH-lighteval/test_agent.json \
    runtime_args.eval_episode_interval=5 \
    "$@" 2>&1 | tee -ai "$log_file"
exit "${PIPESTATUS[0]}"
