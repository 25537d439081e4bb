"""SGLang servers as one engine: what a publish does when servers die around it."""

from __future__ import annotations

import asyncio

import pytest

from chatlearn.cluster.fleet import SGLangFleet
from chatlearn.config.models import PolicyConfig
from chatlearn.errors import EngineError, EngineLost
from chatlearn.models.policy.weight_buckets import Sent


class Server:
    """A server and its client: it can be killed, and has weights once it was sent some."""

    url = "http://server"

    def __init__(self) -> None:
        self.death = asyncio.Event()
        self.may_start = asyncio.Event()
        self.is_up, self.has = True, None
        self.log: list[str] = []

    # the host

    async def wait_exit(self) -> int:
        await self.death.wait()
        return 137

    async def start(self, *, timeout_s: float) -> None:
        await self.may_start.wait()
        self.death, self.is_up = asyncio.Event(), True

    # the client

    async def begin_update(self) -> None:
        if not self.is_up:
            raise EngineLost("gone")

    async def end_update(self, *, version: int) -> None:
        self.has = version
        self.log.append(f"version {version}")

    async def is_healthy(self) -> bool:
        return self.is_up

    async def version(self) -> int | None:
        return self.has

    def restarted(self) -> None:
        self.has = None

    def stats(self) -> dict[str, float]:
        return {}

    async def close(self) -> None: ...

    def die(self) -> None:
        self.is_up, self.has = False, None
        self.death.set()


async def send(weights, targets, version) -> Sent:
    return Sent(0, 0.0)


async def expect(weights) -> None:
    return None


def a_fleet(*servers: Server, **settings) -> SGLangFleet:
    policy = PolicyConfig(check_weights_interval=0, **settings)
    return SGLangFleet(servers, servers, send, expect, policy, pauses=False, colocated=False)


async def test_new_weights_wait_for_the_only_server_that_is_starting_again():
    server = Server()
    fleet = a_fleet(server)
    await fleet.publish([], version=1)
    server.die()
    await asyncio.sleep(0)

    publishing = asyncio.create_task(fleet.publish([], version=2))
    await asyncio.sleep(0.2)
    assert not publishing.done()
    server.may_start.set()
    await asyncio.wait_for(publishing, 5)

    assert server.log == ["version 1", "version 1", "version 2"]  # its own again, then the new
    assert fleet.pool.alive == {0}
    await fleet.close()


async def test_a_server_that_dies_while_it_takes_weights_gets_them_when_it_is_back():
    server = Server()
    fleet = a_fleet(server)
    await fleet.publish([], version=1)
    server.is_up = False  # nobody has noticed yet
    server.may_start.set()

    publishing = asyncio.create_task(fleet.publish([], version=2))
    await asyncio.sleep(0.05)
    server.die()
    await asyncio.wait_for(publishing, 5)

    assert server.log[-1] == "version 2"
    await fleet.close()


async def test_a_server_that_is_back_serves_at_once():
    """Not only after a probe: workers may know it earlier, and the next publish comes soon."""
    server = Server()
    fleet = a_fleet(server)
    await fleet.publish([], version=1)
    server.die()
    server.may_start.set()
    while server.log != ["version 1", "version 1"]:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert fleet.pool.alive == {0}
    await fleet.close()


async def test_when_no_server_will_come_back_a_publish_says_so():
    server = Server()
    fleet = a_fleet(server, max_engine_restarts=0)
    server.die()
    with pytest.raises(EngineError, match="no engine is alive"):
        await asyncio.wait_for(fleet.publish([], version=1), 5)
    await fleet.close()
