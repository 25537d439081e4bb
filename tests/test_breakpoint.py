"""``breakpoint()`` in a graph node stops there, in a terminal with the live bar running."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time


def converse(command, folder, answers, *, timeout_s=120.0) -> str:
    """Run ``command`` in a terminal; give each answer at the debugger's next prompt."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "TERM": "xterm-256color"},
        stdin=inside,
        stdout=inside,
        stderr=inside,
    )
    os.close(inside)
    seen, prompts, deadline = "", 0, time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.5)[0]:
            continue
        try:
            read = os.read(terminal, 65536)
        except OSError:  # the process has ended
            break
        seen += read.decode(errors="replace")
        if seen.count("(Pdb)") > prompts and prompts < len(answers):
            os.write(terminal, answers[prompts].encode() + b"\n")
            prompts += 1
    process.kill()
    os.close(terminal)
    process.wait()
    return seen


def test_a_breakpoint_stops_in_the_users_node(project, tmp_path):
    agent = (tmp_path / "my_agent.py").read_text()
    ask = 'return {"messages": [await self.llm.ainvoke(state["messages"]), ("user", "again")]}'
    assert ask in agent
    (tmp_path / "my_agent.py").write_text(agent.replace(ask, f"breakpoint()\n{' ' * 12}{ask}"))

    settings = [*project.settings, "runtime_args.num_episode=1"]
    seen = converse(
        [sys.executable, "-m", "chatlearn", "grpo", *settings],
        tmp_path,
        [
            "p state['messages'][-1].content",
            "!import os; os.environ['PYTHONBREAKPOINT'] = '0'",  # the other runs go on
            "c",
        ],
    )

    assert "my_agent.py" in seen
    assert "-> " in seen
    assert "'say train" in seen
    assert "where to look next" in seen  # and then it goes on to its end
    assert project.weights(project.runs[0], 1)
