"""Which turn a prompt continues, and which seed a call gets."""

from __future__ import annotations

from langchain_core.messages import AIMessage, HumanMessage

from chatlearn.models.agent.recorder import Recorder
from chatlearn.types import Completion, Session, StopReason, Turn

HI, MORE = HumanMessage("hi"), HumanMessage("more")


def recorded(*answers: AIMessage) -> Recorder:
    """A recorder that was asked ``[HI]`` once for each of ``answers``."""
    recorder = Recorder()
    for answer in answers:
        turn = Turn(len(recorder.turns), None, [1], Completion([2], [0.0], StopReason.STOP, (0, 0)))
        recorder.record(turn, [HI], answer)
        recorder.remember(recorder.chain([HI, answer], b"")[-1], answer, turn)
    return recorder


def parent(recorder: Recorder, *messages) -> int | None:
    turn, covered = recorder.parent(messages, recorder.chain(messages, b""))
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
    assert recorder.parent(messages, recorder.chain(messages, b"tools")) == (None, 0)


def test_a_seed_is_of_the_run_of_what_is_asked_and_of_how_often():
    def seeds(base=1, group="g", run="0.0", prompts=((1, 2), (1, 2), (3,))):
        recorder = Recorder()
        return [recorder.seed(base, Session(group, run), prompt) for prompt in prompts]

    assert seeds() == seeds()
    assert len(set(seeds())) == 3
    others = [seeds(base=2), seeds(group="h"), seeds(run="1.0"), seeds(run="0.1")]
    assert all(set(seeds()).isdisjoint(other) for other in others)
    assert set(seeds(prompts=((3,), (1, 2), (1, 2)))) == set(seeds())  # in any order
