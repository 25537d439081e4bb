"""The words of the environment service, which client and server share.

    GET  /tasks?split=train                        -> {"tasks": [{"task_id", …}, …]}
    POST /create    {task_id, params}              -> {instance_id, state}
    POST /step      {instance_id, action}          -> {state, reward, done, info}
    POST /evaluate  {instance_id, messages}        -> {score, info}
    POST /release   {instance_id}                  -> {}

``state``, ``action``, ``params`` and ``info`` are whatever JSON the environment and its agent agree
on. A refusal has a status from 400 on and ``{"error": {"code", "message"}}``; the codes are below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from chatlearn.types import Message

KEY_VARIABLE = "CHATLEARN_ENVIRONMENT_KEY"
"""Environment variable of the bearer key, for the service and for whoever asks it."""

UNAUTHORIZED = "unauthorized"
UNKNOWN_TASK = "unknown_task"
UNKNOWN_INSTANCE = "unknown_instance"
"""Released, expired, or of a service that was started again since."""
FULL = "full"
"""As many instances as the service may hold; some must be released first."""
BAD_REQUEST = "bad_request"
ENVIRONMENT_ERROR = "environment_error"
"""The environment's own code raised."""


@dataclass(frozen=True, slots=True)
class Step:
    """What an action led to."""

    state: Any
    reward: float | None = None
    """Of this step; None where the environment scores at the end only."""
    done: bool = False
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well an instance was played, all in all."""

    score: float
    info: dict[str, Any] = field(default_factory=dict)


class Environment(Protocol):
    """One object plays one task. Methods may be plain, then they run in a thread, or async.

    ``tasks`` is asked of the class, the others of an object made without arguments. Calls of one
    object never overlap.
    """

    @classmethod
    def tasks(cls, split: str) -> Sequence[dict[str, Any]]:
        """The tasks of a split; each has a ``task_id``, and columns for the agent."""

    def create(self, task_id: str, params: dict[str, Any]) -> Any:
        """Begin; returns the first state. Raises ``KeyError`` for a task it does not know."""

    def step(self, action: Any) -> Step:
        """Act. What the agent may do wrong is a state that says so, not an exception."""

    def evaluate(self, messages: list[Message]) -> Evaluation | float:
        """Score the instance as it stands, with the conversation if the agent gave it."""

    def release(self) -> None:
        """Let go of what the instance holds; called once."""
