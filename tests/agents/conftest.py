"""A policy that has seen the five agents, and one run of the command that trains all of them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # tests import audit.py, which is no test
SIBLINGS = 6
HOT = "{temperature: 1.8}"
IMITATION_STEPS = 500
LEARNING_RATE = 5e-3
WORDS = ("ace", "bee", "oak", "zoo")


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run folder, and the model that it began with."""

    folder: Path
    start: Path


def row(agent: str, asked: str, **columns) -> dict:
    return {
        "agent_name": agent,
        "agent_cfg_path": str(HERE / "bounded.yaml"),
        "data_source": "letters_a_to_m",
        "prompt": [{"role": "user", "content": asked}],
        **columns,
    }


ROWS = (
    row("react", "Use a tool!"),
    row("plan_and_execute", "(its graph reads input)", input="a zoo"),
    row("supervisor", "Ask them!"),
    row("map_reduce", "(its graph reads topic)", topic="zoo"),
    row("summarising_memory", "Say.", questions=["And then?", "And more?", "And last?"]),
    row("compacting_react", "Use a tool!"),
)

PLAYED = [r for r in ROWS for _ in range(1 if r["agent_name"] == "summarising_memory" else 3)]
"""For imitation: a run of seven answers without a call, less often than the others."""
AGAIN = ("count",)
CALLS = {
    "Use a tool!": ("count", "spell"),
    "Step: ": ("count",),
    "Ask them!": ("ask_poet", "ask_sage"),
    "\n<tool_response>": AGAIN,
}
"""What is called after such a message."""


def answer(prompt: str, draw: random.Random) -> str:
    """What a model that knows its part might say at the end of ``prompt``."""
    word = draw.choice(WORDS)
    if "arguments" in prompt[-15:]:
        plan = {"steps": [word, draw.choice(WORDS)][: draw.randint(1, 2)]}
        objects = {
            "Plan": plan,
            "Act": {"action": draw.choice([plan, {"response": word}])},
            "Subjects": {"subjects": draw.sample(WORDS, 3)},
            "BestJoke": {"id": draw.randrange(3)},
        }
        [name] = [name for name in objects if prompt.endswith(f'"{name}", "arguments": ')]
        return json.dumps(objects[name]) + "}\n</tool_call>"
    last = prompt.split("<|im_start|>")[-2].removeprefix("user\n")
    called = next((names for text, names in CALLS.items() if last.startswith(text)), ())
    if not called or draw.random() < (0.7 if called == AGAIN else 0.1):
        return word
    call = json.dumps({"name": draw.choice(called), "arguments": {"word": word}})
    return f"<tool_call>\n{call}\n</tool_call>"


def transcripts(llm, tokenizer, runs: int) -> list:
    """Samples of the agents played with ``answer``; their loss masks say what it said."""
    from chatlearn.algorithm.samples import to_samples
    from chatlearn.models.agent.agent_module import AgentFactory, import_modules
    from chatlearn.models.agent.agent_run import run_agent
    from chatlearn.models.engine.scripted import ScriptedEngine
    from chatlearn.types import Budget, SamplingParams, Session, Task

    import_modules([str(HERE / "five_agents.py")])
    factory, draw = AgentFactory(llm, tokenizer), random.Random(0)

    def script(prompt_ids, sampling, session):
        said = answer(tokenizer.decode(prompt_ids), draw)
        return tokenizer.encode(said + "<|im_end|>", add_special_tokens=False)

    async def play(number: int):
        known = PLAYED[number % len(PLAYED)]
        own = ("agent_name", "agent_cfg_path", "data_source", "prompt")
        agent, _ = factory.agent(known["agent_name"], known["agent_cfg_path"])
        return await run_agent(
            agent,
            Task(
                uid=f"warm:{number}",
                messages=known["prompt"],
                agent_name=known["agent_name"],
                agent_cfg_path=known["agent_cfg_path"],
                data_source="warm",
                ground_truth=None,
                fields={key: value for key, value in known.items() if key not in own},
            ),
            engine=ScriptedEngine(script),
            sampling=SamplingParams(),
            budget=Budget(200, 2000, 512),
            session=Session("warm", str(number)),
            reward_function=lambda: 1.0,
            timeout_s=60,
        )

    async def play_all():
        return [await play(number) for number in range(runs)]

    return [s for trajectory in asyncio.run(play_all()) for s in to_samples(trajectory, 1.0)]


@pytest.fixture(scope="session")
def imitating_policy(tiny_policy, llm, tokenizer, tmp_path_factory) -> Path:
    """The tiny policy after some seconds of imitation: half of its calls can be read.

    An untrained one never calls a tool, and graphs whose branches nobody takes show nothing.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    samples = sorted(transcripts(llm, tokenizer, 90), key=lambda s: len(s.token_ids))
    rows = [torch.tensor(s.token_ids) for s in samples if len(s.token_ids) <= 400]
    said = [torch.tensor(s.loss_mask) for s in samples]
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    torch.manual_seed(0)
    for step in range(IMITATION_STEPS):
        first = 8 * int(torch.randint(len(rows) // 8, ()))  # neighbours are of one length
        ids = pad_sequence(rows[first : first + 8], batch_first=True)
        mask = pad_sequence(said[first : first + 8], batch_first=True)[:, 1:]
        logits, targets = model(ids[:, :-1]).logits[mask], ids[:, 1:][mask]
        # a sum: in a mean, a batch of short rows would outweigh the rows that call tools
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / 256
        warm, left = min(1.0, (step + 1) / 10), 1 - step / IMITATION_STEPS
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * left
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("models") / "imitating"
    shutil.copytree(tiny_policy, folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained(imitating_policy, tmp_path_factory) -> Trained:
    """Two GRPO steps of every agent, in one run of ``chatlearn grpo``."""
    folder = tmp_path_factory.mktemp("five")
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    template = HERE.parents[1] / "template" / "local_cpu.yaml"
    command = [sys.executable, "-m", "chatlearn", "grpo", "--config-file", str(template)]
    settings = [
        "runtime_args.data_path=rows.jsonl",
        f"runtime_args.import_modules=[{HERE / 'five_agents.py'}]",
        "runtime_args.exp_name=five",
        "runtime_args.num_episode=2",
        f"runtime_args.sample_per_episode={SIBLINGS * len(ROWS)}",
        "runtime_args.save_episode_interval=1",
        "runtime_args.log_args_dict.enable_tensorboard=False",
        f"models.policy_trainer.load={imitating_policy}",
        "models.policy_trainer.optimizer.lr=0.0003",
        f"models.policy.num_inference_per_prompt={SIBLINGS}",
        "models.policy.max_prompt_tokens_length=64",
        "models.policy.max_response_tokens_length=400",
        "models.policy.max_tokens_per_turn=80",
        "models.policy.max_seq_len=512",
        "models.policy.temperature=0.7",
        f"models.policy.node_sampling={{planner: {HOT}, generate_joke: {HOT}}}",
    ]
    done = subprocess.run(
        [*command, *settings],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return Trained((folder / "outputs/five/latest").resolve(), imitating_policy)
