"""ChatLearn's keys that do not exist here, each with what to do instead."""

from __future__ import annotations

from fnmatch import fnmatchcase

_RUN_FOLDER = "everything a run writes is in its run folder; set runtime_args.output_dir"
_PLACEMENT = "placement follows from runtime_args.cluster and the num_gpu keys; leave it out"
_PACKING = "rows are always packed, by tokens; set models.policy_trainer.max_token_in_packing"
_PENALTY = "a penalty makes the sampled distribution differ from the trained one; leave it out"
_LEDGER = "the prompt ledger in every checkpoint knows this; leave it out"
_MEMORY = "the trainer and the engine hand memory to each other by themselves; leave it out"
_MEGATRON = "there is no Megatron trainer; leave it out"

NOT_HERE: dict[str, str] = {
    # runtime_args
    "runtime_args.use_partial_rollout": "asynchrony is one number: set runtime_args.max_staleness",
    "runtime_args.concurrent_setup": _PLACEMENT,
    "runtime_args.cpu_schedule_strategy": _PLACEMENT,
    "runtime_args.policy_to_regroup_queue": _PLACEMENT,
    "runtime_args.bucket_size_mb_in_memory_manager": _MEMORY,
    "runtime_args.debug": "set the level of Python's logging instead",
    "runtime_args.nsys": "start the run under your profiler instead",
    "runtime_args.profiler_dir": "start the run under your profiler instead",
    "runtime_args.data_checkpoint_path": _RUN_FOLDER,
    "runtime_args.train_micro_batch_size": _PACKING,
    "runtime_args.num_inference_per_prompt": (
        "the group size has one key; set models.policy.num_inference_per_prompt"
    ),
    "runtime_args.data_ratio": "the files of data_path make one dataset; mix them beforehand",
    "runtime_args.max_replay_episode": (
        "old samples are not replayed; set runtime_args.num_training_epoch for more passes over "
        "the fresh ones"
    ),
    "runtime_args.replay_episode_offset": "old samples are not replayed; leave it out",
    "runtime_args.consumed_samples": _LEDGER,
    "runtime_args.max_data_ckpt_nums": (
        "data and model share a checkpoint; set runtime_args.max_checkpoints"
    ),
    "runtime_args.load_data_checkpoint_iteration": _LEDGER,
    "runtime_args.stream_data_loader_type": "there is one prompt stream; leave it out",
    "runtime_args.model_type": "only text models are trained; leave it out",
    "runtime_args.log_args_dict.log_dir": _RUN_FOLDER,
    "runtime_args.log_args_dict.tensorboard_dir": _RUN_FOLDER,
    "env_args.working_dir": "set runtime_args.working_dir",
    "env_args.*": "the run uses the Python environment it is started in; leave the section out",
    # models that are not models here
    "models.reward.*": "rewards run beside the agent that earned them; leave the section out",
    "models.rollout_manager.max_concurrent_per_engine": (
        "set models.policy.max_concurrent_requests"
    ),
    "models.rollout_manager.use_dynamic_load_*": (
        "a group goes to the engine with the least to do, and stays there; leave it out"
    ),
    "models.partial_rollout_manager.*": (
        "asynchrony is one number: set runtime_args.max_staleness; leave the section out"
    ),
    # models: keys that ChatLearn repeats in every model
    "models.ref_policy.num_cpu": _PLACEMENT,
    "models.*.gpu_per_process": _PLACEMENT,
    "models.ref_policy.cpu_per_process": _PLACEMENT,
    "models.*.replica_dp_size": _PLACEMENT,
    "models.*.num_replica": _PLACEMENT,
    "models.*.trainable": "the policy is trained and the reference never is; leave it out",
    "models.policy.packing": _PACKING,
    "models.ref_policy.packing": _PACKING,
    "models.*.train_micro_batch_size": _PACKING,
    "models.policy.max_token_in_packing": _PACKING,
    "models.ref_policy.max_token_in_packing": _PACKING,
    "models.*.generation_batch_size": (
        "requests are batched as they arrive; set models.policy.max_concurrent_requests"
    ),
    "models.*.sync_frequency": "new weights are published after every episode; leave it out",
    "models.policy.free_gpu_memory*": _MEMORY,
    "models.*.seed": "the run has one seed; set runtime_args.seed",
    # models.policy
    "models.policy.trust_remote_code": "set models.policy_trainer.trust_remote_code",
    "models.ref_policy.trust_remote_code": "set models.policy_trainer.trust_remote_code",
    "models.policy.pipeline_model_parallel_size": "engines are not split this way; leave it out",
    "models.policy.expert_model_parallel_size": "engines are not split this way; leave it out",
    "models.policy.*presence_penalty": _PENALTY,
    "models.policy.*frequency_penalty": _PENALTY,
    "models.policy.*repetition_penalty": _PENALTY,
    "models.policy.vllm_*": "there is no vLLM engine; leave it out",
    "models.policy.max_num_batched_tokens": (
        "the engine decides; set models.policy.max_concurrent_requests"
    ),
    "models.policy.max_seq_len_to_capture": "it is derived; set models.policy.max_seq_len",
    "models.policy.seq_length": "it is derived; set models.policy.max_seq_len",
    "models.policy.enable_stage_resume": _LEDGER,
    # models.policy_trainer
    "models.policy_trainer.diff_clip_ratio": "log ratios are not clamped; leave it out",
    "models.policy_trainer.final_clip_ratio": "set models.policy_trainer.dual_clip_ratio",
    "models.policy_trainer.use_group_sequence_policy": "set models.policy_trainer.loss=gspo",
    "models.policy_trainer.fsdp_size": "it is models.policy_trainer.num_gpu; set that",
    "models.*.ulysses_sequence_parallel_size": "sequences are not split over GPUs; leave it out",
    "models.*.meta_init": "weights are always loaded straight from the files; leave it out",
    "models.*.groupgemm": "experts run as the model's own code does; leave it out",
    "models.*.use_expandable_segments": "set PYTORCH_CUDA_ALLOC_CONF in the environment instead",
    "models.policy_trainer.save_hf": "every checkpoint has an hf/ folder; leave it out",
    "models.*.sequence_parallel": _MEGATRON,
    "models.*.use_distributed_optimizer": _MEGATRON,
    "models.*.model_provider_module": _MEGATRON,
    "models.*.recompute_*": "set models.policy_trainer.gradient_checkpointing instead",
    "models.*.bf16": "set models.policy_trainer.precision instead",
}
"""Dotted key (``*`` matches anything; the first match counts) to what to do instead, in one
sentence."""


def reason_not_here(key: str) -> str | None:
    """What to do instead of ``key``, or None when it is no key of ChatLearn either."""
    if key in NOT_HERE:
        return NOT_HERE[key]
    return next((why for pattern, why in NOT_HERE.items() if fnmatchcase(key, pattern)), None)
