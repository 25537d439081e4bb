"""The tree itself: frozen, documented, and refused where two keys contradict each other."""

from __future__ import annotations

import re

import pydantic
import pytest

from chatlearn.config import GrpoConfig, load_config
from chatlearn.config.manual import MANUAL, manual
from chatlearn.config.not_here import reason_not_here
from chatlearn.config.schema import keys, sections
from chatlearn.errors import ConfigError
from chatlearn.types import Budget, SamplingParams

REQUIRED = ["runtime_args.data_path=train.json", "models.policy_trainer.load=some/model"]


def load(*overrides: str) -> GrpoConfig:
    return load_config(None, [*REQUIRED, *overrides])


def test_the_two_required_keys() -> None:
    assert [key for key, field in keys().items() if field.is_required()] == [
        "runtime_args.data_path",
        "models.policy_trainer.load",
    ]


def test_nothing_can_be_written() -> None:
    config = load()
    for section, name in (
        (config, "models"),
        (config.runtime_args, "seed"),
        (config.models.policy_trainer.optimizer, "lr"),
        (config.runtime_args, "brand_new"),
    ):
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(section, name, 1)
    with pytest.raises(TypeError):
        config.models.policy.sglang_args["attention_backend"] = "fa3"
    assert hash(config) == hash(load())


def test_every_key_says_what_it_means_and_acts() -> None:
    for key, field in keys().items():
        assert field.description, key
        assert reason_not_here(key) is None, f"{key} is a key and is listed as none"
        if type(None) in getattr(field.annotation, "__args__", ()):
            assert "null" in field.description or "required with" in field.description, key
    for name, node in sections():
        assert node.__doc__, name


def test_the_manual_is_current() -> None:
    current = MANUAL.read_text(encoding="utf-8") == manual()
    assert current, "run: python -m chatlearn.config.manual --write"
    assert all(f"| `{key.rpartition('.')[2]}` |" in manual() for key in keys())


def test_the_manual_spells_every_type() -> None:
    """A value that cannot be null is never spelled as null, whatever its type."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \| ", manual(), re.M))
    assert rows["sglang_args"] == "`{name: value, …}`"
    assert rows["colocation"] == "list out of `policy`, `policy_trainer`, `ref_policy`"
    assert rows["import_modules"] == "list of text"
    assert rows["rl_on_policy_target"] == "`fsdp` or `null`"
    assert rows["gpu_memory_utilization"] == "number, > 0, ≤ 1"
    assert "`null`" not in rows.values()
    for section in ("models.policy_trainer.free_gpu_memory", "models.ref_policy.free_gpu_memory"):
        assert re.search(rf"## `{section}`\n\n.*\n\n\| key .*\n.*\n\| `offload_weights` ", manual())


def test_numbers_that_follow() -> None:
    config = load(
        "runtime_args.data_path='a.json, b.parquet'",
        "runtime_args.num_episode=10",
        "runtime_args.sample_per_episode=64",
        "runtime_args.train_global_batch_size=16",
        "runtime_args.num_training_epoch=2",
        "models.policy.num_inference_per_prompt=4",
    )
    run = config.runtime_args
    assert config.prompts_per_episode == 16
    assert run.rollouts_per_step == 16
    assert run.steps_per_episode == 8
    assert config.total_steps == 80
    assert run.data_files == ["a.json", "b.parquet"]
    assert run.eval_files == []
    assert load().runtime_args.rollouts_per_step == 64


def test_when_to_save_and_evaluate() -> None:
    def due(*overrides: str) -> tuple[list[int], list[int]]:
        config = load("runtime_args.num_episode=7", "runtime_args.eval_data_path=t", *overrides)
        episodes = range(1, 8)
        return (
            [e for e in episodes if config.saves_after(e)],
            [e for e in episodes if config.evaluates_after(e)],
        )

    three = "runtime_args.save_episode_interval=3", "runtime_args.eval_episode_interval=3"
    assert due(*three) == ([3, 6, 7], [3, 6, 7])
    assert due("runtime_args.save_episode_interval=0") == ([7], [])


def test_limits_that_are_not_set_follow_from_others() -> None:
    """prompt 1024 + response 2048; evaluation answers 1000 tokens longer than training."""
    config = load("models.policy.eval_max_response_tokens_length=3048")
    assert config.train_budget() == Budget(2048, 2048, 3072)
    assert config.eval_budget() == Budget(3048, 3048, 4072)


def test_limits_that_are_set() -> None:
    config = load(
        "models.policy.max_tokens_per_turn=500",
        "models.policy.max_seq_len=4000",
        "models.policy.eval_max_response_tokens_length=400",
    )
    assert config.train_budget() == Budget(500, 2048, 4000)
    assert config.eval_budget() == Budget(400, 400, 4000)
    config = load("models.policy.eval_max_tokens_per_turn=9", "models.policy.eval_max_seq_len=1999")
    assert config.eval_budget() == Budget(9, 2048, 1999)


def test_training_and_evaluation_sample_differently() -> None:
    config = load(
        "models.policy.top_k=7", "models.policy.eval_temperature=0", "runtime_args.seed=5"
    )
    assert config.train_sampling() == SamplingParams(1.0, 1.0, 7, 2048, (), 5)
    assert config.eval_sampling() == SamplingParams(0.0, 0.95, -1, 2048, (), 5)


def test_models_default_to_the_trainers() -> None:
    assert (load().policy_path, load().reference_path) == ("some/model", "some/model")
    assert load("models.ref_policy.load=other").reference_path == "other"


def test_precision_follows_the_device() -> None:
    assert (load().precision("cpu"), load().precision("cuda")) == ("fp32", "bf16")
    assert load("models.policy_trainer.precision=bf16").precision("cpu") == "bf16"


def test_what_chatlearn_users_write_is_accepted() -> None:
    """The tutorial's switches, and what the agentic launcher sets beside them."""
    load(
        "runtime_args.task_type=agent",
        "runtime_args.rollout_backend=sglang",
        "runtime_args.use_rollout_manager=True",
        "models.policy.is_sync_mode=False",
        "runtime_args.train_backend=fsdp",
        "runtime_args.data_rerank=False",
        "runtime_args.raw_chat=true",
        "models.policy_trainer.packing=True",
        "models.policy_trainer.free_gpu_memory.offload_weights=True",
        "models.policy_trainer.free_gpu_memory.free_grad_buffers=True",
        "models.policy_trainer.free_gpu_memory.offload_optimizer_states=True",
        "models.ref_policy.free_gpu_memory.offload_weights=True",
        "models.rollout_manager.num_cpu=1",
        "models.rollout_manager.cpu_per_process=1",
    )


ONE_GPU = [f"models.{name}.num_gpu=1" for name in ("policy", "policy_trainer", "ref_policy")]


def test_one_gpu_is_accepted() -> None:
    load(*ONE_GPU, "models.policy_trainer.kl_coef=0.1")
    load(*ONE_GPU[:2])


RAY = ["runtime_args.cluster=ray", "runtime_args.rollout_backend=sglang"]
GPUS = ["models.policy.num_gpu=4", "models.policy_trainer.num_gpu=4"]
COLOCATED = [*RAY, *GPUS, "runtime_args.colocation=[policy, policy_trainer, ref_policy]"]


def test_processes_that_follow() -> None:
    config = load(
        *RAY,
        *GPUS,
        "models.policy.tensor_model_parallel_size=2",
        "models.rollout_manager.num_cpu=8",
    )
    models = config.models
    assert (models.policy.num_engine, models.policy_trainer.num_rank) == (2, 4)
    assert models.rollout_manager.num_worker == 8
    models = load(
        *RAY,
        "models.policy.num_cpu=4",
        "models.policy.cpu_per_process=2",
        "models.policy_trainer.num_cpu=3",
    ).models
    assert (models.policy.num_engine, models.policy_trainer.num_rank) == (2, 3)


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        (RAY, "tensor"),
        ([*RAY, *GPUS], "collective"),
        (COLOCATED, "tensor"),
        ([*COLOCATED, "models.policy.publish=disk"], "disk"),
        ([*RAY, "models.policy.publish=collective"], "collective"),
    ],
)
def test_how_weights_are_published(overrides: list[str], method: str) -> None:
    assert load(*overrides).publish_method == method


CONTRADICTIONS = [
    (
        ["runtime_args.sample_per_episode=60"],
        ["sample_per_episode = 60", "models.policy.num_inference_per_prompt = 8", "56 or 64"],
    ),
    (
        ["runtime_args.train_global_batch_size=48"],
        ["sample_per_episode = 64", "train_global_batch_size = 48", "48 or 96"],
    ),
    (
        ["models.policy_trainer.max_token_in_packing=3071"],
        ["models.policy.max_seq_len = 3072", "max_token_in_packing = 3071", "at least 3072"],
    ),
    (
        ["models.policy.max_seq_len=9000"],
        ["models.policy.max_seq_len = 9000", "max_token_in_packing = 8192", "at least 9000"],
    ),
    (["models.policy.max_seq_len=1024"], ["max_seq_len = 1024", "length = 1024", "no room"]),
    (["models.policy.eval_max_seq_len=9"], ["eval_max_seq_len = 9", "length = 1024", "no room"]),
    (
        ["models.policy.max_tokens_per_turn=2049"],
        ["max_tokens_per_turn = 2049", "max_response_tokens_length = 2048", "lower the first"],
    ),
    (
        ["models.policy.eval_max_tokens_per_turn=2049"],
        ["eval_max_tokens_per_turn = 2049", "eval_max_response_tokens_length = 2048"],
    ),
    (
        ["runtime_args.eval_episode_interval=5"],
        ["eval_episode_interval = 5", "eval_data_path", "set the path"],
    ),
    (
        ["runtime_args.enable_eval_before_training=true"],
        ["enable_eval_before_training = true", "eval_data_path", "=false"],
    ),
    (
        ["runtime_args.log_args_dict.enable_wandb=true"],
        ["enable_wandb = true", "wandb_project = null", "name the project"],
    ),
    (
        ["models.policy_trainer.optimizer.min_lr=1e-7"],
        ["min_lr = 1e-07", "lr_schedule = constant", "linear or cosine"],
    ),
    (
        [
            "models.policy_trainer.optimizer.min_lr=1",
            "models.policy_trainer.optimizer.lr_schedule=linear",
        ],
        ["min_lr = 1.0", "optimizer.lr = 1e-06", "lower the first"],
    ),
    (
        ["models.policy_trainer.num_gpu=1"],
        ["models.policy.num_gpu = 0", "policy_trainer.num_gpu = 1"],
    ),
    (["models.ref_policy.num_gpu=1"], ["ref_policy.num_gpu = 1", "policy_trainer.num_gpu = 0"]),
    (
        [*ONE_GPU[:2], "models.policy_trainer.kl_coef=0.1"],
        ["ref_policy.num_gpu = 0", "policy_trainer.num_gpu = 1"],
    ),
    (
        ["models.policy.num_gpu=2", "models.policy_trainer.num_gpu=2"],
        ["models.policy.num_gpu = 2", "cluster = local", "to 1, to 0 for the CPU", "cluster=ray"],
    ),
    (
        ["models.policy.tensor_model_parallel_size=2"],
        ["tensor_model_parallel_size = 2", "embedded"],
    ),
    (["models.policy.load=other"], ["models.policy.load = other", "trainer.load = some/model"]),
    # clusters
    (
        ["runtime_args.cluster=ray"],
        ["cluster = ray", "rollout_backend = embedded", "rollout_backend=sglang", "cluster=local"],
    ),
    (
        [*RAY, "models.policy.num_gpu=8"],
        ["models.policy.num_gpu = 8", "policy_trainer.num_gpu = 0", "both above 0, or both to 0"],
    ),
    (
        [*RAY, *GPUS, "models.policy.publish=tensor"],
        ["models.policy.publish = tensor", "colocation", "auto, collective or disk"],
    ),
    (
        [*RAY, *GPUS, "models.policy.tensor_model_parallel_size=3"],
        ["models.policy.num_gpu = 4", "tensor_model_parallel_size = 3", "takes 3 GPUs"],
    ),
    (
        [*RAY, "models.policy.num_cpu=3", "models.policy.cpu_per_process=2"],
        ["models.policy.num_cpu = 3", "models.policy.cpu_per_process = 2", "change one of them"],
    ),
    (
        [*RAY, "models.policy_trainer.num_cpu=3", "models.policy_trainer.cpu_per_process=2"],
        ["policy_trainer.num_cpu = 3", "cpu_per_process = 2", "change one of them"],
    ),
    (
        ["models.rollout_manager.num_cpu=3", "models.rollout_manager.cpu_per_process=2"],
        ["rollout_manager.num_cpu = 3", "cpu_per_process = 2", "change one of them"],
    ),
    (
        [*RAY, *GPUS, "runtime_args.colocation=[policy]"],
        ["colocation = [policy]", "set it to [policy, policy_trainer, ref_policy]"],
    ),
    (
        [*COLOCATED, "models.policy.num_gpu=8"],
        ["models.policy.num_gpu = 8", "policy_trainer.num_gpu = 4", "colocation", "same number"],
    ),
    (
        [*COLOCATED, "runtime_args.max_staleness=1"],
        ["max_staleness = 1", "colocation", "set max_staleness=0"],
    ),
    (
        [*COLOCATED, "models.policy.publish=collective"],
        ["models.policy.publish = collective", "two ranks", "models.policy.publish=tensor"],
    ),
    (
        [*COLOCATED, "models.policy_trainer.kl_coef=0.1"],
        ["models.ref_policy.num_gpu = 0", "models.policy_trainer.num_gpu = 4", "same number"],
    ),
]

BAD_VALUES = [
    ("runtime_args.raw_chat=false", "raw_chat = false", "must be true", "chat messages"),
    ("runtime_args.data_rerank=true", "data_rerank = true", "must be false", "one group"),
    ("runtime_args.train_backend=megatron", 'train_backend = "megatron"', "no Megatron trainer"),
    ("runtime_args.cluster=slurm", 'cluster = "slurm"', "'local' or 'ray'"),
    ("runtime_args.colocation=[policy, reward]", "colocation", "'policy_trainer'"),
    ("models.policy_trainer.packing=false", "packing = false", "must be true"),
    ("models.policy_trainer.attention=fa2", 'attention = "fa2"', "'flash', 'flex'"),
    ("models.policy.publish=nccl", 'publish = "nccl"', "'collective'"),
    ("models.policy.pause_mode=stop", 'pause_mode = "stop"', "'retract'"),
    ("models.policy.gpu_memory_utilization=85", "gpu_memory_utilization = 85", "less than"),
    ("models.policy.num_cpu=0", "num_cpu = 0", "greater than or equal to 1"),
    ("models.policy.publish_bucket_mb=0", "publish_bucket_mb = 0", "greater than or equal to 1"),
    ("models.policy.sglang_args=3", "sglang_args = 3", "must be"),
    ("runtime_args.task_type=chat", 'task_type = "chat"', "agent of one model call"),
    ("runtime_args.use_rollout_manager=false", "use_rollout_manager = false", "must be true"),
    ("models.policy.is_sync_mode=true", "is_sync_mode = true", "no synchronous mode"),
    ("runtime_args.rollout_backend=vllm", 'rollout_backend = "vllm"', "'embedded' or 'sglang'"),
    ("runtime_args.exp_name=a/b", 'exp_name = "a/b"', "without a slash"),
    ("runtime_args.data_path='a.json,,b'", 'data_path = "a.json,,b"', "between its commas"),
    ("runtime_args.data_path=' '", 'data_path = " "', "empty"),
    ("runtime_args.num_episode=0", "num_episode = 0", "greater than or equal to 1"),
    ("runtime_args.agent_timeout_s=0", "agent_timeout_s = 0", "greater than 0"),
    ("runtime_args.max_failed_fraction=1.5", "max_failed_fraction = 1.5", "than or equal to 1"),
    ("runtime_args.max_checkpoints=0", "max_checkpoints = 0", "greater than or equal to 1"),
    ("models.policy.num_inference_per_prompt=1", "_per_prompt = 1", "greater than or equal to 2"),
    ("models.policy.temperature=0", "temperature = 0", "exploration"),
    ("models.policy.top_p=0", "top_p = 0", "greater than 0"),
    ("models.policy.top_k=0", "top_k = 0", "-1 for no limit"),
    ("models.policy.eval_temperature=-1", "eval_temperature = -1", "greater than or equal to 0"),
    ("models.policy_trainer.precision=fp16", 'precision = "fp16"', "'bf16'"),
    ("models.policy_trainer.optimizer.adam_beta1=1", "adam_beta1 = 1", "less than 1"),
]


@pytest.mark.parametrize(
    ("overrides", "pieces"),
    CONTRADICTIONS + [([override], pieces) for override, *pieces in BAD_VALUES],
    ids=lambda value: " ".join(value),
)
def test_refused_with_keys_values_and_remedy(overrides: list[str], pieces: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    for piece in pieces:
        assert piece in str(caught.value)


def test_a_contradiction_is_refused_without_the_loader_too() -> None:
    tree = load().model_dump()
    tree["runtime_args"]["sample_per_episode"] = 60
    with pytest.raises(pydantic.ValidationError, match="sample_per_episode = 60"):
        GrpoConfig.model_validate(tree)


def test_an_unknown_key_is_refused_without_the_loader_too() -> None:
    tree = load().model_dump()
    tree["models"]["policy"]["temprature"] = 1.0
    with pytest.raises(pydantic.ValidationError, match="temprature"):
        GrpoConfig.model_validate(tree)
