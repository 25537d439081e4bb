"""A trajectory (a tree of turns) into samples (rows of tokens): each sampled token trained once."""

from __future__ import annotations

from chatlearn.types import Sample, Trajectory, Turn


def to_samples(trajectory: Trajectory, advantage: float) -> list[Sample]:
    """One row per leaf of the tree of turns; every completion token is trained in exactly one.

    Leaves are walked in the order of their turn ids. The first row that reaches a turn trains its
    completion; in later rows the same tokens are context. Two nodes that fork after turn 0::

        turn 0 ─┬─ turn 1          row of leaf 1   [ prompt 0 | C0 | prompt 1 | C1 ]
                │                       trained                 ──              ──
                └─ turn 2          row of leaf 2   [ prompt 0 | C0 | prompt 2 | C2 ]
                                        trained                                 ──

    A row ends with its last trained token, and a row without one is not made: an empty completion
    (an aborted call) costs nothing.

    Args:
        trajectory: turns in any order; ``Turn.parent`` names an earlier turn whose prompt and
            completion begin this prompt, exactly.
        advantage: of the whole run; every trained token gets it.

    Raises:
        AssertionError: the tree is not one (a bug of the recorder): the ids are named.
    """
    turns = {turn.id: turn for turn in trajectory.turns}
    assert len(turns) == len(trajectory.turns), f"{trajectory.uid}: two turns share an id"
    for turn in trajectory.turns:
        _check_prefix(turn, turns, trajectory.uid)
    parents = {turn.parent for turn in trajectory.turns}
    trained: set[int] = set()
    samples = []
    for leaf in sorted(turns.keys() - parents):
        path = [turn for turn in _path(turns[leaf], turns) if turn.id not in trained]
        trained.update(turn.id for turn in path)
        path = [turn for turn in path if turn.completion.token_ids]
        if path:
            samples.append(_row(path, advantage, trajectory.uid))
    return samples


def _path(leaf: Turn, turns: dict[int, Turn]) -> list[Turn]:
    """The turns from the root down to ``leaf``."""
    path = [leaf]
    while path[-1].parent is not None:
        path.append(turns[path[-1].parent])
    return path[::-1]


def _check_prefix(turn: Turn, turns: dict[int, Turn], uid: str) -> None:
    """Law 1 holds across an edge: what the parent ended with is what the child began with."""
    if turn.parent is None:
        return
    assert turn.parent in turns, f"{uid}: turn {turn.id} has an unknown parent {turn.parent}"
    assert turn.parent < turn.id, f"{uid}: turn {turn.id} comes before its parent {turn.parent}"
    prefix = turns[turn.parent].token_ids
    assert turn.prompt_ids[: len(prefix)] == prefix, (
        f"{uid}: the prompt of turn {turn.id} does not begin with the tokens of turn {turn.parent}"
    )


def _row(path: list[Turn], advantage: float, uid: str) -> Sample:
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
        where = slice(start, start + count)
        sample.loss_mask[where] = [True] * count
        sample.rollout_logprobs[where] = turn.completion.logprobs
        sample.advantages[where] = [advantage] * count
    return sample
