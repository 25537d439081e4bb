"""Rollouts on disk: one trajectory a line, with every token, so that training can be replayed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chatlearn.errors import DataError
from chatlearn.observability.jsonl import read_records, to_line, write_atomically
from chatlearn.types import (
    Completion,
    Fork,
    Group,
    Outcome,
    Sample,
    StopReason,
    Task,
    Trajectory,
    Turn,
)


class Rollout(NamedTuple):
    """One line of a rollout file."""

    trajectory: Trajectory
    advantage: float | None
    """None where the trajectory was not trained."""
    samples: list[Sample]
    group: str
    """The same for siblings."""
    ticket: int
    """``Group.ticket``."""


def write_rollouts(
    path: Path,
    groups: Sequence[Group],
    advantages: Mapping[str, float],
    samples: Sequence[Sample],
) -> None:
    """Write the trajectories of ``groups`` in order, atomically.

    Args:
        path: the file, replaced when it exists.
        groups: what was rolled out, failed siblings included.
        advantages: by ``Trajectory.uid``; a trajectory that is not trained has none.
        samples: what the trainer was given of them; empty for an evaluation.

    Raises:
        ValueError: a sample or an advantage belongs to no trajectory of ``groups``.
    """
    by_trajectory: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_trajectory[sample.trajectory].append(sample)
    known = {trajectory.uid for group in groups for trajectory in group.trajectories}
    strangers = (by_trajectory.keys() | advantages.keys()) - known
    if strangers:
        raise ValueError(f"no group of {path.name} has the trajectories {sorted(strangers)[:3]}")

    def lines() -> Iterator[str]:
        for group in groups:
            for trajectory in group.trajectories:
                uid = trajectory.uid
                record = _record(group, trajectory, advantages.get(uid), by_trajectory[uid])
                yield to_line(record)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lines())


def read_rollouts(path: Path) -> list[Rollout]:
    """Rebuild what ``write_rollouts`` wrote.

    Raises:
        DataError: the file does not exist, or a line lacks a field.
    """
    if not path.exists():
        raise DataError(f"there is no rollout file {path}")
    rollouts = []
    for number, record in enumerate(read_records(path), start=1):
        try:
            rollouts.append(_rollout(record))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, trajectory {number}: {type(error).__name__}: {error}; "
                "the file was not written by this version of chatlearn"
            ) from error
    return rollouts


def _record(
    group: Group, trajectory: Trajectory, advantage: float | None, samples: list[Sample]
) -> dict[str, Any]:
    task = trajectory.task or group.task
    versions = [turn.completion.versions[0] for turn in trajectory.turns]
    return {
        "uid": trajectory.uid,
        "group": trajectory.uid.rpartition("/")[0] or task.uid,
        "ticket": group.ticket,
        "agent_name": task.agent_name,
        "version": min(versions, default=None),
        "outcome": trajectory.outcome.value,
        "reward": trajectory.reward,
        "advantage": advantage,
        "error": trajectory.error,
        "task": {
            "uid": task.uid,
            "agent_cfg_path": task.agent_cfg_path,
            "data_source": task.data_source,
            "ground_truth": task.ground_truth,
            "messages": task.messages,
            "fields": task.fields,
        },
        "messages": trajectory.messages,
        "metrics": {key: float(value) for key, value in trajectory.metrics.items()},
        "turns": [_turn_record(turn) for turn in trajectory.turns],
        "samples": [_sample_record(sample) for sample in samples],
    }


def _turn_record(turn: Turn) -> dict[str, Any]:
    return {
        "id": turn.id,
        "parent": turn.parent,
        "fork": turn.fork.value if turn.fork is not None else None,
        "node": turn.node,
        "checkpoint_ns": turn.checkpoint_ns,
        "step": turn.step,
        "send": turn.send,
        "thread": turn.thread,
        "tags": turn.tags,
        "temperature": turn.temperature,
        "prompt_ids": turn.prompt_ids,
        "prefilled": turn.prefilled,
        "completion_ids": turn.completion.token_ids,
        "logprobs": turn.completion.logprobs,
        "stop": turn.completion.stop_reason.value,
        "versions": turn.completion.versions,
        "tool_calls": turn.tool_calls,
        "reward": turn.reward,
        "excluded": turn.excluded,
        "timings": turn.timings,
    }


def _sample_record(sample: Sample) -> dict[str, Any]:
    record: dict[str, Any] = {
        "token_ids": sample.token_ids,
        "loss_mask": [int(trained) for trained in sample.loss_mask],
        "rollout_logprobs": sample.rollout_logprobs,
        "advantages": sample.advantages,
        "weight": sample.weight,
        "min_version": sample.min_version,
    }
    temperatures = _shortened(sample)
    if temperatures != 1.0:
        record["temperatures"] = temperatures
    return record


def _shortened(sample: Sample) -> float | list[float]:
    """One number where all trained tokens have it and all others 1.0, which is what a sample of one
    temperature looks like; else the list."""
    trained = {t for t, on in zip(sample.temperatures, sample.loss_mask, strict=True) if on}
    one = min(trained, default=1.0)
    return one if sample.temperatures == _spread(one, sample.loss_mask) else sample.temperatures


def _spread(temperature: float, loss_mask: Sequence[bool]) -> list[float]:
    return [temperature if trained else 1.0 for trained in loss_mask]


def _rollout(record: dict[str, Any]) -> Rollout:
    uid = record["uid"]
    trajectory = Trajectory(
        task=Task(agent_name=record["agent_name"], **record["task"]),
        turns=[_turn(turn) for turn in record["turns"]],
        reward=record["reward"],
        outcome=Outcome(record["outcome"]),
        metrics=record["metrics"],
        error=record["error"],
        messages=record["messages"],
        uid=uid,
    )
    samples = [_sample(sample, uid) for sample in record["samples"]]
    return Rollout(trajectory, record["advantage"], samples, record["group"], record["ticket"])


def _sample(record: dict[str, Any], uid: str) -> Sample:
    loss_mask = [bool(trained) for trained in record["loss_mask"]]
    temperatures = record.get("temperatures", 1.0)
    if not isinstance(temperatures, list):
        temperatures = _spread(temperatures, loss_mask)
    return Sample(
        token_ids=record["token_ids"],
        loss_mask=loss_mask,
        rollout_logprobs=record["rollout_logprobs"],
        advantages=record["advantages"],
        temperatures=temperatures,
        weight=record["weight"],
        trajectory=uid,
        min_version=record["min_version"],
    )


def _turn(record: dict[str, Any]) -> Turn:
    low, high = record["versions"]
    return Turn(
        id=record["id"],
        parent=record["parent"],
        prompt_ids=record["prompt_ids"],
        completion=Completion(
            token_ids=record["completion_ids"],
            logprobs=record["logprobs"],
            stop_reason=StopReason(record["stop"]),
            versions=(low, high),
        ),
        fork=Fork(record["fork"]) if record["fork"] is not None else None,
        prefilled=record["prefilled"],
        temperature=record["temperature"],
        node=record["node"],
        checkpoint_ns=record["checkpoint_ns"],
        step=record["step"],
        send=record["send"],
        thread=record["thread"],
        tags=tuple(record["tags"]),
        tool_calls=tuple(record["tool_calls"]),
        timings=record["timings"],
        reward=record["reward"],
        excluded=record["excluded"],
    )
