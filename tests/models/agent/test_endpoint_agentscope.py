"""AgentScope's own ``ReActAgent`` behind the endpoint: unchanged but for base_url and key."""

from __future__ import annotations

import pytest

from chatlearn.models.agent import BaseAgentGraph
from chatlearn.types import Outcome

agentscope = pytest.importorskip(
    "agentscope",
    reason="AgentScope is not installed: pip install 'agentscope<2' 'openai<2' 'mcp<2' greenlet",
)
from agentscope.agent import ReActAgent  # noqa: E402
from agentscope.formatter import OpenAIChatFormatter  # noqa: E402
from agentscope.memory import InMemoryMemory  # noqa: E402
from agentscope.message import Msg, TextBlock  # noqa: E402
from agentscope.model import OpenAIChatModel  # noqa: E402
from agentscope.tool import Toolkit, ToolResponse  # noqa: E402
from openai.types.chat.chat_completion_chunk import ChoiceDelta  # noqa: E402

if not agentscope.__version__.startswith("1."):
    pytest.skip(f"AgentScope 1.x is meant, not {agentscope.__version__}", allow_module_level=True)

CALL = '<tool_call>\n{"name": "add", "arguments": {"b": %d, "a": %d}}\n</tool_call>'


async def add(a: int, b: int) -> ToolResponse:
    """Add two numbers.

    Args:
        a (int): One.
        b (int): The other.
    """
    return ToolResponse(content=[TextBlock(type="text", text=str(a + b))])


@pytest.mark.parametrize("stream", [False, True])
def test_a_react_agent_is_one_row(run_graph, stream):
    if stream and "audio" in ChoiceDelta.model_fields:
        pytest.skip("AgentScope 1.x cannot read a stream of this OpenAI SDK; it can of openai<2")
    said = []

    class Friday(BaseAgentGraph):
        async def run(self, messages, **row):
            toolkit = Toolkit()
            toolkit.register_tool_function(add)
            async with self.endpoint() as door:
                agent = ReActAgent(
                    name="Friday",
                    sys_prompt="You add.",
                    model=OpenAIChatModel(
                        model_name="gpt-5-mini",
                        api_key=door.api_key,
                        client_kwargs={"base_url": door.base_url},
                        stream=stream,
                    ),
                    formatter=OpenAIChatFormatter(),
                    toolkit=toolkit,
                    memory=InMemoryMemory(),
                )
                agent.set_console_output_enabled(False)
                answer = await agent(Msg("user", messages[-1]["content"], "user"))
            said.append(answer.get_text_content())
            return {"reward": 1.0}

    # AgentScope's formatter drops the reasoning, and writes the arguments anew
    answers = ["<think>\nAdd.\n</think>\n\nSo: " + CALL % (2, 2), CALL % (4, 4), "It is 8"]
    trajectory = run_graph(Friday, answers)

    assert trajectory.outcome is Outcome.FINISHED, trajectory.error
    assert said == ["It is 8"]
    parents = [(turn.parent, turn.fork) for turn in trajectory.turns]
    assert parents == [(None, None), (0, None), (1, None)]
