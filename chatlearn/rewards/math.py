"""The built-in rewards, all for answers in a box: competition mathematics, GSM8K, arithmetic.

Only correctness is rewarded. That an answer was given at all, well formed, is the metric
``answered``, so a run shows the two apart. Only the last box counts: a reply that boxes several
guesses is judged by the last.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from chatlearn.rewards.equivalence import equivalent
from chatlearn.rewards.registry import reward

Scored = tuple[float, dict[str, float]]

MAX_ANSWER_CHARS = 512
"""Longer answers are not read; the longest of MATH is about a third of it."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_DIGITS = r"(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)"
_NUMBER = re.compile(rf"[+-]?(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)")
_NUMBER_LIKE = re.compile(r"[+-]?[.,]*[0-9][0-9.,]*")
_INTEGER = re.compile(rf"[+-]?{_DIGITS}")


def last_box(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` or ``\fbox{...}`` holds, stripped; braces nest.

    ``\boxed 5`` boxes the characters up to a space or dollar. None when there is no box or the last
    one is never closed; '' when it is empty. ``data_preprocess`` has its twin for solutions (rooms
    of one floor do not import each other; a test holds them together).
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    rest = text[boxes[-1].end() :]
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0]
    depth = 0
    for token in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "}":
            return rest[1 : token.start()].strip()
    return None


@reward(
    "DigitalLearningGmbH/MATH-lighteval",
    "HuggingFaceH4/MATH-500",
    "aime24",
    "aime25",
)
def math_reward(response: str, ground_truth: Any, **_: Any) -> Scored:
    """1 when the last box equals the ground truth mathematically (math-verify), else 0.

    An answer that cannot be compared within the limits of ``equivalence`` is not equal.
    """
    gold = _gold(ground_truth)
    answer = last_box(response)
    if not answer or len(answer) > MAX_ANSWER_CHARS:
        return _scored(False, answered=False)
    return _scored(equivalent(gold, answer), answered=True)


@reward("openai/gsm8k")
def gsm8k_reward(response: str, ground_truth: Any, **_: Any) -> Scored:
    """1 when the answer is the ground truth as an exact decimal, else 0.

    The answer is the last box; without any box, the rest of the line after the last ``####``; a
    number elsewhere in the text earns nothing. It must hold one number, after its last ``=`` if it
    has any: ``$1,080.00``, ``18 dollars`` and ``9*2 = 18`` do, ``16 or 18`` does not.
    """
    gold = _one_number(_gold(ground_truth))
    if gold is None:
        raise ValueError(f"the ground truth {ground_truth!r} is not a number")
    answer = last_box(response)
    if answer is None and not _BOX.search(response):
        _, mark, rest = response.rpartition("####")
        answer = rest.strip().split("\n")[0] if mark else None
    number = _one_number(answer or "")
    return _scored(number == gold, answered=number is not None)


@reward("chatlearn/arithmetic")
def arithmetic_reward(response: str, ground_truth: Any, **_: Any) -> Scored:
    """1 when the last box holds the integer of the ground truth and nothing else, else 0."""
    answer = last_box(response) or ""
    is_integer = len(answer) <= 64 and _INTEGER.fullmatch(answer) is not None
    correct = is_integer and int(answer.replace(",", "")) == int(_gold(ground_truth))
    return _scored(correct, answered=is_integer)


def final_answer_reward(response: str, ground_truth: Any, **_: Any) -> Scored:
    """1 when what the response ends on is the ground truth, else 0; for models that never box.

    Its last box is judged when it has one, else its last number. Nothing is earned by format: an
    empty box is wrong, and so is the right number followed by another. Not registered for any
    source; named as ``reward_fn: chatlearn.rewards.math:final_answer_reward``.
    """
    gold = _gold(ground_truth)
    answer = last_box(response)
    if answer is None:
        numbers = [n for n in _NUMBER_LIKE.findall(response) if len(n) <= MAX_ANSWER_CHARS]
        answer = numbers[-1].rstrip(".,") if numbers else ""
    if not answer or len(answer) > MAX_ANSWER_CHARS:
        return _scored(False, answered=False)
    expected, given = _one_number(gold), _one_number(answer)
    if expected is not None and given is not None:
        return _scored(expected == given, answered=True)
    return _scored(equivalent(gold, answer), answered=True)


def _scored(correct: bool, *, answered: bool) -> Scored:
    return float(correct), {"answered": float(answered)}


def _gold(ground_truth: Any) -> str:
    gold = "" if ground_truth is None else str(ground_truth).strip()
    if not gold:
        raise ValueError("the task has no ground truth; set reward_model.ground_truth in its row")
    return gold


def _one_number(text: str) -> Decimal | None:
    """The only number of ``text``, exactly; None when there is none, or are several."""
    if len(text) > MAX_ANSWER_CHARS:
        return None
    plain = text.rpartition("=")[2]
    for old, new in (("{,}", ","), ("\\!", ""), ("\\,", ""), ("\\$", ""), ("$", "")):
        plain = plain.replace(old, new)
    plain = re.sub(r"([+-])\s+(?=[\d.])", r"\1", plain.replace("\u2212", "-"))
    numbers = [number.rstrip(",.") for number in _NUMBER_LIKE.findall(plain)]
    if len(numbers) != 1 or not _NUMBER.fullmatch(numbers[0]):
        return None
    return Decimal(numbers[0].replace(",", ""))
