"""Metrics by hand, for examples small enough to draw."""

from __future__ import annotations

import pytest

from chatlearn.observability.metrics import eval_metrics, merge_steps, rollout_metrics
from chatlearn.types import Completion, Fork, Group, Outcome, StopReason, Task, Trajectory, Turn


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
        "turns/forks": 0.0,
        "turns/superseded": 0.0,
        "turns/excluded": 0.0,
        "tokens/excluded": 0.0,
        "tools/calls": 6.0,
        "tools/errors": 0.0,
        "response/truncated_fraction": pytest.approx(1 / 3),
        "response/tokens_mean": 5.0,
        "response/tokens_max": 10.0,
        "agent/answered": 0.5,
    }


def said(tokens: int, path: str = "", cut: bool = False, **fields: object) -> Turn:
    """A turn of node ``path`` that sampled ``tokens``."""
    stop = StopReason.LENGTH if cut else StopReason.STOP
    completion = Completion([5] * tokens, [-1.0] * tokens, stop, (0, 0))
    names = "|".join(f"{name}:4f2a" for name in path.split("/")) if path else ""
    return Turn(0, None, [1], completion, checkpoint_ns=names, **fields)


def drawn() -> list[Group]:
    """One group of three; x failed, so that nothing of it is trained.

    ::

        run 0, reward 1   plan 4 ─┬─ team/write 3 (superseded)
                                  ├─ team/write 5 (branch)            own reward 0.25
                                  └─ judge 2 (fresh, not trained)
        run 1, reward 0   plan 6 (cut) ── team/write 7 (branch)       own reward 0.5
        run x             plan 9 (edited) ── 1, outside of a graph
    """
    runs = [
        [
            said(4, "plan"),
            said(3, "team/write", excluded="superseded"),
            said(5, "team/write", fork=Fork.BRANCH, reward=0.25),
            said(2, "judge", fork=Fork.FRESH, excluded="node judge is not trained"),
        ],
        [
            said(6, "plan", cut=True),
            said(7, "team/write", fork=Fork.BRANCH, reward=0.5),
        ],
        [said(9, "plan", fork=Fork.EDITED), said(1)],
    ]
    return [
        Group(
            task("a"),
            [
                Trajectory(turns=runs[0], reward=1.0),
                Trajectory(turns=runs[1], reward=0.0),
                Trajectory(turns=runs[2], reward=5.0, outcome=Outcome.AGENT_ERROR),
            ],
        )
    ]


def test_forks_and_excluded_turns_are_counted() -> None:
    metrics = rollout_metrics(drawn())
    assert {k: v for k, v in metrics.items() if k.startswith(("turns/", "tokens/"))} == {
        "turns/mean": pytest.approx(8 / 3),
        "turns/max": 4.0,
        "turns/forks": 4.0,
        "turns/forks_branch": 2.0,
        "turns/forks_edited": 1.0,
        "turns/forks_fresh": 1.0,
        "turns/superseded": 1.0,
        "turns/excluded": 2.0,
        "tokens/generated": 37.0,
        "tokens/excluded": 5.0,
    }


def test_each_node_has_numbers_of_its_own() -> None:
    metrics = rollout_metrics(drawn())
    assert {k: v for k, v in metrics.items() if k.startswith("node/")} == {
        "node/plan/turns": 3.0,
        "node/plan/tokens": 19.0,
        "node/plan/tokens_trained": 10.0,
        "node/plan/reward": 0.5,  # of the runs; the failed one's says nothing
        "node/plan/truncated_fraction": pytest.approx(1 / 3),
        "node/team/write/turns": 3.0,
        "node/team/write/tokens": 15.0,
        "node/team/write/tokens_trained": 12.0,
        "node/team/write/reward": 0.375,  # its own two
        "node/team/write/truncated_fraction": 0.0,
        "node/judge/turns": 1.0,
        "node/judge/tokens": 2.0,
        "node/judge/tokens_trained": 0.0,
        "node/judge/reward": 1.0,  # of the one run that came to it
        "node/judge/truncated_fraction": 0.0,
    }


def test_a_node_of_failed_runs_has_no_reward() -> None:
    failed = Trajectory(turns=[said(2, "plan")], outcome=Outcome.TIMEOUT)
    metrics = rollout_metrics([Group(task("a"), [failed])])
    assert {k: v for k, v in metrics.items() if k.startswith("node/")} == {
        "node/plan/turns": 1.0,
        "node/plan/tokens": 2.0,
        "node/plan/tokens_trained": 0.0,
        "node/plan/truncated_fraction": 0.0,
    }


def test_an_evaluation_counts_turns_and_tokens_of_nodes() -> None:
    metrics = eval_metrics(drawn(), k=3)
    assert {k: v for k, v in metrics.items() if k.startswith("eval/node/")} == {
        "eval/node/plan/turns": 3.0,
        "eval/node/plan/tokens": 19.0,
        "eval/node/team/write/turns": 3.0,
        "eval/node/team/write/tokens": 15.0,
        "eval/node/judge/turns": 1.0,
        "eval/node/judge/tokens": 2.0,
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
