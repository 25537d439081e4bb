"""What debugging prints: conversations, trained tokens, rewards, and the advantages of a group."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from chatlearn.config import GrpoConfig
from chatlearn.types import Group, Message, Sample, Task, Trajectory

OPEN, CLOSE = "⟦", "⟧"
"""Around tokens that train; a terminal shows them green as well."""
_ROLE_STYLES = {"system": "dim", "user": "cyan", "assistant": "bold green", "tool": "yellow"}


class Report:
    """Prints one debugging session."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, said: str, tasks: Sequence[Task], cfg: GrpoConfig) -> None:
        siblings, sampling = cfg.models.policy.num_inference_per_prompt, cfg.train_sampling()
        self._print(
            Text(
                f"Debugging {len(tasks)} tasks × {siblings} runs; {said}. Nothing is trained.\n"
                f"Sampled as in training: temperature {sampling.temperature:g}, top_p "
                f"{sampling.top_p:g}, top_k {sampling.top_k}, at most {sampling.max_new_tokens} "
                "tokens a call."
            )
        )

    def run(self, trajectory: Trajectory, sibling: int) -> None:
        """One run as soon as it has ended: its conversation and how it ended."""
        task = trajectory.task
        name = task.uid if task is not None else trajectory.uid
        self._print(Rule(f"task {name}, run {sibling}", align="left"))
        for message in trajectory.messages:
            self._print(_message(message))
        reward = "none" if trajectory.reward is None else f"{trajectory.reward:g}"
        said = [f"{name} {_number(value)}" for name, value in trajectory.metrics.items() if value]
        ended = f"outcome {trajectory.outcome.value}, reward {reward}"
        self._print(Text(", ".join([ended, *said]), style="bold"))
        if trajectory.error:
            self._print(Text(trajectory.error, style="red"))

    def group(
        self,
        group: Group,
        advantages: Mapping[str, float],
        samples: Sequence[Sample],
        tokenizer: Any | None,
    ) -> None:
        """What would be trained of a task's runs, and with which advantages."""
        self._print(Rule(f"task {group.task.uid}: what would be trained", align="left"))
        if tokenizer is None:
            self._print(
                Text(
                    "Not known token by token: the answers are another model's, so there is no "
                    "loss. Only the agent's logic is shown."
                )
            )
        else:
            for sample in samples:
                head = (
                    f"{sample.trajectory}: {sample.num_trained} of {len(sample.token_ids)} tokens"
                )
                self._print(Text(f"{head} train ({OPEN}marked{CLOSE})", style="bold"))
                self._print(_marked(sample, tokenizer))
        self._print(_table(group, advantages, samples, tokens_known=tokenizer is not None))
        if not group.has_signal and group.trainable:
            self._print(
                Text(
                    "All runs of this task earned the same reward: nothing would be learned from "
                    "it. With more runs (rollout.num_repeat) or another task they may differ.",
                    style="yellow",
                )
            )

    def end(self, groups: Sequence[Group]) -> None:
        runs = [t for group in groups for t in group.trajectories]
        rewards = [t.reward for t in runs if t.reward is not None]
        outcomes = sorted(t.outcome.value for t in runs)
        counted = ", ".join(f"{len(list(same))} {name}" for name, same in groupby(outcomes))
        mean = f"{sum(rewards) / len(rewards):.3f}" if rewards else "none"
        self._print(Rule(align="left"))
        signal = sum(group.has_signal for group in groups)
        self._print(
            Text(
                f"{len(runs)} runs of {len(groups)} tasks: {counted}; reward mean {mean}; "
                f"{signal} of {len(groups)} tasks would teach something."
            )
        )

    def close(self) -> None:
        self._console.file.flush()

    def _print(self, what: Any) -> None:
        self._console.print(what, soft_wrap=isinstance(what, Text))


def _message(message: Message) -> Text:
    role = str(message.get("role"))
    text = Text(f"[{role}] ", style=_ROLE_STYLES.get(role, ""))
    text.append(str(message.get("content") or ""), style="default")
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        text.append(f"\n  calls {function.get('name')}({arguments})", style="magenta")
    return text


def _marked(sample: Sample, tokenizer: Any) -> Text:
    """The row as text, with its trained spans marked."""
    text = Text()
    for is_trained, span in _spans(sample):
        said = tokenizer.decode(span)
        if is_trained:
            text.append(f"{OPEN}{said}{CLOSE}", style="black on green")
        else:
            text.append(said, style="dim")
    return text


def _spans(sample: Sample) -> Iterator[tuple[bool, list[int]]]:
    pairs = zip(sample.loss_mask, sample.token_ids, strict=True)
    for is_trained, same in groupby(pairs, key=lambda pair: pair[0]):
        yield is_trained, [token for _, token in same]


def _table(
    group: Group,
    advantages: Mapping[str, float],
    samples: Sequence[Sample],
    *,
    tokens_known: bool,
) -> Table:
    table = Table(title=f"task {group.task.uid}", title_justify="left")
    for column in ("run", "outcome", "reward", "advantage", "calls", "sampled", "trained"):
        side: Any = "left" if column in ("run", "outcome") else "right"
        table.add_column(column, justify=side, no_wrap=True)
    for trajectory in group.trajectories:
        trained = sum(s.num_trained for s in samples if s.trajectory == trajectory.uid)
        table.add_row(
            trajectory.uid.rpartition("/")[2].partition(".")[0],
            trajectory.outcome.value,
            _number(trajectory.reward),
            _number(advantages.get(trajectory.uid)),
            str(len(trajectory.turns)),
            str(trajectory.sampled_tokens) if tokens_known else "?",
            str(trained) if tokens_known else "?",
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")
