"""An agent in the style written for ChatLearn runs as it is: modules, constructor, run, output."""

from __future__ import annotations

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.graph import END, MessagesState, StateGraph

from chatlearn.models.agent.agent_module import register  # noqa: F401
from chatlearn.models.agent.base_agent_graph import AgentGraphOutput, BaseAgentGraph
from chatlearn.models.agent.chat_model import CustomChatModel


class OldStyle(BaseAgentGraph):
    def __init__(self, agent_name, cfg, llm, tokenizer, processor, **kwargs):
        super().__init__(agent_name, cfg, llm, tokenizer, processor, **kwargs)
        self.build_graph()

    def build_graph(self):
        self.chatmodel = CustomChatModel(
            model=self.agent_name, llm=self.llm, tokenizer=self.tokenizer, processor=self.processor
        )

        @tool
        def double(number: int, **kwargs):
            """Double a number."""
            return str(2 * number)

        async def call_model(state: MessagesState, config: RunnableConfig):
            model = config["configurable"]["model"]
            params = config["configurable"]["sampling_params"]
            return {"messages": [await model.ainvoke(state["messages"], sampling_params=params)]}

        async def call_tools(state: MessagesState):
            results = [
                ToolMessage(double.func(**call["args"]), tool_call_id=call["id"])
                for call in state["messages"][-1].tool_calls
            ]
            return {"messages": results}

        def route(state: MessagesState):
            last = state["messages"][-1]
            tokens = len(last.response_metadata["loss_mask"])
            return "tools" if last.tool_calls and tokens < 1000 else END

        self.chatmodel = self.chatmodel.bind_tools([double])
        workflow = StateGraph(MessagesState)
        workflow.add_node("agent", call_model)
        workflow.add_node("tools", call_tools)
        workflow.set_entry_point("agent")
        workflow.add_conditional_edges("agent", route)
        workflow.add_edge("tools", "agent")
        self.graph = workflow.compile()

    async def run(self, messages, sampling_params, **kwargs) -> AgentGraphOutput:
        config = {"configurable": {"model": self.chatmodel, "sampling_params": sampling_params}}
        state = await self.graph.ainvoke({"messages": messages}, config)
        return self.convert_agent_graph_output(state)


def test_an_agent_written_for_chatlearn_runs_unchanged(run_graph, tokenizer):
    call = '<tool_call>\n{"name": "double", "arguments": {"number": 2}}\n</tool_call>'
    trajectory = run_graph(
        OldStyle,
        [call, "4"],
        reward_function=lambda response, ground_truth: response == ground_truth,
    )
    assert trajectory.error is None
    assert trajectory.reward == 1.0
    assert [turn.parent for turn in trajectory.turns] == [None, 0]
    assert "kwargs" not in tokenizer.decode(trajectory.turns[0].prompt_ids)
