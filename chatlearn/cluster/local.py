"""One process, no Ray: the engine samples from the very module that the trainer updates."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import torch
from transformers.utils.logging import disable_progress_bar

from chatlearn.config import GrpoConfig
from chatlearn.data.prompt_dataset import drop_long
from chatlearn.errors import ConfigError
from chatlearn.models.agent.agent_module import AgentFactory, import_modules
from chatlearn.models.agent.agent_run import run_agent, sets_own_reward
from chatlearn.models.agent.chat_model import CustomChatModel
from chatlearn.models.agent.prompt_builder import PromptBuilder
from chatlearn.models.agent.tool_parser import tool_parser
from chatlearn.models.engine.embedded import EmbeddedEngine
from chatlearn.models.engine.lockstep import Lockstep
from chatlearn.models.policy.loading import eos_token_ids, load_policy, load_tokenizer
from chatlearn.models.policy.trainer import PolicyTrainer, TrainerSettings
from chatlearn.rewards.registry import resolve_reward
from chatlearn.types import Budget, SamplingParams, Session, Task, Trajectory

logger = logging.getLogger(__name__)


class LocalCluster:
    """Engine, trainer and agents as plain objects of this process.

    Everything is loaded on entering, so that the configuration can be refused before a model is
    read. Agents run as tasks of the event loop; a breakpoint in a graph node stops there.
    """

    engine: EmbeddedEngine
    trainer: PolicyTrainer

    def __init__(self, cfg: GrpoConfig) -> None:
        self._cfg = cfg

    async def __aenter__(self) -> LocalCluster:
        cfg = self._cfg
        torch.manual_seed(cfg.runtime_args.seed)
        import_modules(["chatlearn.models.agent.examples", "chatlearn.rewards.math"])
        import_modules(cfg.runtime_args.import_modules)
        device = torch.device("cuda" if cfg.models.policy_trainer.num_gpu else "cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"models.policy_trainer.num_gpu={cfg.models.policy_trainer.num_gpu}, but PyTorch "
                "sees no CUDA device; set num_gpu=0 to train on the CPU"
            )
        precision = cfg.precision(device.type)
        trust = cfg.models.policy_trainer.trust_remote_code
        load = {
            "device": device,
            "precision": precision,
            "trust_remote_code": trust,
        }
        disable_progress_bar()  # transformers' own would garble the run's
        tokenizer = load_tokenizer(cfg.policy_path, trust_remote_code=trust)
        model = load_policy(cfg.policy_path, **load)
        eos = eos_token_ids(model, tokenizer)
        parameters = sum(p.numel() for p in model.parameters())
        logger.info(
            "policy %s: %s, %.2f million parameters, %s on %s",
            *(cfg.policy_path, type(model).__name__, parameters / 1e6, precision, device),
        )
        self._prompts = PromptBuilder(
            tokenizer, eos, {"enable_thinking": cfg.models.policy.enable_thinking}
        )
        llm = CustomChatModel(
            model="policy",
            tokenizer=tokenizer,
            prompts=self._prompts,
            parser=tool_parser(cfg.models.policy.tool_parser),
        )
        self._agents = AgentFactory(llm, tokenizer)
        kl = cfg.models.policy_trainer.kl_coef > 0
        self.trainer = PolicyTrainer(
            model,
            tokenizer,
            _trainer_settings(cfg, precision),
            reference=load_policy(cfg.reference_path, **load) if kl else None,
        )
        self._lockstep = Lockstep()
        self.engine = EmbeddedEngine(
            model,
            eos_token_ids=eos,
            max_slots=cfg.models.policy.max_concurrent_requests,
            max_context=max(cfg.train_budget().context_tokens, cfg.eval_budget().context_tokens),
            decode=tokenizer.decode,
            lockstep=self._lockstep,
        )
        # What is loaded by now stays: the collector need not walk it again during rollouts.
        gc.collect()
        gc.freeze()
        asyncio.get_running_loop().set_default_executor(self._lockstep.executor)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        gc.unfreeze()

    def metrics(self) -> dict[str, float]:
        return self.engine.stats()

    def validate(self, tasks: Sequence[Task]) -> list[Task]:
        """Build every agent and find every reward function once; drop prompts that are too long.

        Raises:
            AgentError, ConfigError: an agent, its YAML or its reward function cannot be had.
            DataError: no prompt is short enough.
        """
        if not tasks:
            return []
        seen = set()
        for task in tasks:
            key = (
                task.agent_name,
                task.agent_cfg_path,
                task.data_source,
                task.fields.get("reward_fn"),
            )
            if key in seen:
                continue
            seen.add(key)
            agent, agent_reward_fn = self._agents.agent(task.agent_name, task.agent_cfg_path)
            if resolve_reward(task, agent_reward_fn) is None and not sets_own_reward(agent):
                raise ConfigError(
                    f"row {task.uid}: no reward. No function is registered for its data_source "
                    f"{task.data_source!r}, and neither the row nor the YAML of agent "
                    f"{task.agent_name!r} names one; add @reward({task.data_source!r}) to a module "
                    "in runtime_args.import_modules, or reward_fn: pkg.mod:function to the row or "
                    "the YAML"
                )
        kept, _ = drop_long(
            tasks,
            lambda task: len(self._prompts.first(task.messages)),
            self._cfg.models.policy.max_prompt_tokens_length,
        )
        return kept

    async def run_agent(
        self, task: Task, *, sampling: SamplingParams, budget: Budget, session: Session
    ) -> Trajectory:
        agent, agent_reward_fn = self._agents.agent(task.agent_name, task.agent_cfg_path)
        with self._lockstep.run():
            return await run_agent(
                agent,
                task,
                engine=self.engine,
                sampling=sampling,
                budget=budget,
                session=session,
                reward_function=resolve_reward(task, agent_reward_fn),
                timeout_s=self._cfg.runtime_args.agent_timeout_s,
            )

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        """Nothing to move: engine and trainer share one module. The engine's caches are freed."""
        await self.engine.sleep()
        yield
        await self.engine.wake()


def _trainer_settings(cfg: GrpoConfig, precision: str) -> TrainerSettings:
    trainer = cfg.models.policy_trainer
    optimizer = trainer.optimizer
    return TrainerSettings(
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        clip_grad=optimizer.clip_grad,
        lr_schedule=optimizer.lr_schedule,
        warmup_steps=optimizer.warmup_steps,
        total_steps=cfg.total_steps,
        kl_coef=trainer.kl_coef,
        entropy_coef=trainer.entropy_coef,
        pos_clip_ratio=trainer.pos_clip_ratio,
        neg_clip_ratio=trainer.neg_clip_ratio,
        temperature=cfg.models.policy.temperature,
        gradient_checkpointing=trainer.gradient_checkpointing,
        precision=precision,
    )
