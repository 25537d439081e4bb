"""The whole loop on a real Ray cluster: FSDP2 ranks over gloo, a real SGLang server, real workers.

Starting it all takes half a minute, so one run is looked at from several sides.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time

import psutil
import pytest

from chatlearn.cluster.nodes import free_port

pytestmark = [pytest.mark.ray, pytest.mark.sglang, pytest.mark.timeout(600)]

GAP = 1e-4
"""Most that engine and trainer may disagree on a logprob, in fp32 (nats)."""


@pytest.fixture
def cluster(sglang_python) -> list[str]:
    """Settings of a cluster of one machine: 2 trainer ranks, 1 engine, 2 rollout workers."""
    return [
        "runtime_args.cluster=ray",
        "runtime_args.rollout_backend=sglang",
        "models.policy_trainer.num_cpu=2",
        "models.rollout_manager.num_cpu=2",
        f"models.policy.sglang_python={sglang_python}",
        "models.policy.max_engine_restarts=2",
    ]


def said(project) -> str:
    return (project.folder / "out.txt").read_text()


def wait_for(project, run, text: str) -> None:
    while text not in said(project):
        assert run.poll() is None, said(project)
        time.sleep(0.1)


def pid_of(project, who: str) -> int:
    """``who`` as the driver's log introduces it: "engines", "trainer ranks", "rollout workers"."""
    line = re.search(rf"cluster.ray: {who}: .*", said(project))[0]
    return int(re.search(r"pid (\d+)", line)[1])


def all_gone(processes, within_s: float = 30.0) -> list[psutil.Process]:
    """Those of ``processes`` that still run after a while."""
    return psutil.wait_procs(processes, timeout=within_s)[1]


def test_a_killed_engine_and_a_killed_worker_heal_and_reward_rises(project, cluster):
    run = project.start(*cluster, "runtime_args.num_episode=24", SLOW_S="0.2")
    wait_for(project, run, "episode 2 ")
    family = psutil.Process(run.pid).children(recursive=True)
    os.kill(pid_of(project, "engines"), signal.SIGKILL)
    wait_for(project, run, "episode 5 ")
    os.kill(pid_of(project, "rollout workers"), signal.SIGKILL)

    assert run.wait(300) == 0, said(project)

    metrics = project.metrics(project.runs[0])
    assert [m["episode"] for m in metrics] == list(range(1, 25))
    assert sum(m["engine/restarts"] for m in metrics) == 1
    assert sum(m["rollout/worker_restarts"] for m in metrics) == 1
    # nothing is lost, and nothing is trained that did not happen
    assert all(m["rollout/failed"] == 0 for m in metrics)
    assert all(m["outcome/finished"] + m["outcome/truncated"] == 16 for m in metrics)
    # every episode, so also after every publish and after the restart
    gaps = [m["policy/logprob_gap_max"] for m in metrics if "policy/logprob_gap_max" in m]
    assert len(gaps) > 15  # an episode without signal makes no step
    assert max(gaps) <= GAP
    assert sum(m.get("publish/checked", 0) for m in metrics) >= 3  # the weights landed, by checksum
    rewards = [m["reward/mean"] for m in metrics]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3
    assert not all_gone(family)


def test_a_killed_rank_ends_the_run_and_the_same_command_resumes(project, cluster):
    """Then the driver is killed, and takes everything with it."""
    settings = [*cluster, "runtime_args.num_episode=50", "models.policy.publish=collective"]
    run = project.start(*settings)
    wait_for(project, run, "episode 3 ")
    family = psutil.Process(run.pid).children(recursive=True)
    os.kill(pid_of(project, "trainer ranks"), signal.SIGKILL)

    assert run.wait(120) == 1
    assert "TrainerError: a trainer rank died" in said(project)
    assert said(project).count("TrainerError") == 1
    assert not all_gone(family)

    again = project.start(*settings, SLOW_S="0.2")
    wait_for(project, again, "cluster.ray: policy")
    assert re.search(r"Continuing .* from episode ([2-9]|\d\d) of its checkpoint", said(project))
    wait_for(project, again, "tracker: episode")
    family = psutil.Process(again.pid).children(recursive=True)
    again.kill()

    assert not all_gone(family, within_s=30)
    episodes = [m["episode"] for m in project.metrics(project.runs[0])]
    assert episodes == list(range(1, len(episodes) + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ended_run_leaves_nothing_running(project, cluster, number):
    run = project.start(*cluster, "runtime_args.num_episode=50", "models.policy.publish=disk")
    wait_for(project, run, "episode 2 ")
    family = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(number)

    assert run.wait(60) == 130
    assert "The same command continues" in said(project)
    assert not all_gone(family)


def test_a_server_that_cannot_start_ends_the_run_with_its_log(project, cluster):
    failed = project.run(*cluster, "models.policy.sglang_args={no_such_flag: 1}", check=False)
    assert failed.returncode == 1
    assert "EngineError: the SGLang server" in failed.stderr
    assert "no-such-flag" in failed.stderr


def test_two_machines_are_one_cluster(project, cluster):
    """Here both are this machine, each with a Ray of its own; the second one lends its CPUs."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("10.255.255.255", 9))  # sends nothing; says which address would
        address = route.getsockname()[0]
    machines = {"WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
    settings = [*cluster, "runtime_args.num_episode=2", "models.rollout_manager.num_cpu=1"]
    second = project.start(*settings, RANK="1", **machines)
    first = project.run(*settings, RANK="0", **machines)

    assert "2 of 2 machines have joined" in first.stderr
    assert [m["episode"] for m in project.metrics(project.runs[0])] == [1, 2]
    assert second.wait(60) == 0
    assert f"machine 1 of 2 has joined {address}" in said(project)
    assert "the run is over" in said(project)
    assert len(project.runs) == 1
