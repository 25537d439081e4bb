"""``runtime_args``: the run, where it goes, on what data, how long."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from chatlearn.config.kinds import (
    FileList,
    FileNames,
    FolderName,
    FrozenDict,
    Name,
    NotNegative,
    Positive,
    Section,
    Share,
    Whole,
    only,
)


class LogArgs(Section):
    """Where metrics go besides ``metrics.jsonl``, which is always written."""

    enable_tensorboard: bool = True
    """Write TensorBoard events to the run folder."""
    enable_wandb: bool = False
    """Send metrics to Weights & Biases. Needs the extra ``chatlearn[wandb]`` and a project."""
    wandb_project: str | None = None
    """Project of the W&B run; required with ``enable_wandb``."""
    wandb_name: str | None = None
    """Display name of the W&B run. null = W&B makes one up."""
    wandb_id: str | None = None
    """Id of the W&B run, to continue one. null = a new id."""
    wandb_dir: str | None = None
    """Folder of W&B's own files. null = the run folder."""
    wandb_resume: Literal["allow", "must", "never", "auto"] = "allow"
    """What W&B does when the id exists already, as in ``wandb.init(resume=…)``."""


class AuxiliaryModel(Section):
    """A frozen model beside the policy, of which nothing is trained."""

    factory: Name | None = None
    """A function that returns a LangChain chat model: ``pkg.mod:function`` or
    ``path/file.py:function``."""
    base_url: Name | None = None
    """Address of an OpenAI-compatible endpoint, ``http://host:port/v1``. Needs the extra
    ``chatlearn[openai]``."""
    model: Name | None = None
    """Name of the model at ``base_url``."""
    api_key_env: Name | None = None
    """Environment variable that holds the key of ``base_url``. null = it needs none."""
    temperature: NotNegative | None = None
    """Its sampling temperature at ``base_url``. null = the server's."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds until a request to ``base_url`` fails."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> AuxiliaryModel:
        if (self.factory is None) == (self.base_url is None):
            raise PydanticCustomError("refused", "must have either factory or base_url")
        if self.base_url is not None and self.model is None:
            raise PydanticCustomError("refused", "must name the model at base_url: model")
        return self


KNOWN_CHECKS = ("nonsense", "wrong_toolcall", "repetition")
"""The built-in checks of ``rewards/checks.py``."""


class CheckArgs(Section):
    """A check for degenerate output (``docs/rewards.md``)."""

    name: Name
    """``nonsense``, ``wrong_toolcall``, ``repetition``, or your function: ``path/file.py->name`` or
    ``pkg.mod->name``."""
    threshold: Share = 0.5
    """Severity, from 0 to 1, at which the check acts."""
    action: Literal["reward", "stop", "mask"] = "reward"
    """``reward``: the run's reward becomes the one below. ``stop``: that too, and the run ends
    there, as truncated. ``mask``: the turn is not trained."""
    reward: float = 0.0
    """What a run earns; matters with ``reward`` and ``stop``."""

    @model_validator(mode="after")
    def _is_known(self) -> CheckArgs:
        if self.name not in KNOWN_CHECKS and not re.search("->|:", self.name):
            near = difflib.get_close_matches(self.name, KNOWN_CHECKS, 1)
            raise PydanticCustomError(
                "refused",
                "{message}",
                {
                    "message": f"there is no check {self.name!r}"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                    + f" Known are {', '.join(KNOWN_CHECKS)}; yours is 'path/file.py->name'"
                },
            )
        return self


class RuntimeArgs(Section):
    """The run: where, on what data, how long."""

    exp_name: FolderName = "chatlearn"
    """Name of the experiment: its runs are folders under ``{output_dir}/{exp_name}``."""
    output_dir: Name = "outputs"
    """Folder of all experiments."""
    seed: Whole = 1234
    """Seed of the data order and of sampling. With ``cluster=local`` a run repeats bit for bit."""
    cluster: Literal["local", "ray"] = "local"
    """Who runs where: ``local`` is one process, ``ray`` is trainer ranks, engines and rollout
    workers as processes of one or several machines (extra ``chatlearn[ray]``)."""
    rollout_backend: Literal["embedded", "sglang"] = "embedded"
    """What samples: ``embedded`` is the engine inside this process, with the trainer's weights;
    ``sglang`` is SGLang servers, which this run starts and ends."""
    train_backend: Annotated[
        Literal["fsdp"], only("fsdp", "there is no Megatron trainer; a cluster trains with FSDP2")
    ] = "fsdp"
    """Always ``fsdp``, and here because launch commands set it."""
    colocation: Annotated[
        tuple[Literal["policy", "policy_trainer", "ref_policy"], ...], Field(strict=False)
    ] = ()
    """Models that share GPUs: ``[policy, policy_trainer, ref_policy]`` lets engines and trainer use
    the same ones in turns, each giving its memory back while the other works. Empty = every model
    has GPUs of its own."""
    ray_address: Name | None = None
    """A Ray cluster that is running already (``auto``, ``host:port``). null = the run starts one,
    on all machines that RANK, WORLD_SIZE and MASTER_ADDR describe, and ends it."""
    working_dir: Name | None = None
    """Folder that Ray copies to every machine and starts the workers in, for clusters without a
    shared disk. null = the folder the run was started in, under the same path everywhere."""
    task_type: Annotated[
        Literal["agent"],
        only("agent", "only agents are trained; a plain chat is an agent of one model call"),
    ] = "agent"
    """Always ``agent``: every dataset row names the agent that runs on it."""
    use_rollout_manager: Annotated[
        Literal[True], only(True, "the rollout manager is the only way agents are run")
    ] = True
    """Always true, and here because launch commands set it."""
    raw_chat: Annotated[Literal[True], only(True, "rows always keep their chat messages")] = True
    """Always true, and here because launch commands set it."""
    data_rerank: Annotated[
        Literal[False], only(False, "the rollouts of a prompt always run as one group")
    ] = False
    """Always false, and here because launch commands set it."""
    import_modules: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Your code, imported before anything runs so that it can register agents and rewards: a list
    of modules (``pkg.mod``) and files (``path/to/agent.py``)."""
    data_path: FileNames
    """Training rows: a .json, .jsonl or .parquet file, or several separated by commas."""
    eval_data_path: FileList = ""
    """Evaluation rows, spelled like ``data_path``. Empty = there are none."""
    data_shuffle: bool = True
    """Shuffle the prompts anew for every pass over the data. False = the order of the files."""
    num_episode: Positive = 200
    """Episodes in all. An episode samples, trains and publishes new weights."""
    sample_per_episode: Positive = 64
    """Rollouts an episode: prompts × ``models.policy.num_inference_per_prompt``."""
    train_global_batch_size: Positive | None = None
    """Rollouts an optimizer step; must divide ``sample_per_episode``. null = all of them, one step
    an episode."""
    num_training_epoch: Positive = 1
    """Passes over the rollouts of an episode. Every pass after the first is off-policy."""
    max_staleness: Whole = 0
    """Most episodes by which the weights that sampled a rollout may be older than the weights it
    trains. 0 = on-policy: sampling waits for training."""
    replace_zero_signal_groups: bool = False
    """Sample another prompt when all rollouts of a group earned the same reward: they would have
    no advantage and teach nothing."""
    max_concurrent_rollouts: Positive = 64
    """Agent runs going on at once."""
    agent_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds one agent run may take, tools included; then its outcome is ``timeout``."""
    auxiliary_models: Annotated[dict[str, AuxiliaryModel], AfterValidator(FrozenDict)] = Field(
        default={}, validate_default=True
    )
    """Frozen models for agents and judges, by name: ``{judge: {base_url: "http://…/v1", model:
    qwen}}`` or ``{judge: {factory: "pkg.mod:function"}}``. An agent has them as
    ``self.auxiliary_models["judge"]``; nothing they say is trained."""
    checks: Annotated[tuple[CheckArgs, ...], Field(strict=False)] = ()
    """What is done about degenerate output: a list of ``{name, threshold, action, reward}``, as
    ``[{name: repetition, action: mask}, {name: nonsense, reward: -1.0}]``. ``name`` is
    ``nonsense``, ``wrong_toolcall``, ``repetition`` or ``path/file.py->function``; ``threshold``
    (0.5) is the severity at which it acts; ``action`` is ``reward`` (the run's reward becomes
    ``reward``, 0.0), ``stop`` (that too, and the run ends) or ``mask`` (the turn is not trained).
    The rate of each is the metric ``checks/<name>``."""
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of an episode's rollouts that may fail (agent, judge, engine, timeout) before the run
    stops and says why. 0 = the first failure stops it, 1 = none does."""
    save_episode_interval: Whole = 50
    """Episodes between checkpoints; the last episode is saved too. 0 = only at the end."""
    max_checkpoints: Positive | None = 3
    """Checkpoints kept; older ones are deleted. null = all are kept."""
    enable_resume_training: bool = True
    """Continue the newest unfinished run of this ``exp_name``. False = start a new one."""
    eval_episode_interval: Whole = 0
    """Episodes between evaluations; the last episode is evaluated too. 0 = never."""
    enable_eval_before_training: bool = False
    """Evaluate the untrained weights first, and the last ones, whatever the interval."""
    log_args_dict: LogArgs = LogArgs()
    """Metrics besides ``metrics.jsonl``."""

    @property
    def data_files(self) -> list[str]:
        """The training files."""
        return _split(self.data_path)

    @property
    def eval_files(self) -> list[str]:
        """The evaluation files; empty when there are none."""
        return _split(self.eval_data_path)

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts an optimizer step."""
        return self.train_global_batch_size or self.sample_per_episode

    @property
    def steps_per_episode(self) -> int:
        """Optimizer steps an episode, over all its passes."""
        return self.sample_per_episode // self.rollouts_per_step * self.num_training_epoch


def _split(paths: str) -> list[str]:
    return [part.strip() for part in paths.split(",") if part.strip()]
