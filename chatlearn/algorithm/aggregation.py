"""How the losses of tokens become one number: by the weights of rows and one denominator.

A step minimises ``sum(weight * loss) / denominator`` over all its trained tokens. Both come from
whole trajectories before any row is packed, so no machinery later can change them (law 3). What
papers call a sequence is a rollout here: all trained tokens of a trajectory, in however many rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from chatlearn.algorithm.packing import pack
from chatlearn.types import MicroBatch, Sample

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
"""The values of ``models.policy_trainer.aggregation``:

token-mean: over all tokens of the step, so that a long rollout weighs more (DAPO,
    https://arxiv.org/abs/2503.14476).
seq-mean-token-mean: over the tokens of a rollout, then over rollouts (GRPO,
    https://arxiv.org/abs/2402.03300).
seq-mean-token-sum: the sum of a rollout, then the mean over rollouts; the gradient of the expected
    reward as it is derived (LUSPO, https://arxiv.org/abs/2602.05261).
seq-mean-token-sum-norm: the same divided by ``models.policy.max_response_tokens_length``, a number
    that does not depend on what was sampled (Dr. GRPO, https://arxiv.org/abs/2503.20783).
"""


def weighted(samples: Sequence[Sample], aggregation: str) -> list[Sample]:
    """``samples`` with the weights that make the aggregation.

    Args:
        samples: every row of each trajectory in them.
        aggregation: a name in ``AGGREGATIONS``.
    """
    if aggregation != "seq-mean-token-mean":
        return list(samples)
    totals: defaultdict[str, float] = defaultdict(float)
    for sample in samples:
        totals[sample.trajectory] += sample.weight * sample.num_trained
    return [
        replace(sample, weight=sample.weight / totals[sample.trajectory])
        if sample.num_trained
        else sample
        for sample in samples
    ]


def denominator(samples: Sequence[Sample], aggregation: str, *, horizon: int) -> float:
    """What the weighted sum of an optimizer step is divided by.

    Args:
        samples: all rows of the step from ``weighted``, those without advantage too.
        aggregation: a name in ``AGGREGATIONS``.
        horizon: tokens that a rollout may sample.
    """
    rollouts = len({sample.trajectory for sample in samples if sample.num_trained})
    if aggregation == "seq-mean-token-sum":
        return float(rollouts)
    if aggregation == "seq-mean-token-sum-norm":
        return float(rollouts * horizon)
    return float(sum(sample.weight * sample.num_trained for sample in samples))


def step_batches(
    samples: Sequence[Sample],
    aggregation: str,
    *,
    horizon: int,
    max_tokens: int,
    ranks: int = 1,
    tree: bool = False,
    all_rows: bool = False,
    whole_rollouts: bool = False,
) -> list[MicroBatch]:
    """The samples of one optimizer step as micro-batches; see ``pack``.

    Args:
        samples: all rows of each trajectory of the step, from ``weighted``.
        horizon: see ``denominator``.
        tree: share what samples begin with; see ``pack``.
        all_rows: run rows whose advantages are all 0 too: a KL or entropy term pulls on them. The
            others stay in the denominator all the same.
        whole_rollouts: run all rows of a trajectory or none: a ratio over a rollout has its tokens
            without advantage in it too.
    """
    run = list(samples)
    if not all_rows:
        pulling = {s.trajectory if whole_rollouts else id(s) for s in run if any(s.advantages)}
        run = [s for s in run if (s.trajectory if whole_rollouts else id(s)) in pulling]
    batches = pack(run, max_tokens, ranks=ranks, tree=tree)
    total = denominator(samples, aggregation, horizon=horizon)
    return [replace(batch, denominator=total) for batch in batches]
