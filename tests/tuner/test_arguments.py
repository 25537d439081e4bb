"""Arguments of ``tune()`` as keys of the configuration."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from chatlearn.config.schema import keys
from chatlearn.errors import ConfigError
from chatlearn.tuner import AlgorithmConfig, TunerModelConfig
from chatlearn.tuner.arguments import (
    ALGORITHMS,
    ARGUMENTS,
    DEFAULTS,
    episodes,
    of_algorithm,
    of_model,
    of_monitor,
)
from chatlearn.tuner.workflow_agent import WorkflowAgentConfig


def test_every_argument_names_a_key_that_exists():
    known = keys()
    assert not set(ARGUMENTS.values()) - set(known)
    assert not set(DEFAULTS) - set(known)
    assert not {key for setting in ALGORITHMS.values() for key in setting} - set(known)


def test_every_field_is_in_the_table_or_refused():
    of = {"model": TunerModelConfig, "algorithm": AlgorithmConfig}
    named = {f"{name}.{field.name}" for name, kind in of.items() for field in fields(kind)}
    refused = {"model.reasoning_parser", "model.tinker_config"}
    assert named - set(ARGUMENTS) == refused
    for name in refused:
        with pytest.raises(ConfigError, match="leave it out"):
            of_model(TunerModelConfig(**{name.partition(".")[2]: "x"}), {})


def test_a_model_and_the_lengths_that_follow():
    model = TunerModelConfig("my/model", 16384, temperature=0.7, max_tokens=512)

    assert of_model(model, DEFAULTS) == {
        "models.policy_trainer.load": "my/model",
        "models.policy.max_seq_len": 16384,
        "models.policy.temperature": 0.7,
        "models.policy.max_tokens_per_turn": 512,
        "models.policy.max_prompt_tokens_length": 16383,
        "models.policy.max_response_tokens_length": 16384,
        "models.policy_trainer.max_token_in_packing": 16384,
    }


def test_lengths_of_a_file_stand():
    file = {"models.policy.max_prompt_tokens_length": 100}

    assert "models.policy.max_prompt_tokens_length" not in of_model(
        TunerModelConfig(max_model_len=4096), file
    )


@pytest.mark.parametrize(
    ("algorithm", "below", "samples"),
    [
        (AlgorithmConfig(group_size=4, batch_size=3), {}, 12),
        (AlgorithmConfig(batch_size=3), {}, 24),
        (AlgorithmConfig(group_size=4), {}, 128),
        (
            AlgorithmConfig(group_size=4),
            {
                "runtime_args.sample_per_episode": 20,
                "models.policy.num_inference_per_prompt": 2,
            },
            40,
        ),
    ],
)
def test_a_step_has_batch_times_group_runs(algorithm, below, samples):
    assert of_algorithm(algorithm, below)["runtime_args.sample_per_episode"] == samples


@pytest.mark.parametrize(
    ("rows", "epochs", "steps", "below", "expected"),
    [
        (96, 1, None, {}, {"runtime_args.num_episode": 3}),
        (97, 2, None, {}, {"runtime_args.num_episode": 7}),
        (2, 1, None, {}, {"runtime_args.num_episode": 1}),
        (96, 5, 2, {}, {"runtime_args.num_episode": 2}),
        (96, 1, None, {"runtime_args.num_episode": 50}, {}),
        (96, 2, None, {"runtime_args.num_episode": 50}, {"runtime_args.num_episode": 6}),
    ],
)
def test_the_dataset_says_how_long(rows, epochs, steps, below, expected):
    assert episodes(rows, epochs=epochs, steps=steps, keys={}, below=below) == expected


def test_an_unknown_algorithm_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'multi_step_grpo'"):
        of_algorithm(AlgorithmConfig(algorithm_type="multistep_grpo"), {})


def test_engines_are_of_the_cluster():
    with pytest.raises(ConfigError, match=r"config_path=template/grpo_fsdp\.yaml"):
        of_model(TunerModelConfig(inference_engine_num=2), DEFAULTS)
    cluster = {"runtime_args.rollout_backend": "sglang", "models.policy.num_gpu": 8}
    model = TunerModelConfig(inference_engine_num=2, tensor_parallel_size=2)
    assert of_model(model, cluster)["models.policy.num_gpu"] == 4


def test_monitors():
    assert of_monitor("wandb", "sums", "first") == {
        "runtime_args.exp_name": "first",
        "runtime_args.output_dir": "outputs/sums",
        "runtime_args.log_args_dict.enable_tensorboard": False,
        "runtime_args.log_args_dict.enable_wandb": True,
        "runtime_args.log_args_dict.wandb_project": "sums",
    }
    with pytest.raises(ConfigError, match="there are tensorboard and wandb"):
        of_monitor("swanlab", None, None)


def test_the_page_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "tuner.md").read_text()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `([\w.]+)`", page, re.MULTILINE))
    assert {argument: rows.get(argument) for argument in ARGUMENTS} == ARGUMENTS
    assert all(f"`{name}`" in page for name in ALGORITHMS)


def test_the_page_has_the_keys_of_the_yaml():
    page = (Path(__file__).parents[2] / "docs" / "tuner.md").read_text()
    assert all(f"| `{key}` |" in page for key in WorkflowAgentConfig.model_fields)
