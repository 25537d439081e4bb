"""``openai_sdk``: the calculator again, written with the OpenAI SDK instead of LangGraph.

``answer`` is an agent as it runs against OpenAI; only ``base_url`` and ``api_key`` of its client
are the endpoint's. Needs ``pip install openai``, and
``runtime_args.import_modules=[chatlearn.models.agent.examples.openai_sdk_agent]``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from chatlearn.models.agent.agent_module import register
from chatlearn.models.agent.base_agent_graph import BaseAgentGraph
from chatlearn.models.agent.examples.calculator_agent_graph import evaluate

if TYPE_CHECKING:
    from openai import AsyncOpenAI

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Work out an arithmetic expression, for example 12*(3+4).",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


async def answer(client: AsyncOpenAI, messages: list[Any], *, max_turns: int) -> None:
    """Ask, work out what is asked for, until the model answers."""
    messages = list(messages)
    for _ in range(max_turns):
        reply = await client.chat.completions.create(
            model="gpt-5-mini", messages=messages, tools=[CALCULATOR]
        )
        message = reply.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            said = calculate(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})


def calculate(name: str, arguments: str) -> str:
    """What the model is told of one call; whatever is wrong with it is said."""
    if name != "calculator":
        return f"error: there is no tool {name!r}"
    try:
        return str(evaluate(str(json.loads(arguments)["expression"])))
    except (KeyError, ValueError, ZeroDivisionError) as error:
        return f"error: {error}"


@register("openai_sdk")
class OpenAISDKAgent(BaseAgentGraph):
    class Config(BaseModel):
        max_turns: int = 3
        """Most model calls of one run."""

    async def run(self, messages: list[Any], **row: Any) -> dict[str, Any]:
        from openai import AsyncOpenAI

        async with (
            self.endpoint() as door,
            AsyncOpenAI(base_url=door.base_url, api_key=door.api_key) as client,
        ):
            await answer(client, messages, max_turns=self.cfg.max_turns)
        return {}  # what was said is recorded
