"""Model text to reasoning, content and tool calls: the parsers by name.

What a policy writes is data: a malformed call becomes an ``InvalidToolCall`` with the reason, which
the graph sees, and is never dropped. Formats are in ``parsers/``; docs/parsers.md lists them.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from chatlearn.errors import AgentError, ConfigError
from chatlearn.models.agent.parsers.gpt_oss import GptOssParser
from chatlearn.models.agent.parsers.hermes import HermesParser
from chatlearn.models.agent.parsers.json_calls import read_object
from chatlearn.models.agent.parsers.llama import Llama3Parser
from chatlearn.models.agent.parsers.mistral import MistralParser, MistralV11Parser
from chatlearn.models.agent.parsers.parsed import ParsedCall, ParsedText, ToolParser
from chatlearn.models.agent.parsers.pythonic import Lfm2Parser, PythonicParser
from chatlearn.models.agent.parsers.sections import (
    DeepSeekV3Parser,
    DeepSeekV31Parser,
    KimiK2Parser,
)
from chatlearn.models.agent.parsers.segments import (
    Kind,
    PlainParser,
    Segment,
    SegmentParser,
    call_segment,
    content_segment,
)
from chatlearn.models.agent.parsers.xml_calls import GlmParser, Qwen3CoderParser

__all__ = [
    "PARSERS",
    "Kind",
    "ParsedCall",
    "ParsedText",
    "Segment",
    "SegmentParser",
    "ToolParser",
    "call_segment",
    "content_segment",
    "guess",
    "read_object",
    "register_tool_parser",
    "tool_parser",
]

PARSERS: dict[str, Callable[[], ToolParser]] = {
    "hermes": HermesParser,
    "qwen3_coder": Qwen3CoderParser,
    "llama3": Llama3Parser,
    "pythonic": PythonicParser,
    "lfm2": Lfm2Parser,
    "mistral": MistralParser,
    "mistral_v11": MistralV11Parser,
    "deepseek_v3": DeepSeekV3Parser,
    "deepseek_v31": DeepSeekV31Parser,
    "glm": GlmParser,
    "kimi_k2": KimiK2Parser,
    "gpt_oss": GptOssParser,
    "none": PlainParser,
}
"""Every value of ``models.policy.tool_parser`` but ``auto``; users add theirs."""

_SIGNS: tuple[tuple[str, str], ...] = (
    (r"<\|channel\|>.*<\|message\|>", "gpt_oss"),
    (r"<\|tool_calls_section_begin\|>", "kimi_k2"),
    (r"<\|tool_call_start\|>", "lfm2"),
    (r"<｜tool▁call▁begin｜>.*```json", "deepseek_v3"),
    (r"<｜tool▁call▁begin｜>", "deepseek_v31"),
    (r"<tool_call>.*<arg_key>", "glm"),
    (r"<tool_call>.*<function=", "qwen3_coder"),
    (r"<tool_call>", "hermes"),
    (r"\[TOOL_CALLS\].*\[ARGS\]", "mistral_v11"),
    (r"\[TOOL_CALLS\]", "mistral"),
    (r"<\|python_start\|>", "pythonic"),
    (r"ipython.*\"parameters\": ", "llama3"),
)
"""What a chat template says where it writes calls; the first that is found decides."""

ParserClass = TypeVar("ParserClass", bound=type)


def register_tool_parser(name: str) -> Callable[[ParserClass], ParserClass]:
    """Class decorator: ``models.policy.tool_parser=name`` is an instance of the class.

    Raises:
        AgentError: the name is taken by another class, or the class lacks a method.
    """

    def add(parser_class: ParserClass) -> ParserClass:
        taken = PARSERS.get(name)
        if name == "auto" or (taken is not None and _origin(taken) != _origin(parser_class)):
            by = "chatlearn itself" if taken is None else _origin(taken)
            raise AgentError(
                f"tool parser {name!r} is registered twice: by {by} and by "
                f"{_origin(parser_class)}; give one of them another name"
            )
        needed = [m for m in vars(ToolParser) if not m.startswith("_")]
        missing = [method for method in needed if not hasattr(parser_class, method)]
        if missing:
            raise AgentError(
                f"tool parser {name!r} ({_origin(parser_class)}) has no {', '.join(missing)}; "
                "SegmentParser has all but body()"
            )
        PARSERS[name] = parser_class
        return parser_class

    return add


def tool_parser(name: str) -> ToolParser:
    """The parser called ``name``.

    Raises:
        ConfigError: there is none of that name; the message lists the known ones.
    """
    if name not in PARSERS:
        near = difflib.get_close_matches(name, PARSERS, 1)
        raise ConfigError(
            f"models.policy.tool_parser={name!r} is not known; known: {', '.join(PARSERS)}. "
            + (f"Did you mean {near[0]!r}? " if near else "")
            + "One of your own is registered by a module of runtime_args.import_modules"
        )
    return PARSERS[name]()


def guess(chat_template: str, model_type: str = "") -> str:
    """Name of the parser for a model, by the markers in its chat template.

    A template that does not mention tools is ``none``. One that renders tools in a way no parser
    here knows is refused: any guess would lose the calls without a word.

    Args:
        chat_template: Jinja text.
        model_type: of the model's ``config.json``; for the message.

    Raises:
        ConfigError: the format is not known.
    """
    for sign, name in _SIGNS:
        if re.search(sign, chat_template, re.DOTALL):
            return name
    if not re.search(r"\btools\b", chat_template):
        return "none"
    model = f"model type {model_type!r}" if model_type else "this model"
    raise ConfigError(
        f"models.policy.tool_parser=auto: the chat template of {model} renders tools, but not in a "
        f"format known here; set models.policy.tool_parser to one of {', '.join(PARSERS)} "
        "('none' if the agents use no tools), or register your own (docs/parsers.md)"
    )


def _origin(parser: Callable[..., object]) -> str:
    """Where a class is from; the same file imported under two names is one origin."""
    file = getattr(sys.modules.get(parser.__module__), "__file__", None)
    return f"{file or parser.__module__}:{parser.__qualname__}"
