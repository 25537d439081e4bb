"""Which nodes a setting is for: ``trainable_nodes``, ``node_sampling``, ``node_rewards``.

A pattern names nodes as a shell names files (``*`` and ``?``), below an agent's name if that
matters. It is compared with the node's name, with its path of sub-graphs, and with every graph
above it, so that the name of a sub-graph stands for all that is in it::

    path of a call      patterns that match it
    team/writer/model   *   model   team   team/writer   team/*   essay:team   essay:*
"""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(pattern: str, agent_name: str, path: str) -> bool:
    """Whether ``pattern`` is for the calls that ``agent_name`` makes at ``path``.

    Args:
        pattern: ``[agent:]node``.
        path: ``Turn.path``; '' is a call outside any graph, which only ``*`` matches.
    """
    agent, colon, nodes = pattern.rpartition(":")
    if colon and not fnmatchcase(agent_name, agent):
        return False
    parts = path.split("/")
    above = {"/".join(parts[: i + 1]) for i in range(len(parts))}
    return any(fnmatchcase(name, nodes) for name in {*above, parts[-1]})
