"""How model families write reasoning and tool calls: one small file a format.

``chatlearn.models.agent.tool_parser`` is the door; nothing else is imported from here by others.
"""
