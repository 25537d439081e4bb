"""The command line: ``chatlearn VERB …``, one small file a verb in ``chatlearn/cli``.

``chatlearn grpo …``, ``python -m chatlearn.entrypoint grpo …`` and ``python chatlearn/entrypoint.py
grpo …`` are the same.
"""

from __future__ import annotations

import os
import sys

if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    # Run as a script: this folder would shadow the standard library with types.py and more.
    sys.path[0] = os.path.dirname(sys.path[0])

import argparse
import importlib
import logging
from collections.abc import Sequence

from chatlearn.errors import ChatLearnError

VERBS = {
    "grpo": "train agents with GRPO",
    "tune": "train or debug a two-file project (AgentJet, astuner)",
    "data": "fetch, show and prepare datasets; serve environments",
    "stop": "end a run, and only what it started",
}
"""Each is a module of ``chatlearn.cli`` with ``add_arguments(parser)`` and
``main(arguments, overrides)``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. A refusal is one message, not a traceback."""
    # OpenMP threads spin while they wait; on cores shared with anything else, and a laptop's are,
    # that made training six times slower here (docs/benchmarks.md). Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(
        prog="chatlearn", description="Train LangGraph agents with reinforcement learning."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    modules = {verb: importlib.import_module(f"chatlearn.cli.{verb}") for verb in VERBS}
    for verb, module in modules.items():
        module.add_arguments(verbs.add_parser(verb, help=VERBS[verb], description=VERBS[verb]))
    arguments, overrides = parser.parse_known_args(argv)
    if flags := [word for word in overrides if word.startswith("-")]:
        parser.error(f"unknown option {flags[0]}; settings are given as key=value")
    try:
        modules[arguments.verb].main(arguments, overrides)
    except ChatLearnError as error:
        logging.getLogger(__name__).debug("refused", exc_info=True)
        sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. The same command continues from the last checkpoint.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
