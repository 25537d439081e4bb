"""Numbers that describe rollouts: pure functions from groups to flat ``area/quantity`` keys.

A number that nothing was measured for is absent, never 0 (law 4): an episode in which every run
failed has no ``reward/mean``. Failures are counted under ``outcome/``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, pstdev

from chatlearn.types import Group, Outcome, StopReason, Trajectory, Turn

_TOOL_COUNTS = {
    "tool_calls": "tools/calls",
    "tool_errors": "tools/errors",
    "invalid_tool_calls": "tools/invalid_calls",
}
"""Keys of ``Trajectory.metrics`` that are summed over rollouts, and their names here."""

_SUPERSEDED = "superseded"
"""``Turn.excluded`` of a call whose node or runnable was tried again."""

_AGENT = "agent/"
"""Before names that the agent or its reward chose."""

PASS_THRESHOLD = 1.0
"""A task counts as passed when its best reward reaches this."""


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Describe one episode's rollouts.

    ``reward/*`` and ``response/*`` are over trainable trajectories, ``turns/*`` over those that
    made a call, ``tokens/*``, ``tools/*`` and ``outcome/*`` over all; ``agent/<key>`` is the mean
    of a metric the agent or its reward set, over the trajectories that set it, and
    ``checks/<name>`` the fraction of runs in which a check found something. See ``_tree`` for
    ``turns/*`` beside the mean and the maximum, and ``_nodes`` for ``node/<path>/*``.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    trained = [t for t in trajectories if t.is_trainable]
    rewards = [t.reward for t in trained if t.reward is not None]
    counts = [len(t.turns) for t in trajectories if t.turns]
    lengths = [t.sampled_tokens for t in trained]
    metrics: dict[str, float] = {}
    if rewards:
        metrics |= {"reward/mean": fmean(rewards), "reward/std": pstdev(rewards)}
    metrics |= _outcomes(trajectories, "outcome/")
    metrics["groups/count"] = float(len(groups))
    metrics["groups/zero_signal"] = float(sum(not group.has_signal for group in groups))
    metrics["tokens/generated"] = float(sum(t.sampled_tokens for t in trajectories))
    if counts:
        metrics |= {"turns/mean": fmean(counts), "turns/max": float(max(counts))}
        metrics |= _tree([turn for t in trajectories for turn in t.turns])
    for key, name in _TOOL_COUNTS.items():
        found = [t.metrics[key] for t in trajectories if key in t.metrics]
        if found:
            metrics[name] = float(sum(found))
    if trained:
        truncated = sum(t.outcome is Outcome.TRUNCATED for t in trained)
        metrics["response/truncated_fraction"] = truncated / len(trained)
        metrics["response/tokens_mean"] = fmean(lengths)
        metrics["response/tokens_max"] = float(max(lengths))
    return metrics | _nodes(trajectories) | _user_means(trajectories, _AGENT)


def advantage_metrics(advantages: Iterable[float]) -> dict[str, float]:
    """Spread of the advantages of an episode's trained rollouts: ``advantage/std`` and the largest
    magnitude, ``advantage/max``. Both are 0 where nothing can be learned."""
    values = list(advantages)
    if not values:
        return {}
    return {"advantage/std": pstdev(values), "advantage/max": max(map(abs, values))}


def eval_metrics(groups: Sequence[Group], k: int) -> dict[str, float]:
    """Describe an evaluation with ``k`` rollouts a task.

    ``eval/reward_mean`` (mean@k) is the mean over tasks of a task's mean reward, ``best_of_{k}``
    the mean of a task's best, ``pass@{k}`` the fraction of tasks whose best reaches
    ``PASS_THRESHOLD``. A failed rollout is left out and counted (``eval/failed``); a task with
    none left is left out too (``eval/tasks`` counts the others). ``eval/node/<path>/turns`` and
    ``tokens`` are over all rollouts.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    rewards: list[list[float]] = []
    by_source: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups:
        scores = [t.reward for t in group.trajectories if _is_scored(t) and t.reward is not None]
        if scores:
            rewards.append(scores)
            by_source[group.task.data_source].append(fmean(scores))
    scored = sum(map(_is_scored, trajectories))
    metrics = {
        "eval/tasks": float(len(rewards)),
        "eval/failed": float(len(trajectories) - scored),
    }
    if rewards:
        best = [max(scores) for scores in rewards]
        metrics["eval/reward_mean"] = fmean(map(fmean, rewards))
        metrics[f"eval/best_of_{k}"] = fmean(best)
        metrics[f"eval/pass@{k}"] = fmean(score >= PASS_THRESHOLD for score in best)
    for source, means in sorted(by_source.items()):
        metrics[f"eval/{source}/reward_mean"] = fmean(means)
    metrics |= _outcomes(trajectories, "eval/outcome/")
    for path, turns in _by_path(trajectories).items():
        metrics[f"eval/node/{path}/turns"] = float(len(turns))
        metrics[f"eval/node/{path}/tokens"] = _sampled(turns)
    return _user_means([t for t in trajectories if _is_scored(t)], "eval/") | metrics


def merge_steps(steps: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """One dict from those of several optimizer steps.

    ``*_max`` keeps the largest and ``*_min`` the smallest; ``tokens/*`` and ``time/*`` add up,
    except rates (``*per_s``); everything else is the mean over the steps that report it.
    """
    collected: defaultdict[str, list[float]] = defaultdict(list)
    for step in steps:
        for key, value in step.items():
            collected[key].append(float(value))
    return {key: _merge(key, values) for key, values in collected.items()}


def _merge(key: str, values: list[float]) -> float:
    if key.endswith(("_max", "/max")):
        return max(values)
    if key.endswith(("_min", "/min")):
        return min(values)
    if key.startswith(("tokens/", "time/")) and not key.endswith("per_s"):
        return sum(values)
    return fmean(values)


def _tree(turns: Sequence[Turn]) -> dict[str, float]:
    """How runs branched, and what of them is not trained.

    ``turns/forks`` counts turns that begin a branch, ``turns/forks_<reason>`` those of a reason
    that occurred, ``turns/superseded`` calls that were tried again, ``turns/excluded`` these and
    all others that are only context, ``tokens/excluded`` the tokens sampled in them.
    """
    forks = Counter(turn.fork.value for turn in turns if turn.fork is not None)
    excluded = [turn for turn in turns if turn.excluded]
    metrics = {"turns/forks": float(forks.total())}
    metrics |= {f"turns/forks_{reason}": float(n) for reason, n in sorted(forks.items())}
    metrics["turns/superseded"] = float(sum(turn.excluded == _SUPERSEDED for turn in excluded))
    metrics["turns/excluded"] = float(len(excluded))
    metrics["tokens/excluded"] = _sampled(excluded)
    return metrics


def _nodes(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """What each node of the graphs did, by the path of names down to it.

    ``turns``, ``tokens`` (sampled) and ``truncated_fraction`` (turns cut by a token limit) are over
    all trajectories; ``tokens_trained`` is over turns that are not excluded of the trainable ones.
    ``reward`` is the mean over rewarded turns of trainable trajectories where the node has any,
    else over the rewards of the trainable trajectories that came to it.
    """
    trainable = [t for t in trajectories if t.is_trainable]
    trained = _by_path(trainable)
    of_runs: defaultdict[str, list[float]] = defaultdict(list)
    for trajectory in trainable:
        for path in {turn.path for turn in trajectory.turns}:
            if trajectory.reward is not None:
                of_runs[path].append(trajectory.reward)
    metrics: dict[str, float] = {}
    for path, turns in _by_path(trajectories).items():
        own = [turn.reward for turn in trained.get(path, ()) if turn.reward is not None]
        rewards = own or of_runs[path]
        cut = sum(turn.completion.stop_reason is StopReason.LENGTH for turn in turns)
        metrics[f"node/{path}/turns"] = float(len(turns))
        metrics[f"node/{path}/tokens"] = _sampled(turns)
        metrics[f"node/{path}/tokens_trained"] = _sampled(
            turn for turn in trained.get(path, ()) if not turn.excluded
        )
        if rewards:
            metrics[f"node/{path}/reward"] = fmean(rewards)
        metrics[f"node/{path}/truncated_fraction"] = cut / len(turns)
    return metrics


def _by_path(trajectories: Iterable[Trajectory]) -> dict[str, list[Turn]]:
    """Turns that were made inside a graph, by ``Turn.path``, in the order of the paths."""
    found: defaultdict[str, list[Turn]] = defaultdict(list)
    for trajectory in trajectories:
        for turn in trajectory.turns:
            if turn.path:
                found[turn.path].append(turn)
    return dict(sorted(found.items()))


def _sampled(turns: Iterable[Turn]) -> float:
    return float(sum(len(turn.completion.token_ids) for turn in turns))


def _is_scored(trajectory: Trajectory) -> bool:
    return trajectory.outcome.is_trainable and trajectory.reward is not None


def _outcomes(trajectories: Iterable[Trajectory], prefix: str) -> dict[str, float]:
    counts = Counter(t.outcome for t in trajectories)
    return {f"{prefix}{outcome.value}": float(counts[outcome]) for outcome in Outcome}


def _user_means(trajectories: Iterable[Trajectory], prefix: str) -> dict[str, float]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        for key, value in trajectory.metrics.items():
            if key not in _TOOL_COUNTS:
                values[key].append(float(value))
    return {
        key if key.startswith("checks/") and prefix == _AGENT else prefix + key: fmean(found)
        for key, found in sorted(values.items())
    }
