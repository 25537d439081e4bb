"""``chatlearn tune --conf``: from a project's two files to our configuration, and to a run."""

from __future__ import annotations

import importlib
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from chatlearn.data.environment.server import Instances, environment_app
from chatlearn.entrypoint import main
from chatlearn.errors import ConfigError, DataError
from chatlearn.models.agent.examples.frozen_lake import FrozenLake
from chatlearn.tuner.project import read_project
from chatlearn.tuner.project_build import build
from chatlearn.tuner.project_leftovers import end_leftovers, processes
from chatlearn.tuner.project_settings import Layers

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "template" / "tuner_project"

YAML = """\
ajet:
  project_name: sums
  task_reader:
    type: jsonl_dataset_file
    jsonl_dataset_file:
      training: {file_path: train.jsonl}
      validation: {file_path: test.jsonl}
  model: {path: MODEL}
  data: {train_batch_size: 2, max_prompt_length: 100, max_response_length: 24}
  rollout:
    user_workflow: workflow.py->Solve
    num_repeat: 4
    max_model_len: 400
    agent_madness_reward: -0.5
    compute_madness_checklist: [wrong_toolcall]
  task_judge:
    judge_protocol: ajet.task_judge.math_answer_as_judge->MathAnswerAsJudge
  trainer_common: {save_freq: 99999, test_freq: 2, total_epochs: 3}
hydra: {searchpath: [file://ajet/default_config]}
defaults: [ajet_default, _self_]
"""
WORKFLOW = """\
from chatlearn.tuner import Workflow, WorkflowOutput


class Solve(Workflow):
    async def execute(self, workflow_task, model_tuner):
        llm = model_tuner.as_langchain_model()
        reply = await llm.ainvoke([("user", workflow_task.task.main_query)])
        answer = reply.text
        return WorkflowOutput(metadata={"final_answer": answer}, metrics={"letters": len(answer)})


async def as_function(task, model):
    return WorkflowOutput(reward=1.0)


def not_async(task, model):
    return None
"""


@pytest.fixture
def sums(tmp_path, tiny_policy, monkeypatch):
    """A project of two files and eight rows; the current directory is the one above it."""
    folder = tmp_path / "sums"
    folder.mkdir()
    (folder / "sums.yaml").write_text(YAML.replace("MODEL", tiny_policy))
    (folder / "workflow.py").write_text(WORKFLOW)
    for name, count in (("train", 8), ("test", 2)):
        rows = [{"question": f"{i}+1?", "answer": str(i + 1), "level": i} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return folder


def change(folder, old, new):
    text = (folder / "sums.yaml").read_text()
    assert old in text
    (folder / "sums.yaml").write_text(text.replace(old, new))


def built(folder, backbone="local", *overrides):
    return build(read_project(folder / "sums.yaml"), backbone, overrides)


def test_a_project_becomes_our_configuration(sums):
    made = built(sums)
    args, models = made.cfg.runtime_args, made.cfg.models
    assert (args.exp_name, args.cluster, args.rollout_backend) == ("sums", "local", "embedded")
    assert args.import_modules == ("chatlearn.tuner.workflow_agent",)
    assert args.sample_per_episode == 8  # 2 tasks x 4 runs
    assert args.num_episode == 12  # 3 epochs x 8 tasks / 2
    assert (args.save_episode_interval, args.eval_episode_interval) == (0, 2)
    [check] = args.checks
    assert (check.name, check.action, check.reward) == ("wrong_toolcall", "reward", -0.5)
    assert models.policy.max_seq_len == 400
    assert models.policy.max_response_tokens_length == 24
    assert sorted(made.rows.values()) == [2, 8]
    [first, *_] = [json.loads(line) for line in Path(args.data_path).read_text().splitlines()]
    assert first["task"] == {"question": "0+1?", "answer": "1", "level": 0}
    assert first["prompt"] == [{"role": "user", "content": "0+1?"}]
    assert first["agent_name"] == "workflow"
    assert f"workflow: {sums}/workflow.py->Solve" in made.agent_cfg.read_text()


def test_the_same_project_has_the_same_inputs(sums):
    assert built(sums).cfg == built(sums).cfg


def test_ours_wins_over_theirs_and_the_command_line_over_both(sums):
    with (sums / "sums.yaml").open("a") as file:
        file.write(
            "chatlearn:\n"
            "  runtime_args: {seed: 7, import_modules: [json]}\n"
            "  models: {policy: {temperature: 0.5, top_p: 0.9}}\n"
        )
    made = built(
        sums, "local", "models.policy.top_p=0.8", "models.policy.num_inference_per_prompt=2"
    )
    policy, args = made.cfg.models.policy, made.cfg.runtime_args
    assert (policy.temperature, policy.top_p, args.seed) == (0.5, 0.8, 7)
    assert args.import_modules == ("json", "chatlearn.tuner.workflow_agent")
    assert args.sample_per_episode == 4  # 2 tasks x 2 runs: still two tasks
    assert made.origin["models.policy.temperature"] == "chatlearn"
    assert made.origin["models.policy.top_p"] == "the command line"


def layers(folder, backbone, *overrides, **words):
    text = "ajet: {rollout: {user_workflow: w.py->W}, model: {path: m}}"
    (folder / "p.yaml").write_text(text)
    project = read_project(folder / "p.yaml", [f"ajet.{k}={v}" for k, v in words.items()])
    return Layers(project, backbone, overrides, tasks=100)


@pytest.mark.parametrize(
    ("keys", "policy", "trainer", "colocated"),
    [
        ({}, 8, 8, True),
        ({"rollout.n_vllm_engine": 2}, 2, 6, False),
        ({"rollout.n_vllm_engine": 1, "rollout.tensor_model_parallel_size": 4}, 4, 4, False),
        ({"trainer_common.nnodes": 2, "trainer_common.n_gpus_per_node": 4}, 8, 8, True),
    ],
)
def test_gpus_on_a_cluster(tmp_path, keys, policy, trainer, colocated):
    cfg = layers(tmp_path, "ray", **keys).config(data_path="x.jsonl")
    assert (cfg.models.policy.num_gpu, cfg.models.policy_trainer.num_gpu) == (policy, trainer)
    assert cfg.is_colocated is colocated
    assert cfg.models.ref_policy.num_gpu == trainer


def test_engines_that_leave_no_gpu_for_the_trainer_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="8 engines of 1 GPUs leave none of 8 for the trainer"):
        layers(tmp_path, "ray", **{"rollout.n_vllm_engine": 8})


def test_what_several_keys_say_together(tmp_path):
    cfg = layers(
        tmp_path,
        "local",
        **{
            "data.train_batch_size": 6,
            "rollout.num_repeat": 4,
            "trainer_common.mini_batch_num": 3,
            "trainer_common.use_kl_loss": "true",
            "trainer_common.kl_loss_type": "low_var_kl",
            "trainer_common.total_epochs": 2,
            "rollout.max_response_length_in_one_turn": 4096,
            "rollout.max_model_len": 18000,
            "lora.lora_rank": 8,
            "lora.lora_alpha": 16,
            "rollout.val_kwargs.num_repeat": 3,
        },
    ).config(data_path="x.jsonl")
    args, policy, trainer = cfg.runtime_args, cfg.models.policy, cfg.models.policy_trainer
    assert (args.sample_per_episode, args.train_global_batch_size) == (24, 8)
    assert args.num_episode == 34  # 2 x 100 / 6, rounded up
    assert (trainer.kl_coef, trainer.kl_estimator) == (0.002, "k3")
    assert (policy.max_tokens_per_turn, policy.max_response_tokens_length) == (4096, 4096)
    assert trainer.max_token_in_packing == 18000
    assert (trainer.lora_rank, trainer.lora_alpha) == (8, 16.0)
    assert policy.eval_num_inference_per_prompt == 3


def test_practically_endless_runs_that_save_nothing_are_pointed_at(tmp_path):
    never = {"trainer_common.save_freq": 99999, "trainer_common.total_epochs": 99999}
    made = layers(tmp_path, "local", **never)
    assert made.notes == [
        "only the last of 1,249,988 episodes is saved: a run that is stopped before loses "
        "everything; set ajet.trainer_common.save_freq to 20, say"
    ]


def test_a_refusal_of_ours_names_their_key(sums):
    change(sums, "num_repeat: 4", "num_repeat: 1")
    with pytest.raises(ConfigError) as refused:
        built(sums)
    message = str(refused.value)
    assert message.startswith(f"{sums}/sums.yaml: 1 problem")
    assert "models.policy.num_inference_per_prompt = 1" in message
    assert "models.policy.num_inference_per_prompt is ajet.rollout.num_repeat" in message


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("workflow.py->Solve", "worklow.py->Solve", "did you mean workflow.py->Solve?"),
        ("workflow.py->Solve", "sums.sums->Solve", "did you mean workflow.py->Solve?"),
        ("workflow.py->Solve", "workflow.py", "write file.py->Name or pkg.mod->Name"),
        ("workflow.py->Solve", "workflow.py->not_async", "not_async"),
        ("    user_workflow: workflow.py->Solve\n", "", "ajet.rollout.user_workflow is not set"),
        ("MathAnswerAsJudge", "MathAnswersAsJudge", "did you mean MathAnswerAsJudge?"),
        (
            "math_answer_as_judge->MathAnswerAsJudge",
            "env_service_as_judge->EnvServiceJudge",
            "there is no environment to ask",
        ),
        ("type: jsonl_dataset_file", "type: random_dummy", "it was for their own tests"),
        ("type: jsonl_dataset_file", "type: env_service", "env_service.env_url is not set"),
        ("test_freq: 2", "val_before_train: true, test_freq: 99999", None),
        ("      validation: {file_path: test.jsonl}\n", "", "names no validation split or file"),
    ],
)
def test_bad_projects(sums, old, new, says):
    change(sums, old, new)
    if says is None:
        assert built(sums).cfg.runtime_args.enable_eval_before_training
        return
    with pytest.raises(ConfigError) as refused:
        built(sums)
    assert says in str(refused.value)


def test_a_judge_that_asks_a_model_needs_one(sums):
    change(sums, "MathAnswerAsJudge", "MathAnswerAndLlmAsJudge")
    with pytest.raises(ConfigError, match="asks a language model, and there is none"):
        built(sums)
    with (sums / "sums.yaml").open("a") as file:
        file.write(
            "chatlearn: {runtime_args: {auxiliary_models: "
            "{judge: {base_url: 'http://127.0.0.1:9/v1', model: m}}}}\n"
        )
    assert "MathAnswerAndLlmAsJudge" in built(sums).agent_cfg.read_text()


def test_rows_without_a_question_are_refused(sums):
    (sums / "train.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="no known layout has the columns a"):
        built(sums)
    change(
        sums,
        "    type: jsonl_dataset_file\n",
        "    type: jsonl_dataset_file\n    fields: {query: a}\n",
    )
    (sums / "train.jsonl").write_text('{"a": "one?"}\n')
    (sums / "test.jsonl").write_text('{"a": "two?"}\n')
    assert 1 in built(sums).rows.values()


def test_their_import_is_explained(sums):
    (sums / "workflow.py").write_text(WORKFLOW.replace("chatlearn.tuner", "ajet"))
    with pytest.raises(ConfigError, match="write `from chatlearn"):
        built(sums)


LAKE = """\
from chatlearn.tuner import Workflow, WorkflowOutput


class Walk(Workflow):
    async def execute(self, workflow_task, model_tuner):
        llm = model_tuner.as_langchain_model()
        reply = await llm.ainvoke([("user", workflow_task.task.main_query)])
        for move in ("right", "down"):
            await workflow_task.gym_env.step(move)
        return WorkflowOutput(response=reply.text)
"""


@pytest.fixture
def lake_service():
    """The URL of FrozenLake behind its service."""
    instances = Instances(FrozenLake)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(environment_app(instances), log_level="error"))
    serving = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    serving.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    serving.join()
    listening.close()


@pytest.mark.parametrize("judge", ["", "ajet.task_judge.env_service_as_judge->EnvServiceJudge"])
def test_an_environment_service_judges_itself(tmp_path, monkeypatch, capsys, lake_service, judge):
    service = {"env_url": lake_service, "training_split": "train", "env_type": "lake"}
    project = {
        "task_reader": {"type": "env_service", "env_service": service},
        "rollout": {"user_workflow": "workflow.py->Walk", "num_repeat": 2},
        "model": {"path": "nowhere/no-model"},
        "task_judge": {"judge_protocol": judge} if judge else {},
    }
    (tmp_path / "lake.yaml").write_text(json.dumps({"ajet": project}))
    (tmp_path / "workflow.py").write_text(LAKE)
    monkeypatch.chdir(tmp_path)
    options = ["--backbone=debug", "--engine=scripted", "--tasks=1"]
    assert main(["tune", "--conf", "lake.yaml", *options]) == 0
    said = capsys.readouterr().out
    assert "a service has one kind of environment" in said
    assert "2 runs of 1 tasks: 2 finished; reward mean 0." in said


def test_an_environment_service_that_is_down_is_named(tmp_path, monkeypatch, capsys):
    service = "{type: env_service, env_service: {env_url: 'http://127.0.0.1:9'}}"
    (tmp_path / "lake.yaml").write_text(
        f"ajet: {{task_reader: {service}, rollout: {{user_workflow: workflow.py->Walk}}, "
        "model: {path: m}}"
    )
    (tmp_path / "workflow.py").write_text(LAKE)
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--conf", "lake.yaml"]) == 1
    assert "http://127.0.0.1:9" in capsys.readouterr().err


def test_workflows_as_modules_are_found_from_the_current_directory_and_beside_the_yaml(sums):
    (sums / "math_agent.py").write_text(WORKFLOW)
    for spec in ("sums.math_agent->Solve", "math_agent->as_function"):
        change(sums, "workflow.py->Solve", spec)
        assert "math_agent" in built(sums).agent_cfg.read_text()
        change(sums, spec, "workflow.py->Solve")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--backbone=verl"], "--backbone=ray, or --backbone=local"),
        (["--backbone=trinity"], "--backbone=ray, or --backbone=local"),
        (["--backbone=rey"], "write one of debug, local, ray"),
        (["--tasks=3"], "--tasks is for --backbone=debug, not for local"),
        (["--backbone=debug", "--tasks=0"], "give a whole number above 0"),
        (["--backbone=debug", "--engine=vllm"], "write embedded, scripted, or a URL"),
        (["--backbone=debug", "--answers=x.json"], "--answers is for --engine=scripted"),
        (["runtime_args.data_path=x"], "the rows of a project come from ajet.task_reader"),
        (["ajet.rollout.num_repaet=2"], "did you mean `ajet.rollout.num_repeat`?"),
        (["models.policy.temprature=2"], "did you mean `models.policy.temperature`?"),
    ],
)
def test_options_that_are_refused(sums, capsys, options, says):
    assert main(["tune", "--conf", "sums/sums.yaml", *options]) == 1
    assert says in capsys.readouterr().err


def test_a_dry_run_prints_the_resolved_configuration(sums, capsys):
    options = ["--dry-run", "--with-ray", "--with-logview"]
    assert main(["tune", "--conf", "sums/sums.yaml", *options]) == 0
    said = capsys.readouterr().out
    assert "hydra: where hydra finds defaults: ours are built in" in said
    assert "Ray starts and ends with a run of --backbone=ray" in said
    assert "there is no log viewer yet" in said
    assert "num_inference_per_prompt: 4" in said
    assert "12 episodes, into outputs" in said


def test_local_trains_and_leaves_a_run_folder(sums):
    """In a process of its own, with TensorBoard beside it that ends with it."""
    command = [sys.executable, "-m", "chatlearn", "tune", "--conf", "sums/sums.yaml"]
    options = ["--backbone=local", "--with-tensorboard", "runtime_args.num_episode=2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "models.policy.num_inference_per_prompt = 4   <- ajet.rollout.num_repeat" in done.stdout
    run = (Path("outputs") / "sums" / "latest").resolve()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in rows] == [1, 2]
    assert {"reward/mean", "checks/wrong_toolcall", "agent/letters"} <= rows[0].keys()
    assert "eval/reward_mean" in rows[1]
    assert (run / "checkpoints/episode_000002/hf/model.safetensors").exists()
    assert list((run / "tensorboard").iterdir())
    assert "num_inference_per_prompt: 4" in (run / "config.yaml").read_text()
    assert (run / "logs" / "tensorboard.log").exists()
    assert not [p for p in processes().values() if str(run / "tensorboard") in p.command]


SLEEPER = "import time; time.sleep(60)  # MARK"


def test_kill_ends_runs_of_ours_and_leaves_the_rest(tmp_path):
    """A driver that holds a run's lock, and a stranger whose command line matches as well."""
    run = tmp_path / "outputs" / "sums" / "20260101-000000"
    run.mkdir(parents=True)
    holder = (
        "import fcntl, os, socket, sys, time\n"
        f"lock = open({str(run / 'lock')!r}, 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "lock.write(f'{os.getpid()} on {socket.gethostname()}'); lock.flush()\n"
        "print('held', flush=True)\n"
        "time.sleep(60)  # MARK\n"
    )
    ours = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    stranger = subprocess.Popen([sys.executable, "-c", SLEEPER])
    try:
        assert ours.stdout.readline() == "held\n"
        _until(lambda: "MARK" in str(processes().get(stranger.pid)))
        nothing = end_leftovers("no such command line at all", tmp_path / "outputs")
        assert (nothing.ended, nothing.foreign) == ((), ())
        found = end_leftovers("sleep.60.  # MARK", tmp_path / "outputs")
        assert found.ended == (run.resolve(),)
        assert [process.pid for process in found.foreign] == [stranger.pid]
        assert ours.wait(10) != 0
        assert stranger.poll() is None
    finally:
        ours.kill()
        stranger.kill()
        ours.wait()
        stranger.wait()
    with pytest.raises(ConfigError, match="is no regular expression"):
        end_leftovers("(", tmp_path)


def _until(happened, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_kill_alone_needs_no_project(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--kill", "no such command line at all"]) == 0
    assert "nothing matches" in capsys.readouterr().out
    assert main(["tune"]) == 1
    assert "--conf path/to.yaml" in capsys.readouterr().err


def test_the_template_is_a_project_whose_marked_lines_are_what_a_reader_edits():
    text = (TEMPLATE / "math_agent.yaml").read_text()
    marked = [line.split(":")[0].strip() for line in text.splitlines() if "✨✨✨✨" in line]
    marked = [name for name in marked if not name.startswith("#")]
    assert marked == ["type", "file_path", "user_workflow", "judge_protocol", "path"]
    project = read_project(TEMPLATE / "math_agent.yaml")
    assert project.words.workflow == "workflow.py->MathAgent"
    assert project.said == ()


def test_every_launch_configuration_names_what_is_there_and_runs(tmp_path, monkeypatch, capsys):
    launch = json.loads((TEMPLATE / ".vscode" / "launch.json").read_text())
    for configuration in launch["configurations"]:
        assert (configuration["type"], configuration["request"]) == ("debugpy", "launch")
        assert configuration["module"] == "chatlearn.entrypoint"
        args = configuration["args"]
        assert (TEMPLATE / args[args.index("--conf") + 1]).is_file()
    [without_model] = [c for c in launch["configurations"] if "scripted" in c["args"]]
    module = importlib.import_module(without_model["module"])
    monkeypatch.chdir(TEMPLATE)  # the folder that is opened in VS Code
    options = ["--tasks=1", f"runtime_args.output_dir={tmp_path}"]
    assert module.main([*without_model["args"], *options]) == 0
    assert "4 runs of 1 tasks: 4 finished" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.sglang
def test_ray_trains_the_same_project_on_a_cluster(sums, sglang_python):
    """Only the flag differs from ``local``; the other options are that there are no GPUs here."""
    no_gpus = [
        *["models.policy.num_gpu=0", "models.policy_trainer.num_gpu=0"],
        *["runtime_args.colocation=[]", "models.rollout_manager.num_cpu=1"],
        f"models.policy.sglang_python={sglang_python}",
    ]
    command = [sys.executable, "-m", "chatlearn", "tune", "--conf", "sums/sums.yaml"]
    done = subprocess.run(
        [*command, "--backbone=ray", "--with-ray", "runtime_args.num_episode=1", *no_gpus],
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = (Path("outputs") / "sums" / "latest").resolve()
    [row] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert row["episode"] == 1
    assert "agent/letters" in row
