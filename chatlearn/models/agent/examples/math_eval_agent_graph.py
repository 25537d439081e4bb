"""``math_eval``: solve a problem, check the answer with a tool, refine it, answer in a box.

The tool knows the ground truth of the row, as in the tutorial users come from: it teaches when to
trust an answer, not how to find one. For training that must not see the truth, use ``single_turn``.
"""

from __future__ import annotations

from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool

from chatlearn.models.agent.agent_module import register
from chatlearn.models.agent.examples.tool_agent_graph import ToolAgentGraph
from chatlearn.rewards.math import math_reward


@tool
def check_answer(answer: str, config: RunnableConfig) -> str:
    """Check a final answer before giving it; says whether it is correct."""
    truth = config["configurable"]["row"]["ground_truth"]
    reward, _ = math_reward(f"\\boxed{{{answer}}}", truth)
    return "The answer is correct." if reward == 1.0 else "The answer is wrong."


@register("matheval_agent")  # the name in datasets written for ChatLearn
@register("math_eval")
class MathEvalAgentGraph(ToolAgentGraph):
    tools = (check_answer,)
