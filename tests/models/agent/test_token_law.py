"""Law 1 and law 2 on real LangGraph: what is trained is what was sampled, drawn token by token.

The tokenizer has one token a byte, so a row of tokens can be written as text. In the pictures below
``_`` is context and ``^`` is a token the policy sampled.
"""

from __future__ import annotations

from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

from chatlearn.algorithm.samples import to_samples
from chatlearn.models.agent import BaseAgentGraph
from chatlearn.types import Fork, Outcome, Trajectory

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": %d, "b": %d}}\n</tool_call>'


@tool
async def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


class ToolAgent(BaseAgentGraph):
    def build_graph(self):
        llm = self.llm.bind_tools([add])

        async def agent(state: MessagesState):
            return {"messages": [await llm.ainvoke(state["messages"])]}

        graph = StateGraph(MessagesState)
        graph.add_node("agent", agent)
        graph.add_node("tools", ToolNode([add]))
        graph.add_edge(START, "agent")
        graph.add_conditional_edges("agent", tools_condition)
        graph.add_edge("tools", "agent")
        return graph


def picture(trajectory: Trajectory, tokenizer) -> list[tuple[str, str]]:
    """Each sample as ``(text, mask)``, the mask with ``^`` under every trained byte.

    Special tokens are shown as one character, so that text and mask have the same length.
    """
    short = {"<|im_start|>": "{", "<|im_end|>": "}"}
    rows = []
    for sample in to_samples(trajectory, 1.0):
        pieces = [tokenizer.decode([i]) for i in sample.token_ids]
        text = "".join(short.get(p, p) for p in pieces)
        mask = "".join("^" if trained else "_" for trained in sample.loss_mask)
        rows.append((text.replace("\n", "/"), mask))
    return rows


def test_a_tool_call_and_its_answer_are_one_row(run_graph, tokenizer):
    trajectory = run_graph(ToolAgent, [CALL % (2, 2), "It is 4"], reward_function=lambda: 1.0)

    call = '<tool_call>/{"name": "add", "arguments": {"a": 2, "b": 2}}/</tool_call>}'
    text = (
        "{user/2+2?}/{assistant/"
        + call
        + "/{user/<tool_response>/4/</tool_response>}/{assistant/"
        + "It is 4}"
    )
    mask = (
        "_" * len("{user/2+2?}/{assistant/")
        + "^" * len(call)
        + "_" * len("/{user/<tool_response>/4/</tool_response>}/{assistant/")
        + "^" * len("It is 4}")
    )
    assert picture(trajectory, tokenizer) == [(text, mask)]
    assert trajectory.outcome is Outcome.FINISHED
    assert [(turn.parent, turn.node, turn.step) for turn in trajectory.turns] == [
        (None, "agent", 1),
        (0, "agent", 3),
    ]


def test_parallel_tool_calls_are_all_run_and_answered_in_one_block(run_graph, tokenizer):
    both = CALL % (1, 2) + "\n" + CALL % (3, 4)
    trajectory = run_graph(ToolAgent, [both, "3 and 7"], reward_function=lambda: 1.0)

    [(text, mask)] = picture(trajectory, tokenizer)
    sampled = (both + "}").replace("\n", "/")
    added = (
        "/{user/<tool_response>/3/</tool_response>/<tool_response>/7/</tool_response>}/{assistant/"
    )
    start = len("{user/2+2?}/{assistant/")
    assert text[start:] == sampled + added + "3 and 7}"
    assert mask[start:] == "^" * len(sampled) + "_" * len(added) + "^" * len("3 and 7}")
    assert trajectory.metrics["tool_calls"] == 2


def test_what_was_sampled_is_never_rendered_again(run_graph, tokenizer, say):
    """A call the template would write otherwise (odd spaces, other key order) stays as sampled."""
    odd = '<tool_call>{ "arguments":{"b":2,  "a":2},"name":"add" }</tool_call>'
    trajectory = run_graph(ToolAgent, [odd, "4"], reward_function=lambda: 1.0)

    first, second = trajectory.turns
    assert second.prompt_ids[: len(first.token_ids)] == first.token_ids
    assert say(odd + "<|im_end|>") == first.completion.token_ids


def test_a_turn_cut_by_length_is_closed_as_the_template_would(run_graph, tokenizer):
    class TwoTurns(BaseAgentGraph):
        def build_graph(self):
            async def speak(state: MessagesState):
                first = await self.llm.ainvoke(state["messages"])
                more = [*state["messages"], first, ("user", "go on")]
                return {"messages": [first, await self.llm.ainvoke(more)]}

            graph = StateGraph(MessagesState)
            graph.add_node("speak", speak)
            graph.add_edge(START, "speak")
            return graph

    trajectory = run_graph(TwoTurns, ["One, two…", "three"], reward_function=lambda: 1.0)

    [(text, mask)] = picture(trajectory, tokenizer)
    assert text == "{user/2+2?}/{assistant/One, two}/{user/go on}/{assistant/three}"
    assert mask == (
        "_" * len("{user/2+2?}/{assistant/")
        + "^" * len("One, two")  # its end-of-turn token was not sampled, so it is not trained
        + "_" * len("}/{user/go on}/{assistant/")
        + "^" * len("three}")
    )


def test_an_edited_history_forks_and_each_token_is_trained_once(run_graph, tokenizer):
    class Summarises(BaseAgentGraph):
        def build_graph(self):
            async def work(state: MessagesState):
                draft = await self.llm.ainvoke(state["messages"])
                short = [("user", "Summary: " + draft.content), ("user", "Answer.")]
                return {"messages": [await self.llm.ainvoke(short)]}

            graph = StateGraph(MessagesState)
            graph.add_node("work", work)
            graph.add_edge(START, "work")
            return graph

    trajectory = run_graph(Summarises, ["a draft", "done"], reward_function=lambda: 1.0)

    assert [turn.parent for turn in trajectory.turns] == [None, None]
    assert [turn.fork for turn in trajectory.turns] == [None, Fork.FRESH]
    first, second = picture(trajectory, tokenizer)
    assert first[0] == "{user/2+2?}/{assistant/a draft}"
    assert second[0] == "{user/Summary: a draft}/{user/Answer.}/{assistant/done}"
    assert first[1].count("^") == len("a draft}")
    assert second[1].count("^") == len("done}")


def test_a_malformed_call_comes_back_to_the_graph(run_graph):
    seen = {}

    class Looks(ToolAgent):
        async def run(self, **kwargs):
            state = await self.graph.ainvoke({"messages": kwargs["messages"]})
            seen["message"] = state["messages"][-1]
            return state

    trajectory = run_graph(Looks, ['<tool_call>{"name": "add"'], reward_function=lambda: 0.0)

    assert seen["message"].tool_calls == []
    [call] = seen["message"].invalid_tool_calls
    assert "not JSON" in call["error"]
    assert call["args"] == '{"name": "add"'
    assert trajectory.metrics["invalid_tool_calls"] == 1
