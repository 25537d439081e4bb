"""Messages to tokens, by the chat template of the model, without ever rendering history twice.

The first prompt of a conversation is a full render. Every later prompt is the tokens held so far
plus the template's rendering of only the new messages (law 1). What the template puts between an
assistant turn and the next message is found by rendering a two-message stub in front of the new
messages: everything after the stub's end-of-turn token is the continuation.

    held      <user> question <end> <assistant> sampled <end>
    rendered  <user> ? <end> <assistant> STUB <end> \\n <user> new <end> <assistant>
    appended                                       \\n <user> new <end> <assistant>

A turn cut by its token limit has no end-of-turn token; it is then closed as the template would.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

from chatlearn.errors import AgentError, ConfigError
from chatlearn.types import Message

_STUB = "chatlearn-stub-of-an-assistant-turn"
_REMEMBERED = 1024
"""Renderings kept: siblings ask for the same prompt, and their tools often answer the same."""


class PromptBuilder:
    """Builds the token ids the engine is given.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        eos_token_ids: tokens that end a turn of this model.
        template_kwargs: passed to the chat template, ``{"enable_thinking": False}``.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template does not close an
            assistant turn with one of ``eos_token_ids``.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos_token_ids: Collection[int],
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so messages "
                "cannot become tokens; use an instruct model, or put a chat_template.jinja into "
                "the model folder (models.policy_trainer.load)"
            )
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self._remembered: OrderedDict[str, list[int]] = OrderedDict()
        self.eos_ids = frozenset(eos_token_ids)
        self.end_of_turn_id = self._find_end_of_turn(eos_token_ids)
        self.end_of_turn = tokenizer.convert_ids_to_tokens(self.end_of_turn_id)

    def first(self, messages: Sequence[Message], tools: list[dict] | None = None) -> list[int]:
        """Tokens of a whole conversation, ready for the assistant to speak. [P]"""

        def tokens() -> list[int]:
            return self._encode(self._render(messages, tools, add_generation_prompt=True))

        return list(self._remember(json.dumps([messages, tools], default=str), tokens))

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
            answer: that turn's assistant message; only its tool calls matter, because templates
                look up which call a tool message answers.
            new_messages: what came after it; at least one.
        """
        calls = answer.get("tool_calls")

        def tokens() -> list[int]:
            # Encoding the tail together with the token before it keeps tokenizers that treat the
            # start of a text specially (sentencepiece's dummy space) from doing so here.
            tail = self._render_after_turn(calls, new_messages, tools)
            return self._encode(self.end_of_turn + tail)

        key = json.dumps([calls, new_messages, tools, "after a turn"], default=str)
        end_of_turn, *ids = self._remember(key, tokens)
        if end_of_turn != self.end_of_turn_id:
            raise AgentError(
                f"the tokenizer of {self.tokenizer.name_or_path!r} does not keep its end-of-turn "
                f"token {self.end_of_turn!r} as one token; turns cannot be joined"
            )
        closing = [] if held[-1] == self.end_of_turn_id else [self.end_of_turn_id]
        return [*held, *closing, *ids]

    def _render(
        self, messages: Sequence[Message], tools: list[dict] | None, *, add_generation_prompt: bool
    ) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.template_kwargs,
            )
        except Exception as error:  # templates raise jinja2 errors of every kind
            roles = [m.get("role") for m in messages]
            raise AgentError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses the roles {roles}: "
                f"{error}"
            ) from error

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _remember(self, key: str, tokens: Callable[[], list[int]]) -> list[int]:
        if key not in self._remembered:
            self._remembered[key] = tokens()
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(key)
        return self._remembered[key]

    def _render_after_turn(
        self, calls: list[dict] | None, new_messages: Sequence[Message], tools: list[dict] | None
    ) -> str:
        """Text the template puts after the end-of-turn token of an assistant turn."""
        stub: Message = {"role": "assistant", "content": _STUB}
        if calls:
            stub["tool_calls"] = calls
        opening: Message = {"role": "user", "content": "?"}
        text = self._render([opening, stub, *new_messages], tools, add_generation_prompt=True)
        start = text.find(_STUB)
        end = text.find(self.end_of_turn, start)
        if start < 0 or end < 0:
            roles = [m.get("role") for m in new_messages]
            raise AgentError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not render an "
                f"assistant turn followed by {roles} in a way that can be continued token by token"
            )
        return text[end + len(self.end_of_turn) :]

    def _find_end_of_turn(self, eos_token_ids: Collection[int]) -> int:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _STUB}]
        text = self._render(messages, None, add_generation_prompt=False)
        after = text[text.find(_STUB) + len(_STUB) :] if _STUB in text else ""
        names = {i: self.tokenizer.convert_ids_to_tokens(i) for i in sorted(eos_token_ids)}
        places = {i: after.find(name) for i, name in names.items() if name and name in after}
        if not places:
            raise ConfigError(
                f"the chat template of {self.tokenizer.name_or_path!r} ends an assistant turn with "
                f"{after!r}, which holds none of the model's end-of-sequence tokens "
                f"{sorted(n for n in names.values() if n)}; add the template's end-of-turn token "
                "to eos_token_id in generation_config.json"
            )
        return min(places, key=lambda i: places[i])
