"""One GPU: the step in bf16, memory that goes and comes back, kernels against PyTorch's attention.

``pytest -m gpu``. Left out by default, and not a single test runs on a CPU.
"""

from __future__ import annotations

import asyncio
import time

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config

from chatlearn.algorithm.packing import pack
from chatlearn.errors import TrainerError
from chatlearn.models.policy.attention import Segments
from chatlearn.models.policy.attention_kernels import find_planner
from chatlearn.models.policy.fsdp import FSDPTrainer
from chatlearn.models.policy.loading import load_policy
from chatlearn.models.policy.trainer import PolicyTrainer, TrainerSettings
from chatlearn.types import Sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda", 0)
CONFIG = Qwen3Config(
    vocab_size=4096,
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    intermediate_size=1408,
    tie_word_embeddings=True,
)
SETTINGS = TrainerSettings(lr=1e-4, precision="bf16", attention="sdpa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(CONFIG).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def samples(count=12):
    made = []
    for i in range(count):
        n = 40 + 37 * i
        on = [j > 20 for j in range(n)]
        ids = [(i + 31 * j) % 4096 for j in range(n)]
        pull = 1.0 if i % 2 else -1.0
        temperatures = [(0.8, 1.1)[i % 3 == 0 and j > 30] for j in range(n)]
        numbers = [-8.3 * o for o in on], [pull * o for o in on], temperatures
        made.append(Sample(ids, on, *numbers, trajectory=f"g/{i}"))
    return made


def steps(trainer, count=3):
    return [asyncio.run(trainer.step(pack(samples(), 1024))) for _ in range(count)]


def distance(ours, theirs):
    return ((ours - theirs).float().norm() / theirs.float().norm()).item()


def test_a_bf16_step_is_near_the_fp32_one_of_a_cpu(folder, world):
    exact = PolicyTrainer(load_policy(folder), None, TrainerSettings(lr=1e-4))
    expected = steps(exact)
    alone = PolicyTrainer(load_policy(folder, device=CUDA, precision="bf16"), None, SETTINGS)
    for trainer in (alone, FSDPTrainer(folder, None, SETTINGS, device=CUDA)):
        for ours, theirs in zip(steps(trainer), expected, strict=True):
            assert ours["policy/loss"] == pytest.approx(theirs["policy/loss"], rel=0.1, abs=0.02)
            assert ours["policy/grad_norm"] == pytest.approx(theirs["policy/grad_norm"], rel=0.15)
            assert ours["memory/peak_gb"] > 0


def test_memory_goes_and_comes_back(folder, world):
    left_alone, moved = (FSDPTrainer(folder, None, SETTINGS, device=CUDA) for _ in range(2))
    for trainer in (left_alone, moved):
        steps(trainer, 1)
    before = torch.cuda.memory_allocated(CUDA)
    parameters = sum(p.numel() for p in moved.model.parameters())
    started = time.perf_counter()
    moved.offload(weights=True, gradients=True, optimizer=True)
    offloaded = time.perf_counter()
    freed = before - torch.cuda.memory_allocated(CUDA)
    assert freed >= 0.99 * 12 * parameters  # an fp32 master and two moments each
    moved.onload(weights=True, gradients=True, optimizer=True)
    onloaded = time.perf_counter()
    assert torch.cuda.memory_allocated(CUDA) == pytest.approx(before, rel=0.01)
    gigabytes = 12 * parameters / 1e9
    for seconds in (offloaded - started, onloaded - offloaded):
        assert gigabytes / seconds > 0.5  # pinned memory; a first offload also allocates it
    steps(left_alone, 1)
    steps(moved, 1)
    for (name, ours), (_, theirs) in zip(
        moved.full_weights(torch.float32), left_alone.full_weights(torch.float32), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("kernel", ["flash", "flex"])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("parents", [(), (-1, 0, 500, 300, 730)], ids=["rows", "trees"])
def test_kernels_compute_what_sdpa_computes(kernel, window, parents):
    try:
        planner = find_planner(kernel, CUDA, torch.bfloat16, CONFIG)
    except TrainerError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    lengths = (1, 700, 33, 128, 129)
    cu = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    states = [
        torch.randn(1, heads, cu[-1], 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 4, 4)
    ]
    upstream = torch.randn(1, cu[-1], 8, 64, device=CUDA, dtype=torch.bfloat16)
    outputs = []
    for plan in (planner(cu, CUDA, parents), Segments.of(cu, CUDA, parents)):
        out = plan.attend(*states, scaling=None, window=window)
        outputs.append([out, *torch.autograd.grad(out, states, upstream)])
    for ours, theirs in zip(*outputs, strict=True):
        assert distance(ours, theirs) < 2e-2


@pytest.mark.parametrize("kernel", ["flash", "flex"])
def test_a_step_with_a_kernel(folder, world, kernel):
    try:
        find_planner(kernel, CUDA, torch.bfloat16, CONFIG)
    except TrainerError as error:
        pytest.skip(str(error))
    from dataclasses import replace

    settings = replace(SETTINGS, attention=kernel, gradient_checkpointing=True)
    expected = steps(FSDPTrainer(folder, None, SETTINGS, device=CUDA))
    for ours, theirs in zip(
        steps(FSDPTrainer(folder, None, settings, device=CUDA)), expected, strict=True
    ):
        assert ours["policy/grad_norm"] == pytest.approx(theirs["policy/grad_norm"], rel=0.05)
