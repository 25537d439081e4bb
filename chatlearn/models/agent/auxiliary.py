"""Frozen models beside the policy (``runtime_args.auxiliary_models``): judges, users, translators.

They are LangChain chat models like any other. Nothing they say is recorded as a turn, so nothing of
it can be trained; what they said is context where the policy reads it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from langchain_core.language_models import BaseChatModel

from chatlearn.config.runtime_args import AuxiliaryModel
from chatlearn.errors import ConfigError, boundary
from chatlearn.rewards.registry import load_function


def build_auxiliary(models: Mapping[str, AuxiliaryModel]) -> dict[str, BaseChatModel]:
    """Every model of ``runtime_args.auxiliary_models``, by its name.

    Raises:
        ConfigError: a factory cannot be had, raises or returns something else; a key's environment
            variable is not set; ``langchain-openai`` is not installed.
    """
    return {name: _build(f"runtime_args.auxiliary_models.{name}", m) for name, m in models.items()}


def _build(where: str, entry: AuxiliaryModel) -> BaseChatModel:
    if entry.factory is None:
        return _openai(where, entry)
    factory = load_function(entry.factory, where)
    with boundary(ConfigError, f"{where}: calling {entry.factory}"):
        model = factory()
    if not isinstance(model, BaseChatModel):
        raise ConfigError(
            f"{where}: {entry.factory} returned {type(model).__name__}; it must return a LangChain "
            "chat model"
        )
    return model


def _openai(where: str, entry: AuxiliaryModel) -> BaseChatModel:
    try:
        from langchain_openai import ChatOpenAI
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{where}: base_url needs langchain-openai ({error}); install chatlearn[openai]"
        ) from error
    key: Any = "none"
    if entry.api_key_env is not None:
        key = os.environ.get(entry.api_key_env)
        if not key:
            raise ConfigError(
                f"{where}: the environment variable {entry.api_key_env} (api_key_env) is not set"
            )
    return ChatOpenAI(
        base_url=entry.base_url,
        model=entry.model,
        api_key=key,
        temperature=entry.temperature,
        timeout=entry.timeout_s,
    )
