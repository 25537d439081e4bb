"""What a workflow is given and what it returns. Standard library only.

Two forms, one meaning. A function::

    async def run(task: dict, model, auxiliary_models) -> WorkflowOutput: ...

and a class, made anew for every run::

    class MyWorkflow(Workflow):
        async def execute(self, workflow_task, model_tuner) -> WorkflowOutput: ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatlearn.tuner.model_tuner import ModelTuner


@dataclass(slots=True)
class WorkflowOutput:
    """What one run of a workflow gives."""

    reward: float | None = None
    """The run's reward. None leaves it to the judge; a number means that no judge is asked."""
    response: Any = None
    """The answer, of any type: what the judge is given."""
    metrics: dict[str, float] | None = None
    """Numbers for the training log; each appears as ``agent/<name>``."""
    metadata: dict[str, Any] | None = None
    """What the judge reads beside the response: ``metadata["final_answer"]``."""
    is_success: bool | None = None
    """Whether the task is solved; logged as ``agent/success``."""


@dataclass(slots=True)
class TaskCore:
    """The task itself: one row of the dataset."""

    main_query: str
    """The question in words."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The raw row, every column of it."""
    task_id: str = ""
    """Name of the row: ``train-1f0c2a9b:17``."""
    init_messages: list[dict[str, Any]] = field(default_factory=list)
    """The prompt as messages."""
    ground_truth: Any = None
    """The reference answer; None when the row has none."""


@dataclass(slots=True)
class WorkflowTask:
    """What ``Workflow.execute`` is given."""

    task: TaskCore
    gym_env: Any = None
    """This run's instance in the environment service; None without ``environment`` in the YAML."""


class Workflow:
    """The class form. Each run has an object of its own, so ``self`` may keep what it likes."""

    name: str = ""

    async def execute(self, workflow_task: WorkflowTask, model_tuner: ModelTuner) -> WorkflowOutput:
        """Do the task with ``model_tuner`` as the model.

        ``reward=None`` in what it returns leaves the reward to the judge.
        """
        raise NotImplementedError(f"{type(self).__name__} has no execute of its own")
