"""``--backbone=debug``: conversations, trained tokens, rewards, advantages; nothing is trained."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from chatlearn.entrypoint import main
from chatlearn.tuner.debug_engines import plain_tokenizer, read_prompt, written

YAML = """\
ajet:
  project_name: sums
  task_reader:
    type: jsonl_dataset_file
    jsonl_dataset_file: {training: {file_path: train.jsonl}}
  model: {path: nowhere/no-model}
  data: {max_response_length: 24}
  rollout: {user_workflow: workflow.py->Solve, num_repeat: 4, max_model_len: 1100}
  task_judge: {judge_protocol: math_answer}
"""
WORKFLOW = """\
from langchain_core.tools import tool

from chatlearn.tuner import Workflow, WorkflowOutput


@tool
async def add(a: int, b: int) -> str:
    \"\"\"Add two numbers.\"\"\"
    return str(a + b)


class Solve(Workflow):
    async def execute(self, workflow_task, model_tuner):
        llm = model_tuner.as_langchain_model().bind_tools([add])
        messages = [("user", workflow_task.task.main_query)]
        for _ in range(2):
            reply = await llm.ainvoke(messages)
            messages.append(reply)
            messages += [await add.ainvoke(call) for call in reply.tool_calls]
            if not reply.tool_calls:
                break
        return WorkflowOutput(metadata={"final_answer": reply.text})
"""
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 0, "b": 1}}\n</tool_call>'


@pytest.fixture
def sums(tmp_path, monkeypatch):
    """A project whose model is nowhere: only its agent can be run."""
    (tmp_path / "sums.yaml").write_text(YAML)
    (tmp_path / "workflow.py").write_text(WORKFLOW)
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def debug(*options):
    return main(["tune", "--conf", "sums.yaml", "--backbone=debug", *options])


def test_a_script_shows_the_agents_logic_without_a_model(sums, capsys):
    script = [[CALL, "It is \\boxed{1}."], ["It is \\boxed{7}."]]
    (sums / "answers.json").write_text(json.dumps(script))
    assert debug("--engine=scripted", "--answers=answers.json", "--tasks=1") == 0
    said = capsys.readouterr().out

    assert "Debugging 1 tasks × 4 runs; answers.json answers (a plain tokenizer)" in said
    assert '[user] 0+1?\n[assistant] \n  calls add({"a": 0, "b": 1})\n[tool] 1\n' in said
    assert "outcome finished, reward 1, success 1" in said
    # what trains is marked: both calls of the run, and nothing that it was told
    assert (
        "<|im_start|>user\n0+1?<|im_end|>\n<|im_start|>assistant\n"
        f"⟦{CALL}<|im_end|>⟧\n<|im_start|>tool\n1<|im_end|>\n<|im_start|>assistant\n"
        "⟦It is \\boxed{1}.<|im_end|>⟧\n"
    ) in said
    # two runs right, two wrong: advantages of a group of 0s and 1s
    table = [line.split("│")[1:-1] for line in said.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in table]
    assert [row[:5] for row in cells] == [
        ["0", "finished", "1", "0.866", "2"],
        ["1", "finished", "0", "-0.866", "1"],
        ["2", "finished", "1", "0.866", "2"],
        ["3", "finished", "0", "-0.866", "1"],
    ]
    assert "4 runs of 1 tasks: 4 finished; reward mean 0.500; 1 of 1 tasks would teach" in said
    assert not list((sums / "outputs" / "sums").glob("2*")), "a run folder, but nothing was run"


def test_a_script_that_is_too_short_fails_the_run_by_name(sums, capsys):
    (sums / "answers.json").write_text(json.dumps([CALL]))
    assert debug("--engine=scripted", "--answers=answers.json", "--tasks=1") == 1
    out, err = capsys.readouterr()
    assert "answers.json has 1 answers for run 0, which asked for one more" in out
    assert "outcome engine_error, reward none" in out
    assert "not one of 4 runs could be trained on" in err


@pytest.mark.parametrize("text", ["{}", "[1]", "[[]]", "not json"])
def test_answers_that_are_no_list_of_texts(sums, capsys, text):
    (sums / "answers.json").write_text(text)
    assert debug("--engine=scripted", "--answers=answers.json") == 1
    assert "--answers answers.json" in capsys.readouterr().err


def test_the_model_samples_as_in_training(sums, tiny_policy, capsys):
    assert debug(f"ajet.model.path={tiny_policy}", "--tasks=2", "models.policy.top_p=0.9") == 0
    said = capsys.readouterr().out
    assert "Sampled as in training: temperature 1, top_p 0.9, top_k -1, at most 24 tokens" in said
    assert said.count("what would be trained") == 2
    assert said.count("⟦") >= 9  # eight runs, and the legend
    assert "8 runs of 2 tasks" in said


def test_more_siblings_than_a_few_are_cut_and_said(sums, capsys):
    text = (sums / "sums.yaml").read_text()
    (sums / "sums.yaml").write_text(text.replace("num_repeat: 4", "num_repeat: 16"))
    assert debug("--engine=scripted") == 0
    said = capsys.readouterr().out
    assert "debugging runs 4 siblings of a task, not 16" in said
    assert "8 runs of 2 tasks" in said
    assert debug("--engine=scripted", "--tasks=1", "models.policy.num_inference_per_prompt=6") == 0
    assert "6 runs of 1 tasks" in capsys.readouterr().out


class ChatServer(BaseHTTPRequestHandler):
    """Calls the tool first, then answers with what the tool said."""

    asked: list[dict]

    def do_GET(self):
        self._say({"data": [{"id": "big-model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        last = body["messages"][-1]
        if last["role"] == "user":
            a, b = last["content"].rstrip("?").split("+")
            call = {"name": "add", "arguments": json.dumps({"a": int(a), "b": int(b)})}
            message = {"content": None, "tool_calls": [{"id": "abc", "function": call}]}
        else:
            message = {"content": f"It is \\boxed{{{last['content']}}}."}
        self._say({"choices": [{"message": message, "finish_reason": "stop"}]})

    def _say(self, reply):
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def chat_server():
    ChatServer.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), ChatServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_any_server_can_play_the_agent(sums, chat_server, capsys):
    assert debug(f"--engine={chat_server}", "--tasks=1") == 0
    said = capsys.readouterr().out
    assert f"big-model at {chat_server} answers: agent logic only" in said
    assert "Not known token by token: the answers are another model's, so there is no loss" in said
    assert "⟦" not in said
    assert '[user] 0+1?\n[assistant] \n  calls add({"a": 0, "b": 1})\n[tool] 1\n' in said
    assert "4 runs of 1 tasks: 4 finished; reward mean 1.000" in said

    first, second = ChatServer.asked[:2]
    assert first["model"] == "big-model"
    assert (first["temperature"], first["top_p"], first["max_tokens"]) == (1.0, 1.0, 24)
    assert first["messages"] == [{"role": "user", "content": "0+1?"}]
    assert first["tools"][0]["function"]["name"] == "add"
    [asked] = second["messages"][1]["tool_calls"]
    assert json.loads(asked["function"]["arguments"]) == {"a": 0, "b": 1}
    assert second["messages"][2] == {"role": "tool", "tool_call_id": asked["id"], "content": "1"}


def test_a_server_that_is_not_there(sums, capsys):
    assert debug("--engine=http://127.0.0.1:9/v1") == 1
    assert "http://127.0.0.1:9/v1/models does not answer" in capsys.readouterr().err


def test_messages_survive_the_plain_template():
    """What a prompt's tokens are read back as is what was rendered."""
    tokenizer = plain_tokenizer()
    call = {"name": "f", "arguments": '{"x": "ü\\n"}'}
    said = {"role": "assistant", "content": "Well.", "tool_calls": [{"id": "1", "function": call}]}
    messages = [
        {"role": "system", "content": "Be\nshort."},
        {"role": "user", "content": "π ≤ 4?"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    prompt = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert read_prompt(tokenizer.decode(ids)) == (messages, tools, "")

    told = "<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n<tool_call>"
    read, _, begun = read_prompt(prompt + written(said) + told)
    assert begun == "<tool_call>"
    assert read[2]["content"] == "Well."
    assert read[2]["tool_calls"][0]["function"] == call
    assert read[3] == {
        "role": "tool",
        "tool_call_id": read[2]["tool_calls"][0]["id"],
        "content": "4",
    }


def test_a_breakpoint_stops_in_the_workflow(sums):
    file = Path(__file__).parents[1] / "test_breakpoint.py"
    spec = importlib.util.spec_from_file_location("test_breakpoint", file)
    terminal = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(terminal)
    text = (sums / "workflow.py").read_text()
    line = "        messages = [("
    assert line in text
    (sums / "workflow.py").write_text(text.replace(line, f"        breakpoint()\n{line}"))
    seen = terminal.converse(
        [
            *[sys.executable, "-m", "chatlearn.entrypoint", "tune", "--conf", "sums.yaml"],
            *["--backbone", "debug", "--engine", "scripted", "--tasks=1"],
        ],
        sums,
        [
            "p workflow_task.task.main_query",
            "!import os; os.environ['PYTHONBREAKPOINT'] = '0'",
            "c",
        ],
    )
    assert "workflow.py" in seen
    assert "'0+1?'" in seen
    assert "4 runs of 1 tasks" in seen
