"""``ModelTuner``: the policy as a workflow's ``model_tuner``, in whatever form its agent wants.

    run ── self.endpoint() ──► door ──► ModelTuner ──► AgentScope | OpenAI SDK | URL | LangChain

Where AgentScope 1.x is installed the handle also is one of its chat models, so that
``ReActAgent(model=model_tuner, ...)`` works.
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from chatlearn.errors import AgentError
from chatlearn.models.agent.endpoint.door import Door
from chatlearn.tuner.model_kinds import AGENTSCOPE_PIN, agentscope_version, check_agentscope

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

_NODE_HEADER = "x-chatlearn-node"

_http_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = WeakKeyDictionary()
"""One pool of connections for all runs of an event loop: a client of its own costs a run 40 ms."""


class ModelTuner:
    """The policy of one run. Good until the run is over.

    Args:
        door: the run's endpoint.
        llm: the agent's ``self.llm``.
    """

    def __init__(self, door: Door, llm: BaseChatModel) -> None:
        self._door, self._llm = door, llm

    def as_langchain_model(self) -> BaseChatModel:
        """A LangChain chat model."""
        return self._llm

    def as_oai_baseurl_apikey(self) -> Door:
        """What any client of OpenAI's API needs: ``.base_url``, ``.api_key`` and ``.model``."""
        return self._door

    def as_raw_openai_sdk_client(self, agent_name: str | None = None) -> Any:
        """An ``openai.AsyncOpenAI``. Its calls may name any model.

        Args:
            agent_name: recorded as the node of its calls, for ``models.policy.trainable_nodes``.

        Raises:
            AgentError: the OpenAI SDK is not installed.
        """
        return openai_client(self._door.base_url, self._door.api_key, node=agent_name)

    def as_agentscope_model(self, agent_name: str | None = None) -> Any:
        """An AgentScope ``OpenAIChatModel`` that does not stream.

        Args:
            agent_name: recorded as the node of its calls, for ``models.policy.trainable_nodes``.

        Raises:
            ConfigError: AgentScope 1.x is not installed.
        """
        check_agentscope("as_agentscope_model()")
        return agentscope_model(
            self._door.base_url, self._door.api_key, self._door.model, node=agent_name
        )

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call of AgentScope's; this class is none of its models."""
        raise AgentError(
            f"model_tuner was called like a model of AgentScope, of which 1.x is needed and "
            f"{agentscope_version() or 'nothing'} is installed: {AGENTSCOPE_PIN}; or call "
            "model_tuner.as_langchain_model() or .as_raw_openai_sdk_client()"
        )


def model_tuner(door: Door, llm: BaseChatModel) -> ModelTuner:
    """The handle of a run; an AgentScope chat model too where AgentScope 1.x is installed."""
    version = agentscope_version()
    if version is None or not version.startswith("1."):
        return ModelTuner(door, llm)
    return _agentscope_tuner_class()(door, llm)


def openai_client(base_url: str, api_key: str, *, node: str | None = None) -> Any:
    """An ``AsyncOpenAI`` on ``base_url``; nothing but the run's own time limit ends its calls.

    Raises:
        AgentError: the OpenAI SDK is not installed.
    """
    try:
        from openai import AsyncOpenAI
    except ModuleNotFoundError as error:
        raise AgentError(
            f"the workflow wants a client of the OpenAI SDK, which is not installed ({error}); "
            "pip install openai"
        ) from error
    return AsyncOpenAI(base_url=base_url, api_key=api_key, **_client_settings(node))


def agentscope_model(base_url: str, api_key: str, name: str, *, node: str | None = None) -> Any:
    """AgentScope's ``OpenAIChatModel`` on ``base_url``, answering whole: a turn comes all at once
    anyway, and AgentScope reads streams only of ``openai<2``."""
    return _agentscope_class()(
        model_name=name,
        api_key=api_key,
        stream=False,
        client_kwargs={"base_url": base_url, **_client_settings(node)},
    )


def _client_settings(node: str | None) -> dict[str, Any]:
    from openai import DefaultAsyncHttpxClient

    loop = asyncio.get_running_loop()
    if loop not in _http_clients:
        _http_clients[loop] = DefaultAsyncHttpxClient()
    headers = {"default_headers": {_NODE_HEADER: node}} if node else {}
    return {"http_client": _http_clients[loop], "timeout": None, **headers}


@cache
def _agentscope_class() -> type:
    """``OpenAIChatModel`` that also reads what AgentScope's other formatters write."""
    from agentscope.model import OpenAIChatModel

    class EndpointChatModel(OpenAIChatModel):
        async def __call__(self, messages: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
            return await super().__call__([_as_openai(m) for m in messages], *args, **kwargs)

    return EndpointChatModel


@cache
def _agentscope_tuner_class() -> type:
    class AgentScopeTuner(ModelTuner, _agentscope_class()):
        """A ``ModelTuner`` that is an AgentScope chat model."""

        def __init__(self, door: Door, llm: BaseChatModel) -> None:
            ModelTuner.__init__(self, door, llm)
            _agentscope_class().__init__(
                self,
                model_name=door.model,
                api_key=door.api_key,
                stream=False,
                client_kwargs={"base_url": door.base_url, **_client_settings(None)},
            )

        async def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return await _agentscope_class().__call__(self, *args, **kwargs)

    return AgentScopeTuner


def _as_openai(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose text blocks name their type, which ``DashScopeChatFormatter`` leaves out."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    blocks = [
        {"type": "text", **block} if isinstance(block, dict) and "text" in block else block
        for block in content
    ]
    return {**message, "content": blocks}
