"""Many engines as one: groups stay together, the dead are replaced, nothing is lost."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest

from chatlearn.errors import EngineError, EngineLost
from chatlearn.models.engine.pool import EnginePool, Router
from chatlearn.types import Completion, SamplingParams, Session, StopReason

SAMPLING = SamplingParams()


class Server:
    """An engine that says who it is, and can be killed in the middle of its requests."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.served: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.is_up, self.has_weights = True, True
        self.death = asyncio.Event()

    async def generate(self, prompt_ids, sampling, *, session):
        if not self.is_up:
            raise EngineLost(f"server {self.number} refuses the connection")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.wait_for(self.death.wait(), 0.01)
            raise EngineLost(f"server {self.number} died")
        except asyncio.TimeoutError:
            self.served.append(session.group)
            version = 1 if self.has_weights else 0
            return Completion([self.number], [0.0], StopReason.STOP, (version, version))
        finally:
            self.in_flight -= 1

    async def abort(self, session): ...

    async def is_healthy(self):
        return self.is_up

    async def version(self):
        return 1 if self.has_weights else None

    def die(self):
        self.is_up = self.has_weights = False
        self.death.set()

    def come_back(self, *, with_weights: bool):
        self.death = asyncio.Event()
        self.is_up, self.has_weights = True, with_weights


def a_pool(servers, **settings):
    return EnginePool(
        servers, **({"max_in_flight": 64, "patience_s": 5.0, "probe_s": 0.01} | settings)
    )


async def ask(pool, group: str, run: int) -> int:
    completion = await pool.generate([1], SAMPLING, session=Session(group, str(run)))
    return completion.token_ids[0]


async def test_siblings_share_an_engine_and_groups_are_spread():
    servers = [Server(0), Server(1), Server(2)]
    pool = a_pool(servers)

    calls = [ask(pool, f"g{group}", run) for group in range(6) for run in range(4)]
    answers = await asyncio.gather(*calls)

    by_group = defaultdict(set)
    for i, engine in enumerate(answers):
        by_group[i // 4].add(engine)
    assert all(len(engines) == 1 for engines in by_group.values())
    assert [len(server.served) for server in servers] == [8, 8, 8]


async def test_a_later_turn_goes_where_the_first_one_went():
    pool = a_pool([Server(0), Server(1)])
    first = [await ask(pool, "a", 0), await ask(pool, "b", 0)]
    later = [await ask(pool, "a", 0), await ask(pool, "b", 0)]
    assert first == later


async def test_no_engine_has_more_in_flight_than_allowed():
    servers = [Server(0), Server(1)]
    pool = a_pool(servers, max_in_flight=3)
    await asyncio.gather(*(ask(pool, f"g{i}", 0) for i in range(40)))
    assert [server.most_in_flight for server in servers] == [3, 3]


async def test_what_a_dying_engine_was_asked_is_asked_again_elsewhere():
    servers = [Server(0), Server(1)]
    pool = a_pool(servers)
    calls = [asyncio.create_task(ask(pool, f"g{i}", 0)) for i in range(10)]
    await asyncio.sleep(0.002)

    servers[0].die()

    assert await asyncio.gather(*calls) == [1] * 10
    assert pool.reissued == 5
    assert pool.alive == {1}
    await pool.close()


async def test_an_engine_that_comes_back_serves_only_once_it_has_the_weights():
    servers = [Server(0)]
    pool = a_pool(servers)
    servers[0].die()
    waiting = asyncio.create_task(ask(pool, "g", 0))
    await asyncio.sleep(0.05)

    servers[0].come_back(with_weights=False)
    await asyncio.sleep(0.05)
    assert not waiting.done()

    servers[0].has_weights = True
    assert await waiting == 0
    assert pool.alive == {0}
    await pool.close()


async def test_what_a_restarted_engine_samples_before_it_has_the_weights_is_not_taken():
    """It died and came back between two requests, so nobody saw it gone."""
    servers = [Server(0), Server(1)]
    pool = a_pool(servers)
    pool.version = 1
    assert await ask(pool, "g", 0) == 0

    servers[0].die()
    servers[0].come_back(with_weights=False)

    assert await ask(pool, "g", 1) == 1
    assert pool.alive == {1}
    await pool.close()


async def test_when_none_comes_back_the_request_fails_and_says_so():
    server = Server(0)
    server.die()
    pool = a_pool([server], patience_s=0.05)
    with pytest.raises(EngineError, match=r"no engine is alive, and none came back in 0\.05 s"):
        await ask(pool, "g", 0)
    await pool.close()


async def test_a_refused_request_is_not_asked_again():
    class Refusing(Server):
        async def generate(self, prompt_ids, sampling, *, session):
            raise EngineError("the prompt is too long")

    pool = a_pool([Refusing(0), Server(1)])
    with pytest.raises(EngineError, match="too long"):
        await ask(pool, "g", 0)
    assert pool.alive == {0, 1}


def test_a_group_moves_when_its_engine_is_gone():
    router = Router(2)
    assert router.home("g", {0, 1}) == 0
    router.load[0] = 9
    assert router.home("g", {0, 1}) == 0
    assert router.home("g", {1}) == 1
    assert router.home("g", {0, 1}) == 1
