"""One agent on one task: run it, bound it, name its outcome, score it. A bad rollout is data."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import BaseMessage, convert_to_messages
from langgraph.errors import GraphRecursionError

from chatlearn.errors import AgentError, ChatLearnError, EngineError, JudgeError, boundary
from chatlearn.interfaces import Engine
from chatlearn.models.agent.base_agent_graph import BaseAgentGraph
from chatlearn.models.agent.messages import to_openai
from chatlearn.models.agent.node_patterns import matches
from chatlearn.models.agent.run import BudgetExhausted, Run, set_current_run
from chatlearn.rewards.checks import Check, Findings
from chatlearn.rewards.registry import RewardFunction
from chatlearn.rewards.score import score
from chatlearn.types import (
    Budget,
    Message,
    Outcome,
    SamplingParams,
    Session,
    StopReason,
    Task,
    Trajectory,
)


async def run_agent(
    agent: BaseAgentGraph,
    task: Task,
    *,
    engine: Engine,
    sampling: SamplingParams,
    budget: Budget,
    session: Session,
    reward_function: RewardFunction | None,
    timeout_s: float,
    trainable_nodes: Sequence[str] = ("*",),
    train_orphans: bool = False,
    checks: Sequence[Check] = (),
) -> Trajectory:
    """Run ``agent`` on ``task`` and score it.

    Whatever the agent, the engine or the judge do, a trajectory with an ``outcome`` is returned;
    only a fault of this package raises. The engine forgets the session at the end.

    Args:
        trainable_nodes: patterns; turns of other nodes are context (``Turn.excluded``).
        train_orphans: also train calls that a retry superseded.
        checks: looked for in every turn (``runtime_args.checks``).
    """
    run = Run(
        session=session,
        engine=engine,
        sampling=sampling,
        budget=budget,
        loop=asyncio.get_running_loop(),
        agent_name=task.agent_name,
        trainable_nodes=tuple(trainable_nodes),
        train_orphans=train_orphans,
        findings=Findings(tuple(checks)),
    )
    trajectory = Trajectory(task=task, uid=str(session))
    started = time.perf_counter()
    try:
        body = _run_and_score(agent, run, trajectory, reward_function)
        await asyncio.wait_for(body, timeout_s)
    except asyncio.TimeoutError:
        trajectory.outcome = Outcome.TIMEOUT
        trajectory.error = (
            f"agent {task.agent_name!r} took longer than runtime_args.agent_timeout_s={timeout_s}"
        )
    finally:
        run.is_over = True
        await engine.abort(session)
    _finish(trajectory, run, time.perf_counter() - started)
    return trajectory


def sets_own_reward(agent: BaseAgentGraph) -> bool:
    """Whether a run of ``agent`` can bring its reward itself: it has its own ``run``, or its
    graph's state has ``reward``."""
    if type(agent).run is not BaseAgentGraph.run:
        return True
    return "reward" in getattr(agent.graph, "channels", {})


async def _run_and_score(
    agent: BaseAgentGraph,
    run: Run,
    trajectory: Trajectory,
    reward_function: RewardFunction | None,
) -> None:
    set_current_run(run)
    task = trajectory.task
    where = f"agent {task.agent_name!r} on task {task.uid}"
    try:
        with boundary(AgentError, where):
            output = await _call(agent, task, run.sampling)
        _read_output(output, trajectory, where)
    except JudgeError as error:  # an agent may judge inside its run
        trajectory.outcome, trajectory.error = Outcome.JUDGE_ERROR, str(error)
    except AgentError as error:
        cause = error.__cause__ or error
        if isinstance(cause, BudgetExhausted) or run.recorder.exhausted:
            trajectory.outcome = Outcome.TRUNCATED
        elif isinstance(cause, GraphRecursionError):
            trajectory.outcome = Outcome.TURN_LIMIT
        else:
            trajectory.outcome = Outcome.AGENT_ERROR
        trajectory.error = str(error)
    except EngineError as error:
        trajectory.outcome, trajectory.error = Outcome.ENGINE_ERROR, str(error)
    except ChatLearnError as error:  # the agent misused this package, in its own code
        trajectory.outcome, trajectory.error = Outcome.AGENT_ERROR, f"{where}: {error}"
    trajectory.turns = run.recorder.turns
    if not trajectory.messages:
        trajectory.messages = [to_openai(m) for m in run.recorder.conversation]
    _exclude(run)
    _settle(trajectory, run, where)
    _override(trajectory, run)
    if trajectory.outcome.is_trainable and trajectory.reward is None:
        await _score(trajectory, task, reward_function, agent.auxiliary_models, where)
    if trajectory.outcome.is_trainable:
        try:
            _reward_turns(trajectory, run, where)
        except AgentError as error:
            trajectory.outcome, trajectory.error = Outcome.AGENT_ERROR, str(error)


def _override(trajectory: Trajectory, run: Run) -> None:
    """Degenerate output earns what ``runtime_args.checks`` says, whatever the agent or a judge
    would have given."""
    forced = run.findings.reward(trajectory.turns)
    if forced is not None and trajectory.outcome.is_trainable:
        trajectory.reward = forced
        trajectory.node_rewards, trajectory.turn_rewards = {}, {}


async def _score(
    trajectory: Trajectory,
    task: Task,
    reward_function: RewardFunction | None,
    auxiliary_models: Mapping[str, Any],
    where: str,
) -> None:
    if reward_function is None:
        trajectory.outcome = Outcome.JUDGE_ERROR
        trajectory.error = f"{where} returned no reward, and no reward function is named for it"
    else:
        try:
            scored = await score(
                reward_function,
                trajectory=trajectory,
                task=task,
                auxiliary_models=auxiliary_models,
            )
            trajectory.reward = scored.reward
            trajectory.metrics.update(scored.metrics)
            trajectory.node_rewards = {**scored.node_rewards, **trajectory.node_rewards}
            trajectory.turn_rewards = {**scored.turn_rewards, **trajectory.turn_rewards}
        except JudgeError as error:
            trajectory.outcome, trajectory.error = Outcome.JUDGE_ERROR, str(error)


async def _call(agent: BaseAgentGraph, task: Task, sampling: SamplingParams) -> Any:
    row = {
        **task.fields,
        "messages": copy.deepcopy(task.messages),
        "data_source": task.data_source,
        "ground_truth": task.ground_truth,
        "agent_name": task.agent_name,
        "agent_cfg_path": task.agent_cfg_path,
        "uid": task.uid,
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_new_tokens": sampling.max_new_tokens,
        },
    }
    if asyncio.iscoroutinefunction(agent.run):
        return await agent.run(**row)
    return await asyncio.to_thread(agent.run, **row)


def _read_output(output: Any, trajectory: Trajectory, where: str) -> None:
    """Take messages, reward and metrics from what ``run`` returned: a graph's state, or an
    ``AgentGraphOutput``."""
    if isinstance(output, Trajectory):
        messages, reward, metrics = output.messages, output.reward, output.metrics
        by_node, by_turn = output.node_rewards, output.turn_rewards
    elif isinstance(output, Mapping):
        messages = output.get("messages") or []
        reward, metrics = output.get("reward"), output.get("metrics")
        by_node, by_turn = output.get("node_rewards"), output.get("turn_rewards")
    else:
        raise AgentError(
            f"{where} returned {type(output).__name__}; run() must return the graph's final state "
            "(a dict) or an AgentGraphOutput"
        )
    if reward is not None:
        trajectory.reward = _number(reward, f"the reward {where} returned")
    for key, value in (metrics or {}).items():
        trajectory.metrics[str(key)] = _number(value, f"the metric {key!r} {where} returned")
    for key, value in (by_node or {}).items():
        what = f"the reward of node {key!r} {where} returned"
        trajectory.node_rewards[str(key)] = _number(value, what)
    for key, value in (by_turn or {}).items():
        trajectory.turn_rewards[key] = _number(
            value, f"the reward of turn {key!r} {where} returned"
        )
    trajectory.messages = _openai_messages(messages, where)


def _openai_messages(messages: Any, where: str) -> list[Message]:
    if isinstance(messages, BaseMessage | str):
        messages = [messages]
    with boundary(AgentError, f"reading the messages {where} returned"):
        # clients leave out what is null, as the content of a message that only calls tools
        messages = [{"content": "", **m} if isinstance(m, dict) else m for m in messages]
        return [to_openai(m) for m in convert_to_messages(messages)]


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise AgentError(f"{what} is {value!r}; it must be a finite number")
    return number


def _exclude(run: Run) -> None:
    """Say of every turn that is not trained why it is not."""
    for turn, caller in zip(run.recorder.turns, run.recorder.callers, strict=True):
        if turn.excluded:
            continue
        if not run.train_orphans and run.attempts.is_superseded(caller):
            turn.excluded = "superseded"
        elif not any(matches(p, run.agent_name, turn.path) for p in run.trainable_nodes):
            turn.excluded = f"node {turn.path!r} is not in models.policy.trainable_nodes"
    run.findings.mask(run.recorder.turns)


def _reward_turns(trajectory: Trajectory, run: Run, where: str) -> None:
    """Resolve ``turn_rewards``, then ``node_rewards``, into ``Turn.reward``."""
    turns = trajectory.turns
    for key, reward in trajectory.turn_rewards.items():
        number = run.recorder.message_ids.get(key) if isinstance(key, str) else key
        if not isinstance(number, int) or not 0 <= number < len(turns):
            raise AgentError(
                f"{where} gave a reward to turn {key!r}; name one of its turns 0 to "
                f"{len(turns) - 1}, or the id of a message that self.llm returned"
            )
        turns[number].reward = reward
    for pattern, reward in trajectory.node_rewards.items():
        for turn in turns:
            is_lost = turn.excluded == "superseded"
            if turn.reward is None and not is_lost and matches(pattern, run.agent_name, turn.path):
                turn.reward = reward


def _settle(trajectory: Trajectory, run: Run, where: str) -> None:
    """What the recorder knows about the outcome that the graph's return does not say."""
    if run.engine_error is not None:
        trajectory.outcome, trajectory.error = Outcome.ENGINE_ERROR, str(run.engine_error)
    elif run.findings.error is not None:
        trajectory.outcome, trajectory.error = Outcome.JUDGE_ERROR, str(run.findings.error)
    elif trajectory.outcome is not Outcome.FINISHED:
        return
    elif not trajectory.turns:
        trajectory.outcome = Outcome.AGENT_ERROR
        trajectory.error = f"{where} ended without one call of self.llm: there is nothing to learn"
    elif all(turn.excluded for turn in trajectory.turns) and not run.findings.masked:
        trajectory.outcome = Outcome.AGENT_ERROR
        reasons = ", ".join(sorted({turn.excluded for turn in trajectory.turns}))
        trajectory.error = f"no turn of {where} is trained: {reasons}"
    elif run.recorder.exhausted or trajectory.turns[-1].completion.stop_reason is StopReason.LENGTH:
        trajectory.outcome = Outcome.TRUNCATED
    elif trajectory.turns[-1].completion.stop_reason is StopReason.ABORT:
        trajectory.outcome = Outcome.ABORTED


def _finish(trajectory: Trajectory, run: Run, seconds: float) -> None:
    trajectory.turns = list(run.recorder.turns)
    if not trajectory.outcome.is_trainable:
        trajectory.reward = None  # a failure is never a number (law 4)
    trajectory.metrics.update(
        {
            "tool_calls": float(run.recorder.counts["tool_calls"]),
            "tool_errors": float(run.recorder.counts["tool_errors"]),
            "invalid_tool_calls": float(run.recorder.counts["invalid_tool_calls"]),
        }
    )
    trajectory.metrics.update(run.findings.metrics(trajectory.turns))
    trajectory.metrics["seconds"] = seconds
