"""Settings by node: who is trained, how each samples, what each earned, and who only helps."""

from __future__ import annotations

from typing import ClassVar

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.graph import START, MessagesState, StateGraph

from chatlearn.config.load import load_config
from chatlearn.errors import ConfigError
from chatlearn.models.agent import AgentGraphOutput, BaseAgentGraph
from chatlearn.models.agent.auxiliary import build_auxiliary
from chatlearn.models.agent.node_patterns import matches
from chatlearn.models.engine.scripted import ScriptedEngine
from chatlearn.types import NodeSampling, Outcome, SamplingParams, Score


@pytest.mark.parametrize(
    ("pattern", "agent", "path"),
    [
        ("*", "essay", "team/writer/model"),
        ("*", "essay", ""),
        ("model", "essay", "team/writer/model"),
        ("team", "essay", "team/writer/model"),
        ("team/writer", "essay", "team/writer/model"),
        ("team/*", "essay", "team/writer/model"),
        ("essay:team", "essay", "team/writer/model"),
        ("ess*:*", "essay", "x"),
    ],
)
def test_a_pattern_matches(pattern, agent, path):
    assert matches(pattern, agent, path)


@pytest.mark.parametrize("pattern", ["writer/model", "tea", "Team", "other:team", "writers"])
def test_a_pattern_does_not_match(pattern):
    assert not matches(pattern, "essay", "team/writer/model")


class Team(BaseAgentGraph):
    """``plan``, then a sub-graph ``team`` with the node ``write``."""

    extra: ClassVar[dict] = {}

    def build_graph(self):
        async def ask(state: MessagesState):
            return {"messages": [await self.llm.ainvoke(state["messages"]), ("user", "go on")]}

        team = StateGraph(MessagesState)
        team.add_node("write", ask)
        team.add_edge(START, "write")
        graph = StateGraph(MessagesState)
        graph.add_node("plan", ask)
        graph.add_node("team", team.compile())
        graph.add_edge(START, "plan")
        graph.add_edge("plan", "team")
        return graph

    async def run(self, **kwargs):
        return {**await self.graph.ainvoke({"messages": kwargs["messages"]}), **self.extra}


def test_turns_of_other_nodes_are_context(run_graph):
    trajectory = run_graph(
        Team, ["a plan", "a text"], reward_function=lambda: 1.0, trainable_nodes=["team"]
    )
    assert [turn.path for turn in trajectory.turns] == ["plan", "team/write"]
    assert [turn.excluded for turn in trajectory.turns] == [
        "node 'plan' is not in models.policy.trainable_nodes",
        "",
    ]


def test_a_run_of_which_no_node_is_trained_fails_and_says_so(run_graph):
    trajectory = run_graph(
        Team, ["a plan", "a text"], reward_function=lambda: 1.0, trainable_nodes=["writer"]
    )
    assert trajectory.outcome is Outcome.AGENT_ERROR
    assert "no turn of agent" in trajectory.error
    assert "node 'team/write' is not in models.policy.trainable_nodes" in trajectory.error


def test_nodes_sample_their_own_way_and_a_turn_knows_its_temperature(run_graph, say):
    engine = ScriptedEngine(["plan<|im_end|>", "text<|im_end|>"], tokenizer=Encodes(say))
    sampling = SamplingParams(
        temperature=1.0,
        nodes=(NodeSampling("write", temperature=0.5, max_tokens=7), NodeSampling("*", top_p=0.9)),
    )
    trajectory = run_graph(Team, [], reward_function=lambda: 1.0, engine=engine, sampling=sampling)
    plan, write = (request.sampling for request in engine.requests)
    assert (plan.temperature, plan.top_p, plan.nodes) == (1.0, 0.9, ())
    assert (write.temperature, write.top_p, write.max_new_tokens) == (0.5, 1.0, 7)
    assert [turn.temperature for turn in trajectory.turns] == [1.0, 0.5]


def test_a_node_that_samples_greedily_is_not_trained(run_graph):
    sampling = SamplingParams(nodes=(NodeSampling("plan", temperature=0.0),))
    trajectory = run_graph(
        Team, ["a plan", "a text"], reward_function=lambda: 1.0, sampling=sampling
    )
    assert [turn.excluded for turn in trajectory.turns] == ["greedy", ""]


class Rewarded(Team):
    extra: ClassVar = {
        "reward": 1.0,
        "node_rewards": {"team": 0.25, "plan": 0.5},
        "turn_rewards": {0: 0.75},
    }


def test_a_run_rewards_nodes_and_single_turns(run_graph):
    trajectory = run_graph(Rewarded, ["a plan", "a text"])
    assert trajectory.reward == 1.0
    assert [turn.reward for turn in trajectory.turns] == [0.75, 0.25]  # the turn's own wins


class ByMessage(Team):
    async def run(self, **kwargs):
        state = await self.graph.ainvoke({"messages": kwargs["messages"]})
        first = next(m for m in state["messages"] if m.type == "ai")
        return AgentGraphOutput(reward=0.0, turn_rewards={first.id: 1.0})


def test_a_turn_is_named_by_the_message_the_graph_got(run_graph):
    trajectory = run_graph(ByMessage, ["a plan", "a text"])
    assert [turn.reward for turn in trajectory.turns] == [1.0, None]


def test_a_reward_function_can_reward_nodes(run_graph):
    trajectory = run_graph(
        Team, ["a plan", "a text"], reward_function=lambda: Score(1.0, node_rewards={"write": 0.1})
    )
    assert [turn.reward for turn in trajectory.turns] == [None, 0.1]


class WrongTurn(Team):
    extra: ClassVar = {"reward": 1.0, "turn_rewards": {2: 1.0}}


class NotANumber(Team):
    extra: ClassVar = {"reward": 1.0, "node_rewards": {"plan": "high"}}


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        (WrongTurn, "gave a reward to turn 2; name one of its turns 0 to 1"),
        (NotANumber, "the reward of node 'plan'"),
    ],
)
def test_a_reward_of_nothing_is_an_error_of_the_agent(run_graph, agent, said):
    trajectory = run_graph(agent, ["a plan", "a text"])
    assert trajectory.outcome is Outcome.AGENT_ERROR
    assert said in trajectory.error
    assert trajectory.reward is None


class Helped(BaseAgentGraph):
    def build_graph(self):
        async def node(state: MessagesState):
            hint = await self.auxiliary_models["helper"].ainvoke(state["messages"])
            answer = await self.llm.ainvoke([*state["messages"], ("user", hint.content)])
            return {"messages": [hint, answer]}

        graph = StateGraph(MessagesState)
        graph.add_node("node", node)
        graph.add_edge(START, "node")
        return graph


def helper() -> FakeListChatModel:
    return FakeListChatModel(responses=["try four"])


def auxiliary(text: str):
    return load_config(
        None,
        [
            "runtime_args.data_path=x.json",
            "models.policy_trainer.load=x",
            f"runtime_args.auxiliary_models={text}",
        ],
    ).runtime_args.auxiliary_models


def test_what_a_helper_says_is_context(run_graph, tokenizer):
    models = build_auxiliary(auxiliary(f"{{helper: {{factory: '{__file__}:helper'}}}}"))
    trajectory = run_graph(Helped, ["4"], reward_function=lambda: 1.0, auxiliary_models=models)
    [turn] = trajectory.turns
    assert "try four" in tokenizer.decode(turn.prompt_ids)
    assert tokenizer.decode(turn.completion.token_ids) == "4<|im_end|>"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{judge: {}}", "must have either factory or base_url"),
        ("{judge: {base_url: 'http://x/v1'}}", "must name the model at base_url"),
        ("{judge: {fatcory: 'a:b'}}", "judge.fatcory: there is no such key"),
    ],
)
def test_a_helper_that_is_not_described_is_refused(text, said):
    with pytest.raises(ConfigError, match=r"runtime_args\.auxiliary_models") as refused:
        auxiliary(text)
    assert said in str(refused.value)


def not_a_model() -> str:
    return "me"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{{judge: {{factory: '{__file__}:not_a_model'}}}}", "returned str; it must return a"),
        (f"{{judge: {{factory: '{__file__}:nobody'}}}}", "has no 'nobody'"),
    ],
)
def test_a_helper_that_cannot_be_had_says_so(text, said):
    with pytest.raises(ConfigError, match=said):
        build_auxiliary(auxiliary(text))


class Encodes:
    def __init__(self, say) -> None:
        self._say = say

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._say(text)
