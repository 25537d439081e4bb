"""Law 8 for concurrent agents: the engine steps only when every agent is waiting for it.

Which requests share a forward decides the last bits of their logits. If the engine stepped by the
clock, two runs of one seed would batch differently and drift apart. So it steps when nothing else
can happen::

    an agent ...                        and the engine ...
    runs in the event loop              lets it run: the loop still has callbacks
    has a sync node or tool in a thread waits until the thread ends or asks the engine itself
    waits for a socket or a timer       waits too, for at most ``patience_s``; then goes on without
    waits for the engine                steps, once this holds for every agent

What it does not see: a branch on a socket or timer beside another branch of the same run that waits
for the engine, and threads that user code starts on its own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from chatlearn.errors import EngineError
from chatlearn.interfaces import asked_by_socket

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Run:
    """One agent run, from ``Lockstep.run`` to its end."""

    since: float
    """Loop time of the last sign of life."""
    requests: int = 0
    """Calls that wait for the engine."""
    by_socket: int = 0
    """Those of them that came by a socket: a thread of the run may wait for each, nobody knows
    which."""
    jobs: set[_Job] = field(default_factory=set)
    """Work of the run in threads, queued or running."""
    is_absent: bool = False
    """Gave no sign for ``patience_s``: holds nobody up until it asks the engine again."""


@dataclass(slots=True, eq=False)
class _Job:
    """One function in the thread pool."""

    run: _Run
    requests: int = 0
    """Calls of this thread that wait for the engine: it is not running then."""


_run: ContextVar[_Run | None] = ContextVar("chatlearn_lockstep_run", default=None)
_job: ContextVar[_Job | None] = ContextVar("chatlearn_lockstep_job", default=None)
_posted: WeakKeyDictionary[asyncio.AbstractEventLoop, int] = WeakKeyDictionary()
"""Checks of any Lockstep in a loop's queue: two of them must not wait for each other."""


class Lockstep:
    """Knows what every agent run is doing. One event loop each; cheap without any run.

    The owner of the loop calls ``loop.set_default_executor(lockstep.executor)`` and holds
    ``with lockstep.run():`` open around each agent run.

    Args:
        patience_s: how long the engine waits for a run that waits for the outside world.
        max_threads: sync calls that may wait for the engine at the same time, each in its thread.
    """

    def __init__(self, *, patience_s: float = 10.0, max_threads: int = 512) -> None:
        self.executor: ThreadPoolExecutor = _Executor(self, max_threads)
        self.patience_s = patience_s
        self.unsynchronised_steps = 0
        """Engine steps taken while a run was absent: their batches followed the clock."""
        self._max_threads = max_threads
        self._lock = threading.Lock()  # guards jobs, which threads end
        self._runs: set[_Run] = set()
        self._steps: list[Callable[[], None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_posted = False
        self._has_warned = False
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def run(self) -> Iterator[None]:
        """Around one agent run, in its own task; what it starts inherits the run by context."""
        self._bind()
        run = _Run(since=self._loop.time())
        self._runs.add(run)
        token = _run.set(run)
        try:
            yield
        finally:
            _run.reset(token)
            self._runs.discard(run)
            self._post()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Around one wait for the engine, in the loop's thread."""
        run, job = _run.get(), _job.get()
        if run not in self._runs:  # no run, or a thread that outlived it
            yield
            return
        with self._lock:
            if job not in run.jobs:
                job = None
            by_socket = job is None and asked_by_socket.get()
            run.requests += 1
            run.by_socket += by_socket
            if job is not None:
                job.requests += 1
        run.is_absent = False
        self._post()
        try:
            yield
        finally:
            with self._lock:
                run.requests -= 1
                run.by_socket -= by_socket
                if job is not None:
                    job.requests -= 1
            run.since = self._loop.time()

    def when_idle(self, step: Callable[[], None]) -> None:
        """Call ``step`` once, from the loop, when every run waits for the engine.

        Raises ``EngineError`` on an event loop that does not show its queue.
        """
        self._bind()
        self._steps.append(step)
        self._post()

    def _bind(self) -> None:
        loop = asyncio.get_running_loop()
        # ``_ready`` is private, and the only way to know that the loop has nothing else to do
        if not hasattr(loop, "_ready"):
            raise EngineError(
                f"the embedded engine needs asyncio's own event loop, not {type(loop).__name__}"
            )
        if loop is not self._loop:
            self._loop, self._is_posted, self._timer = loop, False, None
            self._steps.clear()
            self._runs.clear()

    def _post(self) -> None:
        """Have ``_check`` called after what the loop already has to do."""
        if self._is_posted or not self._steps:
            return
        self._is_posted = True
        _posted[self._loop] = _posted.get(self._loop, 0) + 1
        self._loop.call_soon(self._check)

    def _check(self) -> None:
        self._is_posted = False
        _posted[self._loop] -= 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._steps:
            return
        if len(self._loop._ready) > _posted[self._loop]:
            self._post()
            return
        if self._has_running_jobs():
            return  # the end of each job posts
        wait_s = self._wait_for_absentees()
        if wait_s > 0:
            self._timer = self._loop.call_later(wait_s, self._post)
            return
        self.unsynchronised_steps += any(run.is_absent for run in self._runs)
        steps, self._steps = self._steps, []
        for step in steps:
            step()

    def _has_running_jobs(self) -> bool:
        with self._lock:
            jobs = waiting = 0
            for run in self._runs:
                asking = sum(job.requests > 0 for job in run.jobs)
                jobs += len(run.jobs)
                # rather a batch that followed the clock than a thread that waits for ever
                waiting += min(asking + run.by_socket, len(run.jobs))
        # when every thread waits for the engine, the rest is queued behind them
        return waiting < min(jobs, self._max_threads)

    def _wait_for_absentees(self) -> float:
        """Seconds until every run without request and job is given up as absent; 0 when all are."""
        longest = 0.0
        for run in self._runs:
            if run.requests or run.jobs or run.is_absent:
                continue
            left = run.since + self.patience_s - self._loop.time()
            if left > 0:
                longest = max(longest, left)
                continue
            run.is_absent = True
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "an agent neither asked the engine nor ended for %g s; the others go on "
                    "without it, so this training does not repeat bit for bit",
                    self.patience_s,
                )
        return longest

    def _start_job(self) -> _Job | None:
        run = _run.get()
        if run not in self._runs:
            return None
        job = _Job(run)
        with self._lock:
            run.jobs.add(job)
        run.is_absent = False
        return job

    def _end_job(self, job: _Job) -> None:
        """Called in the job's thread."""
        with self._lock:
            job.run.jobs.discard(job)
            job.run.since = self._loop.time()
        with suppress(RuntimeError):  # the loop has closed meanwhile
            self._loop.call_soon_threadsafe(self._post)


class _Executor(ThreadPoolExecutor):
    """The loop's default thread pool, where LangChain and LangGraph run sync nodes and tools."""

    def __init__(self, lockstep: Lockstep, max_threads: int) -> None:
        super().__init__(max_threads, thread_name_prefix="chatlearn-agent")
        self._lockstep = lockstep

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        job = self._lockstep._start_job()
        if job is None:
            return super().submit(fn, *args, **kwargs)
        # Let the engine know by context whose request it gets. ``asyncio.to_thread`` and LangChain
        # submit the ``run`` of a context they copied: the variable must be set in that one.
        call = partial(fn, *args, **kwargs)
        context = getattr(call.func, "__self__", None)
        if not isinstance(context, Context):
            context = copy_context()
            call = partial(context.run, call)
        context.run(_job.set, job)
        future: Future[Any] = Future()
        super().submit(self._work, job, future, call)
        return future

    def _work(self, job: _Job, future: Future[Any], call: partial[Any]) -> None:
        """Run ``call`` as ``job``; the job ends only after the loop has been told the result.

        That is why the future is ours: the pool's own would be set after any wrapper returned, and
        in between the agent would look as if it waited for the outside world.
        """
        try:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        finally:
            self._lockstep._end_job(job)
