"""What a parser makes of a text, and what a parser is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(slots=True)
class ParsedCall:
    """One tool call as the model wrote it."""

    name: str | None
    arguments: dict[str, Any] | str
    """A dict when the call is valid, else the text as written."""
    error: str | None = None
    """Why the call is not valid; None when it is."""


@dataclass(slots=True)
class ParsedText:
    """The parts of one completion."""

    content: str
    reasoning: str = ""
    calls: list[ParsedCall] = field(default_factory=list)


@runtime_checkable
class ToolParser(Protocol):
    """Reads what one family of models writes. Has no state, and never raises on a text."""

    def parse(
        self,
        text: str,
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        thinking_open: bool = False,
    ) -> ParsedText:
        """The parts of ``text``.

        Args:
            text: a completion, decoded with its special tokens, without its end-of-turn token. A
                forced ``prefix`` belongs to it.
            tools: OpenAI tool schemas. Formats that write bare text take the types from them.
            thinking_open: the prompt ended inside the reasoning block (``opens_thinking``).
        """
        ...

    def visible(self, text: str, *, thinking_open: bool = False) -> str:
        """The content that can be shown of an unfinished ``text``.

        For ``p`` a prefix of ``q``: ``visible(p)`` is a prefix of ``visible(q)`` and of
        ``parse(q).content``. So what was streamed is never taken back, and no piece of a call's
        marker is ever shown; the rest of the content is known when the text is finished.
        """
        ...

    def prefix(self, name: str | None = None, *, thinking_open: bool = False) -> str | None:
        """What a turn must start with so that a call comes next; None if the format has none.

        Args:
            name: the tool that must be called; None for any.
            thinking_open: the prompt ended inside the reasoning block, which is closed first.
        """
        ...

    def opens_thinking(self, prompt: str) -> bool:
        """Whether ``prompt`` (its end is enough) leaves the reasoning block open."""
        ...
