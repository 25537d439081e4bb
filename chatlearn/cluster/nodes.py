"""The machines of a run, as PAI/DLC describes them to every one of them.

RANK          number of this machine, 0 is the head
WORLD_SIZE    number of machines
MASTER_ADDR   address of the head
MASTER_PORT   a free port of the head
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chatlearn.errors import ConfigError
from chatlearn.models.engine import orphan_guard

logger = logging.getLogger(__name__)

_DEFAULT_PORT = 12456
_THIS_MACHINE = "127.0.0.1"
_JOINING_S = 600.0
"""Seconds that a machine waits for the first one to answer."""


@dataclass(frozen=True, slots=True)
class Node:
    """This machine's place among the machines of the run."""

    rank: int = 0
    count: int = 1
    head: str = _THIS_MACHINE
    """Address of the first machine."""
    port: int = _DEFAULT_PORT

    @property
    def is_head(self) -> bool:
        return self.rank == 0

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Node:
        """Read the four variables; unset ones mean one machine.

        Raises:
            ConfigError: they contradict each other.
        """
        rank = _number(environ, "RANK", 0)
        count = _number(environ, "WORLD_SIZE", 1)
        port = _number(environ, "MASTER_PORT", _DEFAULT_PORT)
        if count < 1 or not 0 <= rank < count:
            raise ConfigError(
                f"RANK={rank} with WORLD_SIZE={count}: WORLD_SIZE is the number of machines and "
                "RANK the number of this one, from 0; unset both to run on one machine"
            )
        head = environ.get("MASTER_ADDR", "")
        if count > 1 and not head:
            raise ConfigError(
                f"WORLD_SIZE={count} but MASTER_ADDR is not set: every machine needs the address "
                "of the first one; set it, or unset WORLD_SIZE to run on one machine"
            )
        return cls(rank, count, head or _THIS_MACHINE, port)


class RayProcess:
    """Ray on this machine, for as long as this process lives, even where that is killed with -9
    (``ray.init`` would leave some of its processes behind for minutes).

    Args:
        node: the head of the run's machines, or one that joins it.
        num_cpus: CPUs that Ray hands out here; None = those the machine has.
    """

    def __init__(self, node: Node, *, num_cpus: int | None = None) -> None:
        if node.is_head:
            where = ["--head", f"--node-ip-address={node.head}", f"--port={node.port}"]
            where.append("--include-dashboard=false")
        else:
            where = [f"--address={node.head}:{node.port}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where]
        command += ["--block", "--disable-usage-stats"]
        command += [] if num_cpus is None else [f"--num-cpus={num_cpus}"]
        guard = [sys.executable, "-I", orphan_guard.__file__, str(os.getpid()), "20"]
        self.log = Path(tempfile.gettempdir()) / f"chatlearn-ray-{os.getpid()}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this process, which ends Ray in order
            )

    def tail(self) -> str:
        """What Ray said last."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End Ray on this machine, and everything that runs in it."""
        self._process.terminate()
        self._process.wait()


def share_token(node: Node) -> None:
    """Ray wants one token in all processes of a cluster. One machine makes one up. Several, without
    one in the environment of the job, are told to do without: they must be in a network of their
    own, as DLC's are.

    Must come before ``import ray``, which keeps what it finds then.
    """
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"} & set(os.environ):
        return
    if node.count == 1:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        return
    os.environ["RAY_AUTH_MODE"] = "disabled"
    logger.warning("Ray accepts whoever reaches its port: RAY_AUTH_TOKEN is not set here")


def join(node: Node) -> None:
    """Lend this machine to the run whose first machine is ``node.head``; returns when that is over.

    Raises:
        ConfigError: the first machine does not answer.
    """
    deadline = time.monotonic() + _JOINING_S
    while not answers(node.head, node.port):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"MASTER_ADDR={node.head} does not answer on MASTER_PORT={node.port} within "
                f"{_JOINING_S:g} s; start the same command there with RANK=0, and let the machines "
                "reach each other"
            )
        time.sleep(1.0)
    process = RayProcess(node)
    logger.info("machine %d of %d has joined %s:%d", node.rank, node.count, node.head, node.port)
    try:
        while process.poll() is None and answers(node.head, node.port):
            time.sleep(2.0)
        if process.poll() is not None and answers(node.head, node.port):
            raise ConfigError(f"Ray on machine {node.rank} ended before the run: {process.tail()}")
    finally:
        process.stop()
    logger.info("the run is over")


def answers(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def machine_count(environ: Mapping[str, str]) -> int:
    """WORLD_SIZE, the number of machines; 1 where it is not set."""
    return _number(environ, "WORLD_SIZE", 1)


def free_port(host: str = "") -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "").strip() or str(default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not a whole number; set or unset it") from None
