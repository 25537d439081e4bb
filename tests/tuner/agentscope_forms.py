"""Workflows with AgentScope 1.x; ``test_agentscope.py`` runs these tests where it is installed."""

from __future__ import annotations

import openai
import pytest
from agentscope.agent import ReActAgent
from agentscope.formatter import DashScopeChatFormatter, OpenAIChatFormatter
from agentscope.memory import InMemoryMemory
from agentscope.message import Msg, TextBlock
from agentscope.model import ChatModelBase, OpenAIChatModel
from agentscope.tool import Toolkit, ToolResponse
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from pydantic import BaseModel, SecretStr

from chatlearn.tuner import JudgeOutput, ModelTuner, Workflow, WorkflowOutput
from chatlearn.tuner.auxiliary import AuxiliaryIn
from chatlearn.tuner.model_kinds import ModelKind, model_kind
from chatlearn.tuner.naming import name_of
from chatlearn.tuner.rows import write_agent_cfg
from chatlearn.tuner.workflow_agent import WorkflowAgent
from chatlearn.types import Outcome

CALL = '<tool_call>\n{"name": "add", "arguments": {"b": %d, "a": %d}}\n</tool_call>'


async def add(a: int, b: int) -> ToolResponse:
    """Add two numbers.

    Args:
        a (int): One.
        b (int): The other.
    """
    return ToolResponse(content=[TextBlock(type="text", text=str(a + b))])


def react(model, formatter):
    toolkit = Toolkit()
    toolkit.register_tool_function(add)
    agent = ReActAgent(
        name="adder",
        sys_prompt="You add.",
        model=model,
        formatter=formatter,
        toolkit=toolkit,
        memory=InMemoryMemory(),
        max_iters=3,
    )
    agent.set_console_output_enabled(False)
    return agent


async def of_a_function(task: dict, model: OpenAIChatModel, auxiliary_models=None):
    assert isinstance(model, OpenAIChatModel)
    reply = await react(model, OpenAIChatFormatter()).reply(Msg("user", task["question"], "user"))
    return WorkflowOutput(response=reply)


class OfAClass(Workflow):
    async def execute(self, workflow_task, model_tuner: ModelTuner):
        assert isinstance(model_tuner, ChatModelBase)
        query = Msg("user", workflow_task.task.main_query, role="user")
        return WorkflowOutput(
            response=await react(model_tuner, DashScopeChatFormatter()).reply(query)
        )


class OfItsModel(Workflow):
    async def execute(self, workflow_task, model_tuner: ModelTuner):
        model = model_tuner.as_agentscope_model(agent_name="adder")
        query = Msg("user", workflow_task.task.main_query, role="user")
        return WorkflowOutput(response=await react(model, OpenAIChatFormatter()).reply(query))


async def judge(task, response: Msg, auxiliary_models: dict[str, ChatModelBase]) -> JudgeOutput:
    return JudgeOutput(reward=float(task["answer"] in response.get_text_content()))


@pytest.mark.parametrize("workflow", [of_a_function, OfAClass, OfItsModel])
def test_a_react_agent_with_its_tool_is_one_row(run_graph, tmp_path, workflow):
    cfg = write_agent_cfg(tmp_path, workflow=name_of(workflow), judge=name_of(judge))
    answers = ["So: " + CALL % (2, 2), CALL % (4, 4), "It is 8"]
    row = {"question": "2+2+4?", "answer": "8"}

    trajectory = run_graph(WorkflowAgent, answers, cfg=str(cfg), fields={"task": row})

    assert (trajectory.outcome, trajectory.reward) == (Outcome.FINISHED, 1.0), trajectory.error
    parents = [(turn.parent, turn.fork) for turn in trajectory.turns]
    assert parents == [(None, None), (0, None), (1, None)]
    assert trajectory.turns[0].node == ("adder" if workflow is OfItsModel else "")


def test_structured_answers(run_graph, tmp_path):
    class Answer(BaseModel):
        result: str

    class Structured(Workflow):
        async def execute(self, workflow_task, model_tuner):
            query = Msg("user", workflow_task.task.main_query, role="user")
            agent = react(model_tuner, DashScopeChatFormatter())
            reply = await agent.reply(query, structured_model=Answer)
            return WorkflowOutput(metadata={"final_answer": reply.metadata["result"]})

    cfg = write_agent_cfg(tmp_path, workflow=name_of(Structured), judge="math_answer")
    call = '<tool_call>\n{"name": "generate_response", "arguments": {"result": "4"}}\n</tool_call>'

    trajectory = run_graph(WorkflowAgent, [call, "4"], cfg=str(cfg))

    assert (trajectory.outcome, trajectory.reward) == (Outcome.FINISHED, 1.0), trajectory.error


class Served(FakeListChatModel):
    openai_api_base: str = "http://127.0.0.1:9/v1"
    openai_api_key: SecretStr = SecretStr("sk-aux")
    model_name: str = "qwen"


async def test_auxiliary_models_are_agentscopes():
    model = AuxiliaryIn(ModelKind.AGENTSCOPE, {"judge": Served(responses=["yes"])})["judge"]

    assert isinstance(model, OpenAIChatModel)
    assert (model.model_name, model.client.api_key) == ("qwen", "sk-aux")
    assert isinstance(model.client, openai.AsyncOpenAI)


def test_annotations():
    async def base(task, model: ChatModelBase): ...

    assert model_kind(base, "here") is ModelKind.AGENTSCOPE
