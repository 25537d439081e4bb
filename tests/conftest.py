"""What tests share: a byte-level tokenizer with a ChatML template, and runs of real graphs."""

from __future__ import annotations

import asyncio
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from chatlearn.types import Budget, SamplingParams, Session, Task

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
        agent, _ = AgentFactory(llm, tokenizer).agent(name, cfg)
        served = engine
        if served is None:
            script = answers if callable(answers) else [completion(text) for text in answers]
            served = ScriptedEngine(script)
        return asyncio.run(
            run_agent(
                agent,
                task,
                engine=served,
                sampling=SamplingParams(),
                budget=budget or Budget(1000, 1000, 10_000),
                session=Session("0:test:0", "0.0"),
                reward_function=reward_function,
                timeout_s=timeout_s,
            )
        )

    return run
