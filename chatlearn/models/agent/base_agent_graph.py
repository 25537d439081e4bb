"""What users subclass: write ``build_graph``, and most agents need nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from langchain_core.language_models import BaseChatModel
from langgraph.graph import StateGraph

from chatlearn.errors import AgentError
from chatlearn.models.agent.chat_model import CustomChatModel
from chatlearn.models.agent.endpoint.door import Endpoint
from chatlearn.types import Trajectory

AgentGraphOutput = Trajectory
"""What ``run`` may return to set its own ``reward`` and ``metrics``; the turns are recorded."""


class BaseAgentGraph:
    """A LangGraph graph that can be trained.

    One object serves all runs of its (agent_name, agent_cfg_path), many of them at the same time:
    keep what belongs to one run in the graph's state, not on ``self``.

    Attributes:
        llm: the policy, a LangChain chat model.
        cfg: the agent's YAML, see ``load_agent_cfg``; a nested class ``Config`` types it.
        tokenizer: tokenizer of the policy.
        auxiliary_models: frozen models by name, from ``runtime_args.auxiliary_models``; none of
            their tokens is trained.
    """

    auxiliary_models: Mapping[str, BaseChatModel] = MappingProxyType({})

    def __init__(
        self,
        agent_name: str,
        cfg: Any,
        llm: Any,
        tokenizer: Any,
        processor: Any = None,
        model_type: str = "llm",
        **kwargs: Any,
    ) -> None:
        self.agent_name = agent_name
        self.cfg = cfg
        self.llm = llm
        self.tokenizer = tokenizer
        self.processor = processor
        self.model_type = model_type
        self.graph: Any = None
        self._inputs: frozenset[str] = frozenset({"messages"})

    def build_graph(self) -> Any:
        """The graph: a ``StateGraph`` or an already compiled one. Called once.

        This default makes ``self.chatmodel``, as ChatLearn's base class did.
        """
        self.chatmodel = CustomChatModel(
            model=self.agent_name, llm=self.llm, tokenizer=self.tokenizer, processor=self.processor
        )
        return None

    async def run(self, **kwargs: Any) -> Any:
        """One run on one row; every column of the row is a keyword.

        The default runs the graph on ``{"messages": kwargs["messages"]}``, and on the other columns
        that the graph's state declares, and returns its final state. A state that holds ``reward``
        (a number), ``metrics``, ``node_rewards`` or ``turn_rewards`` (dicts of numbers) sets them.
        """
        state = {k: v for k, v in kwargs.items() if k in self._inputs}
        config = {"configurable": {"row": kwargs}}
        if (limit := getattr(self.cfg, "recursion_limit", None)) is not None:
            config["recursion_limit"] = int(limit)
        return await self.graph.ainvoke(state, config)

    def endpoint(self) -> Endpoint:
        """The policy behind OpenAI's API, for code that is not LangChain; inside a run only.

        ``async with self.endpoint() as door:`` (``with`` in a thread) gives ``door.base_url``,
        ``door.api_key`` and ``door.model``. See docs/endpoint.md.
        """
        return Endpoint(self.llm.policy)

    def convert_agent_graph_output(self, state: dict[str, Any]) -> AgentGraphOutput:
        """ChatLearn's last line of ``run``; the tokens are recorded, so only the reward is read."""
        return AgentGraphOutput(
            reward=state.get("reward"),
            metrics=dict(state.get("metrics") or {}),
            node_rewards=dict(state.get("node_rewards") or {}),
            turn_rewards=dict(state.get("turn_rewards") or {}),
        )

    def compile(self) -> None:
        """Build and compile the graph unless the constructor of the agent already did.

        Raises:
            AgentError: ``build_graph`` returned something that is not a graph.
        """
        if self.graph is not None:
            return
        graph = self.build_graph()
        if isinstance(graph, StateGraph):
            graph = graph.compile()
        if graph is None and self.graph is not None:
            return  # ChatLearn's agents set self.graph and return nothing
        if not hasattr(graph, "ainvoke") and type(self).run is BaseAgentGraph.run:
            raise AgentError(
                f"build_graph of agent {self.agent_name!r} returned {type(graph).__name__}; it "
                "must return a langgraph StateGraph or a compiled graph"
            )
        self.graph = graph
        if hasattr(graph, "get_input_jsonschema"):
            self._inputs |= frozenset(graph.get_input_jsonschema().get("properties", {}))
