"""Agents: what users import is here; the rest of the room is behind it."""

from chatlearn.models.agent.agent_module import register
from chatlearn.models.agent.base_agent_graph import AgentGraphOutput, BaseAgentGraph
from chatlearn.models.agent.chat_model import CustomChatModel

__all__ = ["AgentGraphOutput", "BaseAgentGraph", "CustomChatModel", "register"]
