"""The quickstart task under several estimators and losses, three seeds each, as a table.

    source scripts/setup_env.sh
    python benchmarks/estimators.py [--seeds 3] [--episodes 60]

Needs what ``benchmarks/quickstart_seeds.py`` needs. Two optimizer steps an episode, so that the
second is off-policy and ratios matter; all else is equal but for what a method names itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

from quickstart_seeds import train
from rich.console import Console
from rich.table import Table

TRAINER = "models.policy_trainer."
METHODS: dict[str, dict[str, object]] = {
    "GRPO": {},
    "GSPO": {
        "loss": "gspo",
        "aggregation": "seq-mean-token-mean",
        "neg_clip_ratio": 3e-4,
        "pos_clip_ratio": 4e-4,
    },
    "CISPO": {"loss": "cispo", "neg_clip_ratio": 1.0},
    "RLOO": {"advantage": "rloo", "loss": "reinforce"},
    "REINFORCE++": {"advantage": "reinforce_pp"},
}
"""Keys of ``models.policy_trainer``; clip ratios as the papers have them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--data", type=Path, default=Path("dataset/arithmetic"))
    parser.add_argument("--model", type=Path, default=Path("pretrained_models/tiny"))
    options = parser.parse_args()
    table = Table("method", "held-out reward, mean of the seeds", "after, each seed", "clipped")
    with tempfile.TemporaryDirectory() as out:
        for method, keys in METHODS.items():
            curves, clipped = [], []
            for seed in range(options.seeds):
                more = {TRAINER + key: value for key, value in keys.items()}
                more["runtime_args.train_global_batch_size"] = 32
                rows = options.data / "train_agent.json"
                run = train(f"{method}-{seed}", seed, rows, options, out, **more)
                metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
                curves.append([m["eval/reward_mean"] for m in metrics if "eval/reward_mean" in m])
                clipped += [m.get("policy/clip_fraction_high", 0.0) for m in metrics]
                Console(stderr=True).print(method, seed, [round(r, 3) for r in curves[-1]])
            table.add_row(
                method,
                " → ".join(f"{mean(points):.3f}" for points in zip(*curves, strict=True)),
                " ".join(f"{curve[-1]:.3f}" for curve in curves),
                f"{mean(clipped):.3f}",
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
