"""The conversations an agent can have, each built twice: appended turn by turn, and rendered whole.

The policy is played by the template: a turn "samples" the tokens that the template writes for the
assistant's message, so that whatever differs afterwards is due to the joining of turns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from chatlearn.errors import AgentError
from chatlearn.models.agent.prompt_builder import PromptBuilder
from chatlearn.types import Message, StopReason

WORD = "ho7word"
"""Stands in every played answer, so that its end can be found in a rendering."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order; each assistant message is a turn of the policy, which speaks next."""

    name: str
    messages: tuple[Message, ...]
    tools: bool = False
    is_plain: bool = False
    """Every agent needs it: training does not start when it cannot be built."""

    def without(self, *positions: int) -> Conversation:
        kept = (m for i, m in enumerate(self.messages) if i not in positions)
        return replace(self, messages=tuple(kept))


@dataclass(frozen=True, slots=True)
class Played:
    """One conversation built both ways."""

    appended: list[int]
    as_ended: list[int]
    """``appended``, with each sampled end token replaced by what the template writes there."""
    full: list[int] | None
    """The template's rendering of the whole, or None where it refuses that."""
    refusal: str = ""
    unshown: tuple[str, ...] = ()
    """Sampled texts that the template does not show at all."""


def _schema(name: str) -> dict:
    number = {"type": "string", "description": "a number"}
    parameters = {"type": "object", "properties": {"a": number}, "required": ["a"]}
    function = {"name": name, "description": f"{name} numbers", "parameters": parameters}
    return {"type": "function", "function": function}


def _says(content: str, *calls: str, reasoning: str = "") -> Message:
    message: Message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"type": "function", "id": f"call0000{i}", "function": {"name": name, "arguments": a}}
            for i, name in enumerate(calls)
            for a in [{"a": f"{i} {WORD}"}]
        ]
    return message


def _result(i: int, name: str) -> Message:
    return {"role": "tool", "content": f"result {i}", "tool_call_id": f"call0000{i}", "name": name}


TOOLS = [_schema("add"), _schema("multiply")]
_USER, _MORE = {"role": "user", "content": "hi"}, {"role": "user", "content": "more"}
_SYSTEM = {"role": "system", "content": "be kind"}
_LATER = {"role": "system", "content": "be brief"}
_ANSWER, _AGAIN = _says(f"so {WORD}"), _says(f"again {WORD}")
_CALL, _TWO_CALLS = _says("", "add"), _says("", "add", "multiply")
_TOOL, _TOOL_2 = _result(0, "add"), _result(1, "multiply")
_THINKS = _says(f"so {WORD}", reasoning="hm")
_THINKS_CALL = _says("", "add", reasoning="hm")

_OPEN = (("<think>", "hm\n</think>\n\n"), ("<|channel>thought", "hm\n<channel|>"))
"""Headers that open the thinking, and what the policy then samples before its answer."""

CONVERSATIONS = (
    Conversation("user", (_USER, _ANSWER, _MORE), is_plain=True),
    Conversation("three turns", (_USER, _ANSWER, _MORE, _AGAIN, _MORE), is_plain=True),
    Conversation("system", (_SYSTEM, _USER, _ANSWER, _MORE)),
    Conversation("system later", (_USER, _ANSWER, _LATER, _MORE)),
    Conversation("twice", (_USER, _ANSWER)),
    Conversation("twice, user", (_USER, _ANSWER, _AGAIN, _MORE)),
    Conversation("thinking", (_USER, _THINKS, _MORE)),
    Conversation("tools unused", (_USER, _ANSWER, _MORE), tools=True),
    Conversation("tool", (_USER, _CALL, _TOOL), tools=True),
    Conversation("two results", (_USER, _TWO_CALLS, _TOOL, _TOOL_2), tools=True),
    Conversation("two rounds", (_USER, _CALL, _TOOL, _CALL, _TOOL), tools=True),
    Conversation("tool, answer, user", (_USER, _CALL, _TOOL, _ANSWER, _MORE), tools=True),
    Conversation("tool, user", (_USER, _CALL, _TOOL, _MORE), tools=True),
    Conversation("tool, system", (_USER, _CALL, _TOOL, _LATER), tools=True),
    Conversation("tool unlisted", (_USER, _CALL, _TOOL)),
    Conversation("thinking, tool", (_USER, _THINKS_CALL, _TOOL), tools=True),
)


def play(prompts: PromptBuilder, conversation: Conversation, stop: StopReason) -> Played:
    """Build ``conversation`` both ways, each turn ended for the reason ``stop``.

    Raises:
        AgentError: a step of the conversation cannot be appended.
    """
    tools = TOOLS if conversation.tools else None
    messages = list(conversation.messages)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    held = prompts.first(messages[: turns[0]], tools)
    replaced: dict[int, int | None] = {}
    unshown = []
    for turn, after in zip(turns, [*turns[1:], len(messages)], strict=True):
        following = messages[turn + 1 : after]
        sampled, is_shown = _sampled(prompts, messages[: turn + 1], tools)
        if not is_shown:
            unshown.append(_hermes(messages[turn]))
        held = held + prompts.encode(sampled)
        if stop is StopReason.STOP:
            closes = prompts.end_token(messages[turn], following, tools)
            sampled_end = _end_token(prompts, held, messages[: turn + 1], following, tools)
            if closes is not None:
                replaced[len(held)] = prompts.tokenizer.convert_tokens_to_ids(closes)
            elif sampled_end is None:
                replaced[len(held)] = None
                sampled_end = min(prompts.eos_ids)
            held = [*held, sampled_end]
        held = prompts.extend(held, messages[turn], following, tools)
    ended = (replaced.get(i, token) for i, token in enumerate(held))
    as_ended = [token for token in ended if token is not None]
    try:
        full = prompts.first(messages, tools)
    except AgentError as error:
        return Played(held, as_ended, None, str(error), tuple(unshown))
    return Played(held, as_ended, full, "", tuple(unshown))


def _sampled(
    prompts: PromptBuilder, spoken: Sequence[Message], tools: list[dict] | None
) -> tuple[str, bool]:
    """What the template writes for the last of ``spoken``, up to its end token; is it shown?"""
    opened, written = _before_and_after(prompts, spoken, tools)
    start = _aligned(prompts, opened, written)
    body = written[start:]
    place = body.rfind(WORD)
    ends = [body.find(name, max(place, 0)) for name in prompts.eos_names.values()]
    body = body[: min((e for e in ends if e >= 0), default=len(body))]
    if start < len(opened):  # the template writes another header once the turn is spoken
        answer = body.rpartition("</think>")[2]
        body = answer.lstrip("\n") if opened.endswith("\n") else answer
        body = next((c + body for o, c in _OPEN if opened.rstrip().endswith(o)), body)
    return (body, True) if place >= 0 else (body + _hermes(spoken[-1]), False)


def _end_token(
    prompts: PromptBuilder,
    held: list[int],
    spoken: Sequence[Message],
    following: Sequence[Message],
    tools: list[dict] | None,
) -> int | None:
    """The end token that the policy samples: the template's own, or the next message's role.

    None where that role is none the model could end with (GLM: a system message).
    """
    _, text = _before_and_after(prompts, spoken, tools)
    place = text.rfind(WORD)
    if place < 0:
        return prompts.end_of_turn_id
    ends = {i: text.find(name, place) for i, name in prompts.eos_names.items()}
    found = min((i for i in ends if ends[i] >= 0), key=lambda i: ends[i], default=None)
    if found is None:
        role = prompts.continuation(held, spoken[-1], following, tools)[0]
        return role if role in prompts.eos_ids else None
    return found


def _before_and_after(
    prompts: PromptBuilder, spoken: Sequence[Message], tools: list[dict] | None
) -> tuple[str, str]:
    """The prompt of the last of ``spoken``, and the text that has it as its last message."""
    render = prompts.template.render
    try:
        after = render(spoken, tools, generation=False)
    except AgentError:  # the whole is refused; the turn alone may not be
        spoken = [_USER, spoken[-1]]
        try:
            after = render(spoken, tools, generation=False)
        except AgentError:
            after = ""
    return render(spoken[:-1], tools, generation=True), after


def _aligned(prompts: PromptBuilder, opened: str, written: str) -> int:
    """Where ``written`` leaves ``opened``, at the start of a token."""
    if written.startswith(opened):
        return len(opened)
    shared = 0
    for a, b in zip(prompts.encode(opened), prompts.encode(written), strict=False):
        if a != b:
            break
        shared += 1
    return len(prompts.tokenizer.decode(prompts.encode(written)[:shared]))


def _hermes(answer: Message) -> str:
    calls = [json.dumps(call["function"]) for call in answer.get("tool_calls", [])]
    return "\n".join(f"<tool_call>\n{c}\n</tool_call>" for c in calls) or answer["content"]
