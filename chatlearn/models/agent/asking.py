"""One call of the policy: messages in, a recorded turn and an assistant message out.

Every door to the policy ends here, LangChain's chat model and the OpenAI-compatible endpoint alike.
The prompt is the tokens of the turn it continues plus the new messages (law 1). Where a history was
edited or compacted and still holds answers of this run, their sampled tokens are put in again: what
the policy said is rendered by nobody, wherever it stands.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from langchain_core.messages import AIMessage, BaseMessage, InvalidToolCall, ToolCall
from langchain_core.messages.ai import UsageMetadata

from chatlearn.errors import AgentError, EngineError
from chatlearn.models.agent.attempts import send_index
from chatlearn.models.agent.messages import to_openai
from chatlearn.models.agent.prompt_builder import PromptBuilder
from chatlearn.models.agent.recorder import Conversation
from chatlearn.models.agent.run import BudgetExhausted, Run
from chatlearn.models.agent.tool_parser import ParsedText, ToolParser
from chatlearn.rewards.checks import CalledTool, SampledTurn
from chatlearn.types import Completion, SamplingParams, StopReason, Turn

ANY_TOOL = "*"
_ENDING = 32
"""Tokens at the end of a prompt that show whether the template opened the reasoning."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the process knows of the model that samples."""

    tokenizer: Any
    prompts: PromptBuilder
    parser: ToolParser
    name: str = "policy"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a call asks for besides its messages; None = as the run, or the node, samples."""

    tools: list[dict] | None = None
    """OpenAI schemas of the tools shown to the model."""
    must_call: str | None = None
    """Name of the tool that must be called, ``ANY_TOOL`` for any. What such a call begins with is
    put into the assistant's mouth: it becomes part of the prompt, which is not trained, and of the
    message."""
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the graph a call is made, from LangGraph's own run metadata."""

    node: str = ""
    checkpoint_ns: str = ""
    step: int = 0
    send: int | None = None
    thread: str = ""
    tags: tuple[str, ...] = ()
    caller: UUID | None = field(default=None, compare=False)
    """LangChain's run that makes the call."""

    @classmethod
    def of(cls, run_manager: Any) -> Position:
        """That of the call LangChain's ``run_manager`` is for."""
        metadata = getattr(run_manager, "metadata", None) or {}
        tags = getattr(run_manager, "tags", None) or []
        return cls(
            node=str(metadata.get("langgraph_node", "")),
            checkpoint_ns=str(metadata.get("langgraph_checkpoint_ns", "")),
            step=int(metadata.get("langgraph_step", 0)),
            send=send_index(metadata),
            thread=str(metadata.get("thread_id", "")),
            tags=tuple(t for t in tags if not t.startswith(("seq:step:", "graph:step:"))),
            caller=getattr(run_manager, "parent_run_id", None),
        )


async def ask(
    run: Run,
    policy: Policy,
    messages: Sequence[BaseMessage],
    wish: Wish = Wish(),
    position: Position = Position(),
) -> tuple[Turn, AIMessage]:
    """Sample one answer to ``messages`` and record it. Call it in the event loop of ``run``.

    Raises:
        BudgetExhausted: the run has no tokens left, or a check ended it.
        JudgeError: a check failed.
        EngineError: the engine failed; the run is told.
        AgentError: messages or wishes that cannot be rendered or sampled.
    """
    if run.findings.stopped is not None:
        raise BudgetExhausted(run.findings.why_stopped)
    if run.is_over:
        raise AgentError("the policy was called after the end of its agent run, by a thread of it")
    if not messages:
        raise AgentError("the policy was called without messages; give it at least one")
    started = time.perf_counter()
    asked = _prepare(run, policy, messages, wish, position)
    built = time.perf_counter()
    try:
        asked.turn.completion = await run.engine.generate(
            asked.turn.prompt_ids, asked.sampling, session=run.session
        )
    except EngineError as error:
        run.engine_error = run.engine_error or error
        raise
    asked.turn.timings = {"prompt_s": built - started, "engine_s": time.perf_counter() - built}
    return _record(run, policy, wish, position, asked)


@dataclass(slots=True)
class _Asked:
    """A call on its way to the engine and back."""

    turn: Turn
    """Its completion is still to come."""
    heard: Conversation
    sampling: SamplingParams
    prefix: str
    is_thinking: bool
    """The prompt ends inside the reasoning block."""


def _prepare(
    run: Run, policy: Policy, messages: Sequence[BaseMessage], wish: Wish, position: Position
) -> _Asked:
    """Place the call in the tree, and build what the engine is given."""
    recorder, prompts = run.recorder, policy.prompts
    heard = recorder.hear(messages, repr(wish.tools).encode() if wish.tools else b"")
    parent, covered = recorder.parent(heard)
    prompt_ids = _prompt(run, prompts, heard, parent, covered, wish.tools)
    if parent is None:
        parent = recorder.begins(prompt_ids)
    is_thinking = policy.parser.opens_thinking(prompts.decode(prompt_ids[-_ENDING:]))
    prefix = _prefix(policy, wish, is_thinking)
    prefix_ids = prompts.encode(prefix) if prefix else []
    turn = Turn(
        id=-1,  # of the order of answers, so it is not known yet
        parent=None if parent is None else parent.id,
        prompt_ids=prompt_ids + prefix_ids,
        completion=Completion([], [], StopReason.ABORT, (0, 0)),
        prefilled=len(prefix_ids),
        node=position.node,
        checkpoint_ns=position.checkpoint_ns,
        step=position.step,
        send=position.send,
        thread=position.thread,
        tags=position.tags,
    )
    sampling = _sampling(run, turn, wish)
    turn.temperature = sampling.temperature
    turn.excluded = "greedy" if sampling.temperature == 0 and not run.is_greedy else ""
    recorder.counts["tool_errors"] += sum(
        m.type == "tool" and getattr(m, "status", "") == "error" for m in messages[covered:]
    )
    return _Asked(turn, heard, sampling, prefix, is_thinking)


def _record(
    run: Run, policy: Policy, wish: Wish, position: Position, asked: _Asked
) -> tuple[Turn, AIMessage]:
    """Read the completion, and keep the turn."""
    recorder, turn = run.recorder, asked.turn
    turn.id = len(recorder.turns)
    text = asked.prefix + _text(policy, turn, asked.sampling)
    parsed = policy.parser.parse(text, wish.tools, thinking_open=asked.is_thinking)
    turn.tool_calls = tuple(call.name or "" for call in parsed.calls)
    recorder.counts["tool_calls"] += len(parsed.calls)
    recorder.counts["invalid_tool_calls"] += sum(call.error is not None for call in parsed.calls)
    answer = _message(run, policy, turn, parsed)
    recorder.record(turn, asked.heard, answer, position.caller)
    if run.findings.checks:
        _check(run, wish, turn, text, parsed)
    return turn, answer


def _check(run: Run, wish: Wish, turn: Turn, text: str, parsed: ParsedText) -> None:
    """Look for degenerate output; a check may end the run here."""
    tools = (
        None if wish.tools is None else [str(t.get("function", t).get("name")) for t in wish.tools]
    )
    calls = tuple(CalledTool(call.name or "", call.error) for call in parsed.calls)
    run.findings.look(turn.id, SampledTurn(text, turn.completion.logprobs, calls, tools))
    if run.findings.stopped is not None:
        run.recorder.exhausted = run.recorder.exhausted or run.findings.why_stopped
        raise BudgetExhausted(run.findings.why_stopped)


def _prompt(
    run: Run,
    prompts: PromptBuilder,
    heard: Conversation,
    parent: Turn | None,
    covered: int,
    tools: list[dict] | None,
) -> list[int]:
    """The tokens of ``heard``: those held of ``parent``, sampled ones where the run's own answers
    stand, and the template's rendering of the rest. [P]"""
    offset = max(covered - 1, 0)
    messages = [to_openai(message) for message in heard.messages[offset:]]
    held = None if parent is None else parent.token_ids
    start = covered - offset

    def rendered(end: int) -> list[int]:
        if held is None:
            return prompts.first(messages[start:end], tools)
        return prompts.extend(held, messages[start - 1], messages[start:end], tools)

    for i in range(max(start, 1), len(messages)):  # no template speaks before a first message
        turn = run.recorder.spoken(heard, offset + i)
        if turn is None:
            continue
        try:
            prompt_ids = rendered(i)
        except AgentError:  # the template does not let an assistant speak here: it renders this one
            continue
        said = turn.prompt_ids[len(turn.prompt_ids) - turn.prefilled :]
        held, start = [*prompt_ids, *said, *turn.completion.token_ids], i + 1
    return rendered(len(messages))


def _prefix(policy: Policy, wish: Wish, is_thinking: bool) -> str:
    """What the answer must begin with, '' where nothing is forced."""
    if wish.must_call is None:
        return ""
    name = None if wish.must_call == ANY_TOOL else wish.must_call
    prefix = policy.parser.prefix(name, thinking_open=is_thinking)
    if prefix is None:
        raise AgentError(
            f"a call of {name or 'a tool'!r} cannot be forced: calls written for "
            f"models.policy.tool_parser={type(policy.parser).__name__} do not begin with a text "
            "that says so; use tool_choice='auto' and ask for the call in the prompt"
        )
    return prefix


def _sampling(run: Run, turn: Turn, wish: Wish) -> SamplingParams:
    """Sampling of this call: its own wishes over its node's over the run's, within the budget."""
    base, budget, prompt_ids = run.sampling_at(turn.path), run.budget, turn.prompt_ids
    limits = [
        ("models.policy.max_tokens_per_turn", base.max_new_tokens),
        (
            "models.policy.max_response_tokens_length",
            budget.rollout_tokens - run.recorder.sampled_tokens,
        ),
        ("models.policy.max_seq_len", budget.context_tokens - len(prompt_ids)),
    ]
    if wish.max_tokens is not None:
        limits.append(("max_tokens", wish.max_tokens))
    key, left = min(limits, key=lambda limit: limit[1])
    if left < 1:
        if key != "max_tokens":
            run.recorder.exhausted = run.recorder.exhausted or key
        raise BudgetExhausted(
            f"no tokens left for another turn: {key} is used up (prompt of "
            f"{len(prompt_ids)} tokens, {run.recorder.sampled_tokens} sampled so far)"
        )
    asked = {
        name: value
        for name in ("temperature", "top_p", "top_k")
        if (value := getattr(wish, name)) is not None
    }
    seed = base.seed if wish.seed is None else hash((base.seed, wish.seed))
    return replace(
        base,
        **asked,
        max_new_tokens=left,
        stop=(*base.stop, *wish.stop),
        seed=run.recorder.seed(seed, run.session, prompt_ids),
    )


def _text(policy: Policy, turn: Turn, sampling: SamplingParams) -> str:
    """Text of a completion without its end-of-turn token and from its stop string on."""
    ids, reason = turn.completion.token_ids, turn.completion.stop_reason
    if reason is StopReason.STOP and ids and ids[-1] in policy.prompts.eos_ids:
        ids = ids[:-1]
    text = policy.prompts.decode(ids)
    cuts = [text.find(s) for s in sampling.stop if s in text]
    return text[: min(cuts)] if cuts else text


def _message(run: Run, policy: Policy, turn: Turn, parsed: ParsedText) -> AIMessage:
    sampled = len(turn.completion.token_ids)
    # nine characters, letters and digits: what Mistral's templates insist on
    ids = [f"call{turn.id:03d}{i:02d}" for i in range(len(parsed.calls))]
    return AIMessage(
        id=f"turn-{run.session}-{turn.id}",
        content=parsed.content,
        additional_kwargs={"reasoning_content": parsed.reasoning} if parsed.reasoning else {},
        tool_calls=[
            ToolCall(name=call.name, args=call.arguments, id=ids[i], type="tool_call")
            for i, call in enumerate(parsed.calls)
            if call.error is None
        ],
        invalid_tool_calls=[
            InvalidToolCall(
                name=call.name,
                args=call.arguments if isinstance(call.arguments, str) else str(call.arguments),
                id=ids[i],
                error=call.error,
                type="invalid_tool_call",
            )
            for i, call in enumerate(parsed.calls)
            if call.error is not None
        ],
        response_metadata={
            "finish_reason": _finish_reason(turn, parsed),
            "model_name": policy.name,
            "model_provider": "chatlearn",
        },
        usage_metadata=UsageMetadata(
            input_tokens=len(turn.prompt_ids),
            output_tokens=sampled,
            total_tokens=len(turn.prompt_ids) + sampled,
        ),
    )


def _finish_reason(turn: Turn, parsed: ParsedText) -> str:
    """In the words of OpenAI's API."""
    if turn.completion.stop_reason is StopReason.STOP and parsed.calls:
        return "tool_calls"
    return str(turn.completion.stop_reason)
