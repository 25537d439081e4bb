"""Errors named for the boundary crossed, and the one broad ``except`` of the project.

A bad rollout is data: user code runs inside ``boundary`` and its failure becomes an ``AgentError``
that the rollout records. A bad framework is a crash: everything else propagates, once, to the
driver. Messages say what, where and what to do. All errors can be pickled (they cross processes).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class ChatLearnError(Exception):
    """Root of what this package raises on purpose."""


class ConfigError(ChatLearnError, ValueError):
    """The configuration is refused; lists every problem at once."""


class DataError(ChatLearnError, ValueError):
    """A dataset file or row cannot be used; names file, line and field."""


class AgentError(ChatLearnError):
    """User code of an agent failed, or an agent is registered or configured wrongly."""


class JudgeError(AgentError):
    """A reward function failed or returned something that is not a finite number."""


class EngineError(ChatLearnError):
    """The engine could not sample; the run it served may be tried again."""


class EngineLost(EngineError):
    """The server is gone or unreachable; the request may be asked again elsewhere."""


class EnvironmentLost(EngineError):
    """The environment service is gone, or forgot the instance; the run may be tried again."""


class TrainerError(ChatLearnError):
    """The trainer cannot train this model or these samples."""


class CheckpointError(ChatLearnError):
    """A checkpoint cannot be written, found or read."""


@contextmanager
def boundary(kind: type[ChatLearnError], where: str) -> Iterator[None]:
    """Turn whatever user code raises into ``kind``, with ``where`` and the user's own traceback.

    Errors of this package pass through unchanged, so that an engine failure inside an agent stays
    an engine failure. Cancellation and interrupts are not ``Exception`` and pass through too.

    Args:
        kind: class to raise.
        where: what was running, for the message: ``agent 'calculator' of task train:3``.
    """
    try:
        yield
    except ChatLearnError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        trace = "".join(traceback.format_list(frames[-8:]))
        raise kind(f"{where} raised {type(error).__name__}: {error}\n{trace}".rstrip()) from error
