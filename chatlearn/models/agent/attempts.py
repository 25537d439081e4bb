"""Which calls were in vain: made by an attempt that failed and that was made again.

LangChain gives every runnable, node and graph a run of its own and tells callbacks when it begins
and how it ends. A handler of ours listens to that for the whole agent run, whatever the user's code
passes as config, and afterwards knows of each call of the model in which attempt of what it was::

    graph
    ├─ node "draft", task 7f   failed      call 0   superseded: the task has a later attempt
    ├─ node "draft", task 7f   completed   call 1   counts
    └─ node "check", task 02   completed
       ├─ sequence             failed      call 2   superseded: ``with_retry`` ran it again
       └─ sequence             completed   call 3   counts

A node or runnable is tried again when another run of the same name follows a failed one: in the
same task for a node (LangGraph's retry policy, resuming after ``interrupt``), under the same parent
for a runnable. What follows a failed one in ``with_fallbacks`` supersedes it whatever its name. A
cancelled run has lost what it was for. A node that completed inside a failed attempt is superseded
only when the later attempt ran it again, for a sub-graph with a checkpointer goes on where it was.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.tracers.context import register_configure_hook

from chatlearn.types import node_path

_FALLBACKS = "RunnableWithFallbacks"


@dataclass(slots=True, eq=False)
class _Attempt:
    """One run of a runnable, a node, a graph or a tool."""

    name: str
    parent: UUID | None
    task: str | None = None
    """LangGraph's task (``checkpoint_ns``) when the run is a node's, else None."""
    place: tuple[Any, ...] = ()
    """Of a node: names down to it, super-step, and number of its ``Send``: the same when a graph
    is run again from its start."""
    fallbacks: _Attempt | None = None
    """The ``with_fallbacks`` that this is one of the choices of."""
    ended: bool = False
    failed: bool = False
    cancelled: bool = False
    children: list[_Attempt] = field(default_factory=list)
    choices: list[_Attempt] = field(default_factory=list)
    """Of ``with_fallbacks``: what it tried, in order."""

    def ran(self, place: tuple[Any, ...]) -> bool:
        """Whether a node at ``place`` ran inside."""
        return any(child.place == place or child.ran(place) for child in self.children)


@dataclass(frozen=True, slots=True)
class CallStart:
    """What LangChain's callbacks were told of a call of a chat model: what ``Position.of`` reads.

    LangChain calls ``_stream`` without the run manager that ``_generate`` gets, so a streamed call
    could not know its node otherwise.
    """

    metadata: dict[str, Any]
    tags: list[str]
    parent_run_id: UUID | None


_starting: ContextVar[CallStart | None] = ContextVar("chatlearn_starting", default=None)


def starting_call() -> CallStart | None:
    """The call of a chat model that this task started last; None outside one."""
    return _starting.get()


class Attempts(BaseCallbackHandler):
    """Listens to one agent run; asked at its end."""

    run_inline = True  # events in their order, in the task or thread that goes on
    ignore_llm = ignore_retriever = True
    ignore_retry = ignore_custom_event = ignore_agent = True

    def __init__(self) -> None:
        self._runs: dict[UUID, _Attempt] = {}
        self._roots: list[_Attempt] = []
        self._tries: defaultdict[Any, list[_Attempt]] = defaultdict(list)
        """Attempts at the same thing, oldest first."""

    def is_superseded(self, caller: UUID | None) -> bool:
        """Whether a call made by the run ``caller`` was made again, or was cancelled."""
        node: _Attempt | None = None
        while caller in self._runs:
            attempt = self._runs[caller]
            if attempt.failed and self._is_lost(attempt, node):
                return True
            if attempt.task is not None and node is None:
                node = attempt
            caller = attempt.parent
        return False

    def _is_lost(self, attempt: _Attempt, node: _Attempt | None) -> bool:
        """Whether what ``attempt`` did is lost: of ``node`` inside it, or its own where None."""
        if attempt.cancelled:
            return True
        tries = self._tries[self._key(attempt)]
        later = tries[tries.index(attempt) + 1 :]
        if attempt.fallbacks is not None:
            choices = attempt.fallbacks.choices
            later += choices[choices.index(attempt) + 1 :]
        if node is None:
            return bool(later)
        return any(again.ran(node.place) for again in later)

    def _key(self, attempt: _Attempt) -> Any:
        return attempt.task or (attempt.parent, attempt.name)

    def _fallbacks(self, parent: UUID | None) -> _Attempt | None:
        """The ``with_fallbacks`` under way that a run under ``parent`` belongs to. Some versions of
        LangChain start its choices beside it, not under it."""
        above = self._runs.get(parent) if parent else None
        if above is not None and above.name == _FALLBACKS:
            return above
        beside = above.children if above is not None else self._roots
        return next((a for a in reversed(beside) if a.name == _FALLBACKS and not a.ended), None)

    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        attempt = _Attempt(str(kwargs.get("name") or ""), parent_run_id)
        if metadata and any(tag.startswith("graph:step:") for tag in tags or ()):
            attempt.task = metadata.get("langgraph_checkpoint_ns") or None
            path = node_path(attempt.task or "")
            attempt.place = (path, metadata.get("langgraph_step"), send_index(metadata))
        attempt.fallbacks = self._fallbacks(parent_run_id)
        if attempt.fallbacks is not None:
            attempt.fallbacks.choices.append(attempt)
        self._runs[run_id] = attempt
        self._tries[self._key(attempt)].append(attempt)
        above = self._runs.get(parent_run_id) if parent_run_id else None
        (self._roots if above is None else above.children).append(attempt)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        if run_id in self._runs:
            self._runs[run_id].ended = True

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        if run_id in self._runs:
            attempt = self._runs[run_id]
            attempt.ended = attempt.failed = True
            attempt.cancelled = isinstance(error, asyncio.CancelledError)

    def on_tool_start(
        self,
        serialized: dict[str, Any] | None,
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        # only a link to what is above it: a tool that the model calls twice was asked for twice
        self._runs[run_id] = _Attempt("", parent_run_id)

    def on_chat_model_start(
        self,
        serialized: dict[str, Any] | None,
        messages: list[list[Any]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _starting.set(CallStart(metadata or {}, tags or [], parent_run_id))


def send_index(metadata: dict[str, Any]) -> int | None:
    """Which ``Send`` of its super-step started a node, from LangGraph's run metadata."""
    path = metadata.get("langgraph_path") or ()
    if len(path) > 1 and path[0] == "__pregel_push" and isinstance(path[1], int):
        return path[1]
    return None


_listening: ContextVar[Attempts | None] = ContextVar("chatlearn_attempts", default=None)
register_configure_hook(_listening, inheritable=True)


def listen(attempts: Attempts) -> None:
    """Have ``attempts`` told of everything that this task, and what it starts, runs from now on."""
    _listening.set(attempts)
