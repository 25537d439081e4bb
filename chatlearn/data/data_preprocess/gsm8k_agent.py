"""GSM8K as agent tasks: train_agent.json and test_agent.json.

    modelscope download --dataset AI-ModelScope/gsm8k --local_dir D
    python chatlearn/data/data_preprocess/gsm8k_agent.py --input_dir D --local_dir D

The ground truth is the number after ``####``, without thousands commas.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: its folder is on the path instead of the repository
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from chatlearn.data.data_preprocess.source_files import Source, preprocess


def marked_answer(solution: str) -> str | None:
    """The rest of the line after the last ``####``; None when there is none."""
    _, mark, rest = solution.rpartition("####")
    answer = rest.strip().split("\n")[0].replace(",", "").strip()
    return answer if mark and answer else None


SOURCE = Source(
    data_source="openai/gsm8k",
    modelscope_id="AI-ModelScope/gsm8k",
    folder="main",
    question="question",
    solution="answer",
    answer=marked_answer,
    system_prompt=(
        "You solve word problems from everyday life. Write down each calculation. "
        "Close your reply with the resulting number alone inside \\boxed{}."
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Read ``argv`` (default: the command line) and write the two files."""
    return preprocess(SOURCE, argv)


if __name__ == "__main__":
    raise SystemExit(main())
