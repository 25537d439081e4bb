"""The tracker: one record an episode, in every place, and none for an episode that failed."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from chatlearn.errors import ConfigError
from chatlearn.observability.jsonl import read_records
from chatlearn.observability.logs import setup_logging
from chatlearn.observability.tracker import TensorBoard, Tracker, WandB, episode_line


class Memory:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.written: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def write(self, episode: int, metrics: Mapping[str, float]) -> None:
        self.written.append((episode, dict(metrics)))

    def close(self) -> None:
        self.closed = True


def test_an_episode_is_one_line_with_merged_metrics_and_times(tmp_path: Path) -> None:
    memory = Memory()
    path = tmp_path / "metrics.jsonl"
    with Tracker(path, [memory]) as tracker:
        with tracker.episode(7) as log:
            for _ in range(2):
                with tracker.timer("rollout"):
                    time.sleep(0.02)
            log({"reward/mean": 0.5, "tokens/generated": 100})
            log({"loss/policy": 1.0, "policy/logprob_gap_max": 0.1})
            log({"loss/policy": 2.0, "policy/logprob_gap_max": 0.3})
        (record,) = read_records(path)  # on disk before the tracker is closed
    assert record["episode"] == 7
    assert record["loss/policy"] == 1.5
    assert record["policy/logprob_gap_max"] == 0.3
    assert 0.04 <= record["time/rollout_s"] <= record["time/episode_s"] < 5
    assert record["tokens/per_s"] == pytest.approx(100 / record["time/episode_s"])
    assert memory.written == [(7, {k: v for k, v in record.items() if k != "episode"})]
    assert memory.closed


def test_an_episode_that_fails_leaves_no_record(tmp_path: Path) -> None:
    memory = Memory()
    tracker = Tracker(tmp_path / "metrics.jsonl", [memory])

    def fail() -> None:
        with tracker.episode(1) as log:
            log({"reward/mean": 1.0})
            with tracker.timer("train"):
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    with tracker.episode(1) as log:
        log({"reward/mean": 0.0})
    tracker.close()
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert record["reward/mean"] == 0.0
    assert "time/train_s" not in record  # the failed attempt's time is not carried over
    assert len(memory.written) == 1


def test_a_half_written_line_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"episode":1}\n{"episode":2,"rew')
    with Tracker(path) as tracker, tracker.episode(2):
        pass
    assert [record["episode"] for record in read_records(path)] == [1, 2]


def test_a_number_json_cannot_say_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Tracker(path) as tracker, tracker.episode(1) as log:
        log({"policy/grad_norm": float("nan")})
    assert '"policy/grad_norm":null' in path.read_text()


def test_the_line_in_the_log() -> None:
    metrics = {"reward/mean": 0.53125, "tokens/per_s": 1834.2, "time/episode_s": 4.06}
    assert episode_line(12, metrics) == "episode 12  reward 0.531  tokens/s 1,834  4.1s"
    more = {"eval/reward_mean": 0.6, "policy/logprob_gap_max": 0.0012, "outcome/timeout": 2.0}
    assert episode_line(12, metrics | more) == (
        "episode 12  reward 0.531  eval 0.600  tokens/s 1,834  gap 0.0012  failed 2  4.1s"
    )


def test_run_log_gets_the_line(tmp_path: Path) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    setup_logging(tmp_path / "run.log")
    setup_logging(tmp_path / "run.log")  # again: still one line
    try:
        with Tracker(tmp_path / "metrics.jsonl") as tracker, tracker.episode(3) as log:
            log({"reward/mean": 0.25})
        assert (tmp_path / "run.log").read_text().count("episode 3  reward 0.250") == 1
    finally:
        for handler in [h for h in root.handlers if h not in before]:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is not None, reason="needs an environment without wandb"
)
def test_missing_wandb_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'chatlearn\[wandb\]'"):
        WandB(project="p", run=tmp_path)


def test_tensorboard_hides_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(first: int, last: int, value: float) -> None:
        sink = TensorBoard(tmp_path, first_episode=first)
        for episode in range(first, last + 1):
            sink.write(episode, {"reward/mean": value})
        sink.close()

    write(1, 4, 0.25)
    time.sleep(1.1)  # event files are ordered by the second in their names
    write(3, 5, 0.75)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("reward/mean")]
    assert found == [(1, 0.25), (2, 0.25), (3, 0.75), (4, 0.75), (5, 0.75)]
