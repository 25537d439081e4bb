"""Asks an environment service, and always gives the instance back.

    async with EnvironmentClient(url).instance(task_id) as env:
        step = await env.step("right")
        score = (await env.evaluate()).score

What the service, the network or an expired instance break is an ``EnvironmentLost``: the one run
that it happened to fails by that name, is tried again, and is never trained. What the agent or the
environment's own code did wrong is an ``AgentError``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from chatlearn.data.environment.protocol import (
    FULL,
    KEY_VARIABLE,
    UNKNOWN_INSTANCE,
    Evaluation,
    Step,
)
from chatlearn.errors import AgentError, ChatLearnError, DataError, EnvironmentLost
from chatlearn.types import Message

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0
_CONNECT_S = 5.0
_RELEASE_S = 5.0
_KEEPALIVE_S = 2.0
"""Below the 5 s after which the server closes an idle connection: a request never meets that."""
PATIENCE_S = 30.0
_READING_PATIENCE_S = 1.0
_PAUSES_S = (0.2, 4.0)
"""Before asking again: at first, and at most; each is twice the one before."""
_SAFE = ("tasks", "release")
"""Asked twice, these do what they do once. Any other verb is asked again only when the service was
not reached or had no room, so that no action is taken twice."""


class EnvironmentClient:
    """Talks to the service at ``url``; opens a connection for each instance, holds none itself.

    Args:
        url: ``http://host:port``.
        api_key: bearer key; None takes ``$CHATLEARN_ENVIRONMENT_KEY``, '' sends none.
        timeout_s: how long one call may take.
        patience_s: how long to go on asking a service that cannot be reached or is full: it may be
            starting again.
        on_lost: told of every ``EnvironmentLost`` before it is raised.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        patience_s: float = PATIENCE_S,
        on_lost: Callable[[EnvironmentLost], None] = lambda error: None,
    ) -> None:
        parts = urlsplit(url if isinstance(url, str) else "")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise AgentError(
                f"the environment service is {url!r}; give its URL, such as http://127.0.0.1:8765"
            )
        self.url = url.rstrip("/")
        key = os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout_s, self._patience_s = timeout_s, patience_s
        self._on_lost = on_lost

    async def tasks(self, split: str) -> list[dict[str, Any]]:
        """The tasks of a split, each with its ``task_id``. Raises as the calls of an instance do,
        and ``AgentError`` for an answer that is not a list of tasks."""
        async with self._session() as session:
            said = await self._ask(session, "tasks", {"split": split})
        found = said.get("tasks")
        whole = isinstance(found, list) and all(isinstance(task, dict) for task in found)
        if not whole or not all(isinstance(task.get("task_id"), str) for task in found):
            raise AgentError(
                f"{self.url}/tasks?split={split} answered {str(said)[:100]!r}; it must be "
                '{"tasks": [...]} of objects that each have a text "task_id"'
            )
        return found

    @asynccontextmanager
    async def instance(
        self, task_id: str, params: dict[str, Any] | None = None
    ) -> AsyncIterator[Instance]:
        """A new instance of a task, released at the end however that comes.

        Raises:
            EnvironmentLost: the service does not answer in time or is full.
            AgentError: it refuses: an unknown task, a wrong key, or its own code raised.
        """
        async with self._session() as session:
            body = {"task_id": task_id, "params": params or {}}
            said = await self._ask(session, "create", body)
            if not isinstance(said.get("instance_id"), str):
                raise AgentError(f"{self.url}/create answered {str(said)[:100]!r}: no instance_id")
            env = Instance(self, session, said["instance_id"], task_id, said.get("state"))
            try:
                yield env
            finally:
                await self._release(session, env)

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(keepalive_timeout=_KEEPALIVE_S), headers=self._headers
        )

    async def _release(self, session: aiohttp.ClientSession, env: Instance) -> None:
        if env.is_lost:
            return
        try:
            await self._ask(session, "release", {"instance_id": env.id}, at_most_s=_RELEASE_S)
        except ChatLearnError as error:  # the run has what it came for; the service expires it
            logger.warning("environment %s was not released: %s", env, error)

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        verb: str,
        body: dict[str, Any],
        *,
        at_most_s: float = math.inf,
    ) -> dict[str, Any]:
        """The JSON object of an answer. Raises ``EnvironmentLost`` or ``AgentError``."""
        timeout_s = min(self._timeout_s, at_most_s)
        loop = asyncio.get_running_loop()
        give_up = loop.time() + min(self._patience_s, at_most_s)
        pause_s, longest_s = _PAUSES_S
        while True:
            try:
                return await self._ask_once(session, verb, body, timeout_s)
            except _Unanswered as error:
                may_repeat = verb in _SAFE or not error.was_heard
                if not may_repeat or loop.time() + pause_s > give_up:
                    raise self._lost(f"{self.url}/{verb} {error}") from error.__cause__
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    async def _ask_once(
        self, session: aiohttp.ClientSession, verb: str, body: dict[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_S)
        url = f"{self.url}/{verb}"
        try:
            if verb == "tasks":
                request = session.get(url, params=body, timeout=timeout)
            else:
                request = session.post(url, json=body, timeout=timeout)
            async with request as answer:
                text, status = await answer.text(), answer.status
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _Unanswered(f"cannot be reached ({error})", was_heard=False) from error
        except asyncio.TimeoutError as error:
            raise _Unanswered(f"gave no answer in {timeout_s:g} s", was_heard=True) from error
        except (aiohttp.ClientError, UnicodeDecodeError) as error:
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            raise _Unanswered(f"was lost before it answered ({said})", was_heard=True) from error
        except TypeError as error:  # the agent's action is no JSON
            raise AgentError(f"{url}: what was to be sent is not JSON: {error}") from error
        return self._checked(url, status, text)

    def _checked(self, url: str, status: int, text: str) -> dict[str, Any]:
        try:
            said = json.loads(text)
        except ValueError:
            said = None
        if status < 400 and isinstance(said, dict):
            return said
        error = said.get("error") if isinstance(said, dict) else None
        error = error if isinstance(error, dict) else {"message": text.strip()[:200]}
        message = f"{url} was refused ({status}): {error.get('message') or 'without a word'}"
        if error.get("code") == FULL:
            raise _Unanswered(f"has no room: {error.get('message')}", was_heard=False)
        if error.get("code") == UNKNOWN_INSTANCE or status in (502, 503, 504):
            raise self._lost(message)
        if status == 401:
            message += f"; set ${KEY_VARIABLE} to the key of the service"
        elif status < 400:
            message = f"{url} answered {text[:100]!r}, not a JSON object; is it another service?"
        raise AgentError(message)

    def _lost(self, message: str) -> EnvironmentLost:
        error = EnvironmentLost(message)
        self._on_lost(error)
        return error


@dataclass(slots=True, eq=False)
class Instance:
    """One environment while a run plays it. One call at a time."""

    client: EnvironmentClient
    session: aiohttp.ClientSession
    id: str
    task_id: str
    state: Any
    """As ``create`` or the last ``step`` left it."""
    done: bool = False
    is_lost: bool = False

    def __str__(self) -> str:
        return f"{self.client.url} instance {self.id} of task {self.task_id!r}"

    async def step(self, action: Any) -> Step:
        """Act; ``action`` is any JSON. Raises ``EnvironmentLost`` or ``AgentError``."""
        said = await self._ask("step", {"action": action})
        reward, info = said.get("reward"), said.get("info") or {}
        if reward is not None:
            reward = _number(reward, f"{self}: the reward of a step")
        step = Step(said.get("state"), reward, bool(said.get("done")), dict(info))
        self.state, self.done = step.state, step.done
        return step

    async def evaluate(self, messages: list[Message] | None = None) -> Evaluation:
        """The score. Raises ``EnvironmentLost`` or ``AgentError``, also for a score that is not a
        finite number."""
        said = await self._ask("evaluate", {"messages": messages or []})
        rest = {key: value for key, value in said.items() if key not in ("score", "info")}
        info = said.get("info") if isinstance(said.get("info"), dict) else {}
        return Evaluation(_number(said.get("score"), f"{self}: the score"), {**rest, **info})

    async def _ask(self, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return await self.client._ask(self.session, verb, {"instance_id": self.id, **body})
        except EnvironmentLost:
            self.is_lost = True
            raise


def read_tasks(url: str, split: str) -> list[dict[str, Any]]:
    """The tasks of a service, also for code that is in an event loop.

    Raises:
        DataError: it cannot be reached or refuses; names the URL.
    """
    try:
        client = EnvironmentClient(url, patience_s=_READING_PATIENCE_S)
        with ThreadPoolExecutor(1) as thread:  # asyncio.run refuses inside a loop, as of a notebook
            return thread.submit(lambda: asyncio.run(client.tasks(split))).result()
    except (AgentError, EnvironmentLost) as error:
        raise DataError(
            f"no tasks from the environment service: {error}; start it with `chatlearn data "
            "serve-environment`, or correct the URL"
        ) from error


class _Unanswered(Exception):
    """A request that was not answered; whether the service may have heard it and acted."""

    def __init__(self, message: str, *, was_heard: bool) -> None:
        super().__init__(message)
        self.was_heard = was_heard


def _number(value: Any, what: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise AgentError(f"{what} is {value!r}; it must be a finite number")
    return float(value)
