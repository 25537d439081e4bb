"""Every launcher says what it would do on any machine: no GPU, Ray, SGLang, data or model here.

Each runs in a copy of the scripts beside the package, so that nothing is written to the repository
and nothing that lies around in it is found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chatlearn.config.yaml_file import parse_yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "scripts").glob("*/*.sh"))]
TUTORIAL = "scripts/fsdp_sglang/train_fsdp_sglang_qwen3_8b_grpo_agentic_math_task.sh"
TWO_NODES = "scripts/fsdp_sglang/train_fsdp_sglang_qwen3_32b_grpo_agentic_math_task_2nodes.sh"
SWITCHES = (
    "runtime_args.task_type=agent",
    "runtime_args.rollout_backend=sglang",
    "runtime_args.use_rollout_manager=True",
    "models.policy.is_sync_mode=False",
)
EIGHT_GPUS = """\
run         qwen3_8b_grpo_agentic_math: 200 episodes, into outputs
model       pretrained_models/Qwen3-8B; no reference
your code   none imported: only the built-in agents
machines    1 machine with 8 GPUs: a Ray cluster of this run's own
engines     8 SGLang engines × 1 GPU (TP 1), 85% of its memory; 192 calls at once in each
trainer     8 FSDP2 ranks × 1 GPU (NCCL), in bf16 with fp32 masters
placement   colocated: engines and trainer take turns on the same 8 GPUs
            while the trainer steps, the engines give back weights and caches
            while the engines sample, parameters and AdamW's moments move to the CPU, \
gradients are dropped
publish     tensor (auto): CUDA IPC on the same GPUs, in pieces of 512 MiB; \
the first and one in 10 checked
agents      16 worker processes, at most 1,536 agents at once
data        dataset/MATH-lighteval/train_agent.json (NOT FOUND on this machine), shuffled
episode     64 prompts × 32 rollouts = 2,048 rollouts
steps       1 optimizer step an episode (of 2,048 rollouts), 200 in total; lr 2e-06 constant
learning    advantages by grpo; loss clip, token-mean
staleness   0: every rollout is sampled by the weights it trains
tokens      at most: a call 2,048, a rollout 2,048, a context 4,096, a prompt 1,024
            so an episode samples at most 4,194,304; rows are packed to 32,768 a micro-batch
            if every context were full, a step would be 32 micro-batches on each rank
evaluation  every 5 episodes and at the end: dataset/MATH-lighteval/test_agent.json \
(NOT FOUND on this machine), 1 rollout a prompt, temperature 0.6
checkpoints every 5 episodes and at the end, the newest 3 kept; an unfinished run is continued
failures    an agent run ends after 1800 s; the training stops when more than 50% of an episode's \
rollouts fail
            an engine that dies is started again, at most 3 times; its calls go elsewhere
memory      model folder not found locally: memory not estimated (pretrained_models/Qwen3-8B)
"""


class Machine:
    """A machine with this repository and nothing else: its own PATH and environment."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "a clone"
        self.repository.mkdir()
        shutil.copytree(ROOT / "scripts", self.repository / "scripts")
        for name in ("chatlearn", "template"):
            (self.repository / name).symlink_to(ROOT / name)
        self.commands = folder / "bin"
        self.commands.mkdir()
        for name in ("basename", "bash", "cat", "dirname", "grep", "mkdir", "tee", "tr"):
            (self.commands / name).symlink_to(shutil.which(name))
        self.command("python", f'exec "{sys.executable}" "$@"')

    def command(self, name: str, script: str) -> None:
        """Put a command on the PATH."""
        file = self.commands / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    def run(
        self, script: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        own = {"PATH": str(self.commands), "HOME": str(self.repository), "LANG": "C.UTF-8"}
        keep = {k: os.environ[k] for k in ("OMP_NUM_THREADS", "TMPDIR") if k in os.environ}
        return subprocess.run(
            ["bash", str(self.repository / script), *arguments],
            cwd=self.repository.parent,
            env=own | keep | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def dry_run(self, launcher: str, *settings: str, **environment: str) -> tuple[dict, str]:
        """The resolved configuration and the plan."""
        environment = {"KUBERNETES_CONTAINER_RESOURCE_GPU": "8"} | environment
        done = self.run(launcher, "--dry-run", *settings, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        resolved, _, text = done.stdout.partition("\nrun         ")
        return parse_yaml(resolved, launcher), f"run         {text}"

    def base_env(self, **environment: str) -> dict[str, str]:
        """The variables after base_env.sh, and what it said on stderr."""
        shown = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "num_device", "log_file")
        (self.repository / "probe.sh").write_text(
            "set -euo pipefail\n"
            'source "$(dirname "$0")/scripts/base_env.sh" || exit 1\n'
            + "".join(f'echo "{name}=${{{name}:-unset}}"\n' for name in shown)
            + 'echo "PWD=$PWD"\n'
        )
        done = self.run("probe.sh", **environment)
        assert done.returncode == 0, done.stderr
        told = dict(line.split("=", 1) for line in done.stdout.splitlines())
        return told | {"stderr": done.stderr}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_launchers_are_there() -> None:
    assert {TUTORIAL, TWO_NODES} <= set(LAUNCHERS)
    for size in ("0.6b", "4b"):
        assert TUTORIAL.replace("8b", size) in LAUNCHERS


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: Path(path).stem)
def test_a_launcher_is_short_and_shows_its_switches(launcher: str) -> None:
    text = (ROOT / launcher).read_text()
    assert 10 <= len(text.splitlines()) <= 25
    assert "template/grpo_fsdp.yaml" in text
    for switch in SWITCHES:
        assert f"    {switch} \\\n" in text


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: Path(path).stem)
def test_dry_run_works_where_nothing_is(launcher: str, machine: Machine) -> None:
    settings, text = machine.dry_run(launcher)
    assert "(NOT FOUND on this machine)" in text
    assert "memory not estimated" in text
    run, models = settings["runtime_args"], settings["models"]
    assert (run["cluster"], run["rollout_backend"]) == ("ray", "sglang")
    assert models["policy"]["num_gpu"] == models["policy_trainer"]["num_gpu"]
    log = machine.repository / "outputs/logs" / f"{Path(launcher).stem}_rank0.log"
    assert text in log.read_text()


def test_every_launcher_has_an_experiment_of_its_own() -> None:
    names = [
        line.strip().removesuffix(" \\")
        for launcher in LAUNCHERS
        for line in (ROOT / launcher).read_text().splitlines()
        if "runtime_args.exp_name=" in line
    ]
    assert len(set(names)) == len(LAUNCHERS)


def test_the_plan_of_eight_gpus_in_words(machine: Machine) -> None:
    assert machine.dry_run(TUTORIAL)[1] == EIGHT_GPUS


def test_the_plan_of_two_machines_in_words(machine: Machine) -> None:
    _, text = machine.dry_run(TWO_NODES)
    for line in (
        "machines    2 machines with 8 GPUs each: a Ray cluster of this run's own, started on each",
        "engines     4 SGLang engines × 4 GPUs (TP 4), 85% of the memory of each; "
        "192 calls at once in each",
        "trainer     16 FSDP2 ranks × 1 GPU (NCCL), in bf16 with fp32 masters",
        "            if every context were full, a step would be 32 micro-batches on each rank",
    ):
        assert f"{line}\n" in text


def test_data_that_is_there_is_counted(machine: Machine) -> None:
    file = machine.repository / "dataset/MATH-lighteval/train_agent.json"
    file.parent.mkdir(parents=True)
    row = '{"agent_name": "math_eval", "prompt": [{"role": "user", "content": "1+1?"}]}\n'
    file.write_text(row * 3)
    _, text = machine.dry_run(TUTORIAL)
    assert "train_agent.json (3 rows), shuffled" in text
    assert "test_agent.json (NOT FOUND on this machine)" in text


def test_settings_are_passed_on_whole(machine: Machine) -> None:
    settings, text = machine.dry_run(
        TUTORIAL,
        "models.policy.num_gpu=0",
        "models.policy_trainer.num_gpu=0",
        "runtime_args.import_modules=[my agents/a b.py]",
        "runtime_args.exp_name=mine",
    )
    assert settings["runtime_args"]["import_modules"] == ["my agents/a b.py"]
    assert text.startswith("run         mine: ")
    assert "engines     1 SGLang engine × 1 CPU" in text


def test_a_refusal_is_the_exit_code_and_in_the_log(machine: Machine) -> None:
    done = machine.run(TUTORIAL, "models.policy.temprature=1", RANK="0")
    assert done.returncode == 1
    log = machine.repository / "outputs/logs" / f"{Path(TUTORIAL).stem}_rank0.log"
    assert "did you mean `models.policy.temperature`" in log.read_text()
    assert "did you mean `models.policy.temperature`" in done.stdout


def test_one_machine_by_default(machine: Machine) -> None:
    told = machine.base_env(KUBERNETES_CONTAINER_RESOURCE_GPU="4")
    assert told.pop("stderr") == ""
    assert told == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "12456",
        "num_device": "4",
        "log_file": "outputs/logs/probe_rank0.log",
        "PWD": str(machine.repository),
    }


def test_what_dlc_sets_is_kept(machine: Machine) -> None:
    dlc = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    told = machine.base_env(KUBERNETES_CONTAINER_RESOURCE_GPU="8", **dlc)
    assert told.items() >= dlc.items()
    assert (told["num_device"], told["log_file"]) == ("16", "outputs/logs/probe_rank1.log")


def test_several_machines_are_given_no_head_by_chance(machine: Machine) -> None:
    assert machine.base_env(WORLD_SIZE="2", RANK="1")["MASTER_ADDR"] == "unset"


def test_where_the_number_of_gpus_comes_from(machine: Machine) -> None:
    """The scheduler, then what the user lets be seen, then the driver; else a guess, told."""
    told = machine.base_env()
    assert told["num_device"] == "8"
    assert "no GPU found on this machine; counting on 8" in told["stderr"]
    machine.command("nvidia-smi", 'echo "GPU 0: H100 (UUID: a)"; echo "GPU 1: H100 (UUID: b)"')
    assert machine.base_env()["num_device"] == "2"
    assert machine.base_env(CUDA_VISIBLE_DEVICES="0,1,3")["num_device"] == "3"
    both = {"CUDA_VISIBLE_DEVICES": "0", "KUBERNETES_CONTAINER_RESOURCE_GPU": "4"}
    assert machine.base_env(**both)["num_device"] == "4"
    machine.command("nvidia-smi", 'echo "NVIDIA-SMI has failed"; exit 9')
    assert machine.base_env()["num_device"] == "8"


def test_a_ray_that_is_running_is_left_alone(machine: Machine) -> None:
    machine.command("ray", f'echo "$@" >> "{machine.repository}/ray_was_called"')
    machine.dry_run(TUTORIAL)
    assert not (machine.repository / "ray_was_called").exists()


def test_the_environment_of_the_repository_is_used_where_it_is(machine: Machine) -> None:
    """setup_env.sh is a stand-in here; what it does is the quickstart's business."""
    setup = machine.repository / "scripts/setup_env.sh"
    setup.write_text('echo "set up"\n')
    assert "set up" not in machine.run(TUTORIAL, "--dry-run").stdout
    venv = machine.repository / ".venv/bin"
    venv.mkdir(parents=True)
    (venv / "python").symlink_to(sys.executable)
    assert "set up" in machine.run(TUTORIAL, "--dry-run").stdout
    setup.write_text("return 1\n")
    done = machine.run(TUTORIAL, "--dry-run")
    assert (done.returncode, "engines  " in done.stdout) == (1, False)
