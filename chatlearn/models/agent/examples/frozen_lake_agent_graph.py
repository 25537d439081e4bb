"""``frozen_lake``: looks at the lake, says a move, hears what it led to; scored by the service."""

from __future__ import annotations

import contextlib
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, MessagesState, StateGraph
from pydantic import BaseModel

from chatlearn.models.agent.agent_module import register
from chatlearn.models.agent.base_agent_graph import BaseAgentGraph
from chatlearn.models.agent.environment import run_environment
from chatlearn.models.agent.run import BudgetExhausted


@register("frozen_lake")
class FrozenLakeAgentGraph(BaseAgentGraph):
    class Config(BaseModel):
        environment: str = "http://127.0.0.1:8765"
        """URL of the service, see ``frozen_lake.py``."""
        max_turns: int = 12
        timeout_s: float = 60.0
        """How long one call of the service may take."""
        patience_s: float = 30.0
        """How long to wait for a service that cannot be reached."""

    def build_graph(self) -> StateGraph:
        async def choose(state: MessagesState) -> dict:
            return {"messages": [await self.llm.ainvoke(state["messages"])]}

        async def walk(state: MessagesState, config: RunnableConfig) -> dict:
            step = await config["configurable"]["env"].step(state["messages"][-1].text)
            return {"messages": [HumanMessage(step.state)]}

        def is_over(state: MessagesState, config: RunnableConfig) -> str:
            turns = sum(message.type == "ai" for message in state["messages"])
            over = config["configurable"]["env"].done or turns >= self.cfg.max_turns
            return END if over else "choose"

        graph = StateGraph(MessagesState)
        graph.add_node("choose", choose)
        graph.add_node("walk", walk)
        graph.add_edge(START, "choose")
        graph.add_edge("choose", "walk")
        graph.add_conditional_edges("walk", is_over, ["choose", END])
        return graph

    async def run(self, **row: Any) -> dict[str, Any]:
        service = run_environment(
            self.cfg.environment, timeout_s=self.cfg.timeout_s, patience_s=self.cfg.patience_s
        )
        async with service.instance(row["task"]["task_id"]) as env:
            *before, question = row["messages"]
            first = {**question, "content": f"{question['content']}\n{env.state}"}
            config = {"configurable": {"env": env}, "recursion_limit": 2 * self.cfg.max_turns + 1}
            state: dict[str, Any] = {}
            with contextlib.suppress(BudgetExhausted):  # truncated: scored as it stands
                state = await self.graph.ainvoke({"messages": [*before, first]}, config)
            found = await env.evaluate()
        metrics = {"steps": found.info["steps"], "success": found.info["success"]}
        return {**state, "reward": found.score, "metrics": metrics}
