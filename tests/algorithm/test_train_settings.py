"""Runs with other estimators and losses, as a user starts them; and what is refused."""

from __future__ import annotations

from math import isfinite

import pytest

from chatlearn.config import GrpoConfig

RUNS = {
    "gspo": (
        "loss=gspo",
        "aggregation=seq-mean-token-mean",
        "correction=sequence-mask",
        "advantage=gigpo",
        "turn_discount=0.9",
    ),
    "decoupled": (
        "decoupled=true",
        "correction=token-tis",
        "advantage=rloo",
        "dual_clip_ratio=3.0",
    ),
    "reinforce": (
        "loss=reinforce",
        "correction=icepop",
        "advantage=reinforce_pp",
        "aggregation=seq-mean-token-sum-norm",
        "overlong_buffer=2",
        "kl_coef=0.01",
        "kl_estimator=k1",
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_trains(project, case):
    project.run(
        "runtime_args.num_episode=3",
        "runtime_args.train_global_batch_size=8",
        *(f"models.policy_trainer.{setting}" for setting in RUNS[case]),
    )
    metrics = project.metrics(project.runs[0])
    trained = [m for m in metrics if "policy/loss" in m]
    assert trained
    assert all(m["advantage/max"] > 0 and m["advantage/std"] > 0 for m in trained)
    assert all(m["policy/grad_norm"] > 0 for m in trained)
    assert all(isfinite(value) for m in metrics for value in m.values() if value is not None)
    assert all(0 < m["policy/effective_sample_size"] <= 1.0001 for m in trained)
    assert all(m["policy/logprob_gap_p50"] <= m["policy/logprob_gap_p99"] * 1.001 for m in trained)
    corrected = "policy/correction_mean" in trained[0]
    assert corrected == (case != "decoupled")


def refused(**settings):
    with pytest.raises(ValueError, match=r"models\.policy_trainer") as caught:
        GrpoConfig.model_validate(
            {
                "runtime_args": {"data_path": "a.jsonl"} | settings.pop("run", {}),
                "models": {"policy_trainer": {"load": "m"} | settings},
            }
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"advantage": "gigpo"}, "set turn_discount=0.95"),
        ({"overlong_buffer": 9999}, "lower the first"),
        ({"loss": "gspo", "dual_clip_ratio": 3.0}, "set loss=clip"),
        ({"loss": "gmpo"}, "set aggregation=seq-mean-token-mean"),
        ({"kl_estimator": "k2"}, "set a kl_coef"),
        ({"correction_high": 2.0}, "set a correction"),
        (
            {"loss": "reinforce", "correction": "token-tis", "correction_low": 0.5},
            "set correction=icepop",
        ),
        ({"correction": "token-mask", "correction_low": 3.0, "correction_high": 2.0}, "swap them"),
        ({"correction": "icepop"}, "count twice; set decoupled=true"),
        ({"correction": "sequence-tis", "loss": "gspo"}, "count twice; set decoupled=true"),
        ({"decoupled": True}, "loss=reinforce, which has the same gradient"),
        (
            {"decoupled": True, "loss": "reinforce", "run": {"num_training_epoch": 2}},
            "leave decoupled out",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(settings, words):
    assert words in refused(**settings)


def test_what_can_be_is_not():
    for settings in (
        {"advantage": "gigpo", "turn_discount": 0.95},
        {"loss": "gmpo", "aggregation": "seq-mean-token-mean"},
        {"loss": "reinforce", "correction": "sequence-tis", "correction_high": 5.0},
        {"loss": "cispo", "correction": "token-mask"},
    ):
        GrpoConfig.model_validate(
            {
                "runtime_args": {"data_path": "a.jsonl"},
                "models": {"policy_trainer": {"load": "m"} | settings},
            }
        )
    GrpoConfig.model_validate(
        {
            "runtime_args": {"data_path": "a.jsonl", "num_training_epoch": 2},
            "models": {"policy_trainer": {"load": "m", "decoupled": True, "correction": "icepop"}},
        }
    )
