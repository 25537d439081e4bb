"""The preprocessing scripts, as users run them, on small folders made here and on the real data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatlearn.data.data_preprocess import arithmetic_agent, gsm8k_agent, math_lighteval_agent
from chatlearn.data.prompt_dataset import read_tasks

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("CHATLEARN_TEST_DATA") or ROOT.parent / "shared" / "data")
MATH = [
    {
        "problem": "1/2+1/2?",
        "level": "Level 1",
        "solution": r"It is $\boxed{1}$.",
        "type": "Algebra",
    },
    {"problem": "No answer?", "level": "Level 5", "solution": "Hm.", "type": "Algebra"},
    {
        "problem": "Half?",
        "level": "Level 2",
        "solution": r"$\boxed{\frac{1}{2}}$",
        "type": "Geometry",
    },
]
GSM8K = [{"question": "How many?", "answer": "600+34 = <<600+34=634>>634, and 1000.\n#### 1,634"}]


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def math_folder(tmp_path):
    """What ``modelscope download`` leaves."""
    for split in ("train", "test"):
        parquet(tmp_path / "in" / "data" / f"{split}-00000-of-00001.parquet", MATH)
    (tmp_path / "in" / "README.md").write_text("# MATH\n")
    return tmp_path / "in"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_math(folder, out, *more):
    return math_lighteval_agent.main(["--input_dir", str(folder), "--local_dir", str(out), *more])


@pytest.mark.parametrize("as_module", [False, True])
def test_the_command_of_the_tutorial(tmp_path, math_folder, as_module):
    """Run from elsewhere, in a fresh interpreter, as a file and as a module."""
    name = "chatlearn.data.data_preprocess.math_lighteval_agent"
    program = ["-m", name] if as_module else [str(ROOT / (name.replace(".", "/") + ".py"))]
    out = tmp_path / "new" / "out"
    result = subprocess.run(
        [sys.executable, *program, "--input_dir", math_folder, "--local_dir", out],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT) if as_module else ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "train: 2 rows, 1 skipped" in result.stdout
    assert "first question: 1/2+1/2?\nfirst ground truth: 1\n" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["test_agent.json", "train_agent.json"]
    row = lines(out / "test_agent.json")[1]
    assert row.pop("prompt")[1:] == [{"role": "user", "content": "Half?"}]
    assert row == {
        "agent_name": "math_eval",
        "agent_cfg_path": "template/agent/math_eval.yaml",
        "data_source": "DigitalLearningGmbH/MATH-lighteval",
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": r"\frac{1}{2}"},
        "extra_info": {"split": "test", "index": 2},
        "level": "Level 2",
        "type": "Geometry",
    }


def test_options_reach_the_rows_and_the_reader(tmp_path, math_folder):
    options = ["--agent_name", "mine", "--agent_cfg_path", "", "--system_prompt", ""]
    run_math(math_folder, tmp_path, *options, "--max_rows", "1")
    (task,) = read_tasks([str(tmp_path / "train_agent.json")])
    assert (task.agent_name, task.agent_cfg_path, task.ground_truth) == ("mine", None, "1")
    assert task.messages == [{"role": "user", "content": "1/2+1/2?"}]
    assert task.fields["level"] == "Level 1"


def test_gsm8k(tmp_path):
    for split in ("train", "test"):
        parquet(tmp_path / "main" / f"{split}-00000-of-00001.parquet", GSM8K)
        parquet(tmp_path / "socratic" / f"{split}-00000-of-00001.parquet", [])
    gsm8k_agent.main(["--input_dir", str(tmp_path), "--local_dir", str(tmp_path)])
    (row,) = lines(tmp_path / "train_agent.json")
    assert row["data_source"] == "openai/gsm8k"
    assert row["agent_name"] == "math_eval"
    assert row["reward_model"]["ground_truth"] == "1634"
    assert "answer" not in row


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so $\boxed{3}$.", "3"),
        (r"$\boxed{1}$ or rather $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"$\boxed{\{1, 3\}}$", r"\{1, 3\}"),
        (r"\boxed{[0, 1\}}", r"[0, 1\}"),
        (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", r"\begin{pmatrix}1\\{2}\end{pmatrix}"),
        (r"$\boxed 5$ apples", "5"),
        (r"\fbox{12}", "12"),
        (r"\boxed {7}", "7"),
        (r"\boxedsomething{7}", None),
        (r"\boxed{}", None),
        (r"\boxed{1} then \boxed{2", None),
        ("5", None),
    ],
)
def test_ground_truth_of_math_is_the_last_box(solution, answer):
    assert math_lighteval_agent.boxed_answer(solution) == answer


@pytest.mark.parametrize(
    ("solution", "answer"),
    [("2+2\n#### 4", "4"), ("#### 3\n#### -1,200\n", "-1200"), ("4", None), ("####", None)],
)
def test_ground_truth_of_gsm8k_is_after_the_mark(solution, answer):
    assert gsm8k_agent.marked_answer(solution) == answer


@pytest.mark.parametrize(
    "names",
    [
        ["data/{}-00000-of-00002.parquet", "data/{}-00001-of-00002.parquet"],
        ["{}.parquet"],
        ["{}.json"],
        ["data/{}.jsonl"],
    ],
)
def test_layouts_of_a_downloaded_dataset(tmp_path, names):
    for split in ("train", "test"):
        for number, name in enumerate(names):
            path = tmp_path / "in" / name.format(split)
            row = {**MATH[0], "problem": f"{split} {number}"}
            if path.suffix == ".parquet":
                parquet(path, [row])
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(row))
    run_math(tmp_path / "in", tmp_path)
    questions = [row["prompt"][-1]["content"] for row in lines(tmp_path / "test_agent.json")]
    assert questions == [f"test {number}" for number in range(len(names))]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"no train split[\s\S]*\(nothing\)[\s\S]*modelscope download --dataset AI-ModelScope"),
        (["a/train.parquet"], r"no train split[\s\S]*found:\n  a/train\.parquet"),
        (["train.parquet"], "no test split"),
        (["train.parquet", "train.json"], r"several files.*train\.json, train\.parquet"),
        (["train.parquet", "data/train.parquet"], "several files"),
        (["train-00000-of-00001.parquet", "train-00000-of-00002.parquet"], "several files"),
        (["train-00001-of-00002.parquet"], "shards of the train split .* are missing"),
    ],
)
def test_a_folder_without_one_clear_split_is_refused(tmp_path, names, message):
    for name in names:
        parquet(tmp_path / "in" / name, MATH)
    (tmp_path / "in").mkdir(exist_ok=True)
    with pytest.raises(SystemExit, match=message):
        run_math(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_columns_and_empty_splits_write_nothing(tmp_path):
    for rows, message in [
        (GSM8K, "'problem' is missing.* the row has answer, question"),
        ([MATH[1]], "train split would be empty"),
    ]:
        parquet(tmp_path / "in" / "train.parquet", rows)
        parquet(tmp_path / "in" / "test.parquet", MATH)
        with pytest.raises(SystemExit, match=message):
            run_math(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    from chatlearn.data.row_files import write_rows

    path = tmp_path / "d.json"
    write_rows(path, [{"a": 1}])
    with pytest.raises(TypeError):
        write_rows(path, [{"a": 2}, {"a": object()}])
    assert lines(path) == [{"a": 1}]
    assert list(tmp_path.iterdir()) == [path]


def arithmetic(folder, *options):
    arithmetic_agent.main(["--local_dir", str(folder), *options])
    return lines(folder / "train_agent.json"), lines(folder / "test_agent.json")


@pytest.mark.parametrize(
    ("kind", "total", "tested"), [("two_digit", 24300, 256), ("one_digit", 243, 48)]
)
def test_arithmetic_has_every_problem_once(tmp_path, kind, total, tested):
    train, test = arithmetic(tmp_path, "--kind", kind)
    assert len(test) == tested
    problems = {row["extra_info"]["expression"]: row for row in train + test}
    assert len(train) + len(test) == len(problems) == total
    for expression, row in problems.items():
        assert row["prompt"] == [{"role": "user", "content": f"Compute {expression}."}]
        assert row["reward_model"]["ground_truth"] == str(eval(expression))
    assert row["agent_name"] == "calculator"
    assert row["agent_cfg_path"] is None
    assert (row["data_source"], row["ability"]) == ("chatlearn/arithmetic", "arithmetic")


def test_arithmetic_repeats_by_seed_and_its_test_rows_do_not_depend_on_train_rows(tmp_path):
    small = arithmetic(tmp_path, "--train_rows", "10", "--test_rows", "20")
    large = arithmetic(tmp_path, "--train_rows", "30", "--test_rows", "20")
    other = arithmetic(tmp_path, "--train_rows", "30", "--test_rows", "20", "--seed", "1")
    assert (len(small[0]), len(small[1])) == (10, 20)
    assert large[0][:10] == small[0]
    assert large[1] == small[1] != other[1]


def test_arithmetic_options(tmp_path):
    options = ["--kind", "one_digit", "--prompt_template", "What is {expression}?"]
    train, _ = arithmetic(tmp_path, *options, "--agent_name", "x", "--system_prompt", "Be brief.")
    assert [m["role"] for m in train[0]["prompt"]] == ["system", "user"]
    assert train[0]["prompt"][1]["content"].startswith("What is ")
    assert train[0]["agent_name"] == "x"
    for wrong, message in [
        (["--prompt_template", "What?"], "must contain {expression}"),
        (["--test_rows", "243"], "more than the 243 problems"),
    ]:
        with pytest.raises(SystemExit, match=message):
            arithmetic_agent.main(["--local_dir", str(tmp_path), "--kind", "one_digit", *wrong])


@pytest.mark.parametrize(
    ("script", "folder", "least"),
    [(math_lighteval_agent, "MATH-lighteval", 4000), (gsm8k_agent, "gsm8k", 7000)],
)
def test_the_real_datasets(tmp_path, capsys, script, folder, least):
    if not (REAL / folder).is_dir():
        pytest.skip(f"{REAL / folder} is not here")
    arguments = ["--input_dir", str(REAL / folder), "--local_dir", str(tmp_path)]
    script.main([*arguments, "--agent_cfg_path", ""])
    assert " 0 skipped" in capsys.readouterr().out
    tasks = read_tasks([str(tmp_path / "train_agent.json"), str(tmp_path / "test_agent.json")])
    assert len(tasks) >= least
    assert all(task.ground_truth and task.messages[-1]["content"] for task in tasks)
    assert len({task.uid for task in tasks}) == len(tasks)
