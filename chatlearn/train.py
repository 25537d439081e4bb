"""GRPO for agents: the loop. The file to read first.

    prompts ─► groups of agent runs ─► advantages ─► samples ─► optimizer steps ─► publish ─► ...

One function for one process on a CPU and for a cluster: the difference is the ``Cluster`` it is
given (law 6). Left out of the textbook on purpose: no value model (the group is the baseline), no
second policy forward for old logprobs (the engine's own are exact and recorded), no reference
forward unless ``kl_coef`` asks for one, and no filter for stale samples (slots bound staleness).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from chatlearn.algorithm.advantages import group_advantages
from chatlearn.algorithm.packing import pack
from chatlearn.algorithm.samples import to_samples
from chatlearn.config import GrpoConfig, dump_config
from chatlearn.data.prompt_dataset import read_tasks
from chatlearn.data.prompt_stream import PromptStream
from chatlearn.interfaces import Cluster, Trainer
from chatlearn.models.agent.evaluation import evaluate
from chatlearn.models.agent.rollout_manager import RolloutManager
from chatlearn.observability.metrics import eval_metrics, merge_steps, rollout_metrics
from chatlearn.observability.run_folder import RunFolder
from chatlearn.observability.tracker import Tracker
from chatlearn.types import Group, Sample

logger = logging.getLogger(__name__)


async def train(cfg: GrpoConfig, cluster: Cluster) -> RunFolder:
    """Run ``cfg`` to its last episode, continuing an unfinished run of the same name.

    Raises:
        ChatLearnError: what, where and what to do; checkpoints written before it stay.
    """
    args = cfg.runtime_args
    tasks, eval_tasks = read_tasks(args.data_files), read_tasks(args.eval_files)
    run = RunFolder.open(
        args.output_dir,
        args.exp_name,
        resume=args.enable_resume_training,
        config_text=dump_config(cfg),
        keep=args.max_checkpoints,
    )
    with run, Tracker.open(run, cfg) as tracker:
        async with cluster:
            tasks = cluster.validate(tasks)
            eval_tasks = cluster.validate(eval_tasks)
            stream = PromptStream(tasks, seed=args.seed, shuffle=args.data_shuffle)
            start = await _restore(run, cluster.trainer, stream)
            await cluster.engine.publish(await cluster.trainer.weights(), version=start)
            if start == 0 and args.enable_eval_before_training:
                with tracker.episode(0) as log:
                    log(await _evaluate(cfg, cluster, eval_tasks, run, tracker, episode=0))
            async with _rollout_manager(cfg, cluster, stream, tracker) as rollouts:
                for episode in range(start + 1, args.num_episode + 1):
                    with tracker.episode(episode) as log:
                        groups = await _episode(cfg, cluster, rollouts, run, tracker, log, episode)
                        if cfg.evaluates_after(episode):
                            log(await _evaluate(cfg, cluster, eval_tasks, run, tracker, episode))
                    rollouts.release(groups)
                    if cfg.saves_after(episode):
                        with tracker.phase("save"), run.write_checkpoint(episode) as folder:
                            await cluster.trainer.save(folder)
                            run.write_loop_state(folder, {"stream": stream.state()})
        run.finish()
    return run


async def _episode(
    cfg: GrpoConfig,
    cluster: Cluster,
    rollouts: RolloutManager,
    run: RunFolder,
    tracker: Tracker,
    log: Tracker.Log,
    episode: int,
) -> list[Group]:
    """Roll out, learn, publish. Returns the groups, which the caller releases."""
    trainer = cluster.trainer
    with tracker.phase("rollout"):
        groups = await rollouts.next_groups()
    advantages = {uid: a for group in groups for uid, a in group_advantages(group).items()}
    rows = [
        to_samples(trajectory, advantages[trajectory.uid])
        for group in groups
        for trajectory in group.trajectories
        if trajectory.uid in advantages
    ]
    with tracker.phase("train"):
        async with cluster.training():
            steps = [
                await trainer.step(pack(samples, cfg.models.policy_trainer.max_token_in_packing))
                for _ in range(cfg.runtime_args.num_training_epoch)
                for samples in _steps(rows, cfg.runtime_args.rollouts_per_step)
            ]
            weights = await trainer.weights()
    with tracker.phase("publish"):
        await cluster.engine.publish(weights, version=episode)
    log(merge_steps(steps))
    log(rollout_metrics(groups) | rollouts.metrics())
    run.write_rollouts(
        episode, groups + rollouts.dropped, advantages, [s for row in rows for s in row]
    )
    return groups


def _steps(rows: Sequence[list[Sample]], rollouts_per_step: int) -> list[list[Sample]]:
    """The samples of each optimizer step; a rollout is never split over two (law 3)."""
    return [
        [sample for row in rows[i : i + rollouts_per_step] for sample in row]
        for i in range(0, len(rows), rollouts_per_step)
    ]


async def _evaluate(cfg, cluster, tasks, run, tracker, episode) -> dict[str, float]:
    with tracker.phase("evaluate"):
        groups = await evaluate(
            cluster.run_agent,
            tasks,
            sampling=cfg.eval_sampling(),
            budget=cfg.eval_budget(),
            samples_per_task=cfg.models.policy.eval_num_inference_per_prompt,
            max_concurrent_rollouts=cfg.runtime_args.max_concurrent_rollouts,
        )
    run.write_rollouts(episode, groups, {}, [], kind="eval")
    return eval_metrics(groups)


def _rollout_manager(
    cfg: GrpoConfig, cluster: Cluster, stream: PromptStream, tracker: Tracker
) -> RolloutManager:
    args = cfg.runtime_args
    return RolloutManager(
        cluster.run_agent,
        stream,
        sampling=cfg.train_sampling(),
        budget=cfg.train_budget(),
        group_size=cfg.models.policy.num_inference_per_prompt,
        groups_per_episode=args.sample_per_episode // cfg.models.policy.num_inference_per_prompt,
        max_staleness=args.max_staleness,
        max_concurrent_rollouts=args.max_concurrent_rollouts,
        max_failed_fraction=args.max_failed_fraction,
        replace_zero_signal_groups=args.replace_zero_signal_groups,
        on_trajectory=tracker.rollout_done,
    )


async def _restore(run: RunFolder, trainer: Trainer, stream: PromptStream) -> int:
    """Continue from the run's newest checkpoint; returns the episode it was written after."""
    logger.info("%s", run.said)
    if run.checkpoint is None:
        run.rewind(0)
        return 0
    await trainer.restore(run.checkpoint)
    stream.restore(run.read_loop_state()["stream"])
    run.rewind(run.checkpoint_episode)
    return run.checkpoint_episode
