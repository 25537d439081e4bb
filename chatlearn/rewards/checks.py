"""Checks of what was sampled: degenerate output is found, counted, and answered as configured.

A check is a function of one turn that returns a severity from 0 to 1. ``runtime_args.checks`` names
those of a run, each with a threshold and an action.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chatlearn.errors import ConfigError, JudgeError, boundary
from chatlearn.rewards.calling import Wants, finite, is_async, wants
from chatlearn.rewards.nonsense import nonsense
from chatlearn.rewards.registry import describe, load_function, meant
from chatlearn.rewards.repetition import repetition
from chatlearn.types import Turn

CheckFunction = Callable[..., float]


@dataclass(frozen=True, slots=True)
class CalledTool:
    """One tool call as it was written."""

    name: str
    """'' when it cannot be read."""
    error: str | None = None
    """Why it is no valid call; None when it is."""


@dataclass(frozen=True, slots=True)
class SampledTurn:
    """One answer of the policy, as checks see it. Each field is a parameter a check may have."""

    text: str
    """Everything it wrote, with reasoning and tool calls."""
    logprobs: Sequence[float] = ()  # [C]
    calls: tuple[CalledTool, ...] = ()
    tools: Collection[str] | None = None
    """Names of the tools it was shown; None when it was shown none."""


class CheckSettings(Protocol):
    """An entry of ``runtime_args.checks``."""

    @property
    def name(self) -> str: ...
    @property
    def threshold(self) -> float: ...
    @property
    def action(self) -> str: ...
    @property
    def reward(self) -> float: ...


def wrong_toolcall(calls: Sequence[CalledTool], tools: Collection[str] | None = None) -> float:
    """The share of a turn's tool calls that cannot be read or name a tool that it was not shown.

    Where no tools were shown through the API, an agent may have described them in its prompt: then
    only a call that cannot be read is wrong.
    """
    wrong = [
        c for c in calls if c.error or not c.name or (tools is not None and c.name not in tools)
    ]
    return len(wrong) / len(calls) if calls else 0.0


CHECKS: dict[str, CheckFunction] = {
    "nonsense": nonsense,
    "wrong_toolcall": wrong_toolcall,
    "repetition": repetition,
}
"""The built-in checks, by name."""


@dataclass(frozen=True, slots=True)
class Check:
    """A check of this run, ready to be called."""

    name: str
    function: CheckFunction
    parameters: Wants
    threshold: float
    action: str
    reward: float

    def severity(self, sampled: SampledTurn) -> float:
        """Between 0 and 1.

        Raises:
            JudgeError: a user's check raised, or returned something else.
        """
        where = f"check {self.name!r} (runtime_args.checks)"
        supply = {name: getattr(sampled, name) for name in SampledTurn.__slots__}
        with boundary(JudgeError, where):
            result = self.function(**self.parameters.pick(supply))
        try:
            number = finite(result, "the severity")
            if not 0 <= number <= 1:
                raise ValueError(f"the severity is {number}")
        except ValueError as error:
            raise JudgeError(f"{where}: {error}; a check returns a number from 0 to 1") from None
        return number


def load_checks(entries: Iterable[CheckSettings]) -> tuple[Check, ...]:
    """The checks of ``runtime_args.checks``; a user's is ``path/file.py->name``.

    Raises:
        ConfigError: a check cannot be had, has other parameters than ``SampledTurn`` has fields, is
            a coroutine function, or comes twice.
    """
    checks: list[Check] = []
    for entry in entries:
        name, function = _find(entry.name)
        where = f"runtime_args.checks: {entry.name}"
        if name in [check.name for check in checks]:
            raise ConfigError(f"{where}: two checks are named {name!r}")
        parameters = wants(function)
        if strange := parameters.missing(dict.fromkeys(SampledTurn.__slots__)):
            raise ConfigError(
                f"{where}: {describe(function)} has the parameters "
                f"({', '.join(parameters.required)}); nobody supplies {', '.join(strange)}. It may "
                f"have {', '.join(SampledTurn.__slots__)}"
            )
        if is_async(function):
            raise ConfigError(
                f"{where}: {describe(function)} is async; a check is a plain function"
            )
        checks.append(
            Check(name, function, parameters, entry.threshold, entry.action, entry.reward)
        )
    return tuple(checks)


@dataclass(slots=True)
class Findings:
    """What the checks of one run found."""

    checks: tuple[Check, ...] = ()
    tripped: dict[int, list[Check]] = field(default_factory=dict)
    """Of every turn that has some, by its id: checks at or above their threshold."""
    masked: list[int] = field(default_factory=list)
    """Turns that only a check excluded."""
    stopped: Check | None = None
    """The first that ended the run."""
    error: JudgeError | None = None
    """The first failure of a check: such a run is not trained."""

    def look(self, turn: int, sampled: SampledTurn) -> None:
        """Check one turn.

        Raises:
            JudgeError: a check failed.
        """
        try:
            found = [c for c in self.checks if c.severity(sampled) >= c.threshold]
        except JudgeError as error:
            self.error = self.error or error
            raise
        if found:
            self.tripped[turn] = found
        self.stopped = self.stopped or next((c for c in found if c.action == "stop"), None)

    @property
    def why_stopped(self) -> str:
        """For the error of the run; '' when no check ended it."""
        name = self.stopped.name if self.stopped else ""
        return f"check {name!r} (runtime_args.checks) ended the run" if name else ""

    def mask(self, turns: Sequence[Turn]) -> None:
        """Exclude the turns that a check with the action ``mask`` found."""
        for turn in turns:
            names = [c.name for c in self.tripped.get(turn.id, ()) if c.action == "mask"]
            if names and not turn.excluded:
                turn.excluded = f"check: {', '.join(names)}"
                self.masked.append(turn.id)

    def reward(self, turns: Sequence[Turn]) -> float | None:
        """What the run's reward becomes: the lowest of the checks that say one; None when none."""
        found = [c.reward for c in self._of(turns) if c.action in ("reward", "stop")]
        return min(found, default=None)

    def metrics(self, turns: Sequence[Turn]) -> dict[str, float]:
        """``checks/<name>`` of every check: 1 when it found something in the run, else 0."""
        found = {check.name for check in self._of(turns)}
        return {f"checks/{check.name}": float(check.name in found) for check in self.checks}

    def _of(self, turns: Sequence[Turn]) -> list[Check]:
        """Checks that tripped, on any turn but those that were tried again."""
        kept = [turn.id for turn in turns if turn.excluded != "superseded"]
        return [check for turn in kept for check in self.tripped.get(turn, ())]


def _find(name: str) -> tuple[str, CheckFunction]:
    """A check's short name, and its function."""
    if name in CHECKS:
        return name, CHECKS[name]
    where = f"runtime_args.checks: {name}"
    if "->" not in name and ":" not in name:
        raise ConfigError(
            f"{where}: there is no such check{meant(name, CHECKS)}; known are {', '.join(CHECKS)}; "
            "yours is named by 'path/file.py->name' or 'pkg.mod->name'"
        )
    spec = ":".join(part.strip() for part in name.rsplit("->", 1))
    return spec.rpartition(":")[2], load_function(spec, where)
