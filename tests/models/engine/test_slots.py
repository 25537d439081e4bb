"""How requests that decode read the key/value memory: neighbours together, distant ones apart."""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from chatlearn.models.engine.slots import Segment, SlotModel

VOCAB, LENGTH = 96, 120


def tiny():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
    ).eval()


def prompt(slot):
    return torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(slot)).tolist()


def decoding(slots):
    return [Segment(slot, LENGTH, [7], True) for slot in slots]


def test_slots_far_apart_are_read_in_calls_of_their_own():
    """Used: 0 1 . 3 . . . 20 21. Reading slot 2 too costs less than a call; 4 to 19 cost more."""
    memory = SlotModel(tiny(), max_context=256)
    slots = [0, 1, 3, 20, 21]
    rows = memory._rows(decoding(slots), torch.full((5,), LENGTH))
    assert [(r.first, r.count, r.slot, r.width) for r in rows] == [(0, 3, 0, 4), (3, 2, 20, 2)]
    assert rows[0].places.tolist() == [0, 1, 3]
    assert rows[1].places is None


def test_logits_are_those_of_the_model_wherever_the_slots_are():
    model = tiny()
    memory = SlotModel(model, max_context=256)
    slots = [0, 1, 3, 20, 21]
    memory.forward([Segment(slot, 0, prompt(slot), False) for slot in slots])
    done, logits = memory.forward(decoding(slots))
    assert [segment.slot for segment in done] == slots
    with torch.no_grad():
        wanted = model(torch.tensor([[*prompt(slot), 7] for slot in slots])).logits[:, -1]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-6)
