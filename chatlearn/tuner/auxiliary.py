"""``auxiliary_models`` in the kind of the workflow: the frozen models of
``runtime_args.auxiliary_models``, which an agent has as LangChain objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from chatlearn.errors import AgentError
from chatlearn.tuner.model_kinds import ModelKind
from chatlearn.tuner.model_tuner import agentscope_model, openai_client


class AuxiliaryIn(Mapping[str, Any]):
    """``models`` (LangChain, by name) as ``kind``. Each is made when it is asked for, in a run.

    Asking raises ``AgentError`` for a model that is no client of an OpenAI-compatible endpoint: it
    has no such form.
    """

    def __init__(self, kind: ModelKind, models: Mapping[str, Any]) -> None:
        self._kind, self._models = kind, models

    def __getitem__(self, name: str) -> Any:
        model = self._models[name]
        return model if self._kind is ModelKind.LANGCHAIN else _converted(self._kind, name, model)

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


def _converted(kind: ModelKind, name: str, model: Any) -> Any:
    address = getattr(model, "openai_api_base", None)
    if not address:
        raise AgentError(
            f"auxiliary model {name!r} is a {type(model).__name__} without an address, and the "
            f"workflow asks for it as {kind.value}; give it by base_url and model "
            f"(runtime_args.auxiliary_models.{name}), or annotate the workflow's model as LangChain"
        )
    secret = model.openai_api_key
    key = secret.get_secret_value() if hasattr(secret, "get_secret_value") else "none"
    if kind is ModelKind.OPENAI:
        return openai_client(address, key)
    return agentscope_model(address, key, model.model_name)
