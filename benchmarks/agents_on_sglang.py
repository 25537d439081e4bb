"""Agents beside bare requests: 256 runs of 4 model calls on one SGLang server, on CPUs.

    python benchmarks/agents_on_sglang.py --sglang-python PYTHON    # tests/sglang_env.sh makes one

Needs about ten minutes and two cores. The sides take turns on one server, whose cache is flushed
before each; every side has 256 streams of 4 requests, each sent when the one before is answered:

    raw          one process, an aiohttp session, the prompts as token ids; nothing else
    agents, W    W processes with a ``RolloutWorker`` each: a LangGraph graph a run, whose nodes are
                 the model and a tool that answers at once
    raw, burnt   raw beside processes that burn the CPU time that the agents take beyond raw's

**The same requests.** First prompts are equal, and so are the tool's answers, which raw gets as
tokens from a recorded round of agents; between them each side puts what it has sampled itself, so
that its next prompt finds its own keys and values in the cache. Every request samples exactly N
tokens: the model (a random Qwen3 of 3M parameters) is made so that special tokens have probability
0, so nothing ends early. Prompt and cached tokens of both sides are printed.

**Full.** The server logs every decode step (``decode_log_interval=1``), in milliseconds
(``SGLANG_LOG_MS=1``), with its ``#running-req``. The time between two log lines counts as full when
both are decode steps of all 256 requests, and as nearly full when both are of at least 230;
whatever touches a prefill or a smaller batch does not.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import os
import re
import statistics
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SGLANG_LOG_MS", "1")

import aiohttp
import psutil
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph

from chatlearn.cluster.settings import Vocabulary, server_settings
from chatlearn.cluster.worker import RolloutWorker
from chatlearn.config import GrpoConfig
from chatlearn.config.load import load_config
from chatlearn.models.agent import BaseAgentGraph, register
from chatlearn.models.engine.sglang_server import SGLangServer
from chatlearn.rewards import reward
from chatlearn.types import Budget, SamplingParams, Session, Task, Trajectory

RUNS, CALLS, GROUP = 256, 4, 8
PROMPT_ROOM = 256
"""Tokens of a context beside the sampled ones: the question and three answers of the tool."""

# the agent -------------------------------------------------------------------------------------


@tool
async def checksum(text: str) -> str:
    """CRC-32 of a text, as eight hexadecimal digits."""
    return f"{zlib.crc32(text.encode()):08x}"


@register("four_calls")
class FourCalls(BaseAgentGraph):
    """Calls the model four times, and a tool on each of the first three answers.

    An untrained model asks for no tool, so the graph does it in the model's place.
    """

    def build_graph(self) -> StateGraph:
        async def model(state: MessagesState) -> dict:
            return {"messages": [await self.llm.ainvoke(state["messages"])]}

        async def use_tool(state: MessagesState) -> dict:
            call = {
                "type": "tool_call",
                "id": f"call_{len(state['messages'])}",
                "name": checksum.name,
                "args": {"text": state["messages"][-1].text},
            }
            return {"messages": [await checksum.ainvoke(call)]}

        def goes_on(state: MessagesState) -> str:
            calls = sum(message.type == "ai" for message in state["messages"])
            return "tool" if calls < CALLS else END

        graph = StateGraph(MessagesState)
        graph.add_node("model", model)
        graph.add_node("tool", use_tool)
        graph.add_edge(START, "model")
        graph.add_conditional_edges("model", goes_on, ["tool", END])
        graph.add_edge("tool", "model")
        return graph


@reward("four_calls")
def nothing(**_: object) -> float:
    """A reward is computed, as in a real run; it costs nothing."""
    return 0.0


# model and configuration -----------------------------------------------------------------------

CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_model(folder: str) -> Vocabulary:
    """A random Qwen3 of 3M parameters that samples bytes, and never a special token.

    One layer, because SGLang's attention on a CPU takes the requests of a batch one by one: more
    layers of the same size only make the server slower, which would flatter the agents.

    Channel 0 of the residual stream is 1 from the embedding to the head, because no layer writes
    it; only the rows of special tokens read it, and have a logit of minus some thousands.

    Returns: its vocabulary, with the tokens that would end a turn.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        for token in tokenizer.convert_tokens_to_ids(list(SPECIAL)):
            model.lm_head.weight[token] = 0.0
            model.lm_head.weight[token, 0] = -1e4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Vocabulary(len(tokenizer), frozenset([tokenizer.eos_token_id]))


def configuration(model: str, python: str, longest: int) -> GrpoConfig:
    """Of a cluster run whose calls sample at most ``longest`` tokens.

    On a CPU, a server gets a cache of 64 full contexts unless told otherwise; these runs need 256.
    """
    cache = RUNS * (PROMPT_ROOM + CALLS * longest)
    settings = {
        "runtime_args.cluster": "ray",
        "runtime_args.rollout_backend": "sglang",
        "runtime_args.import_modules": f"[{Path(__file__).resolve()}]",
        "runtime_args.data_path": "none.json",
        "runtime_args.max_concurrent_rollouts": RUNS,
        "models.policy.sglang_python": python,
        "models.policy.max_concurrent_requests": RUNS,
        "models.policy.max_prompt_tokens_length": PROMPT_ROOM,
        "models.policy.max_response_tokens_length": CALLS * longest,
        "models.policy.max_tokens_per_turn": longest,
        "models.policy.sglang_args": f"{{decode_log_interval: 1, max_total_tokens: {cache}}}",
        "models.policy_trainer.load": model,
        "models.policy_trainer.precision": "fp32",
    }
    return load_config(None, [f"{key}={value}" for key, value in settings.items()])


def limits(cfg: GrpoConfig, tokens: int) -> tuple[SamplingParams, Budget]:
    """Of a run whose calls sample ``tokens`` each."""
    sampling = replace(cfg.train_sampling(), max_new_tokens=tokens)
    return sampling, Budget(tokens, CALLS * tokens, cfg.max_context)


# the agents' side ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """What the four requests of one run are made of, besides the sampled tokens."""

    first: list[int]
    """The first prompt."""
    tails: list[list[int]]
    """What comes between an answer and the next."""


@dataclass(frozen=True)
class Part:
    """What one process did in a round."""

    started: float
    """``time.perf_counter``, which all processes share."""
    ended: float
    cpu_s: float
    sampled: int
    prompt: int
    cached: int
    streams: list[Stream]


def tasks_of(share: range) -> list[tuple[Task, Session]]:
    """Groups of 8 siblings, each group on a prompt of its own."""
    found = []
    for run in share:
        group, sibling = divmod(run, GROUP)
        question = f"Question {group:03d}: say something that has a checksum."
        messages = [{"role": "user", "content": question}]
        task = Task(f"q:{group}", messages, "four_calls", None, "four_calls", None)
        found.append((task, Session(f"q:{group}", str(sibling))))
    return found


def stream_of(trajectory: Trajectory, tokens: int) -> Stream:
    """The stream of one run, after a look whether it did what this benchmark says."""
    turns = trajectory.turns
    lengths = [len(turn.completion.token_ids) for turn in turns]
    if lengths != [tokens] * CALLS or trajectory.reward is None:
        raise SystemExit(f"{trajectory.uid}: {lengths} {trajectory.outcome} {trajectory.error}")
    tails = []
    for before, after in pairwise(turns):
        held = before.token_ids
        assert after.parent == before.id
        assert after.prompt_ids[: len(held)] == held
        tails.append(after.prompt_ids[len(held) :])
    return Stream(turns[0].prompt_ids, tails)


def work(
    pipe: Connection, cfg: GrpoConfig, url: str, vocabulary: Vocabulary, share: range, workers: int
) -> None:
    """A rollout worker's process: rounds of ``share``, each on a number of tokens from ``pipe``."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # connections end with the process

    async def main() -> None:
        worker = RolloutWorker(cfg, [url], vocabulary, workers)
        tasks = tasks_of(share)
        worker.validate([task for task, _ in tasks])
        pipe.send("ready")
        while (tokens := await asyncio.to_thread(pipe.recv)) is not None:
            sampling, budget = limits(cfg, tokens)
            started, cpu = time.perf_counter(), time.process_time()
            runs = [
                worker.run(
                    task, sampling=sampling, budget=budget, session=session, home=0, version=0
                )
                for task, session in tasks
            ]
            trajectories = await asyncio.gather(*runs)
            ended, cpu = time.perf_counter(), time.process_time() - cpu
            stats = worker.stats()
            fresh, cached = stats["engine/prefill_tokens"], stats["engine/prefill_tokens_reused"]
            streams = [stream_of(t, tokens) for t in trajectories]
            sampled = int(stats["engine/tokens_sampled"])
            pipe.send(Part(started, ended, cpu, sampled, int(fresh + cached), int(cached), streams))

    asyncio.run(main())


class Workers:
    """``count`` processes that share the runs; each has an event loop and a ``RolloutWorker``."""

    def __init__(self, count: int, cfg: GrpoConfig, url: str, vocabulary: Vocabulary) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes = []
        for i in range(count):
            here, there = spawn.Pipe()
            share = range(i * RUNS // count, (i + 1) * RUNS // count)
            args = (there, cfg, url, vocabulary, share, count)
            spawn.Process(target=work, args=args, daemon=True, name=f"worker {i}").start()
            self._pipes.append(here)
        for pipe in self._pipes:
            assert pipe.recv() == "ready"

    async def round(self, tokens: int) -> list[Part]:
        for pipe in self._pipes:
            pipe.send(tokens)
        return [await asyncio.to_thread(pipe.recv) for pipe in self._pipes]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)


# the other side --------------------------------------------------------------------------------


async def raw(url: str, streams: Sequence[Stream], tokens: int) -> Part:
    """The same requests with nothing around them."""
    sampled = prompts = cached = 0

    async def stream(http: aiohttp.ClientSession, made_of: Stream) -> None:
        nonlocal sampled, prompts, cached
        prompt = made_of.first
        for tail in [*made_of.tails, []]:
            body = {
                "input_ids": prompt,
                "sampling_params": {"temperature": 1.0, "max_new_tokens": tokens},
                "return_logprob": True,
            }
            async with http.post(f"{url}/generate", json=body) as answer:
                said = await answer.json()
            ids = said["output_ids"]
            assert len(ids) == tokens
            sampled += len(ids)
            prompts += said["meta_info"]["prompt_tokens"]
            cached += said["meta_info"]["cached_tokens"]
            prompt = prompt + ids + tail

    started, cpu = time.perf_counter(), time.process_time()
    timeout = aiohttp.ClientTimeout(total=3600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        await asyncio.gather(*(stream(http, made_of) for made_of in streams))
    ended, cpu = time.perf_counter(), time.process_time() - cpu
    return Part(started, ended, cpu, sampled, prompts, cached, [])


def burn(share: float) -> None:
    """Use ``share`` of a core, in slices of 20 ms, until terminated."""
    while True:
        began, cpu = time.perf_counter(), time.process_time()
        while time.process_time() - cpu < 0.02 * share:
            pass
        time.sleep(max(0.0, 0.02 - (time.perf_counter() - began)))


@contextmanager
def burnt(cores: float) -> Iterator[None]:
    """While inside, two processes burn ``cores`` of CPU together."""
    if not cores:
        yield
        return
    spawn = multiprocessing.get_context("spawn")
    burners = [spawn.Process(target=burn, args=(cores / 2,), daemon=True) for _ in range(2)]
    for burner in burners:
        burner.start()
    time.sleep(8)  # they import this file first
    try:
        yield
    finally:
        for burner in burners:
            burner.terminate()
            burner.join()


# measuring -------------------------------------------------------------------------------------

_STEP = re.compile(r"^\[(\S+ \S+?)\] (Decode|Prefill) batch, .*?#running-req: (\d+)", re.MULTILINE)


def fullness(log: str, seconds: float) -> tuple[float, float, float]:
    """Shares of ``seconds`` with a full and a nearly full batch, and the mean number of running
    requests."""
    steps = [
        (datetime.fromisoformat(when).timestamp(), kind == "Decode", int(running))
        for when, kind, running in _STEP.findall(log)
    ]
    full = nearly = mass = 0.0
    for (before, decoded, had), (now, decodes, has) in pairwise(steps):
        least = min(had, has)
        full += (now - before) * (decoded and decodes and least == RUNS)
        nearly += (now - before) * (decoded and decodes and least >= 0.9 * RUNS)
        mass += (now - before) * least
    return full / seconds, nearly / seconds, mass / seconds


@dataclass(frozen=True)
class Round:
    """One side's turn."""

    rate: float
    """Sampled tokens a second."""
    seconds: float
    full: float
    """Share of the time."""
    nearly: float
    running: float
    """Requests in the batch, over the time."""
    client_s: float
    """CPU seconds of the client processes."""
    server_s: float
    prompt: int
    cached: int
    others: float
    """Cores that processes of others used meanwhile."""
    load: float
    """Load average of the last minute at the end."""


class Bench:
    """One server and the sides that take turns on it.

    Args:
        log: the server's.
        calm: a turn begins when others use fewer cores than this, or after two minutes; one beside
            which they used more is taken again, up to twice, and the calmest counts.
    """

    def __init__(self, server: SGLangServer, log: Path, calm: float) -> None:
        self._server, self._log, self._calm = server, log, calm

    async def turn(
        self, side: Callable[[], Awaitable[list[Part]]], burning: float = 0.0
    ) -> tuple[Round, list[Part]]:
        """Flush the cache, let ``side`` run beside ``burning`` cores that work, and measure."""
        tries: list[tuple[Round, list[Part]]] = []
        while len(tries) < 3:
            await self._until_calm()
            with burnt(burning):
                tries.append(await self._once(side, burning))
            if tries[-1][0].others <= self._calm:
                break
        return min(tries, key=lambda found: found[0].others)

    async def _once(
        self, side: Callable[[], Awaitable[list[Part]]], burning: float
    ) -> tuple[Round, list[Part]]:
        async with aiohttp.ClientSession() as http:
            answer = await http.post(f"{self._server.url}/flush_cache")
            answer.raise_for_status()
        size, cpu, busy = self._log.stat().st_size, self._cpu_s(), _busy_s()
        parts = await side()
        cpu, busy = self._cpu_s() - cpu, _busy_s() - busy
        seconds = max(p.ended for p in parts) - min(p.started for p in parts)
        await asyncio.sleep(0.2)  # the last lines of the log
        with self._log.open("rb") as file:
            file.seek(size)
            full, nearly, running = fullness(file.read().decode(errors="replace"), seconds)
        measured = Round(
            rate=sum(p.sampled for p in parts) / seconds,
            seconds=seconds,
            full=full,
            nearly=nearly,
            running=running,
            client_s=sum(p.cpu_s for p in parts),
            server_s=cpu,
            prompt=sum(p.prompt for p in parts),
            cached=sum(p.cached for p in parts),
            others=max(0.0, (busy - cpu - sum(p.cpu_s for p in parts)) / seconds - burning),
            load=os.getloadavg()[0],
        )
        return measured, parts

    async def _until_calm(self) -> None:
        """Wait while others work; our own processes are idle now."""
        for _ in range(60):
            busy = _busy_s()
            await asyncio.sleep(2.0)
            if _busy_s() - busy < 2.0 * self._calm:
                return

    def _cpu_s(self) -> float:
        server = psutil.Process(self._server.pid)
        times = [p.cpu_times() for p in (server, *server.children(recursive=True))]
        return sum(t.user + t.system for t in times)


def _busy_s() -> float:
    """CPU seconds that this machine has worked."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq


async def compare(
    bench: Bench, url: str, sides: dict[str, Workers], tokens: int, repeats: int, burning: bool
) -> dict[str, list[Round]]:
    """Every side ``repeats`` times in turns, at ``tokens`` a call; with ``burning`` "raw, burnt" is
    one of them."""
    first = next(iter(sides.values()))
    parts = await first.round(tokens)  # warms up, and is recorded
    streams = [stream for part in parts for stream in part.streams]

    async def bare() -> list[Part]:
        return [await raw(url, streams, tokens)]

    found: dict[str, list[Round]] = {}

    def note(name: str, measured: Round) -> None:
        found.setdefault(name, []).append(measured)
        print(f"N={tokens} {name}: {measured}", flush=True)

    for _ in range(repeats):
        beside = (await bench.turn(bare))[0]
        note("raw", beside)
        for name, workers in sides.items():
            ours, _ = await bench.turn(lambda workers=workers: workers.round(tokens))
            note(name, ours)
        more = ours.client_s / ours.seconds - beside.client_s / beside.seconds
        if burning:
            note("raw, burnt", (await bench.turn(bare, more))[0])
    return found


COLUMNS = (
    "N",
    "side",
    "tokens/s, median (all)",
    "of raw",
    "batch full, nearly full",
    "running, mean",
    "client CPU s",
    "server CPU s",
    "s",
    "prompt tokens, of them cached",
    "cores used by others",
    "load",
)


def show(tokens: int, found: dict[str, list[Round]]) -> None:
    def median(rounds: Sequence[Round], what: str) -> float:
        return statistics.median(getattr(r, what) for r in rounds)

    base = median(found["raw"], "rate")
    for name, rounds in found.items():
        rates = ", ".join(f"{r.rate:.0f}" for r in rounds)
        cells = [
            str(tokens),
            name,
            f"{median(rounds, 'rate'):.0f} ({rates})",
            f"{median(rounds, 'rate') / base:.2f}",
            f"{median(rounds, 'full'):.2f}, {median(rounds, 'nearly'):.2f}",
            f"{median(rounds, 'running'):.0f}",
            f"{median(rounds, 'client_s'):.1f}",
            f"{median(rounds, 'server_s'):.1f}",
            f"{median(rounds, 'seconds'):.1f}",
            f"{median(rounds, 'prompt'):.0f}, {median(rounds, 'cached'):.0f}",
            f"{median(rounds, 'others'):.1f}",
            f"{min(r.load for r in rounds):.1f}–{max(r.load for r in rounds):.1f}",
        ]
        print("| " + " | ".join(cells) + " |")


async def measure(options: argparse.Namespace, folder: Path) -> None:
    model = str(folder / "model")
    vocabulary = make_model(model)
    cfg = configuration(model, options.sglang_python, max(options.tokens))
    server = SGLangServer(server_settings(cfg), log_file=folder / "server.log")
    await server.start(timeout_s=300)
    sides: dict[str, Workers] = {}
    try:
        for count in options.workers:
            sides[f"agents, {count}"] = Workers(count, cfg, server.url, vocabulary)
        bench = Bench(server, folder / "server.log", options.calm)
        tables = {
            tokens: await compare(
                bench, server.url, sides, tokens, options.repeats, tokens == options.tokens[0]
            )
            for tokens in options.tokens
        }
    finally:
        for workers in sides.values():
            workers.close()
        await server.stop()
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for tokens, found in tables.items():
        show(tokens, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sglang-python", default="null", help="default: this one")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 32, 128], help="N; 'burnt' with the first"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--calm", type=float, default=0.3, help="cores that others may use")
    parser.add_argument("--folder", type=Path, help="keep model and log here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(options, options.folder or Path(folder)))


if __name__ == "__main__":
    main()
