"""``calculator``: an agent with one tool that works out arithmetic, and nothing else."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

from langchain_core.tools import ToolException, tool

from chatlearn.models.agent.agent_module import register
from chatlearn.models.agent.examples.tool_agent_graph import ToolAgentGraph

_BINARY: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_MAX_CHARACTERS = 200
_MAX_VALUE = 10**30


def evaluate(expression: str) -> int | float:
    """Value of an arithmetic expression of numbers, ``+ - * / // %`` and brackets; never ``eval``.

    Raises:
        ValueError: anything else stands in it, or a number is out of range.
        ZeroDivisionError: it divides by zero.
    """
    if len(expression) > _MAX_CHARACTERS:
        raise ValueError(f"longer than {_MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("not an arithmetic expression") from error
    return _value(tree.body)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand = _value(node.operand)
        value = -operand if isinstance(node.op, ast.USub) else operand
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        value = _BINARY[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError("not an arithmetic expression")
    if abs(value) > _MAX_VALUE:
        raise ValueError("the value is out of range")
    return value


@tool
async def calculator(expression: str) -> str:
    """Work out an arithmetic expression, for example 12*(3+4)."""
    try:
        return str(evaluate(expression))
    except (ValueError, ZeroDivisionError) as error:
        raise ToolException(f"error: {error}") from error


calculator.handle_tool_error = True


@register("calculator")
class CalculatorAgentGraph(ToolAgentGraph):
    tools = (calculator,)
