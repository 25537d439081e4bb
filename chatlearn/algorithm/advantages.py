"""Rewards of siblings, and of their turns, in; advantages out. ``ADVANTAGES`` has every estimator.

An estimator takes the rewards of all groups of an episode and returns an advantage for each of
them. The statistics are over rollouts (or over turns that have a reward of their own), never over
rows or tokens: a run that forked into many samples, or spoke long, counts once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import fsum, sqrt

from chatlearn.types import Group, Trajectory, Turn

Rewards = Sequence[Sequence[float]]  # [B][G], groups may differ in size
Estimator = Callable[[Rewards], list[list[float]]]

_EPSILON = 1e-6
_VARIANCE_EPSILON = 1e-8


def grpo(rewards: Sequence[float]) -> list[float]:
    """Group-relative advantages: ``(reward - mean) / (std + 1e-6)``. [G] -> [G]

    GRPO, DeepSeekMath section 4.1 (https://arxiv.org/abs/2402.03300). The paper does not say which
    standard deviation it means; this is the sample one (divisor G - 1), as in TRL and verl.
    Equal rewards, and a group of one, give exactly 0.0 for every sibling.
    """
    if not rewards or min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = fsum(rewards) / len(rewards)
    std = sqrt(fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
    return [(reward - mean) / (std + _EPSILON) for reward in rewards]


def dr_grpo(rewards: Sequence[float]) -> list[float]:
    """``reward - mean``: GRPO without the division. [G] -> [G]

    Dr. GRPO (https://arxiv.org/abs/2503.20783): dividing by the standard deviation makes tasks that
    are nearly always solved, or nearly never, count more. The paper's other half, a loss without
    division by a rollout's length, is the aggregation ``seq-mean-token-sum-norm``.
    """
    if not rewards or min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def rloo(rewards: Sequence[float]) -> list[float]:
    """``reward - mean of the other siblings``. [G] -> [G]

    REINFORCE leave-one-out (https://arxiv.org/abs/2402.14740): the baseline does not have the
    sibling's own reward in it, so the gradient is unbiased. It is ``dr_grpo`` times G / (G - 1).
    A group of one gives 0.0; there are no others.
    """
    others = len(rewards) - 1
    return [a * len(rewards) / others if others > 0 else 0.0 for a in dr_grpo(rewards)]


def reinforce_pp(rewards: Rewards) -> list[list[float]]:
    """``(reward - mean) / std`` over the rewards of all groups. [B][G] -> [B][G]

    REINFORCE++ (https://arxiv.org/abs/2501.03262): no group baseline, one for the whole batch. The
    paper normalises over tokens, with a KL penalty in every token's reward; here the statistics are
    over rollouts, so that a long one has no more say, and the KL is a term of the loss. The batch
    is the episode. The standard deviation is ``sqrt(sample variance + 1e-8)``, as in verl.
    """
    every = [reward for group in rewards for reward in group]
    if not every or min(every) == max(every):
        return [[0.0] * len(group) for group in rewards]
    mean = fsum(every) / len(every)
    variance = fsum((reward - mean) ** 2 for reward in every) / (len(every) - 1)
    std = sqrt(variance + _VARIANCE_EPSILON)
    return [[(reward - mean) / std for reward in group] for group in rewards]


def reinforce_pp_baseline(rewards: Rewards) -> list[list[float]]:
    """``reward - mean of its group``, then normalised over all groups. [B][G] -> [B][G]

    REINFORCE++-baseline, the same paper's form for several rollouts a prompt. See ``reinforce_pp``.
    """
    return reinforce_pp([dr_grpo(group) for group in rewards])


def _each(of_group: Callable[[Sequence[float]], list[float]]) -> Estimator:
    return lambda rewards: [of_group(group) for group in rewards]


ADVANTAGES: Mapping[str, Estimator] = {
    "grpo": _each(grpo),
    "dr_grpo": _each(dr_grpo),
    "rloo": _each(rloo),
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "gigpo": _each(grpo),  # of the runs; ``anchored_advantages`` adds that of their turns
}
"""The values of ``models.policy_trainer.advantage``. PPO with a critic is not among them: it needs
a value model, which this loop does not have."""


def overlong_penalty(tokens: int, limit: int, buffer: int) -> float:
    """What a rollout of ``tokens`` loses for coming near ``limit``: 0 to -1.

    The soft overlong punishment of DAPO (https://arxiv.org/abs/2503.14476, equation 13): nothing up
    to ``limit - buffer`` tokens, then falling in a line to -1 at ``limit``. A ``buffer`` of 0 is no
    punishment at all.
    """
    if buffer == 0:
        return 0.0
    return -min(1.0, max(0.0, (tokens - (limit - buffer)) / buffer))


def group_advantages(
    *groups: Group,
    estimator: str = "grpo",
    shape: Callable[[Trajectory], float] = lambda trajectory: 0.0,
) -> dict[str, float]:
    """The advantage of every trainable trajectory of ``groups``, by ``Trajectory.uid``.

    Failed siblings are absent from mean and std (law 4: a failure is not a reward of 0). A group of
    fewer than two trainable siblings is left out, from the statistics of the batch too. Rewards of
    turns are not looked at; see ``turn_advantages``.

    Args:
        groups: of one episode.
        estimator: a name in ``ADVANTAGES``.
        shape: added to the reward of a trajectory before the estimator sees it.
    """
    compared = _compared(groups)
    rewards = [[t.reward + shape(t) for t in siblings] for siblings in compared]
    advantages = ADVANTAGES[estimator](rewards)
    found: dict[str, float] = {}
    for siblings, values in zip(compared, advantages, strict=True):
        uids = [trajectory.uid for trajectory in siblings]
        assert len(set(uids)) == len(uids), f"siblings share a uid: {uids}"
        found.update(zip(uids, values, strict=True))
    return found


def turn_advantages(
    *groups: Group, estimator: str = "grpo", discount: float = 0.0
) -> dict[str, dict[int, float]]:
    """The advantages of turns that have a reward of their own, by ``Trajectory.uid`` and turn id.

    Such a turn is compared, by ``estimator``, with every rewarded turn of the same ``Turn.path`` in
    all trainable siblings: what a writer earned says nothing about a judge. Two siblings::

        run a   writer 1.0   judge 0.2         writer   1.0  0.0  0.5  ->   1.0 (a)  -1.0  0.0 (b)
        run b   writer 0.0   writer 0.5        judge    0.2            ->   0.0 (a)

    The statistics are over turns, not over runs: each rewarded turn is an entry of its own, so a
    run that comes to a node ten times has ten entries in the mean and std of that node. Where a
    run's tries at a node shall count once together, give it one reward, of the run. Excluded turns
    are no entries and get none. A turn alone on its path gets 0.0 and not the run's advantage,
    which its own reward replaces.

    Args:
        groups: of one episode.
        estimator: a name in ``ADVANTAGES``.
        discount: what is compared is the return of the turn, ``reward + discount * return of the
            run's next rewarded turn``, in the order of turn ids. 0 = its own reward alone.

    Returns:
        The same uids as ``group_advantages``; an empty dict for a run all of whose turns take the
        advantage of the run.
    """
    compared = _compared(groups)
    own: dict[str, dict[int, float]] = {t.uid: {} for siblings in compared for t in siblings}
    returns: defaultdict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in compared])
    places: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
    for number, siblings in enumerate(compared):
        for trajectory in siblings:
            for turn, value in _returns(trajectory, discount):
                returns[turn.path][number].append(value)
                places[turn.path].append((trajectory.uid, turn.id))
    for path, of_path in returns.items():
        # a group that never came to the node would be an empty row of the batch
        advantages = ADVANTAGES[estimator]([values for values in of_path if values])
        flat = [advantage for values in advantages for advantage in values]
        for (uid, turn_id), advantage in zip(places[path], flat, strict=True):
            own[uid][turn_id] = advantage
    return own


def anchored_advantages(
    *groups: Group,
    of_run: Mapping[str, float],
    discount: float,
    shape: Callable[[Trajectory], float] = lambda trajectory: 0.0,
) -> dict[str, dict[int, float]]:
    """Advantages of turns by comparing those that stood before the same prompt, as GiGPO does.

    GiGPO (https://arxiv.org/abs/2505.10978): a turn's advantage is the run's plus the one of the
    turn among all turns of the group that began in the same state. Here the state is the node and
    the exact tokens of the prompt. What is compared, by ``grpo``, is the discounted return: rewards
    of turns where there are any, and the run's reward at its last turn. The paper's weight of the
    second part is 1, and so it is here. Three siblings that ask once more, or not::

        run a   prompt P: return 1.0                        P   1.0  0.5  0.0  ->  1  0  -1
        run b   prompt P: return 0.5   prompt Q: 1.0        Q   1.0            ->  0
        run c   prompt P: return 0.0

    A turn whose state no other turn had keeps the run's advantage alone. Deviation: the paper takes
    the states of its environments, which need not be equal to the token.

    Args:
        groups: of one episode.
        of_run: ``group_advantages``.
        discount: from one turn that is trained to the next, in the order of turn ids.
        shape: added to the reward of a trajectory, as in ``group_advantages``.

    Returns:
        By ``Trajectory.uid`` and turn id, for every turn that is not excluded.
    """
    own: dict[str, dict[int, float]] = {}
    for siblings in _compared(groups):
        states: defaultdict[tuple, list[tuple[str, int, float]]] = defaultdict(list)
        for trajectory in siblings:
            own[trajectory.uid] = {}
            following = (trajectory.reward or 0.0) + shape(trajectory)
            for turn in reversed([t for t in _in_order(trajectory) if not t.excluded]):
                last = not own[trajectory.uid]
                following = (turn.reward or 0.0) + following * (1.0 if last else discount)
                own[trajectory.uid][turn.id] = of_run[trajectory.uid]
                state = (turn.path, tuple(turn.prompt_ids))
                states[state].append((trajectory.uid, turn.id, following))
        for members in states.values():
            values = grpo([value for _, _, value in members])
            for (uid, turn_id, _), advantage in zip(members, values, strict=True):
                own[uid][turn_id] += advantage
    return own


def _compared(groups: Sequence[Group]) -> list[list[Trajectory]]:
    """The trainable siblings of every group that has two of them or more."""
    return [trained for group in groups if len(trained := group.trainable) > 1]


def _in_order(trajectory: Trajectory) -> list[Turn]:
    return sorted(trajectory.turns, key=lambda turn: turn.id)


def _returns(trajectory: Trajectory, discount: float) -> list[tuple[Turn, float]]:
    """Turns with a reward of their own, in the order of ``turns``, each with its return."""
    rewarded = [t for t in trajectory.turns if t.reward is not None and not t.excluded]
    found: dict[int, float] = {}
    following = 0.0
    for turn in sorted(rewarded, key=lambda turn: turn.id, reverse=True):
        following = found[turn.id] = (turn.reward or 0.0) + discount * following
    return [(turn, found[turn.id]) for turn in rewarded]
