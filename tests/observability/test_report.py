"""The report at the end of a run, read from nothing but its folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from chatlearn.observability.chart import Series, chart
from chatlearn.observability.report import final_report


def write_run(folder: Path, records: list[dict[str, float | None]]) -> Path:
    run = folder / "math" / "20260101-000000"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run


def record(episode: int, **more: float | None) -> dict[str, float | None]:
    return {
        "episode": episode,
        "reward/mean": episode / 10,
        "tokens/generated": 1000,
        "time/episode_s": 2.0,
        "time/rollout_s": 1.5,
        "outcome/finished": 7,
        "outcome/timeout": 1,
    } | more


def test_a_run_with_evaluations(tmp_path: Path) -> None:
    before = {"episode": 0, "eval/reward_mean": 0.2, "time/episode_s": 1.0}
    records = [before, *(record(n) for n in range(1, 5)), record(5, **{"eval/reward_mean": 0.7})]
    run = write_run(tmp_path, records)
    for file in (
        "checkpoints/episode_000002/hf/model",
        "checkpoints/episode_000005/hf/model",
        "checkpoints/episode_000006.tmp/hf/model",
        "tensorboard/events",
        "rollouts/episode_000005.jsonl",
        "rollouts/eval_000005.jsonl",
    ):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).touch()
    text = final_report(run).plain
    assert "held-out reward  0.200 → 0.700   +0.500   episodes 0 to 5\n" in text
    assert "training reward  0.100 → 0.500   +0.400   episodes 1 to 5\n" in text
    assert "time             11s   rollout 7.5s\n" in text
    assert "tokens           5,000 sampled, 455 a second\n" in text
    assert "rollouts         40   35 finished   5 timeout\n" in text
    assert f"run folder     {run}\n" in text
    assert f"trained model  {run}/checkpoints/episode_000005/hf\n" in text
    assert f"tensorboard --logdir {run}/tensorboard\n" in text
    assert f"last rollouts  {run}/rollouts/episode_000005.jsonl\n" in text
    assert text.count("●") == 3  # two evaluations and the legend


def test_a_run_without_evaluation_smooths_the_training_reward(tmp_path: Path) -> None:
    text = final_report(write_run(tmp_path, [record(n) for n in range(1, 31)])).plain
    assert "held-out" not in text
    assert "training reward  0.200 → 2.900   +2.700   episodes 3 to 30, mean of 3" in text


def test_a_run_of_one_episode_has_no_curve(tmp_path: Path) -> None:
    text = final_report(write_run(tmp_path, [record(1)])).plain
    assert "training reward  0.100   episode 1\n" in text
    assert "┤" not in text


def test_a_run_that_never_scored(tmp_path: Path) -> None:
    failed = {"episode": 1, "reward/mean": None, "time/episode_s": 1.0, "outcome/timeout": 8}
    text = final_report(write_run(tmp_path, [failed])).plain
    assert "No rollout was scored" in text
    assert "8   8 timeout" in text


def test_a_run_without_episodes(tmp_path: Path) -> None:
    assert "No episode was finished" in final_report(write_run(tmp_path, [])).plain


@pytest.mark.parametrize("is_terminal", [True, False])
def test_printing_breaks_no_path(tmp_path: Path, is_terminal: bool) -> None:
    run = write_run(tmp_path / ("deep" * 30), [record(1), record(2)])
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
    console.print(final_report(run), soft_wrap=True)
    assert str(run) in console.file.getvalue()
    assert ("\x1b[" in console.file.getvalue()) is is_terminal


def test_a_chart_is_what_it_is_drawn_as() -> None:
    """A line from the lower left to the upper right, and one marker at the top."""
    rising = Series("rising", [(0, 0.0), (1, 1.0)], "")
    best = Series("best", [(0.0, 1.0)], "", marker="●")
    drawn = chart([rising, best], width=16, height=4).plain
    assert drawn.splitlines() == [
        "    1.00 ┤●           ⣀⠤⠒⠉",
        "         │        ⣀⠤⠒⠉",
        "    0.33 ┤    ⣀⠤⠒⠉",
        "    0.00 ┤⣀⠤⠒⠉",
        "         └────────────────",
        "          0              1",
        "          ⠤⠤ rising   ● best",
    ]


def test_a_flat_curve_is_drawn_in_the_middle() -> None:
    lines = chart([Series("flat", [(1, 0.5), (9, 0.5)], "")], width=10, height=5).plain
    assert "1.00" in lines
    assert "0.00" in lines
