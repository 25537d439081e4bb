"""From a configuration to a finished run: the folder, the trackers, the cluster, the loop."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from chatlearn.cluster.local import LocalCluster
from chatlearn.config import GrpoConfig, dump_config
from chatlearn.observability.checkpoints import episode_of
from chatlearn.observability.logs import console, setup_logging
from chatlearn.observability.progress import open_progress
from chatlearn.observability.report import final_report
from chatlearn.observability.run_folder import RunFolder
from chatlearn.observability.tracker import Sink, TensorBoard, Tracker, WandB
from chatlearn.train import train

logger = logging.getLogger(__name__)


def launch(cfg: GrpoConfig) -> Path:
    """Run ``cfg`` to its end and print the report; returns the run folder.

    Raises:
        ChatLearnError: what, where and what to do.
    """
    args = cfg.runtime_args
    setup_logging()
    with RunFolder.open(
        args.output_dir,
        args.exp_name,
        resume=args.enable_resume_training,
        config_text=dump_config(cfg),
    ) as run:
        setup_logging(run.log_file)
        logger.info("%s", run.said)
        for change in run.changed:
            logger.info("changed since: %s", change)
        start = episode_of(run.checkpoint) if run.checkpoint else 0
        run.rewind(start)
        with (
            open_progress(args.num_episode, start=start) as progress,
            Tracker(run.metrics_file, _sinks(cfg, run, start), progress=progress) as tracker,
        ):
            asyncio.run(train(cfg, LocalCluster(cfg), run, tracker))
        console().print(final_report(run.path), soft_wrap=True)
        return run.path


def _sinks(cfg: GrpoConfig, run: RunFolder, start: int) -> list[Sink]:
    log = cfg.runtime_args.log_args_dict
    sinks: list[Sink] = []
    if log.enable_tensorboard:
        sinks.append(TensorBoard(run.tensorboard, first_episode=start + 1))
    if log.enable_wandb:
        sinks.append(
            WandB(
                project=log.wandb_project,
                run=run.path,
                name=log.wandb_name,
                run_id=log.wandb_id,
                folder=log.wandb_dir,
                resume=log.wandb_resume,
                config=cfg.model_dump(mode="json"),
            )
        )
    return sinks
