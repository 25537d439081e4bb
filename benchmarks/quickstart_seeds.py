"""The quickstart task under several seeds, and with rewards that say nothing, as a table.

    source scripts/setup_env.sh
    python benchmarks/quickstart_seeds.py [--seeds 5] [--episodes 100]

Needs what ``bash scripts/quickstart.sh`` leaves in ``dataset/arithmetic`` and
``pretrained_models/tiny``; other folders are given by ``--data`` and ``--model``. About a minute a
run on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent


def train(
    name: str, seed: int, train_file: Path, options: argparse.Namespace, out: str, **more: object
) -> Path:
    """One run in a process of its own, with ``more`` keys; returns its folder."""
    settings = {
        "runtime_args.exp_name": name,
        "runtime_args.output_dir": out,
        "runtime_args.seed": seed,
        "runtime_args.data_path": train_file,
        "runtime_args.eval_data_path": options.data / "test_agent.json",
        "runtime_args.num_episode": options.episodes,
        "runtime_args.eval_episode_interval": 20,
        "runtime_args.enable_eval_before_training": True,
        "runtime_args.save_episode_interval": 0,
        "models.policy_trainer.load": options.model,
        "models.policy_trainer.optimizer.lr": 5e-4,
        "models.policy.max_prompt_tokens_length": 64,
        "models.policy.max_response_tokens_length": 96,
        "models.policy.max_seq_len": 256,
        "models.policy.eval_temperature": 1,
        "models.policy.eval_top_p": 1,
        **more,
    }
    command = [sys.executable, "-m", "chatlearn", "grpo"]
    command += ["--config-file", str(HERE.parent / "template/local_cpu.yaml")]
    command += [f"{key}={value}" for key, value in settings.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return Path(out) / name / "latest"


def with_shuffled_rewards(train_file: Path, folder: str) -> Path:
    """A copy of the training rows that names ``shuffled_reward.py`` as their judge."""
    judge = f"{HERE / 'shuffled_reward.py'}:shuffled"
    rows = [json.loads(line) for line in train_file.read_text().splitlines()]
    path = Path(folder) / "shuffled.json"
    path.write_text("".join(json.dumps({**row, "reward_fn": judge}) + "\n" for row in rows))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--data", type=Path, default=Path("dataset/arithmetic"))
    parser.add_argument("--model", type=Path, default=Path("pretrained_models/tiny"))
    options = parser.parse_args()
    table = Table("rewards", "seed", "held-out before", "after", "rise", "seconds", "s/episode")
    rises: dict[str, list[float]] = {"true": [], "shuffled": []}
    with tempfile.TemporaryDirectory() as out:
        true = options.data / "train_agent.json"
        files = {"true": true, "shuffled": with_shuffled_rewards(true, out)}
        for rewards, train_file in files.items():
            for seed in range(options.seeds):
                run = train(f"{rewards}-{seed}", seed, train_file, options, out)
                metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
                held_out = [m["eval/reward_mean"] for m in metrics if "eval/reward_mean" in m]
                seconds = sum(m["time/episode_s"] for m in metrics)
                per_episode = mean(m["time/rollout_s"] + m["time/train_s"] for m in metrics[1:])
                rises[rewards].append(held_out[-1] - held_out[0])
                cells = (held_out[0], held_out[-1], held_out[-1] - held_out[0])
                table.add_row(
                    rewards,
                    str(seed),
                    *(f"{cell:.3f}" for cell in cells),
                    f"{seconds:.0f}",
                    f"{per_episode:.2f}",
                )
                Console(stderr=True).print(rewards, seed, [round(r, 3) for r in held_out])
    Console(width=100).print(table)
    for rewards, found in rises.items():
        Console().print(f"{rewards}: rise {min(found):+.3f} to {max(found):+.3f}")


if __name__ == "__main__":
    main()
