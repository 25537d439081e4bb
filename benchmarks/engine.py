"""Tokens per second of the embedded engine beside the two ways transformers has to sample.

    python benchmarks/engine.py                    # a 3M-parameter Qwen3, fp32, about two minutes
    python benchmarks/engine.py --model DIR --dtype bfloat16

Each cell is the best and, in brackets, the median of repeats that fill ``--seconds``; the engines
take turns in both directions, so that a change of the machine's load does not favour one of them.
Every repeat is a burst of requests awaited together, prompts included. ``generate`` gets the whole
burst as one rectangular batch and returns no logprobs; the other two serve requests one by one, as
agents make them, with the logprob of every token. Counted are new tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # shared cores: do not spin

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from chatlearn.models.engine.embedded import EmbeddedEngine
from chatlearn.types import SamplingParams, Session

PROMPT = NEW = 64
Burst = Callable[[list[list[int]]], Awaitable[int]]
"""Samples NEW tokens after each prompt and returns how many it got in all."""


@contextmanager
def ours(model: PreTrainedModel) -> Iterator[Burst]:
    engine = EmbeddedEngine(model, eos_token_ids=(), max_slots=64, max_context=PROMPT + NEW)
    bursts = 0

    async def burst(prompts: list[list[int]]) -> int:
        nonlocal bursts
        bursts += 1  # a group of its own each time and for each prompt: nothing is reused
        asks = [
            engine.generate(
                prompt,
                SamplingParams(max_new_tokens=NEW, seed=i),
                session=Session(f"{bursts}:{i}", "0"),
            )
            for i, prompt in enumerate(prompts)
        ]
        return sum(len(done.token_ids) for done in await asyncio.gather(*asks))

    yield burst


@contextmanager
def generate(model: PreTrainedModel) -> Iterator[Burst]:
    async def burst(prompts: list[list[int]]) -> int:
        ids = torch.tensor(prompts, device=model.device)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
        return found[:, PROMPT:].numel()

    yield burst


@contextmanager
def continuous_batching(model: PreTrainedModel) -> Iterator[Burst]:
    """transformers' own. Temperature 1 and no other processor: a top_k of 0 would mean greedy."""
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(
            do_sample=True, temperature=1.0, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=32,
            num_blocks=64 * (PROMPT + NEW) // 32 + 64,
            max_batch_tokens=1024,
            max_requests_per_batch=64,
            return_logprobs=True,
            allow_block_sharing=False,  # shared blocks would outlive a weight update
        ),
    )
    manager.start()
    names = 0

    async def burst(prompts: list[list[int]]) -> int:
        nonlocal names
        futures = []
        for prompt in prompts:
            names += 1
            future = asyncio.get_running_loop().create_future()
            futures.append(future)

            def deliver(output, future=future):
                if output.is_finished() and not future.done():
                    future.set_result(len(output.generated_tokens))

            manager.register_result_handler(f"r{names}", deliver)
            manager.add_request(prompt, request_id=f"r{names}", max_new_tokens=NEW)
        return sum(await asyncio.gather(*futures))

    try:
        yield burst
    finally:
        manager.stop(block=True)
        manager.destroy()


ENGINES: dict[str, Callable[[PreTrainedModel], AbstractContextManager[Burst]]] = {
    "embedded engine": ours,
    "generate, dynamic cache": generate,
    "continuous batching": continuous_batching,
}


def tiny(dtype: torch.dtype) -> PreTrainedModel:
    """A random Qwen3 of 3M parameters."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).to(dtype).eval()


async def measure(engine: str, model: PreTrainedModel, count: int, seconds: float) -> list[float]:
    """Tokens per second of each repeat, after one that is not counted."""
    vocab = model.get_input_embeddings().num_embeddings
    prompts = torch.randint(vocab, (count, PROMPT)).tolist()
    rates = []
    with ENGINES[engine](model) as burst:
        await burst(prompts)
        until = time.perf_counter() + seconds
        while not rates or time.perf_counter() < until:
            started = time.perf_counter()
            tokens = await burst(prompts)
            rates.append(tokens / (time.perf_counter() - started))
            assert tokens == count * NEW
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a causal LM; default: a random Qwen3 of 3M")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=8.0, help="per cell")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8, 32, 64])
    options = parser.parse_args()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # misses psutil
    dtype = getattr(torch, options.dtype)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    else:
        model = tiny(dtype)
    model = model.to(options.device)
    rates: dict[tuple[str, int], list[float]] = {}
    for count in options.in_flight:
        for engine in [*ENGINES, *reversed(ENGINES)]:
            found = asyncio.run(measure(engine, model, count, options.seconds / 2))
            rates.setdefault((engine, count), []).extend(found)
    loads = " ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{options.model or 'random Qwen3, 3M'}, {options.dtype}, {options.device}, ", end="")
    print(f"{torch.get_num_threads()} threads, load {loads} (1, 5, 15 min), tokens/s")
    print("| in flight |" + "".join(f" {count} |" for count in options.in_flight))
    print("|---|" + "---|" * len(options.in_flight))
    for engine in ENGINES:
        cells = [rates[engine, count] for count in options.in_flight]
        row = "".join(f" {max(cell):.0f} ({statistics.median(cell):.0f}) |" for cell in cells)
        print(f"| {engine} |{row}")


if __name__ == "__main__":
    main()
