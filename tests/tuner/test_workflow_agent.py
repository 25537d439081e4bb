"""A workflow as an agent: what it is given, what becomes of what it returns."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import openai
import pytest
import uvicorn
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from pydantic import SecretStr

from chatlearn.data.environment.server import Instances, environment_app
from chatlearn.errors import AgentError, ConfigError
from chatlearn.models.agent.examples.frozen_lake import FrozenLake
from chatlearn.tuner.auxiliary import AuxiliaryIn
from chatlearn.tuner.model_kinds import ModelKind
from chatlearn.tuner.rows import write_agent_cfg
from chatlearn.tuner.workflow_agent import WorkflowAgent
from chatlearn.types import Budget, Outcome

WORKFLOWS = Path(__file__).with_name("workflows.py")
ROW = {"question": "2+2?", "answer": "4"}


@pytest.fixture
def run_workflow(run_graph, tmp_path):
    """Run a workflow of ``workflows.py`` against scripted answers; returns the trajectory."""

    def run(name, answers, *, judge=None, row=ROW, settings=None, **more):
        cfg = write_agent_cfg(
            tmp_path,
            workflow=f"{WORKFLOWS}->{name}",
            judge=f"{WORKFLOWS}->{judge}" if judge and judge != "math_answer" else judge,
            **(settings or {}),
        )
        fields = {"task": row}
        return run_graph(WorkflowAgent, answers, cfg=str(cfg), fields=fields, **more)

    return run


def own(trajectory):
    """Metrics that the workflow and its judge set."""
    ours = ("tool_calls", "tool_errors", "invalid_tool_calls", "seconds")
    return {k: v for k, v in trajectory.metrics.items() if k not in ours}


@pytest.mark.parametrize("form", ["answers", "asks_by_openai"])
@pytest.mark.parametrize(("says", "reward"), [("It is 4", 1.0), ("It is 5", 0.0)])
def test_a_function_is_judged_on_its_response(run_workflow, form, says, reward):
    trajectory = run_workflow(form, [says], judge="contains_answer")

    assert (trajectory.outcome, trajectory.reward) == (Outcome.FINISHED, reward)
    assert [m["content"] for m in trajectory.messages] == ["2+2?", says]
    letters = {"letters": 7.0} if form == "answers" else {}
    assert own(trajectory) == {"judged": 1.0, **letters}


def test_its_own_reward_wins_and_the_judge_is_not_asked(run_workflow):
    trajectory = run_workflow("rewards_itself", ["5"], judge="fails")

    assert (trajectory.outcome, trajectory.reward) == (Outcome.FINISHED, 0.25)
    assert own(trajectory) == {"success": 0.0}


def test_the_class_form_is_made_anew_for_each_run_and_judged_by_name(run_workflow):
    for _ in range(2):
        trajectory = run_workflow("Remembers", ["so it is \\boxed{4}", "yes"], judge="math_answer")
        assert (trajectory.outcome, trajectory.reward) == (Outcome.FINISHED, 1.0), trajectory.error
        assert trajectory.metrics["runs_of_this_object"] == 1.0
        assert trajectory.turns[0].node == "solver"


def test_the_question_can_be_a_column(run_workflow, tokenizer):
    trajectory = run_workflow(
        "Remembers",
        ["4", "yes"],
        judge="math_answer",
        row={"asked": "3+1?", "answer": "4"},
        settings={"query_field": "asked"},
    )
    assert trajectory.reward == 1.0
    assert "user\n3+1?<" in tokenizer.decode(trajectory.turns[0].prompt_ids)

    wrong = run_workflow("Remembers", [], settings={"query_field": "query"})
    assert wrong.outcome is Outcome.AGENT_ERROR
    assert "row test:0 has no 'query' (query_field of the agent's YAML)" in wrong.error


def test_no_reward_and_no_judge_is_a_judge_error_with_both_remedies(run_workflow):
    trajectory = run_workflow("answers", ["4"])

    assert (trajectory.outcome, trajectory.reward) == (Outcome.JUDGE_ERROR, None)
    assert "return WorkflowOutput(reward=…), or name a judge" in trajectory.error


def test_a_judge_that_raises_is_a_judge_error_and_never_a_zero(run_workflow):
    trajectory = run_workflow("answers", ["4"], judge="fails")

    assert (trajectory.outcome, trajectory.reward) == (Outcome.JUDGE_ERROR, None)
    assert "no verdict" in trajectory.error


@pytest.fixture
def lake():
    """URL of an environment service, in a thread."""
    app = environment_app(Instances(FrozenLake))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listening.close()


def test_the_class_form_has_its_environment_which_also_scores(run_workflow, lake, tokenizer):
    row = {"task_id": "lake-3", "query": "walk"}
    trajectory = run_workflow("Walks", ["right"], row=row, settings={"environment": lake})

    assert trajectory.outcome is Outcome.FINISHED, trajectory.error
    assert 0 <= trajectory.reward <= 0.5
    assert own(trajectory) == {"done": 0.0}
    assert "P" in tokenizer.decode(trajectory.turns[0].prompt_ids)


def test_what_is_no_output_is_named(run_workflow):
    trajectory = run_workflow("forgets", ["4"])

    assert trajectory.outcome is Outcome.AGENT_ERROR
    assert "returned AIMessage" in trajectory.error
    assert "return WorkflowOutput(reward=…) or WorkflowOutput(response=…)" in trajectory.error


@pytest.mark.parametrize(
    ("setting", "outcome", "reward"),
    [(-0.5, Outcome.TRUNCATED, -0.5), (None, Outcome.JUDGE_ERROR, None)],
)
def test_a_run_out_of_tokens_has_the_reward_of_the_yaml(run_workflow, setting, outcome, reward):
    trajectory = run_workflow(
        "asks_for_ever",
        ["1234567890"] * 9,
        judge="fails",
        settings={"truncated_reward": setting},
        budget=Budget(1000, 30, 10_000),
    )
    assert (trajectory.outcome, trajectory.reward) == (outcome, reward)


class Served(FakeListChatModel):
    """As ``langchain_openai.ChatOpenAI`` says where it is served."""

    openai_api_base: str = "http://127.0.0.1:9/v1"
    openai_api_key: SecretStr = SecretStr("sk-aux")
    model_name: str = "qwen"


async def test_auxiliary_models_come_in_the_kind_of_the_workflow():
    models = {"judge": Served(responses=["yes"]), "local": FakeListChatModel(responses=["yes"])}

    assert AuxiliaryIn(ModelKind.LANGCHAIN, models)["judge"] is models["judge"]
    client = AuxiliaryIn(ModelKind.OPENAI, models)["judge"]
    assert isinstance(client, openai.AsyncOpenAI)
    assert (str(client.base_url), client.api_key) == ("http://127.0.0.1:9/v1/", "sk-aux")
    with pytest.raises(AgentError, match="auxiliary model 'local' is a FakeListChatModel without"):
        AuxiliaryIn(ModelKind.OPENAI, models)["local"]


def test_workflow_and_judge_are_given_them(run_workflow):
    judge = FakeListChatModel(responses=["0.5", "0.75"])
    trajectory = run_workflow(
        "asks_a_friend", ["4"], judge="asks_a_judge", auxiliary_models={"judge": judge}
    )
    assert (trajectory.reward, own(trajectory)) == (0.75, {"friend": 0.5}), trajectory.error
    assert len(trajectory.turns) == 1


@pytest.mark.parametrize(
    ("workflow", "says"),
    [
        ("nowhere.py->run", "there is no file"),
        (f"{WORKFLOWS}->answer", "has no 'answer'; did you mean 'answers'?"),
        (f"{WORKFLOWS}:answers", "write 'path/file.py->Name' or 'pkg.mod->Name'"),
        ("this process->run.<locals>.f", "runtime_args.cluster=local"),
    ],
)
def test_a_workflow_that_cannot_be_found_is_refused(run_graph, tmp_path, workflow, says):
    cfg = write_agent_cfg(tmp_path, workflow=workflow)
    with pytest.raises(ConfigError) as error:
        run_graph(WorkflowAgent, [], cfg=str(cfg))
    assert says in str(error.value)
