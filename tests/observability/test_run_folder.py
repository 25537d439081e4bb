"""The run folder: which run is continued, what survives a kill, what is never overwritten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from chatlearn.errors import CheckpointError, ConfigError, DataError
from chatlearn.observability.checkpoints import (
    complete_checkpoints,
    read_loop_state,
    write_loop_state,
)
from chatlearn.observability.jsonl import read_records
from chatlearn.observability.rollout_files import read_rollouts
from chatlearn.observability.run_folder import RunFolder
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

CONFIG = "runtime_args: {seed: 1, exp_name: math}\n"


def open_run(tmp_path: Path, *, resume: bool = True, config: str = CONFIG) -> RunFolder:
    return RunFolder.open(tmp_path, "math", resume=resume, config_text=config)


def save(run: RunFolder, episode: int, *, keep: int | None = None, disk: str | None = None) -> None:
    with run.write_checkpoint(episode, keep=keep) as folder:
        (folder / "hf").mkdir()
        if disk is not None:
            (folder / "hf" / "model.safetensors").symlink_to(disk)
        (folder / "hf" / "model.safetensors").write_text("weights")
        write_loop_state(folder, {"episode": episode})


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A real process; it prints a line when it has come to the interesting place."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


# ---------------------------------------------------------------- which run


def test_first_run_is_new_and_latest_points_at_it(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        assert run.said == f"New run {run.path}."
        assert run.path.parent == tmp_path / "math"
        assert (tmp_path / "math" / "latest").resolve() == run.path.resolve()
        assert (run.path / "config.yaml").read_text() == CONFIG
        assert run.checkpoint is None
        assert run.changed == []


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    paths = []
    for _ in range(12):  # fast enough that some share a second
        with open_run(tmp_path, resume=False) as run:
            paths.append(run.path)
    assert len(set(paths)) == 12
    assert any(path.name.count("-") == 2 for path in paths)
    assert (tmp_path / "math" / "latest").resolve() == paths[-1].resolve()
    with open_run(tmp_path) as run:  # "-10" is newer than "-9"
        assert run.path == paths[-1]


def test_an_unfinished_run_is_continued_from_its_checkpoint(tmp_path: Path) -> None:
    with open_run(tmp_path) as first:
        save(first, 10)
        save(first, 20)
    with open_run(tmp_path) as second:
        assert second.path == first.path
        assert second.said == f"Continuing {first.path} from episode 20 of its checkpoint."
        assert second.checkpoint == first.path / "checkpoints" / "episode_000020"
        assert read_loop_state(second.checkpoint) == {"episode": 20}


def test_an_unfinished_run_without_checkpoint_says_so(tmp_path: Path) -> None:
    with open_run(tmp_path) as first:
        pass
    with open_run(tmp_path) as second:
        assert second.said == f"Continuing {first.path} from its start: it has no checkpoint yet."


def test_a_finished_run_is_never_continued(tmp_path: Path) -> None:
    with open_run(tmp_path) as first:
        first.finish()
    with open_run(tmp_path) as second:
        assert second.path != first.path
        assert second.said == (
            f"The newest run {first.path} is finished; starting a new one: {second.path}."
        )


def test_resume_false_starts_a_new_run(tmp_path: Path) -> None:
    with open_run(tmp_path) as first:
        save(first, 10)
    with open_run(tmp_path, resume=False) as second:
        assert second.path != first.path
        assert second.checkpoint is None


def test_changed_settings_are_listed_and_the_old_file_is_kept(tmp_path: Path) -> None:
    old = "a: {lr: 1.0e-6, layers: [1, 2], gone: null}\nname: x\n"
    new = "a: {lr: 2.0e-6, layers: [1, 2]}\nname: x\nadded: {deep: true}\n"
    with open_run(tmp_path, config=old):
        pass
    with open_run(tmp_path, config=new) as run:
        assert run.changed == [
            "a.gone: null -> (absent)",
            "a.lr: 1e-06 -> 2e-06",
            "added.deep: (absent) -> true",
        ]
        assert (run.path / "config.1.yaml").read_text() == old
        assert (run.path / "config.yaml").read_text() == new
    with open_run(tmp_path, config=old) as run:
        assert (run.path / "config.2.yaml").read_text() == new
    with open_run(tmp_path, config=yaml.safe_dump(yaml.safe_load(old))) as run:
        assert run.changed == []  # another spelling of the same settings
        assert not (run.path / "config.3.yaml").exists()


# ---------------------------------------------------------------- the lock

HOLD = """
import sys, time
from chatlearn.observability.run_folder import RunFolder
run = RunFolder.open(sys.argv[1], "math", resume=True, config_text="a: 1")
print("open", flush=True)
time.sleep(60)
"""


def test_two_processes_do_not_write_one_run_and_a_kill_frees_it(tmp_path: Path) -> None:
    other = python(HOLD, tmp_path)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ConfigError, match=rf"written by process {other.pid} on .*exp_name"):
            open_run(tmp_path)
        with open_run(tmp_path, resume=False):
            pass  # a folder of its own is allowed
    finally:
        other.kill()
        other.communicate()
    with open_run(tmp_path) as run:
        assert run.said.startswith("Continuing")


# ---------------------------------------------------------------- checkpoints

DIE_WHILE_WRITING = """
import sys, time
from chatlearn.observability.run_folder import RunFolder
run = RunFolder.open(sys.argv[1], "math", resume=True, config_text="a: 1")
with run.write_checkpoint(10) as folder:
    (folder / "model").write_text("ten")
with run.write_checkpoint(20) as folder:
    (folder / "model").write_text("twen")
    print("writing", flush=True)
    time.sleep(60)
"""

WRITE_FOREVER = """
import sys
from chatlearn.observability.run_folder import RunFolder
run = RunFolder.open(sys.argv[1], "math", resume=True, config_text="a: 1")
episode = 0 if run.checkpoint is None else int(run.checkpoint.name[-6:])
while True:
    episode += 1
    with run.write_checkpoint(episode, keep=2) as folder:
        for part in range(8):
            (folder / f"part{part}").write_text(f"{episode} " * 20_000)
    if episode % 3 == 0:  # the last episode of a run may be saved twice
        with run.write_checkpoint(episode, keep=2) as folder:
            for part in range(8):
                (folder / f"part{part}").write_text(f"{episode} " * 20_000)
    print(episode, flush=True)
"""


def test_kill_while_writing_leaves_the_earlier_checkpoint_the_newest(tmp_path: Path) -> None:
    process = python(DIE_WHILE_WRITING, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder = tmp_path / "math" / "latest" / "checkpoints"
    assert {p.name for p in folder.iterdir()} == {"episode_000010", "episode_000020.tmp"}
    assert [p.name for p in complete_checkpoints(folder)] == ["episode_000010"]
    with open_run(tmp_path) as run:
        assert run.said.endswith("from episode 10 of its checkpoint.")
        assert (run.checkpoint / "model").read_text() == "ten"
        assert {p.name for p in folder.iterdir()} == {"episode_000010"}  # leftovers are gone


def test_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    newest = 0
    for delay in (0.0, 0.003, 0.011, 0.023, 0.041):
        process = python(WRITE_FOREVER, tmp_path)
        assert process.stdout is not None
        newest = int(process.stdout.readline())
        time.sleep(delay)
        process.kill()
        newest = max([newest, *map(int, process.communicate()[0].split())])
        with open_run(tmp_path) as run:
            folder = run.path / "checkpoints"
            found = complete_checkpoints(folder)
            assert set(folder.iterdir()) == set(found)
            assert int(found[-1].name[-6:]) >= newest
            for checkpoint in found:
                text = f"{int(checkpoint.name[-6:])} " * 20_000
                assert [(checkpoint / f"part{i}").read_text() == text for i in range(8)] == [
                    True
                ] * 8


def test_a_checkpoint_replaced_when_killed_between_the_renames_comes_back(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        save(run, 10)
        run.checkpoint.rename(run.checkpoint.with_suffix(".replaced"))
    with open_run(tmp_path) as run:
        assert read_loop_state(run.checkpoint) == {"episode": 10}


def test_keep_prunes_the_oldest(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        for episode in (1, 2, 3, 4):
            save(run, episode, keep=2)
        names = sorted(p.name for p in (run.path / "checkpoints").iterdir())
        assert names == ["episode_000003", "episode_000004"]


def test_full_disk_is_named_and_harms_nothing(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        save(run, 10)
        with pytest.raises(CheckpointError) as caught:
            save(run, 20, disk="/dev/full")  # the kernel answers ENOSPC to a write there
        message = str(caught.value)
        assert "episode_000020" in message
        assert "No space left on device" in message
        assert "bytes free" in message
        assert f"intact; the newest is {run.checkpoint}" in message
        assert "run the same command again" in message
        assert {p.name for p in (run.path / "checkpoints").iterdir()} == {"episode_000010"}


LIMITED = """
import resource, sys
from chatlearn.errors import CheckpointError
from chatlearn.observability.run_folder import RunFolder
run = RunFolder.open(sys.argv[1], "math", resume=True, config_text="a: 1")
with run.write_checkpoint(10) as folder:
    (folder / "model").write_bytes(b"0" * 60_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # the disk is full now
try:
    with run.write_checkpoint(20) as folder:
        (folder / "model").write_bytes(b"0" * 60_000)
except CheckpointError as error:
    print(error)
print(sorted(p.name for p in (run.path / "checkpoints").iterdir()), run.checkpoint.name)
"""


def test_a_file_the_system_refuses_to_grow_is_a_checkpoint_error(tmp_path: Path) -> None:
    output, errors = python(LIMITED, tmp_path).communicate(timeout=60)
    assert "File too large" in output, errors
    assert output.splitlines()[-1] == "['episode_000010'] episode_000010"


def test_any_failure_inside_becomes_a_checkpoint_error_but_interrupts_pass(
    tmp_path: Path,
) -> None:
    with open_run(tmp_path) as run:
        with (
            pytest.raises(CheckpointError, match=r"RuntimeError: rank 3 died.*no earlier"),
            run.write_checkpoint(1),
        ):
            raise RuntimeError("rank 3 died")
        with pytest.raises(KeyboardInterrupt), run.write_checkpoint(1):
            raise KeyboardInterrupt
        assert list((run.path / "checkpoints").iterdir()) == []


def test_missing_loop_state_refuses_a_resume(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        save(run, 10)
        (run.checkpoint / "state" / "loop.json").unlink()
        with pytest.raises(CheckpointError, match="would not be exact"):
            read_loop_state(run.checkpoint)


# ---------------------------------------------------------------- rewind and rollouts


def test_rewind_drops_what_will_be_done_again(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        lines = [f'{{"episode":{n},"reward/mean":0.{n}}}\n' for n in range(1, 5)]
        run.metrics_file.write_text("".join(lines) + '{"episode":5,"rewa')
        for episode in range(1, 5):
            run.write_rollouts(episode, [], {}, [])
        run.write_rollouts(2, [], {}, [], name="eval")
        run.write_rollouts(4, [], {}, [], name="eval")
        (run.path / "rollouts" / "episode_000005.jsonl.tmp").write_text("half")
        run.rewind(2)
        assert run.metrics_file.read_text() == "".join(lines[:2])
        assert sorted(p.name for p in (run.path / "rollouts").iterdir()) == [
            "episode_000001.jsonl",
            "episode_000002.jsonl",
            "eval_000002.jsonl",
        ]
        run.rewind(0)
        assert run.metrics_file.read_text() == ""


def test_rewind_of_an_empty_run_does_nothing(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.rewind(0)
        assert not run.metrics_file.exists()


def example() -> tuple[Group, dict[str, float], list[Sample]]:
    """Two siblings; the first forks and has two samples, the second failed.

    ::

        turn 0  [1 2 | 3 4] ──► turn 1  [1 2 3 4 5 | 6]      agent
                            └─► turn 2  [1 2 3 4 7 | 8 9]    critic
    """
    task = Task(
        "train:17",
        [{"role": "user", "content": "2 + 2 = ? — 数"}],
        "math_eval",
        "agent.yaml",
        "unit",
        "4",
        {"level": 3},
    )

    def completion(ids: list[int], stop: StopReason, version: int) -> Completion:
        return Completion(ids, [-0.1 * i for i in ids], stop, (version, version + 1))

    turns = [
        Turn(0, None, [1, 2], completion([3, 4], StopReason.STOP, 4), node="agent", step=1),
        Turn(
            1,
            0,
            [1, 2, 3, 4, 5],
            completion([6], StopReason.LENGTH, 5),
            temperature=0.1 + 0.2,
            node="agent",
            checkpoint_ns="sub:1",
            step=2,
            send=3,
            thread="t-1",
            tool_calls=("add", ""),
            reward=0.1 + 0.7,
        ),
        Turn(
            2,
            0,
            [1, 2, 3, 4, 7],
            completion([8, 9], StopReason.STOP, 6),
            fork=Fork.BRANCH,
            prefilled=1,
            node="critic",
            step=2,
            tags=("judge",),
            excluded="superseded",
            timings={"engine_s": 0.25},
        ),
    ]
    good = Trajectory(
        task,
        turns,
        0.1 + 0.2,
        Outcome.FINISHED,
        {"answered": 1.0},
        None,
        [*task.messages, {"role": "assistant", "content": "4"}],
        uid="e3:train:17/0.0",
    )
    failed = Trajectory(task, [], None, Outcome.AGENT_ERROR, error="boom", uid="e3:train:17/1.0")
    samples = [
        Sample(
            [1, 2, 3, 4, 5, 6],
            [False, False, True, True, False, True],
            [0.0, 0.0, -0.3, -0.4, 0.0, -0.6],
            [0.0, 0.0, 0.5, 0.5, 0.0, 0.5],
            [1.0] * 5 + [0.1 + 0.2],
            0.2,
            good.uid,
            4,
        ),
        Sample(
            [1, 2, 3, 4, 7, 8, 9],
            [False] * 5 + [True] * 2,
            [0.0] * 5 + [-0.8, -0.9],
            [0.0] * 5 + [0.5] * 2,
            [1.0] * 5 + [0.7] * 2,
            0.2,
            good.uid,
            6,
        ),
    ]
    return Group(task, [good, failed], ticket=7), {good.uid: 0.5}, samples


def test_rollouts_come_back_as_they_were_written(tmp_path: Path) -> None:
    group, advantages, samples = example()
    with open_run(tmp_path) as run:
        path = run.write_rollouts(3, [group], advantages, samples)
        assert path == run.path / "rollouts" / "episode_000003.jsonl"
        first, second = read_rollouts(path)
    assert first.trajectory == group.trajectories[0]
    assert first.samples == samples
    assert (first.advantage, first.group, first.ticket) == (0.5, "e3:train:17", 7)
    assert second.trajectory == group.trajectories[1]
    assert (second.advantage, second.samples) == (None, [])


def test_rollout_lines_have_the_promised_keys(tmp_path: Path) -> None:
    group, advantages, samples = example()
    with open_run(tmp_path) as run:
        record = read_records(run.write_rollouts(3, [group], advantages, samples))[0]
    assert ",".join(record) == (
        "uid,group,ticket,agent_name,version,outcome,reward,advantage,error,task,messages,"
        "metrics,turns,samples"
    )
    assert record["version"] == 4
    assert record["turns"][1] == {
        "id": 1,
        "parent": 0,
        "fork": None,
        "node": "agent",
        "checkpoint_ns": "sub:1",
        "step": 2,
        "send": 3,
        "thread": "t-1",
        "tags": [],
        "temperature": 0.30000000000000004,
        "prompt_ids": [1, 2, 3, 4, 5],
        "prefilled": 0,
        "completion_ids": [6],
        "logprobs": [-0.6000000000000001],
        "stop": "length",
        "versions": [5, 6],
        "tool_calls": ["add", ""],
        "reward": 0.7999999999999999,
        "excluded": "",
        "timings": {},
    }
    assert [record["turns"][2][key] for key in ("fork", "prefilled", "excluded")] == [
        "branch",
        1,
        "superseded",
    ]
    assert record["samples"][0]["loss_mask"] == [0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("temperatures", "written"),
    [
        ([1.0, 1.0, 1.0, 1.0], None),
        ([1.0, 0.7, 1.0, 0.7], 0.7),
        ([1.0, 0.7, 1.0, 1.0], [1.0, 0.7, 1.0, 1.0]),
        ([1.0, 0.7, 1.0, 0.2], [1.0, 0.7, 1.0, 0.2]),
        ([0.7, 0.7, 0.7, 0.7], [0.7, 0.7, 0.7, 0.7]),
        ([0.5, 1.0, 1.0, 1.0], [0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_one_temperature_is_one_number(
    tmp_path: Path, temperatures: list[float], written: float | list[float] | None
) -> None:
    """
    loss mask   . x . x
    """
    group, advantages, _ = example()
    uid = group.trajectories[0].uid
    zeros = [0.0] * 4
    sample = Sample([1, 2, 3, 4], [False, True] * 2, zeros, zeros, temperatures, trajectory=uid)
    with open_run(tmp_path) as run:
        path = run.write_rollouts(3, [group], advantages, [sample])
    assert read_records(path)[0]["samples"][0].get("temperatures") == written
    assert read_rollouts(path)[0].samples == [sample]


def test_a_sample_without_its_trajectory_is_refused(tmp_path: Path) -> None:
    group, advantages, samples = example()
    samples[0].trajectory = "elsewhere"
    with open_run(tmp_path) as run:
        with pytest.raises(ValueError, match="elsewhere"):
            run.write_rollouts(3, [group], advantages, samples)
        assert not run.rollouts_file(3).exists()


def test_rollouts_of_another_program_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "episode_000001.jsonl"
    with pytest.raises(DataError, match="no rollout file"):
        read_rollouts(path)
    path.write_text('{"uid": "a"}\n')
    with pytest.raises(DataError, match=r"trajectory 1: KeyError: 'agent_name'"):
        read_rollouts(path)


def test_the_lock_file_names_this_process(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        assert (run.path / "lock").read_text().startswith(f"{os.getpid()} on ")
