"""Whether two LaTeX answers are equal, asked of math-verify in a process that may be lost.

math-verify runs sympy on what the policy wrote. Its own time limit is a signal, which only a main
thread may set and which does not interrupt one long C call such as ``9**9**9**9``; rewards run in
threads. So a few helper processes do the comparing, each limited in CPU seconds and memory by the
operating system: what is too hard kills its helper, and the next question starts a new one.
CPU seconds and not wall seconds, so a busy machine does not turn right answers into wrong ones.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
from typing import Any

logger = logging.getLogger(__name__)

CPU_SECONDS = 5.0
"""Most a comparison may compute."""
MEMORY_BYTES = 4 << 30
"""Address space of one helper."""
HELPERS = max(1, min(4, os.cpu_count() or 1))

_HELPER = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from chatlearn.rewards.equivalence import serve
serve(cpu_seconds=float(sys.argv[2]))
"""


def equivalent(gold: str, answer: str) -> bool:
    """Whether ``answer`` equals ``gold``; False too when that cannot be found out in the limits.

    Texts that agree up to spacing and outer dollars need no helper. May be called from any thread.

    Raises:
        RuntimeError: helpers die for another reason than the limits.
    """
    gold, answer = _plain(gold), _plain(answer)
    if not gold or not answer:
        return False
    if gold.replace(" ", "") == answer.replace(" ", ""):
        return True
    return _helpers.ask(gold, answer)


class _Helpers:
    """At most ``size`` helper processes, each started when first needed, kept for later."""

    def __init__(self, size: int, cpu_seconds: float) -> None:
        self._cpu_seconds = cpu_seconds
        self._idle: queue.LifoQueue[_Helper | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)

    def ask(self, gold: str, answer: str) -> bool:
        helper = self._idle.get()
        try:
            for _ in range(2):  # once more if the helper had died before, or of something else
                if helper is None or not helper.is_ours():
                    helper = _Helper(self._cpu_seconds)
                equal = helper.ask(gold, answer)
                if equal is not None:
                    return equal
                code = helper.close()
                helper = None
                if code == -signal.SIGPROF:
                    logger.warning("gave up comparing %r with %r", answer, gold)
                    return False
            raise RuntimeError(
                f"the process comparing answers ended with exit code {code} (gold {gold!r}, answer "
                f"{answer!r}); its own words, if any, are on stderr"
            )
        except BaseException:
            if helper is not None:  # interrupted between question and answer
                helper.kill()
                helper = None
            raise
        finally:
            self._idle.put(helper)


class _Helper:
    """One process, asked one question at a time: a JSON line each way."""

    def __init__(self, cpu_seconds: float) -> None:
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _HELPER, json.dumps(sys.path), str(cpu_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def is_ours(self) -> bool:
        """False in a fork of the process that started it."""
        return self._owner == os.getpid()

    def ask(self, gold: str, answer: str) -> bool | None:
        """The answer, or None when the process is gone."""
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        try:
            pipe_in.write(json.dumps([gold, answer]) + "\n")
            pipe_in.flush()
        except BrokenPipeError:
            return None
        line = pipe_out.readline()
        return bool(json.loads(line)) if line.endswith("\n") else None

    def kill(self) -> None:
        """End the process whatever it does."""
        self._process.kill()
        self.close()

    def close(self) -> int:
        """Wait for the end of a process that is ending; returns its exit code."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # an unsent question
        return self._process.wait()


_helpers = _Helpers(HELPERS, CPU_SECONDS)


def serve(cpu_seconds: float) -> None:
    """The helper's main loop: compare until standard input ends, which it does with the parent."""
    import resource

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the default ends the process, even inside C
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ValueError, OSError):
        logger.debug("no memory limit on this system")
    questions, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    _compare("1", "2")  # imports and builds the grammar outside the time limit
    for line in questions:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        equal = _compare(gold, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(equal) + "\n")
        answers.flush()


def _compare(gold: str, answer: str) -> bool:
    """math-verify's verdict; runs in the helper's main thread."""
    from math_verify import verify

    return bool(verify(_parse(gold), _parse(answer), timeout_seconds=None))


def _parse(text: str) -> list[Any]:
    """math-verify's reading of a whole text as one expression, and the text itself."""
    from math_verify import LatexExtractionConfig, parse

    # Boxed and first_match: the text is read whole or not at all. The defaults would also look for
    # fractions or sentences inside it, and judge whichever of several answers fits.
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    boxed = f"\\boxed{{{text}}}"
    return parse(boxed, config, extraction_mode="first_match", parsing_timeout=None)


def _plain(text: str) -> str:
    """One line without math delimiters, dollars and final punctuation."""
    text = re.sub(r"(?<!\\)\\[()\[\]]|\\?\$|\s+", " ", text)
    return re.sub(r" +", " ", text).strip().rstrip(".,;").strip()
