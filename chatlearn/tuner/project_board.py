"""TensorBoard beside a run: started with it, ended with it, however it ends."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chatlearn.models.engine import orphan_guard
from chatlearn.observability.run_folder import RunFolder

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"TensorBoard \S+ at (http\S+)")
_START_S = 60.0
_GRACE_S = 5


@contextmanager
def tensorboard(run: RunFolder) -> Iterator[None]:
    """A TensorBoard on ``run``'s events, on 127.0.0.1; its address is logged when it answers."""
    run.logs.mkdir(parents=True, exist_ok=True)
    log = run.logs / "tensorboard.log"
    guard = [sys.executable, "-I", orphan_guard.__file__, str(os.getpid()), str(_GRACE_S)]
    board = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run.tensorboard)]
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            [*guard, *board, "--host", "127.0.0.1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
    threading.Thread(target=_announce, args=(process, log), daemon=True).start()
    try:
        yield
    finally:
        process.terminate()
        process.wait(_GRACE_S * 4)


def _announce(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        found = _ADDRESS.search(log.read_text(encoding="utf-8", errors="replace"))
        if found:
            logger.info("TensorBoard of this run: %s", found[1])
            return
        time.sleep(0.3)
    logger.warning("TensorBoard did not start; %s has what it said", log)
