"""``single_turn``: one question, one answer. The plainest agent there is."""

from __future__ import annotations

from langgraph.graph import START, MessagesState, StateGraph

from chatlearn.models.agent.agent_module import register
from chatlearn.models.agent.base_agent_graph import BaseAgentGraph


@register("single_turn")
class SingleTurnAgentGraph(BaseAgentGraph):
    def build_graph(self) -> StateGraph:
        async def answer(state: MessagesState) -> dict:
            return {"messages": [await self.llm.ainvoke(state["messages"])]}

        graph = StateGraph(MessagesState)
        graph.add_node("answer", answer)
        graph.add_edge(START, "answer")
        return graph
