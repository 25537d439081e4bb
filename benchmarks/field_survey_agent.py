"""The agent of ``field_survey.py`` as chatlearn runs it: ``runtime_args.import_modules``."""

from __future__ import annotations

from field_survey import MAX_CALLS, SOURCE, record, said_so
from langchain_core.tools import tool

from chatlearn.models.agent import register
from chatlearn.models.agent.examples.tool_agent_graph import ToolAgentGraph
from chatlearn.rewards import reward


@tool
async def measure(site: str) -> str:
    """Read the newest record of a site."""
    return record(site)


@register("field_survey")
class FieldSurvey(ToolAgentGraph):
    tools = (measure,)

    class Config(ToolAgentGraph.Config):
        max_turns: int = MAX_CALLS


reward(SOURCE)(said_so)
