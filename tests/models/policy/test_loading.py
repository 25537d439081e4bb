"""Loading: what counts as a model, what is refused in words, and GGUF."""

from __future__ import annotations

import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from chatlearn.errors import TrainerError
from chatlearn.models.policy.loading import (
    eos_token_ids,
    load_policy,
    load_tokenizer,
)

LLAMA = LlamaConfig(
    vocab_size=8,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=12,
    bos_token_id=1,
    eos_token_id=2,
)


def words(template=None):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", chat_template=template
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(path)
    words("{{ messages }}").save_pretrained(path)
    return path


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_a_folder(folder, precision, dtype):
    model = load_policy(folder, device="cpu", precision=precision)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer("hello world")["input_ids"] == [3, 4]


def test_refusals_say_what_is_wrong(tmp_path, folder):
    with pytest.raises(TrainerError, match=r"load is .*/absent, but there is no such folder"):
        load_policy(tmp_path / "absent")
    with pytest.raises(TrainerError, match="no such folder"):
        load_policy("./model.gguf")
    with pytest.raises(TrainerError, match=r"has no config\.json"):
        load_policy(tmp_path)
    with pytest.raises(TrainerError, match="precision is 'fp64'"):
        load_policy(folder, precision="fp64")
    LLAMA.save_pretrained(tmp_path / "bare")
    with pytest.raises(TrainerError, match="no tokenizer"):
        load_tokenizer(tmp_path / "bare")
    shutil.copytree(folder, tmp_path / "half")
    (tmp_path / "half" / "config.json").unlink()
    with pytest.raises(TrainerError, match=r"weights but no config\.json"):
        load_policy(tmp_path / "half")


def test_models_whose_head_would_be_random_are_refused(tmp_path):
    LlamaModel(LLAMA).save_pretrained(tmp_path / "body")
    with pytest.raises(TrainerError, match=r"'lm_head\.weight' for one, and would be random"):
        load_policy(tmp_path / "body")
    bert = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(TrainerError, match="BertForMaskedLM, not a causal LM"):
        load_policy(tmp_path / "bert")


@pytest.mark.parametrize(
    ("configured", "expected"), [(5, {2, 5}), ([5, 6], {2, 5, 6}), (None, {2})]
)
def test_every_end_of_turn_token_is_known(folder, configured, expected):
    model = load_policy(folder)
    model.generation_config = GenerationConfig(eos_token_id=configured)
    assert eos_token_ids(model, words()) == frozenset(expected)


def test_gguf_becomes_dense_trainable_and_savable(tmp_path):
    """A hand-written GGUF of the tiny Llama, its MLP and embeddings known numbers."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")  # transformers asks for it to read GGUF
    torch.manual_seed(0)
    shapes = {
        "token_embd.weight": (8, 8),
        "output.weight": (8, 8),
        "output_norm.weight": (8,),
        "blk.0.attn_norm.weight": (8,),
        "blk.0.ffn_norm.weight": (8,),
        "blk.0.attn_q.weight": (8, 8),
        "blk.0.attn_k.weight": (4, 8),
        "blk.0.attn_v.weight": (4, 8),
        "blk.0.attn_output.weight": (8, 8),
        "blk.0.ffn_gate.weight": (12, 8),
        "blk.0.ffn_up.weight": (12, 8),
        "blk.0.ffn_down.weight": (8, 12),
    }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    file = tmp_path / "gguf" / "tiny.gguf"
    file.parent.mkdir()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(8)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = load_policy(file)
    own = dict(model.named_parameters())
    assert torch.equal(own["model.layers.0.mlp.up_proj.weight"], tensors["blk.0.ffn_up.weight"])
    assert torch.equal(own["lm_head.weight"], tensors["output.weight"])
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path / "dense")
    again = load_policy(tmp_path / "dense")
    assert all(torch.equal(own[name], p) for name, p in again.named_parameters())
    alone = dict(load_policy(file.parent).named_parameters())  # the only weights of a folder
    assert torch.equal(alone["lm_head.weight"], tensors["output.weight"])

    shutil.copy(file, file.parent / "other.gguf")
    with pytest.raises(TrainerError, match=r"several \.gguf files .*: name the file"):
        load_policy(file.parent)
