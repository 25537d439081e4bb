"""Where log lines go: ``run.log``, and stderr without garbling a live progress bar."""

from __future__ import annotations

import logging
import sys
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_NOISY = ("httpx", "httpx2", "httpcore", "urllib3", "filelock", "asyncio", "matplotlib")
"""Libraries whose INFO lines say nothing about a run."""


@cache
def console() -> Console:
    """The one console of the process, on stderr.

    Log lines and the progress bar must share it: rich then prints a line above the live bar.
    """
    return Console(stderr=True, highlight=False)


def setup_logging(run_log: Path | None = None, *, verbose: bool = False) -> None:
    """Send all logging to stderr and, when given, to ``run_log`` (appended).

    Calling it again replaces the handlers of the earlier call and no others, so that a command may
    log before it knows its run folder.

    Args:
        run_log: gets everything stderr gets, with full times.
        verbose: show DEBUG lines of this package too.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "is_ours", False)]:
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_terminal() if console().is_terminal else _plain()]
    if run_log is not None:
        run_log.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(run_log, encoding="utf-8")
        file.setFormatter(logging.Formatter(_FORMAT))
        handlers.append(file)
    for handler in handlers:
        handler.is_ours = True  # type: ignore[attr-defined]
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("chatlearn").setLevel(logging.DEBUG if verbose else logging.INFO)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


def _terminal() -> logging.Handler:
    return RichHandler(
        console=console(),
        show_path=False,
        markup=False,
        highlighter=None,
        log_time_format="%H:%M:%S",
        rich_tracebacks=False,
    )


def _plain() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
    return handler
