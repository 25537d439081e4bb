"""The built-in rewards on tables of answers, on hostile answers, and on the real solutions."""

import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from chatlearn.data.data_preprocess.gsm8k_agent import marked_answer
from chatlearn.data.data_preprocess.math_lighteval_agent import boxed_answer
from chatlearn.rewards import equivalence
from chatlearn.rewards.math import (
    MAX_ANSWER_CHARS,
    arithmetic_reward,
    final_answer_reward,
    gsm8k_reward,
    last_box,
    math_reward,
)

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("CHATLEARN_TEST_DATA") or ROOT.parent / "shared" / "data")

RIGHT, WRONG, NONE = (1.0, {"answered": 1.0}), (0.0, {"answered": 1.0}), (0.0, {"answered": 0.0})


def real_rows(name, split):
    path = REAL / name / f"{split}-00000-of-00001.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "5"),
        ("5", " $5$. "),
        ("5", "x = 5"),
        ("5", r"5\text{ cm}"),
        ("5", r"\frac{10}{2}"),
        ("5", r"\(5\)"),
        (5, "5"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac12", r"\dfrac{1}{2}"),
        (r"\frac{\sqrt{2}}{2}", r"1/\sqrt{2}"),
        ("1,3", "3, 1"),
        ("1,3", r"\{1,3\}"),
        ("10,000", "10000"),
        (r"11,\! 111", "11111"),
        (r"90^\circ", "90"),
        (r"\$18.90", "18.90"),
        (r"\text{(A)}", "A"),
        (r"\text{Evelyn}", "Evelyn"),
        ("(x+1)^2", "x^2+2x+1"),
        ("[1,2)", r"x \in [1,2)"),
        ("3:00", "3:00"),
        (
            r"\begin{pmatrix} 1 \\ -\frac{1}{2} \end{pmatrix}",
            r"\begin{pmatrix}1\\-0.5\end{pmatrix}",
        ),
    ],
)
def test_equal_mathematics_is_right(gold, answer):
    assert math_reward(f"So \\boxed{{{answer}}}.", gold) == RIGHT


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "6"),
        ("5", "-5"),
        ("5", "5, 6"),
        ("5", "5 or 6"),
        ("5", r"5\text{ or }6"),
        ("5", r"\text{not } 5"),
        ("5", r"\text{the final answer is $5$. I hope it is correct}"),
        ("5", "x"),
        ("5", r"\infty"),
        (r"\frac12", r"} \frac{1}{2} {"),
        (r"\frac12", r"is it $\frac{1}{2}$ or $\frac{1}{3}$"),
        (r"\frac12", r"\frac{1}{3} \begin{x} \frac{1}{2}"),  # the whole does not parse, a part does
        (r"\frac12", r"final answer is \frac{1}{2}. I hope"),
        ("1,3", "1"),
        ("(1,2)", "(2,1)"),
        ("[1,2]", "(1,2)"),
        ("0.333", r"\frac13"),
        ("3:00", "4:00"),
        (r"\frac10", r"\frac20"),
    ],
)
def test_other_mathematics_is_wrong(gold, answer):
    assert math_reward(f"So \\boxed{{{answer}}}.", gold)[0] == 0.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"\boxed{5}", RIGHT),
        (r"\boxed{6}, no, \boxed{5}", RIGHT),
        (r"\boxed{5}, no, \boxed{6}", WRONG),
        (r"\boxed{\boxed{5}}", RIGHT),
        (r"\fbox{5}", RIGHT),
        (r"$\boxed 5$", RIGHT),
        (r"\boxed{5} and \boxed{}", NONE),
        (r"\boxed{5} and \boxed{5", NONE),
        (r"\boxed{ }", NONE),
        (r"\boxed", NONE),
        ("The answer is $5$.", NONE),
        ("5", NONE),
        ("", NONE),
        (r"\boxed{5" + " " * MAX_ANSWER_CHARS + "+0}", NONE),
    ],
)
def test_only_the_last_box_counts(response, expected):
    assert math_reward(response, "5") == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"\boxed{1634}", RIGHT),
        (r"\boxed{1,634}", RIGHT),
        (r"\boxed{1{,}634}", RIGHT),
        (r"\boxed{\$1,634.00}", RIGHT),
        (r"\boxed{+1634.}", RIGHT),
        (r"\boxed{1634 \text{ dollars}}", RIGHT),
        (r"\boxed{2 \times 817 = 1634}", RIGHT),
        ("thus\n#### 1,634\n", RIGHT),
        ("#### $1634 in total", RIGHT),
        (r"#### 5 but \boxed{1634}", RIGHT),
        (r"\boxed{5} and #### 1634", WRONG),
        (r"\boxed{1634.01}", WRONG),
        (r"\boxed{-1634}", WRONG),
        (r"\boxed{\u22121634}".replace("\\u2212", "\u2212"), WRONG),
        (r"\boxed{1634 or 1635}", NONE),
        (r"\boxed{16,34}", NONE),
        (r"\boxed{1.6.34}", NONE),
        (r"\boxed{1634 = x}", NONE),
        (r"\boxed{} #### 1634", NONE),
        (r"\boxed{1634 #### 1634", NONE),
        ("#### ", NONE),
        ("The answer is 1634.", NONE),
        (r"\boxed{" + "1" * 9999 + "}", NONE),
    ],
)
def test_gsm8k(response, expected):
    assert gsm8k_reward(response, "1634") == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"37*24 = \boxed{-888}", RIGHT),
        (r"\boxed{ -888 }", RIGHT),
        (r"\boxed{-0888}", RIGHT),
        (r"\boxed{888}", WRONG),
        (r"\boxed{-888} or \boxed{3}", WRONG),
        (r"\boxed{-888.0}", NONE),
        (r"\boxed{x = -888}", NONE),
        (r"\boxed{-888 or 3}", NONE),
        (r"\boxed{8,88}", NONE),
        (r"\boxed{" + "8" * 9999 + "}", NONE),
        ("-888", NONE),
    ],
)
def test_arithmetic(response, expected):
    assert arithmetic_reward(response, "-888") == expected
    assert arithmetic_reward(r"\boxed{2,401}", 2401) == RIGHT


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"\boxed{888}", RIGHT),
        (r"\boxed{\frac{1776}{2}}", RIGHT),
        (r"\boxed{888} and then 5", RIGHT),
        (r"888, or \boxed{887}", WRONG),
        (r"888, or \boxed{}", NONE),
        (r"888, or \boxed{88", WRONG),
        ("37*24 = 888.", RIGHT),
        ("It is 888, not 889.", WRONG),
        ("I cannot.", NONE),
    ],
)
def test_final_answer_is_the_box_or_else_the_last_number(response, expected):
    assert final_answer_reward(response, "888") == expected


def test_a_task_without_ground_truth_is_an_error_and_not_a_wrong_answer():
    for function in (math_reward, gsm8k_reward, arithmetic_reward):
        for gold in (None, "", " "):
            with pytest.raises(ValueError, match="ground truth"):
                function(r"\boxed{5}", gold)
    with pytest.raises(ValueError, match="not a number"):
        gsm8k_reward(r"\boxed{5}", "five")


def test_threads_get_their_own_answers():
    """math-verify's own time limits raise in any thread but the main one."""

    def ask(n):
        return math_reward(f"\\boxed{{\\frac{{{n}}}{{7}}}}", f"\\dfrac{{{n // 2 * 2}}}{{7}}")[0]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(60))) == [1.0, 0.0] * 30


@pytest.fixture
def helpers(monkeypatch):
    """One helper of its own, with little time."""
    pool = equivalence._Helpers(1, cpu_seconds=1.0)
    monkeypatch.setattr(equivalence, "_helpers", pool)
    yield pool
    helper = pool._idle.get()
    if helper is not None:
        helper.kill()


def test_an_answer_too_hard_to_compare_ends_in_time_and_the_next_is_judged(helpers, caplog):
    started = time.monotonic()
    assert math_reward(r"\boxed{9^{9^{9^9}}}", "5") == WRONG  # one C call of years
    assert time.monotonic() - started < 60
    assert "gave up comparing '9^{9^{9^9}}'" in caplog.text
    assert math_reward(r"\boxed{\frac{10}{2}}", "5") == RIGHT


def test_a_helper_killed_from_outside_is_replaced(helpers):
    assert math_reward(r"\boxed{1+1}", "2") == RIGHT
    helper = helpers._idle.get()
    os.kill(helper._process.pid, signal.SIGKILL)
    helper._process.wait()
    helpers._idle.put(helper)
    assert math_reward(r"\boxed{1+2}", "3") == RIGHT


def test_an_interrupted_question_does_not_answer_the_next_one(helpers):
    """Ctrl-C or a test's time limit may strike between question and answer."""
    assert math_reward(r"\boxed{1+1}", "2") == RIGHT
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            math_reward(r"\boxed{99999999999!}", "5")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert math_reward(r"\boxed{1+2}", "3") == RIGHT


def test_a_helper_that_cannot_start_is_an_error_and_not_a_wrong_answer(helpers, monkeypatch, capfd):
    monkeypatch.setattr(equivalence, "_HELPER", "raise SystemExit(7)")
    with pytest.raises(RuntimeError, match="exit code 7"):
        math_reward(r"\boxed{1+1}", "2")


def test_the_main_process_never_imports_sympy():
    """Sympy would hold the interpreter lock of the process that samples."""
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from chatlearn.rewards.math import math_reward\n"
        "assert math_reward(r'\\boxed{1+1}', '2')[0] == 1\n"
        "assert not {'sympy', 'math_verify', 'torch', 'langchain_core'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_every_math_solution_earns_its_own_ground_truth():
    rows = real_rows("MATH-lighteval/data", "train") + real_rows("MATH-lighteval/data", "test")
    answers = [boxed_answer(row["solution"]) for row in rows]
    assert answers == [last_box(row["solution"]) or None for row in rows], "the twins agree"
    assert max(map(len, answers)) < MAX_ANSWER_CHARS
    results = [math_reward(row["solution"], gold) for row, gold in zip(rows, answers, strict=True)]
    assert results == [RIGHT] * len(rows)


def test_math_verify_reads_the_real_answers_and_tells_them_apart():
    """Without the shortcut for equal texts: each against itself, and against the next one."""
    golds = [boxed_answer(row["solution"]) for row in real_rows("MATH-lighteval/data", "test")]
    ask = equivalence._helpers.ask
    plain = [equivalence._plain(gold) for gold in golds]
    same = sum(ask(gold, gold) for gold in plain) / len(plain)
    pairs = list(itertools.pairwise(plain[:200]))
    mixed = [pair for pair in pairs if ask(*pair) and pair[0] != pair[1]]
    print(f"equal to itself: {same:.4f}; different texts judged equal: {mixed}")
    assert same > 0.97
    assert len(mixed) < 0.01 * len(pairs)


def test_every_gsm8k_answer_earns_its_reward():
    rows = real_rows("gsm8k/main", "train") + real_rows("gsm8k/main", "test")
    for row in rows:
        gold = marked_answer(row["answer"])
        assert gsm8k_reward(row["answer"], gold) == RIGHT
        assert gsm8k_reward(f"\\boxed{{\\${gold}.00}}", gold) == RIGHT
        assert gsm8k_reward(f"\\boxed{{{gold}1}}", gold) == WRONG
