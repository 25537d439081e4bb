"""Real graphs against scripted answers, and pictures of what is trained.

The tokenizer has one token a byte. A row of tokens is drawn as its text, with ``{`` and ``}`` for
the special tokens, ``/`` for a newline, and ``«…»`` around what is trained::

    {user/2+2?}/{assistant/«4}»

A tree is drawn as one line a turn: ``2 < 0: team/writer, branch`` is turn 2, whose prompt begins
with all of turn 0, made in node ``writer`` of sub-graph ``team``, and forks for the reason
``branch``; ``, superseded`` at the end says why it is not trained.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

import pytest

from chatlearn.algorithm.samples import to_samples
from chatlearn.models.agent import BaseAgentGraph
from chatlearn.models.agent.agent_module import AgentFactory, register
from chatlearn.models.agent.agent_run import run_agent
from chatlearn.models.engine.scripted import ScriptedEngine
from chatlearn.types import (
    Budget,
    Completion,
    Outcome,
    SamplingParams,
    Session,
    StopReason,
    Task,
    Trajectory,
)

_SHORT = {"<|im_start|>": "{", "<|im_end|>": "}"}


@dataclass(slots=True)
class Played:
    """One finished run, drawn."""

    trajectory: Trajectory
    engine: ScriptedEngine
    rows: list[str]
    tree: list[str]


@pytest.fixture
def play(llm, tokenizer, say):
    """Run a graph on "2+2?"; ``build(agent)`` makes it, or ``run`` does everything itself.

    ``answers`` are texts in the order of the calls, or a dict of the last message's text to the
    answer, which does not depend on the order. Each is closed by ``<|im_end|>``, unless it ends
    in ``…``: a completion cut by its token limit.
    """

    def completion(text: str, limit: int) -> Completion:
        ids = say(text[:-1] if text.endswith("…") else text + "<|im_end|>")
        stop = StopReason.LENGTH if text.endswith("…") or len(ids) > limit else StopReason.STOP
        return Completion(ids[:limit], [-0.5] * len(ids[:limit]), stop, (0, 0))

    def play(
        build,
        answers,
        *,
        run=None,
        prompt="2+2?",
        outcome=Outcome.FINISHED,
        cfg=None,
        sampling=SamplingParams(),  # noqa: B008
        **options,
    ) -> Played:
        body = {"build_graph": build or (lambda self: None)}
        body |= {"run": run} if run else {}
        name = f"conformance-{id(body)}"
        register(name)(type("PlayedAgent", (BaseAgentGraph,), body))
        count = 0

        def script(prompt_ids, sampling, session):
            nonlocal count
            count += 1
            if isinstance(answers, Mapping):
                text = tokenizer.decode(prompt_ids).split("<|im_start|>")[-2]
                text = text.partition("\n")[2].partition("<|im_end|>")[0]
                return completion(answers[text], sampling.max_new_tokens)
            return completion(answers[count - 1], sampling.max_new_tokens)

        engine = ScriptedEngine(script)
        agent, _ = AgentFactory(llm, tokenizer).agent(name, cfg)
        trajectory = asyncio.run(
            run_agent(
                agent,
                Task(
                    uid="test:0",
                    messages=[{"role": "user", "content": prompt}],
                    agent_name=name,
                    agent_cfg_path=cfg,
                    data_source="test",
                    ground_truth="4",
                ),
                engine=engine,
                sampling=sampling,
                budget=Budget(1000, 1000, 10_000),
                session=Session("0:test:0", "0.0"),
                reward_function=lambda: 1.0,
                timeout_s=30.0,
                **options,
            )
        )
        assert trajectory.outcome is outcome, trajectory.error
        trained = [turn for turn in trajectory.turns if not turn.excluded]
        samples = to_samples(trajectory, 1.0)
        assert sum(s.num_trained for s in samples) == sum(
            len(t.completion.token_ids) for t in trained
        ), "law 2: each sampled token is trained exactly once"
        rows = [_row(sample, tokenizer) for sample in samples]
        return Played(trajectory, engine, rows, [_line(t) for t in trajectory.turns])

    return play


def _row(sample, tokenizer) -> str:
    drawn, is_trained = "", False
    for token, trained in zip(sample.token_ids, sample.loss_mask, strict=True):
        if trained != is_trained:
            drawn += "«" if trained else "»"
            is_trained = trained
        piece = tokenizer.decode([token])
        drawn += _SHORT.get(piece, piece)
    return (drawn + ("»" if is_trained else "")).replace("\n", "/")


def _line(turn) -> str:
    where = f"{turn.id}" if turn.parent is None else f"{turn.id} < {turn.parent}"
    said = [turn.path, str(turn.fork or ""), turn.excluded]
    return f"{where}: " + ", ".join(word for word in said if word)


# The table of docs/langgraph.md: --conformance-table=FILE writes each feature's outcome.


def pytest_addoption(parser):
    parser.addoption("--conformance-table", help="write each feature's outcome to this JSON file")


def pytest_configure(config):
    config.addinivalue_line("markers", "feature(name): one row of the table in docs/langgraph.md")
    config.stash[_OUTCOMES] = {}


_OUTCOMES: pytest.StashKey[dict[str, str]] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    for mark in item.iter_markers("feature"):
        found = item.config.stash[_OUTCOMES]
        if report.failed:
            found[mark.args[0]] = "failed"
        elif report.skipped:
            reason = str(call.excinfo.value)
            found.setdefault(mark.args[0], f"skipped: {reason}")
        elif call.when == "call" and found.get(mark.args[0], "").partition(":")[0] != "failed":
            found[mark.args[0]] = "passed"
    return report


def pytest_sessionfinish(session):
    file = session.config.getoption("--conformance-table", None)
    if file:
        versions = {name: version(name) for name in ("langgraph", "langchain-core")}
        table = {"versions": versions, "features": session.config.stash[_OUTCOMES]}
        with open(file, "w") as out:
            json.dump(table, out, indent=1)
