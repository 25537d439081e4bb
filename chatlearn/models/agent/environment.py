"""The environment service inside an agent run: what is lost there ends the run by its name."""

from __future__ import annotations

from typing import Any

from chatlearn.data.environment.client import EnvironmentClient
from chatlearn.errors import EnvironmentLost
from chatlearn.models.agent.run import current_run


def run_environment(url: str, **settings: Any) -> EnvironmentClient:
    """A client for the environment service at ``url``, for the agent run this code is part of.

    A run whose environment is lost ends as ``engine_error`` also when a tool node or a retry caught
    the error: it is tried again, then counted as failed, and never trained on what was left.

    Args:
        settings: ``api_key``, ``timeout_s`` and ``patience_s`` of ``EnvironmentClient``.

    Raises:
        AgentError: called outside an agent run, or ``url`` is no URL.
    """
    run = current_run()

    def note(error: EnvironmentLost) -> None:
        run.engine_error = run.engine_error or error

    return EnvironmentClient(url, on_lost=note, **settings)
