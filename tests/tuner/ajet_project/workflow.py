"""A clerk who works out journey times, with Python at hand: what ``timetable.yaml`` trains."""

from agentscope.message import Msg

from chatlearn.tuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask

DUTY = "You sit at a railway station. Work out times in Python; box the minutes: \\boxed{}."


class Clerk(Workflow):
    """Its imports wait for the first run, as in AgentJet's own examples."""

    name: str = "clerk"

    async def execute(self, workflow_task: WorkflowTask, model_tuner: ModelTuner) -> WorkflowOutput:
        from agentscope.agent import ReActAgent
        from agentscope.formatter import DashScopeChatFormatter
        from agentscope.memory import InMemoryMemory
        from agentscope.tool import Toolkit, execute_python_code

        desk = Toolkit()
        desk.register_tool_function(execute_python_code)
        clerk = ReActAgent(
            name="desk_clerk",
            sys_prompt=DUTY,
            formatter=DashScopeChatFormatter(),
            model=model_tuner,
            max_iters=3,
            memory=InMemoryMemory(),
            toolkit=desk,
        )
        clerk.set_console_output_enabled(False)
        said = await clerk.reply(Msg("traveller", workflow_task.task.main_query, "user"))
        return WorkflowOutput(metadata={"final_answer": said.get_text_content()})
