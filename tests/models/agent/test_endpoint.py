"""The policy behind OpenAI's API: the official client, real HTTP, the same recorder and laws."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import subprocess
import sys
import time
from types import SimpleNamespace

import httpx
import pytest

from chatlearn.errors import AgentError
from chatlearn.models.agent import BaseAgentGraph
from chatlearn.models.engine.scripted import ScriptedEngine
from chatlearn.types import Budget, Completion, Fork, Outcome, StopReason

openai = pytest.importorskip("openai", reason="the OpenAI SDK is not installed: pip install openai")

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": %d, "b": %d}}\n</tool_call>'
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def agent(body):
    """An agent class whose run is ``body(self, messages)``; its reward is 1."""

    async def run(self, messages, **row):
        await body(self, messages)
        return {"messages": [], "reward": 1.0}

    return type("Agent", (BaseAgentGraph,), {"run": run})


def client_of(door, **kwargs):
    kwargs = {"max_retries": 0, **kwargs}
    return openai.AsyncOpenAI(base_url=door.base_url, api_key=door.api_key, **kwargs)


async def tool_loop(client, messages, **kwargs):
    """What a user writes: ask, run the calls, until there are none. Returns the last answer."""
    messages = list(messages)
    while True:
        asked = client.chat.completions.create(
            model="gpt-5", messages=messages, tools=[ADD], **kwargs
        )
        message = (await asked).choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return message.content
        for call in message.tool_calls:
            said = str(sum(json.loads(call.function.arguments).values()))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})


def text_and_mask(trajectory, tokenizer):
    from chatlearn.algorithm.samples import to_samples

    short = {"<|im_start|>": "{", "<|im_end|>": "}"}
    rows = []
    for sample in to_samples(trajectory, 1.0):
        pieces = [tokenizer.decode([i]) for i in sample.token_ids]
        text = "".join(short.get(p, p) for p in pieces).replace("\n", "/")
        rows.append((text, "".join("_^"[trained] for trained in sample.loss_mask)))
    return rows


def test_a_tool_loop_of_the_openai_sdk_is_one_row(run_graph, tokenizer):
    said = []

    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            said.append(await tool_loop(client, messages))

    trajectory = run_graph(agent(body), [CALL % (2, 2), "It is 4"])

    call = '<tool_call>/{"name": "add", "arguments": {"a": 2, "b": 2}}/</tool_call>}'
    answered = "/{user/<tool_response>/4/</tool_response>}/{assistant/"
    [(text, mask)] = text_and_mask(trajectory, tokenizer)
    start = "{user/2+2?}/{assistant/"
    assert text == start + call + answered + "It is 4}"
    assert mask == "_" * len(start) + "^" * len(call) + "_" * len(answered) + "^" * len("It is 4}")
    assert said == ["It is 4"]
    assert trajectory.outcome is Outcome.FINISHED
    assert [(turn.parent, turn.fork) for turn in trajectory.turns] == [(None, None), (0, None)]


async def streamed(client, **kwargs):
    """The message a streaming client puts together, and the last finish reason and usage."""
    content, calls, finish, usage = "", {}, None, None
    stream = await client.chat.completions.create(
        model="m", stream=True, stream_options={"include_usage": True}, **kwargs
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            content += choice.delta.content or ""
            for piece in choice.delta.tool_calls or []:
                call = calls.setdefault(piece.index, {"id": "", "name": "", "arguments": ""})
                call["id"] += piece.id or ""
                call["name"] += piece.function.name or ""
                call["arguments"] += piece.function.arguments or ""
    return content, list(calls.values()), finish, usage


def test_a_stream_adds_up_to_the_answer_and_its_turn_is_continued(run_graph):
    seen = []

    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            content, [call], finish, usage = await streamed(client, messages=messages, tools=[ADD])
            seen.append((content, call["name"], json.loads(call["arguments"]), finish))
            assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens
            function = {"name": call["name"], "arguments": call["arguments"]}
            spoken = {
                "role": "assistant",
                "content": content,
                "tool_calls": [{"id": call["id"], "type": "function", "function": function}],
            }
            heard = {"role": "tool", "tool_call_id": call["id"], "content": "4"}
            more = [*messages, spoken, heard]
            seen.append((await streamed(client, messages=more, tools=[ADD]))[0])

    trajectory = run_graph(agent(body), ["I add. " + CALL % (2, 2), "It is 4, or so I was told"])

    assert seen == [
        ("I add.", "add", {"a": 2, "b": 2}, "tool_calls"),
        "It is 4, or so I was told",
    ]
    assert [(turn.parent, turn.fork) for turn in trajectory.turns] == [(None, None), (0, None)]


THOUGHT = "<think>\nTwo and two.\n</think>\n\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m,
        lambda m: m | {"reasoning_content": None},  # most clients drop it
        lambda m: m | {"content": None},
        lambda m: m | {"content": [{"type": "text", "text": "So: "}]},
        lambda m: m | {"content": " So:", "name": "Friday"},
    ],
    ids=["as sent", "no reasoning", "no content", "parts", "stripped"],
)
def test_a_message_that_the_client_wrote_anew_still_finds_its_turn(run_graph, change):
    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            ask = client.chat.completions.create
            first = (await ask(model="m", messages=messages, tools=[ADD])).choices[0].message
            call = first.tool_calls[0].model_dump()
            given = json.loads(call["function"]["arguments"])
            call["function"]["arguments"] = json.dumps(dict(reversed(given.items())), indent=1)
            spoken = first.model_dump(exclude={"tool_calls"}) | {"tool_calls": [call]}
            heard = {"role": "tool", "tool_call_id": call["id"], "content": "4"}
            await ask(model="m", messages=[*messages, change(spoken), heard], tools=[ADD])

    trajectory = run_graph(agent(body), [THOUGHT + "So: " + CALL % (2, 2), "4"])
    assert [(turn.parent, turn.fork) for turn in trajectory.turns] == [(None, None), (0, None)]


@pytest.mark.parametrize(
    "edit",
    [
        lambda m, call: m | {"reasoning_content": "Three and one."},
        lambda m, call: m | {"content": "Then:"},
        lambda m, call: call["function"].update(arguments='{"a": 3, "b": 1}') or m,
        lambda m, call: call["function"].update(name="sub") or m,
        lambda m, call: call.update(id="mine") or m,
    ],
    ids=["reasoning", "content", "arguments", "tool", "id"],
)
def test_an_edited_call_begins_another_row(run_graph, edit):
    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            ask = client.chat.completions.create
            first = (await ask(model="m", messages=messages, tools=[ADD])).choices[0].message
            spoken = first.model_dump(exclude_none=True)
            [call] = spoken["tool_calls"]
            spoken = edit(spoken, call)
            heard = {"role": "tool", "tool_call_id": call["id"], "content": "4"}
            await ask(model="m", messages=[*messages, spoken, heard], tools=[ADD])

    trajectory = run_graph(agent(body), [THOUGHT + "So: " + CALL % (2, 2), "4"])
    assert [turn.parent for turn in trajectory.turns] == [None, None]


def test_a_message_that_was_edited_begins_another_row(run_graph):
    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            ask = client.chat.completions.create
            await ask(model="m", messages=messages)
            edited = [*messages, {"role": "assistant", "content": "Five."}]
            await ask(model="m", messages=[*edited, {"role": "user", "content": "Sure?"}])

    trajectory = run_graph(agent(body), ["Four.", "Yes."])
    assert [turn.parent for turn in trajectory.turns] == [None, None]
    assert trajectory.turns[1].fork is not None


def test_answers_that_say_the_same_are_told_apart_by_their_place(run_graph):
    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            for _ in range(3):
                asked = client.chat.completions.create(model="m", messages=messages)
                said = (await asked).choices[0].message.content
                spoken = {"role": "assistant", "content": said}
                messages = [*messages, spoken, {"role": "user", "content": "Sure?"}]

    thoughts = [f"<think>\n{i}\n</think>\n\nYes" for i in range(3)]
    trajectory = run_graph(agent(body), thoughts)
    assert [(turn.parent, turn.fork) for turn in trajectory.turns] == [
        (None, None),
        (0, None),
        (1, None),
    ]


def test_a_call_that_cannot_be_read_is_text_and_stays_one_row(run_graph):
    said = []

    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            said.append(await tool_loop(client, messages))
            spoken = {"role": "assistant", "content": said[0]}
            more = [*messages, spoken, {"role": "user", "content": "Again."}]
            said.append(await tool_loop(client, more))

    trajectory = run_graph(agent(body), ['<tool_call>\n{"name": "add", 7}\n</tool_call>', "4"])
    assert said == ['{"name": "add", 7}', "4"]
    assert trajectory.metrics["invalid_tool_calls"] == 1
    assert [turn.parent for turn in trajectory.turns] == [None, 0]


def test_a_plain_run_uses_the_sync_client_in_its_thread(run_graph):
    class Sync(BaseAgentGraph):
        def run(self, messages, **row):
            with (
                self.endpoint() as door,
                openai.OpenAI(base_url=door.base_url, api_key=door.api_key) as client,
            ):
                assert [m.id for m in client.models.list()] == [door.model]
                answer = client.chat.completions.create(model=door.model, messages=messages)
            return {"messages": [], "reward": float(answer.choices[0].message.content)}

    assert run_graph(Sync, ["0.5"]).reward == 0.5


def test_a_loop_of_its_own_and_a_subprocess_ask_in_the_same_run(run_graph):
    code = (
        "import openai; c = openai.OpenAI(); m = [{'role': 'user', 'content': 'from outside'}];"
        "print(c.chat.completions.create(model='m', messages=m).choices[0].message.content)"
    )

    class Apart(BaseAgentGraph):
        def run(self, messages, **row):
            asyncio.run(self._inside(messages))
            return {"messages": [], "reward": 1.0}

        async def _inside(self, messages):
            async with self.endpoint() as door:
                async with client_of(door) as client:
                    await client.chat.completions.create(model="m", messages=messages)
                env = {"OPENAI_BASE_URL": door.base_url, "OPENAI_API_KEY": door.api_key}
                done = subprocess.run(
                    [sys.executable, "-c", code], env=env, capture_output=True, text=True
                )
                assert done.stdout.strip() == "outside", done.stderr

    trajectory = run_graph(Apart, ["inside", "outside"], timeout_s=60.0)
    assert trajectory.outcome is Outcome.FINISHED, trajectory.error
    assert len(trajectory.turns) == 2


async def post(door, body, *, key=None, headers=None, content=None, path="/chat/completions"):
    key = door.api_key if key is None else key
    headers = {"authorization": f"Bearer {key}"} | (headers or {})
    async with httpx.AsyncClient(trust_env=False) as client:
        if content is None:
            content = json.dumps(body)
        return await client.post(door.base_url + path, content=content, headers=headers)


def test_a_key_opens_its_own_run_and_no_other(run_graph):
    seen = []

    async def body(self, messages):
        asked = {"messages": messages}
        async with self.endpoint() as door, self.endpoint() as other:
            assert door.base_url == other.base_url
            assert door.api_key != other.api_key
            assert door.api_key not in repr(door)
            async with httpx.AsyncClient(trust_env=False) as client:
                seen.append(await client.post(door.base_url + "/chat/completions", json=asked))
            seen.append(await post(door, asked, key="sk-chatlearn-wrong"))
            seen.append(await post(door, asked, key=door.api_key[:-1]))
            seen.append(await post(door, asked))
        seen.append(await post(door, asked))

    trajectory = run_graph(agent(body), ["4"])
    assert [answer.status_code for answer in seen] == [401, 401, 401, 200, 401]
    assert "no API key" in seen[0].json()["error"]["message"]
    assert "wrong API key" in seen[1].json()["error"]["message"]
    assert seen[4].json()["error"] == {
        "message": "the agent run of this key is over",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert len(trajectory.turns) == 1


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
ASK = [{"role": "user", "content": "?"}]
BAD_CALL = {"id": "x", "type": "function", "function": {"name": "add", "arguments": "{"}}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": ASK, "logit_bias": {"1": 5}}, "unknown key 'logit_bias'; known: "),
        ({"messages": ASK, "temperature": -1, "n": 99}, "temperature: Input should be greater"),
        ({"messages": ASK, "temperature": -1, "n": 99}, "n: Input should be less than or equal"),
        ({"messages": ASK, "presence_penalty": 0.5}, "presence_penalty=0.5 is not supported"),
        ({"messages": ASK, "top_logprobs": 3}, "top_logprobs=3 is not supported"),
        ({"messages": ASK, "tool_choice": "required"}, "without tools"),
        ({"messages": ASK, "stop": ["", "x"]}, "give strings that are not empty"),
        ({"messages": ASK, "response_format": {"type": "yaml"}}, "is not known"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "only text can be trained"),
        ({"messages": [{"role": "judge", "content": ""}]}, "role 'judge' is not known"),
        ({"messages": [{"role": "user"}]}, "messages.0: content must be text"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "needs tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]}, "must be a JSON object"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(run_graph, asked, said):
    seen = []

    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            seen.append(await post(door, asked))
            await client.chat.completions.create(model="m", messages=messages)

    trajectory = run_graph(agent(body), ["4"])
    assert seen[0].status_code == 400
    assert said in seen[0].json()["error"]["message"]
    assert trajectory.outcome is Outcome.FINISHED


def test_what_is_not_there_and_what_is_too_large_is_said(run_graph, monkeypatch):
    monkeypatch.setattr("chatlearn.models.agent.endpoint.server.MAX_BODY_BYTES", 1000)
    seen = []

    async def pieces():
        for _ in range(200):
            yield b"x" * 10

    async def body(self, messages):
        async with self.endpoint() as door:
            seen.append(await post(door, {}, path="/embeddings"))
            seen.append(await post(door, {}, content=b"x" * 1001))
            seen.append(await post(door, {}, content=pieces()))
            seen.append(await post(door, {}, content=b"\xff\xfe"))
            seen.append(await post(door, {}, headers={"x-chatlearn-node": "a b"}))
            seen.append(await post(door, {"messages": messages}))

    run_graph(agent(body), ["4"])
    assert [a.status_code for a in seen] == [404, 413, 413, 400, 400, 200]
    assert "there are POST /v1/chat/completions" in seen[0].json()["error"]["message"]
    assert "is not a node's name" in seen[4].json()["error"]["message"]


def test_wishes_reach_the_engine(run_graph, say):
    requests = []

    def script(prompt_ids, sampling, session):
        requests.append(sampling)
        return say("4<|im_end|>")

    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            await client.chat.completions.create(
                model="m",
                messages=messages,
                temperature=0.5,
                top_p=0.9,
                stop="END",
                max_completion_tokens=7,
                seed=3,
                user="me",
                presence_penalty=0,
                extra_body={"top_k": 20},
            )

    trajectory = run_graph(agent(body), script)
    [sampling] = requests
    asked = sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens
    assert asked == (0.5, 0.9, 20, 7)
    assert sampling.stop == ("END",)
    assert trajectory.turns[0].temperature == 0.5


def test_a_forced_call_begins_in_the_prompt(run_graph, tokenizer):
    seen = []

    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            choice = {"type": "function", "function": {"name": "add"}}
            asked = client.chat.completions.create(
                model="m", messages=messages, tools=[ADD], tool_choice=choice
            )
            seen.append((await asked).choices[0].message.tool_calls[0].function)

    trajectory = run_graph(agent(body), ['{"a": 1, "b": 2}}\n</tool_call>'])
    assert (seen[0].name, json.loads(seen[0].arguments)) == ("add", {"a": 1, "b": 2})
    prompt = tokenizer.decode(trajectory.turns[0].prompt_ids)
    assert prompt.endswith('<tool_call>\n{"name": "add", "arguments": ')


def test_parallel_tool_calls_false_gives_the_first_call_only(run_graph):
    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            await tool_loop(client, messages, parallel_tool_calls=False)

    trajectory = run_graph(agent(body), [CALL % (1, 2) + "\n" + CALL % (3, 4), "3"])
    assert [turn.parent for turn in trajectory.turns] == [None, 0]
    assert [m["role"] for m in trajectory.messages] == ["user", "assistant", "tool", "assistant"]


def test_choices_are_turns_of_one_prompt_and_logprobs_are_the_engines(run_graph, say):
    replies = []

    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            asked = client.chat.completions.create(
                model="m", messages=messages, n=2, logprobs=True, metadata={"a": "b"}
            )
            replies.append(await asked)

    trajectory = run_graph(agent(body), ["4", "5"])
    [reply] = replies
    assert [choice.message.content for choice in reply.choices] == ["4", "5"]
    assert [choice.index for choice in reply.choices] == [0, 1]
    tokens = [(t.token, t.logprob) for t in reply.choices[0].logprobs.content]
    assert tokens == [("4", -0.5), ("<|im_end|>", -0.5)]
    assert reply.usage.completion_tokens == 4
    assert [turn.fork for turn in trajectory.turns] == [None, Fork.REPEAT]


def test_a_json_schema_is_shown_and_the_turn_goes_on(run_graph, tokenizer):
    shape = {"type": "object", "properties": {"sum": {"type": "integer"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "answer", "schema": shape}}

    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            ask = client.chat.completions.create
            first = await ask(model="m", messages=messages, response_format=asked)
            more = [*messages, first.choices[0].message, {"role": "user", "content": "Sure?"}]
            await ask(model="m", messages=more, response_format=asked)

    trajectory = run_graph(agent(body), ['{"sum": 4}', '{"sum": 5}'])
    assert [turn.parent for turn in trajectory.turns] == [None, 0]
    prompt = tokenizer.decode(trajectory.turns[0].prompt_ids)
    assert prompt.startswith("<|im_start|>system\n")
    assert json.dumps(shape) in prompt


def test_a_header_names_the_node(run_graph):
    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            for node in ("planner", "team/writer"):
                asked = {"x-chatlearn-node": node}
                await client.chat.completions.create(
                    model="m", messages=messages, extra_headers=asked
                )

    trajectory = run_graph(agent(body), ["a", "b"])
    assert [turn.path for turn in trajectory.turns] == ["planner", "team/writer"]


def test_a_door_opened_in_a_graph_node_knows_the_node(run_graph):
    from langgraph.graph import START, MessagesState, StateGraph

    class InANode(BaseAgentGraph):
        def build_graph(self):
            async def draft(state: MessagesState):
                async with self.endpoint() as door, client_of(door) as client:
                    asked = [{"role": "user", "content": state["messages"][0].content}]
                    said = await client.chat.completions.create(model="m", messages=asked)
                return {"messages": [("ai", said.choices[0].message.content)]}

            graph = StateGraph(MessagesState)
            graph.add_node("draft", draft)
            graph.add_edge(START, "draft")
            return graph

    trajectory = run_graph(InANode, ["4"], reward_function=lambda response: float(response))
    assert (trajectory.reward, trajectory.turns[0].path) == (4.0, "draft")
    assert trajectory.turns[0].step == 1


def test_a_spent_budget_is_said_in_openais_words_and_truncates_the_run(run_graph):
    codes = []

    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            ask = client.chat.completions.create
            await ask(model="m", messages=messages)
            try:
                await ask(model="m", messages=messages)
            except openai.BadRequestError as error:
                codes.append(error.code)
                raise

    budget = Budget(turn_tokens=10, rollout_tokens=2, context_tokens=1000)
    trajectory = run_graph(agent(body), ["4"], budget=budget, reward_function=lambda: 0.0)
    assert codes == ["context_length_exceeded"]
    assert trajectory.outcome is Outcome.TRUNCATED


def test_a_cut_answer_says_length(run_graph):
    seen = []

    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            asked = client.chat.completions.create(model="m", messages=messages)
            seen.append((await asked).choices[0].finish_reason)

    assert run_graph(agent(body), ["abc…"]).outcome is Outcome.TRUNCATED
    assert seen == ["length"]


def test_an_engine_fault_is_a_503_that_is_not_tried_again(run_graph):
    calls = []

    async def body(self, messages):
        async with self.endpoint() as door, client_of(door, max_retries=2) as client:
            for _ in range(2):
                calls.append(1)
                await client.chat.completions.create(model="m", messages=messages)

    trajectory = run_graph(agent(body), ["4"])
    assert trajectory.outcome is Outcome.ENGINE_ERROR
    assert "the script has 1 answers" in trajectory.error


class Waiting(ScriptedEngine):
    """Never answers; says how many wait and how many were cancelled."""

    def __init__(self) -> None:
        super().__init__([])
        self.waiting = asyncio.Event()
        self.cancelled = 0

    async def generate(self, prompt_ids, sampling, *, session):
        self.requests.append(session)
        self.waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def test_a_client_that_leaves_cancels_its_call(run_graph, caplog):
    engine = Waiting()

    async def body(self, messages):
        async with self.endpoint() as door, client_of(door, timeout=0.2) as client:
            with pytest.raises(openai.APITimeoutError):
                await client.chat.completions.create(model="m", messages=messages)
            while not engine.cancelled:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)

    trajectory = run_graph(agent(body), [], engine=engine)
    assert engine.cancelled == 1
    assert trajectory.outcome is not Outcome.TIMEOUT
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("ending", ["the run returns", "the run times out"])
def test_the_end_of_the_run_ends_its_calls_without_a_word(run_graph, caplog, ending):
    engine, errors, tasks = Waiting(), [], []

    async def body(self, messages):
        async def ask(client):
            try:
                await client.chat.completions.create(model="m", messages=messages)
            except openai.APIStatusError as error:
                errors.append(error.message)

        client = None
        async with self.endpoint() as door:
            client = client_of(door)
            tasks.append(asyncio.create_task(ask(client)))
            await engine.waiting.wait()
            if ending == "the run times out":
                await asyncio.sleep(60)
        await tasks[0]

    with caplog.at_level(logging.DEBUG):
        trajectory = run_graph(agent(body), [], engine=engine, timeout_s=3.0)
    assert engine.cancelled == 1
    if ending == "the run returns":
        assert "the agent run of this key is over" in errors[0]
    else:
        assert trajectory.outcome is Outcome.TIMEOUT
    loud = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert not loud, loud


def test_too_many_at_once_are_refused(run_graph, monkeypatch):
    monkeypatch.setattr("chatlearn.models.agent.endpoint.door.MAX_AT_ONCE", 2)
    engine, seen = Waiting(), []

    async def body(self, messages):
        async with self.endpoint() as door:
            asks = [asyncio.create_task(post(door, {"messages": messages})) for _ in range(2)]
            while len(engine.requests) < 2:
                await asyncio.sleep(0.01)
            seen.append(await post(door, {"messages": messages}))
        await asyncio.gather(*asks)

    run_graph(agent(body), [], engine=engine)
    assert seen[0].status_code == 429
    assert seen[0].json()["error"]["code"] == "too_many_requests"


def test_an_aborted_answer_ends_the_door(run_graph, say):
    aborted = Completion(say("4"), [-0.5], StopReason.ABORT, (0, 0))
    seen = []

    async def body(self, messages):
        async with self.endpoint() as door:
            seen.extend([await post(door, {"messages": messages}) for _ in range(2)])

    run_graph(agent(body), lambda *_: aborted)
    assert [answer.status_code for answer in seen] == [401, 401]


def test_outside_a_run_there_is_no_door(llm, tokenizer):
    alone = BaseAgentGraph("alone", SimpleNamespace(), llm, tokenizer)

    async def opens():
        async with alone.endpoint():
            pass

    with pytest.raises(AgentError, match="outside an agent run"):
        asyncio.run(opens())
    with pytest.raises(AgentError, match="outside an agent run"), alone.endpoint():
        pass


def test_with_on_the_event_loop_is_refused(run_graph):
    async def body(self, messages):
        with self.endpoint():
            pass

    trajectory = run_graph(agent(body), ["4"])
    assert "use `async with self.endpoint()`" in trajectory.error


def test_a_connection_that_sends_nothing_is_closed(run_graph, monkeypatch):
    monkeypatch.setattr("chatlearn.models.agent.endpoint.server.HEADERS_S", 0.1)

    async def body(self, messages):
        async with self.endpoint() as door:
            url = httpx.URL(door.base_url)
            reader, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n")
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()

    run_graph(agent(body), [])


INTERRUPTED = """
import asyncio, os, signal, sys
import openai
from chatlearn.models.agent import BaseAgentGraph
from chatlearn.models.agent.agent_run import run_agent
from chatlearn.models.agent.chat_model import CustomChatModel
from chatlearn.models.agent.prompt_builder import PromptBuilder
from chatlearn.models.agent.tool_parser import tool_parser
from chatlearn.types import Budget, SamplingParams, Session, Task
from transformers import AutoTokenizer

class Never:
    async def generate(self, prompt_ids, sampling, *, session):
        asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
    async def abort(self, session):
        pass

class Asks(BaseAgentGraph):
    async def run(self, messages, **row):
        async with self.endpoint() as door:
            client = openai.AsyncOpenAI(base_url=door.base_url, api_key=door.api_key)
            await client.chat.completions.create(model="m", messages=messages)

async def main():
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    prompts = PromptBuilder(tokenizer, [tokenizer.eos_token_id])
    llm = CustomChatModel(tokenizer=tokenizer, prompts=prompts, parser=tool_parser("hermes"))
    task = Task("t:0", [{"role": "user", "content": "?"}], "a", None, "t", None)
    running = asyncio.create_task(run_agent(
        Asks("a", None, llm, tokenizer), task, engine=Never(), sampling=SamplingParams(),
        budget=Budget(8, 8, 99), session=Session("0", "0"), reward_function=None, timeout_s=60,
    ))
    await asyncio.sleep(60)  # asyncio.run cancels the run, its client and the server together

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_is_the_runs_own_and_ends_without_a_word(tiny_policy):
    command = [sys.executable, "-W", "ignore", "-c", INTERRUPTED, tiny_policy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "interrupted\n")
    assert not done.stderr


def test_an_answer_is_sent_at_once(run_graph, say):
    """Not 40 ms later, as where the kernel waits for more to send (Nagle's algorithm)."""
    seconds = []

    async def body(self, messages):
        async with self.endpoint() as door, client_of(door) as client:
            await client.models.list()
            for _ in range(10):
                started = time.perf_counter()
                await client.chat.completions.create(model="m", messages=messages)
                seconds.append(time.perf_counter() - started)

    run_graph(agent(body), lambda *_: say("4<|im_end|>"))
    assert min(seconds) < 0.02


class AsksTwiceAsync(BaseAgentGraph):
    async def run(self, messages, **row):
        async with self.endpoint() as door, client_of(door) as client:
            for _ in range(2):
                asked = client.chat.completions.create(model="m", messages=messages)
                said = (await asked).choices[0].message.content
                again = {"role": "user", "content": "again"}
                messages = [*messages, {"role": "assistant", "content": said}, again]
        return {"messages": [], "reward": 1.0}


class AsksTwiceInAThread(BaseAgentGraph):
    def run(self, messages, **row):
        with (
            self.endpoint() as door,
            openai.OpenAI(base_url=door.base_url, api_key=door.api_key) as client,
        ):
            for _ in range(2):
                asked = client.chat.completions.create(model="m", messages=messages)
                said = asked.choices[0].message.content
                again = {"role": "user", "content": "again"}
                messages = [*messages, {"role": "assistant", "content": said}, again]
        return {"messages": [], "reward": 1.0}


class OpensTheDoorAroundTheThread(AsksTwiceInAThread):
    """The thread's client asks by a door that was opened outside it."""

    async def run(self, messages, **row):
        async with self.endpoint() as door:
            held = contextlib.nullcontext(door)
            self_with_door = SimpleNamespace(endpoint=lambda: held)
            work = functools.partial(AsksTwiceInAThread.run, self_with_door, messages)
            return await asyncio.to_thread(work)


def embedded_runs(agent_class, policy, tokenizer, llm, *, count):
    """``count`` runs at once beside an embedded engine, as ``LocalCluster`` has them; returns the
    trajectories and the engine's counters."""
    from transformers import AutoModelForCausalLM

    from chatlearn.models.agent.agent_run import run_agent
    from chatlearn.models.engine.embedded import EmbeddedEngine
    from chatlearn.models.engine.lockstep import Lockstep
    from chatlearn.types import SamplingParams, Session, Task

    async def one(engine, lockstep, i):
        task = Task(f"test:{i}", [{"role": "user", "content": f"say {i}"}], "a", None, "t", None)
        with lockstep.run():
            return await run_agent(
                agent_class("a", None, llm, tokenizer),
                task,
                engine=engine,
                sampling=SamplingParams(),
                budget=Budget(8, 16, 256),
                session=Session(f"0:test:{i}", "0.0"),
                reward_function=None,
                timeout_s=60.0,
            )

    async def all_of_them():
        lockstep = Lockstep()
        engine = EmbeddedEngine(
            AutoModelForCausalLM.from_pretrained(policy),
            eos_token_ids=[tokenizer.eos_token_id],
            max_slots=count,
            max_context=256,
            lockstep=lockstep,
        )
        asyncio.get_running_loop().set_default_executor(lockstep.executor)
        trajectories = await asyncio.gather(*(one(engine, lockstep, i) for i in range(count)))
        return trajectories, engine.stats()

    return asyncio.run(all_of_them())


@pytest.mark.parametrize(
    "agent_class", [AsksTwiceAsync, AsksTwiceInAThread, OpensTheDoorAroundTheThread]
)
def test_the_embedded_engine_keeps_step_with_agents_at_sockets(
    agent_class, tiny_policy, tokenizer, llm
):
    """Without the context of the run, each step would wait ``patience_s`` for agents that wait for
    the engine themselves, and agents in threads would wait for ever."""
    run = {"policy": tiny_policy, "tokenizer": tokenizer, "llm": llm, "count": 16}
    trajectories, stats = embedded_runs(agent_class, **run)

    assert {t.outcome for t in trajectories} <= {Outcome.FINISHED, Outcome.TRUNCATED}
    assert all([turn.parent for turn in t.turns] == [None, 0] for t in trajectories)
    assert stats["engine/unsynchronised_steps"] == 0
    assert stats["engine/mean_batch"] > 8
    assert max(t.metrics["seconds"] for t in trajectories) < 10.0


def test_the_example_agent_works_out_what_the_model_asks_for(run_graph):
    from chatlearn.models.agent.examples.openai_sdk_agent import OpenAISDKAgent

    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>'
    trajectory = run_graph(
        OpenAISDKAgent, [call, "42"], reward_function=lambda response: float(response)
    )
    assert trajectory.reward == 42.0
    said = [(m["role"], m["content"]) for m in trajectory.messages]
    assert said == [("user", "2+2?"), ("assistant", ""), ("tool", "42"), ("assistant", "42")]
