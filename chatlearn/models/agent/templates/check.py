"""Whether appending to the tokens held gives what the model's chat template would have rendered.

``check_template`` plays the conversations an agent can have (``play``), each turn ended
by an end token and cut by its limit, and compares every prompt with a full render. Where they are
not the same tokens it finds the rule that explains it, or shows the first place that differs.

    python -m chatlearn.models.agent.templates.check MODEL_OR_FOLDER
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import date
from enum import Enum
from itertools import pairwise
from typing import Any

from chatlearn.errors import AgentError, ConfigError
from chatlearn.models.agent.prompt_builder import PromptBuilder
from chatlearn.models.agent.templates.play import CONVERSATIONS, TOOLS, Conversation, Played, play
from chatlearn.types import StopReason

_log = logging.getLogger(__name__)

_THINKING = re.compile(
    r"(\s*)<think>.*?</think>\s*"
    r"|<\|channel\|>analysis<\|message\|>.*?<\|end\|><\|start\|>assistant"  # gpt-oss
    r"|<\|channel>thought.*?<channel\|>"  # Gemma 4
    r"| to=self<\|message\|>.*?<\|eom\|><\|start\|>assistant",  # Muse
    re.DOTALL,
)


class Verdict(str, Enum):
    """What comparing the appended tokens with a full render gave."""

    EQUAL = "equal"
    """The same tokens."""
    RULE = "rule"
    """Other tokens for reasons that have a name; ``Rule`` says how far each was proven."""
    REFUSED = "refused"
    """The template has no way to render this; an agent that gets there ends with an error."""
    DIFFERS = "differs"
    """Other tokens for no known reason."""


class Rule(str, Enum):
    """Why appended tokens may differ from a full render, and are right to."""

    THINKING = "thinking kept"
    """The template drops or rewrites the thinking of earlier turns; it stays as it was sampled."""
    END_TOKEN = "end token kept"
    """The template writes another end token once a turn is history; the sampled one stays."""
    SPELLING = "tokens kept"
    """The same text, cut into other tokens where the sampled ones meet the prompt."""
    OPENING = "opening kept"
    """The template writes or places its opening (a system message, a default one) by what comes
    later; it stays as it was first rendered."""
    TOOLS = "tools stay"
    """The template moves the tools to the last user message; those already shown stay."""
    ROUNDS = "rounds alike"
    """The template writes a second round of tools otherwise than the first; ours are alike."""
    CALLS = "calls kept"
    """The template would not show the tool calls again; they stay as they were sampled."""
    APART = "turns apart"
    """The template joins two answers in a row into one turn; the two that were sampled stay."""
    TURNS = "turn by turn"
    """The template refuses the conversation as a whole; each step of it can be appended."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on one conversation whose turns all ended for one reason."""

    conversation: str
    stop: StopReason
    verdict: Verdict
    rules: tuple[Rule, ...] = ()
    why: str = ""
    """The template's own words of refusal, or the first place that differs."""
    is_plain: bool = False

    def __str__(self) -> str:
        rules = f" ({', '.join(r.value for r in self.rules)})" if self.rules else ""
        why = f": {self.why}" if self.why else ""
        return f"{self.conversation} [{self.stop}]: {self.verdict.value}{rules}{why}"


@dataclass(frozen=True, slots=True)
class TemplateReport:
    """What ``check_template`` found for one model."""

    model: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line for the log."""
        parts = []
        for verdict in Verdict:
            found = self._with(verdict)
            if not found:
                continue
            rules = sorted({rule.value for f in found for rule in f.rules})
            detail = rules if verdict in (Verdict.EQUAL, Verdict.RULE) else _names(found)
            parts.append(
                f"{len(found)} {verdict.value}" + (f" ({', '.join(detail)})" * bool(detail))
            )
        cases = len(self.findings)
        return f"chat template of {self.model}: of {cases} cases {'; '.join(parts)}"

    def raise_or_warn(self) -> None:
        """Log the summary, warn of what an agent should know, refuse what none could work with.

        Raises:
            ConfigError: a plain conversation cannot be built as the template would.
        """
        refused, differs = self._with(Verdict.REFUSED), self._with(Verdict.DIFFERS)
        plain = [f for f in (*differs, *refused) if f.is_plain]
        if plain:
            raise ConfigError(
                f"the chat template of {self.model!r} cannot be continued token by token: "
                f"{plain[0]}. Put a chat_template.jinja that renders a conversation of user and "
                "assistant into the model folder (models.policy_trainer.load), or name its "
                "end-of-turn token as eos_token_id in generation_config.json"
            )
        _log.info("%s", self.summary)
        for note in self.notes:
            _log.info("chat template of %s: %s", self.model, note)
        for finding in differs:
            _log.warning("chat template of %s: %s", self.model, finding)
        if refused:
            _log.warning(
                "chat template of %s refuses: %s; an agent that gets there ends with an error",
                self.model,
                ", ".join(_names(refused)),
            )

    def _with(self, verdict: Verdict) -> list[Finding]:
        return [f for f in self.findings if f.verdict is verdict]


def check_template(
    tokenizer: Any,
    eos_token_ids: Collection[int],
    template_kwargs: dict[str, Any] | None = None,
) -> TemplateReport:
    """Compare appending with full renders for every sequence of roles an agent can produce.

    Raises:
        ConfigError: there is no chat template, or it ends no turn with one of ``eos_token_ids``.
    """
    prompts = PromptBuilder(tokenizer, eos_token_ids, template_kwargs)
    findings = tuple(
        _judge(prompts, conversation, stop)
        for conversation in CONVERSATIONS
        for stop in (StopReason.STOP, StopReason.LENGTH)
    )
    return TemplateReport(str(tokenizer.name_or_path), findings, tuple(_notes(prompts)))


def _judge(prompts: PromptBuilder, conversation: Conversation, stop: StopReason) -> Finding:
    found = Finding(conversation.name, stop, Verdict.EQUAL, is_plain=conversation.is_plain)
    try:
        played = play(prompts, conversation, stop)
    except AgentError as error:
        return replace(found, verdict=Verdict.REFUSED, why=str(error))
    if played.full is None:
        return replace(found, verdict=Verdict.RULE, rules=(Rule.TURNS,), why=played.refusal)
    if played.appended == played.full:
        return found
    rules = _explain(prompts, conversation, stop, played)
    if rules:
        return replace(found, verdict=Verdict.RULE, rules=tuple(rules))
    return replace(found, verdict=Verdict.DIFFERS, why=_difference(prompts, played))


def _explain(
    prompts: PromptBuilder, conversation: Conversation, stop: StopReason, played: Played
) -> list[Rule]:
    """The rules without which both would be the same tokens; empty when none explains it."""
    decode = prompts.tokenizer.decode
    assert played.full is not None
    full, kept = decode(played.full), decode(played.as_ended)
    rules = [Rule.END_TOKEN] if played.as_ended != played.appended else []
    if kept == full:
        return rules or [Rule.SPELLING]
    if played.unshown:
        for text in played.unshown:
            kept = kept.replace(text, "", 1)
        rules = [*rules, Rule.CALLS]
        if kept == full:
            return rules
    if _THINKING.sub(r"\1", kept) == _THINKING.sub(r"\1", full):
        return [*rules, Rule.THINKING]
    for rule, simpler in _simpler(conversation):
        found = _judge(prompts, simpler, stop)
        if found.verdict in (Verdict.EQUAL, Verdict.RULE):
            return [*found.rules, rule]
    return []


def _simpler(conversation: Conversation) -> Iterator[tuple[Rule, Conversation]]:
    """The conversation without what a template may move, and the rule if that was all."""
    roles = [m["role"] for m in conversation.messages]
    calls = [i for i, m in enumerate(conversation.messages) if m.get("tool_calls")]
    if len(calls) > 1:
        yield Rule.ROUNDS, conversation.without(*range(calls[0], calls[1]))
    for i, pair in enumerate(pairwise(roles)):
        if pair == ("assistant", "assistant"):
            yield Rule.APART, conversation.without(i)
    systems = [i for i, role in enumerate(roles) if role == "system"]
    if systems:
        yield Rule.OPENING, conversation.without(*systems)
    if conversation.tools:
        yield Rule.TOOLS, replace(conversation, tools=False)


def _difference(prompts: PromptBuilder, played: Played) -> str:
    ours, theirs = played.appended, played.full or []
    pairs = enumerate(zip(ours, theirs, strict=False))
    start = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    around = slice(max(start - 8, 0), start + 12)
    shown = [prompts.tokenizer.decode(ids[around]) for ids in (ours, theirs)]
    return f"at token {start} appending gives {shown[0]!r}, a full render {shown[1]!r}"


def _notes(prompts: PromptBuilder) -> Iterator[str]:
    """What the template puts in front of a conversation, or leaves out of it."""
    user = [{"role": "user", "content": "chatlearnmark"}]
    try:
        text = prompts.template.render(user, None, generation=False)
        shown = prompts.template.render(user, TOOLS, generation=False)
    except AgentError:
        return
    front = text[: max(text.find("chatlearnmark"), 0)]
    if re.search(r"\w{3,}.*\w{3,} \w+", re.sub(r"<[^<>]*>", "", front)):
        yield "it has a default system prompt, which stands at the front once"
    if prompts.template.has_date:
        yield f"it shows the date; this process shows {date.today()} until it ends"
    if shown == text:
        yield "it does not show tools to the model: describe them in a system message"


def _names(found: list[Finding]) -> list[str]:
    return list(dict.fromkeys(f.conversation for f in found))


def main(argv: list[str] | None = None) -> int:
    """Print the report of one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub id")
    args = parser.parse_args(argv)
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    try:
        eos = GenerationConfig.from_pretrained(args.model).eos_token_id
    except OSError:  # the folder has no generation_config.json
        eos = None
    ids = [eos] if isinstance(eos, int) else list(eos or [])
    report = check_template(tokenizer, [*ids, tokenizer.eos_token_id])
    lines = [report.summary, *(f"- {note}" for note in report.notes)]
    sys.stdout.write("\n".join([*lines, *map(str, report.findings)]) + "\n")
    return int(any(f.is_plain and f.verdict is Verdict.DIFFERS for f in report.findings))


if __name__ == "__main__":
    raise SystemExit(main())
