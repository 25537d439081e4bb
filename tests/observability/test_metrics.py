"""Metrics by hand, for examples small enough to draw."""

from __future__ import annotations

import pytest

from chatlearn.observability.metrics import eval_metrics, merge_steps, rollout_metrics
from chatlearn.types import Completion, Group, Outcome, StopReason, Task, Trajectory, Turn


def task(name: str, source: str = "unit") -> Task:
    return Task(name, [], "agent", None, source, None)


def run(
    *lengths: int,
    reward: float | None = None,
    outcome: Outcome = Outcome.FINISHED,
    **metrics: float,
) -> Trajectory:
    """A trajectory whose turns sampled ``lengths`` tokens."""
    turns = [
        Turn(i, None, [1], Completion([5] * n, [-1.0] * n, StopReason.STOP, (0, 0)))
        for i, n in enumerate(lengths)
    ]
    return Trajectory(turns=turns, reward=reward, outcome=outcome, metrics=metrics)


NO_OUTCOMES = {f"outcome/{outcome.value}": 0.0 for outcome in Outcome}


def test_rollout_metrics_of_a_drawn_episode() -> None:
    """Three groups of two.

    ::

        group   run 0                          run 1
        a       4+6 tokens, reward 1           2 tokens, truncated, reward 0     signal
        b       3 tokens, reward 1             5 tokens, judge error             none: one reward
        c       timeout, no turn               agent error after 4 tokens        none: no reward
    """
    groups = [
        Group(
            task("a"),
            [
                run(4, 6, reward=1.0, tool_calls=1, tool_errors=0, answered=1),
                run(2, reward=0.0, outcome=Outcome.TRUNCATED, tool_calls=2, answered=0),
            ],
        ),
        Group(task("b"), [run(3, reward=1.0), run(5, outcome=Outcome.JUDGE_ERROR)]),
        Group(
            task("c"),
            [run(outcome=Outcome.TIMEOUT), run(4, outcome=Outcome.AGENT_ERROR, tool_calls=3)],
        ),
    ]
    assert rollout_metrics(groups) == NO_OUTCOMES | {
        "reward/mean": pytest.approx(2 / 3),
        "reward/std": pytest.approx((2 / 9) ** 0.5),
        "outcome/finished": 2.0,
        "outcome/truncated": 1.0,
        "outcome/judge_error": 1.0,
        "outcome/timeout": 1.0,
        "outcome/agent_error": 1.0,
        "groups/count": 3.0,
        "groups/zero_signal": 2.0,
        "tokens/generated": 24.0,
        "turns/mean": pytest.approx(6 / 5),
        "turns/max": 2.0,
        "tools/calls": 6.0,
        "tools/errors": 0.0,
        "response/truncated_fraction": pytest.approx(1 / 3),
        "response/tokens_mean": 5.0,
        "response/tokens_max": 10.0,
        "agent/answered": 0.5,
    }


def test_an_episode_of_failures_has_no_reward_at_all() -> None:
    metrics = rollout_metrics([Group(task("a"), [run(outcome=Outcome.ENGINE_ERROR)])])
    assert metrics["outcome/engine_error"] == 1.0
    assert not [key for key in metrics if key.startswith(("reward/", "response/", "turns/"))]


def test_eval_metrics_of_a_drawn_evaluation() -> None:
    """Three tasks, two rollouts each; x failed and is left out, not 0.

    ::

        task  source    rewards    mean  best  passed
        a     org/easy  1.0  0.0   0.5   1.0   yes
        b     org/easy  0.5   x    0.5   0.5   no
        c     hard       x    x     -     -    -
    """
    failed = run(outcome=Outcome.TIMEOUT, answered=1)
    groups = [
        Group(
            task("a", "org/easy"),
            [run(1, reward=1.0, answered=1), run(1, reward=0.0, answered=0)],
        ),
        Group(task("b", "org/easy"), [run(1, reward=0.5), failed]),
        Group(task("c", "hard"), [failed, run(1, outcome=Outcome.JUDGE_ERROR)]),
    ]
    assert eval_metrics(groups, k=2) == {f"eval/{k}": v for k, v in NO_OUTCOMES.items()} | {
        "eval/tasks": 2.0,
        "eval/failed": 3.0,
        "eval/reward_mean": 0.5,
        "eval/best_of_2": 0.75,
        "eval/pass@2": 0.5,
        "eval/org/easy/reward_mean": 0.5,
        "eval/outcome/finished": 3.0,
        "eval/outcome/timeout": 2.0,
        "eval/outcome/judge_error": 1.0,
        "eval/answered": 0.5,
    }


def test_an_evaluation_of_failures_has_no_reward() -> None:
    metrics = eval_metrics([Group(task("a"), [run(outcome=Outcome.TIMEOUT)])], k=1)
    assert metrics["eval/failed"] == 1.0
    assert "eval/reward_mean" not in metrics


def test_merge_steps() -> None:
    steps = [
        {"loss/policy": 1.0, "policy/logprob_gap_max": 0.1, "tokens/trained": 10, "time/step_s": 2},
        {"loss/policy": 3.0, "policy/logprob_gap_max": 0.3, "tokens/trained": 30, "time/step_s": 1},
        {"loss/policy": 2.0, "lr": 1e-6, "ratio/low_min": 0.5, "tokens/per_s": 4},
        {"loss/policy": 2.0, "lr": 3e-6, "ratio/low_min": 0.7, "tokens/per_s": 6},
    ]
    assert merge_steps(steps) == {
        "loss/policy": 2.0,
        "policy/logprob_gap_max": 0.3,
        "tokens/trained": 40.0,
        "time/step_s": 3.0,
        "lr": pytest.approx(2e-6),
        "ratio/low_min": 0.5,
        "tokens/per_s": 5.0,
    }
    assert merge_steps([]) == {}
