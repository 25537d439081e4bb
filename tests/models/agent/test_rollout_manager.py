"""Groups, slots, failures and refills: fake agents, no model."""

from __future__ import annotations

import asyncio

import pytest

from chatlearn.data.prompt_stream import PromptStream
from chatlearn.errors import AgentError
from chatlearn.models.agent.rollout_manager import RolloutManager
from chatlearn.types import (
    Budget,
    Completion,
    Outcome,
    SamplingParams,
    StopReason,
    Task,
    Trajectory,
    Turn,
)

TASKS = [Task(f"t:{i}", [], "a", None, "s", None) for i in range(8)]
TURN = Turn(0, None, [1], Completion([2], [-1.0], StopReason.STOP, (0, 0)))


def trajectory(session, reward=1.0, outcome=Outcome.FINISHED):
    failed = not outcome.is_trainable
    return Trajectory(
        turns=[TURN],
        reward=None if failed else reward,
        outcome=outcome,
        error="it broke" if failed else None,
        uid=str(session),
    )


def manager(agent, **changes):
    async def run_agent(task, *, sampling, budget, session):
        return await agent(task, session)

    settings = {
        "sampling": SamplingParams(),
        "budget": Budget(1, 1, 1),
        "group_size": 4,
        "groups_per_episode": 2,
        "max_staleness": 0,
        "max_concurrent_rollouts": 64,
        "max_failed_fraction": 0.5,
    }
    stream = PromptStream(TASKS, seed=0, shuffle=False)
    return RolloutManager(run_agent, stream, **(settings | changes)), stream


async def well(task, session):
    return trajectory(session, reward=float(session.run[0]))


async def test_an_episode_is_whole_groups_oldest_prompt_first():
    async def later_prompts_are_faster(task, session):
        await asyncio.sleep(0.02 / (1 + int(task.uid[2:])))
        return await well(task, session)

    rollouts, _ = manager(later_prompts_are_faster)
    async with rollouts:
        groups = await rollouts.next_groups()
    assert [g.task.uid for g in groups] == ["t:0", "t:1"]
    assert [t.uid for t in groups[0].trajectories] == [f"0:t:0/{i}.0" for i in range(4)]


@pytest.mark.parametrize("staleness", [0, 1, 2])
async def test_staleness_is_bounded_by_slots(staleness):
    """No group may start before the weights of ``episode - staleness`` are published."""
    started: dict[str, int] = {}
    published = 0

    async def agent(task, session):
        started.setdefault(session.group, published)
        await asyncio.sleep(0)
        return await well(task, session)

    rollouts, _ = manager(agent, max_staleness=staleness)
    seen = []
    async with rollouts:
        for episode in range(4):
            groups = await rollouts.next_groups()
            await asyncio.sleep(0.01)  # what may start ahead, does
            seen += [episode - started[g.trajectories[0].uid.split("/")[0]] for g in groups]
            published += 1
            rollouts.release(groups)
    assert max(seen) == staleness


async def test_runs_at_once_are_bounded():
    now, most = 0, 0

    async def agent(task, session):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return await well(task, session)

    rollouts, _ = manager(agent, max_concurrent_rollouts=3)
    async with rollouts:
        await rollouts.next_groups()
    assert most == 3


async def test_an_engine_fault_is_tried_again_and_never_trained():
    async def agent(task, session):
        if session.run == "1.0":
            return trajectory(session, outcome=Outcome.ENGINE_ERROR)
        return await well(task, session)

    rollouts, _ = manager(agent)
    async with rollouts:
        groups = await rollouts.next_groups()
    assert [t.uid.split("/")[1] for t in groups[0].trajectories] == ["0.0", "1.1", "2.0", "3.0"]
    assert rollouts.metrics()["rollout/retried"] == 2
    assert rollouts.metrics()["rollout/failed"] == 0


async def test_a_failed_run_is_left_out_and_counted():
    async def agent(task, session):
        broken = session.run == "2.0"
        return (
            trajectory(session, outcome=Outcome.AGENT_ERROR)
            if broken
            else await well(task, session)
        )

    rollouts, _ = manager(agent)
    async with rollouts:
        groups = await rollouts.next_groups()
    assert [len(g.trainable) for g in groups] == [3, 3]
    assert rollouts.metrics()["failed/agent_error"] == 2


async def test_a_group_with_too_few_left_is_replaced_by_the_next_prompt():
    async def agent(task, session):
        broken = task.uid == "t:0" and session.run[0] in "123"
        return trajectory(session, outcome=Outcome.TIMEOUT) if broken else await well(task, session)

    rollouts, _ = manager(agent)
    async with rollouts:
        groups = await rollouts.next_groups()
        rollouts.release(groups)
    assert [g.task.uid for g in groups] == ["t:1", "t:2"]
    assert [g.task.uid for g in rollouts.dropped] == ["t:0"]
    assert rollouts.metrics()["groups/dropped"] == 1


async def test_too_many_failures_end_the_run_and_say_why():
    async def agent(task, session):
        return trajectory(session, outcome=Outcome.AGENT_ERROR)

    rollouts, _ = manager(agent)
    with pytest.raises(
        AgentError, match=r"agent_error\), more than .*max_failed_fraction.*it broke"
    ):
        async with rollouts:
            await rollouts.next_groups()


async def test_groups_without_signal_can_be_replaced():
    async def agent(task, session):
        same = task.uid == "t:1"
        return trajectory(session, reward=1.0) if same else await well(task, session)

    rollouts, _ = manager(agent, replace_zero_signal_groups=True)
    async with rollouts:
        groups = await rollouts.next_groups()
    assert [g.task.uid for g in groups] == ["t:0", "t:2"]
    assert rollouts.metrics()["groups/replaced_zero_signal"] == 1


async def test_when_no_prompt_has_signal_the_groups_are_kept():
    async def agent(task, session):
        return trajectory(session, reward=1.0)

    rollouts, _ = manager(agent, replace_zero_signal_groups=True)
    async with rollouts:
        assert len(await rollouts.next_groups()) == 2


async def test_a_fault_of_the_framework_reaches_the_driver():
    async def agent(task, session):
        raise ZeroDivisionError

    rollouts, _ = manager(agent)
    with pytest.raises(ZeroDivisionError):
        async with rollouts:
            await rollouts.next_groups()
