"""Packed attention is attention: the same outputs and gradients as one segment at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from chatlearn.errors import TrainerError
from chatlearn.models.policy.attention import (
    Segments,
    attending_packed,
    body_inputs,
    packed_attention,
    spans,
)
from chatlearn.models.policy.attention_kernels import FlashPlan, FlexPlan, find_planner
from chatlearn.models.policy.settings import TrainerSettings

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
}
CONFIGS = {
    "grouped queries": Qwen3Config(**SHAPE),
    "one key per query": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}),
    "sliding window": MistralConfig(**SHAPE, sliding_window=4),
}


def bounds(lengths):
    return [sum(lengths[:n]) for n in range(len(lengths) + 1)]


def test_segments_of_similar_length_share_a_bucket():
    """
    packed      a a a a | b | c c c c c | d            lengths 4 1 5 1
    bucket 0    c c c c c / a a a a -                  - repeats the start of its segment
    bucket 1    b / d
    """
    plan = Segments.of(bounds([4, 1, 5, 1]), "cpu")
    assert [(b.count, b.length) for b in plan.buckets] == [(2, 5), (2, 1)]
    assert plan.buckets[0].rows.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 0]
    assert plan.buckets[1].rows.tolist() == [4, 10]
    assert plan.inverse.tolist() == [5, 6, 7, 8, 10, 0, 1, 2, 3, 4, 11]


def test_equal_lengths_are_not_moved():
    plan = Segments.of(bounds([3, 3, 3]), "cpu")
    assert [b.rows for b in plan.buckets] == [slice(0, 9)]
    assert plan.inverse is None


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    window=st.sampled_from([None, 3]),
    grouped=st.booleans(),
)
def test_any_lengths_equal_one_segment_at_a_time(lengths, window, grouped):
    torch.manual_seed(0)
    total, heads, kv_heads, cu = sum(lengths), 4, 2 if grouped else 4, bounds(lengths)
    q = torch.randn(1, heads, total, 8, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, total, 8, requires_grad=True) for _ in range(2))
    seen = torch.zeros(total, total, dtype=torch.bool)
    for start, end in pairwise(cu):
        seen[start:end, start:end] = True
    seen = seen.tril() & seen.triu(-(window - 1) if window else -total)
    expected = scaled_dot_product_attention(q, k, v, seen, enable_gqa=grouped).transpose(1, 2)
    got, _ = packed_attention(
        torch.nn.Module(), q, k, v, None, segments=Segments.of(cu, "cpu"), sliding_window=window
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


TREES = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0, 1), st.booleans()), min_size=1, max_size=9
)


def grown(shapes):
    """Segments in the order in which trees are laid out: each a root, or a branch at some share of
    the path from the root to the end of the segment before it."""
    cu, parents, paths = [0], [], []
    for length, share, is_root in shapes:
        start = cu[-1]
        path = [] if is_root or not paths else paths[-1][: 1 + int(share * (len(paths[-1]) - 1))]
        parents.append(path[-1] if path else -1)
        paths.append([*path, *range(start, start + length)])
        cu.append(start + length)
    return cu, parents, paths


def seen_in(paths, total, window):
    """Which positions each sees, by walking every path. [T, T] bool"""
    seen = torch.zeros(total, total, dtype=torch.bool)
    for path in paths:
        for depth, q in enumerate(path):
            seen[q, path[max(0, depth + 1 - (window or depth + 1)) : depth + 1]] = True
    return seen


def test_a_branch_sees_the_path_to_it():
    """
    packed   a b c d | x y | p          x y goes on after b, p after x
    depth    0 1 2 3   2 3   3
    """
    found = spans([0, 4, 6, 7], [-1, 1, 4])
    assert [(s.start, s.length, s.path.tolist()) for s in found] == [
        (0, 4, []),
        (4, 2, [0, 1]),
        (6, 1, [0, 1, 4]),
    ]
    plan = FlexPlan.of([0, 4, 6, 7], "cpu", [-1, 1, 4])
    assert plan.ends.tolist() == [7, 7, 4, 4, 7, 6, 7]
    assert plan.depths.tolist() == [0, 1, 2, 3, 2, 3, 3]


@settings(max_examples=60, deadline=None)
@given(TREES, st.sampled_from([None, 3]), st.booleans())
def test_any_tree_equals_a_mask(shapes, window, grouped):
    torch.manual_seed(0)
    cu, parents, paths = grown(shapes)
    total, heads, kv_heads = cu[-1], 4, 2 if grouped else 4
    q = torch.randn(1, heads, total, 8, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, total, 8, requires_grad=True) for _ in range(2))
    seen = seen_in(paths, total, window)
    expected = scaled_dot_product_attention(q, k, v, seen, enable_gqa=grouped).transpose(1, 2)
    got = Segments.of(cu, "cpu", parents).attend(q, k, v, scaling=None, window=window)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.floats(0, 1), st.booleans()), min_size=1, max_size=6
    ),
    st.sampled_from([None, 50]),
)
@pytest.mark.filterwarnings("ignore")
def test_flex_blocks_of_any_tree_hold_every_pair_that_is_seen(shapes, window):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    cu, parents, paths = grown(shapes)
    plan = FlexPlan.of(cu, "cpu", parents)
    at, mask = torch.arange(cu[-1]), plan.mask(window)
    seen = seen_in(paths, cu[-1], window)
    assert torch.equal(mask.mask_mod(0, 0, at[:, None], at[None, :]), seen)
    needed = flex.create_block_mask(mask.mask_mod, None, None, cu[-1], cu[-1], device="cpu")
    assert not (needed.to_dense() > mask.to_dense()).any()
    for q, keys, count in zip(
        range(10**6), mask.full_kv_indices[0, 0], mask.full_kv_num_blocks[0, 0], strict=False
    ):
        for k in keys[:count].tolist():  # blocks that the kernel does not mask
            assert seen[128 * q : 128 * q + 128, 128 * k : 128 * k + 128].all()
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, cu[-1], 8), *torch.randn(2, 1, 2, cu[-1], 8)
    got = plan.attend(q, k, v, scaling=None, window=window)
    expected = Segments.of(cu, "cpu", parents).attend(q, k, v, scaling=None, window=window)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_model_equals_the_unpacked_model(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    body = model.get_decoder()
    lengths = [7, 1, 12, 6, 11]
    cu = bounds(lengths)
    ids = torch.randint(0, 40, (sum(lengths),))
    positions = torch.cat([torch.arange(n) for n in lengths])
    upstream = torch.randn(sum(lengths), 16)

    alone = torch.cat([body(part[None]).last_hidden_state[0] for part in ids.split(lengths)])
    expected = torch.autograd.grad(alone, list(body.parameters()), upstream)
    with attending_packed(model.config):
        inputs = body_inputs(positions, Segments.of(cu, "cpu"))
        packed = body(ids[None], **inputs).last_hidden_state[0]
    got = torch.autograd.grad(packed, list(body.parameters()), upstream)

    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_models_own_attention_comes_back():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()
    before = model.config._attn_implementation
    assert before == "sdpa"
    ids = torch.arange(6)[None]
    alone = model(ids).logits
    with attending_packed(model.config):
        # an engine that generates meanwhile passes no segments, and gets ordinary attention
        torch.testing.assert_close(model(ids).logits, alone)
    assert model.config._attn_implementation == before

    def fail():
        with attending_packed(model.config):
            raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="say"):
        fail()
    assert model.config._attn_implementation == before


def test_attention_that_is_more_than_a_softmax_is_refused():
    states = torch.randn(1, 2, 3, 8)
    with pytest.raises(TrainerError, match="softcap"):
        packed_attention(
            torch.nn.Module(),
            states,
            states,
            states,
            None,
            segments=Segments.of([0, 3], "cpu"),
            softcap=30.0,
        )


@pytest.mark.parametrize("lengths", [(7, 1, 12), (100, 200, 3), (127, 130), (128, 128, 5)])
@pytest.mark.parametrize("window", [None, 2, 140])
@pytest.mark.filterwarnings("ignore")
def test_flex_blocks_hold_every_pair_that_is_seen(lengths, window):
    """FlexAttention runs on a CPU too, forward only; its blocks are made from the bounds."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    torch.manual_seed(0)
    cu, total = bounds(lengths), sum(lengths)
    q, k, v = torch.randn(1, 4, total, 8), *torch.randn(2, 1, 2, total, 8)
    plan = FlexPlan.of(cu, "cpu")
    got = plan.attend(q, k, v, scaling=0.3, window=window)
    expected = Segments.of(cu, "cpu").attend(q, k, v, scaling=0.3, window=window)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    mask = plan.mask(window)
    whole = flex.create_block_mask(mask.mask_mod, None, None, total, total, device="cpu")
    assert not (whole.to_dense() > mask.to_dense()).any()
    if window is None:
        assert torch.equal(mask.to_dense(), whole.to_dense())


def test_flash_is_given_what_its_signature_asks():
    """A kernel of the same signature, computed by the buckets: shapes, bounds, window."""
    seen = {}

    def varlen(q, k, v, **options):
        seen.update(options)
        window = options["window_size"][0] + 1 or None
        states = (states.transpose(0, 1).unsqueeze(0) for states in (q, k, v))
        plan = Segments.of(options["cu_seqlens_q"].tolist(), "cpu")
        return plan.attend(*states, scaling=options["softmax_scale"], window=window)[0]

    cu = bounds([7, 1, 12])
    q, k, v = torch.randn(1, 4, 20, 8), *torch.randn(2, 1, 2, 20, 8)
    for window in (None, 4):
        got = FlashPlan.of(varlen, Segments.of, cu, "cpu").attend(
            q, k, v, scaling=None, window=window
        )
        expected = Segments.of(cu, "cpu").attend(q, k, v, scaling=None, window=window)
        torch.testing.assert_close(got, expected)
    assert seen["window_size"] == (3, 0)
    assert seen["max_seqlen_q"] == seen["max_seqlen_k"] == 12
    assert seen["cu_seqlens_k"].dtype == torch.int32
    assert seen["causal"] is True
    assert isinstance(FlashPlan.of(varlen, Segments.of, cu, "cpu", (-1, 0, 0)), Segments)


def test_a_kernel_that_is_not_there_is_refused_only_where_it_was_asked_for():
    cpu, config = torch.device("cpu"), LlamaConfig(**SHAPE)
    for word in ("auto", "sdpa"):
        assert find_planner(word, cpu, torch.float32, config) == Segments.of
    for word in ("flash", "flex"):
        with pytest.raises(TrainerError, match=rf"attention is '{word}', a kernel for CUDA"):
            find_planner(word, cpu, torch.float32, config)
    with pytest.raises(TrainerError, match=r"one of \['auto', 'flash', 'flex', 'sdpa'\]"):
        TrainerSettings(attention="xformers")
