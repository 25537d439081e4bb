from __future__ import annotations

import pytest

from chatlearn.errors import EngineError
from chatlearn.models.engine.scripted import ScriptedEngine
from chatlearn.types import Completion, SamplingParams, Session, StopReason

WHO = Session("g", "0")


class Letters:
    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return [ord(c) for c in text]


async def test_answers_come_in_order_until_the_script_is_exhausted():
    own = Completion([5], [-0.5], StopReason.ABORT, (3, 4))
    engine = ScriptedEngine([[1, 2], "ab", own], tokenizer=Letters())
    params = SamplingParams(max_new_tokens=2)
    first = await engine.generate([9], params, session=WHO)
    assert first == Completion([1, 2], [-1.0, -1.0], StopReason.STOP, (0, 0))
    assert (await engine.generate((9, 8), params, session=WHO)).token_ids == [97, 98]
    assert await engine.generate([7], params, session=WHO) is own
    with pytest.raises(EngineError, match="3 answers; g/0"):
        await engine.generate([7], params, session=WHO)
    assert [r.prompt_ids for r in engine.requests] == [[9], [9, 8], [7], [7]]
    assert engine.requests[0].sampling is params
    assert engine.requests[0].session is WHO


async def test_a_function_sees_the_request():
    engine = ScriptedEngine(lambda ids, params, session: [*ids, params.seed, len(session.run)])
    done = await engine.generate([4, 5], SamplingParams(seed=6), session=WHO)
    assert done.token_ids == [4, 5, 6, 1]
    cut = await engine.generate([4, 5], SamplingParams(max_new_tokens=3), session=WHO)
    assert (cut.token_ids, cut.stop_reason) == ([4, 5, 0], StopReason.LENGTH)


async def test_publish_is_recorded_and_stamps_later_completions():
    engine = ScriptedEngine([[1]])
    taken = []
    await engine.publish((taken.append(n) or (n, None) for n in "ab"), version=2)
    assert (engine.published, taken) == ([2], ["a", "b"])
    assert (await engine.generate([1], SamplingParams(), session=WHO)).versions == (2, 2)
    await engine.sleep()
    await engine.wake()
    await engine.abort(WHO)
    assert engine.aborted == [WHO]


async def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(EngineError, match="tokenizer"):
        await ScriptedEngine(["hi"]).generate([1], SamplingParams(), session=WHO)
