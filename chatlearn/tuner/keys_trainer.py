"""Keys of the trainer, of debugging, and of the engines' own sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatlearn.tuner.keys import (
    BadValue,
    Key,
    acts,
    flag,
    names,
    number,
    only,
    refused,
    said,
    whole,
    word,
)

PRACTICALLY_OFF = 99999
"""What their tutorials write for never, and for no end."""

_POLICY, _TRAINER = "models.policy", "models.policy_trainer"
_OPTIMIZER = f"{_TRAINER}.optimizer"
_KL = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
_ESTIMATORS = {
    "grpo": "grpo",
    "multi_step_grpo": "grpo",
    "rloo": "rloo",
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
    "gigpo": "gigpo",
}
_CONTEXT = "histories are token-exact trees (docs/langgraph.md), with nothing to choose"
_VERL = "options of verl have no meaning here; set ours in the chatlearn: section (docs/config.md)"


def _interval(key: str) -> Any:
    """Every n steps; negative and 99999 are off, which is 0."""

    def put(value: Any) -> Mapping[str, Any]:
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadValue("must be a whole number of steps")
        return {key: value if 0 < value < PRACTICALLY_OFF else 0}

    return put


def _one_of(key: str, known: Mapping[str, str]) -> Any:
    def put(value: Any) -> Mapping[str, Any]:
        if value not in known:
            raise BadValue(f"is not known here; known: {', '.join(known)}")
        return {key: known[value]}

    return put


def _betas(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise BadValue("must be a list of two numbers")
    return {f"{_OPTIMIZER}.adam_beta1": value[0], f"{_OPTIMIZER}.adam_beta2": value[1]}


def _warmup(value: Any) -> Mapping[str, Any]:
    return {} if value == -1 else {f"{_OPTIMIZER}.warmup_steps": value}


def _loggers(value: Any) -> Mapping[str, Any]:
    given = {value} if isinstance(value, str) else set(names(value))
    log = "runtime_args.log_args_dict"
    return {f"{log}.enable_wandb": True} if "wandb" in given else {}


def _endless(value: Any) -> Mapping[str, Any]:
    return {} if value in (None, -1) else {"runtime_args.num_episode": whole(value)}


_LOG = "metrics are in the run folder and in TensorBoard; wandb is sent to as well"
TRAINER: tuple[Key, ...] = (
    acts(
        "trainer_common.save_freq",
        "runtime_args.save_episode_interval",
        "99999 and below 1: only at the end",
        put=_interval("runtime_args.save_episode_interval"),
    ),
    acts(
        "trainer_common.test_freq",
        "runtime_args.eval_episode_interval",
        "99999 and below 1: never",
        put=_interval("runtime_args.eval_episode_interval"),
    ),
    acts(
        "trainer_common.total_epochs",
        "runtime_args.num_episode",
        "epochs × tasks / data.train_batch_size, rounded up",
        put=word("epochs", whole),
    ),
    acts(
        "trainer_common.total_training_steps",
        "runtime_args.num_episode",
        "wins over total_epochs",
        put=_endless,
    ),
    acts("trainer_common.val_before_train", "runtime_args.enable_eval_before_training"),
    acts("trainer_common.val_pass_n", f"{_POLICY}.eval_num_inference_per_prompt"),
    only("trainer_common.val_only", False, "evaluate in a run: trainer_common.val_before_train"),
    said("trainer_common.val_max_num_task_each_validation", "every evaluation row is run"),
    said("trainer_common.val_max_num_task_clip_method", "every evaluation row is run"),
    said("trainer_common.val_print_to_markdown_file_path", "runs are in rollouts/*.jsonl"),
    said("trainer_common.train_print_to_markdown_file_path", "runs are in rollouts/*.jsonl"),
    said("trainer_common.save_trajectory_as_json_file", "runs are always in rollouts/*.jsonl"),
    said("trainer_common.checkpoint_base_dir", "checkpoints are in the run folder"),
    acts(
        "trainer_common.trinity_only__n_vllm_engine",
        f"{_POLICY}.num_gpu",
        "older place of rollout.n_vllm_engine",
        put=word("engines", whole),
    ),
    acts(
        "trainer_common.nnodes",
        "models.*.num_gpu",
        "× n_gpus_per_node: GPUs in all, on --backbone=ray",
        put=word("nodes", whole),
    ),
    acts(
        "trainer_common.n_gpus_per_node",
        "models.*.num_gpu",
        "8 where it is not given",
        put=word("gpus", whole),
    ),
    acts("trainer_common.logger", "runtime_args.log_args_dict", _LOG, put=_loggers),
    acts(
        "trainer_common.algorithm.adv_estimator",
        f"{_TRAINER}.advantage",
        put=_one_of(f"{_TRAINER}.advantage", _ESTIMATORS),
    ),
    only(
        "trainer_common.algorithm.use_kl_in_reward",
        False,
        f"the KL is in the loss: {_TRAINER}.kl_coef",
    ),
    only("trainer_common.algorithm.task_norm_patch", False, "advantages are of the group"),
    acts(
        "trainer_common.mini_batch_num",
        "runtime_args.train_global_batch_size",
        "optimizer steps of a batch; ours is the rollouts of one step",
        put=word("steps", whole),
    ),
    acts("trainer_common.ppo_epochs", "runtime_args.num_training_epoch"),
    acts("trainer_common.fsdp_config.param_offload", f"{_TRAINER}.free_gpu_memory.offload_weights"),
    acts(
        "trainer_common.fsdp_config.optimizer_offload",
        f"{_TRAINER}.free_gpu_memory.offload_optimizer_states",
    ),
    acts("trainer_common.optim.lr", f"{_OPTIMIZER}.lr"),
    acts("trainer_common.optim.weight_decay", f"{_OPTIMIZER}.weight_decay"),
    acts("trainer_common.optim.betas", f"{_OPTIMIZER}.adam_beta1, adam_beta2", put=_betas),
    acts("trainer_common.optim.grad_clip", f"{_OPTIMIZER}.clip_grad"),
    acts("trainer_common.optim.lr_warmup_steps", f"{_OPTIMIZER}.warmup_steps", put=_warmup),
    acts("trainer_common.optim.lr_scheduler_type", f"{_OPTIMIZER}.lr_schedule"),
    only("trainer_common.optim.optimizer", "AdamW", "there is AdamW"),
    said("trainer_common.optim.optimizer_impl", "AdamW is PyTorch's"),
    only("trainer_common.optim.lr_warmup_steps_ratio", 0.0, "give optim.lr_warmup_steps"),
    only("trainer_common.optim.min_lr_ratio", 0.0, f"set chatlearn.{_OPTIMIZER}.min_lr"),
    said("trainer_common.optim.total_training_steps", "it follows from the episodes"),
    only("trainer_common.optim.num_cycles", 0.5, "the cosine falls once"),
    said("trainer_common.optim.zero_indexed_step", "the schedule counts steps from 1"),
    acts(
        "trainer_common.use_kl_loss",
        f"{_TRAINER}.kl_coef",
        "false is 0",
        put=word("uses_kl", flag),
    ),
    acts("trainer_common.kl_loss_coef", f"{_TRAINER}.kl_coef", put=word("kl_coef", number)),
    acts(
        "trainer_common.kl_loss_type",
        f"{_TRAINER}.kl_estimator",
        put=_one_of("kl_estimator", _KL),
    ),
    only("trainer_common.loss_extra_scale_ratio", 1.0, "raise trainer_common.optim.lr instead"),
    said("trainer_common.ulysses_sequence_parallel_size", "sequences are not split over GPUs"),
    acts("lora.lora_rank", f"{_TRAINER}.lora_rank", "0 is none", put=word("lora_rank", int)),
    acts("lora.lora_alpha", f"{_TRAINER}.lora_alpha", put=word("lora_alpha", number)),
    acts(
        "lora.target_modules",
        f"{_TRAINER}.lora_target_modules",
        put=lambda value: {"lora_target_modules": value},
    ),
    said("lora.load_format", "weights are always loaded from the files"),
    said("lora.layered_summon", "the merged weights are published one at a time"),
)

REST: tuple[Key, ...] = (
    acts(
        "debug.debug_first_n_tasks",
        "--tasks",
        "of --backbone=debug",
        put=word("debug_tasks", whole),
    ),
    acts(
        "debug.debug_max_parallel",
        "runtime_args.max_concurrent_rollouts",
        "of --backbone=debug, which runs one at a time where it is not given",
        put=word("debug_parallel", whole),
    ),
    said("debug.debug_vllm_port", "debugging starts no server"),
    said("debug.debug_vllm_seed", "the seed is runtime_args.seed"),
    said("debug.debug_tensor_parallel_size", "debugging samples inside the process"),
    said("context_tracker.*", _CONTEXT),
    said("context_manager.*", _CONTEXT),
    said("task_runner.wrapper_type", "agents are tasks of one event loop"),
    said("task_runner.llm_infer_submit_method", "agents are tasks of one event loop"),
    acts("task_runner.wrapper_multiprocessing_timeout", "runtime_args.agent_timeout_s"),
    only("enable_swarm_mode", False, "runs are not fed from outside"),
    only("enable_tinkerscript_mode", False, "runs are not fed from outside"),
    said("enable_interchange_server", "as_oai_baseurl_apikey() always works"),
    said("enable_experimental_interchange_server", "as_oai_baseurl_apikey() always works"),
    said("enable_experimental_reverse_proxy", "as_oai_baseurl_apikey() always works"),
    said("interchange_server.*", "as_oai_baseurl_apikey() always works"),
    said("swarm_mode_*", "runs are not fed from outside"),
    said("execute_test", "it was for their own tests"),
    said("execute_testing_lambda", "it was for their own tests"),
)

_packing, _rollout_model = f"{_TRAINER}.max_token_in_packing", "trinity.explorer.rollout_model"
PASS_THROUGH: tuple[Key, ...] = (
    acts("trinity.trainer.max_token_len_per_gpu", _packing, "tokens of a micro-batch"),
    acts(
        "trinity.trainer.save_interval",
        "runtime_args.save_episode_interval",
        put=_interval("runtime_args.save_episode_interval"),
    ),
    acts("trinity.trainer.grad_clip", f"{_OPTIMIZER}.clip_grad"),
    said("trinity.trainer.use_dynamic_bsz", "micro-batches are always filled by tokens"),
    said("trinity.trainer.ulysses_sequence_parallel_size", "sequences are not split over GPUs"),
    acts(
        "trinity.algorithm.algorithm_type",
        f"{_TRAINER}.advantage",
        put=_one_of(f"{_TRAINER}.advantage", _ESTIMATORS),
    ),
    acts("trinity.algorithm.optimizer.lr", f"{_OPTIMIZER}.lr"),
    acts("trinity.algorithm.repeat_times", f"{_POLICY}.num_inference_per_prompt"),
    acts(
        "trinity.buffer.batch_size",
        "runtime_args.sample_per_episode",
        "tasks a step",
        put=word("tasks_per_batch", whole),
    ),
    acts("trinity.buffer.total_epochs", "runtime_args.num_episode", put=word("epochs", whole)),
    said("trinity.buffer.*", "rows come from task_reader, and rollouts wait in no buffer"),
    acts(
        "trinity.explorer.eval_interval",
        "runtime_args.eval_episode_interval",
        put=_interval("runtime_args.eval_episode_interval"),
    ),
    acts("trinity.explorer.max_timeout", "runtime_args.agent_timeout_s", "seconds of one run"),
    acts(f"{_rollout_model}.engine_num", f"{_POLICY}.num_gpu", put=word("engines", whole)),
    acts(
        f"{_rollout_model}.tensor_parallel_size",
        f"{_POLICY}.tensor_model_parallel_size",
        put=word("parallel", whole),
    ),
    acts(f"{_rollout_model}.seed", "runtime_args.seed"),
    acts(f"{_rollout_model}.enable_thinking", f"{_POLICY}.enable_thinking"),
    acts(f"{_rollout_model}.enforce_eager", f"{_POLICY}.enforce_eager"),
    acts(f"{_rollout_model}.tool_call_parser", f"{_POLICY}.tool_parser"),
    said("trinity.explorer.*", "options of Trinity's explorer: the engines here are SGLang's"),
    acts("trinity.model.model_path", f"{_TRAINER}.load"),
    acts("trinity.model.max_model_len", f"{_POLICY}.max_seq_len"),
    acts("trinity.model.max_response_tokens", f"{_POLICY}.max_response_tokens_length"),
    acts("trinity.model.max_prompt_tokens", f"{_POLICY}.max_prompt_tokens_length"),
    acts("trinity.cluster.node_num", "models.*.num_gpu", put=word("nodes", whole)),
    acts("trinity.cluster.gpu_per_node", "models.*.num_gpu", put=word("gpus", whole)),
    said("trinity.synchronizer.*", "weights are published after every step (max_staleness)"),
    said("trinity.monitor.*", "metrics are in the run folder and in TensorBoard"),
    said("trinity.checkpoint_root_dir", "checkpoints are in the run folder"),
    refused("actor_rollout_ref.*", _VERL),
    refused("algorithm.*", _VERL),
    refused("critic.*", _VERL),
    refused("trainer.*", _VERL),
)
