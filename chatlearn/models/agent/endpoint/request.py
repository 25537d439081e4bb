"""A request of OpenAI's chat API as what the policy is asked: messages and a ``Wish``.

An assistant message that comes back must be the very message its turn was recorded with, or the
call would begin a row of its own. Clients change what they were sent: ``content`` null becomes '',
white space is stripped, reasoning is dropped, arguments are written anew. ``Answers`` remembers
what was sent and gives the recorder the message it knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolCall,
    ToolMessage,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chatlearn.errors import AgentError
from chatlearn.models.agent.asking import Wish
from chatlearn.models.agent.chat.bound_tools import called_tool, hides_tools, shown_tools
from chatlearn.models.agent.chat.call_settings import stop_strings
from chatlearn.models.agent.messages import text_of
from chatlearn.models.agent.tool_parser import ToolParser

MAX_CHOICES = 16

IGNORED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Keys that say nothing about the answer: bookkeeping of OpenAI's own service."""

ZERO = frozenset({"presence_penalty", "frequency_penalty", "min_p", "top_logprobs"})
"""Keys that are accepted where they change nothing: the engine samples what the trainer can
compute again."""


class Refusal(AgentError):
    """A request that is answered with an error of OpenAI's form."""

    def __init__(self, message: str, *, status: int = 400, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Stream(BaseModel):
    model_config = ConfigDict(frozen=True)
    include_usage: bool = False


class _Function(BaseModel):
    model_config = ConfigDict(frozen=True)
    name: str


class _Named(BaseModel):
    model_config = ConfigDict(frozen=True)
    type: Literal["function"]
    function: _Function


class ChatRequest(BaseModel):
    """The body of ``/v1/chat/completions``; every key acts, or is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    model: str = ""
    """Any name: there is one policy."""
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | _Named | None = None
    parallel_tool_calls: bool | None = None
    """False: of several calls only the first is given to the client."""
    response_format: dict[str, Any] | None = None
    """Shown to the policy as ``with_structured_output`` shows it; sampling is not constrained."""
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: _Stream | None = None
    logprobs: bool | None = None

    @classmethod
    def read(cls, body: bytes) -> ChatRequest:
        """The request in ``body``.

        Raises:
            Refusal: not JSON, an unknown key, or a value out of range; all problems at once.
        """
        try:
            given = json.loads(body)
        except ValueError as error:  # also bytes that are not UTF-8
            raise Refusal(f"the body is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise Refusal(f"the body is a JSON {type(given).__name__}; it must be an object")
        kept = {key: value for key, value in given.items() if value is not None}
        for key in IGNORED & kept.keys():
            del kept[key]
        for key in ZERO & kept.keys():
            if kept.pop(key) != 0:
                raise Refusal(f"{key}={given[key]!r} is not supported; leave {key} out")
        try:
            return cls.model_validate(kept)
        except ValidationError as error:
            raise Refusal("; ".join(map(_problem, error.errors()))) from None

    def wish(self, parser: ToolParser) -> Wish:
        """What is asked for besides the messages; means what it means on ``self.llm``.

        Raises:
            AgentError: tools that are none, or a call that cannot be forced.
        """
        tools = shown_tools(self.tools or ())
        choice = self.tool_choice
        if isinstance(choice, _Named):
            choice = choice.function.name
        limits = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None]
        return Wish(
            tools=tools if tools and not hides_tools(choice) else None,
            must_call=called_tool(choice, tools, parser),
            stop=stop_strings(self.stop),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=-1 if self.top_k == 0 else self.top_k,
            max_tokens=min(limits, default=None),
            seed=self.seed,
        )


def _problem(error: Mapping[str, Any]) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        known = sorted(ChatRequest.model_fields)
        return f"unknown key {where!r}; known: {', '.join(known)}"
    return f"{where}: {error['msg']}, got {str(error['input'])[:80]!r}"


@dataclass(frozen=True, slots=True)
class _Call:
    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(slots=True)
class _Sent:
    """One answer: the message the recorder knows, and the content the client was sent."""

    message: AIMessage
    content: str


class Answers:
    """What the clients of one run were sent, and which recorded message each of it was."""

    def __init__(self) -> None:
        self._by_calls: dict[str, _Sent] = {}
        """By the id of each tool call: ids are unique in a run."""
        self._by_place: dict[bytes, _Sent] = {}
        """Answers without calls, by the conversation up to and with them."""
        self._by_text: dict[str, _Sent] = {}
        """The last answer without calls that said a text."""

    def remember(self, asked: Sequence[dict], content: str, ids: Sequence[str], answer: AIMessage):
        """Know ``answer`` when it comes back behind the messages ``asked``.

        Args:
            content: what the client was sent as content.
            ids: of the tool calls it was sent.
        """
        sent = _Sent(answer, content)
        for call_id in ids:
            self._by_calls[call_id] = sent
        if not ids:
            said = {"role": "assistant", "content": content}
            self._by_place[_place([*asked, said])[-1]] = sent
            self._by_text[content.strip()] = sent

    def messages(self, given: Sequence[dict[str, Any]]) -> list[BaseMessage]:
        """LangChain's messages for those of a request.

        Raises:
            Refusal: a message has an unknown role, is not text, or its calls cannot be read.
        """
        places = _place(given)
        return [
            self._message(f"messages.{i}", message, place)
            for i, (message, place) in enumerate(zip(given, places, strict=True))
        ]

    def _message(self, where: str, given: dict[str, Any], place: bytes) -> BaseMessage:
        role, content = given.get("role"), _content(where, given)
        if role in ("system", "developer"):
            return SystemMessage(content)
        if role == "user":
            return HumanMessage(content)
        if role == "tool":
            call_id, name = given.get("tool_call_id"), given.get("name")
            if not isinstance(call_id, str):
                raise Refusal(f"{where}: a tool message needs tool_call_id, got {call_id!r}")
            return ToolMessage(content, tool_call_id=call_id, name=name)
        if role != "assistant":
            raise Refusal(
                f"{where}: role {role!r} is not known; known: system, developer, user, assistant, "
                "tool"
            )
        calls = _calls(where, given)
        return self._known(given, content, calls, place) or AIMessage(
            content,
            tool_calls=[ToolCall(name=c.name, args=c.arguments, id=c.id) for c in calls],
            additional_kwargs={"reasoning_content": r} if (r := _reasoning(given)) else {},
        )

    def _known(
        self, given: dict[str, Any], content: str, calls: list[_Call], place: bytes
    ) -> AIMessage | None:
        """The recorded message that ``given`` is, however the client wrote it down."""
        if calls:
            found = self._by_calls.get(calls[0].id)
        else:
            found = self._by_place.get(place) or self._by_text.get(content.strip())
        if found is None:
            return None
        own = found.message
        if reasoning := _reasoning(given):
            thought = own.additional_kwargs.get("reasoning_content", "")
            if reasoning.strip() != thought.strip():
                return None
        if not calls:
            return own
        if content and content.strip() != found.content.strip():
            return None
        said = {c["id"]: (c["name"], c["args"]) for c in own.tool_calls}
        same = all(said.get(c.id) == (c.name, c.arguments) for c in calls)
        return own if same else None


def _place(messages: Sequence[dict[str, Any]]) -> list[bytes]:
    """Of each message, what stands for the conversation up to and with it. [M]"""
    digest, places = b"", []
    for message in messages:
        content = _joined(message.get("content"))
        said = [message.get("role"), content, message.get("tool_call_id")]
        if message.get("role") == "assistant":
            ids = [c.get("id") for c in message.get("tool_calls") or [] if isinstance(c, dict)]
            said = ["assistant", "" if ids else content.strip(), ids]
        text = json.dumps(said, default=str)
        digest = hashlib.blake2b(digest + text.encode(), digest_size=16).digest()
        places.append(digest)
    return places


def _joined(content: Any) -> str:
    """Text of a message's content, as far as it is text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(p.get("text", "") for p in parts if isinstance(p, dict))


def _content(where: str, given: dict[str, Any]) -> str:
    content = given.get("content")
    if content is None and given.get("role") == "assistant":
        return ""
    if not isinstance(content, str | list):
        raise Refusal(f"{where}: content must be text or a list of text parts, got {content!r}")
    try:
        return text_of(content)
    except AgentError as error:
        raise Refusal(f"{where}: {error}") from None


def _calls(where: str, given: dict[str, Any]) -> list[_Call]:
    calls = []
    for i, call in enumerate(given.get("tool_calls") or []):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(call.get("id"), str):
            raise Refusal(f"{where}.tool_calls.{i}: needs id and function, got {call!r}")
        written = function.get("arguments") or "{}"
        try:
            arguments = json.loads(written) if isinstance(written, str) else written
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise Refusal(
                f"{where}.tool_calls.{i}: arguments must be a JSON object, got {written!r}"
            )
        calls.append(_Call(call["id"], str(function.get("name")), arguments))
    return calls


def _reasoning(given: dict[str, Any]) -> str:
    found = given.get("reasoning_content") or given.get("reasoning")
    return found if isinstance(found, str) else ""
