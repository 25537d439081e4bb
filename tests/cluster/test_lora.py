"""Runs with LoRA: in one process, and against real SGLang, merged or with the adapter alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatlearn.config import load_config
from chatlearn.config.plan import plan
from chatlearn.models.policy.loading import load_policy

peft = pytest.importorskip("peft")

LORA = ["models.policy_trainer.lora_rank=4", "models.policy_trainer.optimizer.lr=0.02"]
GAP = 1e-4
"""Most that engine and trainer may disagree on a logprob, in fp32 (nats)."""
PINS = Path(__file__).parents[1] / "sglang_cpu_lora"


def gaps(metrics) -> list[float]:
    return [m["policy/logprob_gap_max"] for m in metrics if "policy/logprob_gap_max" in m]


def assert_merged(project, run, episode: int) -> None:
    """``hf/`` is the base and ``adapter/`` together; ``state/`` is small."""
    checkpoint = run / f"checkpoints/episode_{episode:06d}"
    base = load_policy(project.policy)
    whole = peft.PeftModel.from_pretrained(base, str(checkpoint / "adapter")).merge_and_unload()
    merged = load_file(checkpoint / "hf/model.safetensors")
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(merged[name], weight.detach(), atol=1e-6, rtol=1e-6)
    moved = [n for n, p in load_policy(project.policy).named_parameters() if not p.equal(merged[n])]
    assert moved
    assert all("_proj." in name for name in moved)


def test_one_process_samples_and_trains_with_the_same_adapters(project):
    """No gap but rounding between the embedded engine and the trainer, at any version."""
    project.run(*LORA)
    metrics = project.metrics(project.runs[0])
    assert len(gaps(metrics)) == 4
    assert max(gaps(metrics)) < GAP
    assert_merged(project, project.runs[0], 4)


# ---------------------------------------------------------------------- real SGLang


@pytest.fixture
def sglang(sglang_python) -> list[str]:
    return ["runtime_args.rollout_backend=sglang", f"models.policy.sglang_python={sglang_python}"]


@pytest.fixture
def sglang_with_lora(sglang_python, tmp_path) -> list[str]:
    """The same Python, with a shim that lets it serve adapters on a CPU."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={PINS} exec {sglang_python} "$@"\n')
    wrapper.chmod(0o755)
    return [
        "runtime_args.rollout_backend=sglang",
        f"models.policy.sglang_python={wrapper}",
        "models.policy_trainer.lora_publish=adapter",
    ]


@pytest.mark.sglang
@pytest.mark.timeout(600)
def test_sglang_is_sent_merged_weights(project, sglang):
    project.run(*LORA, *sglang, "models.policy.check_weights_interval=1")
    metrics = project.metrics(project.runs[0])
    assert max(gaps(metrics)) < GAP
    assert sum(m["publish/checked"] for m in metrics) == 5  # by checksum, the first one too
    assert_merged(project, project.runs[0], 4)


@pytest.mark.sglang
@pytest.mark.timeout(600)
def test_sglang_is_sent_the_adapter_alone(project, sglang_with_lora):
    """The base in the server is the trainer's, by checksum; what is sampled fits every version."""
    settings = [*LORA, *sglang_with_lora, "models.policy.check_weights_interval=1"]
    project.run(*settings, "runtime_args.num_episode=6")
    metrics = project.metrics(project.runs[0])
    assert max(gaps(metrics)) < GAP
    assert len(gaps(metrics)) >= 4
    assert sum(m["publish/checked"] for m in metrics) == 7
    sent = {m["publish/gb"] for m in metrics}
    assert max(sent) < 0.25 * sum(p.nbytes for p in load_policy(project.policy).parameters()) / 1e9
    assert_merged(project, project.runs[0], 6)


@pytest.mark.sglang
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["merged", "adapter"])
def test_ranks_and_workers_train_adapters(project, sglang, sglang_with_lora, way):
    settings = sglang if way == "merged" else sglang_with_lora
    run = project.start(
        *LORA,
        *settings,
        "runtime_args.cluster=ray",
        "models.policy_trainer.num_cpu=2",
        "models.policy_trainer.kl_coef=0.01",
        "models.policy.check_weights_interval=1",
    )
    assert run.wait(500) == 0, (project.folder / "out.txt").read_text()
    metrics = project.metrics(project.runs[0])
    assert max(gaps(metrics)) < GAP
    assert max(m.get("policy/kl_ref", 0) for m in metrics) > 0
    assert sum(m["publish/checked"] for m in metrics) == 5
    assert_merged(project, project.runs[0], 4)


# ---------------------------------------------------------------------- configuration


REQUIRED = ["runtime_args.data_path=a.json", "models.policy_trainer.load=some/model"]
ON_SGLANG = ["runtime_args.rollout_backend=sglang", "models.policy_trainer.lora_rank=8"]
REFUSED = {
    "an alpha without a rank": (
        ["models.policy_trainer.lora_alpha=16"],
        r"lora_alpha = 16(\.0)? does nothing with models\.policy_trainer\.lora_rank = 0",
    ),
    "a negative rank": (["models.policy_trainer.lora_rank=-8"], r"lora_rank = -8"),
    "no layers": (
        ["models.policy_trainer.lora_rank=8", "models.policy_trainer.lora_target_modules=[]"],
        r"nothing would be trained; name layers, or set it to all-linear",
    ),
    "an adapter for the embedded engine": (
        ["models.policy_trainer.lora_rank=8", "models.policy_trainer.lora_publish=adapter"],
        r"rollout_backend = embedded: that engine samples from the trainer's own adapters and "
        r"needs none sent; set models\.policy_trainer\.lora_publish=merged",
    ),
    "an adapter while old ones run": (
        [*ON_SGLANG, "models.policy_trainer.lora_publish=adapter", "runtime_args.max_staleness=1"],
        r"max_staleness = 1: SGLang replaces an adapter only when no request runs with it",
    ),
    "an adapter by broadcast": (
        [*ON_SGLANG, "models.policy_trainer.lora_publish=adapter", "models.policy.publish=tensor"],
        r"models\.policy\.publish = tensor: adapters are files",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_keys_that_would_do_nothing_or_cannot_be_are_refused(case):
    overrides, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        load_config(None, [*REQUIRED, *overrides])


def test_the_reference_is_the_base_only_where_it_is_the_same_model():
    lora = [*REQUIRED, "models.policy_trainer.lora_rank=8"]
    assert load_config(None, lora).reference_is_base
    assert not load_config(None, REQUIRED).reference_is_base
    assert not load_config(None, [*lora, "models.ref_policy.load=other"]).reference_is_base
    targets = "models.policy_trainer.lora_target_modules=[q_proj, v_proj]"
    trainer = load_config(None, [*lora, targets]).models.policy_trainer
    assert trainer.lora_target_modules == ("q_proj", "v_proj")


def test_the_plan_says_what_is_trained_and_that_no_reference_is_loaded():
    text = plan(load_config(None, [*REQUIRED, *ON_SGLANG, "models.policy_trainer.kl_coef=0.1"]))
    assert "reference is the model without its adapters, no second one in memory" in text
    assert "LoRA of rank 8, alpha 32, on all-linear: only the adapters are trained" in text
    sent = "models.policy_trainer.lora_publish=adapter"
    text = plan(load_config(None, [*REQUIRED, *ON_SGLANG, sent]))
    assert "publish     the adapters alone, in files that the engines read" in text
