"""A process group of one trainer rank and all ranks of the engines, beside whatever group it has.

SGLang makes its side with ``init_custom_process_group``: a TCP store under the prefix of the
group's name, then torch's private ``_new_process_group_helper``, because the public ``new_group``
takes only members of the default group. Both sides must do the same, so this one does too.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Coroutine, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from chatlearn.errors import EngineError, boundary

_LAST_WORDS_S = 15.0
"""After a broadcast has failed here: time for the engine that caused it to be found out."""


class EngineGroup:
    """Rank 0 of ``size`` ranks; the others are told ``port`` and ``name``, then all ``meet``."""

    def __init__(self, host: str, size: int, backend: str, *, timeout_s: float) -> None:
        self.name = f"chatlearn-{uuid.uuid4().hex[:12]}"
        self.size, self._backend = size, backend
        self._timeout = timedelta(seconds=timeout_s)
        self._store = dist.TCPStore(
            host, 0, size, is_master=True, timeout=self._timeout, wait_for_workers=False
        )
        self._group: dist.ProcessGroup | None = None

    @property
    def port(self) -> int:
        return self._store.port

    def meet(self) -> None:
        """Wait for the others. Blocks."""
        self._group, _ = c10d._new_process_group_helper(
            self.size,
            0,
            [],
            dist.Backend(self._backend),
            dist.PrefixStore(self.name, self._store),
            group_name=self.name,
            timeout=self._timeout,
        )
        c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(self.size)}

    def broadcast(self, data: torch.Tensor) -> None:
        """Send ``data`` to the others; returns when it may be overwritten. Blocks."""
        if data.is_cuda:
            torch.cuda.set_device(data.device)  # this may be a thread that has seen no GPU yet
        dist.broadcast(data, src=0, group=self._group)
        if data.is_cuda:
            torch.cuda.current_stream().synchronize()

    def destroy(self) -> None:
        """Leave in peace."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def abort(self) -> None:
        """Leave whatever is under way. gloo cannot: a broadcast ends when a peer does, or in
        ``timeout_s``, in its thread; closing the connections then frees the other engines."""
        group, self._group = self._group, None
        if group is not None:
            c10d._abort_process_group(group)


async def together(blocking: Callable[[], None], asks: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run ``blocking`` in a thread while the engines do their part.

    Raises the first failure of an engine at once, though the thread may be stuck with what that
    engine was to do. Where only the thread fails, the engines get a moment to say why.
    """
    tasks = [asyncio.ensure_future(ask) for ask in asks]
    work = asyncio.ensure_future(_in_thread(blocking))
    try:
        await asyncio.wait({work, *tasks}, return_when=asyncio.FIRST_EXCEPTION)
        if work.done() and work.exception() is not None and not any(map(_failed, tasks)):
            await asyncio.wait(tasks, timeout=_LAST_WORDS_S, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if _failed(task):
                await task
        await work
        await asyncio.gather(*tasks)
    finally:
        for task in (work, *tasks):
            task.cancel()


async def all_of(asks: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Await all; the first failure is raised when every one has ended."""
    for result in await asyncio.gather(*asks, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _failed(task: asyncio.Future[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


async def _in_thread(blocking: Callable[[], None]) -> None:
    """As ``asyncio.to_thread``, in a daemon: a collective without its peers would keep the process
    from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: EngineError | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error = None
        try:
            with boundary(EngineError, "a collective with the engines"):
                blocking()
        except EngineError as caught:
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="broadcast to engines", daemon=True).start()
    await done
