"""Which turn a prompt continues, and which seed a call gets."""

from __future__ import annotations

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

from chatlearn.models.agent.recorder import Recorder
from chatlearn.types import Completion, Fork, Session, StopReason, Turn

HI, MORE = HumanMessage("hi"), HumanMessage("more")


def recorded(*answers: AIMessage) -> Recorder:
    """A recorder that was asked ``[HI]`` once for each of ``answers``."""
    recorder = Recorder()
    for answer in answers:
        turn = Turn(len(recorder.turns), None, [1], Completion([2], [0.0], StopReason.STOP, (0, 0)))
        recorder.record(turn, recorder.hear([HI]), answer, None)
    return recorder


def parent(recorder: Recorder, *messages) -> int | None:
    turn, covered = recorder.parent(recorder.hear(messages))
    assert covered == (0 if turn is None else 2)
    return None if turn is None else turn.id


def test_a_conversation_that_goes_on_continues_its_turn():
    recorder = recorded(AIMessage("ho", id="a"))
    assert parent(recorder, HI, AIMessage("ho", id="a"), MORE) == 0
    assert parent(recorder, HI, AIMessage("ho"), MORE) == 0  # rebuilt by a checkpointer, say


def test_an_answer_that_was_edited_is_another_conversation():
    recorder = recorded(AIMessage("ho", id="a"))
    assert parent(recorder, HI, AIMessage("hum", id="a"), MORE) is None
    assert parent(recorder, HumanMessage("hey"), AIMessage("ho", id="a"), MORE) is None


def test_between_answers_that_say_the_same_the_id_decides():
    recorder = recorded(AIMessage("ho", id="a"), AIMessage("ho", id="b"))
    assert parent(recorder, HI, AIMessage("ho", id="a"), MORE) == 0
    assert parent(recorder, HI, AIMessage("ho", id="b"), MORE) == 1


def test_other_tools_are_another_conversation():
    recorder = recorded(AIMessage("ho", id="a"))
    messages = [HI, AIMessage("ho", id="a"), MORE]
    assert recorder.parent(recorder.hear(messages, b"tools")) == (None, 0)


def test_a_seed_is_of_the_run_of_what_is_asked_and_of_how_often():
    def seeds(base=1, group="g", run="0.0", prompts=((1, 2), (1, 2), (3,))):
        recorder = Recorder()
        return [recorder.seed(base, Session(group, run), prompt) for prompt in prompts]

    assert seeds() == seeds()
    assert len(set(seeds())) == 3
    others = [seeds(base=2), seeds(group="h"), seeds(run="1.0"), seeds(run="0.1")]
    assert all(set(seeds()).isdisjoint(other) for other in others)
    assert set(seeds(prompts=((3,), (1, 2), (1, 2)))) == set(seeds())  # in any order


SYSTEM, ONE, TWO = SystemMessage("be brief"), HumanMessage("one"), HumanMessage("two")
A, B = AIMessage("a", id="A"), AIMessage("b", id="B")


def asked(*histories) -> list[Fork | None]:
    """Fork of each history asked in turn; a history ends with its answer. A prompt is as long as
    its messages, so that two prompts are equal when these are."""
    recorder = Recorder()
    numbers: dict[str, int] = {}
    for *messages, answer in histories:
        tools = b"tools" if messages[0] is TOOLS_SHOWN else b""
        heard = recorder.hear([m for m in messages if m is not TOOLS_SHOWN], tools)
        ids = [numbers.setdefault(f"{m.type}:{m.content}", len(numbers)) for m in messages]
        parent, _ = recorder.parent(heard)
        turn = Turn(
            len(recorder.turns),
            None if parent is None else parent.id,
            ids,
            Completion([99], [0.0], StopReason.STOP, (0, 0)),
        )
        recorder.record(turn, heard, answer, None)
    return [turn.fork for turn in recorder.turns]


TOOLS_SHOWN = HumanMessage("(stands for other tools)")


@pytest.mark.parametrize(
    ("then", "fork"),
    [
        ([SYSTEM, ONE, A, TWO], None),
        ([SYSTEM, ONE], Fork.REPEAT),
        ([SYSTEM, TWO], Fork.FRESH),
        ([SystemMessage("you judge"), TWO], Fork.FRESH),
        ([SYSTEM, ONE, TWO], Fork.BRANCH),
        ([SYSTEM], Fork.BRANCH),
        ([TOOLS_SHOWN, SYSTEM, ONE], Fork.TOOLS),
        ([ONE, A, TWO], Fork.TRIMMED),
        ([SYSTEM, ONE, AIMessage("a!", id="A"), TWO], Fork.EDITED),
        ([SYSTEM, TWO, ONE, A], Fork.EDITED),
    ],
)
def test_why_a_second_call_forks(then, fork):
    assert asked([SYSTEM, ONE, A], [*then, B]) == [None, fork]


@pytest.mark.parametrize(
    ("then", "fork"),
    [
        ([SYSTEM, ONE, A, TWO, B, HumanMessage("three")], None),
        ([SYSTEM, ONE, A, HumanMessage("other")], Fork.BRANCH),  # turn 0 was continued already
        ([SYSTEM, A, TWO, B], Fork.TRIMMED),
        ([SYSTEM, TWO, B], Fork.TRIMMED),
        ([SYSTEM, TWO, B, ONE], Fork.REORDERED),
        ([SYSTEM, HumanMessage("summary"), TWO], Fork.COMPACTED),
        ([SYSTEM, HumanMessage("first"), ONE, A, TWO], Fork.EDITED),
    ],
)
def test_why_a_third_call_forks(then, fork):
    first, second = [SYSTEM, ONE, A], [SYSTEM, ONE, A, TWO, B]
    assert asked(first, second, [*then, AIMessage("c")])[2] == fork


def test_a_prompt_that_begins_with_a_turn_s_tokens_continues_it_whatever_its_messages_were():
    recorder = recorded(AIMessage("ho", id="a"), AIMessage("hum", id="b"))
    recorder.turns[1].prompt_ids = [1, 2, 5]
    assert recorder.begins([1, 2, 3]).id == 0
    assert recorder.begins([1, 2, 5, 2, 9]).id == 1  # the longest
    assert recorder.begins([1, 3, 3]) is None
    assert recorder.begins([1, 2]) is None  # nothing new after it


def test_a_message_changed_in_place_is_another_message():
    recorder, said = Recorder(), HumanMessage("hi")
    before = recorder.hear([said]).prints
    said.content = "bye"
    assert recorder.hear([said]).prints != before
