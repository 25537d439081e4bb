"""What a workflow's ``model`` is: its annotation says.

    model: BaseChatModel       LangChain, and what no annotation means
    model: AsyncOpenAI         a client of the OpenAI SDK
    model: OpenAIChatModel     AgentScope 1.x, and any other class of ``agentscope``
    model_tuner                the class form's handle, which can be all of these

Whatever it is, its calls are recorded by the same recorder.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import types
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from chatlearn.errors import ConfigError
from chatlearn.tuner.signatures import is_class_form, parameters_of, shown_signature

AGENTSCOPE_PIN = "pip install 'agentscope<2' 'openai<2' 'mcp<2' greenlet"


class ModelKind(Enum):
    """What stands in a workflow's ``model``."""

    LANGCHAIN = "langchain"
    """A LangChain chat model: ``self.llm`` of an agent."""
    OPENAI = "openai"
    """``openai.AsyncOpenAI`` on the endpoint of the run."""
    AGENTSCOPE = "agentscope"
    """AgentScope's ``OpenAIChatModel`` on the endpoint of the run."""


_BY_PACKAGE = {
    "agentscope": ModelKind.AGENTSCOPE,
    "openai": ModelKind.OPENAI,
    "langchain_core": ModelKind.LANGCHAIN,
    "langchain_openai": ModelKind.LANGCHAIN,
    "langchain": ModelKind.LANGCHAIN,
    "chatlearn": ModelKind.LANGCHAIN,
}
"""Kind by the package that the annotated class is from."""

_BY_NAME = {
    "BaseChatModel": ModelKind.LANGCHAIN,
    "CustomChatModel": ModelKind.LANGCHAIN,
    "ChatOpenAI": ModelKind.LANGCHAIN,
    "AsyncOpenAI": ModelKind.OPENAI,
    "AsyncClient": ModelKind.OPENAI,
    "ChatModelBase": ModelKind.AGENTSCOPE,
    "OpenAIChatModel": ModelKind.AGENTSCOPE,
    "DashScopeChatModel": ModelKind.AGENTSCOPE,
    "TrinityChatModel": ModelKind.AGENTSCOPE,
}
"""Kind by the class's name, for annotations that cannot be evaluated: a module imported only under
``TYPE_CHECKING``, or one that is not installed."""

_SYNC_CLIENTS = ("OpenAI", "Client", "AzureOpenAI")


def model_kind(workflow: Any, where: str) -> ModelKind:
    """The kind of a function's ``model``; the class form's handle counts as LangChain.

    Args:
        where: what names the workflow, for messages.

    Raises:
        ConfigError: the annotation is of no kind there is, or of a client that blocks; AgentScope
            is meant and 2.x, or none, is installed.
    """
    if is_class_form(workflow):
        return ModelKind.LANGCHAIN
    return _kind_of_parameter(workflow, "model", where)


def judge_kind(judge: Any, otherwise: ModelKind) -> ModelKind:
    """In which kind a judge wants ``auxiliary_models``: as it annotates them, else as its workflow
    has them. The built-in judges want LangChain."""
    function = getattr(judge, "compute_reward", judge)
    if str(getattr(function, "__module__", "")).startswith("chatlearn."):
        return ModelKind.LANGCHAIN
    try:
        parameters = parameters_of(function)
    except (TypeError, ValueError):
        return otherwise
    parameter = parameters.get("auxiliary_models")
    if parameter is None or parameter.annotation is parameter.empty:
        return otherwise
    named = list(_named(_annotation(function, "auxiliary_models", parameter)))
    known = [_BY_PACKAGE.get(package) or _BY_NAME.get(name) for package, name in named]
    return next((kind for kind in known if kind is not None), otherwise)


def check_agentscope(where: str) -> None:
    """Raises ``ConfigError`` unless AgentScope 1.x is installed."""
    version = agentscope_version()
    if version is None:
        raise ConfigError(f"{where} is AgentScope's, which is not installed here; {AGENTSCOPE_PIN}")
    if not version.startswith("1."):
        raise ConfigError(
            f"{where} is AgentScope's, and AgentScope {version} is installed: its models and "
            f"agents are not those of 1.x, which the tuner works with; {AGENTSCOPE_PIN}"
        )


def agentscope_version() -> str | None:
    """``1.0.21``; None when AgentScope is not installed."""
    try:
        return importlib.metadata.version("agentscope")
    except importlib.metadata.PackageNotFoundError:
        return None


def _kind_of_parameter(function: Any, name: str, where: str) -> ModelKind:
    parameters = parameters_of(function)
    parameter = parameters[name]
    if parameter.annotation is parameter.empty:
        return ModelKind.LANGCHAIN
    annotation = _annotation(function, name, parameter)
    shown = f"{where}: {name} of {shown_signature(function, parameters)}"
    for package, class_name in _named(annotation):
        if package == "openai" and class_name in _SYNC_CLIENTS:
            raise ConfigError(
                f"{shown} is openai.{class_name}, which blocks the event loop that all runs share; "
                "annotate it as openai.AsyncOpenAI and await its calls"
            )
        kind = _BY_PACKAGE.get(package) or (_BY_NAME.get(class_name) if not package else None)
        if kind is ModelKind.AGENTSCOPE:
            check_agentscope(shown)
        if kind is not None:
            return kind
    if annotation in (Any, object):
        return ModelKind.LANGCHAIN
    raise ConfigError(
        f"{shown} is annotated as {annotation!r}; it can be a LangChain BaseChatModel (also "
        "without annotation), an openai.AsyncOpenAI, or AgentScope's OpenAIChatModel"
    )


def _annotation(function: Any, name: str, parameter: inspect.Parameter) -> Any:
    """The annotation itself; its text where it is text that cannot be evaluated."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        return typing.get_type_hints(function, scope)[name]
    except (NameError, AttributeError, TypeError, KeyError, SyntaxError):
        return parameter.annotation


def _named(annotation: Any) -> Iterator[tuple[str, str]]:
    """Package and name of every class in an annotation; package '' where only the name is known."""
    if isinstance(annotation, str):
        yield from (("", name) for name in re.findall(r"[A-Za-z_]\w*", annotation))
    elif isinstance(annotation, typing.ForwardRef):
        yield from _named(annotation.__forward_arg__)
    elif isinstance(annotation, typing.TypeVar):
        yield from _named(annotation.__bound__)
    elif arguments := typing.get_args(annotation):
        for argument in arguments:
            yield from _named(argument)
    elif isinstance(annotation, type) and annotation is not types.NoneType:
        for base in annotation.__mro__:  # a subclass of the user's own counts as what it is made of
            package = base.__module__.partition(".")[0]
            if package in _BY_PACKAGE:
                yield package, base.__name__
                return
        yield annotation.__module__.partition(".")[0], annotation.__name__
