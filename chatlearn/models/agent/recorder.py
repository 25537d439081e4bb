"""What one agent run did: a tree of turns, and where in it each new prompt stands.

Turns are kept here, one recorder per run, and never in message metadata: LangGraph copies, trims,
checkpoints and rebuilds messages freely, and tokens hidden in them would be lost. A conversation is
known by the chained fingerprints of its messages, each kept once, so a turn finds its parent
whatever happened to the message objects in between; where no message list fits, by the longest
turn whose tokens begin the prompt exactly::

    prompt  [system, user]                       -> turn 0, the root
    prompt  [system, user, answer 0, tool]       -> turn 1 continues turn 0
    prompt  [system, summary of the above]       -> turn 2, a new root: ``Fork.COMPACTED``
    prompt  [system, user, answer 0, "and?"]     -> turn 3, under turn 0: ``Fork.BRANCH``
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from langchain_core.messages import AIMessage, BaseMessage, SystemMessage

from chatlearn.models.agent.messages import fingerprint
from chatlearn.types import Fork, Session, Turn


@dataclass(slots=True)
class Conversation:
    """A list of messages as the recorder knows it."""

    messages: list[BaseMessage]
    prints: list[bytes]
    """Fingerprint of each message."""
    digests: list[bytes]
    """Of every beginning of the list: ``digests[i]`` stands for ``messages[: i + 1]``."""
    tools: bytes
    """Stands for the tools shown with it; other tools are another conversation."""


@dataclass(slots=True)
class _Heard:
    """A fingerprint that some prompt or answer had."""

    orders: list[int] = field(default_factory=list)
    """Rising numbers, one for each place in a conversation where it was heard."""
    longest: int = 0
    """Messages in the longest conversation that it stood in."""
    turns: list[tuple[str | None, int]] = field(default_factory=list)
    """Message id and turn id of the answers that say this."""


class Recorder:
    """The turns of one run, in the order in which they were answered."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.counts: Counter[str] = Counter()
        self.exhausted: str | None = None
        """Why the run was denied a turn, when it was."""
        self.conversation: list[BaseMessage] = []
        """Messages of the last turn and its answer, for rewards when a graph returns none."""
        self.callers: list[UUID | None] = []
        """LangChain's run that made the call, for each turn."""
        self.message_ids: dict[str, int] = {}
        """Turn of every answer, by the id of the message that the graph was given."""
        self._answers: defaultdict[tuple[bytes, bytes], list[tuple[str | None, int]]]
        self._answers = defaultdict(list)
        self._asked_of: set[tuple[bytes, bytes]] = set()
        """Tools and conversation of every prompt."""
        self._beginnings: set[bytes] = set()
        """Every beginning of a conversation that was heard."""
        self._heard: dict[bytes, _Heard] = {}
        self._children: Counter[int] = Counter()
        self._asked: Counter[bytes] = Counter()
        self._answered: set[bytes] = set()
        self._prints: dict[int, tuple[BaseMessage, object, bytes]] = {}

    def hear(self, messages: Sequence[BaseMessage], tools: bytes = b"") -> Conversation:
        """``messages`` with the fingerprints that place them."""
        prints = [self._fingerprint(message) for message in messages]
        digests, digest = [], b""
        for one in prints:
            digest = hashlib.blake2b(digest + one, digest_size=16).digest()
            digests.append(digest)
        return Conversation(list(messages), prints, digests, tools)

    def parent(self, heard: Conversation) -> tuple[Turn | None, int]:
        """The turn whose messages and answer begin the conversation, and how many messages those
        are.

        The longest such beginning wins; between turns that said the same, the one whose message
        id is in the list. ``(None, 0)`` when the conversation begins with no recorded turn.
        """
        for i in range(len(heard.messages) - 1, -1, -1):
            if not isinstance(heard.messages[i], AIMessage):
                continue
            if found := self._answers.get((heard.tools, heard.digests[i])):
                return self._choose(found, heard.messages[i]), i + 1
        return None, 0

    def spoken(self, heard: Conversation, position: int) -> Turn | None:
        """The turn that said the message at ``position``, wherever it stood then."""
        message = heard.messages[position]
        if not isinstance(message, AIMessage):
            return None
        known = self._heard.get(heard.prints[position])
        return self._choose(known.turns, message) if known is not None and known.turns else None

    def begins(self, prompt_ids: Sequence[int]) -> Turn | None:
        """The turn of most tokens that begin ``prompt_ids`` [P] exactly."""
        best = None
        for turn in self.turns:
            length = len(turn.prompt_ids) + len(turn.completion.token_ids)
            if length >= len(prompt_ids) or not turn.completion.token_ids:
                continue
            if best is not None and length <= len(best.prompt_ids) + len(best.completion.token_ids):
                continue
            last = turn.completion.token_ids[-1]
            if prompt_ids[length - 1] == last and list(prompt_ids[:length]) == turn.token_ids:
                best = turn
        return best

    def record(
        self, turn: Turn, heard: Conversation, answer: AIMessage, caller: UUID | None
    ) -> None:
        """Keep ``turn``, say why it forks if it does, and know ``answer``, the message that the
        graph is given for it, when it comes back."""
        asked = _digest(turn.prompt_ids)
        turn.fork = self._fork(turn, heard, is_repeat=asked in self._answered)
        self.turns.append(turn)
        self.callers.append(caller)
        self.conversation = [*heard.messages, answer]
        if turn.parent is not None:
            self._children[turn.parent] += 1
        self._answered.add(asked)
        length = len(heard.messages) + 1
        for one, digest in zip(heard.prints, heard.digests, strict=True):
            self._place(one, digest, length)
        self._asked_of.add((heard.tools, heard.digests[-1]))
        said = self._fingerprint(answer)
        digest = hashlib.blake2b(heard.digests[-1] + said, digest_size=16).digest()
        self._place(said, digest, length)
        self._heard[said].turns.append((answer.id, turn.id))
        self._answers[heard.tools, digest].append((answer.id, turn.id))
        if answer.id is not None:
            self.message_ids[answer.id] = turn.id

    def seed(self, base: int, session: Session, prompt_ids: Sequence[int]) -> int:
        """Seed of the next call: of the run, of what is asked, and how often it was asked before.

        It does not depend on the order of calls, so parallel branches repeat bit for bit.
        """
        asked = _digest(prompt_ids)
        digest = hashlib.blake2b(
            repr((base, session.group, session.run, self._asked[asked])).encode() + asked,
            digest_size=8,
        ).digest()
        self._asked[asked] += 1
        return int.from_bytes(digest, "little") >> 1

    @property
    def sampled_tokens(self) -> int:
        return sum(len(turn.completion.token_ids) for turn in self.turns)

    def _choose(self, found: list[tuple[str | None, int]], message: BaseMessage) -> Turn:
        by_id = [turn for message_id, turn in found if message_id == message.id]
        return self.turns[by_id[0] if by_id else found[-1][1]]

    def _fork(self, turn: Turn, heard: Conversation, *, is_repeat: bool) -> Fork | None:
        """Why ``turn``, which is not recorded yet, does not go on where a turn ended."""
        if not self.turns:
            return None
        if turn.parent is not None:
            if not self._children[turn.parent]:
                return None
            return Fork.REPEAT if is_repeat else Fork.BRANCH
        if is_repeat:
            return Fork.REPEAT
        shared = sum(digest in self._beginnings for digest in heard.digests)
        if shared == len(heard.digests):
            return Fork.TOOLS if self._has_other_tools(heard) else Fork.BRANCH
        rest, messages = heard.prints[shared:], heard.messages[shared:]
        known = [self._heard[one] for one in rest if one in self._heard]
        if not known:
            opening = heard.messages[:shared]
            if all(isinstance(message, SystemMessage) for message in opening):
                return Fork.FRESH
            replaced = any(message.id in self.message_ids for message in messages if message.id)
            return Fork.EDITED if replaced else Fork.BRANCH
        kept = [self._heard.get(one) for one in _without_news(rest, messages, self._heard)]
        if all(kept):
            return Fork.TRIMMED if _in_order(kept) else Fork.REORDERED
        is_shorter = len(heard.messages) < max(one.longest for one in known)
        return Fork.COMPACTED if is_shorter else Fork.EDITED

    def _place(self, one: bytes, digest: bytes, length: int) -> None:
        """Know that fingerprint ``one`` stood at the end of the beginning ``digest``."""
        known = self._heard.setdefault(one, _Heard())
        known.longest = max(known.longest, length)
        if digest not in self._beginnings:
            self._beginnings.add(digest)
            known.orders.append(len(self._beginnings))

    def _has_other_tools(self, heard: Conversation) -> bool:
        """Whether the same messages were answered with other tools, and never with these."""
        asked = {tools for tools, beginning in self._asked_of if beginning == heard.digests[-1]}
        return bool(asked) and heard.tools not in asked

    def _fingerprint(self, message: BaseMessage) -> bytes:
        """Fingerprint of ``message``, remembered while its text is the same object: lists, and
        tool calls, may be changed in place."""
        content = message.content
        if type(content) is not str or message.additional_kwargs:
            return fingerprint(message)
        if isinstance(message, AIMessage) and (message.tool_calls or message.invalid_tool_calls):
            return fingerprint(message)
        known = self._prints.get(id(message))
        if known is None or known[0] is not message or known[1] is not content:
            known = (message, content, fingerprint(message))
            self._prints[id(message)] = known
        return known[2]


def _without_news(
    prints: list[bytes], messages: list[BaseMessage], heard: Container[bytes]
) -> list[bytes]:
    """``prints`` without what is asked now: messages after the last answer that nobody heard
    before, or that say again what stands in front of them."""
    answers = [i + 1 for i, message in enumerate(messages) if isinstance(message, AIMessage)]
    end = answers[-1] if answers else len(prints)
    return prints[:end] + [p for p in prints[end:] if p in heard and p not in prints[:end]]


def _in_order(messages: list[_Heard]) -> bool:
    """Whether they were heard one after the other, maybe with others between."""
    last = 0
    for one in messages:
        at = bisect_right(one.orders, last)
        if at == len(one.orders):
            return False
        last = one.orders[at]
    return True


def _digest(prompt_ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("q", prompt_ids)).digest()
