"""Agents as documentation writes them, trained for two GRPO steps; every token is audited."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from audit import GAP, audit

AGENTS = {
    "react",
    "plan_and_execute",
    "supervisor",
    "map_reduce",
    "summarising_memory",
    "compacting_react",
}
EPISODES = (1, 2)


def rollouts(folder: Path, episode: int) -> list[dict]:
    lines = (folder / f"rollouts/episode_{episode:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_token_and_mask_passes_the_audit(trained):
    found = audit(trained.folder, trained.start)
    assert not found.problems, "\n".join(found.problems[:10])
    assert found.gap <= GAP
    assert found.counts["turns"] > 100
    assert found.counts["trained"] > 1500
    assert found.counts["excluded"] > 0
    assert found.counts["conversations"] >= 5
    assert found.counts["prompts"] + found.counts["quoted"] == found.counts["turns"]
    assert found.counts["quoted"] < 10


@pytest.mark.parametrize("agent", sorted(AGENTS))
def test_every_agent_trained_in_both_steps(trained, agent):
    for episode in EPISODES:
        runs = [r for r in rollouts(trained.folder, episode) if r["agent_name"] == agent]
        assert {run["outcome"] for run in runs} <= {"finished", "truncated", "turn_limit"}
        assert {v for run in runs for turn in run["turns"] for v in turn["versions"]} == {
            episode - 1
        }
        assert any(run["advantage"] for run in runs), "no advantage: nothing was learned"
    start = (trained.start / "model.safetensors").read_bytes()
    checkpoints = [trained.folder / f"checkpoints/episode_{e:06d}/hf" for e in EPISODES]
    assert len({start, *((c / "model.safetensors").read_bytes() for c in checkpoints)}) == 3


def test_the_graphs_went_where_such_graphs_go(trained):
    """Tools, retries, hand-overs, fan-out and summaries: the audit is not of straight lines."""
    forks, paths, tools, temperatures = Counter(), Counter(), Counter(), {}
    for run in (run for episode in EPISODES for run in rollouts(trained.folder, episode)):
        agent = run["agent_name"]
        for turn in run["turns"]:
            forks[agent, turn["fork"]] += 1
            names = [part.partition(":")[0] for part in turn["checkpoint_ns"].split("|")]
            paths[agent, "/".join(n for n in names if not n.isdigit())] += 1
            tools.update((agent, name) for name in turn["tool_calls"])
            temperatures.setdefault(turn["node"], set()).add(turn["temperature"])
            if turn["excluded"]:
                forks[agent, turn["excluded"]] += 1
    assert paths["react", "model"] > 2 * 6, "it called a tool and went on"
    assert tools["react", "count"] + tools["react", "spell"] > 0
    assert paths["plan_and_execute", "planner"] > 2 * 6, "with_retry asked for another plan"
    assert forks["plan_and_execute", "superseded"] > 0
    assert paths["plan_and_execute", "agent/model"] > 0
    assert paths["supervisor", "poet/model"] + paths["supervisor", "sage/model"] > 0
    assert forks["supervisor", "edited"] + forks["supervisor", "fresh"] > 0
    assert paths["map_reduce", "generate_joke"] > 2 * 6, "Send fanned out"
    assert forks["summarising_memory", "branch"] > 0, "two answers go on from one turn"
    assert sum(forks["summarising_memory", f] for f in ("compacted", "edited", "trimmed")) > 0
    assert paths["compacting_react", "SummarizationMiddleware.before_model"] > 0
    assert temperatures["planner"] == {1.8}
    assert temperatures["generate_joke"] == {1.8}
    assert temperatures["model"] == {0.7}
