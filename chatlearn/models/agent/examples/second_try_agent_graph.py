"""``second_try``: answer, be checked, and when wrong be told so and try again.

Suits a small model that cannot call tools: the graph, not the model, decides to check.
"""

from __future__ import annotations

from typing import Any

from langgraph.graph import END, START, MessagesState, StateGraph
from pydantic import BaseModel

from chatlearn.models.agent.agent_module import register
from chatlearn.models.agent.base_agent_graph import BaseAgentGraph
from chatlearn.rewards.math import final_answer_reward


class SecondTryState(MessagesState):
    ground_truth: Any
    tries: int


@register("second_try")
class SecondTryAgentGraph(BaseAgentGraph):
    class Config(BaseModel):
        max_tries: int = 2
        """Most answers of one run."""
        hint: str = "That is wrong. Try again."
        """What the model is told after a wrong answer."""

    def build_graph(self) -> StateGraph:
        async def answer(state: SecondTryState) -> dict:
            message = await self.llm.ainvoke(state["messages"])
            return {"messages": [message], "tries": state.get("tries", 0) + 1}

        async def tell(state: SecondTryState) -> dict:
            return {"messages": [("user", self.cfg.hint)]}

        async def check(state: SecondTryState) -> str:
            response = state["messages"][-1].content
            reward, _ = final_answer_reward(response, state["ground_truth"])
            return END if reward == 1.0 or state["tries"] >= self.cfg.max_tries else "tell"

        graph = StateGraph(SecondTryState)
        graph.add_node("answer", answer)
        graph.add_node("tell", tell)
        graph.add_edge(START, "answer")
        graph.add_conditional_edges("answer", check, ["tell", END])
        graph.add_edge("tell", "answer")
        return graph
