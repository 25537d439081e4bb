"""The words of the project as data: task, turn, trajectory, sample. Stdlib only.

One convention holds everywhere: a per-token list describes the token at its own index.
``logprobs[t]`` is log p(token t | tokens before t), never shifted by one. The only shift in the
project is inside the trainer, where a logit predicts the next position.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Message = dict[str, Any]
"""An OpenAI-style chat message: ``{"role": ..., "content": ...}``, maybe with ``tool_calls``."""


class _Word(str, Enum):
    """A string enumeration whose members print as their value (``enum.StrEnum`` needs 3.11)."""

    def __str__(self) -> str:
        return self.value


class StopReason(_Word):
    """Why one completion ended."""

    STOP = "stop"
    """The policy ended its turn: an end-of-turn token, or one of the caller's stop strings."""
    LENGTH = "length"
    """The token limit of the call was reached first; the turn has no end-of-turn token."""
    ABORT = "abort"
    """The engine was told to stop; what had been sampled by then is returned."""


class Outcome(_Word):
    """How one agent run ended. Only the first three are the policy's own doing, and are trained."""

    FINISHED = "finished"
    """The graph reached its end."""
    TRUNCATED = "truncated"
    """A token limit cut the run, of a call, of the rollout or of the context, or a check did."""
    TURN_LIMIT = "turn_limit"
    """The graph was stopped by LangGraph's recursion limit."""
    AGENT_ERROR = "agent_error"
    """User code of the agent raised, or returned something that is not an agent's output."""
    JUDGE_ERROR = "judge_error"
    """A reward function, a judge or a check raised, or returned no finite number."""
    ENGINE_ERROR = "engine_error"
    """The engine, or an environment service, failed: infrastructure, not the policy. Such a run is
    tried again."""
    TIMEOUT = "timeout"
    """The run took longer than ``runtime_args.agent_timeout_s``."""
    ABORTED = "aborted"
    """The run was cancelled from outside, at shutdown for instance."""

    @property
    def is_trainable(self) -> bool:
        """Whether the run says something about the policy (law 4: failures are never reward 0)."""
        return self in (Outcome.FINISHED, Outcome.TRUNCATED, Outcome.TURN_LIMIT)


class Fork(_Word):
    """Why a turn begins a new branch of the tree instead of going on where a turn ended."""

    BRANCH = "branch"
    """Another turn went on from here already, or the history stops before an answer: parallel
    nodes, ``Send``, time travel."""
    REPEAT = "repeat"
    """The same prompt, token for token, was asked before: a retry, or several drafts."""
    FRESH = "fresh"
    """No message but perhaps the system prompt was heard before: a sub-agent's own conversation."""
    TOOLS = "tools"
    """The same messages with other tools."""
    TRIMMED = "trimmed"
    """Messages are missing, the others are in their order."""
    REORDERED = "reordered"
    """Known messages in another order."""
    COMPACTED = "compacted"
    """Fewer messages, with new ones among them: a summary."""
    EDITED = "edited"
    """A message was replaced, or one was put before others."""


@dataclass(frozen=True, slots=True)
class Task:
    """One dataset row, ready to be given to an agent."""

    uid: str
    """Stable name of the row: file stem and row number, ``train_agent:17``."""
    messages: list[Message]
    agent_name: str
    agent_cfg_path: str | None
    data_source: str
    ground_truth: Any
    fields: dict[str, Any] = field(default_factory=dict)
    """Every other column of the user's row; all of them reach ``run(**kwargs)``."""


@dataclass(frozen=True, slots=True)
class NodeSampling:
    """How the calls of some nodes sample; None = as the run does."""

    pattern: str
    """Of nodes, see ``models/agent/node_patterns.py``."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    """Most tokens of one call."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a run samples, or one call of it. Training and evaluation each have their own."""

    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 means no limit."""
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()
    """Stop strings; the text of the message ends before the first of them."""
    seed: int = 0
    nodes: tuple[NodeSampling, ...] = ()
    """Of a run: what some nodes do differently; the first pattern that matches counts."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The token limits of one agent run."""

    turn_tokens: int
    """Most tokens sampled by one call."""
    rollout_tokens: int
    """Most tokens sampled by all calls of the run together."""
    context_tokens: int
    """Longest prompt plus completion of any one call."""


@dataclass(frozen=True, slots=True)
class Session:
    """Who is asking the engine. Siblings of a group have a prompt in common: an engine that keeps
    caches should serve them in one place."""

    group: str
    """The same for all siblings of one task in one episode."""
    run: str
    """Sibling and attempt: names one run inside the group."""

    def __str__(self) -> str:
        return f"{self.group}/{self.run}"


@dataclass(frozen=True, slots=True)
class Completion:
    """What one ``Engine.generate`` returned."""

    token_ids: list[int]  # [C]
    logprobs: list[float]  # [C]
    """log softmax(logits / temperature) of each sampled token, before top-p and top-k cut the
    distribution: the number a trainer can compute again."""
    stop_reason: StopReason
    versions: tuple[int, int]
    """Lowest and highest weight version that sampled a token of this completion."""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"Completion has {len(self.token_ids)} token_ids but {len(self.logprobs)} logprobs"
            )


def node_path(checkpoint_ns: str) -> str:
    """Names of the nodes in LangGraph's ``checkpoint_ns``: ``team:4f2a…|1|writer:77b0…``, where a
    number counts the calls of one sub-graph, is ``team/writer``."""
    parts = checkpoint_ns.split("|")
    return "/".join(part.partition(":")[0] for part in parts if not part.isdigit())


@dataclass(slots=True)
class Turn:
    """One model call. ``prompt_ids`` is exactly what the engine was given (law 1)."""

    id: int
    """Position in the trajectory, in the order in which the calls were answered."""
    parent: int | None
    """The turn whose prompt and completion begin this prompt, or None for a new root."""
    prompt_ids: list[int]  # [P]
    completion: Completion
    fork: Fork | None = None
    """Why it does not simply go on where its parent ended; None when it does, and of the first."""
    prefilled: int = 0
    """Tokens at the end of the prompt that were put into the assistant's mouth (a forced tool
    call); the message begins with them."""
    temperature: float = 1.0
    """The completion was sampled at, and is trained at."""
    node: str = ""
    """LangGraph node that made the call, '' outside a graph."""
    checkpoint_ns: str = ""
    """LangGraph's path of sub-graphs, with task ids: ``team:4f2a…|writer:77b0…``."""
    step: int = 0
    """LangGraph's super-step."""
    send: int | None = None
    """Which ``Send`` of its step started the node; None when none did."""
    thread: str = ""
    """LangGraph's ``thread_id``, '' without one."""
    tags: tuple[str, ...] = ()
    tool_calls: tuple[str, ...] = ()
    """Names of the tools the completion calls, in order; '' for a call that cannot be read."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds: ``prompt_s`` building the prompt, ``engine_s`` waiting for the engine."""
    reward: float | None = None
    """The turn's own reward; None = that of the run."""
    excluded: str = ""
    """Why its tokens are context and never trained, as ``check: repetition``; '' when they are."""

    @property
    def path(self) -> str:
        """Names of the nodes down to this call: ``team/writer``; '' outside a graph."""
        return node_path(self.checkpoint_ns) or self.node

    @property
    def token_ids(self) -> list[int]:
        """Prompt and completion as one row. [P + C]"""
        return self.prompt_ids + self.completion.token_ids


@dataclass(slots=True)
class Trajectory:
    """All turns of one agent run: a tree, because a graph may branch. Users return it under its
    older name ``AgentGraphOutput``, and may set only ``reward``, ``node_rewards``,
    ``turn_rewards`` and ``metrics`` on it."""

    task: Task | None = None
    turns: list[Turn] = field(default_factory=list)
    reward: float | None = None
    """None means not scored. It is never read as 0."""
    outcome: Outcome = Outcome.FINISHED
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    """The failure in words, with the traceback of user code; None when nothing failed."""
    messages: list[Message] = field(default_factory=list)
    """The conversation at the end of the run, as reward functions and the run folder see it."""
    node_rewards: dict[str, float] = field(default_factory=dict)
    """Rewards of nodes, by pattern; their turns are trained on these instead of ``reward``."""
    turn_rewards: dict[int | str, float] = field(default_factory=dict)
    """Rewards of single turns, by ``Turn.id`` or by the id of the message that the graph got."""
    uid: str = ""
    """Session of the run: ``{group}/{run}``."""

    @property
    def sampled_tokens(self) -> int:
        return sum(len(turn.completion.token_ids) for turn in self.turns)

    @property
    def is_trainable(self) -> bool:
        """Whether the run has a policy outcome, a reward, and a turn that is not excluded."""
        return (
            self.outcome.is_trainable
            and self.reward is not None
            and any(not turn.excluded for turn in self.turns)
        )


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward function may return instead of a number: rewards of parts of the run too."""

    reward: float
    metrics: dict[str, float] = field(default_factory=dict)
    node_rewards: dict[str, float] = field(default_factory=dict)
    """See ``Trajectory.node_rewards``."""
    turn_rewards: dict[int | str, float] = field(default_factory=dict)
    """See ``Trajectory.turn_rewards``."""


@dataclass(slots=True)
class Group:
    """The siblings of one task: the unit of advantage, of staleness and of the ledger."""

    task: Task
    trajectories: list[Trajectory]  # [G]
    ticket: int = 0
    """Position of the prompt in the stream; the ledger knows the group by it."""

    @property
    def trainable(self) -> list[Trajectory]:
        return [t for t in self.trajectories if t.is_trainable]

    @property
    def has_signal(self) -> bool:
        """Whether siblings can be told apart by a reward, of the run or of turns of one node; equal
        rewards give every sibling advantage 0."""
        trained = self.trainable
        own: defaultdict[str, set[float]] = defaultdict(set)
        for trajectory in trained:
            for turn in trajectory.turns:
                if turn.reward is not None and not turn.excluded:
                    own[turn.path].add(turn.reward)
        rewards = [{t.reward for t in trained}, *own.values()]
        return len(trained) > 1 and any(len(different) > 1 for different in rewards)


@dataclass(slots=True)
class Sample:
    """One root-to-leaf row of tokens, ready to be packed.

    A trajectory of two turns whose second prompt continues the first is one sample::

        token_ids   [ prompt | completion 1 | tool result | completion 2 ]
        loss_mask   [  0 0 0 |  1  1  1  1  |   0  0  0   |  1  1  1  1  ]
    """

    token_ids: list[int]  # [L]
    loss_mask: list[bool]  # [L] True where the token is trained
    rollout_logprobs: list[float]  # [L] 0.0 where loss_mask is False
    advantages: list[float]  # [L] 0.0 where loss_mask is False
    temperatures: list[float] = field(default_factory=list)  # [L] sampled at; [] = all at 1.0
    weight: float = 1.0
    """Multiplies every trained token of the row in the loss and in its denominator."""
    trajectory: str = ""
    """``Trajectory.uid``."""
    min_version: int = 0
    """Oldest weights that sampled a trained token of the row."""

    def __post_init__(self) -> None:
        self.temperatures = self.temperatures or [1.0] * len(self.token_ids)
        per_token = ("token_ids", "loss_mask", "rollout_logprobs", "advantages", "temperatures")
        lengths = {name: len(getattr(self, name)) for name in per_token}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"Sample {self.trajectory!r} has unequal lengths: {lengths}")
        if self.loss_mask and self.loss_mask[0]:
            raise ValueError(f"Sample {self.trajectory!r} trains its first token: no logit has it")

    @property
    def num_trained(self) -> int:
        return sum(self.loss_mask)


@dataclass(slots=True)
class MicroBatch:
    """Samples laid out without padding: the only tensors that cross a boundary.

    The packed row is cut into segments. A segment begins a row of its own, or goes on after a token
    of an earlier segment, so that samples share the tokens they begin with. Two samples ``a b c d``
    and ``a b x y`` of which the last two tokens are trained, as a tree::

        token_ids     a b c d | x y      position_ids  0 1 2 3 | 2 3
        cu_seqlens    0 4 6              parents       -1 1        x comes after b
        targets       2 3 4 5            predictors    1 2 1 4     b predicts c, and x
    """

    token_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, how many tokens come before it in its sample
    cu_seqlens: torch.Tensor  # [N + 1] int32, segment n is [cu_seqlens[n], cu_seqlens[n + 1])
    parents: torch.Tensor  # [N] int32, position that segment n goes on after; -1: nothing before it
    targets: torch.Tensor  # [M] int64, position of each trained token, once a sample that trains it
    predictors: torch.Tensor  # [M] int64, position of the token before it
    rollout_logprobs: torch.Tensor  # [M] float32
    advantages: torch.Tensor  # [M] float32
    temperatures: torch.Tensor  # [M] float32, > 0
    weights: torch.Tensor  # [M] float32, Sample.weight
    owners: torch.Tensor  # [M] int64, whose it is, in ``trajectories``
    trajectories: list[str]  # [S] ``Sample.trajectory``, without repetition
    denominator: float
    """What the sum of all token losses of the optimizer step is divided by, over every micro-batch
    and rank (``algorithm/aggregation.py``): the same number everywhere, so how rows are cut and
    spread changes nothing (law 3)."""
    distinct_tokens: int = 0
    """Of the whole optimizer step: tokens that no two samples share, that is, with different tokens
    before them. What a step computes beyond them is computed twice."""
