"""The loop of an agent with tools: call the model, run the tools it asks for, until it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from langchain_core.tools import BaseTool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from pydantic import BaseModel

from chatlearn.models.agent.base_agent_graph import BaseAgentGraph


class ToolAgentGraph(BaseAgentGraph):
    """A subclass names its ``tools``, and is registered under a name of its own."""

    tools: ClassVar[Sequence[BaseTool]] = ()

    class Config(BaseModel):
        max_turns: int = 3
        """Most model calls of one run."""

    def build_graph(self) -> StateGraph:
        llm = self.llm.bind_tools(self.tools)

        async def agent(state: MessagesState) -> dict:
            return {"messages": [await llm.ainvoke(state["messages"])]}

        async def after_agent(state: MessagesState) -> str:
            turns = sum(message.type == "ai" for message in state["messages"])
            return END if turns >= self.cfg.max_turns else tools_condition(state)

        graph = StateGraph(MessagesState)
        graph.add_node("agent", agent)
        graph.add_node("tools", ToolNode(self.tools))
        graph.add_edge(START, "agent")
        graph.add_conditional_edges("agent", after_agent, ["tools", END])
        graph.add_edge("tools", "agent")
        return graph
