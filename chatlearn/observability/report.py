"""What a run prints at its end, read from its folder alone.

Print it with ``console().print(final_report(folder), soft_wrap=True)``: colours where there is a
terminal, plain text in a pipe, and paths that are never broken into two lines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.text import Text

from chatlearn.observability.chart import Series, chart
from chatlearn.observability.checkpoints import complete_checkpoints
from chatlearn.observability.jsonl import read_records
from chatlearn.observability.progress import duration
from chatlearn.types import Outcome

_WIDTH = 72
_TRAINING, _HELD_OUT = "cyan", "bold yellow"


def final_report(run_folder: str | Path) -> Text:
    """Rewards before and after, their curves, what it cost, what failed, where to look next.

    Whatever the run did not measure is left out; a run without a finished episode says so.
    """
    run = Path(run_folder).resolve()
    records = read_records(run / "metrics.jsonl")
    title = f" {run.parent.name} · {run.name} "
    report = Text("\n").append(f"{title:─^{_WIDTH}}\n\n", style="bold")
    if records:
        _append_rewards(report, records)
        _append_cost(report, records)
    else:
        report.append("  No episode was finished: there is nothing to report yet.\n\n")
    _append_links(report, run)
    return report


def _append_rewards(report: Text, records: Sequence[dict[str, Any]]) -> None:
    measured = _points(records, "reward/mean")
    window = max(1, min(10, len(measured) // 10))
    training = _smooth(measured, window)
    smoothed = f", mean of {window}" if window > 1 else ""
    held_out = _points(records, "eval/reward_mean")
    for label, points, style, note in (
        ("held-out reward", held_out, _HELD_OUT, ""),
        ("training reward", training, _TRAINING, smoothed),
    ):
        if points:
            _append_change(report, label, points, style, note)
    if not training and not held_out:
        report.append("  No rollout was scored: see the failures below.\n")
    report.append("\n")
    if len(training) > 1 or len(held_out) > 1:
        curves = [
            Series(f"training{smoothed}", training, _TRAINING),
            Series("held-out", held_out, _HELD_OUT, marker="●"),
        ]
        report.append_text(chart([c for c in curves if c.points], width=60, height=8))
        report.append("\n")


def _append_change(
    report: Text, label: str, points: list[tuple[float, float]], style: str, note: str
) -> None:
    (first, before), (last, after) = points[0], points[-1]
    report.append(f"  {label:<17}", style="bold")
    if len(points) == 1:
        report.append(f"{before:.3f}", style=style)
        report.append(f"   episode {first:.0f}\n", style="dim")
        return
    report.append(f"{before:.3f} → ")
    report.append(f"{after:.3f}", style=style)
    change = after - before
    report.append(f"   {change:+.3f}", style="green" if change > 0 else "red")
    report.append(f"   episodes {first:.0f} to {last:.0f}{note}\n", style="dim")


def _append_cost(report: Text, records: Sequence[dict[str, Any]]) -> None:
    seconds = _total(records, "time/episode_s")
    tokens = _total(records, "tokens/generated")
    report.append("  time             ", style="bold").append(duration(seconds))
    spent = {
        key.removeprefix("time/").removesuffix("_s"): _total(records, key)
        for key in sorted({k for r in records for k in r if k.startswith("time/")})
        if key != "time/episode_s"
    }
    if spent:
        parts = sorted(spent.items(), key=lambda item: -item[1])
        text = ", ".join(f"{stage} {duration(s)}" for stage, s in parts)
        report.append(f"   {text}", style="dim")
    rate = f", {tokens / seconds:,.0f} a second" if seconds > 0 else ""
    report.append("\n  tokens           ", style="bold").append(f"{tokens:,.0f} sampled{rate}\n")
    counts = {o: _total(records, f"outcome/{o.value}") for o in Outcome}
    if total := sum(counts.values()):
        report.append("  rollouts         ", style="bold").append(f"{total:,.0f}")
        for outcome, count in counts.items():
            if count:
                failed = not outcome.is_trainable
                word = outcome.value.replace("_", " ")
                report.append("   ").append(
                    f"{count:,.0f} {word}", style="red" if failed else "dim"
                )
        report.append("\n")
    report.append("\n")


def _append_links(report: Text, run: Path) -> None:
    shown = _from_here(run)
    links = [("run folder", shown)]
    if checkpoints := complete_checkpoints(run / "checkpoints"):
        links.append(("trained model", f"{shown}/checkpoints/{checkpoints[-1].name}/hf"))
    if any((run / "tensorboard").glob("*")):
        links.append(("curves", f"tensorboard --logdir {shown}/tensorboard"))
    if rollouts := sorted((run / "rollouts").glob("episode_*.jsonl*")):
        links.append(("last rollouts", f"{shown}/rollouts/{rollouts[-1].name}"))
    if (run / "run.log").exists():
        links.append(("log", f"{shown}/run.log"))
    report.append("  where to look next\n", style="bold")
    for label, target in links:
        report.append(f"    {label:<15}", style="dim").append(f"{target}\n")


def _points(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(episode, value) wherever ``key`` was measured; a null is a number that was not finite."""
    return [(float(r["episode"]), float(r[key])) for r in records if r.get(key) is not None]


def _smooth(points: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Means over ``window`` points, each at the last of them; a single episode is mostly noise."""
    return [
        (points[end - 1][0], fmean(y for _, y in points[end - window : end]))
        for end in range(window, len(points) + 1)
    ]


def _total(records: Sequence[dict[str, Any]], key: str) -> float:
    return float(sum(r.get(key) or 0 for r in records))


def _from_here(path: Path) -> str:
    """Relative to the working directory when that is shorter to read."""
    here = Path.cwd().resolve()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)
