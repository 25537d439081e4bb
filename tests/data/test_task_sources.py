"""Raw rows from files and folders as users have them, and the errors when they are not there."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from chatlearn.data.dataset_config import DatasetConfig
from chatlearn.data.task_sources import TaskSource, read_source
from chatlearn.errors import DataError

REAL = Path(os.environ.get("CHATLEARN_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
ROWS = [{"question": "2 + 2 等于多少?", "answer": "4"}, {"question": "4+4?", "answer": "8"}]


def write(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with (
            pyarrow.OSFile(str(path), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as out,
        ):
            out.write_table(table)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, rows[0])
            out.writeheader()
            out.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path, **choice):
    return read_source(TaskSource.of(str(path), **choice))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv", "arrow"])
def test_a_file_is_read_as_it_was_written(tmp_path, suffix):
    write(tmp_path / f"d.{suffix}", ROWS)
    assert read(tmp_path / f"d.{suffix}") == ROWS
    assert DatasetConfig(str(tmp_path / f"d.{suffix}"), split="train").read(1) == ROWS[:1]


def test_cells_of_a_csv_stay_text(tmp_path):
    (tmp_path / "d.csv").write_text('q,a\n"1, 2\nand 3",007\n')
    assert read(tmp_path / "d.csv") == [{"q": "1, 2\nand 3", "a": "007"}]
    (tmp_path / "d.csv").write_text("q,a\n1,2,3\n")
    with pytest.raises(
        DataError, match=r"d\.csv, line 2: the row has more cells than the 2 columns"
    ):
        read(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("files", "choice"),
    [
        (["train.jsonl", "test.jsonl"], {"split": "test"}),
        (["gsm8k_train.csv", "gsm8k_test.csv"], {"split": "test"}),
        (["train.parquet", "dev.parquet"], {"split": "validation"}),
        (["train/0.jsonl", "test/0.jsonl"], {"split": "test"}),
        (
            ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
            {"split": "test"},
        ),
        (["main/test.jsonl", "socratic/test.jsonl"], {"subset": "socratic", "split": "test"}),
        (["default/test.jsonl", "socratic/test.jsonl"], {"subset": "socratic"}),
        (["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"], {"split": "test"}),
        (["train_agent.json", "main/train-00000-of-00001-0123456789abcdef.parquet"], {}),
        (["dataset_info.json", "my.parquet"], {"split": "train"}),
        (["test.jsonl", "train.jsonl"], {}),
    ],
)
def test_layouts(tmp_path, files, choice):
    """The last file of each list is the one that is meant."""
    for name in files:
        write(tmp_path / "my_eval_set" / name, [{"file": name}])
    assert read(tmp_path / "my_eval_set", **choice) == [{"file": files[-1]}]


def test_shards_are_read_in_order_and_a_preview_opens_only_the_first(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", [{"n": 0}, {"n": 1}])
    write(tmp_path / "train-00001-of-00002.jsonl", [{"n": 2}])
    assert read(tmp_path) == [{"n": 0}, {"n": 1}, {"n": 2}]
    (tmp_path / "train-00001-of-00002.jsonl").write_text("broken")
    assert DatasetConfig(str(tmp_path)).read(2) == [{"n": 0}, {"n": 1}]
    (tmp_path / "train-00001-of-00002.jsonl").unlink()
    with pytest.raises(DataError, match="shards of this split are missing"):
        read(tmp_path)


def test_the_card_of_a_dataset_says_which_files_are_which(tmp_path):
    """No name says a split, and no pattern may leave the folder."""
    write(tmp_path / "d" / "a.jsonl", [{"n": 0}])
    write(tmp_path / "d" / "b.jsonl", [{"n": 1}])
    write(tmp_path / "secret.jsonl", [{"n": 2}])
    (tmp_path / "d" / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n"
        "- config_name: main\n  default: true\n  data_files:\n"
        "  - {split: train, path: a*}\n  - {split: hard, path: [b*, ../secret.jsonl]}\n"
        "- config_name: all\n  data_files: '*.jsonl'\n---\n# A set\n"
    )
    assert read(tmp_path / "d") == [{"n": 0}]
    assert read(tmp_path / "d", split="hard") == [{"n": 1}]
    assert read(tmp_path / "d", subset="all") == [{"n": 0}, {"n": 1}]
    with pytest.raises(DataError, match="no split 'easy'; the splits are train, hard"):
        read(tmp_path / "d", split="easy")


@pytest.mark.parametrize(
    ("files", "choice", "message"),
    [
        (
            ["train.jsonl", "test.jsonl"],
            {"split": "dev"},
            "no split 'dev'; the splits are train, test",
        ),
        (["dev.jsonl", "test.jsonl"], {}, "has the splits dev, test; name one as split"),
        (["a/train.jsonl", "b/train.jsonl"], {}, "has several subsets: a, b; name one as subset"),
        (["a/train.jsonl"], {"subset": "c"}, "has no subset 'c'; the subsets are a"),
        (["train.jsonl"], {"subset": "c"}, "it has no subsets"),
        (["train.jsonl", "train.parquet"], {}, "several files could be this split"),
        (["readme.txt"], {}, "no data in it; looked for files ending in .json"),
    ],
)
def test_a_folder_that_does_not_say_what_is_meant_is_refused(tmp_path, files, choice, message):
    for name in files:
        write(tmp_path / name, ROWS)
    with pytest.raises(DataError, match=message):
        read(tmp_path, **choice)


def test_wrong_files(tmp_path):
    write(tmp_path / "test.jsonl", ROWS)
    (tmp_path / "d.txt").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    (tmp_path / "broken.json").write_text('{"a": 1}\n{"a": \n')
    (tmp_path / "list.jsonl").write_text('{"a": 1}\n[1]\n')
    for name, choice, message in [
        ("test.jsonl", {"split": "train"}, "taken as the split 'test', and split='train'"),
        ("test.jsonl", {"subset": "main"}, "is a file and has no subset"),
        ("tset.jsonl", {}, "no such file or folder; .* holds .*test.jsonl"),
        ("d.txt", {}, "unknown suffix '.txt'"),
        ("broken.parquet", {}, "not a readable parquet file"),
        ("broken.json", {}, "line 2, column"),
        ("list.jsonl", {}, r"list.jsonl, line 2: is list '\[1\]', not an object"),
    ]:
        with pytest.raises(DataError, match=message):
            read(tmp_path / name, **choice)
    with pytest.raises(DataError, match="ask for 1 or more"):
        DatasetConfig(str(tmp_path / "test.jsonl")).preview(0)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("openai/gsm8k", "huggingface"),
        ("openai/gsm8k/main", "huggingface"),
        ("gsm8k/main", "huggingface"),
        ("gsm8k", "huggingface"),
        ("modelscope://AI-ModelScope/gsm8k", "modelscope"),
        ("http://127.0.0.1:1", "environment"),
        ("my_dataset", "file"),
        ("./my/dataset", "file"),
        ("data/train.jsonl", "file"),
        ("/data/gsm8k", "file"),
    ],
)
def test_what_a_path_means(tmp_path, monkeypatch, path, kind):
    monkeypatch.chdir(tmp_path)
    assert TaskSource.of(path).kind == kind


def test_a_folder_here_wins_over_a_hub(tmp_path, monkeypatch):
    """``dataset_path: 'gsm8k/main'`` of the tutorials is a folder where there is one."""
    write(tmp_path / "gsm8k" / "main" / "test-00000-of-00001.parquet", ROWS)
    monkeypatch.chdir(tmp_path)
    assert read("gsm8k/main", split="test") == ROWS
    assert read("gsm8k/main", split="test", kind="huggingface") == ROWS


def test_a_hub_that_cannot_be_reached_is_one_error(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as refused:
        read("openai/no-such-dataset-here", split="train")
    said = str(refused.value)
    assert "openai/no-such-dataset-here cannot be had from Hugging Face" in said
    assert "`chatlearn data download --target openai/no-such-dataset-here --path D`" in said
    assert "\n" not in said


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_real_datasets(split):
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not here")
    gsm8k = read(REAL / "gsm8k", split=split)
    mathematics = read(REAL / "MATH-lighteval", split=split)
    assert all(row.keys() == {"question", "answer"} for row in gsm8k)
    assert all(row.keys() == {"problem", "level", "type", "solution"} for row in mathematics)


def test_preview_prints_the_rows_as_a_json_list(tmp_path, monkeypatch, capsys, caplog):
    write(tmp_path / "my_dataset" / "train.jsonl", ROWS * 4)
    write(tmp_path / "my_dataset" / "test.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    assert DatasetConfig(path="my_dataset", split="train").preview(n=2) == ROWS
    printed = capsys.readouterr().out
    assert json.loads(printed) == ROWS
    assert '[\n  {\n    "question": "2 + 2 等于多少?",\n    "answer": "4"\n  },' in printed
    assert len(DatasetConfig("my_dataset").preview()) == 5
    assert "the split 'train' of train, test" in caplog.text


def test_a_wrong_dataset_config_is_refused_where_it_is_written():
    for settings, message in [
        ({"name": "main", "subset": "socratic"}, "mean the same"),
        ({"total_epochs": 0}, r"DatasetConfig\.total_epochs is 0"),
        ({"fields": {"qeury": "question"}}, "no 'qeury'; did you mean 'query'"),
    ]:
        with pytest.raises(DataError, match=message):
            DatasetConfig("d", **settings)
    with pytest.raises(DataError, match="one of file, huggingface, modelscope, environment"):
        TaskSource("hf", "x")  # type: ignore[arg-type]
