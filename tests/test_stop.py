"""``chatlearn stop`` ends one run, and only that."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest


@pytest.fixture
def stop(project):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "chatlearn", "stop", *arguments]
        return subprocess.run(command, cwd=project.folder, capture_output=True, text=True)

    return run


def started(project, name: str) -> subprocess.Popen[bytes]:
    run = project.start(
        "runtime_args.num_episode=100000",
        "runtime_args.save_episode_interval=0",
        f"runtime_args.exp_name={name}",
    )
    while "episode 2 " not in (project.folder / "out.txt").read_text():
        assert run.poll() is None, (project.folder / "out.txt").read_text()
        time.sleep(0.1)
    return run


@pytest.fixture
def background():
    """As in a script's ``command &``, whose shell has the command ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_run_in_the_background_ends_in_order(project, stop, background):
    run = started(project, "background")
    try:
        assert stop().returncode == 0
        assert run.wait(5) == 130
        assert "Interrupted." in (project.folder / "out.txt").read_text()
    finally:
        run.kill()


def test_the_named_run_ends_in_order_and_the_other_goes_on(project, stop):
    first, second = started(project, "first"), started(project, "second")
    try:
        several = stop()
        assert several.returncode == 1
        assert "2 runs are going on under outputs; name one of them" in several.stderr

        done = stop("outputs/first")
        assert done.returncode == 0, done.stderr
        assert "outputs/first" in done.stdout
        assert first.wait(5) == 130
        assert second.poll() is None

        assert stop().returncode == 0  # now there is only one
        assert second.wait(5) == 130
    finally:
        first.kill()
        second.kill()


def test_nothing_to_stop_says_so(stop, tmp_path):
    done = stop(str(tmp_path))
    assert done.returncode == 1
    assert f"no runs are going on under {tmp_path}" in done.stderr
