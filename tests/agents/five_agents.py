"""Five agents in the way that LangGraph's and LangChain's documentation writes such agents.

Nothing here knows of training but ``@register`` and the reward at the end. Small models write
rubbish, so every graph bears an answer that cannot be read, and ``bounded.yaml`` ends loops.

====================  ===============================================================
react                 ``create_agent`` with two tools
plan_and_execute      a plan as structured output, a ReAct sub-agent a step, replanning
supervisor            handoff tools that return ``Command(graph=Command.PARENT)``
map_reduce            subjects, one ``Send`` each, then the best
summarising_memory    a thread in a checkpointer, ``RemoveMessage`` and a summary
compacting_react      ``create_agent`` with ``SummarizationMiddleware``
====================  ===============================================================
"""

from __future__ import annotations

import json
import operator
from typing import Annotated, Literal
from uuid import uuid4

from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import HumanMessage, RemoveMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedState
from langgraph.types import Command, Send
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from chatlearn.models.agent import BaseAgentGraph, register
from chatlearn.rewards import reward


@tool
def count(word: str) -> str:
    """Count the letters of a word."""
    return f"{len(word)} letters"


@tool
def spell(word: str) -> str:
    """Spell a word."""
    return "-".join(word[:9])


@register("react")
class ReAct(BaseAgentGraph):
    def build_graph(self):
        return create_agent(self.llm, [count, spell], system_prompt="Use the tools.")


class Plan(BaseModel):
    """The steps to take."""

    steps: list[str] = Field(description="in their order")


class Response(BaseModel):
    """What the user is told."""

    response: str


class Act(BaseModel):
    """Answer the user, or plan on."""

    action: Response | Plan


class PlanExecute(TypedDict):
    input: str
    plan: list[str]
    past_steps: Annotated[list[tuple[str, str]], operator.add]
    response: str


@register("plan_and_execute")
class PlanAndExecute(BaseAgentGraph):
    def build_graph(self):
        asked = ChatPromptTemplate.from_messages([("system", "Make a plan."), ("user", "{input}")])
        again = ChatPromptTemplate.from_template("Goal: {input}\nDone: {past_steps}\nAct.")
        planner = (asked | self.llm.with_structured_output(Plan)).with_retry(
            retry_if_exception_type=(OutputParserException,),
            wait_exponential_jitter=False,
            stop_after_attempt=2,
        )
        replanner = again | self.llm.with_structured_output(Act)
        executor = create_agent(self.llm, [count], system_prompt="Do one step.")

        async def plan_step(state: PlanExecute):
            try:
                plan = await planner.ainvoke({"input": state["input"]})
            except OutputParserException:
                return {"plan": [state["input"]]}
            return {"plan": [step[:40] for step in plan.steps[:2]] or [state["input"]]}

        async def execute_step(state: PlanExecute):
            step = state["plan"][0]
            done = await executor.ainvoke({"messages": [("user", f"Step: {step}!")]})
            return {"past_steps": [(step, done["messages"][-1].text[:40])]}

        async def replan_step(state: PlanExecute):
            past = "; ".join(f"{step}: {done}" for step, done in state["past_steps"][-2:])
            try:
                act = await replanner.ainvoke({"input": state["input"], "past_steps": past})
            except OutputParserException:
                return {"response": state["past_steps"][-1][1]}
            if isinstance(act.action, Response):
                return {"response": act.action.response}
            return {"plan": [step[:40] for step in act.action.steps[:2]] or [state["input"]]}

        def should_end(state: PlanExecute):
            return END if state.get("response") is not None else "agent"

        graph = StateGraph(PlanExecute)
        graph.add_node("planner", plan_step)
        graph.add_node("agent", execute_step)
        graph.add_node("replan", replan_step)
        graph.add_edge(START, "planner")
        graph.add_edge("planner", "agent")
        graph.add_edge("agent", "replan")
        graph.add_conditional_edges("replan", should_end, ["agent", END])
        return graph.compile()


def handoff(agent: str):
    """A tool with which a supervisor hands the conversation to ``agent``."""

    @tool(f"ask_{agent}", description=f"Ask the {agent}.")
    def transfer(
        word: str,
        state: Annotated[MessagesState, InjectedState],
        tool_call_id: Annotated[str, InjectedToolCallId],
    ) -> Command:
        told = ToolMessage(f"{agent}, take {word[:9]}.", tool_call_id=tool_call_id)
        return Command(
            goto=agent,
            update={"messages": [*state["messages"], told]},
            graph=Command.PARENT,
        )

    return transfer


@register("supervisor")
class Supervisor(BaseAgentGraph):
    def build_graph(self):
        poet = create_agent(self.llm, [], system_prompt="You rhyme.", name="poet")
        sage = create_agent(self.llm, [count], system_prompt="You count.", name="sage")
        supervisor = create_agent(
            self.llm,
            [handoff("poet"), handoff("sage")],
            system_prompt="You hand over.",
            name="supervisor",
        )
        graph = StateGraph(MessagesState)
        graph.add_node(supervisor, destinations=("poet", "sage", END))
        graph.add_node(poet)
        graph.add_node(sage)
        graph.add_edge(START, "supervisor")
        graph.add_edge("poet", "supervisor")
        graph.add_edge("sage", "supervisor")
        return graph.compile()


class Subjects(BaseModel):
    """Things that belong to a topic."""

    subjects: list[str]


class BestJoke(BaseModel):
    """Which joke is the best."""

    id: int


class Jokes(TypedDict):
    topic: str
    subjects: list[str]
    jokes: Annotated[list[str], operator.add]
    best_selected_joke: str


class OneSubject(TypedDict):
    subject: str


@register("map_reduce")
class MapReduce(BaseAgentGraph):
    def build_graph(self):
        lister = self.llm.with_structured_output(Subjects, include_raw=True)
        judge = self.llm.with_structured_output(BestJoke)

        async def generate_topics(state: Jokes):
            said = await lister.ainvoke(f"Three things of {state['topic']}")
            found = said["parsed"].subjects if said["parsed"] else []
            return {"subjects": [subject[:20] for subject in found[:3]] or [state["topic"]]}

        def generate_joke(state: OneSubject):  # a sync node: LangGraph runs it in a thread
            return {"jokes": [self.llm.invoke(f"A joke on {state['subject']}").text[:60]]}

        def continue_to_jokes(state: Jokes):
            return [Send("generate_joke", {"subject": subject}) for subject in state["subjects"]]

        async def best_joke(state: Jokes):
            numbered = "\n".join(f"{i}: {joke}" for i, joke in enumerate(state["jokes"]))
            try:
                best = await judge.ainvoke(f"Which of {state['topic']}?\n{numbered}")
            except OutputParserException:
                return {"best_selected_joke": state["jokes"][0]}
            return {"best_selected_joke": state["jokes"][best.id % len(state["jokes"])]}

        graph = StateGraph(Jokes)
        graph.add_node("generate_topics", generate_topics)
        graph.add_node("generate_joke", generate_joke)
        graph.add_node("best_joke", best_joke)
        graph.add_edge(START, "generate_topics")
        graph.add_conditional_edges("generate_topics", continue_to_jokes, ["generate_joke"])
        graph.add_edge("generate_joke", "best_joke")
        graph.add_edge("best_joke", END)
        return graph.compile()


class Summarised(MessagesState):
    summary: str


@register("summarising_memory")
class SummarisingMemory(BaseAgentGraph):
    """Several invocations on one thread; the row's column ``questions`` comes after its prompt.

    It sums up after the second answer, when nothing is old enough to go: that turn is a branch
    beside the third answer. After the third, four messages and the summary stay.
    """

    def build_graph(self):
        async def conversation(state: Summarised):
            messages = state["messages"]
            if summary := state.get("summary"):
                messages = [SystemMessage(f"Earlier: {summary}"), *messages]
            return {"messages": [await self.llm.ainvoke(messages)]}

        async def summarize_conversation(state: Summarised):
            asked = [*state["messages"], HumanMessage("Sum this up.")]
            said = await self.llm.ainvoke(asked)
            removed = [RemoveMessage(id=m.id) for m in state["messages"][:-4]]
            return {"summary": said.text[:60] if removed else "", "messages": removed}

        def should_continue(state: Summarised) -> Literal["summarize_conversation", "__end__"]:
            return "summarize_conversation" if len(state["messages"]) > 2 else END

        graph = StateGraph(Summarised)
        graph.add_node("conversation", conversation)
        graph.add_node("summarize_conversation", summarize_conversation)
        graph.add_edge(START, "conversation")
        graph.add_conditional_edges("conversation", should_continue)
        graph.add_edge("summarize_conversation", END)
        return graph.compile(checkpointer=InMemorySaver())

    async def run(self, *, messages, questions=(), **row):
        config = {"configurable": {"thread_id": str(uuid4())}}
        state = await self.graph.ainvoke({"messages": messages}, config)
        for question in questions:
            state = await self.graph.ainvoke({"messages": [("user", question)]}, config)
        return state


@register("compacting_react")
class CompactingReAct(BaseAgentGraph):
    def build_graph(self):
        compacts = SummarizationMiddleware(
            self.llm,
            trigger=("messages", 3),
            keep=("messages", 2),
            summary_prompt="Sum this up.\n{messages}",
        )
        return create_agent(self.llm, [count], system_prompt="Count on.", middleware=[compacts])


@reward("letters_a_to_m")
def letters_a_to_m(messages):
    """Share of a to m in all that the conversation says: a policy without skill can learn it."""
    text = "".join(m["content"] + json.dumps(m.get("tool_calls", "")) for m in messages).lower()
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter <= "m" for letter in letters) / max(len(letters), 1)
