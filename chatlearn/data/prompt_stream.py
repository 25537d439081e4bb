"""The ledger of prompts: each position of an endless stream is trained or dropped exactly once.

A prompt handed out is a *ticket*, its position in the stream, and moves like this::

              take             finish             trained
    pending ────────► running ────────► finished ────────► (forgotten, counted)
       ▲                 │                  │
       │    give_back    │                  │      drop
       └─────────────────┴──────────────────┴────────────► (forgotten, counted)

What is saved with the weights is the next new ticket and the open ones (pending, running,
finished): a restart issues the open ones again, in order, before anything new. Whatever was trained
after that save is lost together with the weights it had trained, so nothing counts twice.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from collections.abc import Sequence
from typing import Any

from chatlearn.errors import CheckpointError, DataError
from chatlearn.types import Task


class PromptStream:
    """Endless, seeded, repeatable order over ``tasks``, with a ledger of who has which ticket.

    Ticket ``t`` is task ``permutation(t // n)[t % n]`` of the ``n`` tasks, whatever happened
    before, so nothing but numbers is ever saved. Used from one thread (the driver's event loop).

    Args:
        tasks: all tasks of the run; files are mixed by the shuffle.
        seed: with the epoch number, the seed of that epoch's order.
        shuffle: False issues the tasks in the given order every epoch.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, shuffle: bool) -> None:
        if not tasks:
            raise DataError(
                "there is no prompt to train on; set runtime_args.data_path to a dataset"
            )
        self._tasks = list(tasks)
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = _fingerprint(self._tasks)
        self._orders: dict[int, list[int]] = {}
        self._next = 0
        self._pending: list[int] = []  # a heap of tickets below _next that are to be issued again
        self._running: set[int] = set()
        self._finished: set[int] = set()
        self._trained = 0
        self._dropped = 0

    def take(self) -> tuple[int, Task]:
        """Hand out the lowest pending ticket, or the next new one; it is running now."""
        if self._pending:
            ticket = heapq.heappop(self._pending)
        else:
            ticket = self._next
            self._next += 1
        self._running.add(ticket)
        return ticket, self._task(ticket)

    def finish(self, ticket: int) -> None:
        """The group is complete and waits to be trained."""
        assert ticket in self._running, f"finish({ticket}): {self._where(ticket)}, not running"
        self._running.remove(ticket)
        self._finished.add(ticket)

    def trained(self, ticket: int) -> None:
        """An optimizer step used the group. The ledger and the weights are saved together."""
        assert ticket in self._finished, f"trained({ticket}): {self._where(ticket)}, not finished"
        self._finished.remove(ticket)
        self._trained += 1

    def drop(self, ticket: int) -> None:
        """Give a running or finished prompt up: it is counted, and never issued again."""
        self._close(ticket, "drop")
        self._dropped += 1

    def give_back(self, ticket: int) -> None:
        """Put a running or finished prompt back: it will be issued again, before new ones."""
        self._close(ticket, "give_back")
        heapq.heappush(self._pending, ticket)

    def counts(self) -> dict[str, int]:
        """How many tickets are in each state; trained and dropped count since the first start."""
        return {
            "pending": len(self._pending),
            "running": len(self._running),
            "finished": len(self._finished),
            "trained": self._trained,
            "dropped": self._dropped,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values. O(open tickets)."""
        return {
            "next": self._next,
            "open": sorted([*self._pending, *self._running, *self._finished]),
            "trained": self._trained,
            "dropped": self._dropped,
            "dataset": self._identity(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state()``: everything open then is pending now.

        Raises:
            CheckpointError: the state is of another dataset or order, or is not such a state.
        """
        remedy = (
            "restore what the run was started with, or start a new run with "
            "runtime_args.enable_resume_training=False"
        )
        try:
            saved, tickets = dict(state["dataset"]), list(state["open"])
            next_, trained, dropped = (int(state[key]) for key in ("next", "trained", "dropped"))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the saved prompt ledger is damaged ({error!r}); {remedy}"
            ) from None
        differences = [
            f"{name} ({saved.get(name)!r} then, {now!r} now)"
            for name, now in self._identity().items()
            if saved.get(name) != now
        ]
        if differences:
            raise CheckpointError(
                "cannot resume exactly, the prompts are not those of the checkpoint. "
                f"What differs: {'; '.join(differences)}. To go on, {remedy}"
            )
        if len(set(tickets)) + trained + dropped != next_:
            raise CheckpointError(
                f"the saved prompt ledger does not add up: {len(set(tickets))} open + {trained} "
                f"trained + {dropped} dropped is not the {next_} issued; {remedy}"
            )
        self._next, self._trained, self._dropped = next_, trained, dropped
        self._pending = sorted(tickets)  # a sorted list is a heap
        self._running = set()
        self._finished = set()

    def _close(self, ticket: int, verb: str) -> None:
        holder = self._running if ticket in self._running else self._finished
        assert ticket in holder, f"{verb}({ticket}): {self._where(ticket)}, not running or finished"
        holder.remove(ticket)

    def _where(self, ticket: int) -> str:
        """The state of a ticket in words, for the message of a broken invariant."""
        if ticket in self._running:
            return "it is running"
        if ticket in self._finished:
            return "it is finished"
        if ticket in self._pending:
            return "it is pending"
        return "it was trained or dropped" if 0 <= ticket < self._next else "it was never issued"

    def _identity(self) -> dict[str, Any]:
        return {**self._fingerprint, "seed": self._seed, "shuffle": self._shuffle}

    def _task(self, ticket: int) -> Task:
        epoch, position = divmod(ticket, len(self._tasks))
        if epoch not in self._orders:
            while len(self._orders) >= 2:  # around an epoch's end, tickets of two are in use
                del self._orders[min(self._orders)]
            self._orders[epoch] = self._order(epoch)
        return self._tasks[self._orders[epoch][position]]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._tasks)))
        if self._shuffle:
            random.Random(f"{self._seed}:{epoch}").shuffle(order)
        return order


def _fingerprint(tasks: Sequence[Task]) -> dict[str, Any]:
    """Number of tasks, and hashes of their names and of their prompts.

    File paths are left out, so a dataset may move between a kill and a restart.
    """
    uids, prompts = hashlib.sha256(), hashlib.sha256()
    for task in tasks:
        uids.update(f"{task.uid}\n".encode())
        prompts.update(json.dumps(task.messages, sort_keys=True, default=str).encode() + b"\n")
    return {
        "number of tasks": len(tasks),
        "row names": uids.hexdigest()[:16],
        "prompts": prompts.hexdigest()[:16],
    }
