"""A chat template as text: messages in the form it reads, one fixed date, one kind of error."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date
from typing import Any

from chatlearn.errors import AgentError, ConfigError
from chatlearn.types import Message

STUB = "chatlearn-stub-of-an-assistant-turn"
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class TemplateRender:
    """Renders messages with the chat template of ``tokenizer``.

    Templates differ in how they want contents (a string, or a list of blocks) and arguments of
    tool calls (a mapping, or JSON text); both are found by trying once.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, template_kwargs: dict[str, Any], today: date) -> None:
        self.name = tokenizer.name_or_path
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"the tokenizer of {self.name!r} has no chat template, so messages cannot become "
                "tokens; use an instruct model, or put a chat_template.jinja into the model "
                "folder (models.policy_trainer.load)"
            )
        self._tokenizer = tokenizer
        self._kwargs = template_kwargs
        self._pinned = {
            with_tools: _pin_date(
                tokenizer.get_chat_template(tools=[{}] if with_tools else None), today
            )
            for with_tools in (False, True)
        }
        self._blocks = self._arguments_as_text = False
        self._blocks = self._wants_blocks()
        self._arguments_as_text = self._wants_text_arguments()

    @property
    def has_date(self) -> bool:
        """Whether the template shows the day it is rendered on."""
        return any(_NOW.search(text) for text in self._sources)

    @property
    def _sources(self) -> list[str]:
        return [self._tokenizer.get_chat_template(tools=tools) for tools in (None, [{}])]

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict] | None,
        *,
        generation: bool,
        after_turn: bool = False,
    ) -> str:
        """Text of ``messages``, with the header of the next assistant turn if ``generation``.

        Args:
            after_turn: the first two messages are a stub; an error does not name them.

        Raises:
            AgentError: the template refuses these roles.
        """
        try:
            return self._tokenizer.apply_chat_template(
                [self._as_read(m) for m in messages],
                chat_template=self._pinned[bool(tools)],
                tools=tools or None,
                add_generation_prompt=generation,
                tokenize=False,
                **self._kwargs,
            )
        except Exception as error:  # templates raise jinja2 errors of every kind
            roles = [m.get("role") for m in messages[2 if after_turn else 0 :]]
            where = " after an assistant turn" if after_turn else ""
            raise AgentError(
                f"the chat template of {self.name!r} refuses the roles {roles}{where}: {error}"
            ) from error

    def shows(self, message: Message, word: str, *before: Message) -> bool:
        """Whether ``word`` of ``message`` is in the text, and not as Python writes a dict."""
        try:
            text = self.render([*before, message], None, generation=False)
        except AgentError:
            return False
        return word in text and "{'" not in text

    def shows_assistant(self, opening: Message) -> bool:
        """Whether the content of an assistant's message is in the text."""
        return self.shows({"role": "assistant", "content": STUB}, STUB, opening)

    def _as_read(self, message: Message) -> Message:
        if self._arguments_as_text and message.get("tool_calls"):
            message = {**message, "tool_calls": [_with_text(c) for c in message["tool_calls"]]}
        if self._blocks and isinstance(message.get("content"), str):
            message = {**message, "content": [{"type": "text", "text": message["content"]}]}
        return message

    def _wants_blocks(self) -> bool:
        message = {"role": "user", "content": STUB}
        if self.shows(message, STUB):
            return False
        return self.shows({**message, "content": [{"type": "text", "text": STUB}]}, STUB)

    def _wants_text_arguments(self) -> bool:
        function = {"name": "f", "arguments": {"x": STUB}}
        call = {"type": "function", "id": "callstub1", "function": function}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        opening = {"role": "user", "content": "?"}
        if self.shows(message, STUB, opening):
            return False
        return self.shows({**message, "tool_calls": [_with_text(call)]}, STUB, opening)


def _with_text(call: dict) -> dict:
    function = call.get("function", call)
    if isinstance(function.get("arguments"), str):
        return call
    function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": function} if "function" in call else function


def _pin_date(template: str, today: date) -> str:
    """``template`` with its calls for the day replaced by the text they give on ``today``."""
    return _NOW.sub(lambda found: json.dumps(today.strftime(found[2])), template)
