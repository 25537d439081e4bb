"""A math agent with a calculator, as a workflow: what ``math_agent.yaml`` trains."""

from langchain_core.tools import tool

from chatlearn.tuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask

SYSTEM = (
    "Solve the math problem. You may multiply with the tool. "
    "Give your final answer within \\boxed{}."
)
MAX_CALLS = 3


@tool
async def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers."""
    return a * b


multiply.handle_validation_error = True  # a wrong call is answered with what is wrong


class MathAgent(Workflow):
    """Thinks, multiplies when it likes to, and answers; a new one is made for every run."""

    async def execute(self, workflow_task: WorkflowTask, model_tuner: ModelTuner) -> WorkflowOutput:
        model = model_tuner.as_langchain_model().bind_tools([multiply])  # what is trained
        messages = [("system", SYSTEM), ("user", workflow_task.task.main_query)]
        for _ in range(MAX_CALLS):
            reply = await model.ainvoke(messages)
            messages.append(reply)
            if not reply.tool_calls:
                break
            messages += [await multiply.ainvoke(call) for call in reply.tool_calls]
        return WorkflowOutput(response=reply.text, metadata={"final_answer": reply.text})
