"""Tree-packed training: tokens that samples share are computed once, and nothing else changes."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)

from chatlearn.algorithm.packing import pack
from chatlearn.models.policy.trainer import PolicyTrainer, TrainerSettings
from chatlearn.types import Sample

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
}
QWEN3 = Qwen3Config(**SHAPE, tie_word_embeddings=True, initializer_range=0.3)
MODELS = {
    "Qwen3": QWEN3,
    "Llama, grouped": LlamaConfig(**SHAPE),
    "Mistral, a window of 5": MistralConfig(**SHAPE, sliding_window=5),
    "Gemma3, windows and full": Gemma3TextConfig(
        **SHAPE, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "Granite, scaled": GraniteConfig(**SHAPE, attention_multiplier=0.2),
    "OPT, learned positions": OPTConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        ffn_dim=24,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        dropout=0.0,
    ),
}
PLAIN = TrainerSettings(lr=1e-3, weight_decay=0.0)


def model(config=QWEN3, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def groups(seed, *, prompts=2, siblings=4, forks=2):
    """Siblings that share a prompt, each of them forked: the rows of a run share its history."""
    dice = random.Random(seed)

    def tokens(low, high):
        return [dice.randrange(3, 32) for _ in range(dice.randint(low, high))]

    made = []
    for g in range(prompts):
        prompt = tokens(3, 12)
        for s in range(siblings):
            history = [*prompt, *tokens(1, 4)]
            for fork in range(dice.randint(1, forks)):
                ids = [*history, *tokens(1, 6)]
                start = len(history) if fork else len(prompt)
                on = [i >= start for i in range(len(ids))]
                made.append(
                    Sample(
                        ids,
                        on,
                        [dice.gauss(-3.5, 0.3) if o else 0.0 for o in on],
                        [dice.gauss(0, 1) if o else 0.0 for o in on],
                        [dice.choice([0.7, 1.0]) for _ in ids],
                        weight=dice.choice([0.5, 1.0]),
                        trajectory=f"g{g}/{s}",
                    )
                )
    return made


def gradient(trainer, batches):
    caught = {}
    optimizer = trainer._optimizer
    optimizer.clip = lambda limit, norm: caught.update(
        (n, m.grad.clone()) for n, m in zip(optimizer.names, optimizer.masters, strict=True)
    )
    return caught, asyncio.run(trainer.step(batches))


def assert_same(got, expected):
    """To the rounding of sums whose terms are as large as the largest gradient."""
    tolerance = 1e-5 * max(1.0, *(value.abs().max().item() for value in expected.values()))
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, atol=tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_of_a_tree_are_those_of_its_rows(name):
    rows = groups(0)
    [tree], [flat] = pack(rows, 10**6, tree=True), pack(rows, 10**6)
    assert len(tree.token_ids) < 0.7 * len(flat.token_ids)
    got, metrics = gradient(PolicyTrainer(model(MODELS[name]), None, PLAIN), [tree])
    expected, plain = gradient(PolicyTrainer(model(MODELS[name]), None, PLAIN), [flat])
    assert_same(got, expected)
    assert metrics["policy/loss"] == pytest.approx(plain["policy/loss"], abs=1e-6)
    assert metrics["tokens/computed"] == tree.distinct_tokens
    assert metrics["tokens/computed_per_distinct"] == 1.0
    assert plain["tokens/computed_per_distinct"] > 1.5
    assert metrics["tokens/trained"] == plain["tokens/trained"]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_however_trees_are_cut_the_gradient_is_the_same(data):
    rows = groups(
        data.draw(st.integers(0, 10**6), label="seed"),
        prompts=data.draw(st.integers(1, 3), label="prompts"),
        siblings=data.draw(st.integers(1, 5), label="siblings"),
        forks=data.draw(st.integers(1, 4), label="forks"),
    )
    config = replace(
        PLAIN,
        loss=data.draw(st.sampled_from(["clip", "gspo"]), label="loss"),
        kl_coef=data.draw(st.sampled_from([0.0, 0.1]), label="kl"),
        entropy_coef=data.draw(st.sampled_from([0.0, 0.05]), label="entropy"),
        gradient_checkpointing=data.draw(st.booleans(), label="recomputed"),
    )
    limit = data.draw(st.integers(30, 200), label="max_tokens")

    def of(batches):
        return gradient(PolicyTrainer(model(), None, config, reference=model(seed=1)), batches)

    got, metrics = of(pack(rows, limit, tree=True))
    expected, plain = of(pack(rows, 10**6))
    assert_same(got, expected)
    for key in ("policy/loss", "policy/kl_rollout", "policy/logprob_gap_max"):
        assert metrics[key] == pytest.approx(plain[key], rel=1e-3, abs=1e-5), key


def test_logprobs_are_those_of_the_rows():
    rows = [*groups(3), *groups(3)]  # each asked for twice
    trainer = PolicyTrainer(model(), None, PLAIN)
    flat = PolicyTrainer(model(), None, replace(PLAIN, tree_packing=False))
    assert (trainer.packs_trees, flat.packs_trees) == (True, False)
    got, expected = (asyncio.run(t.logprobs(rows)) for t in (trainer, flat))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_model_that_counts_positions_itself_trains_on_rows(caplog):
    """Its body begins to count again where the positions jump: right in rows, wrong in branches."""
    own = model()

    def count_again(module, args, inputs):
        positions = inputs.get("position_ids")
        if positions is not None:
            jump = positions.diff(prepend=positions[:, :1] - 1) != 1
            starts = torch.where(jump, positions, 0).cummax(1).values
            inputs["position_ids"] = torch.where(positions >= starts, positions - starts, positions)
        return args, inputs

    own.get_decoder().register_forward_pre_hook(count_again, with_kwargs=True)
    with caplog.at_level(logging.WARNING):
        trainer = PolicyTrainer(own, None, PLAIN)
    assert not trainer.packs_trees
    [said] = [r.message for r in caplog.records if "tree_packing" in r.message]
    assert "Qwen3ForCausalLM" in said
    assert "off by" in said
