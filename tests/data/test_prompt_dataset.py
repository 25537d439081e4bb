"""Rows in, tasks out; and every kind of wrong row named with file, line, field and remedy."""

import json
import logging
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatlearn.data.prompt_dataset import drop_long, read_tasks
from chatlearn.errors import DataError
from chatlearn.types import Task

USER = {"role": "user", "content": "Compute 3*4."}
ROW = {
    "agent_name": "calculator",
    "agent_cfg_path": None,
    "data_source": "my/sums",
    "prompt": [USER],
    "ability": "arithmetic",
    "reward_model": {"style": "rule", "ground_truth": "12"},
    "extra_info": {"index": 7},
    "level": "Level 1",
}


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def one_task(tmp_path, **changes):
    return read_tasks([write_lines(tmp_path / "d.json", {**ROW, **changes})])[0]


def test_a_row_becomes_a_task(tmp_path):
    path = write_lines(tmp_path / "train_agent.json", ROW)
    assert read_tasks([path]) == [
        Task(
            uid="train_agent:0",
            messages=[USER],
            agent_name="calculator",
            agent_cfg_path=None,
            data_source="my/sums",
            ground_truth="12",
            fields={
                "ability": "arithmetic",
                "reward_model": {"style": "rule", "ground_truth": "12"},
                "extra_info": {"index": 7},
                "level": "Level 1",
            },
        )
    ]


@pytest.mark.parametrize("form", ["lines.json", "lines.jsonl", "array.json", "table.parquet"])
def test_every_form_of_file_gives_the_same_tasks(tmp_path, form):
    tool_call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "Line\u2028separator."},
        {"role": "assistant", "content": None, "tool_calls": [tool_call]},
        {"role": "tool", "content": "9", "tool_call_id": "1"},
    ]
    rows = [ROW, {**ROW, "prompt": history}]
    path = tmp_path / form
    if form == "table.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "array.json":
        path.write_text(json.dumps(rows, indent=2))
    else:  # a blank line is no row; characters outside ASCII are not escaped
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n\n".join(lines), encoding="utf-8")
    first, second = read_tasks([str(path)])
    assert [first.uid, second.uid] == [f"{path.stem}:0", f"{path.stem}:1"]
    assert first.messages == [USER]  # parquet's null tool_calls are gone
    assert second.messages == [
        {"role": "user", "content": "Line\u2028separator."},
        {"role": "assistant", "content": "", "tool_calls": [tool_call]},
        {"role": "tool", "content": "9", "tool_call_id": "1"},
    ]
    assert first.fields["extra_info"] == {"index": 7}


def test_messages_is_another_name_of_prompt_and_ground_truth_may_be_on_top(tmp_path):
    row = {"agent_name": "a", "messages": [USER], "ground_truth": 12}
    task = read_tasks([write_lines(tmp_path / "d.jsonl", row)])[0]
    assert (task.messages, task.ground_truth, task.data_source) == ([USER], 12, "")
    assert task.fields == {}


def test_content_may_be_a_list_of_blocks(tmp_path):
    blocks = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {}}]
    task = one_task(tmp_path, prompt=[{"role": "user", "content": blocks}])
    assert task.messages[0]["content"] == blocks


def test_uids_of_files_with_one_stem_differ(tmp_path):
    paths = [
        write_lines(tmp_path / "sums" / "train.json", ROW),
        write_lines(tmp_path / "words" / "train.json", ROW, ROW),
        write_lines(tmp_path / "other.json", ROW),
    ]
    uids = [task.uid for task in read_tasks(paths)]
    assert uids == ["sums/train:0", "words/train:0", "words/train:1", "other:0"]
    paths += [write_lines(tmp_path / "x" / "sums" / "train.jsonl", ROW)]
    uids = [task.uid for task in read_tasks(paths)]
    assert len(set(uids)) == 5
    with pytest.raises(DataError, match="listed twice"):
        read_tasks([paths[0], paths[0]])


def test_agent_cfg_path_is_looked_up_in_the_cwd_then_beside_the_dataset(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    monkeypatch.chdir(here)
    path = write_lines(there / "d.json", {**ROW, "agent_cfg_path": "agent/my.yaml"})
    with pytest.raises(DataError) as error:
        read_tasks([path])
    assert str(here / "agent/my.yaml") in str(error.value)
    assert str(there / "agent/my.yaml") in str(error.value)
    for folder in (there, here):
        (folder / "agent").mkdir()
        (folder / "agent/my.yaml").write_text("max_turns: 3\n")
        assert read_tasks([path])[0].agent_cfg_path == str(folder / "agent/my.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agent_name": None}, r"agent_name: found nothing; .*@register"),
        ({"agent_name": 3}, r"agent_name: found int 3"),
        ({"agent_cfg_path": 3}, r"agent_cfg_path: found int 3; .*null"),
        ({"data_source": ["a"]}, r"data_source: found list \['a'\]"),
        ({"prompt": None}, r"prompt: missing; write \[\{"),
        ({"prompt": "Compute 3*4."}, r"prompt: found str 'Compute 3\*4\.'; write \[\{"),
        ({"prompt": []}, r"prompt: found list \[\]"),
        ({"messages": [USER]}, r"prompt and messages: both"),
        ({"prompt": ["hi"]}, r"prompt\[0\]: found str 'hi'"),
        ({"prompt": [USER, {"role": "human", "content": ""}]}, r"prompt\[1\]\.role: .*'human'"),
        ({"prompt": [{"role": "user", "content": 5}]}, r"prompt\[0\]\.content: found int 5"),
        ({"prompt": [{"role": "user"}]}, r"prompt\[0\]\.content: found nothing"),
        ({"prompt": [{"role": "assistant"}]}, r"prompt\[0\]\.content: found nothing"),
        (
            {"prompt": [{"role": "user", "content": ["a"]}]},
            r"prompt\[0\]\.content\[0\]: found str 'a'",
        ),
        ({"reward_model": "12"}, r"reward_model: found str '12'"),
        ({"ground_truth": "13"}, r"ground_truth: found str '13', but reward_model.*'12'"),
    ],
)
def test_a_wrong_row_is_refused_by_file_line_and_field(tmp_path, changes, message):
    path = write_lines(tmp_path / "d.json", ROW, "", {**ROW, **changes})
    with pytest.raises(DataError, match=rf"{re.escape(path)}, line 3: {message}"):
        read_tasks([path])


def test_the_first_five_wrong_rows_of_all_files_are_listed(tmp_path):
    bad = {**ROW, "agent_name": ""}
    paths = [
        write_lines(tmp_path / "a.json", bad, ROW, bad),
        write_lines(tmp_path / "b.json", *[bad] * 5, "[1]"),
    ]
    with pytest.raises(DataError) as error:
        read_tasks(paths)
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 5 + 1
    assert "a.json, line 3" in lines[2]
    assert "b.json, line 3" in lines[5]
    assert lines[6].strip() == "... and 3 more rows"


def test_json_that_does_not_parse_names_its_line(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", ROW, '{"agent_name": calculator}')
    with pytest.raises(DataError, match=r"d\.jsonl, line 2, column 16: not JSON .*calculator"):
        read_tasks([path])
    (tmp_path / "array.json").write_text('[{"a": 1},\n {"a": }]')
    with pytest.raises(DataError, match=r"array\.json, line 2"):
        read_tasks([str(tmp_path / "array.json")])


def test_files_that_cannot_be_read(tmp_path):
    write_lines(tmp_path / "train_agent.json", ROW)
    (tmp_path / "empty.json").write_text("\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR0")
    (tmp_path / "rows.csv").write_text("a,b\n")
    for name, message in [
        ("train_agnet.json", "did you mean 'train_agent.json'"),
        ("zzz.parquet", "holds .*train_agent.json"),
        ("nowhere/train.json", "nowhere does not exist either"),
        (".", "is a folder; name a file in it"),
        ("rows.csv", r"unknown suffix '\.csv'.*\.parquet"),
        ("empty.json", "has no rows"),
        ("broken.parquet", "not a readable parquet"),
    ]:
        with pytest.raises(DataError, match=message):
            read_tasks([str(tmp_path / name)])
    assert read_tasks([]) == [], "no evaluation data is not an error"


def task(length):
    return Task(f"d:{length}", [{"role": "user", "content": "x" * length}], "a", None, "", None)


def words(item):
    return len(item.messages[0]["content"])


def test_long_prompts_are_dropped_counted_and_logged(caplog):
    tasks = [task(3), task(9), task(4), task(5)]
    with caplog.at_level(logging.WARNING):
        assert drop_long(tasks, words, 4) == ([tasks[0], tasks[2]], 2)
    assert "dropped 2 of 4 prompts" in caplog.text
    caplog.clear()
    assert drop_long(tasks, words, 9) == (tasks, 0)
    assert not caplog.records


def test_dropping_everything_names_the_key_and_the_shortest_prompt():
    with pytest.raises(DataError, match=r"max_prompt_tokens_length=2 .*shortest has 3"):
        drop_long([task(9), task(3)], words, 2)
