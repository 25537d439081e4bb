"""Workflows and judges that the tests name: ``tests/tuner/workflows.py->answers``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlearn.tuner import JudgeOutput, ModelTuner, Workflow, WorkflowOutput, WorkflowTask

if TYPE_CHECKING:
    from openai import AsyncOpenAI


async def answers(task, model, auxiliary_models=None):
    reply = await model.ainvoke(task["question"])
    return WorkflowOutput(response=reply, metrics={"letters": len(reply.content)})


async def asks_by_openai(task: dict, model: AsyncOpenAI) -> WorkflowOutput:
    reply = await model.chat.completions.create(
        model="any", messages=[{"role": "user", "content": task["question"]}]
    )
    return WorkflowOutput(response=reply.choices[0].message.content)


async def rewards_itself(task, model):
    await model.ainvoke(task["question"])
    return WorkflowOutput(reward=0.25, is_success=False)


async def forgets(task, model):
    return await model.ainvoke(task["question"])


async def asks_for_ever(task, model):
    while True:
        await model.ainvoke(task["question"])


async def contains_answer(task, response):
    text = getattr(response, "content", response)
    return JudgeOutput(reward=float(task["answer"] in text), metrics={"judged": 1.0})


async def fails(task, response):
    raise ValueError("no verdict")


async def asks_a_friend(task, model, auxiliary_models):
    reply = await model.ainvoke(task["question"])
    friend = await auxiliary_models["judge"].ainvoke("how sure?")
    return WorkflowOutput(response=reply, metrics={"friend": float(friend.content)})


async def asks_a_judge(task, response, auxiliary_models):
    return float((await auxiliary_models["judge"].ainvoke(response.content)).content)


class Walks(Workflow):
    """Acts on the environment as the model says, and leaves the score to it."""

    async def execute(self, workflow_task, model_tuner):
        world = workflow_task.gym_env
        reply = await model_tuner.as_langchain_model().ainvoke(str(world.state))
        step = await world.step(reply.text)
        return WorkflowOutput(metrics={"done": float(step.done)})


class Remembers(Workflow):
    """Fresh for each run: a second run would find ``seen`` of the first."""

    name = "remembers"

    def __init__(self):
        self.seen = []

    async def execute(self, workflow_task: WorkflowTask, model_tuner: ModelTuner):
        self.seen.append(workflow_task.task.main_query)
        client = model_tuner.as_raw_openai_sdk_client(agent_name="solver")
        reply = await client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": workflow_task.task.main_query}]
        )
        second = await model_tuner.as_langchain_model().ainvoke("again")
        door = model_tuner.as_oai_baseurl_apikey()
        assert door.base_url.startswith("http://127.0.0.1:")
        assert door.api_key
        return WorkflowOutput(
            reward=None,
            metadata={"final_answer": reply.choices[0].message.content},
            metrics={"runs_of_this_object": len(self.seen)},
            response=second.content,
        )
