"""``models``: the policy as it samples and as it learns, the reference, and who runs the agents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from chatlearn.config.kinds import (
    Below1,
    Day,
    Flags,
    FrozenDict,
    Layers,
    Name,
    NotNegative,
    Positive,
    Section,
    Share,
    Temperature,
    TopK,
    Whole,
    only,
)


class NodeSamplingArgs(Section):
    """How the calls of some nodes sample; what is null is as in the rest of the run."""

    temperature: NotNegative | None = None
    """Sampling temperature. 0 = greedy: such calls are not trained."""
    top_p: Share | None = None
    """Nucleus sampling."""
    top_k: TopK | None = None
    """Sample among so many likeliest tokens."""
    max_tokens: Positive | None = None
    """Tokens sampled by one call."""


class FreeGpuMemory(Section):
    """What moves to the CPU's memory while the engines sample on the same GPUs. Matters only with
    ``runtime_args.colocation``; on a CPU there is nothing to move."""

    offload_weights: bool = True
    """Parameters."""
    free_grad_buffers: bool = True
    """Gradients: they are dropped, not moved."""
    offload_optimizer_states: bool = True
    """The moments of AdamW."""


class OffloadWeights(Section):
    """What of the reference moves to the CPU's memory."""

    offload_weights: bool = False
    """Keep the reference's parameters on the CPU between optimizer steps."""


class PolicyConfig(Section):
    """The policy as it samples."""

    load: Name | None = None
    """Model folder or hub id. null = ``models.policy_trainer.load``."""
    num_gpu: Whole = 0
    """GPUs that sample. 0 = the CPU."""
    num_cpu: Positive = 1
    """CPUs that sample, with ``num_gpu=0`` and SGLang: one server for every ``cpu_per_process``."""
    cpu_per_process: Positive = 1
    """CPUs of one server, with ``num_gpu=0``."""
    tensor_model_parallel_size: Positive = 1
    """Parts that one engine is split in, each on a GPU of its own: ``num_gpu`` divided by this is
    the number of engines."""
    is_sync_mode: Annotated[
        Literal[False], only(False, "agents await the engine; there is no synchronous mode")
    ] = False
    """Always false, and here because launch commands set it."""
    num_inference_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Group size: rollouts of one prompt, whose rewards are compared with each other."""
    temperature: Temperature = 1.0
    """Sampling temperature in training; the losses use the same one. More than 0:
    without exploration all rollouts of a prompt are equal."""
    top_p: Share = 1.0
    """Nucleus sampling: keep the likeliest tokens that hold this much probability. 1 = all."""
    top_k: TopK = -1
    """Sample among so many likeliest tokens. -1 = all."""
    max_prompt_tokens_length: Positive = 1024
    """Tokens a row's prompt may have, tools and chat template included."""
    max_response_tokens_length: Positive = 2048
    """Tokens sampled by all calls of one rollout together."""
    max_tokens_per_turn: Positive | None = None
    """Tokens sampled by one call. null = ``max_response_tokens_length``."""
    max_seq_len: Positive | None = None
    """Tokens in any one context: prompt, answers and tool results. null = prompt + response
    lengths, which leaves no extra room for tool results."""
    trainable_nodes: Annotated[tuple[Name, ...], Field(strict=False, min_length=1)] = ("*",)
    """Nodes whose calls are trained, by patterns like file names: ``[writer, "team/*"]``; the calls
    of other nodes are context. A sub-graph's name stands for all that is in it, and ``agent:node``
    is a node of one agent only."""
    train_orphans: bool = False
    """Also train calls that were made in vain: those of an attempt that failed and was made again
    (LangGraph's retry policy, ``with_retry``, ``with_fallbacks``), and of a cancelled branch."""
    node_sampling: Annotated[dict[str, NodeSamplingArgs], AfterValidator(FrozenDict)] = Field(
        default={}, validate_default=True
    )
    """What some nodes sample differently in training, by pattern as in ``trainable_nodes``:
    ``{planner: {temperature: 0.7, max_tokens: 200}}``. The first pattern that matches counts; the
    keys are temperature, top_p, top_k and max_tokens. Tokens are trained at the temperature that
    sampled them."""
    eval_node_sampling: Annotated[dict[str, NodeSamplingArgs], AfterValidator(FrozenDict)] = Field(
        default={}, validate_default=True
    )
    """``node_sampling`` of evaluation."""
    eval_num_inference_per_prompt: Positive = 1
    """Rollouts of one prompt in evaluation; their rewards are averaged."""
    eval_temperature: NotNegative = 0.6
    """Temperature in evaluation. 0 = greedy."""
    eval_top_p: Share = 0.95
    """``top_p`` of evaluation."""
    eval_top_k: TopK = -1
    """``top_k`` of evaluation."""
    eval_max_response_tokens_length: Positive | None = None
    """Tokens sampled by one evaluation rollout. null = ``max_response_tokens_length``."""
    eval_max_tokens_per_turn: Positive | None = None
    """Tokens sampled by one call in evaluation. null = ``max_tokens_per_turn`` where that is set
    (and no more than the rollout may sample), else all of the rollout's."""
    eval_max_seq_len: Positive | None = None
    """Tokens in any one context of an evaluation. null = as in training, plus what an evaluation
    rollout may sample more than a training one."""
    tool_parser: Name = "auto"
    """How tool calls and reasoning are written in this model's text: a name of docs/parsers.md, or
    one of your own. ``auto`` = by the markers in the chat template."""
    enable_thinking: bool = False
    """Passed to the chat template; templates that know no thinking ignore it."""
    template_date: Day = "2025-01-01"
    """The day that chat templates with a date show. It is not today's, so that a seed repeats."""
    max_concurrent_requests: Positive = 64
    """Requests that one engine works on at once; more wait their turn. In the embedded engine each
    holds a cache of one context."""
    sglang_python: Name | None = None
    """Python that serves, when SGLang lives in an environment of its own. null = this one."""
    sglang_args: Flags = Field(default={}, validate_default=True)
    """Further flags of the SGLang server, by their own names: ``{attention_backend: fa3}``."""
    gpu_memory_utilization: Share = 0.8
    """Share of a GPU's memory that an engine takes for weights and KV cache."""
    enforce_eager: bool = False
    """Do not capture CUDA graphs: starts sooner, decodes slower."""
    deterministic: bool = False
    """SGLang's deterministic inference: a request samples the same tokens whatever else is in its
    batch. Slower, and only with attention backends that can."""
    rl_on_policy_target: Literal["fsdp"] | None = None
    """SGLang's switch for kernels whose numbers equal those of an FSDP trainer. GPUs only.
    null = off."""
    engine_start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds one engine may take to load and answer."""
    max_engine_restarts: Whole = 3
    """Times a dead engine is started again; then it stays out and the others go on. Its requests
    are asked elsewhere meanwhile, and no rollout is lost."""
    publish: Literal["auto", "tensor", "collective", "disk"] = "auto"
    """How new weights reach SGLang: ``tensor`` shares memory with the engines of this machine (CUDA
    IPC on GPUs), ``collective`` broadcasts to all of them (NCCL, or gloo on CPUs), ``disk`` writes
    files that they read. ``auto`` = tensor where engine and trainer share devices or one machine's
    CPUs, else collective."""
    publish_bucket_mb: Positive = 512
    """Weights travel in pieces of at most so many MiB: the extra memory of a publish."""
    check_weights_interval: Whole = 10
    """Publishes between checks that the weights in the engines are the trainer's, by checksum; the
    first is always checked. 0 = never."""
    pause_mode: Literal["in_place", "retract"] = "in_place"
    """How requests that run during a publish go on (``max_staleness`` above 0): with the keys and
    values that the old weights computed, or with those of the new weights, computed again."""

    @property
    def num_engine(self) -> int:
        """SGLang servers of the run."""
        if self.num_gpu:
            return self.num_gpu // self.tensor_model_parallel_size
        return self.num_cpu // self.cpu_per_process

    @property
    def train_context(self) -> int:
        """Most tokens in one context of a training rollout."""
        return self.max_seq_len or self.max_prompt_tokens_length + self.max_response_tokens_length

    @property
    def eval_response(self) -> int:
        """Most tokens sampled by one evaluation rollout."""
        return self.eval_max_response_tokens_length or self.max_response_tokens_length

    @property
    def eval_context(self) -> int:
        """Most tokens in one context of an evaluation rollout."""
        more = max(0, self.eval_response - self.max_response_tokens_length)
        return self.eval_max_seq_len or self.train_context + more


class OptimizerConfig(Section):
    """AdamW and its learning rate."""

    lr: NotNegative = 1e-6
    """Learning rate after the warm-up."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of a linear or cosine schedule."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls from ``lr`` to ``min_lr`` over the run."""
    warmup_steps: Whole = 0
    """Optimizer steps over which the rate rises to ``lr``. 0 = it starts there."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay. 0 = off."""
    adam_beta1: Below1 = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: Below1 = 0.95
    """Decay of the squared gradient's running mean."""
    clip_grad: NotNegative = 1.0
    """Largest norm of the whole gradient. 0 = not clipped."""


class PolicyTrainerConfig(Section):
    """The policy as it learns."""

    load: Name
    """Model folder or hub id that training starts from."""
    num_gpu: Whole = 0
    """GPUs that train, one rank each. 0 = the CPU."""
    num_cpu: Positive = 1
    """CPUs that train, with ``num_gpu=0`` on a cluster: one rank for every ``cpu_per_process``."""
    cpu_per_process: Positive = 1
    """CPUs, and threads, of one rank, with ``num_gpu=0`` on a cluster."""
    packing: Annotated[Literal[True], only(True, "rows are always packed")] = True
    """Always true, and here because launch commands set it."""
    free_gpu_memory: FreeGpuMemory = FreeGpuMemory()
    """What moves to the CPU's memory while the engines sample on the same GPUs."""
    tree_packing: bool = True
    """Compute the tokens that rows begin with together once: the prompt of a group, the history of
    a run that branches. The gradient is the same. A step where it would save less than a twentieth,
    or a model that computes otherwise on trees (that is said), packs row by row."""
    attention: Literal["auto", "flash", "flex", "sdpa"] = "auto"
    """Kernel of the training pass. ``auto`` = FlashAttention or FlexAttention on a GPU where they
    are installed, else PyTorch's scaled dot product attention."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Numbers of the forward and backward pass. ``auto`` = fp32 on a CPU, bf16 on a GPU, where the
    optimizer keeps fp32 masters."""
    lora_rank: Whole = 0
    """Train adapters of this rank beside the frozen model instead of its parameters (LoRA; extra
    ``chatlearn[lora]``). They bear a learning rate about ten times as high. 0 = off."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """What the adapters compute is multiplied by ``lora_alpha / lora_rank``."""
    lora_target_modules: Layers = "all-linear"
    """Linear layers that have adapters, by the last parts of their names: ``[q_proj, v_proj]``.
    ``all-linear`` = all of them but the head."""
    lora_publish: Literal["merged", "adapter"] = "merged"
    """What SGLang is sent: ``merged`` is whole weights with the adapters added, so that engines
    sample as fast as without LoRA; ``adapter`` is the adapters alone, in files that the engines
    read: much less to send, and slower to sample with. See docs/placement.md."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its learning rate."""
    advantage: Literal[
        "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gigpo"
    ] = "grpo"
    """How rewards become advantages. docs/algorithms.md has the formulas of this and of ``loss``,
    ``aggregation``, ``correction`` and ``kl_estimator``."""
    turn_discount: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the reward of a run's next rewarded turn that a rewarded turn is credited with, and
    so on. 0 = its own reward alone. ``advantage=gigpo`` discounts every turn by it."""
    overlong_buffer: Whole = 0
    """Sampled tokens before ``models.policy.max_response_tokens_length`` in which a rollout's
    reward falls, in a line, by up to ``overlong_penalty``. 0 = off."""
    overlong_penalty: NotNegative = 1.0
    """What a rollout that used all its tokens loses; matters only with an ``overlong_buffer``."""
    loss: Literal["clip", "gspo", "gmpo", "cispo", "sapo", "reinforce"] = "clip"
    """The policy loss: ``clip`` is the surrogate of PPO and GRPO."""
    aggregation: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    ] = "token-mean"
    """How the losses of tokens become one number. ``seq`` is a rollout, in however many rows."""
    correction: Literal[
        "none", "token-tis", "sequence-tis", "icepop", "token-mask", "sequence-mask"
    ] = "none"
    """Weight of tokens whose probability under the trainer is not what the engine reported."""
    correction_low: Annotated[float, Field(gt=0)] | None = None
    """Smallest ratio that the correction keeps. null = its own default."""
    correction_high: Annotated[float, Field(gt=0)] | None = None
    """Largest ratio that the correction keeps. null = its own default."""
    decoupled: bool = False
    """Take the ratio of the loss against the trainer's own numbers before the first step of the
    episode, for one forward pass more, and leave the engine's to the correction."""
    kl_coef: NotNegative = 0.0
    """Weight of the KL penalty towards the reference. 0 = no reference is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the KL penalty is estimated at the sampled tokens."""
    entropy_coef: NotNegative = 0.0
    """Weight of the entropy bonus. 0 = off."""
    pos_clip_ratio: Annotated[float, Field(gt=0)] = 0.2
    """The probability ratio is clipped at 1 + this (the upper clip of PPO and GRPO). The losses
    ``sapo`` and ``reinforce`` have no clip."""
    neg_clip_ratio: Share = 0.2
    """The probability ratio is clipped at 1 - this; 1 = not below."""
    dual_clip_ratio: Annotated[float, Field(gt=1)] | None = None
    """Largest ratio that still teaches where the advantage is negative (dual-clip PPO, often 3).
    null = there is no such bound."""
    max_token_in_packing: Positive = 8192
    """Tokens in a micro-batch: rows are laid end to end up to this many. Bounds the memory of a
    training pass; changes nothing else."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run the Python files in the model folder (transformers' ``trust_remote_code``)."""

    @property
    def num_rank(self) -> int:
        """Processes that train together on a cluster."""
        return self.num_gpu or self.num_cpu // self.cpu_per_process


class RefPolicyConfig(Section):
    """The frozen model that the KL penalty pulls towards."""

    load: Name | None = None
    """Model folder or hub id. null = ``models.policy_trainer.load``."""
    num_gpu: Whole = 0
    """The same number as ``models.policy_trainer.num_gpu``: the reference lives beside the trainer.
    Matters only with a ``kl_coef``."""
    free_gpu_memory: OffloadWeights = OffloadWeights()
    """What of the reference moves to the CPU's memory."""


class RolloutManagerConfig(Section):
    """The processes that run the agents on a cluster."""

    num_cpu: Positive = 2
    """CPUs for agents: one worker process for every ``cpu_per_process``. Matters only with
    ``runtime_args.cluster=ray``."""
    cpu_per_process: Positive = 1
    """CPUs of one worker process. A process runs many agents at once."""

    @property
    def num_worker(self) -> int:
        """Worker processes."""
        return self.num_cpu // self.cpu_per_process


class Models(Section):
    """The roles of a model, and who runs the agents that use it."""

    policy: PolicyConfig = PolicyConfig()
    """The policy as it samples."""
    policy_trainer: PolicyTrainerConfig
    """The policy as it learns."""
    ref_policy: RefPolicyConfig = RefPolicyConfig()
    """The frozen model that the KL penalty pulls towards."""
    rollout_manager: RolloutManagerConfig = RolloutManagerConfig()
    """The processes that run the agents on a cluster."""
