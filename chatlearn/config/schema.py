"""Every key a run can set: its type, its default, and under it what it means.

The docstrings are the manual (``docs/config.md`` is generated from them). Numbers that follow from
the keys are properties of the section; they are never stored, so they cannot disagree. The tree
is frozen and its types are strict: ``"50"`` is not a number and ``1`` is not a boolean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_origin

from pydantic import model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from chatlearn.config.kinds import (
    Section,
)
from chatlearn.config.models import Models, NodeSamplingArgs
from chatlearn.config.rules import conflicts
from chatlearn.config.runtime_args import RuntimeArgs
from chatlearn.types import Budget, NodeSampling, SamplingParams


class GrpoConfig(Section):
    """The whole configuration of ``chatlearn grpo``."""

    runtime_args: RuntimeArgs
    """The run: where, on what data, how long."""
    models: Models
    """The roles of a model, and who runs the agents that use it."""

    @model_validator(mode="after")
    def _agrees(self) -> GrpoConfig:
        found = conflicts(self)
        if found:
            text = "\n".join(conflict.message for conflict in found)
            raise PydanticCustomError("conflicts", "{text}", {"text": text, "conflicts": found})
        return self

    @property
    def prompts_per_episode(self) -> int:
        """Groups an episode."""
        return self.runtime_args.sample_per_episode // self.models.policy.num_inference_per_prompt

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run, for the learning rate schedule."""
        return self.runtime_args.steps_per_episode * self.runtime_args.num_episode

    def saves_after(self, episode: int) -> bool:
        """Whether a checkpoint is due after ``episode``, counted from 1."""
        return self._is_due(episode, self.runtime_args.save_episode_interval, at_end=True)

    def evaluates_after(self, episode: int) -> bool:
        """Whether an evaluation is due after ``episode``, counted from 1."""
        args = self.runtime_args
        at_end = args.eval_episode_interval > 0 or args.enable_eval_before_training
        return self._is_due(episode, args.eval_episode_interval, at_end=at_end)

    def _is_due(self, episode: int, interval: int, *, at_end: bool) -> bool:
        if episode == self.runtime_args.num_episode:
            return at_end
        return interval > 0 and episode % interval == 0

    @property
    def policy_path(self) -> str:
        """Model folder or hub id that samples."""
        return self.models.policy.load or self.models.policy_trainer.load

    @property
    def reference_path(self) -> str:
        """Model folder or hub id of the reference."""
        return self.models.ref_policy.load or self.models.policy_trainer.load

    @property
    def reference_is_base(self) -> bool:
        """Whether the reference is the policy without its adapters, and no second model."""
        lora_rank = self.models.policy_trainer.lora_rank
        return lora_rank > 0 and self.reference_path == self.models.policy_trainer.load

    def precision(self, device_type: str) -> Literal["fp32", "bf16"]:
        """``models.policy_trainer.precision``, decided for a device ``cpu`` or ``cuda``."""
        chosen = self.models.policy_trainer.precision
        if chosen == "auto":
            return "bf16" if device_type == "cuda" else "fp32"
        return chosen

    @property
    def is_colocated(self) -> bool:
        """Whether engines and trainer take turns on the same devices."""
        return bool(self.runtime_args.colocation)

    @property
    def max_context(self) -> int:
        """Most tokens in any one context, training or evaluation."""
        return max(self.train_budget().context_tokens, self.eval_budget().context_tokens)

    @property
    def publish_method(self) -> Literal["tensor", "collective", "disk"]:
        """``models.policy.publish``, decided."""
        models = self.models
        if models.policy.publish != "auto":
            return models.policy.publish
        on_cpus = not models.policy.num_gpu and not models.policy_trainer.num_gpu
        return "tensor" if self.is_colocated or on_cpus else "collective"

    def train_sampling(self) -> SamplingParams:
        """How training rollouts sample."""
        policy = self.models.policy
        return SamplingParams(
            temperature=policy.temperature,
            top_p=policy.top_p,
            top_k=policy.top_k,
            max_new_tokens=self.train_budget().turn_tokens,
            seed=self.runtime_args.seed,
            nodes=_node_sampling(policy.node_sampling),
        )

    def eval_sampling(self) -> SamplingParams:
        """How evaluation rollouts sample."""
        policy = self.models.policy
        return SamplingParams(
            temperature=policy.eval_temperature,
            top_p=policy.eval_top_p,
            top_k=policy.eval_top_k,
            max_new_tokens=self.eval_budget().turn_tokens,
            seed=self.runtime_args.seed,
            nodes=_node_sampling(policy.eval_node_sampling),
        )

    def train_budget(self) -> Budget:
        """Token limits of a training rollout."""
        policy = self.models.policy
        rollout = policy.max_response_tokens_length
        return Budget(
            turn_tokens=policy.max_tokens_per_turn or rollout,
            rollout_tokens=rollout,
            context_tokens=policy.train_context,
        )

    def eval_budget(self) -> Budget:
        """Token limits of an evaluation rollout."""
        policy = self.models.policy
        rollout = policy.eval_response
        inherited = min(policy.max_tokens_per_turn or rollout, rollout)
        return Budget(
            turn_tokens=policy.eval_max_tokens_per_turn or inherited,
            rollout_tokens=rollout,
            context_tokens=policy.eval_context,
        )


def sections(root: type[Section] = GrpoConfig, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every node of the tree with its dotted name, parents first; the root's name is ''."""
    yield prefix, root
    for name, field in root.model_fields.items():
        kind = field.annotation
        # In Python 3.10 tuple[str, ...] passes for a type, and issubclass refuses it.
        if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, Section):
            yield from sections(kind, f"{prefix}.{name}" if prefix else name)


def keys() -> dict[str, FieldInfo]:
    """Every settable key, dotted, with its field; sections themselves are not keys."""
    nodes = dict(sections())
    return {
        key: field
        for prefix, node in nodes.items()
        for name, field in node.model_fields.items()
        if (key := f"{prefix}.{name}".lstrip(".")) not in nodes
    }


def _node_sampling(nodes: Mapping[str, NodeSamplingArgs]) -> tuple[NodeSampling, ...]:
    return tuple(NodeSampling(pattern, **dict(args)) for pattern, args in nodes.items())
