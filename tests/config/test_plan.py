"""The numbers of ``--dry-run``, checked by hand on a model of 1,000 + 24 parameters."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from chatlearn.config import load_config
from chatlearn.config.memory import count_parameters, estimate_memory
from chatlearn.config.plan import plan

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}


def write_safetensors(file: Path, shapes: dict[str, list[int]]) -> None:
    header = {name: {"dtype": "F32", "shape": shape} for name, shape in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "model-1.safetensors", {"a": [100, 10]})
    write_safetensors(tmp_path / "model-2.safetensors", {"b": [24], "scalar": []})
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


def config(model: Path | str, *overrides: str):
    required = ["runtime_args.data_path=a.json,b.json", f"models.policy_trainer.load={model}"]
    return load_config(None, [*required, *overrides])


def test_plan_in_words(model: Path) -> None:
    text = plan(
        config(
            model,
            "runtime_args.num_episode=10",
            "runtime_args.train_global_batch_size=16",
            "runtime_args.eval_data_path=t.json",
            "runtime_args.eval_episode_interval=5",
            "runtime_args.max_staleness=2",
            "runtime_args.import_modules=[my.agent]",
            "models.policy_trainer.kl_coef=0.1",
        ),
        {"a.json": 1000, "b.json": 24, "t.json": 7},
    )
    for piece in (
        "10 episodes",
        "the CPU in fp32",
        "kl_coef 0.1",
        "my.agent",
        "a.json (1,000 rows), b.json (24 rows)",
        "8 prompts × 8 rollouts = 64 rollouts",
        "4 optimizer steps an episode (of 16 rollouts), 40 in total",
        "a call 2,048, a rollout 2,048, a context 3,072",
        "samples at most 131,072",
        "packed to 8,192",
        "2 episodes old",
        "every 5 episodes and at the end: t.json (7 rows), 1 rollout a prompt, temperature 0.6",
        "the newest 3 kept",
        "goes over them 0.078 times",  # 80 prompts of 1,024
    ):
        assert piece in text
    assert len(text.splitlines()) <= 18


def test_plan_without_counts_or_model() -> None:
    text = plan(config("some/hub-id"))
    assert "a.json, b.json, shuffled\n" in text
    assert "model folder not found locally: memory not estimated" in text
    assert "evaluation  never" in text


def test_parameters_are_counted_from_the_headers(model: Path) -> None:
    assert count_parameters(model) == 100 * 10 + 24 + 1  # a scalar is one number


def test_memory_by_hand(model: Path) -> None:
    """Heads 2 x 8, key and value, 2 layers, 64 slots of 3,072 tokens, 4 bytes: 48 MiB."""
    big = {"big": [1024, 1024, 1024]}
    write_safetensors(model / "model-1.safetensors", big)
    write_safetensors(model / "model-2.safetensors", {})
    text = estimate_memory(config(model))
    assert "weights 4.0 GiB, gradients 4.0 GiB, AdamW moments 8.0 GiB; and in turn" in text
    assert "KV cache 48 MiB" in text
    assert "1,073,741,824 parameters" in text
    assert "about 16.8 GiB" in text  # and 0.8 of activations, mostly logits
    half = estimate_memory(config(model, "models.policy_trainer.precision=bf16"))
    assert "weights 2.0 GiB, gradients 6.0 GiB, AdamW moments 8.0 GiB, fp32 masters 4.0 GiB" in half
    assert "KV cache 24 MiB" in half


def test_a_context_beyond_the_model_is_told(model: Path) -> None:
    assert "careful" not in estimate_memory(config(model))
    text = estimate_memory(config(model, "models.policy.max_seq_len=5000"))
    assert "a context of 5,000 tokens, but the model knows 4,096" in text


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64])
def test_a_broken_model_folder_is_no_crash(model: Path, content: bytes) -> None:
    (model / "model-2.safetensors").write_bytes(content)
    assert "model-2.safetensors is not a safetensors file" in estimate_memory(config(model))
    for file in model.glob("*.safetensors"):
        file.unlink()
    assert "no *.safetensors file" in estimate_memory(config(model))
