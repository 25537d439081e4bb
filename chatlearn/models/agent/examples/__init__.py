"""The built-in agents; importing this package registers them."""

from chatlearn.models.agent.examples import (
    calculator_agent_graph,
    frozen_lake_agent_graph,
    math_eval_agent_graph,
    second_try_agent_graph,
    single_turn_agent_graph,
)

__all__ = [
    "calculator_agent_graph",
    "frozen_lake_agent_graph",
    "math_eval_agent_graph",
    "second_try_agent_graph",
    "single_turn_agent_graph",
]
