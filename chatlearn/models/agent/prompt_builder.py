"""Messages to tokens, by the chat template of the model, without ever rendering history twice.

The first prompt of a conversation is a full render. Every later prompt is the tokens held so far
plus the template's rendering of only the new messages (law 1). What the template puts between an
assistant turn and the next message is found by rendering a two-message stub in front of the new
messages, so the cost of a turn does not depend on its history.

    held      <user> question <end> <assistant> sampled <end>
    rendered  <user> ? <end> <assistant> STUB <end> \\n <user> new <end> <assistant>
    appended                                       \\n <user> new <end> <assistant>

How the turn ended decides where the continuation begins:

    an end token of the model    what the template has after its own end token. The token sampled
                                 stays, also where the template would have written another one
    ... that opens the next      GLM ends a turn with the role of the next message: not repeated
    length, or a stop string     the template's closing first; a part already sampled is kept
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from datetime import date
from typing import Any

from chatlearn.errors import AgentError, ConfigError
from chatlearn.models.agent.templates.encoding import Encoding
from chatlearn.models.agent.templates.render import STUB, TemplateRender
from chatlearn.types import Message

_OPENING: Message = {"role": "user", "content": "?"}
_REMEMBERED = 1024
"""Renderings kept: siblings ask for the same prompt, and their tools often answer the same."""


class PromptBuilder:
    """Builds the token ids the engine is given.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        eos_token_ids: tokens that end a turn of this model.
        template_kwargs: passed to the chat template, ``{"enable_thinking": False}``.
        today: the date that templates with one show; the day of construction when None. It is
            fixed, so that siblings rendered around midnight have one prompt.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template does not close an
            assistant turn with one of ``eos_token_ids``.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos_token_ids: Collection[int],
        template_kwargs: dict[str, Any] | None = None,
        today: date | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.template = TemplateRender(tokenizer, self.template_kwargs, today or date.today())
        """The chat template as text."""
        self.eos_ids = frozenset(eos_token_ids)
        names = {i: tokenizer.convert_ids_to_tokens(i) for i in sorted(self.eos_ids)}
        self.eos_names = {i: name for i, name in names.items() if name}
        self._remembered: OrderedDict[str, tuple[list[int], list[int]] | list[int]] = OrderedDict()
        self._plans: dict[tuple, tuple[int, bool]] = {}
        self._lasts: dict[str, str] = {}
        self._closings: dict[str, list[int]] = {}
        self._encoding = Encoding(tokenizer, "".join(self.eos_names.values()))
        self.end_of_turn_id = self._find_end_of_turn()
        """The end token that the template writes; None where the next message's role ends a turn.
        """

    def first(self, messages: Sequence[Message], tools: list[dict] | None = None) -> list[int]:
        """Tokens of a whole conversation, ready for the assistant to speak. [P]

        Raises:
            AgentError: the template refuses these roles, or leaves a message out.
        """
        key = json.dumps([messages, tools], default=str)
        ids = self._recall(key)
        if ids is None:
            self._check_shown(messages, tools)
            text = self.template.render(messages, tools, generation=True)
            ids = self._remember(key, self.encode(text))
        return list(ids)

    def extend(
        self,
        held: Sequence[int],
        answer: Message,
        new_messages: Sequence[Message],
        tools: list[dict] | None = None,
    ) -> list[int]:
        """``held`` [P] plus the tokens of ``new_messages`` only, ready for the assistant. [P + N]

        Args:
            held: prompt and completion of the turn that is continued.
            answer: that turn's assistant message; only names and ids of its tool calls matter,
                because templates look up which call a tool message answers.
            new_messages: what came after it; empty when the assistant speaks once more.
            tools: schemas of the tools bound to the call.

        Raises:
            AgentError: the template refuses these roles after an assistant turn, leaves a message
                out, or has no way to let the assistant speak twice.
        """
        return [*held, *self.continuation(held, answer, new_messages, tools)]

    def continuation(
        self,
        held: Sequence[int],
        answer: Message,
        new_messages: Sequence[Message],
        tools: list[dict] | None = None,
    ) -> list[int]:
        """The tokens that ``extend`` appends: O(new tokens), however long ``held`` is. [N]"""
        calls = _stub_calls(answer)
        plan = self._plan(calls, new_messages, tools)
        calls, tools = calls[: plan[0]], (tools if plan[1] else None)
        key = json.dumps([calls, new_messages, tools, "after a turn"], default=str)
        found = self._recall(key)
        if found is None:
            found = self._remember(key, self._parts(calls, new_messages, tools))
        closing, rest = found
        if held[-1] in self.eos_ids:
            opens_next = not closing and rest[:1] == [held[-1]]
            return rest[1:] if opens_next else list(rest)
        return [*closing[_overlap(held, closing) :], *rest]

    def end_token(
        self, answer: Message, new_messages: Sequence[Message], tools: list[dict] | None = None
    ) -> str | None:
        """The token with which the template closes ``answer`` in front of ``new_messages``."""
        calls = _stub_calls(answer)
        count, needs_tools = self._plan(calls, new_messages, tools)
        return self._split(calls[:count], new_messages, tools if needs_tools else None)[1]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` as it is; nothing is put in front. [N]"""
        return self._encoding.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` [N], special tokens included."""
        return self._encoding.decode(ids)

    def _encode_after(self, token: str, text: str) -> list[int]:
        """Ids of ``text`` as it is tokenised behind a special token.

        Encoding both together keeps tokenizers that treat the start of a text specially
        (sentencepiece's dummy space), or the text behind a token (``rstrip``), from doing so here.
        """
        first, *ids = self.encode(token + text)
        if self.tokenizer.convert_ids_to_tokens(first) != token:
            raise AgentError(
                f"the tokenizer of {self.template.name!r} does not keep its end-of-turn token "
                f"{token!r} as one token; turns cannot be joined"
            )
        return ids

    def _recall(self, key: str) -> Any:
        if key in self._remembered:
            self._remembered.move_to_end(key)
        return self._remembered.get(key)

    def _remember(self, key: str, value: Any) -> Any:
        self._remembered[key] = value
        if len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)
        return value

    def _parts(
        self, calls: list[dict], new_messages: Sequence[Message], tools: list[dict] | None
    ) -> tuple[list[int], list[int]]:
        """Ids that close the turn [C], and ids from there to the assistant's next word [N]."""
        closing, end_token, rest = self._split(calls, new_messages, tools)
        any_end = next(iter(self.eos_names.values()))
        # Where the text of a call ends is not known, so a cut turn with calls gets the token only.
        text = (end_token if calls else closing) or ""
        if text not in self._closings:
            self._closings[text] = self._encode_after(any_end, text)
        return self._closings[text], self._encode_after(end_token or any_end, rest)

    def _split(
        self, calls: list[dict], new_messages: Sequence[Message], tools: list[dict] | None
    ) -> tuple[str, str | None, str]:
        """What closes the turn, the special token that does, and the text from there on.

        The template shows its end-of-turn token where the turn is the last message (``last``).
        Followed by others, it may write another one in that place (gpt-oss), or none (GLM).
        """
        after = self._after_stub(calls, new_messages, tools, generation=True)
        last = self._last(calls)
        if not new_messages and after == last:
            raise AgentError(
                f"the chat template of {self.template.name!r} has nothing to put between two "
                "assistant turns; add a message (a user's or a tool's) before calling the model "
                "again"
            )
        ends = {last.find(name): name for name in self.eos_names.values() if name in last}
        if not ends:
            shared = len(_common_start(last, after))
            return "", None, after[shared:]
        place = min(ends)
        before = last[:place]
        if not after.startswith(before):
            raise AgentError(
                f"the chat template of {self.template.name!r} closes an assistant turn with "
                f"{last!r} at the end and with {after[:80]!r} before {_roles(new_messages)}; "
                "turns cannot be joined"
            )
        token: str | None = ends[place]
        if not after.startswith(before + token):
            token = self._special_at(after[place:]) if not self._holds_special(before) else None
        end = place + len(token or "")
        return after[:end], token, after[end:]

    def _after_stub(
        self,
        calls: list[dict],
        new_messages: Sequence[Message],
        tools: list[dict] | None,
        *,
        generation: bool,
    ) -> str:
        """Text that the template puts after the last word of an assistant turn."""
        stub: Message = {"role": "assistant", "content": "" if calls else STUB}
        if calls:
            stub["tool_calls"] = calls
        messages = [_OPENING, stub, *new_messages]
        text = self.template.render(messages, tools, generation=generation, after_turn=True)
        start = text.rfind(STUB)
        if start < 0:
            raise AgentError(
                f"the chat template of {self.template.name!r} does not show an assistant turn"
                f"{' with tool calls' if calls else ''}; turns cannot be joined"
            )
        return text[start + len(STUB) :]

    def _last(self, calls: list[dict]) -> str:
        key = json.dumps(calls)
        if key not in self._lasts:
            if len(self._lasts) >= _REMEMBERED:
                self._lasts.clear()
            self._lasts[key] = self._after_stub(calls, [], None, generation=False)
        return self._lasts[key]

    def _plan(
        self, calls: list[dict], new_messages: Sequence[Message], tools: list[dict] | None
    ) -> tuple[int, bool]:
        """How many of the calls the stub has, and whether it needs the tools.

        Templates that allow one call (Llama 3.x) or show none still show what follows: the calls
        were sampled and are not rendered again. Found once for each sequence of roles, with marked
        messages, so that a message the template leaves out is noticed.
        """
        key = (len(calls), _roles(new_messages), bool(tools))
        if key not in self._plans:
            self._plans[key] = self._find_plan(calls, new_messages, tools)
        return self._plans[key]

    def _find_plan(
        self, calls: list[dict], new_messages: Sequence[Message], tools: list[dict] | None
    ) -> tuple[int, bool]:
        marked, marks = _mark(new_messages)
        refusal: AgentError | None = None
        for count in sorted({len(calls), min(len(calls), 1), 0}, reverse=True):
            try:
                _, _, rest = self._split(calls[:count], marked, tools)
                self._refuse_lost(rest, marks)
            except AgentError as error:
                refusal = refusal or error
                continue
            try:
                bare = tools and self._split(calls[:count], marked, None)[2]
            except AgentError:
                bare = None
            return count, bool(tools) and bare != rest
        raise refusal or AgentError("an assistant turn cannot be continued")

    def _check_shown(self, messages: Sequence[Message], tools: list[dict] | None) -> None:
        key = ("first", _roles(messages), bool(tools))
        if key in self._plans:
            return
        marked, marks = _mark(messages)
        self._refuse_lost(self.template.render(marked, tools, generation=True), marks)
        self._plans[key] = (0, True)

    def _refuse_lost(self, text: str, marks: dict[str, str]) -> None:
        lost = [role for mark, role in marks.items() if mark not in text]
        if lost:
            raise AgentError(
                f"the chat template of {self.template.name!r} does not show the "
                f"{' and '.join(sorted(set(lost)))} message in its place in {list(marks.values())};"
                " say it in a user message instead, or use a model whose template knows the role"
            )

    def _find_end_of_turn(self) -> int | None:
        last = self._last([]) if self.template.shows_assistant(_OPENING) else ""
        places = {i: last.find(name) for i, name in self.eos_names.items() if name in last}
        if places:
            return min(places, key=lambda i: places[i])
        if last or self.template.shows_assistant(_OPENING):
            after = self._after_stub([], [_OPENING], None, generation=True)
            if any(after.lstrip().startswith(name) for name in self.eos_names.values()):
                return None
        raise ConfigError(
            f"the chat template of {self.template.name!r} ends an assistant turn with {last!r}, "
            "which holds none of the model's end-of-sequence tokens "
            f"{sorted(self.eos_names.values())}; add the template's end-of-turn token "
            "to eos_token_id in generation_config.json"
        )

    def _special_at(self, text: str) -> str | None:
        added = self.tokenizer.get_added_vocab()
        return next((t for t in sorted(added, key=len)[::-1] if text.startswith(t)), None)

    def _holds_special(self, text: str) -> bool:
        return any(token in text for token in self.tokenizer.get_added_vocab() if token.strip())


def _stub_calls(answer: Message) -> list[dict]:
    """The calls of ``answer`` by name and id only: their arguments are never rendered again."""
    return [
        {
            "type": "function",
            "id": call.get("id"),
            "function": {"name": call.get("function", call).get("name"), "arguments": {"x": STUB}},
        }
        for call in answer.get("tool_calls") or []
    ]


def _mark(messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
    """``messages`` with a unique word as content, and role by word."""
    marked, marks = [], {}
    for i, message in enumerate(messages):
        if message["role"] == "assistant":  # templates rewrite these; user code rarely adds any
            marked.append(message)
            continue
        word = f"chatlearnmark{i}x"
        marked.append({**message, "content": word})
        marks[word] = message["role"]
    return marked, marks


def _roles(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(str(m.get("role")) for m in messages)


def _common_start(a: str, b: str) -> str:
    end = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return a[: min(len(a), len(b)) if end is None else end]


def _overlap(held: Sequence[int], closing: list[int]) -> int:
    """How many tokens of ``closing`` the held tokens already end with."""
    fits = (n for n in range(len(closing), 0, -1) if list(held[-n:]) == closing[:n])
    return next(fits, 0)
