"""Batches are a function of the seed, whatever threads, timers and sockets do meanwhile."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time

import pytest
import torch
from langchain_core.runnables.config import run_in_executor
from transformers import Qwen3Config, Qwen3ForCausalLM

from chatlearn.errors import EngineError
from chatlearn.models.engine.embedded import EmbeddedEngine
from chatlearn.models.engine.lockstep import Lockstep
from chatlearn.types import SamplingParams, Session

PARAMS = SamplingParams(max_new_tokens=6)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that spin for their next piece of a tiny matrix only fight over shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def engine_of(lockstep=None, max_slots=16):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    engine = EmbeddedEngine(
        Qwen3ForCausalLM(config).eval(),
        eos_token_ids=(),
        max_slots=max_slots,
        max_context=128,
        lockstep=lockstep,
    )
    engine.batches = []
    forward = engine._memory.forward

    def recorded(segments):
        engine.batches.append([(s.slot, s.start, tuple(s.token_ids)) for s in segments])
        return forward(segments)

    engine._memory.forward = recorded
    return engine


@pytest.fixture
async def lockstep():
    lockstep = Lockstep(patience_s=5.0)
    asyncio.get_running_loop().set_default_executor(lockstep.executor)
    return lockstep


async def ask(engine, ids, run=0, seed=0):
    params = SamplingParams(max_new_tokens=6, seed=seed)
    return await engine.generate(ids, params, session=Session("g", str(run)))


def blocking_ask(engine, loop, ids, run=0, seed=0):
    """What a sync ``llm.invoke`` in a thread does."""
    return asyncio.run_coroutine_threadsafe(ask(engine, ids, run, seed), loop).result()


async def in_default_pool(call):
    return await asyncio.get_running_loop().run_in_executor(None, call)


async def in_langchain(call):
    return await run_in_executor(None, call)


THREADS = [asyncio.to_thread, in_langchain, in_default_pool]


@pytest.mark.parametrize("in_thread", THREADS)
async def test_random_tool_times_leave_every_batch_the_same(in_thread):
    """Six agents of three turns; tools in threads take 0 to 20 ms, and some sleep on a timer."""

    async def once(seed):
        lockstep = Lockstep()
        asyncio.get_running_loop().set_default_executor(lockstep.executor)
        engine = engine_of(lockstep, max_slots=4)
        clock = random.Random(seed)

        async def agent(number):
            with lockstep.run():
                ids = [number + 1] * (5 + number % 3)
                for turn in range(3):
                    done = await ask(engine, ids, number, seed=turn)
                    ids = [*ids, *done.token_ids, 7]
                    nap = clock.random() * 0.02
                    if (number + turn) % 3 == 0:
                        await asyncio.sleep(nap)
                    else:
                        await in_thread(lambda nap=nap: time.sleep(nap))
                return done

        found = await asyncio.gather(*[agent(n) for n in range(6)])
        assert lockstep.unsynchronised_steps == 0
        return engine.batches, found

    assert await once(1) == await once(2)


@pytest.mark.parametrize("in_thread", THREADS)
async def test_sync_calls_in_threads_batch_together_and_do_not_hold_the_engine_up(
    lockstep, in_thread
):
    """Each of four runs calls the model from its thread: one prefill of all, then 5 decodes."""
    engine = engine_of(lockstep)
    loop = asyncio.get_running_loop()

    async def agent(number):
        def node():
            time.sleep(0.01 * number)
            return blocking_ask(engine, loop, [number + 1] * 4, number)

        with lockstep.run():
            return await in_thread(node)

    started = time.monotonic()
    await asyncio.gather(*[agent(n) for n in range(4)])
    assert time.monotonic() - started < 3
    assert [len(batch) for batch in engine.batches] == [4] * 6


async def test_parallel_calls_of_one_run_join_one_step_in_a_fixed_order(lockstep):
    async def once(naps):
        engine = engine_of(lockstep)
        loop = asyncio.get_running_loop()

        def branch(number):
            time.sleep(naps[number])
            return blocking_ask(engine, loop, [number + 1] * 4)

        with lockstep.run():
            branches = [asyncio.to_thread(branch, n) for n in range(3)]
            found = await asyncio.gather(*branches, ask(engine, [9] * 4))
        assert [len(batch) for batch in engine.batches] == [4] * 6
        return engine.batches, found

    assert await once([0.02, 0.0, 0.01]) == await once([0.0, 0.03, 0.0])


async def test_a_run_on_a_timer_is_waited_for(lockstep):
    engine = engine_of(lockstep)

    async def agent(number, nap):
        with lockstep.run():
            await asyncio.sleep(nap)
            await ask(engine, [number + 1] * 4, number)

    await asyncio.gather(agent(0, 0), agent(1, 0.05), agent(2, 0.1))
    assert [len(batch) for batch in engine.batches] == [3] * 6


async def test_without_runs_the_engine_waits_for_the_loop_alone():
    engine = engine_of()
    first = asyncio.ensure_future(ask(engine, [1] * 4))

    async def two_hops_later():
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await ask(engine, [2] * 4, 1)

    await asyncio.gather(first, two_hops_later())
    assert [len(batch) for batch in engine.batches] == [2] * 6


async def test_after_its_patience_a_run_is_absent_until_it_asks_again(caplog):
    lockstep = Lockstep(patience_s=0.05)
    engine = engine_of(lockstep)
    leave = asyncio.Event()

    async def stranger(number):
        with lockstep.run():
            await leave.wait()
            await asyncio.gather(ask(engine, [9] * 4, number))

    async def agent():
        with lockstep.run():
            await ask(engine, [1] * 4, 0)
            steps = lockstep.unsynchronised_steps
            leave.set()
            await ask(engine, [1] * 4, 0)
            return steps

    with caplog.at_level(logging.WARNING):
        steps, *_ = await asyncio.gather(agent(), stranger(1), stranger(2))
    assert steps == lockstep.unsynchronised_steps == 6
    assert len(caplog.records) == 1
    assert "0.05 s" in caplog.text
    assert [len(batch) for batch in engine.batches] == [1] * 6 + [3] * 6
    assert engine.stats()["engine/unsynchronised_steps"] == 6


async def test_a_run_that_fails_or_is_cancelled_holds_nobody_up(lockstep):
    engine = engine_of(lockstep)
    release = threading.Event()

    async def failing():
        with lockstep.run():
            await asyncio.sleep(0.01)
            raise ValueError

    async def stuck():
        with lockstep.run():
            await asyncio.to_thread(release.wait)

    task = asyncio.ensure_future(stuck())

    async def agent():
        with lockstep.run():
            return await ask(engine, [1] * 4)

    asyncio.get_running_loop().call_later(0.05, task.cancel)
    started = time.monotonic()
    found = await asyncio.gather(agent(), failing(), task, return_exceptions=True)
    release.set()
    assert time.monotonic() - started < 3
    assert len(found[0].token_ids) == 6
    assert isinstance(found[2], asyncio.CancelledError)


async def test_more_sync_calls_than_threads_do_not_deadlock():
    lockstep = Lockstep(max_threads=2)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(lockstep.executor)
    engine = engine_of(lockstep)

    async def agent(number):
        with lockstep.run():
            return await asyncio.to_thread(blocking_ask, engine, loop, [number + 1] * 4, number)

    found = await asyncio.wait_for(asyncio.gather(*[agent(n) for n in range(5)]), 20)
    assert all(len(done.token_ids) == 6 for done in found)


async def test_jobs_hand_back_results_errors_and_cancellation(lockstep):
    with lockstep.run():
        assert await asyncio.to_thread(lambda: 3) == 3
        with pytest.raises(KeyError, match="missing"):
            await asyncio.to_thread({}.__getitem__, "missing")
        run = next(iter(lockstep._runs))
        await asyncio.sleep(0.02)
        assert not run.jobs
    assert await asyncio.to_thread(lambda: 4) == 4


async def test_two_engines_of_one_loop_do_not_wait_for_each_other():
    first, second = engine_of(), engine_of()
    await asyncio.wait_for(asyncio.gather(ask(first, [1]), ask(second, [2])), 10)


def test_a_loop_that_hides_its_queue_is_refused():
    class Opaque(asyncio.SelectorEventLoop):
        @property
        def _ready(self):
            if guarded:
                raise AttributeError
            return self.queue

        @_ready.setter
        def _ready(self, queue):
            self.queue = queue

    guarded = False
    loop = Opaque()

    async def main():
        nonlocal guarded
        guarded = True
        try:
            await ask(engine_of(), [1])
        finally:
            guarded = False

    with pytest.raises(EngineError, match="asyncio's own event loop, not Opaque"):
        loop.run_until_complete(main())
    loop.close()
