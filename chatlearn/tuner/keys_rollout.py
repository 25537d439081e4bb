"""Keys of the project, its workflow and judge, its rows and how it samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatlearn.tuner.keys import (
    BadValue,
    Key,
    Put,
    acts,
    below,
    flag,
    names,
    number,
    only,
    said,
    text,
    whole,
    word,
)

_POLICY, _TRAINER = "models.policy", "models.policy_trainer"
_MADNESS = {
    "non_ascii": "it takes every script but Latin, and π and √, for nonsense; use nonsense",
    "format_type_1": "it knows one prompt's format; write a check of your own: file.py->name",
}
_JUDGE_MODEL = (
    "the judge's model is an auxiliary model; give it in chatlearn.runtime_args.auxiliary_models"
)
_ONE_ROW = "there are no rows to cap: every sampled token is trained once, however calls are cut"
_SHAPED = "shape the reward in your judge"


def _checks(value: Any) -> Mapping[str, Any]:
    for name in names(value):
        if name in _MADNESS:
            raise BadValue(f"{name} is refused: {_MADNESS[name]}")
    return {"checks": names(value)}


def _greedy(value: Any) -> Mapping[str, Any]:
    return {} if flag(value) else {f"{_POLICY}.eval_temperature": 0.0}


def _auto(key: str, automatic: str) -> Put:
    return lambda value: {} if value == automatic else {key: text(value)}


_reader, _val = below("reader", text), f"{_POLICY}.eval_"

PROJECT: tuple[Key, ...] = (
    acts("project_name", "runtime_args.exp_name"),
    acts(
        "experiment_name",
        "runtime_args.exp_name",
        "wins over project_name; read_yaml_name is the name of the YAML",
        put=word("experiment", text),
    ),
    acts(
        "experiment_dir",
        "runtime_args.output_dir",
        "auto is outputs/",
        put=_auto("runtime_args.output_dir", "auto"),
    ),
    said("backbone", "--backbone says it"),
    acts("model.path", f"{_TRAINER}.load"),
    # data
    acts(
        "data.train_batch_size",
        "runtime_args.sample_per_episode",
        "tasks a step; ours counts rollouts: tasks × rollout.num_repeat",
        put=word("tasks_per_batch", whole),
    ),
    acts("data.max_prompt_length", f"{_POLICY}.max_prompt_tokens_length"),
    acts(
        "data.max_response_length",
        f"{_POLICY}.max_response_tokens_length",
        "sampled tokens of a whole run",
    ),
)

WORKFLOW: tuple[Key, ...] = (
    acts("rollout.user_workflow", "the workflow", put=word("workflow", text)),
    acts(
        "rollout.agentscope_workflow",
        "the workflow",
        "older name of rollout.user_workflow",
        put=word("workflow", text),
    ),
    acts(
        "rollout.agentscope_learn_protocol",
        "the workflow",
        "oldest name of rollout.user_workflow",
        put=word("workflow", text),
    ),
    only("rollout.use_agentscope_protocol", True, "there is no built-in loop; name a workflow"),
    acts(
        "rollout.force_disable_toolcalls",
        f"{_POLICY}.tool_parser",
        "true is none: calls are not read",
        put=lambda value: {f"{_POLICY}.tool_parser": "none"} if flag(value) else {},
    ),
    acts(
        "rollout.agentscope_disable_toolcalls",
        f"{_POLICY}.tool_parser",
        "true is none: calls are not read",
        put=lambda value: {f"{_POLICY}.tool_parser": "none"} if flag(value) else {},
    ),
    acts("task_judge.judge_protocol", "the judge", put=word("judge", text)),
    only(
        "task_judge.judge_type",
        "customized_protocol",
        "rubrics are not learned here; name a judge in task_judge.judge_protocol",
    ),
    said("task_judge.alien_llm_model", _JUDGE_MODEL),
    said("task_judge.alien_llm_response_length", _JUDGE_MODEL),
    said("task_judge.rubrics_auto_grader.*", "matters only with judge_type: rubrics_auto_grader"),
)

READER: tuple[Key, ...] = (
    acts("task_reader.type", "the rows", put=_reader("type")),
    acts(
        "task_reader.huggingface_dat_repo.dataset_path",
        "the rows",
        "a folder, or a hub id with or without a subset",
        put=_reader("hub"),
    ),
    acts(
        "task_reader.huggingface_dat_repo.dataset_name",
        "the rows",
        "the subset",
        put=_reader("subset"),
    ),
    acts(
        "task_reader.huggingface_dat_repo.training_split",
        "the rows",
        put=_reader("hub_train"),
    ),
    acts(
        "task_reader.huggingface_dat_repo.validation_split",
        "the evaluation rows",
        put=_reader("hub_eval"),
    ),
    *(
        acts(f"task_reader.{block}.{split}.file_path", what, put=_reader(f"file_{short}"))
        for block in ("jsonl_dataset_file", "dataset_file")
        for split, short, what in (
            ("training", "train", "the rows"),
            ("validation", "eval", "the evaluation rows"),
        )
    ),
    acts("task_reader.env_service.env_url", "the rows", put=_reader("env")),
    acts("task_reader.env_service.training_split", "the rows", put=_reader("env_train")),
    acts(
        "task_reader.env_service.validation_split",
        "the evaluation rows",
        put=_reader("env_eval"),
    ),
    said("task_reader.env_service.env_type", "a service has one kind of environment"),
    said("task_reader.env_service.env_action_preference", "the workflow says how it acts"),
    acts(
        "task_reader.fields",
        "the rows",
        "ours: {query: column, ground_truth: column}, where columns are not known by name",
        put=lambda value: {"fields": value},
    ),
    said("task_reader.data_generation.*", "matters only with type: data_generation"),
    said("task_reader.feedback_tracing.*", "matters only with type: feedback_tracing"),
)

ROLLOUT: tuple[Key, ...] = (
    acts("rollout.num_repeat", f"{_POLICY}.num_inference_per_prompt", "the group size"),
    acts("rollout.temperature", f"{_POLICY}.temperature"),
    acts("rollout.top_p", f"{_POLICY}.top_p"),
    acts("rollout.top_k", f"{_POLICY}.top_k"),
    acts("rollout.max_env_worker", "runtime_args.max_concurrent_rollouts", "agent runs at once"),
    acts(
        "rollout.max_response_length_in_one_turn",
        f"{_POLICY}.max_tokens_per_turn",
        "sampled tokens of one call",
    ),
    acts("rollout.max_model_len", f"{_POLICY}.max_seq_len", "longest context of any call"),
    acts("rollout.max_num_seqs", f"{_POLICY}.max_concurrent_requests", "of each engine"),
    acts(
        "rollout.tensor_model_parallel_size",
        f"{_POLICY}.tensor_model_parallel_size",
        "on --backbone=ray",
        put=word("parallel", whole),
    ),
    acts(
        "rollout.n_vllm_engine",
        f"{_POLICY}.num_gpu",
        "engines × tensor_model_parallel_size, on --backbone=ray; the trainer has the other GPUs",
        put=word("engines", whole),
    ),
    acts("rollout.gpu_memory_utilization", f"{_POLICY}.gpu_memory_utilization"),
    said("rollout.name", "the engine is SGLang on a cluster, and inside the process locally"),
    said("rollout.mode", "agents always run asynchronously"),
    acts(
        "rollout.compute_madness_checklist",
        "runtime_args.checks",
        "what is checked in what the model says",
        put=_checks,
    ),
    acts(
        "rollout.agent_madness_reward",
        "runtime_args.checks",
        "the reward of a run that a check finds; -1 where it is not given",
        put=word("check_reward", number),
    ),
    acts(
        "rollout.agent_madness_termination",
        "runtime_args.checks",
        "true: such a run ends there",
        put=word("check_ends", flag),
    ),
    only("rollout.gamma", 1.0, f"set chatlearn.{_TRAINER}.turn_discount"),
    said("rollout.multi_turn.max_sample_per_task", _ONE_ROW),
    said("rollout.multi_turn.expected_steps", _ONE_ROW),
    said("rollout.multi_turn.max_steps", "the workflow ends its own loop (max_iters)"),
    said("rollout.multi_turn.enable", "a workflow makes as many calls as it likes"),
    said("rollout.max_env_len", "what an environment says is bounded by rollout.max_model_len"),
    acts(
        "rollout.enable_oversample",
        "runtime_args.replace_zero_signal_groups",
        "groups of one reward are sampled anew",
    ),
    said("rollout.submit_oversample_multiplier", "no more is sampled than is trained"),
    said("rollout.step_skip_action", "the workflow decides when it calls the model"),
    only("rollout.use_step_reward_from_env", False, _SHAPED),
    only("rollout.binary_reward", False, _SHAPED),
    only("rollout.add_special_success_reward", False, _SHAPED),
    acts(
        "rollout.force_think",
        f"{_POLICY}.enable_thinking",
        put=lambda value: {f"{_POLICY}.enable_thinking": True} if flag(value) else {},
    ),
    acts(
        "rollout.force_no_think",
        f"{_POLICY}.enable_thinking",
        put=lambda value: {f"{_POLICY}.enable_thinking": False} if flag(value) else {},
    ),
    acts("rollout.val_kwargs.temperature", f"{_val}temperature"),
    acts("rollout.val_kwargs.top_p", f"{_val}top_p"),
    acts("rollout.val_kwargs.top_k", f"{_val}top_k"),
    acts(
        "rollout.val_kwargs.do_sample",
        f"{_val}temperature",
        "false is temperature 0",
        put=_greedy,
    ),
    acts(
        "rollout.val_kwargs.num_repeat",
        f"{_val}num_inference_per_prompt",
        "trainer_common.val_pass_n wins",
        put=word("eval_repeat", whole),
    ),
)
