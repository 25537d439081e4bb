"""The run that a call of the policy belongs to, found by context: no agent passes it around."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from chatlearn.errors import AgentError, EngineError
from chatlearn.interfaces import Engine
from chatlearn.models.agent.attempts import Attempts, listen
from chatlearn.models.agent.node_patterns import matches
from chatlearn.models.agent.recorder import Recorder
from chatlearn.rewards.checks import Findings
from chatlearn.types import Budget, SamplingParams, Session

Result = TypeVar("Result")


class BudgetExhausted(AgentError):
    """The run has no tokens left for another turn. Ends the graph; the run counts as truncated."""


@dataclass(slots=True)
class Run:
    """What the chat model must know of the run it is called in."""

    session: Session
    engine: Engine
    sampling: SamplingParams
    budget: Budget
    loop: asyncio.AbstractEventLoop
    agent_name: str = ""
    trainable_nodes: tuple[str, ...] = ("*",)
    train_orphans: bool = False
    recorder: Recorder = field(default_factory=Recorder)
    attempts: Attempts = field(default_factory=Attempts)
    findings: Findings = field(default_factory=Findings)
    """What ``runtime_args.checks`` found."""
    engine_error: EngineError | None = None
    """The first failure of the engine, also when the graph caught it: such a run is not trained."""
    is_over: bool = False
    """Its trajectory is made; a thread that lives on may not add to it."""

    @property
    def is_greedy(self) -> bool:
        """Whether the run itself samples greedily: an evaluation, which nothing is trained on."""
        return self.sampling.temperature == 0

    def sampling_at(self, path: str) -> SamplingParams:
        """How calls at ``path`` sample; ``max_new_tokens`` is the most of one call there."""
        base = replace(self.sampling, nodes=(), max_new_tokens=self.budget.turn_tokens)
        for node in self.sampling.nodes:
            if matches(node.pattern, self.agent_name, path):
                return replace(
                    base,
                    temperature=_either(node.temperature, base.temperature),
                    top_p=_either(node.top_p, base.top_p),
                    top_k=_either(node.top_k, base.top_k),
                    max_new_tokens=min(
                        _either(node.max_tokens, base.max_new_tokens), base.max_new_tokens
                    ),
                )
        return base


def _either(own, otherwise):
    return otherwise if own is None else own


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that this thread is running; None in a thread without one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def on_loop(loop: asyncio.AbstractEventLoop, body: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``body``, which runs in ``loop``; this code may be in another."""
    if running_loop() is loop:
        return await body
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(body, loop))


_current_run: ContextVar[Run | None] = ContextVar("chatlearn_run", default=None)


def set_current_run(run: Run) -> None:
    """Make ``run`` the run of everything this task, and what it starts, does from now on."""
    _current_run.set(run)
    listen(run.attempts)


def current_run() -> Run:
    """The run this code is part of.

    Raises:
        AgentError: called outside an agent run.
    """
    run = _current_run.get()
    if run is None:
        raise AgentError(
            "the policy's chat model was called outside an agent run; call self.llm only inside "
            "the graph or run() (an agent is built before any run exists)"
        )
    return run
