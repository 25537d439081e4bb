"""A trajectory (a tree of turns) into samples (rows of tokens): each sampled token trained once."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from chatlearn.errors import TrainerError
from chatlearn.types import Sample, Trajectory, Turn

_NONE: Mapping[int, float] = MappingProxyType({})


def to_samples(
    trajectory: Trajectory, advantage: float, own: Mapping[int, float] = _NONE
) -> list[Sample]:
    """Rows of a tree of turns in which every completion token that trains does so exactly once.

    A row is the path from a root to a leaf. Leaves are walked in the order of their turn ids. The
    first row that reaches a turn trains its completion; in later rows the same tokens are context.
    Two nodes that fork after turn 0::

        turn 0 ─┬─ turn 1          row of leaf 1   [ prompt 0 | C0 | prompt 1 | C1 ]
                │                       trained                 ──              ──
                └─ turn 2          row of leaf 2   [ prompt 0 | C0 | prompt 2 | C2 ]
                                        trained                                 ──

    A turn with ``excluded`` set is context where a trained turn follows, and absent where none
    does; so is an empty completion (an aborted call). A leaf is therefore a trained turn, and a row
    ends with its last trained token. Turn 1 is excluded and turn 2 has a reward of its own::

        turn 0 ─── turn 1 ─┬─ turn 2       row of leaf 2   [ prompt 0 | C0 | … | C1 | … | C2 ]
                 excluded  │    own             trained                 ──                ──
                           └─ turn 3            advantage            the run's           own[2]
                            excluded

    Args:
        trajectory: turns in any order; ``Turn.parent`` names an earlier turn whose prompt and
            completion begin this prompt, exactly.
        advantage: of the whole run; every trained token gets it whose turn is not in ``own``.
        own: advantages of turns by their ids, see ``turn_advantages``.

    Raises:
        TrainerError: a turn to train was sampled greedily; it is named.
        AssertionError: the tree is not one, or ``own`` names no turn of it (a bug of ours): the
            ids are named.
    """
    turns = {turn.id: turn for turn in trajectory.turns}
    assert len(turns) == len(trajectory.turns), f"{trajectory.uid}: two turns share an id"
    strangers = own.keys() - turns.keys()
    assert not strangers, f"{trajectory.uid} has no turns {sorted(strangers)} to give advantages"
    for turn in trajectory.turns:
        _check_prefix(turn, turns, trajectory.uid)
    untrained = {t.id for t in trajectory.turns if t.excluded or not t.completion.token_ids}
    samples = []
    for leaf in _leaves(turns, untrained):
        path = [turn for turn in _path(turns[leaf], turns) if turn.id not in untrained]
        untrained.update(turn.id for turn in path)  # in later rows
        samples.append(_row(path, advantage, own, trajectory.uid))
    return samples


def _leaves(turns: Mapping[int, Turn], untrained: set[int]) -> list[int]:
    """Ids, in order, of the turns to train that no other turn to train comes after."""
    above: set[int] = set()
    trained = turns.keys() - untrained
    for id_ in trained:
        parent = turns[id_].parent
        while parent is not None and parent not in above:
            above.add(parent)
            parent = turns[parent].parent
    return sorted(trained - above)


def _path(leaf: Turn, turns: Mapping[int, Turn]) -> list[Turn]:
    """The turns from the root down to ``leaf``."""
    path = [leaf]
    while path[-1].parent is not None:
        path.append(turns[path[-1].parent])
    return path[::-1]


def _check_prefix(turn: Turn, turns: Mapping[int, Turn], uid: str) -> None:
    """Law 1 holds across an edge: what the parent ended with is what the child began with."""
    if turn.parent is None:
        return
    assert turn.parent in turns, f"{uid}: turn {turn.id} has an unknown parent {turn.parent}"
    assert turn.parent < turn.id, f"{uid}: turn {turn.id} comes before its parent {turn.parent}"
    prefix = turns[turn.parent].token_ids
    assert turn.prompt_ids[: len(prefix)] == prefix, (
        f"{uid}: the prompt of turn {turn.id} does not begin with the tokens of turn {turn.parent}"
    )


def _row(path: list[Turn], advantage: float, own: Mapping[int, float], uid: str) -> Sample:
    """The row that ends with the last turn of ``path`` and trains the completion of each."""
    token_ids = path[-1].token_ids
    sample = Sample(
        token_ids=token_ids,
        loss_mask=[False] * len(token_ids),
        rollout_logprobs=[0.0] * len(token_ids),
        advantages=[0.0] * len(token_ids),
        trajectory=uid,
        min_version=min(turn.completion.versions[0] for turn in path),
    )
    for turn in path:
        start, count = len(turn.prompt_ids), len(turn.completion.token_ids)
        assert start > 0, f"{uid}: turn {turn.id} has an empty prompt, so no logit has its tokens"
        if not turn.temperature > 0:
            raise TrainerError(
                f"Turn {turn.id} (node {turn.path!r}) of trajectory {uid!r} was sampled at "
                f"temperature {turn.temperature}: a greedy choice has no gradient. Set "
                "models.policy.temperature, or the node's in models.policy.node_sampling, above 0."
            )
        where = slice(start, start + count)
        sample.loss_mask[where] = [True] * count
        sample.rollout_logprobs[where] = turn.completion.logprobs
        sample.advantages[where] = [own.get(turn.id, advantage)] * count
        sample.temperatures[where] = [turn.temperature] * count
    return sample
