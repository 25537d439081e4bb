"""``workflow``: the agent that runs a user's workflow, function or class, and its judge.

It is an agent like any other, found by ``runtime_args.import_modules:
[chatlearn.tuner.workflow_agent]``; its YAML names the workflow, so that workers of a cluster find
it too. The judge is asked inside the run, where the workflow's response still is an object.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from chatlearn.errors import AgentError, JudgeError, boundary
from chatlearn.models.agent.agent_module import register
from chatlearn.models.agent.base_agent_graph import BaseAgentGraph
from chatlearn.models.agent.environment import run_environment
from chatlearn.models.agent.messages import to_openai
from chatlearn.models.agent.run import BudgetExhausted, current_run
from chatlearn.rewards.judge_names import find_judge
from chatlearn.rewards.judging import JudgeCase, load_judge
from chatlearn.rewards.score import final_response
from chatlearn.tuner.auxiliary import AuxiliaryIn
from chatlearn.tuner.model_kinds import ModelKind, judge_kind, model_kind
from chatlearn.tuner.model_tuner import agentscope_model, model_tuner, openai_client
from chatlearn.tuner.naming import importing, known_object, load_object
from chatlearn.tuner.rows import AGENT_NAME
from chatlearn.tuner.signatures import check_workflow, is_class_form, parameters_of
from chatlearn.tuner.workflow import TaskCore, WorkflowOutput, WorkflowTask

if TYPE_CHECKING:
    from chatlearn.data.environment.client import Instance

TASK_COLUMN = "task"
"""Column of a dataset row that holds the raw row, whole."""

_NOT_OF_THE_TASK = ("sampling_params", "agent_name", "agent_cfg_path", "uid")
_RETURNS = "return WorkflowOutput(reward=…) or WorkflowOutput(response=…)"

logger = logging.getLogger("chatlearn.workflow")
"""What a workflow that takes ``logger`` is given."""


class WorkflowAgentConfig(BaseModel):
    """The agent's YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workflow: str
    """``path/file.py->Name`` or ``pkg.mod->Name``: the function, or the class."""
    judge: str | None = None
    """The judge, by such a name or a built-in one (``math_answer``). null = the workflow gives the
    reward itself, or the environment does."""
    query_field: str | None = None
    """Column of the raw row that is ``main_query``. null = the text of the last prompt message."""
    environment: str | None = None
    """URL of the environment service; each run has an instance of its own task there."""
    truncated_reward: float | None = 0.0
    """Reward of a run whose workflow raised because its tokens were used up: it has no response to
    judge. null = such a run counts as failed."""


@register(AGENT_NAME)
class WorkflowAgent(BaseAgentGraph):
    """Runs the workflow that its YAML names."""

    Config = WorkflowAgentConfig

    def build_graph(self) -> None:
        """Find the workflow and its judge; what is wrong with them is said before any run."""
        spec, where = self.cfg.workflow, f"workflow of agent {self.agent_name!r}"
        self._workflow = load_object(spec, where)
        where = f"{where} ({spec})"
        check_workflow(self._workflow, where)
        self._kind = model_kind(self._workflow, where)
        self._judge, self._judge_kind = None, self._kind
        if self.cfg.judge is not None:
            where = f"judge of agent {self.agent_name!r}"
            with importing(self.cfg.judge):
                judge = known_object(self.cfg.judge) or find_judge(self.cfg.judge, where)
            self._judge = load_judge(judge, where)
            self._judge_kind = judge_kind(judge, self._kind)

    async def run(self, **row: Any) -> dict[str, Any]:
        """One run of the workflow on one row, and its judgement."""
        where = f"workflow {self.cfg.workflow} on task {row['uid']}"
        async with AsyncExitStack() as stack:
            task = self._task(row, await stack.enter_async_context(self._instance(row)))
            output = await self._attempt(task, where)
            if output is None:
                return {"reward": self.cfg.truncated_reward}
            return await self._scored(task, output, where)

    async def _attempt(self, task: WorkflowTask, where: str) -> WorkflowOutput | None:
        """What the workflow returned; None when it raised because its tokens were used up."""
        try:
            with boundary(AgentError, where):
                returned = await self._call(task)
            return _checked(returned, where)
        except AgentError as error:
            used_up = isinstance(error, BudgetExhausted) or current_run().recorder.exhausted
            if not used_up or self.cfg.truncated_reward is None:
                raise
            return None

    async def _call(self, task: WorkflowTask) -> Any:
        if is_class_form(self._workflow):
            async with self.endpoint() as door:
                return await self._workflow().execute(task, model_tuner(door, self.llm))
        async with self._model() as model:
            offered = {
                "task": task.task.metadata,
                "model": model,
                "auxiliary_models": AuxiliaryIn(self._kind, self.auxiliary_models),
                "logger": logger,
            }
            taken = parameters_of(self._workflow)
            return await self._workflow(**{k: v for k, v in offered.items() if k in taken})

    @asynccontextmanager
    async def _model(self) -> AsyncIterator[Any]:
        if self._kind is ModelKind.LANGCHAIN:
            yield self.llm
            return
        async with self.endpoint() as door:
            if self._kind is ModelKind.OPENAI:
                yield openai_client(door.base_url, door.api_key)
            else:
                yield agentscope_model(door.base_url, door.api_key, door.model)

    async def _scored(
        self, task: WorkflowTask, output: WorkflowOutput, where: str
    ) -> dict[str, Any]:
        """Reward and metrics: the workflow's reward, else the judge's, else the environment's."""
        reward, metrics = output.reward, {}
        if reward is None and self._judge is not None:
            verdict = await self._judge(self._case(task, output))
            reward, metrics = verdict.reward, verdict.logged
        elif reward is None and task.gym_env is not None:
            reward = (await task.gym_env.evaluate(self._case(task, output).messages)).score
        elif reward is None:
            raise JudgeError(
                f"{where} returned no reward, and there is no judge; return "
                "WorkflowOutput(reward=…), or name a judge: judge_func of tune(), judge in the "
                "agent's YAML"
            )
        metrics |= output.metrics or {}
        if output.is_success is not None:
            metrics["success"] = float(output.is_success)
        return {"reward": reward, "metrics": metrics}

    def _case(self, task: WorkflowTask, output: WorkflowOutput) -> JudgeCase:
        recorder = current_run().recorder
        messages = [to_openai(message) for message in recorder.conversation]
        return JudgeCase(
            task=task.task.metadata,
            response=output.response,
            metadata=dict(output.metadata or {}),
            query=task.task.main_query,
            ground_truth=task.task.ground_truth,
            messages=messages,
            turns=list(recorder.turns),
            environment=task.gym_env,
            auxiliary_models=AuxiliaryIn(self._judge_kind, self.auxiliary_models),
            workflow_task=task,
            workflow_output=output,
        )

    def _task(self, row: Mapping[str, Any], instance: Any) -> WorkflowTask:
        raw = row.get(TASK_COLUMN)
        if not isinstance(raw, dict):
            raw = {key: value for key, value in row.items() if key not in _NOT_OF_THE_TASK}
        core = TaskCore(
            main_query=self._query(raw, row),
            metadata=dict(raw),
            task_id=row["uid"],
            init_messages=row["messages"],
            ground_truth=row["ground_truth"],
        )
        return WorkflowTask(task=core, gym_env=instance)

    def _query(self, raw: Mapping[str, Any], row: Mapping[str, Any]) -> str:
        name = self.cfg.query_field
        if name is None:
            return _text(row["messages"][-1].get("content"))
        if raw.get(name) in (None, ""):
            raise AgentError(
                f"row {row['uid']} has no {name!r} (query_field of the agent's YAML); it has "
                f"{', '.join(sorted(map(str, raw)))}"
            )
        return str(raw[name])

    @asynccontextmanager
    async def _instance(self, row: Mapping[str, Any]) -> AsyncIterator[Instance | None]:
        """This run's instance of the environment service; None when the YAML names no service."""
        if self.cfg.environment is None:
            yield None
            return
        raw = row.get(TASK_COLUMN) or row
        task_id = str(raw.get("task_id", row["uid"]))
        async with run_environment(self.cfg.environment).instance(task_id) as instance:
            yield instance


def _checked(returned: Any, where: str) -> WorkflowOutput:
    """What a workflow returned, as our type; AgentScope's of the same name will do."""
    if isinstance(returned, WorkflowOutput):
        return returned
    if hasattr(returned, "reward") and type(returned).__name__ == "WorkflowOutput":
        names = ("reward", "response", "metrics", "metadata", "is_success")
        return WorkflowOutput(**{name: getattr(returned, name, None) for name in names})
    shown = repr(returned)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise AgentError(f"{where} returned {type(returned).__name__} {shown}; {_RETURNS}")


def _text(content: Any) -> str:
    """The text of a message's content."""
    return final_response([{"role": "assistant", "content": content}])
