"""Progress: a live bar in a terminal, lines in a pipe, silence when asked."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console
from rich.logging import RichHandler

from chatlearn.observability.progress import Live, Plain, Silent, duration, open_progress
from chatlearn.types import Completion, Outcome, StopReason, Trajectory, Turn


def rollout(tokens: int, outcome: Outcome = Outcome.FINISHED) -> Trajectory:
    completion = Completion([1] * tokens, [0.0] * tokens, StopReason.STOP, (0, 0))
    return Trajectory(turns=[Turn(0, None, [1], completion)], reward=1.0, outcome=outcome)


def terminal() -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=110, color_system=None, legacy_windows=False
    )


def drive(progress: Silent) -> None:
    progress.phase("rollout", expected=4)
    for _ in range(3):
        progress.rollout_done(rollout(1000))
    progress.rollout_done(rollout(500, Outcome.TIMEOUT))
    progress.episode_done(
        3, {"reward/mean": 0.5, "tokens/generated": 3500.0, "time/episode_s": 7.0}
    )


def test_a_terminal_gets_a_live_bar_with_counts() -> None:
    console = terminal()
    with open_progress(10, start=2, console=console) as progress:
        assert isinstance(progress, Live)
        assert "2/10" in shown(console)
        drive(progress)
        progress.phase("train")
        progress._display.refresh()
    text = shown(console)
    assert "3/10" in text
    assert "reward 0.500 · 500 tokens/s · 49s left" in text
    assert "train" in text


def test_the_stage_counts_rollouts_tokens_and_failures() -> None:
    console = terminal()
    with open_progress(10, console=console) as progress:
        progress.phase("rollout", expected=64)
        progress.rollout_done(rollout(18_000))
        progress.rollout_done(rollout(233, Outcome.AGENT_ERROR))
        progress._display.refresh()
        assert "2/64 rollouts · 18,233 tokens · 1 failed" in shown(console)


def test_log_lines_stand_whole_above_the_bar() -> None:
    console = terminal()
    handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
    log = logging.getLogger("tests.progress")
    log.addHandler(handler)
    try:
        with open_progress(10, console=console) as progress:
            progress.phase("rollout", expected=2)
            log.warning("a line of the log")
            progress.rollout_done(rollout(5))
    finally:
        log.removeHandler(handler)
    lines = shown(console).replace("\r", "\n").splitlines()
    (line,) = [line for line in lines if "a line of the log" in line]
    assert "━" not in line


def test_a_pipe_gets_lines_without_escapes(caplog: pytest.LogCaptureFixture) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    assert isinstance(open_progress(10, console=console), Plain)
    with caplog.at_level(logging.INFO), Plain(10, 2, interval_s=0) as progress:
        drive(progress)
    assert [r.getMessage() for r in caplog.records][-2:] == [
        "rollout: 4/4 rollouts · 3,500 tokens · 1 failed",
        "3/10 episodes · reward 0.500 · 500 tokens/s · 49s left",
    ]
    assert console.file.getvalue() == ""


def test_a_pipe_is_not_flooded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Plain(10, 0) as progress:
        drive(progress)
    assert caplog.records == []


def test_silent_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Silent() as progress:
        drive(progress)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (9.94, "9.9s"), (59.4, "59s"), (59.6, "1m 00s"), (7509, "2h 05m")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def shown(console: Console) -> str:
    return console.file.getvalue()
