"""One process, no Ray: agents, trainer and the loop are plain objects of this process.

The engine is inside it too (``EmbeddedEngine``, the very module that the trainer updates), or
SGLang servers beside it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.logging import disable_progress_bar

from chatlearn.cluster.agents import Agents, import_user_code
from chatlearn.cluster.delivery import Delivery
from chatlearn.cluster.fleet import SGLangFleet
from chatlearn.cluster.settings import (
    Vocabulary,
    server_settings,
    sglang_engines,
    trainer_settings,
)
from chatlearn.config import GrpoConfig
from chatlearn.errors import ConfigError
from chatlearn.interfaces import Weights
from chatlearn.models.engine.embedded import EmbeddedEngine
from chatlearn.models.engine.lockstep import Lockstep
from chatlearn.models.engine.sglang_server import SGLangServer
from chatlearn.models.policy.loading import eos_token_ids, load_policy, load_tokenizer
from chatlearn.models.policy.trainer import PolicyTrainer
from chatlearn.models.policy.weight_buckets import Sent
from chatlearn.types import Budget, SamplingParams, Session, Task, Trajectory

logger = logging.getLogger(__name__)

_MAX_THREADS = 256
"""Sync nodes and tools that may be under way at once beside SGLang servers."""


class LocalCluster:
    """Engine, trainer and agents of this process.

    Everything is loaded on entering, so that the configuration can be refused before a model is
    read. Agents run as tasks of the event loop; a breakpoint in a graph node stops there.

    Args:
        cfg: the run's configuration.
        logs: folder for the logs of SGLang servers.
    """

    engine: EmbeddedEngine | SGLangFleet
    trainer: PolicyTrainer

    def __init__(self, cfg: GrpoConfig, *, logs: Path) -> None:
        self._cfg, self._logs = cfg, logs
        self._servers: list[SGLangServer] = []
        self._lockstep: Lockstep | None = None

    async def __aenter__(self) -> LocalCluster:
        try:
            await self._start()
        except BaseException:
            await self.__aexit__()
            raise
        # What is loaded by now stays: the collector need not walk it again during rollouts.
        gc.collect()
        gc.freeze()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        gc.unfreeze()
        if self._servers and hasattr(self, "engine"):
            await self.engine.close()
            await self._delivery.close()
        await asyncio.gather(*(server.stop() for server in self._servers))

    def metrics(self) -> dict[str, float]:
        return self.engine.stats()

    def validate(self, tasks: Sequence[Task]) -> list[Task]:
        return self._agents.validate(tasks)

    async def run_agent(
        self, task: Task, *, sampling: SamplingParams, budget: Budget, session: Session
    ) -> Trajectory:
        with self._running():
            return await self._agents.run(
                task, engine=self.engine, sampling=sampling, budget=budget, session=session
            )

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        """The embedded engine shares the trainer's module, so nothing moves: its caches are freed.
        Colocated servers give their memory to the trainer."""
        await self.engine.sleep()
        yield
        if isinstance(self.engine, EmbeddedEngine):
            await self.engine.wake()

    async def _start(self) -> None:
        cfg = self._cfg
        torch.manual_seed(cfg.runtime_args.seed)
        import_user_code(cfg)
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
        self._agents = Agents(cfg, tokenizer, eos)
        has_reference = cfg.models.policy_trainer.kl_coef > 0 and not cfg.reference_is_base
        self.trainer = PolicyTrainer(
            model,
            tokenizer,
            trainer_settings(cfg, precision),
            reference=load_policy(cfg.reference_path, **load) if has_reference else None,
            is_shared=cfg.runtime_args.rollout_backend == "embedded",
        )
        loop = asyncio.get_running_loop()
        if cfg.runtime_args.rollout_backend == "sglang":
            loop.set_default_executor(ThreadPoolExecutor(_MAX_THREADS))
            self.engine = await self._start_servers(
                Vocabulary(model.get_input_embeddings().num_embeddings, eos)
            )
            return
        self._lockstep = Lockstep()
        self.engine = EmbeddedEngine(
            model,
            eos_token_ids=eos,
            max_slots=cfg.models.policy.max_concurrent_requests,
            max_context=cfg.max_context,
            decode=tokenizer.decode,
            lockstep=self._lockstep,
        )
        loop.set_default_executor(self._lockstep.executor)

    async def _start_servers(self, vocabulary: Vocabulary) -> SGLangFleet:
        cfg, policy = self._cfg, self._cfg.models.policy
        for i in range(policy.num_engine):
            settings = server_settings(cfg, gpu_ids=self._gpus_of_engine(i))
            self._servers.append(SGLangServer(settings, log_file=self._logs / f"engine_{i}.log"))
        timeout = policy.engine_start_timeout_s
        await asyncio.gather(*(server.start(timeout_s=timeout) for server in self._servers))
        urls = [server.url for server in self._servers]
        logger.info("engines: %s", ", ".join(urls))
        self._delivery = Delivery(
            cfg,
            sglang_engines(cfg, urls, vocabulary),
            rank=0,
            ranks=1,
            folder=self._logs.parent / "weights",
            host="127.0.0.1",
        )
        return SGLangFleet(
            sglang_engines(cfg, urls, vocabulary),
            self._servers,
            self._send,
            self._expected_checksums,
            policy,
            pauses=cfg.runtime_args.max_staleness > 0,
            colocated=cfg.is_colocated,
            sends_adapters=self._sends_adapters,
        )

    def _gpus_of_engine(self, index: int) -> tuple[int, ...]:
        """The trainer's GPU 0 when colocated, else those after it."""
        policy = self._cfg.models.policy
        if not policy.num_gpu:
            return ()
        split = policy.tensor_model_parallel_size
        first = index * split + (0 if self._cfg.is_colocated else 1)
        return tuple(range(first, first + split))

    async def _send(self, weights: Weights, targets: Sequence[int], version: int) -> Sent:
        if self._sends_adapters:
            return await self._delivery.send_adapter(self.trainer.save_adapter, targets, version)
        return await self._delivery.send(self._as_stored(weights), targets, version)

    async def _expected_checksums(self, weights: Weights) -> dict[str, str] | None:
        if self._sends_adapters:
            weights = self.trainer.base_weights()
        return self._delivery.expected_checksums(self._as_stored(weights))

    def _as_stored(self, weights: Weights) -> Weights:
        """Under the names of the model's files: of a mixture of experts transformers computes with
        other tensors than it stores."""
        for name, tensor in weights:
            yield from revert_weight_conversion(self.trainer.model, {name: tensor}).items()

    @property
    def _sends_adapters(self) -> bool:
        return self._cfg.models.policy_trainer.lora_publish == "adapter"

    def _running(self) -> AbstractContextManager[None]:
        """Around one agent run: the embedded engine steps when every run waits for it."""
        return nullcontext() if self._lockstep is None else self._lockstep.run()
