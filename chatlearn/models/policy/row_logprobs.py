"""log p of whole rows, without gradient: what a proximal policy needs, and tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from chatlearn.algorithm.layout import lay, refuse_cold
from chatlearn.models.policy.ranks import Ranks
from chatlearn.models.policy.scored import one_or_each
from chatlearn.models.policy.token_logprobs import Forward
from chatlearn.types import Sample

_SCORED_AT_ONCE = 8192
"""Tokens of the rows of one forward; a longer sample is a forward of its own."""
_NOTHING = Sample([0], [False], [0.0], [0.0])
"""What a rank scores while others still have samples."""


def row_logprobs(
    policy: Forward,
    samples: Sequence[Sample],
    *,
    device: torch.device,
    ranks: Ranks,
    tree: bool,
) -> list[list[float]]:
    """log p of every token of every sample, each at its own temperature. [[L], ...], first 0.0

    Args:
        samples: of this rank; every rank may have as many as it likes.
        tree: compute what samples of one forward begin with once.

    Raises:
        TrainerError: a temperature is not above 0; the trajectory is named.
    """
    groups = list(_in_groups(samples, _SCORED_AT_ONCE))
    turns = max(int(most) for [most] in ranks.gather([len(groups)]))
    rows: list[list[float]] = []
    for group in [*groups, *[[_NOTHING]] * (turns - len(groups))]:
        rows += _of_group(policy, group, device, tree=tree, others_wait=ranks.size > 1)
    return rows[: len(samples)]


def _of_group(
    policy: Forward,
    samples: Sequence[Sample],
    device: torch.device,
    *,
    tree: bool,
    others_wait: bool,
) -> list[list[float]]:
    """One forward, which asks for a token once however many samples have it there."""
    layout = lay(samples, tree=tree)
    asked = torch.cat(
        [
            torch.stack([place[1:], place[:-1], torch.tensor(s.temperatures).double()[1:]], 1)
            for place, s in zip(layout.places, samples, strict=True)
        ]
    )  # [E, 3]: where, after which, at which temperature
    once, number = asked.unique(dim=0, return_inverse=True)
    if not bool((once[:, 2] > 0).all()):
        refuse_cold(samples)
    found = torch.zeros(len(once))
    if len(once) or others_wait:
        temperature = one_or_each(once[:, 2].float())
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.to(device)
        found = policy(
            torch.tensor(layout.token_ids).to(device),
            torch.tensor(layout.position_ids).to(device),
            policy.planner(layout.cu_seqlens, device, layout.parents),
            once[:, 1].long().to(device),
            once[:, 0].long().to(device),
            temperature=temperature,
        ).logprobs.cpu()
    counts = [len(sample.token_ids) - 1 for sample in samples]
    return [[0.0, *part.tolist()] for part in found[number].split(counts)]


def _in_groups(samples: Sequence[Sample], limit: int) -> Iterator[list[Sample]]:
    """Neighbours of together at most ``limit`` tokens, in order."""
    group: list[Sample] = []
    tokens = 0
    for sample in samples:
        if group and tokens + len(sample.token_ids) > limit:
            yield group
            group, tokens = [], 0
        group.append(sample)
        tokens += len(sample.token_ids)
    if group:
        yield group
