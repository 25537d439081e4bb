"""Keys of two-file projects: what each becomes, what is answered for, what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from chatlearn.config.schema import keys as our_keys
from chatlearn.errors import ConfigError
from chatlearn.tuner.keys import find, nearest
from chatlearn.tuner.keys_table import KEYS, ROOTS, table
from chatlearn.tuner.project import Words, read_project

DOCS = Path(__file__).parents[2] / "docs"

# What the three generations' own default files and tutorials spell; the table knows every one.
THEIR_KEYS = """
project_name experiment_name experiment_dir backbone model.path data.max_prompt_length
data.max_response_length data.train_batch_size rollout.user_workflow rollout.agentscope_workflow
rollout.agentscope_learn_protocol rollout.use_agentscope_protocol rollout.force_disable_toolcalls
rollout.agentscope_disable_toolcalls rollout.max_env_worker rollout.gamma
rollout.compute_madness_checklist rollout.agent_madness_termination rollout.agent_madness_reward
rollout.max_response_length_in_one_turn rollout.max_model_len rollout.multi_turn.max_sample_per_task
rollout.multi_turn.max_steps rollout.multi_turn.expected_steps rollout.multi_turn.enable
rollout.tensor_model_parallel_size rollout.n_vllm_engine rollout.max_num_seqs rollout.name
rollout.gpu_memory_utilization rollout.num_repeat rollout.temperature rollout.top_p rollout.top_k
rollout.val_kwargs.temperature rollout.val_kwargs.top_k rollout.val_kwargs.top_p
rollout.val_kwargs.do_sample rollout.val_kwargs.num_repeat rollout.use_step_reward_from_env
rollout.binary_reward rollout.force_no_think rollout.force_think rollout.mode
rollout.add_special_success_reward rollout.max_env_len rollout.step_skip_action
rollout.submit_oversample_multiplier rollout.enable_oversample task_reader.type
task_reader.jsonl_dataset_file.training.file_path task_reader.dataset_file.validation.file_path
task_reader.env_service.env_type task_reader.env_service.env_url
task_reader.env_service.env_action_preference task_reader.env_service.training_split
task_reader.huggingface_dat_repo.dataset_path task_reader.huggingface_dat_repo.dataset_name
task_reader.huggingface_dat_repo.training_split task_reader.huggingface_dat_repo.validation_split
task_reader.data_generation.document_reader.languages task_judge.judge_type
task_judge.judge_protocol task_judge.alien_llm_model task_judge.alien_llm_response_length
task_judge.rubrics_auto_grader.model_name context_tracker.timeline_merging_policy.ignore_tools
context_manager.linear_think_cm.train_history_infer_token debug.debug_max_parallel
debug.debug_first_n_tasks debug.debug_vllm_port debug.debug_vllm_seed
debug.debug_tensor_parallel_size trainer_common.val_before_train trainer_common.val_pass_n
trainer_common.val_only trainer_common.save_freq trainer_common.test_freq
trainer_common.total_training_steps trainer_common.total_epochs trainer_common.nnodes
trainer_common.n_gpus_per_node trainer_common.logger trainer_common.algorithm.adv_estimator
trainer_common.algorithm.use_kl_in_reward trainer_common.algorithm.task_norm_patch
trainer_common.mini_batch_num trainer_common.fsdp_config.param_offload
trainer_common.fsdp_config.optimizer_offload trainer_common.optim.lr
trainer_common.optim.weight_decay trainer_common.optim.betas trainer_common.optim.grad_clip
trainer_common.use_kl_loss trainer_common.kl_loss_coef trainer_common.kl_loss_type
trainer_common.ppo_epochs trainer_common.loss_extra_scale_ratio
trainer_common.ulysses_sequence_parallel_size trainer_common.checkpoint_base_dir
trainer_common.save_trajectory_as_json_file trainer_common.trinity_only__n_vllm_engine
lora.lora_rank lora.lora_alpha lora.target_modules lora.load_format lora.layered_summon
enable_swarm_mode enable_interchange_server interchange_server.interchange_method
swarm_mode_sample_collection_method task_runner.wrapper_type execute_test execute_testing_lambda
trinity.trainer.max_token_len_per_gpu trinity.algorithm.optimizer.lr trinity.buffer.batch_size
trinity.explorer.rollout_model.engine_num trinity.explorer.runner_per_model
trinity.model.max_model_len trinity.synchronizer.sync_interval trinity.monitor.monitor_type
trinity.cluster.gpu_per_node trinity.checkpoint_root_dir task_reader.feedback_tracing.base_url
task_runner.llm_infer_submit_method enable_tinkerscript_mode enable_experimental_reverse_proxy
"""

SMALL = {
    "rollout": {"user_workflow": "workflow.py->W"},
    "model": {"path": "some/model"},
}


def project(tmp_path, tree, root="ajet", **roots):
    """Read a project of ``SMALL`` and ``tree``."""
    from chatlearn.config.yaml_file import dump_yaml

    merged = {key: {**SMALL.get(key, {}), **value} for key, value in {**SMALL, **tree}.items()}
    path = tmp_path / "p.yaml"
    path.write_text(dump_yaml({root: merged, **roots}))
    return read_project(path)


@pytest.mark.parametrize("name", THEIR_KEYS.split())
def test_every_key_of_the_three_generations_is_known(name):
    assert find(name, KEYS) is not None


def test_what_a_key_becomes_exists():
    known = our_keys()
    sections = {key.rpartition(".")[0] for key in known}
    for key in KEYS:
        for ours in re.findall(r"(?:runtime_args|models)\.[a-z0-9_.]+", key.ours):
            prefixes = [k for k in known if k.startswith(ours)]
            assert ours in known or ours in sections or prefixes, f"{key.name}: {ours}"
        if key.fate != "acts":
            assert key.note, f"{key.name} says nothing"


def test_no_key_is_in_the_table_twice():
    names = [key.name for key in KEYS]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("root", ROOTS)
def test_one_key_becomes_one_of_ours(tmp_path, root):
    read = project(tmp_path, {"rollout": {"temperature": 0.7, "num_repeat": 4}}, root)
    assert read.settings == {
        "models.policy.temperature": 0.7,
        "models.policy.num_inference_per_prompt": 4,
        "models.policy_trainer.load": "some/model",
    }
    assert read.origin["models.policy.temperature"] == f"{root}.rollout.temperature"


@pytest.mark.parametrize(
    "name", ["user_workflow", "agentscope_workflow", "agentscope_learn_protocol"]
)
def test_the_three_names_of_the_workflow(tmp_path, name):
    (tmp_path / "p.yaml").write_text(f"ajet: {{rollout: {{{name}: workflow.py->W}}}}")
    assert read_project(tmp_path / "p.yaml").words.workflow == "workflow.py->W"


ASTUNE = """\
astune:
    task_reader:
        type: huggingface_dat_repo # ✨✨✨✨ `env_service` or `dataset_file`
    rollout:
        use_agentscope_protocol: True
        agentscope_learn_protocol: tutorial.math_agent->ExampleMathLearn # ✨✨✨✨
    task_judge:
        judge_protocol: astune.task_judge.math_answer_as_judge->MathAnswerAndLlmAsJudge
    model:
        path: /mnt/models/Qwen2___5-14B-Instruct
"""


def test_the_oldest_generation_as_its_page_has_it(tmp_path):
    (tmp_path / "git-math-agentscope.yaml").write_text(ASTUNE)
    read = read_project(tmp_path / "git-math-agentscope.yaml")
    assert (read.root, read.said) == ("astune", ())
    assert read.words.workflow == "tutorial.math_agent->ExampleMathLearn"
    assert read.words.judge == "astune.task_judge.math_answer_as_judge->MathAnswerAndLlmAsJudge"
    assert read.settings == {
        "models.policy_trainer.load": "/mnt/models/Qwen2___5-14B-Instruct",
    }


def test_keys_that_are_null_are_as_if_left_out(tmp_path):
    read = project(tmp_path, {"task_judge": {"judge_protocol": None}, "rollout": {"top_p": None}})
    assert read.words.judge is None
    assert "models.policy.top_p" not in read.settings


def test_numbers_of_steps_that_mean_never(tmp_path):
    for never in (99999, -1, 0):
        read = project(tmp_path, {"trainer_common": {"save_freq": never, "test_freq": 20}})
        assert read.settings["runtime_args.save_episode_interval"] == 0
        assert read.settings["runtime_args.eval_episode_interval"] == 20


def test_keys_without_meaning_are_answered_for_once(tmp_path):
    read = project(
        tmp_path,
        {"rollout": {"multi_turn": {"max_sample_per_task": 4}}},
        hydra={"searchpath": ["file://ajet/default_config"]},
        defaults=["ajet_default", "_self_"],
    )
    assert read.said == (
        "hydra: where hydra finds defaults: ours are built in",
        "defaults: which defaults are merged: ours are built in",
        "ajet.rollout.multi_turn.max_sample_per_task = 4: there are no rows to cap: every sampled "
        "token is trained once, however calls are cut",
    )


def test_all_problems_at_once_each_with_its_remedy(tmp_path):
    tree = {
        "rollout": {"num_repaet": 4, "binary_reward": True, "agent_madness_reward": "no"},
        "trainer_common": {"total_epochs": 0, "algorithm": {"adv_estimator": "gae"}},
        "task_judge": {"judge_type": "rubrics_auto_grader"},
    }
    with pytest.raises(ConfigError) as refused:
        project(tmp_path, tree, actor_rollout_ref={"actor": {"a": 8, "b": 9}})
    message = str(refused.value)
    assert "7 problems" in message
    for line in (
        "ajet.rollout.num_repaet = 4: unknown key; did you mean `ajet.rollout.num_repeat`?",
        "ajet.rollout.binary_reward = true: is refused: shape the reward in your judge",
        'ajet.rollout.agent_madness_reward = "no": must be a number',
        "ajet.trainer_common.total_epochs = 0: must be a whole number above 0",
        'ajet.trainer_common.algorithm.adv_estimator = "gae": is not known here; known: grpo, ',
        "ajet.task_judge.judge_type",
        "actor_rollout_ref, with 2 keys: is refused: options of verl have no meaning here; set",
    ):
        assert line in message


def test_a_key_in_the_wrong_section_is_found():
    assert nearest("trainer_common.num_repeat", KEYS) == "rollout.num_repeat"
    assert nearest("rollout.temprature", KEYS) == "rollout.temperature"
    assert nearest("rollout.qqqq", KEYS) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("agentjet: {}", "has none of the roots ajet:, astuner:, astune: (it has agentjet)"),
        ("astuners: {}", "did you mean astuner:?"),
        ("ajet: {}\nastuner: {}", "has the roots ajet and astuner, which are names of one thing"),
        ("runtime_args: {seed: 1}", "run it with chatlearn grpo --config-file"),
        ("", "it has nothing"),
        ("ajet: 3", "ajet must be a section"),
        ("ajet: {}\ntrainity: {}", "unknown section; did you mean `trinity`?"),
    ],
)
def test_roots(tmp_path, text, says):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_project(tmp_path / "p.yaml")
    assert says in str(refused.value)


def test_two_keys_of_one_thing_must_agree_and_the_engines_section_gives_way(tmp_path):
    engines = {
        "rollout": {"n_vllm_engine": 2},
        "trainer_common": {"trinity_only__n_vllm_engine": 3},
    }
    with pytest.raises(ConfigError, match=r"ajet\.rollout\.n_vllm_engine = 2 says otherwise"):
        project(tmp_path, engines)

    read = project(
        tmp_path, {"data": {"train_batch_size": 32}}, trinity={"buffer": {"batch_size": 8}}
    )
    assert read.words.tasks_per_batch == 32
    assert read.said == (
        "trinity.buffer.batch_size: ajet.data.train_batch_size is the same thing here, and wins",
    )


def test_checks_of_theirs_that_are_wrong_are_refused_with_the_reason(tmp_path):
    with pytest.raises(ConfigError, match="non_ascii is refused: it takes every script but Latin"):
        project(tmp_path, {"rollout": {"compute_madness_checklist": ["nonsense", "non_ascii"]}})


def test_references_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_FOLDER", "/models")
    read = project(
        tmp_path,
        {
            "model": {"path": "${oc.env:MODEL_FOLDER}/qwen"},
            "rollout": {"max_num_seqs": "${ajet.rollout.max_env_worker}", "max_env_worker": 12},
        },
    )
    assert read.settings["models.policy_trainer.load"] == "/models/qwen"
    assert read.settings["models.policy.max_concurrent_requests"] == 12
    with pytest.raises(ConfigError, match="the environment variable NOT_THERE is not set"):
        project(tmp_path, {"model": {"path": "${oc.env:NOT_THERE}"}})
    with pytest.raises(ConfigError, match=r"refers to \$\{ajet.model.path\}, refers to itself"):
        project(tmp_path, {"model": {"path": "${ajet.model.path}"}})


def test_keys_of_theirs_on_the_command_line(tmp_path):
    project(tmp_path, {"rollout": {"num_repeat": 4}})
    read = read_project(
        tmp_path / "p.yaml", ["ajet.rollout.num_repeat=2", "ajet.data.train_batch_size=3"]
    )
    assert read.settings["models.policy.num_inference_per_prompt"] == 2
    assert read.words == Words(workflow="workflow.py->W", tasks_per_batch=3)
    with pytest.raises(ConfigError, match=r"the project's root is ajet; write ajet\.rollout\.num"):
        read_project(tmp_path / "p.yaml", ["astuner.rollout.num_repeat=2"])


def test_the_documented_table_is_the_table():
    page = (DOCS / "projects.md").read_text()
    assert table() in page


def test_reading_a_project_loads_no_torch(tmp_path):
    (tmp_path / "p.yaml").write_text("ajet: {rollout: {user_workflow: w.py->W}}")
    code = (
        "import sys; from chatlearn.tuner.project import read_project; read_project('p.yaml');"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
