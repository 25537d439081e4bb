"""A workflow, a judge, a dataset, one call: an agent with a calculator is trained from a script.

    python template/tuner/main.py path/to/a/small/model

On a machine without a GPU it trains on the CPU. ``scripts/quickstart.sh`` makes a model small
enough for that: pretrained_models/tiny.
"""

import sys
from pathlib import Path

from langchain_core.tools import tool

from chatlearn.tuner import (
    AlgorithmConfig,
    DatasetConfig,
    JudgeOutput,
    TunerModelConfig,
    WorkflowOutput,
    tune,
)


@tool
async def calculator(expression: str) -> str:
    """Work out a sum or a difference of two numbers, for example 34-60."""
    try:
        left, sign, right = expression.replace(" ", "").partition("+" if "+" in expression else "-")
        return str(int(left) + int(f"{sign}{right}"))
    except ValueError:
        return f"error: {expression!r} is not a sum of two numbers"


async def solve(task, model):
    """What is trained: three calls of the model at most, with a tool between them."""
    llm = model.bind_tools([calculator])
    messages = [("user", task["question"])]
    for _ in range(3):
        reply = await llm.ainvoke(messages)
        messages.append(reply)
        if not reply.tool_calls:
            break
        for call in reply.tool_calls:
            messages.append(await calculator.ainvoke(call))
    return WorkflowOutput(response=reply.text, metrics={"turns": len(messages) // 2})


async def judge(task, response):
    """1 where the answer stands in a box."""
    return JudgeOutput(reward=float(f"\\boxed{{{task['answer']}}}" in response))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    result = tune(
        solve,
        judge,
        model=TunerModelConfig(model_path=sys.argv[1], max_model_len=256, max_tokens=96),
        train_dataset=DatasetConfig(
            path=str(Path(__file__).with_name("sums.jsonl")), total_steps=20
        ),
        algorithm=AlgorithmConfig(
            algorithm_type="multi_step_grpo", group_size=8, batch_size=8, learning_rate=5e-4
        ),
    )
    sys.stdout.write(f"trained: {result.checkpoint}\n")
