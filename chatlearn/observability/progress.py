"""What a person watching a run sees: a live bar in a terminal, log lines in a pipe, or nothing.

The three kinds have the same methods, so no caller asks which one it has::

    with open_progress(num_episode=100, start=20) as progress:
        progress.phase("rollout", expected=64)
        progress.rollout_done(trajectory)
        progress.episode_done(21, metrics)
"""

from __future__ import annotations

import logging
import os
import pdb
import sys
import time
from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from chatlearn.observability.logs import console as shared_console
from chatlearn.types import Trajectory

logger = logging.getLogger(__name__)

_WINDOW = 10
"""Episodes of the moving averages."""
_PLAIN_INTERVAL_S = 30.0
"""Least time between two lines where there is no terminal."""


class Silent:
    """No progress at all; also the description of what progress can be told."""

    def phase(self, label: str, *, expected: int | None = None) -> None:
        """A stage of the episode begins: rollout, train, evaluate, save.

        ``expected`` is how many rollouts it will finish, None where that is not known.
        """

    def rollout_done(self, trajectory: Trajectory) -> None:
        """One agent run ended, well or badly."""

    def episode_done(self, episode: int, metrics: Mapping[str, float]) -> None:
        """An episode ended with ``metrics`` (flat ``area/quantity`` keys)."""

    def close(self) -> None:
        """Leave the terminal as it was."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Counting(Silent):
    """What the live bar and the plain lines both count."""

    def __init__(self, num_episode: int, start: int) -> None:
        self._num_episode, self._episode = num_episode, start
        self._rewards: deque[float] = deque(maxlen=_WINDOW)
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self._tokens: deque[float] = deque(maxlen=_WINDOW)
        self._label = ""
        self._expected: int | None = None
        self._rollouts = self._sampled = self._failed = 0

    def phase(self, label: str, *, expected: int | None = None) -> None:
        self._label, self._expected = label, expected
        self._rollouts = self._sampled = self._failed = 0

    def rollout_done(self, trajectory: Trajectory) -> None:
        self._rollouts += 1
        self._sampled += trajectory.sampled_tokens
        self._failed += not trajectory.outcome.is_trainable

    def episode_done(self, episode: int, metrics: Mapping[str, float]) -> None:
        self._episode = episode
        if "reward/mean" in metrics:
            self._rewards.append(metrics["reward/mean"])
        if "tokens/generated" in metrics:  # an evaluation alone says nothing about the pace
            self._seconds.append(metrics.get("time/episode_s", 0.0))
            self._tokens.append(metrics["tokens/generated"])

    def _standing(self) -> str:
        """``reward 0.531 · 1,834 tokens/s · 3m 12s left``"""
        parts = []
        if self._rewards:
            parts.append(f"reward {fmean(self._rewards):.3f}")
        if sum(self._seconds) > 0:
            parts.append(f"{sum(self._tokens) / sum(self._seconds):,.0f} tokens/s")
            left = (self._num_episode - self._episode) * fmean(self._seconds)
            parts.append(f"{duration(left)} left")
        return " · ".join(parts)

    def _inside(self) -> str:
        """``41/64 rollouts · 18,233 tokens · 2 failed``"""
        if not self._rollouts and self._expected is None:
            return ""
        of = f"/{self._expected}" if self._expected is not None else ""
        text = f"{self._rollouts}{of} rollouts · {self._sampled:,} tokens"
        return f"{text} · {self._failed} failed" if self._failed else text


class Live(_Counting):
    """A bar over the episodes and a line for what is going on inside the current one."""

    def __init__(self, num_episode: int, start: int, console: Console) -> None:
        super().__init__(num_episode, start)
        self._display = Progress(
            SpinnerColumn(style="cyan", finished_text="[green]✓"),
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24, complete_style="cyan", finished_style="green"),
            TextColumn("[cyan]{task.fields[count]}"),
            TextColumn("{task.fields[text]}", style="dim", markup=False),
            console=console,
        )
        self._bar = self._display.add_task(
            "episodes",
            total=num_episode,
            completed=start,
            count=f"{start}/{num_episode}",
            text="",
        )
        self._stage = self._display.add_task("", total=None, visible=False, count="", text="")
        self._breakpointhook = sys.breakpointhook
        sys.breakpointhook = self._stop_at_breakpoint
        self._display.start()

    def phase(self, label: str, *, expected: int | None = None) -> None:
        super().phase(label, expected=expected)
        self._display.reset(self._stage, total=expected, description=label, visible=True)
        self._refresh()

    def rollout_done(self, trajectory: Trajectory) -> None:
        super().rollout_done(trajectory)
        self._refresh()

    def episode_done(self, episode: int, metrics: Mapping[str, float]) -> None:
        super().episode_done(episode, metrics)
        self._display.update(
            self._bar,
            completed=episode,
            count=f"{episode}/{self._num_episode}",
            text=self._standing(),
        )
        self._display.update(self._stage, visible=False)

    def close(self) -> None:
        self._display.update(self._stage, visible=False)
        self._display.stop()
        sys.breakpointhook = self._breakpointhook

    def _stop_at_breakpoint(self, *args: Any, **kwargs: Any) -> Any:
        """``breakpoint()`` in an agent: the debugger needs the terminal, so the bar ends here."""
        self._display.stop()
        if args or kwargs or "PYTHONBREAKPOINT" in os.environ:
            return self._breakpointhook(*args, **kwargs)
        # Not through the default hook, which would stop in this frame instead of the agent's.
        return pdb.Pdb().set_trace(sys._getframe(1))

    def _refresh(self) -> None:
        self._display.update(self._stage, completed=self._rollouts, text=self._inside())


class Plain(_Counting):
    """Log lines, at most one every half minute: for pipes, CI and log collectors.

    The line of a finished episode is the tracker's.
    """

    def __init__(
        self, num_episode: int, start: int, *, interval_s: float = _PLAIN_INTERVAL_S
    ) -> None:
        super().__init__(num_episode, start)
        self._interval_s = interval_s
        self._said_at = time.monotonic()

    def rollout_done(self, trajectory: Trajectory) -> None:
        super().rollout_done(trajectory)
        self._say(f"{self._label}: {self._inside()}")

    def episode_done(self, episode: int, metrics: Mapping[str, float]) -> None:
        super().episode_done(episode, metrics)
        self._say(f"{episode}/{self._num_episode} episodes · {self._standing()}")

    def _say(self, line: str) -> None:
        now = time.monotonic()
        if now - self._said_at >= self._interval_s:
            self._said_at = now
            logger.info("%s", line)


def open_progress(num_episode: int, *, start: int = 0, console: Console | None = None) -> Silent:
    """Live in a terminal, plain lines elsewhere.

    Args:
        num_episode: episodes of the whole run.
        start: episodes done before this process began.
        console: the one that log lines go to; the process's shared one by default.
    """
    console = console or shared_console()
    if console.is_terminal and not console.is_dumb_terminal:
        return Live(num_episode, start, console)
    return Plain(num_episode, start)


def duration(seconds: float) -> str:
    """``4.2s``, ``3m 12s``, ``2h 05m``."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
