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


GRPO_FSDP = Path(__file__).parents[2] / "template" / "grpo_fsdp.yaml"


def config(model: Path | str, *overrides: str, template: Path | None = None):
    required = ["runtime_args.data_path=a.json,b.json", f"models.policy_trainer.load={model}"]
    return load_config(template, [*required, *overrides])


def on_cluster(*overrides: str, model: Path | str = "some/model"):
    return config(model, *overrides, template=GRPO_FSDP)


def said(text: str, word: str) -> list[str]:
    """What a plan says of ``word``, a line each."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"{word} "))
    more = next(
        (i for i, line in enumerate(lines[first + 1 :], first + 1) if line[0] != " "), len(lines)
    )
    return [line[12:] for line in lines[first:more]]


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


def test_a_file_that_is_not_here_is_told_and_not_counted() -> None:
    text = plan(config("m"), {"a.json": 10, "b.json": None})
    assert said(text, "data") == ["a.json (10 rows), b.json (NOT FOUND on this machine), shuffled"]


PLACEMENTS = {
    "eight GPUs, colocated": (
        [],
        1,
        {
            "machines": ["1 machine with 8 GPUs: a Ray cluster of this run's own"],
            "engines": [
                "8 SGLang engines × 1 GPU (TP 1), 85% of its memory; 192 calls at once in each"
            ],
            "trainer": ["8 FSDP2 ranks × 1 GPU (NCCL), in bf16 with fp32 masters"],
            "placement": [
                "colocated: engines and trainer take turns on the same 8 GPUs",
                "while the trainer steps, the engines give back weights and caches",
                "while the engines sample, parameters and AdamW's moments move to the CPU, "
                "gradients are dropped",
            ],
            "publish": [
                "tensor (auto): CUDA IPC on the same GPUs, in pieces of 512 MiB; "
                "the first and one in 10 checked"
            ],
            "agents": ["16 worker processes, at most 1,536 agents at once"],
            "episode": ["64 prompts × 32 rollouts = 2,048 rollouts"],
            # 8 contexts of 4,096 in a micro-batch of 32,768: 2,048 / 8 / 8 ranks
            "tokens": [
                "at most: a call 2,048, a rollout 2,048, a context 4,096, a prompt 1,024",
                "so an episode samples at most 4,194,304; rows are packed to 32,768 a micro-batch",
                "if every context were full, a step would be 32 micro-batches on each rank",
            ],
        },
    ),
    "two machines, engines of four GPUs, some of the memory stays": (
        [
            "models.policy.num_gpu=16",
            "models.policy_trainer.num_gpu=16",
            "models.policy.tensor_model_parallel_size=4",
            "models.policy_trainer.kl_coef=0.1",
            "models.policy_trainer.free_gpu_memory.offload_weights=false",
            "models.policy_trainer.free_gpu_memory.free_grad_buffers=false",
            "models.policy.check_weights_interval=0",
        ],
        2,
        {
            "machines": [
                "2 machines with 8 GPUs each: a Ray cluster of this run's own, started on each"
            ],
            "engines": [
                "4 SGLang engines × 4 GPUs (TP 4), 85% of the memory of each; 192 calls at once in "
                "each"
            ],
            "trainer": ["16 FSDP2 ranks × 1 GPU (NCCL), in bf16 with fp32 masters"],
            "placement": [
                "colocated: engines and trainer take turns on the same 16 GPUs",
                "while the trainer steps, the engines give back weights and caches",
                "while the engines sample, AdamW's moments move to the CPU",
                "the reference waits on the CPU between steps",
            ],
            "publish": [
                "tensor (auto): CUDA IPC on the same GPUs, in pieces of 512 MiB; none checked"
            ],
        },
    ),
    "apart, on a Ray cluster that is there": (
        [
            "runtime_args.colocation=[]",
            "runtime_args.ray_address=auto",
            "runtime_args.max_staleness=1",
            "models.policy.num_gpu=6",
            "models.policy_trainer.num_gpu=2",
            "models.policy.check_weights_interval=1",
        ],
        1,
        {
            "machines": ["those of the Ray cluster at auto, which is left running; 8 GPUs"],
            "engines": [
                "6 SGLang engines × 1 GPU (TP 1), 85% of its memory; 192 calls at once in each"
            ],
            "trainer": ["2 FSDP2 ranks × 1 GPU (NCCL), in bf16 with fp32 masters"],
            "placement": [
                "apart: engines and trainer have GPUs of their own; both work at the same time"
            ],
            "publish": [
                "collective (auto): broadcast to all engines over NCCL, in pieces of 512 MiB; "
                "all checked"
            ],
            "staleness": ["rollouts may be sampled by weights 1 episode old"],
        },
    ),
    "CPUs": (
        [
            "models.policy.num_gpu=0",
            "models.policy_trainer.num_gpu=0",
            "models.policy_trainer.num_cpu=2",
            "models.policy.sglang_python=/opt/sglang/bin/python",
            "models.rollout_manager.num_cpu=1",
            "models.policy.publish=disk",
        ],
        1,
        {
            "machines": ["1 machine without GPUs: a Ray cluster of this run's own"],
            "engines": [
                "1 SGLang engine × 1 CPU (TP 1), served by /opt/sglang/bin/python; "
                "192 calls at once in each"
            ],
            "trainer": ["2 FSDP2 ranks × 1 CPU (gloo), in fp32"],
            "placement": ["colocated: they take turns; on CPUs no memory moves"],
            "publish": [
                "disk: files that the engines read, in pieces of 512 MiB; "
                "the first and one in 10 checked"
            ],
            "agents": ["1 worker process, at most 1,536 agents at once"],
        },
    ),
    "one process with SGLang": (
        [
            "runtime_args.cluster=local",
            "runtime_args.colocation=[]",
            "models.policy.num_gpu=0",
            "models.policy_trainer.num_gpu=0",
        ],
        1,
        {
            "device": ["the CPU in fp32, one process: the trainer, and the agents"],
            "engines": ["1 SGLang engine × 1 CPU (TP 1); 192 calls at once in each"],
            "placement": ["apart; on CPUs no memory moves"],
        },
    ),
}


@pytest.mark.parametrize("case", PLACEMENTS)
def test_who_is_where_in_words(case: str) -> None:
    overrides, machines, expected = PLACEMENTS[case]
    text = plan(on_cluster(*overrides), machines=machines)
    assert {word: said(text, word) for word in expected} == expected
    assert max(len(line) for line in text.splitlines()) <= 130


def test_gpus_that_do_not_divide_are_told_in_all() -> None:
    sizes = ["models.policy.num_gpu=3", "models.policy_trainer.num_gpu=3"]
    text = plan(on_cluster(*sizes), machines=2)
    assert said(text, "machines")[0].startswith("2 machines with 3 GPUs in all")


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


def test_memory_of_a_cluster_by_hand(model: Path) -> None:
    """2**33 parameters on 8 ranks: 2**30 a rank, of 4 bytes. Two layers, both gathered in a step.

    A row of the cache: 2 x 2 heads x 8 x 2 layers of 2 bytes; 192 contexts of 4,096: 96 MiB.
    """
    write_safetensors(model / "model-1.safetensors", {"big": [8, 1024, 1024, 1024]})
    write_safetensors(model / "model-2.safetensors", {})
    trainer, engine, moved = estimate_memory(on_cluster(model=model)).splitlines()
    assert "a trainer rank 32.8 GiB: weights 4.0 GiB, gradients 4.0 GiB, " in trainer
    assert "AdamW moments 8.0 GiB; in a step activations 0.8 GiB, " in trainer
    assert "gathered weights 16.0 GiB" in trainer
    assert "an engine takes 85% of a GPU: weights 16.0 GiB" in engine
    assert "192 full contexts would want 96 MiB of it" in engine
    assert "the 8 ranks of a machine hold 96.0 GiB on the CPU" in moved  # 12 bytes a parameter
    assert "8,589,934,592 parameters" in moved

    split = on_cluster("models.policy.tensor_model_parallel_size=2", model=model)
    engine = estimate_memory(split, machines=2).splitlines()[1]
    assert "weights 8.0 GiB" in engine
    assert "want 48 MiB of it, on each GPU" in engine
    halves = estimate_memory(split, machines=2).splitlines()[2]
    assert "the 4 ranks of a machine hold 48.0 GiB on the CPU" in halves

    stays = [
        f"models.policy_trainer.free_gpu_memory.{part}=false"
        for part in ("offload_weights", "offload_optimizer_states")
    ]
    assert len(estimate_memory(on_cluster(*stays, model=model)).splitlines()) == 2
    apart = on_cluster("runtime_args.colocation=[]", model=model)
    assert "on the CPU" not in estimate_memory(apart)
    kl = estimate_memory(on_cluster("models.policy_trainer.kl_coef=0.1", model=model))
    assert "reference 2.0 GiB" in kl


def test_embedding_and_head_are_gathered_too(model: Path) -> None:
    """Of 8 Gi parameters, 2 x 1 Gi are tables; of four layers two are whole at a time."""
    write_safetensors(model / "model-1.safetensors", {"big": [8, 1024, 1024, 1024]})
    write_safetensors(model / "model-2.safetensors", {})
    shape = SHAPE | {"num_hidden_layers": 4, "hidden_size": 1024, "vocab_size": 1024**2}
    (model / "config.json").write_text(json.dumps(shape))
    assert "gathered weights 10.0 GiB" in estimate_memory(on_cluster(model=model))  # 2 + 6 / 2
    (model / "config.json").write_text(json.dumps(shape | {"tie_word_embeddings": True}))
    assert "gathered weights 9.0 GiB" in estimate_memory(on_cluster(model=model))  # 1 + 7 / 2


def test_memory_of_one_process_with_sglang_is_not_in_shards(model: Path) -> None:
    overrides = [
        "runtime_args.cluster=local",
        "runtime_args.colocation=[]",
        "models.policy.num_gpu=0",
        "models.policy_trainer.num_gpu=0",
        "models.policy_trainer.num_cpu=4",
    ]
    write_safetensors(model / "model-1.safetensors", {"big": [1024, 1024, 1024]})
    text = estimate_memory(on_cluster(*overrides, model=model))
    assert "the trainer 16.8 GiB: weights 4.0 GiB, gradients 4.0 GiB, AdamW moments 8.0" in text
    assert "an engine: weights 4.0 GiB" in text


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
