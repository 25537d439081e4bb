"""Tokens per second of the embedded engine beside transformers' two ways to sample, and SGLang.

    python benchmarks/engine.py                    # a 3M-parameter Qwen3, fp32, about three minutes
    SGLANG_PYTHON=... python benchmarks/engine.py  # with SGLang; tests/sglang_env.sh makes one
    python benchmarks/engine.py --model DIR --dtype bfloat16

Each cell is the best and, in brackets, the median of repeats that fill ``--seconds``; the engines
take turns in both directions, so that a change of the machine's load does not favour one of them.
Every repeat is a burst of requests awaited together, prompts included. ``generate`` gets the whole
burst as one rectangular batch and returns no logprobs; the other two serve requests one by one, as
agents make them, with the logprob of every token. Counted are new tokens.

SGLang is a server of this machine with the same weights, dtype and threads, asked over HTTP by
``SGLangEngine`` as a run asks it; its prefix cache is off, because each burst repeats the prompts.
It is stopped (SIGSTOP) while it is not its turn. On PyPI it has no kernels for CPUs, so it computes
with PyTorch's: this says nothing of SGLang on a GPU, or on a CPU with ``sgl-kernel-cpu``.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import psutil
import torch
from sides import loads, random_qwen3
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

from chatlearn.interfaces import Engine
from chatlearn.models.engine.embedded import EmbeddedEngine
from chatlearn.models.engine.sglang import SGLangEngine
from chatlearn.models.engine.sglang_server import ServerSettings, SGLangServer
from chatlearn.types import SamplingParams, Session

PROMPT = NEW = 64
SGLANG_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
Burst = Callable[[list[list[int]]], Awaitable[int]]
"""Samples NEW tokens after each prompt and returns how many it got in all."""


def bursts_of(engine: Engine) -> Burst:
    """Requests one by one, with a group of its own for each prompt, so that none is reused."""
    bursts = 0

    async def burst(prompts: list[list[int]]) -> int:
        nonlocal bursts
        bursts += 1
        asks = [
            engine.generate(
                prompt,
                SamplingParams(max_new_tokens=NEW, seed=i),
                session=Session(f"{bursts}:{i}", "0"),
            )
            for i, prompt in enumerate(prompts)
        ]
        return sum(len(done.token_ids) for done in await asyncio.gather(*asks))

    return burst


@asynccontextmanager
async def ours(model: PreTrainedModel) -> AsyncIterator[Burst]:
    yield bursts_of(EmbeddedEngine(model, eos_token_ids=(), max_slots=64, max_context=PROMPT + NEW))


@asynccontextmanager
async def generate(model: PreTrainedModel) -> AsyncIterator[Burst]:
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


@asynccontextmanager
async def continuous_batching(model: PreTrainedModel) -> AsyncIterator[Burst]:
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


@asynccontextmanager
async def served(server: SGLangServer, model: PreTrainedModel) -> AsyncIterator[Burst]:
    """SGLang, which runs only in the block."""
    engine = SGLangEngine(server.url, eos_token_ids=(), max_context=PROMPT + NEW)
    tell(server, signal.SIGCONT)
    try:
        yield bursts_of(engine)
    finally:
        await engine.close()
        tell(server, signal.SIGSTOP)


def tell(server: SGLangServer, what: signal.Signals) -> None:
    """Send a signal to every process of ``server``."""
    root = psutil.Process(server.pid)
    for process in (root, *root.children(recursive=True)):
        process.send_signal(what)


@asynccontextmanager
async def sglang(model: PreTrainedModel, python: str, folder: Path) -> AsyncIterator[SGLangServer]:
    """A server of ``model``, stopped until it is used."""
    model.save_pretrained(folder / "model")
    settings = ServerSettings(
        model_path=str(folder / "model"),
        python=python,
        device="cpu",
        dtype=SGLANG_DTYPES[model.dtype],
        context_length=PROMPT + NEW,
        max_running_requests=64,
        cpu_threads=torch.get_num_threads(),
        extra_args={"skip_tokenizer_init": True, "disable_radix_cache": True},
    )
    server = SGLangServer(settings, log_file=folder / "server.log")
    await server.start(timeout_s=300)
    tell(server, signal.SIGSTOP)
    try:
        yield server
    finally:
        tell(server, signal.SIGCONT)
        await server.stop()


Side = Callable[[PreTrainedModel], AbstractAsyncContextManager[Burst]]
ENGINES: dict[str, Side] = {
    "embedded engine": ours,
    "generate, dynamic cache": generate,
    "continuous batching": continuous_batching,
}


async def measure(side: Side, model: PreTrainedModel, count: int, seconds: float) -> list[float]:
    """Tokens per second of each repeat, after one that is not counted."""
    vocab = model.get_input_embeddings().num_embeddings
    prompts = torch.randint(vocab, (count, PROMPT)).tolist()
    rates = []
    async with side(model) as burst:
        await burst(prompts)
        until = time.perf_counter() + seconds
        while not rates or time.perf_counter() < until:
            started = time.perf_counter()
            tokens = await burst(prompts)
            rates.append(tokens / (time.perf_counter() - started))
            assert tokens == count * NEW
    return rates


async def compare(
    sides: dict[str, Side], model: PreTrainedModel, options: argparse.Namespace
) -> dict[tuple[str, int], list[float]]:
    """Tokens per second of every side and number of requests in flight."""
    rates: dict[tuple[str, int], list[float]] = {}
    for count in options.in_flight:
        for name in [*sides, *reversed(sides)]:
            found = await measure(sides[name], model, count, options.seconds / 2)
            rates.setdefault((name, count), []).extend(found)
    return rates


async def compared(
    model: PreTrainedModel, options: argparse.Namespace
) -> dict[tuple[str, int], list[float]]:
    """With SGLang where it is installed."""
    if not options.sglang_python or options.device != "cpu":
        print("without SGLang: SGLANG_PYTHON is not set, or this is not a CPU\n")
        return await compare(ENGINES, model, options)
    with tempfile.TemporaryDirectory() as folder:
        async with sglang(model, options.sglang_python, Path(folder)) as server:
            sides = {**ENGINES, "SGLang, PyTorch's kernels": partial(served, server)}
            return await compare(sides, model, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a causal LM; default: a random Qwen3 of 3M")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=8.0, help="per cell")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--sglang-python", default=os.environ.get("SGLANG_PYTHON"))
    options = parser.parse_args()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # misses psutil
    dtype = getattr(torch, options.dtype)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    else:
        model = random_qwen3(dtype)
    rates = asyncio.run(compared(model.to(options.device), options))
    print(f"{options.model or 'random Qwen3, 3M'}, {options.dtype}, {options.device}, ", end="")
    print(f"{torch.get_num_threads()} threads, {loads()} (1, 5, 15 min), tokens/s")
    print("| in flight |" + "".join(f" {count} |" for count in options.in_flight))
    print("|---|" + "---|" * len(options.in_flight))
    for name in dict.fromkeys(name for name, _ in rates):
        cells = [rates[name, count] for count in options.in_flight]
        row = "".join(f" {max(cell):.0f} ({statistics.median(cell):.0f}) |" for cell in cells)
        print(f"| {name} |{row}")


if __name__ == "__main__":
    main()
