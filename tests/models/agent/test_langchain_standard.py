"""LangChain's own standard tests of a chat model, on ours.

The policy answers by rule: what the tests ask for, as a well-trained model would. Skipped: images,
audio and PDF (only text is trained), Anthropic's message blocks, a model chosen by call, recorded
HTTP (there is none), construction from environment variables (there are none), serialisation
(LangChain serialises models that are named by their class and keys; ours holds a tokenizer).
"""

from __future__ import annotations

import asyncio
import json
import re
import threading

import pytest

pytest.importorskip("langchain_tests", reason="pip install langchain-tests")

from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from chatlearn.models.agent.attempts import _listening
from chatlearn.models.agent.chat_model import CustomChatModel
from chatlearn.models.agent.run import Run, _current_run, set_current_run
from chatlearn.models.engine.scripted import ScriptedEngine
from chatlearn.types import Budget, SamplingParams, Session

ARGUMENTS = {
    "magic_function": {"input": 3},
    "magic_function_no_args": {},
    "greeting_generator": {"answer_style": "pirate"},
    "my_adder_tool": {"a": 1, "b": 2},
    "get_weather": {"location": "San Francisco, CA"},
    "Joke": {"setup": "Why did the cat sit?", "punchline": "It could."},
    "JokeDict": {"setup": "Why did the cat sit?", "punchline": "It could."},
}
OPENING = re.compile(r'<tool_call>\n(?:\{"name": "(\w+)", "arguments": )?$')


def answer(prompt: str) -> str:
    """What the policy says to a prompt, which may end in the opening of a forced call."""
    asked = prompt.split("<|im_start|>")[-2]
    if opening := OPENING.search(prompt):
        name = opening[1] or "magic_function"
        written = json.dumps(arguments(name, asked), ensure_ascii=False)
        call = written if opening[1] else f'{{"name": "{name}", "arguments": {written}'
        return call + "}\n</tool_call>"
    if "weather" in asked and "tool_response" not in asked:
        call = {"name": "get_weather", "arguments": ARGUMENTS["get_weather"]}
        return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    if "JSON" in prompt:
        return json.dumps(ARGUMENTS["Joke"])
    return "Here you are."


def arguments(name: str, asked: str) -> dict:
    if name == "unicode_customer":
        return {"customer_name": re.search("'(.*?)'", asked)[1], "description": "a company"}
    return ARGUMENTS[name]


@pytest.fixture(autouse=True)
def run_of_the_test(tokenizer, say):
    """A run whose event loop is in another thread, as for a sync node."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    engine = ScriptedEngine(lambda ids, *_: say(answer(tokenizer.decode(ids)) + "<|im_end|>"))
    set_current_run(
        Run(
            session=Session("0:test:0", "0.0"),
            engine=engine,
            sampling=SamplingParams(),
            budget=Budget(10_000, 100_000, 100_000),
            loop=loop,
        )
    )
    yield
    _current_run.set(None)
    _listening.set(None)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class Policy:
    """What LangChain's tests must know of the model."""

    @pytest.fixture(autouse=True)
    def _params(self, llm):
        self.params = {"tokenizer": llm.tokenizer, "prompts": llm.prompts, "parser": llm.parser}

    chat_model_class = CustomChatModel

    @property
    def chat_model_params(self):
        return self.params

    @property
    def standard_chat_model_params(self):
        # no timeout and no max_retries: runtime_args.agent_timeout_s and the engine pool do that
        return {"temperature": 0, "max_tokens": 100, "stop": []}


class TestUnit(Policy, ChatModelUnitTests):
    pass


class TestIntegration(Policy, ChatModelIntegrationTests):
    standard_chat_model_params = {}  # noqa: RUF012
    supports_json_mode = True
    supports_model_override = False


class TestJsonSchema(TestIntegration):
    structured_output_kwargs = {"method": "json_schema"}  # noqa: RUF012
