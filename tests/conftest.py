"""What tests share: a byte-level tokenizer with a ChatML template, and runs of real graphs."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

from chatlearn.types import Budget, SamplingParams, Session, Task

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where CI is a job of a shell
settings.register_profile("patient", deadline=None)  # cores are shared, here and in CI
settings.load_profile("patient")

CHATML = """\
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|im_start|>user{%- endif -%}
{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}
{%- else -%}
{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for c in m.tool_calls or [] -%}
{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


@pytest.fixture(autouse=True)
def no_handler_of_a_command_stays() -> Iterator[None]:
    """A command that a test ran in this process set up logging for itself."""
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "is_ours", False)]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, plus ``<|im_start|>`` and ``<|im_end|>``: text can be read off the ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def say(tokenizer):
    """Token ids of a text: ``say("4<|im_end|>")``."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="session")
def llm(tokenizer):
    """The chat model that agents get as ``self.llm``."""
    from chatlearn.models.agent.chat_model import CustomChatModel
    from chatlearn.models.agent.prompt_builder import PromptBuilder
    from chatlearn.models.agent.tool_parser import tool_parser

    prompts = PromptBuilder(tokenizer, [tokenizer.eos_token_id])
    return CustomChatModel(tokenizer=tokenizer, prompts=prompts, parser=tool_parser("hermes"))


@pytest.fixture
def run_graph(llm, tokenizer, say):
    """Run an agent class on one task against scripted answers; returns the trajectory.

    ``answers`` are texts in the order of the calls; each is closed by ``<|im_end|>`` unless it
    ends in ``…``, which stands for a completion cut by its token limit.
    """
    from chatlearn.models.agent.agent_module import AgentFactory, register
    from chatlearn.models.agent.agent_run import run_agent
    from chatlearn.models.engine.scripted import ScriptedEngine
    from chatlearn.types import Completion, StopReason

    def completion(text: str) -> Completion:
        cut = text.endswith("…")
        ids = say(text[:-1] if cut else text + "<|im_end|>")
        stop = StopReason.LENGTH if cut else StopReason.STOP
        return Completion(ids, [-0.5] * len(ids), stop, (0, 0))

    def run(
        agent_class,
        answers,
        *,
        prompt="2+2?",
        truth="4",
        cfg=None,
        reward_function=None,
        budget=None,
        fields=None,
        timeout_s=10.0,
        engine=None,
        sampling=None,
        auxiliary_models=None,
        **settings,
    ):
        name = f"test-{agent_class.__qualname__}-{id(agent_class)}"
        register(name)(agent_class)
        task = Task(
            uid="test:0",
            messages=[{"role": "user", "content": prompt}],
            agent_name=name,
            agent_cfg_path=cfg,
            data_source="test",
            ground_truth=truth,
            fields=fields or {},
        )
        agent, _ = AgentFactory(llm, tokenizer, auxiliary_models).agent(name, cfg)
        served = engine
        if served is None:
            script = answers if callable(answers) else [completion(text) for text in answers]
            served = ScriptedEngine(script)
        return asyncio.run(
            run_agent(
                agent,
                task,
                engine=served,
                sampling=sampling or SamplingParams(),
                budget=budget or Budget(1000, 1000, 10_000),
                session=Session("0:test:0", "0.0"),
                reward_function=reward_function,
                timeout_s=timeout_s,
                **settings,
            )
        )

    return run


@pytest.fixture(scope="session")
def tiny_policy(tokenizer, tmp_path_factory) -> str:
    """Folder of an untrained Qwen3 of two small layers, with the byte-level tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def project(tmp_path, tiny_policy):
    """A user's project: an agent of their own that asks twice, its reward, and two datasets.

    ``project.run("key=value", …)`` trains in a process of its own, as a user would, and returns the
    finished process; ``project.runs`` are the run folders, oldest first.
    """
    return Project(tmp_path, tiny_policy)


AGENT_FILE = '''
"""Asks, hears "again", asks once more. The reward is the share of letters a to m."""

import os
import signal
import time

from langgraph.graph import START, MessagesState, StateGraph

from chatlearn.models.agent import BaseAgentGraph, register
from chatlearn.rewards import reward

runs = 0


@register("asks_twice")
class AsksTwice(BaseAgentGraph):
    def build_graph(self):
        async def first(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"]), ("user", "again")]}

        def second(state: MessagesState):  # a sync node: LangGraph runs it in a thread
            return {"messages": [self.llm.invoke(state["messages"])]}

        graph = StateGraph(MessagesState)
        graph.add_node("first", first)
        graph.add_node("second", second)
        graph.add_edge(START, "first")
        graph.add_edge("first", "second")
        return graph


@reward("letters")
def letters(messages):
    global runs
    runs += 1
    if runs == int(os.environ.get("KILL_AT_RUN", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(os.environ.get("SLOW_S", 0)))
    text = "".join(m["content"] for m in messages if m["role"] == "assistant")
    return sum(letter in "abcdefghijklm" for letter in text) / max(len(text), 1)
'''


class Project:
    """See the fixture ``project``."""

    def __init__(self, folder, policy: str) -> None:
        import json

        self.folder = folder
        self.policy = policy
        (folder / "my_agent.py").write_text(AGENT_FILE)
        for name, count in (("train", 12), ("test", 4)):
            rows = [
                {
                    "agent_name": "asks_twice",
                    "agent_cfg_path": None,
                    "data_source": "letters",
                    "prompt": [{"role": "user", "content": f"say {name} {i}"}],
                }
                for i in range(count)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text)

    @property
    def settings(self) -> list[str]:
        return [
            "runtime_args.data_path=train.jsonl",
            "runtime_args.import_modules=[my_agent.py]",
            "runtime_args.exp_name=letters",
            "runtime_args.num_episode=4",
            "runtime_args.sample_per_episode=16",
            "runtime_args.save_episode_interval=1",
            "runtime_args.log_args_dict.enable_tensorboard=False",
            f"models.policy_trainer.load={self.policy}",
            "models.policy_trainer.optimizer.lr=0.01",
            "models.policy.num_inference_per_prompt=4",
            "models.policy.max_prompt_tokens_length=64",
            "models.policy.max_response_tokens_length=16",
            "models.policy.max_tokens_per_turn=8",
            "models.policy.max_seq_len=128",
        ]

    def command(self, *overrides: str) -> list[str]:
        import sys

        return [sys.executable, "-m", "chatlearn", "grpo", *self.settings, *overrides]

    def run(self, *overrides: str, check: bool = True, **environment: str):
        import subprocess

        done = subprocess.run(
            self.command(*overrides),
            cwd=self.folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=240,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def start(self, *overrides: str, **environment: str):
        """Begin a run and leave it; what it prints is in ``out.txt`` of the project."""
        import subprocess

        with (self.folder / "out.txt").open("w") as out:
            return subprocess.Popen(
                self.command(*overrides),
                cwd=self.folder,
                env={**os.environ, **environment},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def runs(self):
        found = (self.folder / "outputs" / "letters").iterdir()
        return sorted(path for path in found if not path.is_symlink())

    def weights(self, run, episode: int) -> bytes:
        return (run / f"checkpoints/episode_{episode:06d}/hf/model.safetensors").read_bytes()

    def metrics(self, run) -> list[dict]:
        import json

        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """A Python with the real SGLang; the first time it takes a minute or two to make."""
    import subprocess
    from pathlib import Path

    script = Path(__file__).with_name("sglang_env.sh")
    done = subprocess.run(["bash", str(script)], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]
