"""GRPO for agents: the loop. The file to read first.

    prompts ─► groups of agent runs ─► advantages ─► samples ─► optimizer steps ─► publish ─► ...

One function for one process on a CPU and for a cluster: the difference is the ``Cluster`` it is
given (law 6). Left out of the textbook on purpose: no value model (the group is the baseline), no
second policy forward for old logprobs (the engine's own are recorded) unless ``decoupled`` asks for
one, no reference forward unless ``kl_coef`` does, and no filter for stale samples (slots bound
staleness).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from chatlearn.algorithm.aggregation import step_batches
from chatlearn.algorithm.corrections import decoupled
from chatlearn.algorithm.objective import is_of_rollouts
from chatlearn.algorithm.scoring import Scoring
from chatlearn.config import GrpoConfig
from chatlearn.data.prompt_dataset import read_tasks
from chatlearn.data.prompt_stream import PromptStream
from chatlearn.interfaces import Cluster
from chatlearn.models.agent.evaluation import evaluate
from chatlearn.models.agent.rollout_manager import RolloutManager
from chatlearn.observability.checkpoints import episode_of, read_loop_state, write_loop_state
from chatlearn.observability.metrics import (
    advantage_metrics,
    eval_metrics,
    merge_steps,
    rollout_metrics,
)
from chatlearn.observability.run_folder import RunFolder
from chatlearn.observability.tracker import Tracker
from chatlearn.types import Sample, Task

logger = logging.getLogger(__name__)


async def train(cfg: GrpoConfig, cluster: Cluster, run: RunFolder, tracker: Tracker) -> None:
    """Train to the last episode of ``cfg``, from the newest checkpoint of ``run`` if it has one.

    Raises:
        ChatLearnError: what, where and what to do; checkpoints written before it stay.
    """
    args = cfg.runtime_args
    tasks, eval_tasks = read_tasks(args.data_files), read_tasks(args.eval_files)
    async with cluster:
        stream = PromptStream(cluster.validate(tasks), seed=args.seed, shuffle=args.data_shuffle)
        eval_tasks = cluster.validate(eval_tasks)
        start = await _restore(run, cluster, stream)
        await cluster.engine.publish(await cluster.trainer.weights(), version=start)
        if start == 0 and args.enable_eval_before_training:
            with tracker.episode(0) as log:
                log(await _evaluate(cfg, cluster, eval_tasks, run, tracker, episode=0))

        scoring = scoring_of(cfg)
        async with _rollout_manager(cfg, cluster, stream, tracker) as rollouts:
            for episode in range(start + 1, args.num_episode + 1):
                with tracker.episode(episode) as log:
                    with tracker.timer("rollout", expected=args.sample_per_episode):
                        groups = await rollouts.next_groups()
                    advantages, rows = scoring(groups)
                    with tracker.timer("train"):
                        log(merge_steps(await _learn(cfg, cluster, rows, version=episode)))
                    log(rollout_metrics(groups) | rollouts.metrics() | cluster.metrics())
                    log(advantage_metrics(advantages.values()))
                    samples = [sample for row in rows for sample in row]
                    run.write_rollouts(episode, groups + rollouts.dropped, advantages, samples)
                    if cfg.evaluates_after(episode):
                        log(await _evaluate(cfg, cluster, eval_tasks, run, tracker, episode))
                rollouts.release(groups)
                if cfg.saves_after(episode):
                    with (
                        tracker.timer("save"),
                        run.write_checkpoint(episode, keep=args.max_checkpoints) as folder,
                    ):
                        await cluster.trainer.save(folder)
                        write_loop_state(folder, {"stream": stream.state()})
    run.finish()


async def _learn(
    cfg: GrpoConfig, cluster: Cluster, rows: Sequence[list[Sample]], *, version: int
) -> list[dict[str, float]]:
    """The optimizer steps of an episode, then the new weights go to the engine.

    Rows without advantage pull on nothing unless a KL or an entropy term does: they stay in the
    denominator and out of the forward pass. A rollout is never split over two steps.
    """
    settings, size = cfg.models.policy_trainer, cfg.runtime_args.rollouts_per_step
    metrics = []
    async with cluster.training():
        if settings.decoupled:
            rows = await _against_proximal(cfg, cluster, rows)
        for _ in range(cfg.runtime_args.num_training_epoch):
            for i in range(0, len(rows), size):
                batches = step_batches(
                    [sample for row in rows[i : i + size] for sample in row],
                    settings.aggregation,
                    horizon=cfg.models.policy.max_response_tokens_length,
                    max_tokens=settings.max_token_in_packing,
                    ranks=cluster.trainer.ranks,
                    tree=cluster.trainer.packs_trees,
                    all_rows=settings.kl_coef > 0 or settings.entropy_coef != 0,
                    whole_rollouts=is_of_rollouts(settings.loss, settings.correction),
                )
                if batches:
                    metrics.append(await cluster.trainer.step(batches))
        weights = await cluster.trainer.weights()
    await cluster.engine.publish(weights, version=version)
    return metrics


async def _against_proximal(
    cfg: GrpoConfig, cluster: Cluster, rows: Sequence[list[Sample]]
) -> list[list[Sample]]:
    """``rows`` with the trainer's own logprobs, and the correction towards the engine's."""
    settings = cfg.models.policy_trainer
    samples = [sample for row in rows for sample in row]
    changed = decoupled(
        samples,
        await cluster.trainer.logprobs(samples),
        settings.correction,
        low=settings.correction_low,
        high=settings.correction_high,
    )
    following = iter(changed)
    return [[next(following) for _ in row] for row in rows]


def scoring_of(cfg: GrpoConfig) -> Scoring:
    """How groups become advantages and samples."""
    settings = cfg.models.policy_trainer
    return Scoring(
        advantage=settings.advantage,
        turn_discount=settings.turn_discount,
        overlong_buffer=settings.overlong_buffer,
        overlong_penalty=settings.overlong_penalty,
        max_tokens=cfg.models.policy.max_response_tokens_length,
        aggregation=settings.aggregation,
    )


async def _evaluate(
    cfg: GrpoConfig,
    cluster: Cluster,
    tasks: Sequence[Task],
    run: RunFolder,
    tracker: Tracker,
    episode: int,
) -> dict[str, float]:
    samples_per_task = cfg.models.policy.eval_num_inference_per_prompt
    with tracker.timer("evaluate"):
        groups = await evaluate(
            cluster.run_agent,
            tasks,
            sampling=cfg.eval_sampling(),
            budget=cfg.eval_budget(),
            samples_per_task=samples_per_task,
            max_concurrent_rollouts=cfg.runtime_args.max_concurrent_rollouts,
        )
    run.write_rollouts(episode, groups, {}, [], name="eval")
    return eval_metrics(groups, samples_per_task)


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
        groups_per_episode=cfg.prompts_per_episode,
        max_staleness=args.max_staleness,
        max_concurrent_rollouts=args.max_concurrent_rollouts,
        max_failed_fraction=args.max_failed_fraction,
        replace_zero_signal_groups=args.replace_zero_signal_groups,
        on_trajectory=tracker.rollout_done,
    )


async def _restore(run: RunFolder, cluster: Cluster, stream: PromptStream) -> int:
    """Continue from the run's newest checkpoint; returns the episode it was written after."""
    if run.checkpoint is None:
        return 0
    await cluster.trainer.restore(run.checkpoint)
    stream.restore(read_loop_state(run.checkpoint)["stream"])
    return episode_of(run.checkpoint)
