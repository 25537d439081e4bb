"""What recording costs: a LangGraph graph on our chat model beside the same graph on a fake one.

    python scripts/tiny_model.py --out pretrained_models/tiny
    python benchmarks/agent_overhead.py --model pretrained_models/tiny

The graph is a node that calls the model and a ``ToolNode``; a run is 4 model calls and 3 tool
calls. 1,000 runs, 64 at once, the sides in turns (A B C A B C …). Sides:

    ours        ``run_agent``: run, recorder, prompts as tokens, parsed answers, reward; a
                ``ScriptedEngine`` that answers at once with tokens made beforehand
    fake        LangChain's ``GenericFakeChatModel`` with the same messages. It has no async
                method, so LangChain calls it in a thread
    fake async  the same with an async method, as a client of a server has: no thread

Each run asks and calls something else, so nothing is remembered between runs but the first prompt
of 8 siblings. Both sides get fresh message objects.

The second table is the stall of the event loop: 64 runs at once for as long, each model call waits
2 to 8 ms (asyncio), and a task that sleeps 1 ms at a time notes how late it wakes.

``--profile`` prints our functions by their own time, of one round.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import itertools
import os
import pstats
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolCall
from langchain_core.outputs import ChatResult
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from transformers import AutoTokenizer

from chatlearn.models.agent import BaseAgentGraph
from chatlearn.models.agent.agent_run import run_agent
from chatlearn.models.agent.chat_model import CustomChatModel
from chatlearn.models.agent.prompt_builder import PromptBuilder
from chatlearn.models.agent.tool_parser import guess, tool_parser
from chatlearn.models.engine.scripted import ScriptedEngine
from chatlearn.types import Budget, Completion, Outcome, SamplingParams, Session, StopReason, Task

CALLS, GROUP = 4, 8
Side = Callable[[int], Awaitable[None]]
"""One run, by its number."""


@tool
async def multiply(a: int, b: int) -> str:
    """Multiply two whole numbers."""
    return f"{a} times {b} is {a * b}"


TOOLS = [multiply]


def graph_on(model: Any) -> Any:
    async def agent(state: MessagesState):
        return {"messages": [await model.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("agent", agent)
    graph.add_node("tools", ToolNode(TOOLS))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", tools_condition)
    graph.add_edge("tools", "agent")
    return graph.compile()


def question(number: int) -> str:
    group = number // GROUP
    return (
        f"A shop sells {group} boxes of {group + 7} pens a day, at 3 coins a pen. How many coins "
        "does it take in 5 days? Multiply step by step with the tool, then say the number."
    )


def arguments(number: int, call: int) -> dict[str, int]:
    return {"a": number * 10 + call, "b": number % 97 + 2}


def said(number: int, call: int) -> str:
    """What the model says before its call, or as its answer."""
    if call == CALLS - 1:
        return f"The shop takes in {number * 15} coins in 5 days, if all pens are sold."
    return f"Step {call + 1}: I multiply what I have so far."


class Agent(BaseAgentGraph):
    def build_graph(self):
        return graph_on(self.llm.bind_tools(TOOLS))


async def rewarded(**row: Any) -> float:
    return 1.0


# the sides -------------------------------------------------------------------------------------


class OurSide:
    """Runs of ``run_agent`` on an engine whose answers are tokens already."""

    def __init__(self, folder: str, delay: Callable[[], float] | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        parser = tool_parser(guess(self.tokenizer.chat_template))
        prompts = PromptBuilder(self.tokenizer, [self.tokenizer.eos_token_id])
        llm = CustomChatModel(tokenizer=self.tokenizer, prompts=prompts, parser=parser)
        self.agent = Agent("overhead", None, llm, self.tokenizer)
        self.agent.compile()
        self.answers: dict[Session, Iterator[Completion]] = {}
        self.engine = Waiting(self._answer, delay)

    def prepare(self, numbers: range) -> None:
        """Tokenise the answers of these runs, and forget older ones."""
        self.engine.requests.clear()
        self.engine.aborted.clear()
        self.answers = {session(n): iter([self._said(n, i) for i in range(CALLS)]) for n in numbers}

    def _said(self, number: int, call: int) -> Completion:
        text = said(number, call)
        if call < CALLS - 1:
            # as the model would write it
            calls = [{"function": {"name": "multiply", "arguments": arguments(number, call)}}]
            message = {"role": "assistant", "content": text, "tool_calls": calls}
            asked = [{"role": "user", "content": "?"}]
            before = self.tokenizer.apply_chat_template(
                asked, tokenize=False, add_generation_prompt=True
            )
            whole = self.tokenizer.apply_chat_template([*asked, message], tokenize=False)
            text = whole.removeprefix(before).rpartition(self.tokenizer.eos_token)[0]
        ids = self.tokenizer.encode(text + self.tokenizer.eos_token, add_special_tokens=False)
        return Completion(ids, [-1.0] * len(ids), StopReason.STOP, (0, 0))

    def _answer(self, prompt_ids: Any, sampling: Any, session: Session) -> Completion:
        return next(self.answers[session])

    async def __call__(self, number: int) -> None:
        task = Task(
            uid=f"overhead:{number // GROUP}",
            messages=[{"role": "user", "content": question(number)}],
            agent_name="overhead",
            agent_cfg_path=None,
            data_source="overhead",
            ground_truth=None,
        )
        trajectory = await run_agent(
            self.agent,
            task,
            engine=self.engine,
            sampling=SamplingParams(),
            budget=Budget(512, 4096, 8192),
            session=session(number),
            reward_function=rewarded,
            timeout_s=60.0,
        )
        assert trajectory.outcome is Outcome.FINISHED, trajectory.error
        assert len(trajectory.turns) == CALLS, trajectory.messages
        assert trajectory.turns[-1].parent == CALLS - 2


class Waiting(ScriptedEngine):
    """A scripted engine that takes ``delay()`` seconds to answer; None = at once."""

    def __init__(self, script: Any, delay: Callable[[], float] | None) -> None:
        super().__init__(script)
        self.delay = delay

    async def generate(self, *args: Any, **kwargs: Any) -> Completion:
        if self.delay is not None:
            await asyncio.sleep(self.delay())
        return await super().generate(*args, **kwargs)


def session(number: int) -> Session:
    return Session(f"1:overhead:{number // GROUP}", f"{number}.0")


_answers: ContextVar[Iterator[AIMessage]] = ContextVar("answers")


class AnswersOfRun:
    """The iterator a ``GenericFakeChatModel`` takes messages from: that of the current run."""

    def __iter__(self) -> AnswersOfRun:
        return self

    def __next__(self) -> AIMessage:
        return next(_answers.get())


class AsyncFake(GenericFakeChatModel):
    """LangChain's fake model with an async method."""

    delay: Any = None

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        if self.delay is not None:
            await asyncio.sleep(self.delay())
        return self._generate(*args, **kwargs)


class FakeSide:
    """Runs of the same graph on a fake model."""

    def __init__(self, model: BaseChatModel) -> None:
        self.graph = graph_on(model.bind(tools=[t.tool_call_schema for t in TOOLS]))

    def prepare(self, numbers: range) -> None:
        pass

    async def __call__(self, number: int) -> None:
        _answers.set(fake_answer(number, call) for call in range(CALLS))
        state = await self.graph.ainvoke({"messages": [("user", question(number))]})
        assert len(state["messages"]) == 2 * CALLS


def fake_answer(number: int, call: int) -> AIMessage:
    calls = []
    if call < CALLS - 1:
        values = arguments(number, call)
        calls = [ToolCall(name="multiply", args=values, id=f"call{call}", type="tool_call")]
    return AIMessage(said(number, call), tool_calls=calls)


# measuring -------------------------------------------------------------------------------------


async def run_all(side: Side, numbers: range, at_once: int) -> None:
    left = iter(numbers)

    async def worker() -> None:
        for number in left:
            await asyncio.create_task(side(number))  # a context of its own, as a rollout has

    await asyncio.gather(*(worker() for _ in range(at_once)))


async def overhead(sides: dict[str, Any], runs: int, rounds: int, at_once: int) -> None:
    cost: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number, (name, side) in itertools.product(range(rounds + 1), sides.items()):
        size = runs if number else 100  # round 0 warms up
        numbers = range(number * runs, number * runs + size)
        side.prepare(numbers)
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        await run_all(side, numbers, at_once)
        spent = time.perf_counter() - wall, time.process_time() - cpu
        if number:
            cost[name].append((spent[0] / runs * 1e3, spent[1] / runs * 1e3))
    say(f"{runs} runs of {CALLS} model calls, {at_once} at once, median of {rounds} rounds")
    say("| side | CPU ms a run | wall ms a run | ours, CPU | ours, wall | CPU of each round |")
    say("|---|---|---|---|---|---|")
    for name, found in cost.items():
        wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        # rounds lie side by side in time, so their ratio bears a machine that is shared
        ratios = [
            statistics.median(a[i] / b[i] for a, b in zip(cost["ours"], found, strict=True))
            for i in (1, 0)
        ]
        rows = " ".join(f"{c:.2f}" for _, c in found)
        say(f"| {name} | {cpu:.2f} | {wall:.2f} | {ratios[0]:.2f}x | {ratios[1]:.2f}x | {rows} |")


async def stall(sides: dict[str, Any], runs: int, rounds: int, at_once: int) -> None:
    late: dict[str, list[float]] = {name: [] for name in sides}

    async def tick(found: list[float]) -> None:
        while True:
            due = time.perf_counter() + 1e-3
            await asyncio.sleep(1e-3)
            found.append((time.perf_counter() - due) * 1e3)

    for number, (name, side) in itertools.product(range(rounds + 1), sides.items()):
        numbers = range(number * runs, number * runs + (runs if number else 100))
        side.prepare(numbers)
        gc.collect()
        ticker = asyncio.create_task(tick(late[name] if number else []))
        await run_all(side, numbers, at_once)
        ticker.cancel()
    say(f"\n{runs} runs, {at_once} at once, calls of 2 to 8 ms; how late a 1 ms sleep wakes, ms")
    say("| side | p50 | p90 | p99 | max | ticks |")
    say("|---|---|---|---|---|---|")
    for name, found in late.items():
        cuts = statistics.quantiles(found, n=100)
        row = f"{cuts[49]:.1f} | {cuts[89]:.1f} | {cuts[98]:.1f} | {max(found):.1f}"
        say(f"| {name} | {row} | {len(found)} |")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pretrained_models/tiny", help="folder with tokenizer")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--profile", choices=["ours", "fake", "fake async"])
    args = parser.parse_args()
    sides = {
        "ours": OurSide(args.model),
        "fake": FakeSide(GenericFakeChatModel(messages=AnswersOfRun())),
        "fake async": FakeSide(AsyncFake(messages=AnswersOfRun())),
    }
    gc.collect()
    gc.freeze()  # as the command line does
    if args.profile:
        side = sides[args.profile]
        side.prepare(range(args.runs + 100))
        profile = cProfile.Profile()

        async def profiled() -> None:
            await run_all(side, range(100), args.at_once)
            profile.enable()
            await run_all(side, range(100, args.runs + 100), args.at_once)
            profile.disable()

        asyncio.run(profiled())
        pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(60)
        return
    asyncio.run(overhead(sides, args.runs, args.rounds, args.at_once))
    draw = random.Random(0)

    def delay() -> float:
        return draw.uniform(2e-3, 8e-3)

    waiting = {
        "ours": OurSide(args.model, delay),
        "fake async": FakeSide(AsyncFake(messages=AnswersOfRun(), delay=delay)),
    }
    asyncio.run(stall(waiting, args.runs, args.rounds, args.at_once))


if __name__ == "__main__":
    main()
