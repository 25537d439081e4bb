"""A speller on AgentScope: its workflow, judge and ``tune``, as AgentScope's own tuner has them."""

from agentscope.agent import ReActAgent
from agentscope.formatter import OpenAIChatFormatter
from agentscope.message import Msg
from agentscope.model import OpenAIChatModel

from chatlearn.tuner import (
    AlgorithmConfig,
    DatasetConfig,
    JudgeOutput,
    TunerModelConfig,
    WorkflowOutput,
    tune,
)


async def name_a_letter(
    task: dict, model: OpenAIChatModel, auxiliary_models: dict[str, OpenAIChatModel]
) -> WorkflowOutput:
    speller = ReActAgent(
        name="speller",
        formatter=OpenAIChatFormatter(),
        model=model,
        sys_prompt="You know the alphabet. Name one letter.",
    )
    said = await speller.reply(Msg(name="teacher", content=task["riddle"], role="user"))
    return WorkflowOutput(response=said)


async def has_the_letter(
    task: dict, response: Msg, auxiliary_models: dict[str, OpenAIChatModel]
) -> JudgeOutput:
    """1 where the letter is anywhere in the answer."""
    return JudgeOutput(reward=float(task["letter"] in response.get_text_content()))


if __name__ == "__main__":
    tune(
        judge_func=has_the_letter,
        workflow_func=name_a_letter,
        train_dataset=DatasetConfig(split="train", path="alphabet"),
        algorithm=AlgorithmConfig(
            learning_rate=2e-6, batch_size=8, group_size=4, algorithm_type="multi_step_grpo"
        ),
        model=TunerModelConfig(max_model_len=1024, model_path="school/speller"),
    )
