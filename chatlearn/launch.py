"""From a configuration to a finished run: the folder, the trackers, the cluster, the loop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from chatlearn.cluster.local import LocalCluster
from chatlearn.cluster.nodes import Node, join, share_token
from chatlearn.config import GrpoConfig, dump_config
from chatlearn.errors import ConfigError
from chatlearn.interfaces import Cluster
from chatlearn.observability.checkpoints import episode_of
from chatlearn.observability.logs import console, setup_logging
from chatlearn.observability.progress import open_progress
from chatlearn.observability.report import final_report
from chatlearn.observability.run_folder import RunFolder
from chatlearn.observability.tracker import Sink, TensorBoard, Tracker, WandB
from chatlearn.train import train

logger = logging.getLogger(__name__)


def launch(
    cfg: GrpoConfig,
    *,
    on_start: Callable[[Callable[[], None]], None] | None = None,
    beside: Callable[[RunFolder], AbstractContextManager[object]] = nullcontext,
) -> Path | None:
    """Run ``cfg`` to its end and print the report; returns the run folder.

    On a machine that is not the first of several it lends the machine to the run, returns when that
    is over, and has no run folder.

    Args:
        on_start: is handed a function that ends the run as Ctrl-C does, from any thread: signals
            reach only a run in the main thread.
        beside: what goes on as long as the run does, told its folder: a TensorBoard for instance.

    Raises:
        ChatLearnError: what, where and what to do.
    """
    args = cfg.runtime_args
    setup_logging()
    node = Node.of(os.environ) if args.cluster == "ray" else Node()
    if not node.is_head and args.ray_address is None:
        share_token(node)
        join(node)
        return None
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
            beside(run),
        ):
            training = train(cfg, _cluster(cfg, run, node), run, tracker)
            asyncio.run(_until_ended(training, on_start))
        console().print(final_report(run.path), soft_wrap=True)
        return run.path


async def _until_ended(
    training: Coroutine[Any, Any, None],
    on_start: Callable[[Callable[[], None]], None] | None,
) -> None:
    """Await ``training``; SIGTERM ends it as Ctrl-C does, also where a shell that started the run
    in the background had it ignore SIGINT."""
    running = asyncio.current_task()
    assert running is not None
    terminated = asyncio.Event()

    def terminate() -> None:
        terminated.set()
        running.cancel()

    loop = asyncio.get_running_loop()
    if threading.current_thread() is threading.main_thread():
        loop.add_signal_handler(signal.SIGTERM, terminate)
    if on_start is not None:
        on_start(lambda: loop.call_soon_threadsafe(terminate))
    try:
        await training
    except asyncio.CancelledError:
        if terminated.is_set():
            raise KeyboardInterrupt from None
        raise


def _cluster(cfg: GrpoConfig, run: RunFolder, node: Node) -> Cluster:
    if cfg.runtime_args.cluster == "local":
        return LocalCluster(cfg, logs=run.logs)
    if cfg.runtime_args.ray_address is None:
        share_token(node)
    try:
        from chatlearn.cluster.ray import RayCluster
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"runtime_args.cluster=ray, but Ray is not installed ({error}); install "
            "chatlearn[ray], or set runtime_args.cluster=local"
        ) from error
    return RayCluster(cfg, logs=run.logs, node=node)


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
