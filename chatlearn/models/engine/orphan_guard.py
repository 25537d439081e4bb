"""Runs one command, and ends it with all it started when the process that asked for it is gone.

A program of its own, for the standard library alone: ``python -I orphan_guard.py PARENT GRACE_S
COMMAND...``. The first line it prints is the command's process id; the command writes to stderr.

    parent ──► guard ──► server ──► schedulers, detokenizer       (the server's own session)

The parent may be killed with -9, so nothing inside it can clean up; the guard sees that its own
parent has changed. ``PR_SET_PDEATHSIG`` in the server would not do: it follows the *thread* that
forked, and a thread of a pool may end long before the process. The guard has one thread, so there
the signal is right, and covers the guard's own death.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1


def main(parent: int, grace_s: float, command: list[str]) -> int:
    """Run ``command`` until it ends, this process is told to end, or ``parent`` is gone.

    Returns: the command's exit code, 128 + n when signal n ended it.
    """
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: told.append(received))
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_guard() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=sys.stderr,
        start_new_session=True,
        preexec_fn=die_with_guard,
    )
    print(server.pid, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the parent reads to the end
    while server.poll() is None and not told and os.getppid() == parent:
        time.sleep(_POLL_S)
    if server.poll() is None and told:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(grace_s)
    end_session(server.pid)
    code = server.wait()
    return code if code >= 0 else 128 - code


def end_session(leader: int) -> None:
    """SIGKILL every process of the session that ``leader`` started."""
    for _ in range(50):
        members = [pid for pid in _session(leader) if _kill(pid)]
        if not members:
            return
        time.sleep(0.1)


def _session(leader: int) -> list[int]:
    """Living processes of a session; without /proc only its leader's process group is known."""
    if not os.path.isdir("/proc/self"):
        return [-leader]
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, _, _, session = file.read().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if int(session) == leader and state not in "ZX":
            found.append(int(name))
    return found


def _kill(pid: int) -> bool:
    """Whether there was somebody to kill. A negative number is a process group."""
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
