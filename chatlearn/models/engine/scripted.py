"""An engine that says what it is told: for tests, and for stepping through an agent by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from chatlearn.errors import EngineError
from chatlearn.interfaces import Weights
from chatlearn.types import Completion, SamplingParams, Session, StopReason

Answer = Sequence[int] | str | Completion
"""Token ids, text (needs a tokenizer), or the whole completion."""


class Tokenizer(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Request:
    """One call of ``generate``, as it arrived."""

    prompt_ids: list[int]  # [P]
    sampling: SamplingParams
    session: Session


class ScriptedEngine:
    """Answers with ``script``: a function of the request, or answers given in order of arrival.

    Logprobs are -1.0 unless the answer is a ``Completion``. An answer longer than
    ``max_new_tokens`` is cut there, with ``StopReason.LENGTH``, as an engine would.
    """

    def __init__(
        self,
        script: Callable[[list[int], SamplingParams, Session], Answer] | Sequence[Answer],
        *,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.requests: list[Request] = []
        self.published: list[int] = []
        """Versions, in the order of ``publish``."""
        self.aborted: list[Session] = []
        self._script = script
        self._tokenizer = tokenizer

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, session: Session
    ) -> Completion:
        """The next answer. Raises ``EngineError`` when the script has none left."""
        number = len(self.requests)
        self.requests.append(Request(list(prompt_ids), sampling, session))
        if callable(self._script):
            answer = self._script(list(prompt_ids), sampling, session)
        elif number < len(self._script):
            answer = self._script[number]
        else:
            raise EngineError(
                f"the script has {len(self._script)} answers; {session} asked for one more"
            )
        if isinstance(answer, Completion):
            return answer
        if isinstance(answer, str):
            if self._tokenizer is None:
                raise EngineError(f"answer {answer!r} is text: give ScriptedEngine a tokenizer")
            answer = self._tokenizer.encode(answer, add_special_tokens=False)
        kept = list(answer[: sampling.max_new_tokens])
        reason = StopReason.STOP if len(kept) == len(answer) else StopReason.LENGTH
        version = self.published[-1] if self.published else 0
        return Completion(kept, [-1.0] * len(kept), reason, (version, version))

    async def publish(self, weights: Weights, *, version: int) -> None:
        for _ in weights:  # a trainer may gather each one when it is asked for
            pass
        self.published.append(version)

    async def sleep(self) -> None:
        pass

    async def wake(self) -> None:
        pass

    async def abort(self, session: Session) -> None:
        self.aborted.append(session)
