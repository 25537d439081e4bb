"""Laws 1 and 2 for histories nobody thought of: whatever a graph does to its messages between two
calls, every sampled token is trained in exactly one position, after exactly the tokens that the
engine was given, and the policy's own words are never rendered again.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

from chatlearn.algorithm.samples import to_samples
from chatlearn.models.agent.asking import Policy, Wish, ask
from chatlearn.models.agent.messages import to_openai
from chatlearn.models.agent.run import Run
from chatlearn.models.engine.scripted import ScriptedEngine
from chatlearn.types import Budget, Completion, SamplingParams, Session, StopReason, Trajectory

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{ "arguments":{"a":1},  "name":"add" }</tool_call>'
"""The template would write it otherwise."""
PLAIN = ["yes", "no", "x" * 9, "", "two  spaces\n", "é", "<|im_end|", "cut…"]
"""The template writes these as they are."""
CHANGES = ["go on", "go on", "go on", "ask again", "edit", "drop", "swap", "summarise", "fresh"]
CHANGES += ["back", "tools", "rebuild", "edit answer", "fan out"]


def steps(*answers: str):
    step = st.tuples(st.sampled_from(CHANGES), st.integers(0, 7), st.sampled_from(answers))
    return st.lists(step, min_size=1, max_size=9)


def changed(history: list, what: str, where: int) -> list:
    """``history`` as a graph might hand it over next."""
    new, at = list(history), where % max(len(history), 1)
    answers = [i for i, m in enumerate(new) if isinstance(m, AIMessage)]
    if what == "edit":
        new[at] = HumanMessage(f"edited {where}")
    elif what == "drop" and len(new) > 2:
        del new[at]
    elif what == "swap" and len(new) > 2:
        other = (at + 2) % len(new)
        new[at], new[other] = new[other], new[at]
    elif what == "summarise":
        new = [HumanMessage(f"summary {where}"), *new[max(1, len(new) - 2) :]]
    elif what == "fresh":
        new = [SystemMessage(f"you are number {where}"), HumanMessage("begin")]
    elif what == "back":
        new = new[: at + 1]
    elif what == "rebuild":
        new = [m.model_copy(update={"id": None}) for m in new]
    elif what == "edit answer" and answers:
        at = answers[where % len(answers)]
        new[at] = new[at].model_copy(update={"content": f"{new[at].content} edited"})
    if what != "ask again":
        calls = getattr(new[-1], "tool_calls", None)
        new += [ToolMessage("3", tool_call_id=c["id"]) for c in calls or []]
        if not calls:
            new.append(HumanMessage(f"and {where}?"))
    return new


@pytest.fixture(scope="session")
def policy(llm) -> Policy:
    return llm.policy


def replay(
    policy: Policy, say, steps, listens=lambda messages: None
) -> tuple[Run, dict[str, AIMessage]]:
    """Ask as ``steps`` say: the run, whose recorder holds what came of it, and its answers."""
    texts: list[str] = []
    answers: dict[str, AIMessage] = {}

    def answer(prompt_ids, sampling, session) -> Completion:
        text = texts.pop()
        ids = say(text[:-1] if text.endswith("…") else text + "<|im_end|>")
        reason = StopReason.LENGTH if text.endswith("…") else StopReason.STOP
        return Completion(ids, [-0.1 * i for i in range(len(ids))], reason, (0, 0))

    async def main() -> Run:
        run = Run(
            Session("g", "0.0"),
            ScriptedEngine(answer),
            SamplingParams(),
            Budget(10_000, 10_000, 100_000),
            asyncio.get_running_loop(),
        )
        history = [SystemMessage("be brief"), HumanMessage("hello")]
        for what, where, text in steps:
            listens(history)
            wish = Wish(tools=TOOLS) if what == "tools" else Wish()
            texts.extend([text] * (3 if what == "fan out" else 1))
            asked = [ask(run, policy, history, wish) for _ in texts]
            answered = await asyncio.gather(*asked)
            answers.update((message.id, message) for _, message in answered)
            history = changed([*history, answered[where % len(answered)][1]], what, where)
        return run

    return asyncio.run(main()), answers


@settings(max_examples=2000)
@given(steps=steps(*PLAIN, CALL), excluded=st.sets(st.integers(0, 12)))
def test_every_sampled_token_is_trained_once_after_what_the_engine_was_given(
    policy, say, steps, excluded
):
    run, _ = replay(policy, say, steps)
    turns = run.recorder.turns
    for turn in turns:
        turn.excluded = "by the test" if turn.id in excluded else ""

    given_to_engine = [request.prompt_ids for request in run.engine.requests]
    assert sorted(given_to_engine) == sorted(turn.prompt_ids for turn in turns)
    sampled = Counter(
        (*turn.prompt_ids, *turn.completion.token_ids[: i + 1])
        for turn in turns
        if not turn.excluded
        for i in range(len(turn.completion.token_ids))
    )
    trained = Counter(
        tuple(sample.token_ids[: i + 1])
        for sample in to_samples(Trajectory(turns=turns, uid="g/0.0"), 1.0)
        for i, is_trained in enumerate(sample.loss_mask)
        if is_trained
    )
    assert trained == sampled


@settings(max_examples=500)
@given(steps=steps(*PLAIN))
def test_a_prompt_says_what_the_messages_say(policy, say, steps):
    """The oracle is a full rendering, which is equal where the template changes no answer."""
    asked = []
    run, _ = replay(policy, say, steps, asked.append)
    rendered = [policy.prompts.first([to_openai(m) for m in messages]) for messages in asked]
    prompts = [turn.prompt_ids for turn in run.recorder.turns]
    assert {tuple(ids) for ids in prompts} == {tuple(ids) for ids in rendered}


@settings(max_examples=1000)
@given(steps=steps(*PLAIN, CALL, CALL))
def test_what_the_policy_said_stands_in_later_prompts_as_it_was_sampled(policy, say, steps):
    """The prompt of a turn is made of whole completions and of rendered text between them: where
    its history holds an answer of the run unchanged, the answer's tokens are in the prompt."""
    run, answers = replay(policy, say, steps)

    async def again() -> None:
        run.loop = asyncio.get_running_loop()
        run.engine._script = lambda *request: say("done<|im_end|>")
        before = list(run.recorder.conversation)
        turn, _ = await ask(run, policy, [*before, HumanMessage("last")])
        rest = turn.prompt_ids
        for message in before[1:]:  # an answer that opens a prompt has nothing to follow
            if message.id in answers and message == answers[message.id]:
                said = run.recorder.turns[run.recorder.message_ids[message.id]]
                ids = said.completion.token_ids
                found = next(i for i in range(len(rest)) if rest[i : i + len(ids)] == ids)
                rest = rest[found + len(ids) :]

    asyncio.run(again())
