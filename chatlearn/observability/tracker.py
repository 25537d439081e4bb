"""Metrics of a run, one record an episode, to every place that was asked for.

    with tracker.episode(12) as log:
        with tracker.timer("rollout"):
            ...
        log(rollout_metrics(groups))
        for step in steps:
            log(await trainer.step(step))

What is logged under one key several times in an episode is merged as ``metrics.merge_steps`` says.
An episode that ends by an exception leaves no record: it will be run again.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from chatlearn.errors import ConfigError
from chatlearn.observability.jsonl import to_line
from chatlearn.observability.metrics import merge_steps
from chatlearn.observability.progress import Silent, duration
from chatlearn.types import Outcome, Trajectory

logger = logging.getLogger(__name__)

Log = Callable[[Mapping[str, float]], None]


class Sink(Protocol):
    """A place metrics are sent to."""

    def write(self, episode: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Collects the metrics of an episode and sends them to ``metrics.jsonl``, the log and sinks.

    Args:
        metrics_file: gets one object an episode, synced to disk before the episode counts as done.
        sinks: ``TensorBoard`` and ``WandB`` when they are on; off is not being in the list.
        progress: is told phases and finished episodes.
    """

    def __init__(
        self, metrics_file: Path, sinks: Sequence[Sink] = (), *, progress: Silent | None = None
    ) -> None:
        self._sinks: list[Sink] = [JsonLines(metrics_file), *sinks]
        self._progress = progress or Silent()
        self._times: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def episode(self, episode: int) -> Iterator[Log]:
        """Around one episode; yields ``log(metrics)``. Written when the block ends well."""
        logged: list[Mapping[str, float]] = []
        self._times.clear()
        began = time.perf_counter()
        yield logged.append
        seconds = time.perf_counter() - began
        metrics = merge_steps(logged) | dict(self._times) | {"time/episode_s": seconds}
        if "tokens/generated" in metrics:
            metrics["tokens/per_s"] = metrics["tokens/generated"] / max(seconds, 1e-9)
        for sink in self._sinks:
            sink.write(episode, metrics)
        logger.info("%s", episode_line(episode, metrics))
        self._progress.episode_done(episode, metrics)

    @contextmanager
    def timer(self, stage: str, *, expected: int | None = None) -> Iterator[None]:
        """Time a stage of the current episode as ``time/{stage}_s``, and show it as the phase.

        A stage entered twice adds up. ``expected`` is how many rollouts the stage will finish.
        """
        self._progress.phase(stage, expected=expected)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._times[f"time/{stage}_s"] += time.perf_counter() - began

    def rollout_done(self, trajectory: Trajectory) -> None:
        """One agent run ended; shown while the episode is under way."""
        self._progress.rollout_done(trajectory)

    def close(self) -> None:
        """Flush and close every sink."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def episode_line(episode: int, metrics: Mapping[str, float]) -> str:
    """The one line a reader of the log needs; a part that was not measured is left out."""
    parts = [f"episode {episode}"]
    for label, key, shape in (
        ("reward", "reward/mean", ".3f"),
        ("eval", "eval/reward_mean", ".3f"),
        ("tokens/s", "tokens/per_s", ",.0f"),
        ("gap", "policy/logprob_gap_max", ".2g"),
    ):
        if key in metrics:
            parts.append(f"{label} {metrics[key]:{shape}}")
    failed = sum(metrics.get(f"outcome/{o.value}", 0) for o in Outcome if not o.is_trainable)
    if failed:
        parts.append(f"failed {failed:.0f}")
    parts.append(duration(metrics["time/episode_s"]))
    return "  ".join(parts)


class JsonLines:
    """``metrics.jsonl``: ``{"episode": 12, "reward/mean": 0.5, ...}``, one object a line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":  # a killed process left half a line
                self._file.write(b"\n")

    def write(self, episode: int, metrics: Mapping[str, float]) -> None:
        self._file.write(to_line({"episode": episode, **metrics}).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars under ``folder``, step = episode.

    Args:
        folder: event files go here.
        first_episode: points from here on, left by a process that was killed, are hidden.
    """

    def __init__(self, folder: Path, *, first_episode: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_episode or None)

    def write(self, episode: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, global_step=episode)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; the episode is a metric and the x-axis of all others.

    The step of W&B is not used: it only grows, and a resumed run goes back a few episodes.

    Args:
        project: W&B project.
        run: the run folder; W&B's files and, by default, its id and name are those of the run, so
            that a resumed run continues the same curves.
        name: display name.
        run_id: continues another W&B run than that of the folder.
        folder: where W&B keeps its files.
        resume: ``wandb.init(resume=...)``.
        config: shown beside the curves.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(
        self,
        *,
        project: str,
        run: Path,
        name: str | None = None,
        run_id: str | None = None,
        folder: str | Path | None = None,
        resume: str = "allow",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            from wandb import init  # a folder called wandb would import, but has no init
        except ImportError as error:
            raise ConfigError(
                "runtime_args.log_args_dict.enable_wandb is True, but wandb is not installed: "
                "pip install 'chatlearn[wandb]', or set it to False"
            ) from error
        title = f"{run.resolve().parent.name}-{run.resolve().name}"
        self._run = init(
            project=project,
            id=run_id or title,
            name=name or title,
            dir=str(folder or run),
            config=dict(config or {}),
            resume=resume,
        )
        self._run.define_metric("episode")
        self._run.define_metric("*", step_metric="episode")

    def write(self, episode: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"episode": episode, **metrics})

    def close(self) -> None:
        self._run.finish()
