"""Training on an environment service, with real processes: the service is killed under the runs."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading

import pytest

from chatlearn.data.field_map import to_rows
from chatlearn.data.row_files import write_rows
from chatlearn.errors import AgentError
from chatlearn.models.agent.base_agent_graph import BaseAgentGraph
from chatlearn.models.agent.environment import run_environment
from chatlearn.models.agent.examples import frozen_lake
from chatlearn.types import Outcome

LAKE = '''
"""The lake for a model that knows no words: a letter a to m is a move, and is what scores. The
process of the service ends at its DIE_AT_STEP-th step, once."""

import os
import runpy
from pathlib import Path

steps = 0


class Letters(runpy.run_path(os.environ["FROZEN_LAKE"])["FrozenLake"]):
    def step(self, action):
        global steps
        steps += 1
        if steps == int(os.environ.get("DIE_AT_STEP", 0)) and not Path("died").exists():
            Path("died").touch()
            os._exit(9)
        self.good = getattr(self, "good", 0) + sum(letter in "abcdefghijklm" for letter in action)
        return super().step("right" if self.good % 2 else "up")

    def evaluate(self, messages):
        found = super().evaluate(messages)
        return {"score": min(self.good / 16, 1.0), "info": found.info}
'''


class Service:
    """``chatlearn data serve-environment`` of ``LAKE``; ``restarts`` times it is started again."""

    def __init__(self, folder, *, restarts: int = 0, **environment: str) -> None:
        (folder / "lake.py").write_text(LAKE)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._environment = {**os.environ, "FROZEN_LAKE": frozen_lake.__file__, **environment}
        self._process = self._start()
        self._is_over = False
        self._thread = threading.Thread(target=self._watch, args=(restarts,))
        self._thread.start()

    def close(self) -> None:
        self._is_over = True
        self._process.terminate()
        self._thread.join()

    def _start(self):
        command = [sys.executable, "-m", "chatlearn", "data", "serve-environment"]
        options = ["--env", "lake.py->Letters", "--port", str(self.port)]
        return subprocess.Popen([*command, *options], cwd=self._folder, env=self._environment)

    def _watch(self, restarts: int) -> None:
        for _ in range(restarts):
            self._process.wait()
            if self._is_over:
                return
            self._process = self._start()
        self._process.wait()


@pytest.fixture
def lake(project):
    """``lake(**settings)`` starts the service, ``train(project)`` trains one step on it."""
    services = []

    def start(*, patience_s=60, **settings) -> str:
        services.append(Service(project.folder, **settings))
        cfg = {"environment": services[-1].url, "max_turns": 2, "patience_s": patience_s}
        (project.folder / "lake.yaml").write_text(json.dumps(cfg))
        question = [{"task_id": f"lake-{n}", "query": "Walk."} for n in range(8)]
        rows = to_rows(question, agent_name="frozen_lake", agent_cfg_path="lake.yaml")
        write_rows(project.folder / "lake.jsonl", rows)
        return services[-1].url

    yield start
    for service in services:
        service.close()


def train(project, *overrides, check=True):
    settings = [
        "runtime_args.data_path=lake.jsonl",
        "runtime_args.import_modules=[]",
        "runtime_args.num_episode=1",
        "runtime_args.sample_per_episode=8",
        "models.policy.max_prompt_tokens_length=160",
        "models.policy.max_seq_len=320",
    ]
    return project.run(*settings, *overrides, check=check)


def test_a_service_that_is_killed_and_comes_back_costs_only_new_attempts(project, lake):
    """Every run loses its lake, waits, and is played again from its start; the step is taken."""
    lake(restarts=1, DIE_AT_STEP="6")
    train(project)
    assert (project.folder / "died").exists()
    (episode,) = project.metrics(project.runs[0])
    assert episode["rollout/retried"] >= 1
    assert (episode["rollout/failed"], episode["outcome/engine_error"]) == (0, 0)
    assert 0 < episode["reward/mean"] < 1
    assert episode["tokens/trained"] > 0
    log = (project.runs[0] / "run.log").read_text()
    assert re.search(r"is tried again: http://127.0.0.1:\d+/(step|create|evaluate) ", log)


def test_a_service_that_stays_down_fails_its_runs_and_ends_the_training_by_name(project, lake):
    url = lake(patience_s=0.5, DIE_AT_STEP="6")
    ended = train(project, check=False)
    assert ended.returncode == 1
    assert re.search(r"runs of this episode failed \(\d+ engine_error\)", ended.stderr)
    assert "runtime_args.max_failed_fraction=0.5" in ended.stderr
    assert f"The first: {url}/" in ended.stderr
    assert "Traceback" not in ended.stderr


class Swallows(BaseAgentGraph):
    """Takes a lost environment for an answer, as a tool node that handles all errors does."""

    async def run(self, messages, **row):
        said = await self.llm.ainvoke(messages)
        service = run_environment("http://127.0.0.1:9", patience_s=0.3)
        try:
            async with service.instance("lake-0") as env:
                await env.step(said.text)
        except Exception as error:
            return {"messages": [said], "reward": 0.0, "metrics": {"seen": len(str(error)) > 0}}


def test_a_lost_environment_is_never_a_reward_of_0(run_graph):
    trajectory = run_graph(Swallows, ["right"])
    assert (trajectory.outcome, trajectory.reward) == (Outcome.ENGINE_ERROR, None)
    assert "http://127.0.0.1:9/create cannot be reached" in trajectory.error
    with pytest.raises(AgentError, match="outside an agent run"):
        run_environment("http://127.0.0.1:9")
