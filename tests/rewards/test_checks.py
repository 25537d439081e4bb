"""Checks: loaded, refused, called on a turn, and what their findings do to a run."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from chatlearn.config.runtime_args import KNOWN_CHECKS, CheckArgs
from chatlearn.errors import ConfigError, JudgeError
from chatlearn.rewards.checks import (
    CHECKS,
    CalledTool,
    Findings,
    SampledTurn,
    load_checks,
    wrong_toolcall,
)
from chatlearn.types import Completion, StopReason, Turn

LOOP, FINE = SampledTurn("no " * 60), SampledTurn("4")


def turn(number, excluded=""):
    return Turn(
        number, None, [1], Completion([2], [-0.1], StopReason.STOP, (0, 0)), excluded=excluded
    )


def checks(*entries):
    return load_checks(CheckArgs(**entry) for entry in entries)


def test_the_schema_knows_the_built_in_checks():
    assert tuple(CHECKS) == KNOWN_CHECKS


def test_an_unknown_check_is_refused_with_the_nearest_name():
    said = "no check 'repetitoin'; did you mean 'repetition'. Known are nonsense, wrong_toolcall"
    with pytest.raises(ValidationError, match=said):
        CheckArgs(name="repetitoin")


@pytest.mark.parametrize(
    ("calls", "tools", "severity"),
    [
        ([], None, 0.0),
        ([CalledTool("add")], ["add"], 0.0),
        ([CalledTool("add")], None, 0.0),
        ([CalledTool("")], None, 1.0),
        ([CalledTool("add", "no JSON")], ["add"], 1.0),
        ([CalledTool("ad")], ["add"], 1.0),
        ([CalledTool("add"), CalledTool("ad")], ["add"], 0.5),
        ([CalledTool("add")], [], 1.0),
    ],
)
def test_wrong_tool_calls(calls, tools, severity):
    assert wrong_toolcall(calls, tools) == severity


def test_a_check_of_the_user_has_fields_of_the_turn(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def shouts(text, *, calls):\n    return float(text.isupper() and not calls)\n")
    (check,) = checks({"name": f"{file}->shouts", "threshold": 1.0})
    assert check.name == "shouts"
    assert (check.severity(SampledTurn("NO")), check.severity(FINE)) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(text):\n    return 1.5", "check 'f' .*the severity is 1.5; .*from 0 to 1"),
        ("def f(text):\n    return float('nan')", "the severity is no finite number but nan"),
        ("def f(text):\n    return text", "the severity is no finite number but '4'"),
        ("def f(text):\n    raise KeyError(text)", "check 'f' .*raised KeyError: '4'"),
    ],
)
def test_a_check_that_fails_is_an_error(tmp_path, source, said):
    file = tmp_path / "mine.py"
    file.write_text(source)
    findings = Findings(checks({"name": f"{file}->f"}))
    with pytest.raises(JudgeError, match=said):
        findings.look(0, FINE)
    assert isinstance(findings.error, JudgeError)


def test_checks_that_cannot_be_had_are_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def f(text, turn): ...\nasync def g(text): ...\ndef repetition(text): ...\n")
    for name, said in (
        (f"{file}->f", r"parameters \(text, turn\); nobody supplies turn. It may have text, logp"),
        (f"{file}->g", "is async"),
        (f"{file}->h", r"mine.py has no 'h'"),
    ):
        with pytest.raises(ConfigError, match=said):
            checks({"name": name})
    with pytest.raises(ConfigError, match="two checks are named 'repetition'"):
        checks({"name": "repetition"}, {"name": f"{file}->repetition"})


def test_what_findings_do_to_a_run():
    findings = Findings(
        checks(
            {"name": "repetition", "action": "mask"},
            {"name": "nonsense", "reward": -1.0},
            {"name": "wrong_toolcall", "reward": -0.5},
        )
    )
    turns = [turn(0), turn(1, "superseded"), turn(2), turn(3, "greedy")]
    findings.look(0, LOOP)
    findings.look(1, SampledTurn("\ufffd" * 20 + "."))
    findings.look(2, SampledTurn("4", calls=(CalledTool(""),)))
    findings.look(3, LOOP)
    findings.mask(turns)
    assert [t.excluded for t in turns] == ["check: repetition", "superseded", "", "greedy"]
    assert findings.masked == [0]
    assert findings.stopped is None
    assert findings.reward(turns) == -0.5
    assert findings.metrics(turns) == {
        "checks/repetition": 1.0,
        "checks/nonsense": 0.0,
        "checks/wrong_toolcall": 1.0,
    }


def test_a_threshold_is_reached_and_not_passed():
    sampled = SampledTurn("", calls=(CalledTool("add"), CalledTool("")))
    for threshold, found in ((0.5, 1.0), (0.51, 0.0)):
        findings = Findings(checks({"name": "wrong_toolcall", "threshold": threshold}))
        findings.look(0, sampled)
        assert findings.metrics([turn(0)]) == {"checks/wrong_toolcall": found}
