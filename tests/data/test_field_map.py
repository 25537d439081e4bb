"""Raw rows to ours: explicit maps, known layouts, and what is refused."""

from __future__ import annotations

import datetime
import logging

import pytest

from chatlearn.data.field_map import FieldMap, to_rows
from chatlearn.data.prompt_dataset import read_tasks
from chatlearn.data.row_files import write_rows
from chatlearn.errors import DataError


def test_a_row_of_ours_keeps_the_raw_row_whole(tmp_path):
    """The raw columns ``messages`` and ``agent_name`` do not get in the way of ours."""
    raw = {"q": "2+2?", "a": {"value": 4}, "messages": 7, "agent_name": "theirs", "hint": None}
    fields = {"query": "q", "ground_truth": "a.value", "system_prompt": "Be brief."}
    rows = to_rows([raw], fields, agent_name="mine", data_source="my/sums")
    assert rows == [
        {
            "agent_name": "mine",
            "agent_cfg_path": None,
            "data_source": "my/sums",
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "2+2?"},
            ],
            "reward_model": {"style": "rule", "ground_truth": 4},
            "task": raw,
        }
    ]
    write_rows(tmp_path / "d.jsonl", rows)
    (task,) = read_tasks([str(tmp_path / "d.jsonl")])
    assert (task.agent_name, task.ground_truth, task.fields["task"]) == ("mine", 4, raw)


ASK = [{"role": "user", "content": "1/2+1/2?"}]


@pytest.mark.parametrize(
    ("raw", "truth", "source", "said"),
    [
        ({"question": "1/2+1/2?", "answer": "so\n#### 1,000"}, "1000", "openai/gsm8k", "(####)"),
        ({"question": "1/2+1/2?", "answer": "1"}, "1", "", "ground truth in answer"),
        (
            {"problem": "1/2+1/2?", "level": "1", "solution": "$\\boxed{1}$"},
            "1",
            "DigitalLearningGmbH/MATH-lighteval",
            "ground truth in solution (\\boxed{...})",
        ),
        ({"problem": "1/2+1/2?", "answer": "1", "solution": "long"}, "1", "", "truth in answer"),
        (
            {"data_source": "dapo", "prompt": ASK, "reward_model": {"ground_truth": "1"}},
            "1",
            "dapo",
            "messages in prompt, ground truth in reward_model.ground_truth",
        ),
        ({"messages": ASK}, None, "", "messages in messages, no ground truth"),
        ({"task_id": "lake-3", "query": "1/2+1/2?"}, None, "", "question in query, no ground"),
        ({"main_query": "1/2+1/2?", "answer": 1}, 1, "", "question in main_query"),
    ],
)
def test_known_layouts_are_found_by_their_columns_and_said(caplog, raw, truth, source, said):
    caplog.set_level(logging.INFO)
    (row,) = to_rows([raw], agent_name="a")
    assert row["prompt"] == ASK
    assert row.get("reward_model", {}).get("ground_truth") == truth
    assert (row["data_source"], row["task"]) == (source, raw)
    assert said in caplog.text


@pytest.mark.parametrize(
    ("raw", "fields", "message"),
    [
        ({"q": ""}, {"query": "q"}, "row 1: query: q is ''; it must be the text of the question"),
        ({"q": "  "}, {"query": "q"}, "query: q is"),
        ({"q": 5}, {"query": "q"}, "query: q is 5"),
        (
            {"q": "x", "b": 1},
            {"query": "z"},
            "row 1: query: there is no column 'z'; the columns are q, b",
        ),
        (
            {"q": "x"},
            {"query": "q", "ground_truth": "m.a"},
            "ground_truth: there is no column 'm.a'",
        ),
        ({"q": "x", "a": None}, {"query": "q", "ground_truth": "a"}, "ground_truth: a is None"),
        (
            {"question": "x", "answer": "so #### "},
            None,
            r"ground_truth: answer holds no ####: 'so #### '",
        ),
        ({"m": "hi"}, {"messages": "m"}, "messages: m is 'hi'; .* name the column as query"),
        ({"m": []}, {"messages": "m"}, r"messages: m is \[\]"),
        (
            {"q": "x", "image": {"bytes": b"1"}},
            {"query": "q"},
            "image.bytes: holds bytes, which JSON",
        ),
        ({"x": 1}, None, "no known layout has the columns x; say which is which"),
    ],
)
def test_a_row_without_what_is_named_is_refused(raw, fields, message):
    with pytest.raises(DataError, match=message):
        to_rows([raw], fields, agent_name="a")


def test_the_first_few_wrong_rows_are_listed():
    rows = [{"q": "x"}] + [{"q": ""}] * 8
    with pytest.raises(DataError) as refused:
        to_rows(rows, {"query": "q"}, agent_name="a")
    lines = str(refused.value).splitlines()
    assert len(lines) == 1 + 5 + 1
    assert lines[1].startswith("  row 2: query")
    assert lines[-1] == "  ... and 3 more rows"


def test_wrong_maps_are_refused():
    for mapping, message in [
        ({"question": "q"}, "no 'question'.* and the columns stand on the right"),
        ({"query": "q", "messages": "m"}, "name one of them"),
        ({"ground_truth": "a"}, "name one of them"),
        ({"query": "q", "extract": "box"}, "write one of as_is, marked, boxed"),
        ({"query": "q", "ground_truth": 3}, "ground_truth of the field map is 3; write a text"),
    ]:
        with pytest.raises(DataError, match=message):
            FieldMap.of(mapping)


def test_what_parquet_holds_becomes_json():
    raw = {"q": "when?", "a.b": datetime.date(2024, 2, 1), "l": (1, 2.5, None, True)}
    (row,) = to_rows([raw], {"query": "q", "ground_truth": "a.b"}, agent_name="a")
    assert row["reward_model"]["ground_truth"] == "2024-02-01"
    assert row["task"] == {"q": "when?", "a.b": "2024-02-01", "l": [1, 2.5, None, True]}
