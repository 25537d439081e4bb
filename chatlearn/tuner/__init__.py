"""The other door: a workflow, a judge, a dataset, one call; or a project of two files.

``tune()`` trains a function or a class as it is; ``chatlearn tune --conf`` does so from a YAML.
Both end in the configuration and the loop of ``chatlearn grpo``. Importing this loads no torch:
names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatlearn.data.dataset_config import DatasetConfig
    from chatlearn.rewards.judging import BaseJudge, JudgeOutput
    from chatlearn.tuner.arguments import AlgorithmConfig, TunerModelConfig
    from chatlearn.tuner.model_tuner import ModelTuner
    from chatlearn.tuner.tuning import TuneResult, tune
    from chatlearn.tuner.workflow import TaskCore, Workflow, WorkflowOutput, WorkflowTask

_HOMES = {
    "AlgorithmConfig": "chatlearn.tuner.arguments",
    "BaseJudge": "chatlearn.rewards.judging",
    "DatasetConfig": "chatlearn.data.dataset_config",
    "JudgeOutput": "chatlearn.rewards.judging",
    "ModelTuner": "chatlearn.tuner.model_tuner",
    "TaskCore": "chatlearn.tuner.workflow",
    "TuneResult": "chatlearn.tuner.tuning",
    "TunerModelConfig": "chatlearn.tuner.arguments",
    "Workflow": "chatlearn.tuner.workflow",
    "WorkflowOutput": "chatlearn.tuner.workflow",
    "WorkflowTask": "chatlearn.tuner.workflow",
    "tune": "chatlearn.tuner.tuning",
}

__all__ = [
    "AlgorithmConfig",
    "BaseJudge",
    "DatasetConfig",
    "JudgeOutput",
    "ModelTuner",
    "TaskCore",
    "TuneResult",
    "TunerModelConfig",
    "Workflow",
    "WorkflowOutput",
    "WorkflowTask",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
