"""SGLang servers as the run's one engine: sampling, new weights, sleep, and life after a crash.

    publish   begin ─► send (from the trainer) ─► end: caches dropped, version named ─► go on
    a crash   lost in the pool ─► started again ─► given the current weights ─► serves again
    sleep     colocated engines give their memory to the trainer and take it back around a step

A server that was started again has the weights of its model folder. It serves nothing before it has
been sent the run's, which it shows by naming their version.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Protocol

from chatlearn.config.models import PolicyConfig
from chatlearn.errors import ChatLearnError, EngineError, EngineLost
from chatlearn.interfaces import Weights
from chatlearn.models.engine.pool import EnginePool
from chatlearn.models.engine.sglang import SGLangEngine
from chatlearn.models.policy.weight_buckets import Sent
from chatlearn.models.policy.weight_checksums import require_equal, require_expected
from chatlearn.types import Completion, SamplingParams, Session

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
"""Seconds between two looks whether an engine is back."""

Send = Callable[[Weights, Sequence[int], int], Awaitable[Sent]]
"""Moves weights into the engines with these indices, as this version."""
Expect = Callable[[Weights], Awaitable["dict[str, str] | None"]]
"""Checksums that the engines must show of these weights, None where nobody can say."""


class Host(Protocol):
    """Who starts one server; ``SGLangServer`` is one, and an actor on another machine may be."""

    async def start(self, *, timeout_s: float) -> None: ...

    async def wait_exit(self) -> int: ...


class SGLangFleet:
    """Implements ``interfaces.Engine`` over servers that are already running.

    Args:
        engines: one client a server, in this process.
        hosts: who starts each server again.
        send: how weights travel.
        expect: what the engines' checksums must be afterwards.
        policy: keys of ``models.policy``.
        at_hand: around everything that reads the trainer's weights.
        pauses: requests may run during a publish and are paused, not forbidden.
        colocated: engines sleep while the trainer works.
    """

    def __init__(
        self,
        engines: Sequence[SGLangEngine],
        hosts: Sequence[Host],
        send: Send,
        expect: Expect,
        policy: PolicyConfig,
        *,
        at_hand: Callable[[], AbstractAsyncContextManager[Any]] = nullcontext,
        pauses: bool,
        colocated: bool,
        sends_adapters: bool = False,
    ) -> None:
        self.pool = EnginePool(
            engines,
            max_in_flight=policy.max_concurrent_requests,
            patience_s=policy.engine_start_timeout_s,
        )
        self._engines, self._hosts, self._policy = engines, hosts, policy
        self._send, self._expect, self._at_hand = send, expect, at_hand
        self._pauses, self._colocated = pauses, colocated
        self._sends_adapters = sends_adapters
        self._asleep: set[str] = set()
        self._weights: Weights | None = None
        self._version = 0
        self._publishes = 0
        self._publishing = asyncio.Lock()
        self._restarting: set[int] = set()
        self._settled = asyncio.Event()
        self._settled.set()
        self._failure: ChatLearnError | None = None
        self._counts: Counter[str] = Counter()
        self._keepers = [
            asyncio.create_task(self._keep(i, host)) for i, host in enumerate(self._hosts)
        ]

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, session: Session
    ) -> Completion:
        return await self.pool.generate(prompt_ids, sampling, session=session)

    async def abort(self, session: Session) -> None:
        await self.pool.abort(session)

    async def publish(self, weights: Weights, *, version: int) -> None:
        """Bring ``weights`` into every living engine; where none lives, wait until one is back.

        Raises ``EngineError`` when an engine refuses them or has others afterwards: sampling from
        half of an update would train on the wrong distribution.
        """
        self._check()
        if self._colocated:
            await self._settled.wait()
            await self._sleep({"kv_cache"})
            await self._wake({"weights"})
        is_delivered = False
        while not is_delivered:
            await self._wait_for_one()
            async with self._publishing:
                is_delivered = await self._try_to_deliver(weights, version)
        await self._wake({"kv_cache"})

    async def sleep(self) -> None:
        """Colocated: the memory of weights and caches goes to the trainer."""
        self._check()
        if self._colocated:
            await self._settled.wait()  # a server that starts would take the memory again
            await self._sleep({"kv_cache", "weights"})

    async def make_room(self) -> None:
        """Colocated: only the caches go, which are most of it; the weights need no new publish."""
        self._check()
        if self._colocated:
            await self._settled.wait()
            await self._sleep({"kv_cache"})

    async def wake(self) -> None:
        """Colocated: take the memory back."""
        if self._colocated:
            await self._wake({"kv_cache", "weights"})

    def stats(self) -> dict[str, float]:
        """Counters since the last call."""
        counted = Counter(self._counts)
        self._counts.clear()
        for engine in self._engines:
            counted.update(engine.stats())
        counted["engine/reissued"] = self.pool.reissued
        self.pool.reissued = 0
        return {name: float(value) for name, value in counted.items()} | {
            "engine/alive": float(len(self.pool.alive)),
            "engine/restarts": float(counted["engine/restarts"]),
        }

    async def close(self) -> None:
        """Forget the servers; whoever started them ends them."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await self.pool.close()
        await asyncio.gather(*(engine.close() for engine in self._engines))

    async def _try_to_deliver(self, weights: Weights, version: int) -> bool:
        """Whether every engine of the pool has ``weights``; those lost on the way leave it."""
        targets = sorted(self.pool.alive)
        if not targets:  # the last one was lost while this waited for its turn
            return False
        try:
            await self._deliver(weights, targets, version)
        except EngineLost as error:
            await self._drop_the_lost(targets, error)
            return False
        self._weights, self._version = weights, version
        self.pool.version = version
        self._publishes += 1
        return True

    async def _wait_for_one(self) -> None:
        """Until an engine is alive; raises ``EngineError`` when none will be."""
        deadline = time.monotonic() + self._policy.engine_start_timeout_s
        while not self.pool.alive:
            self._check()
            given_up = all(keeper.done() for keeper in self._keepers)
            if given_up or time.monotonic() > deadline:
                raise EngineError("no engine is alive to take new weights; see their logs")
            await asyncio.sleep(_LOOK_S)

    async def _deliver(self, weights: Weights, targets: Sequence[int], version: int) -> None:
        engines = [self._engines[i] for i in targets]
        started = time.perf_counter()
        if self._pauses:
            await _all(engine.pause(self._policy.pause_mode) for engine in engines)
        # an adapter is replaced by one request, which ends what runs with the last one first
        updated = () if self._sends_adapters else engines
        await _all(engine.begin_update() for engine in updated)
        async with self._at_hand():
            sent = await self._send(weights, targets, version)
            await _all(engine.end_update(version=version) for engine in updated)
            await self._compare(weights, engines)
        if self._pauses:
            await _all(engine.resume() for engine in engines)
        seconds = time.perf_counter() - started
        self._counts["publish/seconds"] += seconds
        self._counts["publish/gb"] += sent.num_bytes / 1e9
        logger.debug("weights %d in engines %s: %.2f s", version, list(targets), seconds)

    async def _compare(self, weights: Weights, engines: Sequence[SGLangEngine]) -> None:
        """Every so often: whether what the engines hold is what the trainer holds."""
        interval = self._policy.check_weights_interval
        if not interval or self._publishes % interval:
            return
        started = time.perf_counter()
        found = await asyncio.gather(*(engine.checksums() for engine in engines))
        by_url = {engine.url: sums for engine, sums in zip(engines, found, strict=True)}
        expected = await self._expect(weights)
        if expected is None:
            require_equal(by_url)
        else:
            for url, sums in by_url.items():
                require_expected(expected, sums, url=url)
        self._counts["publish/check_s"] += time.perf_counter() - started
        self._counts["publish/checked"] += 1

    async def _drop_the_lost(self, targets: Sequence[int], error: EngineLost) -> None:
        """After a failed delivery: the engines that do not answer leave the pool."""
        answers = await asyncio.gather(*(self._engines[i].is_healthy() for i in targets))
        lost = [i for i, is_healthy in zip(targets, answers, strict=True) if not is_healthy]
        if not lost:
            raise EngineError(f"new weights did not reach the engines: {error}") from error
        for index in lost:
            self.pool.lose(index, str(error))

    async def _sleep(self, tags: set[str]) -> None:
        tags = tags - self._asleep
        if tags:
            await _all(self._engines[i].sleep(sorted(tags)) for i in self.pool.alive)
            self._asleep |= tags

    async def _wake(self, tags: set[str]) -> None:
        tags = tags & self._asleep
        if tags:
            await _all(self._engines[i].wake(sorted(tags)) for i in self.pool.alive)
            self._asleep -= tags

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _keep(self, index: int, host: Host) -> None:
        """Start the server of ``index`` again whenever it ends, a few times."""
        for _ in range(self._policy.max_engine_restarts):
            code = await host.wait_exit()
            self._restarting.add(index)
            self._settled.clear()
            self.pool.lose(index, f"its server ended with code {code}")
            self._engines[index].restarted()
            try:
                await self._revive(index, host)
            except EngineLost as error:
                logger.warning("engine %d did not come back: %s", index, error)
            except ChatLearnError as error:
                self._failure = error
                logger.error("engine %d cannot be started again: %s", index, error)
                return
            finally:
                self._restarting.discard(index)
                if not self._restarting:
                    self._settled.set()
        await host.wait_exit()
        self.pool.lose(index, "its server ended")
        logger.error(
            "engine %d has ended more than models.policy.max_engine_restarts=%d times and stays "
            "out; the others go on",
            *(index, self._policy.max_engine_restarts),
        )

    async def _revive(self, index: int, host: Host) -> None:
        await host.start(timeout_s=self._policy.engine_start_timeout_s)
        async with self._publishing:
            if self._weights is None:  # nothing is sampled before the first publish
                self.pool.readmit(index)
            else:
                await self._deliver(self._weights, [index], self._version)
                self.pool.readmit(index)
        self._counts["engine/restarts"] += 1


async def _all(calls) -> None:
    """Await all; the first failure is raised after every call has ended."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
