"""What tests with AgentScope share: its processes' environment, and other projects' pages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = Path(os.environ.get("CHATLEARN_SEEDS") or ROOT.parent / "shared" / "seeds")
"""Where copies of those pages are, beside the checkout: their text is not in this repository."""


@pytest.fixture(scope="session")
def agentscope_environment() -> dict[str, str]:
    """Environment variables of a process that has AgentScope."""
    script = ROOT / "tests" / "agentscope_env.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(script)], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return {**os.environ, "PYTHONPATH": done.stdout.splitlines()[-1]}


@pytest.fixture(scope="session")
def page() -> Callable[[str], str]:
    """Text of a page by its number, ``page("002")``; the test is skipped where it is not."""

    def read(number: str) -> str:
        found = sorted(PAGES.glob(f"{number}*.txt"))
        if not found:
            pytest.skip(f"the page {number}*.txt is not in {PAGES} (CHATLEARN_SEEDS names another)")
        return found[0].read_text()

    return read
