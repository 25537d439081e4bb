"""The agents of one process: user code imported, every agent built once, ready to be run.

The process is the only one there is (``LocalCluster``), or one of many workers of a Ray cluster.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from datetime import date
from typing import Any

from chatlearn.config import GrpoConfig
from chatlearn.data.prompt_dataset import drop_long
from chatlearn.errors import ConfigError
from chatlearn.interfaces import Engine
from chatlearn.models.agent.agent_module import AgentFactory, import_modules
from chatlearn.models.agent.agent_run import run_agent, sets_own_reward
from chatlearn.models.agent.auxiliary import build_auxiliary
from chatlearn.models.agent.chat_model import CustomChatModel
from chatlearn.models.agent.prompt_builder import PromptBuilder
from chatlearn.models.agent.templates.check import check_template
from chatlearn.models.agent.tool_parser import ToolParser, guess, tool_parser
from chatlearn.rewards.checks import load_checks
from chatlearn.rewards.registry import resolve_reward
from chatlearn.types import Budget, SamplingParams, Session, Task, Trajectory

logger = logging.getLogger(__name__)


def import_user_code(cfg: GrpoConfig) -> None:
    """The built-in agents and rewards, then ``runtime_args.import_modules``.

    Raises:
        ConfigError, AgentError: a module is not there, or raised while it was imported.
    """
    import_modules(["chatlearn.models.agent.examples", "chatlearn.rewards.math"])
    import_modules(cfg.runtime_args.import_modules)


class Agents:
    """Runs the agents of dataset rows in this process.

    Args:
        cfg: the run's configuration; ``import_user_code`` was called with it.
        tokenizer: of the policy, with a chat template.
        eos_token_ids: tokens that end a turn.
    """

    def __init__(self, cfg: GrpoConfig, tokenizer: Any, eos_token_ids: Collection[int]) -> None:
        self._cfg = cfg
        self._prompts = PromptBuilder(
            tokenizer,
            frozenset(eos_token_ids),
            {"enable_thinking": cfg.models.policy.enable_thinking},
            today=date.fromisoformat(cfg.models.policy.template_date),
        )
        llm = CustomChatModel(
            model="policy",
            tokenizer=tokenizer,
            prompts=self._prompts,
            parser=_parser(cfg.models.policy.tool_parser, tokenizer),
            max_input_tokens=cfg.max_context,
        )
        self._checks = load_checks(cfg.runtime_args.checks)
        auxiliary_models = build_auxiliary(cfg.runtime_args.auxiliary_models)
        self._factory = AgentFactory(llm, tokenizer, auxiliary_models)

    def validate(self, tasks: Sequence[Task]) -> list[Task]:
        """Build every agent and find every reward function once; drop prompts that are too long.

        Raises:
            AgentError, ConfigError: an agent, its YAML or its reward function cannot be had.
            DataError: no prompt is short enough.
        """
        if not tasks:
            return []
        check_template(
            self._prompts.tokenizer, self._prompts.eos_ids, self._prompts.template_kwargs
        ).raise_or_warn()
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
            agent, agent_reward_fn = self._factory.agent(task.agent_name, task.agent_cfg_path)
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

    async def run(
        self,
        task: Task,
        *,
        engine: Engine,
        sampling: SamplingParams,
        budget: Budget,
        session: Session,
    ) -> Trajectory:
        """Run the agent of ``task`` on ``engine`` and score it (``agent_run.run_agent``)."""
        agent, agent_reward_fn = self._factory.agent(task.agent_name, task.agent_cfg_path)
        return await run_agent(
            agent,
            task,
            engine=engine,
            sampling=sampling,
            budget=budget,
            session=session,
            reward_function=resolve_reward(task, agent_reward_fn),
            timeout_s=self._cfg.runtime_args.agent_timeout_s,
            trainable_nodes=self._cfg.models.policy.trainable_nodes,
            train_orphans=self._cfg.models.policy.train_orphans,
            checks=self._checks,
        )


def _parser(name: str, tokenizer: Any) -> ToolParser:
    """The parser of ``models.policy.tool_parser``; ``auto`` is said in the log."""
    if name == "auto":
        template = tokenizer.chat_template
        name = guess(template if isinstance(template, str) else "\n".join(template.values()))
        logger.info("models.policy.tool_parser: %s, by the chat template", name)
    return tool_parser(name)
