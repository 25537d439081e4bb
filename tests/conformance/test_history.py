"""What a graph may do to its history, and what is trained then."""

from __future__ import annotations

import pytest
from langchain_core.messages import AIMessage, HumanMessage, RemoveMessage, trim_messages
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.message import REMOVE_ALL_MESSAGES

ODD = '<tool_call>{ "arguments":{},  "name":"f" }</tool_call>'


def conversation(*edits):
    """Asks "2+2?", then once after each edit of the messages so far."""

    async def run(self, messages, **row):
        messages = [HumanMessage(messages[0]["content"])]
        messages.append(await self.llm.ainvoke(messages))
        for edit in edits:
            messages = edit(messages, self.llm)
            messages.append(await self.llm.ainvoke(messages))
        return {"messages": messages}

    return run


def then(text):
    return lambda messages, llm: [*messages, HumanMessage(text)]


@pytest.mark.feature("trim_messages")
def test_trim_messages(play):
    """Messages fall out in front; the answers that stay are put in as they were sampled."""

    def trim(messages, llm):
        return trim_messages(
            [*messages, HumanMessage("c?")],
            max_tokens=len("{user/b?}/{assistant/" + ODD + "}/{user/c?}/{assistant/") + 10,
            token_counter=llm,
            strategy="last",
            start_on="human",
        )

    played = play(None, ["4", ODD, "C"], run=conversation(then("b?"), trim))
    assert played.rows == [
        f"{{user/2+2?}}/{{assistant/«4}}»/{{user/b?}}/{{assistant/«{ODD}}}»",
        f"{{user/b?}}/{{assistant/{ODD}}}/{{user/c?}}/{{assistant/«C}}»",
    ]
    assert played.tree == ["0: ", "1 < 0: ", "2: trimmed"]


@pytest.mark.feature("messages left out, nothing new")
def test_trimmed(play):
    def drop(messages, llm):
        return messages[2:3]

    played = play(None, ["4", "5", "6"], run=conversation(then("b?"), drop))
    assert played.rows == [
        "{user/2+2?}/{assistant/«4}»/{user/b?}/{assistant/«5}»",
        "{user/b?}/{assistant/«6}»",
    ]
    assert played.tree == ["0: ", "1 < 0: ", "2: trimmed"]


@pytest.mark.feature("RemoveMessage")
def test_remove_message(play):
    def build(self):
        async def speak(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"]), ("user", "go on")]}

        def forget(state: MessagesState):
            return {"messages": [RemoveMessage(m.id) for m in state["messages"][:2]]}

        def restart(state: MessagesState):
            kept = state["messages"][-1:]
            return {"messages": [RemoveMessage(REMOVE_ALL_MESSAGES), *kept]}

        graph = StateGraph(MessagesState)
        graph.add_sequence(
            [
                ("one", speak),
                ("two", speak),
                ("forget", forget),
                ("three", speak),
                ("restart", restart),
                ("four", speak),
            ]
        )
        graph.add_edge(START, "one")
        return graph

    played = play(build, ["a", "b", "c", "d"])
    assert played.rows == [
        "{user/2+2?}/{assistant/«a}»/{user/go on}/{assistant/«b}»",
        "{user/go on}/{assistant/b}/{user/go on}/{assistant/«c}»",
        "{user/go on}/{assistant/«d}»",
    ]
    assert played.tree == ["0: one", "1 < 0: two", "2: three, trimmed", "3: four, branch"]


@pytest.mark.feature("re-ordered history")
def test_reordered(play):
    def swap(messages, llm):
        first, answer, second, other = messages
        return [second, other, first, answer, second]

    played = play(None, ["4", "5", "6"], run=conversation(then("b?"), swap))
    assert played.rows[0] == "{user/2+2?}/{assistant/«4}»/{user/b?}/{assistant/«5}»"
    assert played.rows[1] == (
        "{user/b?}/{assistant/5}/{user/2+2?}/{assistant/4}/{user/b?}/{assistant/«6}»"
    )
    assert played.tree == ["0: ", "1 < 0: ", "2: reordered"]


@pytest.mark.feature("an edited answer")
def test_edited(play):
    """Words that the policy did not sample are context, also under the id of its message."""

    def edit(messages, llm):
        question, answer = messages
        better = AIMessage("Four.", id=answer.id)
        return [question, better, HumanMessage("sure?")]

    played = play(None, ["4", "yes"], run=conversation(edit))
    assert played.rows == [
        "{user/2+2?}/{assistant/«4}»",
        "{user/2+2?}/{assistant/Four.}/{user/sure?}/{assistant/«yes}»",
    ]
    assert played.tree == ["0: ", "1: edited"]


@pytest.mark.feature("a compacted history")
def test_compacted(play):
    def compact(messages, llm):
        return [HumanMessage("Summary: easy."), *messages[-1:], HumanMessage("and now?")]

    played = play(None, ["4", "5", "6"], run=conversation(then("b?"), compact))
    assert played.rows == [
        "{user/2+2?}/{assistant/«4}»/{user/b?}/{assistant/«5}»",
        "{user/Summary: easy.}/{assistant/5}/{user/and now?}/{assistant/«6}»",
    ]
    assert played.tree == ["0: ", "1 < 0: ", "2: compacted"]


@pytest.mark.feature("a message put into the middle")
def test_inserted(play):
    def insert(messages, llm):
        return [messages[0], HumanMessage("please"), messages[1], HumanMessage("and?")]

    played = play(None, ["4", "5"], run=conversation(insert))
    assert played.rows == [
        "{user/2+2?}/{assistant/«4}»",
        "{user/2+2?}/{user/please}/{assistant/4}/{user/and?}/{assistant/«5}»",
    ]
    assert played.tree == ["0: ", "1: edited"]


@pytest.mark.feature("an answer cut by its token limit")
def test_length(play):
    played = play(None, ["One, two…", "three"], run=conversation(then("go on")))
    assert played.rows == ["{user/2+2?}/{assistant/«One, two»}/{user/go on}/{assistant/«three}»"]
    assert played.tree == ["0: ", "1 < 0: "]
