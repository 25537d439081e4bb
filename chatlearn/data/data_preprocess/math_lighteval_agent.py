"""MATH (the lighteval copy) as agent tasks: train_agent.json and test_agent.json.

    modelscope download --dataset AI-ModelScope/MATH-lighteval --local_dir D
    python chatlearn/data/data_preprocess/math_lighteval_agent.py --input_dir D --local_dir D

The ground truth is what the solution's last box holds; level and type stay as columns.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: its folder is on the path instead of the repository
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from chatlearn.data.data_preprocess.source_files import Source, preprocess

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")


def boxed_answer(solution: str) -> str | None:
    r"""What the last ``\boxed{...}`` or ``\fbox{...}`` holds; braces nest, ``\{`` is not a brace.

    ``\boxed 5`` boxes the characters up to a space or dollar. None when there is no box, when it is
    empty, and when the last one is never closed.
    """
    boxes = list(_BOX.finditer(solution))
    if not boxes:
        return None
    rest = solution[boxes[-1].end() :]
    if not rest.startswith("{"):
        return re.match(r"[^\s$]*", rest)[0] or None  # type: ignore[index]
    depth = 0
    for token in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "}":
            return rest[1 : token.start()].strip() or None
    return None


SOURCE = Source(
    data_source="DigitalLearningGmbH/MATH-lighteval",
    modelscope_id="AI-ModelScope/MATH-lighteval",
    folder="data",
    question="problem",
    solution="solution",
    answer=boxed_answer,
    system_prompt=(
        "You solve competition mathematics. Reason in small steps and check the result. "
        "Close your reply with the final answer alone inside \\boxed{}."
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Read ``argv`` (default: the command line) and write the two files."""
    return preprocess(SOURCE, argv)


if __name__ == "__main__":
    raise SystemExit(main())
