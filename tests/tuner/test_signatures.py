"""What is a workflow, and which model it wants: said before anything is loaded."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import openai
import pytest
from langchain_core.language_models import BaseChatModel

from chatlearn.errors import ConfigError
from chatlearn.tuner import Workflow
from chatlearn.tuner.model_kinds import ModelKind, model_kind
from chatlearn.tuner.signatures import check_workflow


async def plain(task, model): ...


async def whole(task, model, auxiliary_models=None, logger=None, extra=1): ...


class Callable:
    async def __call__(self, task, model): ...


class Form(Workflow):
    async def execute(self, workflow_task, model_tuner): ...


class Later:
    async def execute(self, workflow_task, tuner): ...


@pytest.mark.parametrize(
    "workflow", [plain, whole, Callable(), functools.partial(whole, extra=2), Form, Later]
)
def test_every_form_passes(workflow):
    check_workflow(workflow, "here")


def sync(task, model): ...


async def no_model(task): ...


async def other_names(task, llm): ...


async def starred(task, model, *rest): ...


async def keywords(**row): ...


class NoExecute: ...


class WrongExecute(Workflow):
    async def execute(self, task): ...


class SyncExecute(Workflow):
    def execute(self, workflow_task, model_tuner): ...


class Needs(Workflow):
    def __init__(self, size): ...

    async def execute(self, workflow_task, model_tuner): ...


@pytest.mark.parametrize(
    ("workflow", "says"),
    [
        (sync, "here: sync(task, model) is not async; write `async def`"),
        (no_model, "here: no_model(task) lacks model; a workflow is `async def run(task, model)`"),
        (other_names, "other_names(task, llm) lacks model and asks for llm, which nobody gives"),
        (starred, "starred(task, model, *rest) takes *rest; name its parameters"),
        (keywords, "keywords(**row) takes **row; name its parameters"),
        (3, "here is 3, which cannot be called"),
        (NoExecute, "the class NoExecute has no execute"),
        (WrongExecute, "WrongExecute.execute(self, task) takes (task) beside self"),
        (SyncExecute, "SyncExecute.execute(self, workflow_task, model_tuner) is not async"),
        (Needs, "Needs() needs size; an object is made for every run without arguments"),
    ],
)
def test_every_other_form_is_refused_by_its_parameters(workflow, says):
    with pytest.raises(ConfigError) as error:
        check_workflow(workflow, "here")
    assert says in str(error.value)


def annotated(annotation):
    async def workflow(task, model): ...

    workflow.__annotations__ = {"model": annotation}
    return workflow


class OwnChatModel(BaseChatModel): ...


@pytest.mark.parametrize(
    ("workflow", "kind"),
    [
        (plain, ModelKind.LANGCHAIN),
        (annotated(Any), ModelKind.LANGCHAIN),
        (annotated(BaseChatModel), ModelKind.LANGCHAIN),
        (annotated(OwnChatModel), ModelKind.LANGCHAIN),
        (annotated("BaseChatModel"), ModelKind.LANGCHAIN),
        (annotated(openai.AsyncOpenAI), ModelKind.OPENAI),
        (annotated(openai.AsyncOpenAI | None), ModelKind.OPENAI),
        (annotated("openai.AsyncOpenAI"), ModelKind.OPENAI),
        (annotated("Imported.Nowhere | AsyncOpenAI"), ModelKind.OPENAI),
        (Form, ModelKind.LANGCHAIN),
    ],
)
def test_the_annotation_says_what_the_model_is(workflow, kind):
    assert model_kind(workflow, "here") is kind


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        (int, "is annotated as <class 'int'>; it can be a LangChain BaseChatModel"),
        ("Unheard", "is annotated as 'Unheard'"),
        (openai.OpenAI, "is openai.OpenAI, which blocks the event loop"),
    ],
)
def test_a_model_of_no_kind_is_refused(annotation, says):
    with pytest.raises(ConfigError) as error:
        model_kind(annotated(annotation), "here")
    assert says in str(error.value)


def test_agentscope_2_is_one_clear_error(tmp_path, monkeypatch):
    folder = tmp_path / "agentscope-2.0.6.dist-info"  # the version is all that is asked
    folder.mkdir()
    (folder / "METADATA").write_text("Name: agentscope\nVersion: 2.0.6\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(ConfigError) as error:
        model_kind(annotated("OpenAIChatModel"), "here")
    assert "model of annotated.<locals>.workflow(task, model) is AgentScope's" in str(error.value)
    assert "AgentScope 2.0.6 is installed" in str(error.value)
    assert "pip install 'agentscope<2'" in str(error.value)


@pytest.mark.skipif(find_spec("agentscope") is not None, reason="AgentScope is installed")
def test_no_agentscope_is_one_clear_error():
    with pytest.raises(ConfigError, match="which is not installed here; pip install 'agentscope<2"):
        model_kind(annotated("ChatModelBase"), "here")
