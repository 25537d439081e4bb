"""What one agent run did: its turns, and which turn each new prompt continues.

Turns are kept here, one recorder per run, and never in message metadata: LangGraph copies, trims,
checkpoints and rebuilds messages freely, and tokens hidden in them would be lost. A conversation is
known by the chained fingerprints of its messages, so a turn finds its parent whatever happened to
the message objects in between.

    prompt  [system, user]                       -> turn 0, a root
    prompt  [system, user, answer 0, tool]       -> turn 1, CONTINUE: its parent is turn 0
    prompt  [system, summary of the above]       -> turn 2, FORK: nothing recorded begins it
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from langchain_core.messages import AIMessage, BaseMessage

from chatlearn.errors import AgentError, EngineError
from chatlearn.interfaces import Engine
from chatlearn.models.agent.messages import fingerprint
from chatlearn.types import Budget, SamplingParams, Session, Turn


class BudgetExhausted(AgentError):
    """The run has no tokens left for another turn. Ends the graph; the run counts as truncated."""


class Recorder:
    """The turns of one run, in the order in which they were answered."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.counts: Counter[str] = Counter()
        self.exhausted: str | None = None
        """Why the run was denied a turn, when it was."""
        self.conversation: list[BaseMessage] = []
        """Messages of the last turn and its answer, for rewards when a graph returns none."""
        self._answers: dict[bytes, list[tuple[str | None, int]]] = {}
        self._asked: Counter[bytes] = Counter()

    @staticmethod
    def chain(messages: Sequence[BaseMessage], opening: bytes) -> list[bytes]:
        """Digest of every prefix of ``messages``; ``opening`` stands for the tools rendered."""
        digests, digest = [], opening
        for message in messages:
            digest = hashlib.blake2b(digest + fingerprint(message), digest_size=16).digest()
            digests.append(digest)
        return digests

    def parent(
        self, messages: Sequence[BaseMessage], digests: Sequence[bytes]
    ) -> tuple[Turn | None, int]:
        """The turn whose messages and answer begin ``messages``, and how many messages they are.

        The longest such beginning wins; between turns that said the same, the one whose message
        id is in the list. ``(None, 0)`` when the conversation begins with no recorded turn.
        """
        for i in range(len(messages) - 2, -1, -1):
            if not isinstance(messages[i], AIMessage) or digests[i] not in self._answers:
                continue
            found = self._answers[digests[i]]
            by_id = [turn for message_id, turn in found if message_id == messages[i].id]
            return self.turns[by_id[0] if by_id else found[-1][1]], i + 1
        return None, 0

    def seed(self, base: int, session: Session, prompt_ids: Sequence[int]) -> int:
        """Seed of the next call: of the run, of what is asked, and how often it was asked before.

        It does not depend on the order of calls, so parallel branches repeat bit for bit.
        """
        asked = hashlib.blake2b(struct.pack(f"<{len(prompt_ids)}q", *prompt_ids)).digest()
        digest = hashlib.blake2b(
            repr((base, session.group, session.run, self._asked[asked])).encode() + asked,
            digest_size=8,
        ).digest()
        self._asked[asked] += 1
        return int.from_bytes(digest, "little") >> 1

    def record(self, turn: Turn, messages: Sequence[BaseMessage], answer: AIMessage) -> None:
        """Keep ``turn``; ``answer`` is the message that the graph is given for it."""
        self.turns.append(turn)
        self.conversation = [*messages, answer]

    def remember(self, digest: bytes, answer: AIMessage, turn: Turn) -> None:
        """Let later prompts that begin with the conversation ``digest`` continue ``turn``."""
        self._answers.setdefault(digest, []).append((answer.id, turn.id))

    @property
    def sampled_tokens(self) -> int:
        return sum(len(turn.completion.token_ids) for turn in self.turns)


@dataclass(slots=True)
class Run:
    """What the chat model must know of the run it is called in."""

    session: Session
    engine: Engine
    sampling: SamplingParams
    budget: Budget
    loop: asyncio.AbstractEventLoop
    recorder: Recorder = field(default_factory=Recorder)
    engine_error: EngineError | None = None
    """The first failure of the engine, also when the graph caught it: such a run is not trained."""


_current_run: ContextVar[Run | None] = ContextVar("chatlearn_run", default=None)


def set_current_run(run: Run | None) -> None:
    """Make ``run`` the run of everything this task, and what it starts, does from now on."""
    _current_run.set(run)


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
