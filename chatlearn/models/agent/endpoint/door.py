"""The door to the policy for agents that are not LangGraph: OpenAI's API on this machine.

``async with self.endpoint() as door`` (``with`` in a thread) opens one in a run. It has a key of
its own; whoever asks with it asks in that run: the same recorder, the same tree, the same laws. A
request is served by a task in the context that opened the door, so that an engine that keeps step
with the agents (``models/engine/lockstep.py``) knows whose request it gets, and from which thread.

    agent  ── HTTP, door.api_key ──►  server  ──►  Entrance.ask  ──►  asking.ask
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables.config import ensure_config

from chatlearn.errors import AgentError
from chatlearn.interfaces import asked_by_socket
from chatlearn.models.agent.asking import Policy, Position, Wish, ask
from chatlearn.models.agent.endpoint.request import Answers, Refusal
from chatlearn.models.agent.recorder import Recorder
from chatlearn.models.agent.run import Run, current_run, on_loop, running_loop
from chatlearn.types import StopReason, Turn

if TYPE_CHECKING:
    from chatlearn.models.agent.endpoint.server import EndpointServer

MAX_AT_ONCE = 64
"""Answers of one door that may be under way at the same time."""

RUN_IS_OVER = "the agent run of this key is over"

_answers: WeakKeyDictionary[Recorder, Answers] = WeakKeyDictionary()
"""What each run's clients were sent, whichever of its doors they came by."""


@dataclass(frozen=True, slots=True)
class Door:
    """What a client needs: ``OpenAI(base_url=door.base_url, api_key=door.api_key)``."""

    base_url: str
    """``http://127.0.0.1:{port}/v1``."""
    api_key: str = field(repr=False)
    """Secret, good for this door only."""
    model: str
    """A name for clients that must give one; the policy answers to any."""


@dataclass(slots=True, eq=False)
class Entrance:
    """The server's side of a door."""

    run: Run
    policy: Policy
    position: Position
    context: Context
    """Of the code that opened the door."""
    answers: Answers
    is_over: bool = False
    asks: set[asyncio.Task] = field(default_factory=set)

    def ask(self, messages: Sequence[BaseMessage], wish: Wish, node: str) -> asyncio.Task:
        """Begin one call of the policy, in the context of the run. Cancelled when the door closes.

        Raises:
            Refusal: too many calls are under way.
        """
        if len(self.asks) >= MAX_AT_ONCE:
            raise Refusal(
                f"{MAX_AT_ONCE} requests of this run are under way; await some of them first",
                status=429,
                code="too_many_requests",
            )
        position = replace(self.position, node=node) if node else self.position
        body = self._ask(messages, wish, position)
        task = self.context.run(self.run.loop.create_task, body)  # 3.10 has no context=
        self.asks.add(task)
        task.add_done_callback(self._end)
        return task

    async def close(self) -> None:
        """Refuse what comes, cancel what is under way and wait until it is gone."""
        self.is_over = True
        asks = list(self.asks)
        for task in asks:
            task.cancel()
        if asks:
            await asyncio.wait(asks)

    async def _ask(
        self, messages: Sequence[BaseMessage], wish: Wish, position: Position
    ) -> tuple[Turn, AIMessage]:
        turn, answer = await ask(self.run, self.policy, messages, wish, position)
        if turn.completion.stop_reason is StopReason.ABORT:  # the engine forgot the session
            self.is_over = True
        return turn, answer

    def _end(self, task: asyncio.Task) -> None:
        self.asks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked may be gone: nobody is left to read it


class Endpoint:
    """Opens a door for as long as ``async with`` or ``with`` lasts; see ``Door``.

    ``with`` is for code in a thread, such as a plain ``def run``.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._opened: tuple[Run, EndpointServer, str] | None = None

    async def __aenter__(self) -> Door:
        """Raises ``AgentError`` outside an agent run."""
        run, opening = self._opening()
        return await on_loop(run.loop, opening)

    async def __aexit__(self, *exc_info: object) -> None:
        if (closing := self._closing()) is not None:
            await on_loop(closing[0].loop, closing[1])

    def __enter__(self) -> Door:
        """Raises ``AgentError`` outside an agent run, and on its event loop."""
        run, opening = self._opening()
        if running_loop() is run.loop:
            opening.close()
            raise AgentError(
                "`with self.endpoint()` was used on the event loop, which a client inside it would "
                "block for ever; use `async with self.endpoint()` in async code"
            )
        return asyncio.run_coroutine_threadsafe(opening, run.loop).result()

    def __exit__(self, *exc_info: object) -> None:
        closing = self._closing()
        if closing is None or closing[0].loop.is_closed():
            if closing is not None:
                closing[1].close()
            return
        asyncio.run_coroutine_threadsafe(closing[1], closing[0].loop).result()

    def _opening(self) -> tuple[Run, Any]:
        if self._opened is not None:
            raise AgentError("this endpoint is open already; call self.endpoint() for another door")
        run = current_run()
        callbacks = ensure_config().get("callbacks")
        context = copy_context()
        context.run(asked_by_socket.set, True)
        entrance = Entrance(
            run=run,
            policy=self._policy,
            position=Position.of(callbacks),  # of the graph node, when one opens the door
            context=context,
            answers=_answers.setdefault(run.recorder, Answers()),
        )
        return run, self._open(entrance)

    async def _open(self, entrance: Entrance) -> Door:
        """In the event loop of the run."""
        from chatlearn.models.agent.endpoint.server import EndpointServer  # loads FastAPI

        server = EndpointServer.of(asyncio.get_running_loop())
        key = f"sk-chatlearn-{secrets.token_urlsafe(32)}"
        server.admit(key, entrance)
        self._opened = entrance.run, server, key
        return Door(server.base_url, key, self._policy.name)

    def _closing(self) -> tuple[Run, Any] | None:
        if self._opened is None:
            return None
        run, server, key = self._opened
        self._opened = None
        return run, server.close_door(key)
