"""What is nonsense or a loop, and what only looks like it: a corpus of each."""

from __future__ import annotations

import base64
import os
import random
from pathlib import Path

import pytest

from chatlearn.rewards.checks import CHECKS, SampledTurn
from chatlearn.rewards.nonsense import nonsense
from chatlearn.rewards.repetition import repetition

RAW = Path(os.environ.get("CHATLEARN_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
DIGITS = "".join(random.Random(0).choices("0123456789", k=1000))
ROW = "| 1 | 2 | 3 |\n"
MATRIX = "\\begin{pmatrix}\n" + " \\\\\n".join(["0 & 0 & 0 & 0 & 0"] * 5) + "\n\\end{pmatrix}"

GOOD = {
    "one letter": "π",
    "signs of mathematics": "√2 ≤ π → ∞, ∀x∈ℝ ∃ε>0: |xᵢ−μ|² ≥ ½·σ², ∑ₖ 2ᵏ ≠ ∫₀¹ 𝑓(𝑥)d𝑥, "
    "Δx·Δp ≥ ℏ/2, 5 μm, 10 Ω",
    "LaTeX": r"\[\frac{-b \pm \sqrt{b^2-4ac}}{2a}\] so $x_{i+1}^{2} = \boxed{\tfrac{3}{4}}$",
    "a matrix of zeros in a solution": f"The map sends every vector to 0, so it is\n{MATRIX}\n"
    "and its rank is 0 whatever basis we take. Therefore the kernel is the whole space.",
    "Russian": "Найдём сумму: угол α равен 30°, Fтр = μN, HTTP-сервер, n-го порядка, Vср и Eк.",
    "Chechen, Chuvash": "Гlайреш Хlоьттина АфгIанистан Чӑваш Рăççей ăна гIала хIорд цIе гIишло дIа",
    "Chinese": "使用Python编写一个函数，计算x²+1的值。答案是：42。“你好”，他说……",
    "Japanese": "Pythonで関数を書く。答えは「42」です。ＡＢＣ１２３、カタカナ、漢字。",
    "Thai, Korean, Hindi": "ใช้Pythonเขียนโปรแกรม API를 사용해서 서버에 보냅니다 Pythonमें लिखो",
    "Arabic, Hebrew": "مرحبا بالعالم، الجواب ٤٢. שלום עולם, בPython כותבים",
    "greetings": "Hello Привет 你好 שלום नमस्ते สวัสดี 안녕하세요 こんにちは مرحبا Γεια",
    "a lesson": "Слово 你好 состоит из 你 и 好, а слово 谢谢 повторяет один знак 谢; 我 значит я.\n"
    * 6,
    "French and German quotes": "« É » et « été »\u00a0; «\u00a0été\u00a0» né\u00a0» "
    "Spaß“ groß“ MENÜ“ NÃO 3×¼ 2×½ ±²",
    "emoji": "Well done! 🎉🚀👩‍💻 👍🏽 ❤️ 🫨 🇩🇪 ✅✅✅ 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "a table": "| a | b |\n|---|:-:|\n" + "".join(f"| {i} | {i * i} |\n" for i in range(40)),
    "six equal rows": "| n | n² | n³ |\n|---|---|---|\n" + ROW * 6,
    "a wide rule": "─" * 80 + "\nTotal\n" + "=" * 80,
    "210 dashes": "-" * 210,
    "spaced dashes": "- " * 100,
    "205 spaces of indent": " " * 205 + "return x",
    "code": "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\n\n\n"
    "print([f(i) for i in range(9)])\n",
    "minified code": "!function(e,t){'use strict';for(var n=0;n<t.length;n++){e[n]=t[n]^255}}(a,b)",
    "JSON": '{"a": [0, 0, 0, 0, 0], "b": {"c": null, "d": [true, false]}, "e": "\\u00e9"}',
    "a tool call": "<tool_call>\n"
    '{"name": "calculator", "arguments": {"expression": "2*2*2*2"}}\n</tool_call>',
    "terminal colours": "\x1b[31mFAILED\x1b[0m tests \x1b[1;32m12 passed\x1b[0m\r\n\tdone\f",
    "1,000 digits": DIGITS,
    "a third, 1,000 digits": "0." + "3" * 1000,
    "a seventh, 1,000 digits": "1/7 = 0." + ("142857" * 167),
    "10 to the 1,000": "1" + "0" * 1000,
    "base64": base64.b64encode(random.Random(1).randbytes(900)).decode(),
    "hexadecimal": random.Random(2).randbytes(300).hex(" "),
    "a long word": "Methionylthreonylthreonylglutaminylarginyltyrosylglutamylserylleucyl",
    "powers": "There will be 1*2*2*2*2*2*2*2*2*2*2*2*2 = 4,096 cells after all that.",
    "counting": ", ".join(map(str, range(1, 300))),
    "a poem's refrain": "Row, row, row your boat, gently down the stream,\n"
    "Merrily, merrily, merrily, merrily, life is but a dream.\n" * 3,
    "a character cut by the token limit": "The answer is 3 \ufffd",
    "a character quoted": "U+FFFD (\ufffd) stands for bytes that are no UTF-8; é became Ã© there.",
    "nothing": "",
}

NONSENSE = {
    "broken bytes": "the \ufffd\ufffd answ\ufffd is \ufffd\ufffd 4 \ufffd\ufffd\ufffd\ufffd so",
    "control characters": "so\x01 the\x06 ans\x19wer\x02 is\x1d 4\x0c\x1e\x0f\x00",
    "nobody's code points": "so \ue001\ue0f2 the \uf8a1\u0378 answer \ufdd0\uffff \ue123 is \ue9ff",
    "mojibake, French": "La rÃ©solution de l'Ã©quation donnÃ©e Ã\xa0 la pagÃ© : cÃ´tÃ© Ã©",
    "mojibake, Russian": "ÐŸÑ€Ð¸Ð²ÐµÑ‚, Ð¼Ð¸Ñ€",
    "mojibake, Chinese": "è¿™æ˜¯ä¸€ä¸ªæµ‹è¯•",
    "mojibake, quotes": "Itâ€™s the manâ€™s â€œbestâ€ thing â€“ ever â€¦ isnâ€™t it",
    "scripts in one word": "приveт мiр wорlд здraвсtвуй кakдeла тoчkа лyчше пoтoм сkaзaтb",
    "scripts thrown together": "그리고ของ function приветthe 你的 عربي पर foo Bar의 это ที่ は "
    "return על कर слово的 ]] مع ты です for는 да การ بار not я 했다",
}

LOOPS = {
    "a word": "the answer is " + "no " * 60,
    "a sentence": "So we get 4. " + "Wait, let me check that again. " * 15,
    "a paragraph": (" ".join(f"word{i}" for i in range(90)) + ". ") * 5,
    "a block that repeats inside": "a b a b a b c d e. " * 20,
    "letters": "The sum is ha" + "ha" * 200,
    "one character": "!" * 100,
    "a flood of spaces": "4" + " " * 2000,
    "a rule without end": "-" * 3000,
    "zeros without end": "1" + "0" * 5000,
    "Chinese": "答案是四。" + "我们再检查一遍，" * 20,
    "Thai": "คำตอบคือ " + "ตรวจสอบ" * 30,
    "tool calls": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n' * 30,
}


@pytest.mark.parametrize("name", GOOD)
def test_good_text_trips_nothing(name):
    assert (nonsense(GOOD[name]) < 0.4, repetition(GOOD[name]) < 0.4) == (True, True)


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_found(name):
    assert nonsense(NONSENSE[name]) >= 0.5
    assert nonsense("The first page is fine. " * 20 + NONSENSE[name]) >= 0.5


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_found(name):
    assert repetition(LOOPS[name]) >= 0.5


def test_a_loop_is_the_share_of_the_text_that_it_fills():
    good = "Twelve eggs cost 3 dollars, so one costs a quarter; 7 of them are 7/4 dollars. "
    assert repetition(good) == 0.0
    assert repetition(good + "no " * 60) == pytest.approx(120 / 184, abs=0.01)


def test_tokens_drawn_at_random_are_nonsense_in_any_script():
    assert nonsense("lonelinessteacher cru butterflies streamlined", [-10.8] * 20) == 1.0
    assert nonsense("lonelinessteacher cru butterflies streamlined", [-6.0] * 20) == 0.5
    assert nonsense("a small model at temperature 1", [-3.0] * 20) == 0.0
    assert nonsense("too short to say", [-10.8] * 15) == 0.0


def test_the_answers_of_real_data_trip_nothing():
    parquet = pytest.importorskip("pyarrow.parquet")
    files = sorted(RAW.rglob("*.parquet"))
    if not files:
        pytest.skip("shared/data is not here")
    texts = [
        text
        for file in files
        for row in parquet.read_table(file).slice(0, 1500).to_pylist()
        for text in row.values()
    ]
    assert len(texts) > 5000
    assert [t for t in texts if nonsense(t) >= 0.2 or repetition(t) >= 0.2] == []


def test_a_page_takes_milliseconds():
    import time

    page = GOOD["Russian"] * 400
    started = time.perf_counter()
    nonsense(page), repetition(page), repetition("a b c d " * 4000)
    assert len(page) > 30_000
    assert time.perf_counter() - started < 2.0


def test_the_built_in_checks_take_fields_of_a_turn():
    sampled = SampledTurn("no " * 60)
    assert CHECKS["repetition"](text=sampled.text) == 1.0
