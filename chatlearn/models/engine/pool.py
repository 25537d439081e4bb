"""Many engines as one: who serves a request, and what happens when one of them dies.

A pool at work::

    a group's first request      goes to the engine with the least in flight, and the group stays:
                                 siblings share a prompt, and an engine keeps its keys and values
    more than ``max_in_flight``  wait here, so that no engine drowns while another has nothing to do
    an engine is lost            its requests are asked again elsewhere, from the same tokens; it is
                                 asked every now and then, and serves again once it has weights
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from chatlearn.errors import EngineError, EngineLost
from chatlearn.types import Completion, SamplingParams, Session

logger = logging.getLogger(__name__)

_REMEMBERED_GROUPS = 4096


class Member(Protocol):
    """One engine of a pool; ``SGLangEngine`` is one."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, session: Session
    ) -> Completion: ...

    async def abort(self, session: Session) -> None: ...

    async def is_healthy(self) -> bool: ...

    async def version(self) -> int | None:
        """Version of the weights it has, None when it has only those it was started with."""
        ...


class Router:
    """Which engine a group is served by. Numbers only, so that any process can hold one."""

    def __init__(self, engines: int) -> None:
        self.load = [0] * engines
        """Requests (or runs) in flight at each engine."""
        self._homes: OrderedDict[str, int] = OrderedDict()

    def home(self, group: str, alive: set[int]) -> int:
        """The engine of ``group``: the one it has, while that is alive, else the least loaded."""
        index = self._homes.get(group)
        if index is None or index not in alive:
            index = min(sorted(alive), key=self.load.__getitem__)
        self.settle(group, index)
        return index

    def settle(self, group: str, index: int) -> None:
        """``group`` lives at ``index`` from now on."""
        self._homes[group] = index
        self._homes.move_to_end(group)
        if len(self._homes) > _REMEMBERED_GROUPS:
            self._homes.popitem(last=False)


class EnginePool:
    """The sampling half of ``interfaces.Engine`` over several engines.

    Args:
        members: the engines; their number never changes, each may be replaced behind its address.
        max_in_flight: requests at one engine at once, of this pool.
        patience_s: how long a request waits when no engine is alive.
        probe_s: seconds between two questions whether a lost engine is back.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        max_in_flight: int,
        patience_s: float,
        probe_s: float = 0.5,
    ) -> None:
        self.router = Router(len(members))
        self.version = 0
        """Of the weights published last; what older ones sample is not taken."""
        self.reissued = 0
        """Requests that were asked again because their engine was lost."""
        self._members = list(members)
        self._alive = set(range(len(members)))
        self._limits = [asyncio.Semaphore(max_in_flight) for _ in members]
        self._patience_s, self._probe_s = patience_s, probe_s
        self._changed = asyncio.Event()
        self._probes: dict[int, asyncio.Task[None]] = {}

    @property
    def alive(self) -> frozenset[int]:
        """The engines that serve."""
        return frozenset(self._alive)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, *, session: Session
    ) -> Completion:
        """Sample one completion at the group's engine, or at another when that is lost.

        Raises ``EngineError`` when an engine refuses the request, or none is alive in time.
        """
        while True:
            async with self._place(session) as index:
                if index not in self._alive:
                    continue
                oldest = self.version
                try:
                    completion = await self._members[index].generate(
                        prompt_ids, sampling, session=session
                    )
                    if completion.versions[0] >= oldest:
                        return completion
                    raise EngineLost(
                        f"it sampled from weights {completion.versions[0]} after {oldest} were "
                        "published: it was started again meanwhile"
                    )
                except EngineLost as error:
                    self.reissued += 1
                    self.lose(index, str(error))

    async def abort(self, session: Session) -> None:
        """End what ``session`` has in flight, wherever."""
        for index in sorted(self._alive):
            try:
                await self._members[index].abort(session)
            except EngineLost as error:
                self.lose(index, str(error))

    def lose(self, index: int, why: str) -> None:
        """Engine ``index`` is gone; it is probed until it is back."""
        if index not in self._alive:
            return
        logger.warning("engine %d is lost: %s", index, why)
        self._alive.discard(index)
        self._probes[index] = asyncio.create_task(self._probe(index))

    def readmit(self, index: int) -> None:
        """Engine ``index`` serves again."""
        probe = self._probes.pop(index, None)
        if probe is not None:
            probe.cancel()
        self._alive.add(index)
        self._changed.set()

    async def close(self) -> None:
        """Stop probing."""
        for probe in self._probes.values():
            probe.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)
        self._probes.clear()

    @asynccontextmanager
    async def _place(self, session: Session) -> AsyncIterator[int]:
        """A free place at the engine that ``session`` is served by."""
        await self._wait_for_any(session)
        index = self.router.home(session.group, self._alive)
        self.router.load[index] += 1
        try:
            async with self._limits[index]:
                yield index
        finally:
            self.router.load[index] -= 1

    async def _wait_for_any(self, session: Session) -> None:
        if self._alive:
            return

        async def until_one_is_alive() -> None:
            while not self._alive:
                self._changed.clear()
                await self._changed.wait()

        try:
            await asyncio.wait_for(until_one_is_alive(), self._patience_s)
        except asyncio.TimeoutError:
            raise EngineError(
                f"no engine is alive, and none came back in {self._patience_s:g} s, for {session}; "
                "see the engines' logs in the run folder"
            ) from None

    async def _probe(self, index: int) -> None:
        member = self._members[index]
        while True:
            await asyncio.sleep(self._probe_s)
            try:
                if await member.is_healthy() and await member.version() is not None:
                    break
            except EngineError:
                continue
        logger.info("engine %d is back", index)
        del self._probes[index]
        self.readmit(index)
