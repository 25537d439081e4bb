"""Models in shards: read as from_pretrained reads them, saved, resumed by more or fewer ranks."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    LlamaConfig,
    LlamaModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from chatlearn.algorithm.packing import pack
from chatlearn.errors import CheckpointError, TrainerError
from chatlearn.models.policy.fsdp import FSDPTrainer
from chatlearn.models.policy.hf_export import HfWriter
from chatlearn.models.policy.loading import load_policy
from chatlearn.models.policy.offload import Offloadable
from chatlearn.models.policy.trainer import PolicyTrainer, TrainerSettings
from chatlearn.types import Sample

SHAPE = {
    "vocab_size": 33,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 25,
    "initializer_range": 0.3,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "deep": Qwen3Config(**SHAPE | {"num_hidden_layers": 3}, tie_word_embeddings=True),
    "rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE, max_position_embeddings=512),
    "experts": Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
    ),
}
SETTINGS = TrainerSettings(lr=1e-3, lr_schedule="cosine", total_steps=9, warmup_steps=1)


def model(name, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of models by name, each stored in its own way."""
    root = tmp_path_factory.mktemp("models")
    model("tied").save_pretrained(root / "tied")
    GenerationConfig(eos_token_id=[2, 5], temperature=0.6, do_sample=True).save_pretrained(
        root / "tied"
    )
    model("deep").save_pretrained(root / "deep")
    model("rope").save_pretrained(root / "rope files", max_shard_size="8KB")
    assert len(list((root / "rope files").glob("*.safetensors"))) > 2
    model("rope").to(torch.bfloat16).save_pretrained(root / "rope bf16")
    model("rope").save_pretrained(root / "rope bin")
    torch.save(model("rope").state_dict(), root / "rope bin" / "pytorch_model.bin")
    (root / "rope bin" / "model.safetensors").unlink()
    model("experts").save_pretrained(root / "experts")
    LlamaModel(CONFIGS["rope"]).save_pretrained(root / "body")
    bert = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertForMaskedLM(bert).save_pretrained(root / "bert")
    shutil.copytree(root / "tied", root / "cut off")
    whole = (root / "tied" / "model.safetensors").read_bytes()
    (root / "cut off" / "model.safetensors").write_bytes(whole[:-400])
    return {path.name: path for path in root.iterdir()} | {"absent": root / "absent"}


def batches(seed, ranks=1):
    """Five rows of different lengths."""
    made = []
    for i in range(5):
        n = 3 + 4 * i
        ids = [(7 * i + 3 * j + seed) % 33 for j in range(n)]
        on = [j > 1 for j in range(n)]
        made.append(Sample(ids, on, [-3.5 * o for o in on], [(i - 1.8) * o for o in on]))
    return pack(made, 40, ranks=ranks)


def ranked(folder, settings=SETTINGS, tokenizer=None):
    return FSDPTrainer(folder, tokenizer, settings, device="cpu")


def steps(trainer, seeds):
    rank, size = dist.get_rank(), dist.get_world_size()
    found = [asyncio.run(trainer.step(batches(seed, size)[rank::size])) for seed in seeds]
    for metrics in found:
        del metrics["memory/peak_gb"]
    return found


def weights(trainer):
    return {name: w.clone() for name, w in trainer.full_weights(torch.float32)}


# loading


def job_load(folder):
    trainer = ranked(folder)
    whole = weights(trainer)
    buffers = {name: b.clone() for name, b in trainer.model.named_buffers()}
    ends = trainer.model.generation_config.eos_token_id
    return whole, buffers, ends, trainer.model.config._attn_implementation


@pytest.mark.parametrize("name", ["tied", "rope files", "rope bf16", "rope bin", "experts"])
def test_shards_are_what_from_pretrained_reads(folders, rank_pools, name):
    """Parameters, and buffers that no file has: the scaled frequencies of rotary embeddings."""
    expected = load_policy(folders[name], precision="fp32")
    stored = dict(expected.named_parameters())
    for whole, buffers, ends, attention in rank_pools[2].run(job_load, folder=folders[name]):
        if name != "experts":  # those are published under the names of the files, see below
            assert whole.keys() == stored.keys()
            assert all(torch.equal(whole[n], p) for n, p in stored.items())
        assert buffers.keys() == dict(expected.named_buffers()).keys()
        assert "model.rotary_emb.inv_freq" in buffers
        assert all(torch.equal(buffers[n], b) for n, b in expected.named_buffers())
        assert ends == ([2, 5] if name == "tied" else 2)
        assert attention == "sdpa"


def job_read_bytes(folder):
    """How much of the files this rank reads: bytes of its slices, by the reader it is given."""
    from chatlearn.models.policy import sharded

    read = []
    opened = sharded.safe_open

    class Counting:
        def __init__(self, *args, **kwargs):
            self._file = opened(*args, **kwargs)

        def __enter__(self):
            self._held = self._file.__enter__()
            return self

        def __exit__(self, *exc_info):
            return self._file.__exit__(*exc_info)

        def keys(self):
            return self._held.keys()

        def get_slice(self, name):
            return Slice(self._held.get_slice(name))

    class Slice:
        def __init__(self, held):
            self.get_shape = held.get_shape
            self._held = held

        def __getitem__(self, rows):
            part = self._held[rows]
            read.append(part.nbytes)
            return part

    sharded.safe_open = Counting
    try:
        ranked(folder)
    finally:
        sharded.safe_open = opened
    return sum(read)


def test_each_rank_reads_its_own_rows_only(folders, rank_pools):
    total = sum(p.nbytes for p in load_policy(folders["rope files"]).parameters())
    read = rank_pools[2].run(job_read_bytes, folder=folders["rope files"])
    assert sum(read) == total
    assert max(read) < 0.6 * total


def job_refused(folder):
    ranked(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", "there is no such folder"),
        ("body", r"'lm_head\.weight' for one, and would be random"),
        ("bert", "BertForMaskedLM, not a causal LM"),
        ("cut off", "cannot be read"),
    ],
)
def test_what_load_policy_refuses_every_rank_refuses(folders, rank_pools, name, words):
    for error in rank_pools[2].fail(job_refused, folder=folders[name]):
        assert isinstance(error, TrainerError)
        with pytest.raises(TrainerError, match=words):
            raise error


# checkpoints


def job_save(folder, to, more, settings=SETTINGS):
    """Two steps, a checkpoint, ``more`` steps: metrics, weights and a random number."""
    trainer = ranked(folder, settings)
    steps(trainer, [0, 1])
    torch.manual_seed(50 + dist.get_rank())
    asyncio.run(trainer.save(to))
    noise = torch.rand(2)
    return steps(trainer, more), weights(trainer), noise


def job_resume(folder, to, more, settings=SETTINGS):
    trainer = ranked(folder, settings)
    steps(trainer, [7])  # its moments and its step count must not survive
    asyncio.run(trainer.logprobs([Sample([1, 2], [False, True], [0, 0], [0, 0])]))
    asyncio.run(trainer.restore(to))
    noise = torch.rand(2)
    return steps(trainer, more), weights(trainer), noise


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_as_many_ranks_resume_to_the_same_bits(folders, rank_pools, tmp_path, precision):
    run = {
        "folder": folders["tied"],
        "to": tmp_path,
        "more": [2, 3],
        "settings": replace(SETTINGS, precision=precision),
    }
    saved, resumed = (rank_pools[2].run(job, **run) for job in (job_save, job_resume))
    for (metrics, whole, noise), (again, whole_again, noise_again) in zip(
        saved, resumed, strict=True
    ):
        assert metrics == again
        assert all(torch.equal(w, whole_again[n]) for n, w in whole.items())
        assert torch.equal(noise, noise_again)


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_resumes(folders, rank_pools, tmp_path, writers, readers):
    run = {"folder": folders["tied"], "to": tmp_path, "more": [2, 3]}
    metrics, whole, _ = rank_pools[writers].run(job_save, **run)[0]
    for again, got, _ in rank_pools[readers].run(job_resume, **run):
        for name, tensor in whole.items():
            torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=1e-5)
        for ours, theirs in zip(again, metrics, strict=True):
            assert ours["policy/lr"] == theirs["policy/lr"]
            assert ours["policy/loss"] == pytest.approx(theirs["policy/loss"], abs=1e-5)


def job_restore(folder, to):
    """Restoring must fail and leave the trainer as it was."""
    trainer = ranked(folder)
    before = weights(trainer)
    with pytest.raises(CheckpointError) as caught:
        asyncio.run(trainer.restore(to))
    assert all(torch.equal(w, before[n]) for n, w in weights(trainer).items())
    steps(trainer, [0])
    return str(caught.value)


def test_checkpoints_that_do_not_fit_are_refused_by_all(folders, rank_pools, tmp_path):
    rank_pools[2].run(job_save, folder=folders["tied"], to=tmp_path / "good", more=[])
    alone = PolicyTrainer(load_policy(folders["tied"]), None, SETTINGS)
    asyncio.run(alone.save(tmp_path / "alone"))

    def refusal(checkpoint, name="tied"):
        words = rank_pools[2].run(job_restore, folder=folders[name], to=tmp_path / checkpoint)
        assert words[0] == words[1]
        return words[0]

    def damaged(file, change):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        change(tmp_path / "bad" / "state" / file)
        return refusal("bad")

    words = refusal("alone")
    assert "runtime_args.cluster=local" in words
    assert "runtime_args.cluster=ray" in words
    with pytest.raises(CheckpointError, match=r"cluster=ray.*cluster=local"):
        asyncio.run(alone.restore(tmp_path / "good"))
    assert "of another model" in refusal("good", "deep")
    assert "layers.2" in refusal("good", "deep")
    assert ".metadata is missing" in damaged(".metadata", lambda file: file.unlink())
    assert "trainer.json is missing" in damaged("trainer.json", lambda file: file.unlink())
    assert "cannot be read" in damaged("trainer.json", lambda file: file.write_text("{}"))
    assert "cannot be read" in damaged(".metadata", lambda file: file.write_bytes(b"cut off"))
    assert "cannot be read" in damaged("__1_0.distcp", lambda file: file.unlink())
    assert "cannot be read" in damaged("__1_0.distcp", lambda file: file.write_bytes(b"cut off"))
    assert "cannot be read" in damaged("rng_00001.safetensors", lambda file: file.unlink())


def job_cannot_write(folder, to):
    ranked(folder)
    asyncio.run(ranked(folder).save(to))


def test_a_disk_that_refuses_fails_every_rank(folders, rank_pools, tmp_path):
    (tmp_path / "hf").write_text("a file where the folder should be")
    for error in rank_pools[2].fail(job_cannot_write, folder=folders["tied"], to=tmp_path):
        assert isinstance(error, CheckpointError)
        assert "Cannot write the model" in str(error)
    (tmp_path / "hf").unlink()
    (tmp_path / "state").write_text("the same")
    for error in rank_pools[2].fail(job_cannot_write, folder=folders["tied"], to=tmp_path):
        assert isinstance(error, CheckpointError)
        assert "Cannot write the trainer's state" in str(error)


# export


def job_export(folder, to, precision, tokenizer):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    trainer = ranked(folder, replace(SETTINGS, precision=precision), loaded)
    steps(trainer, [0])
    asyncio.run(trainer.save(to))
    return {name: w.clone() for name, w in trainer.full_weights()}


@pytest.mark.parametrize(
    ("name", "precision"), [("tied", "fp32"), ("rope files", "bf16"), ("experts", "fp32")]
)
def test_an_export_loads(folders, rank_pools, tmp_path, tiny_policy, name, precision):
    published = rank_pools[2].run(
        job_export, folder=folders[name], to=tmp_path, precision=precision, tokenizer=tiny_policy
    )[0]
    folder = tmp_path / "hf"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[precision]
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == getattr(torch, config["dtype"])
    assert config["architectures"] == [type(loaded).__name__]
    own = load_policy(folders[name])
    moved = [
        not torch.equal(p.float(), q)
        for p, q in zip(loaded.parameters(), own.parameters(), strict=True)
    ]
    assert sum(moved) > 0.7 * len(moved)  # in bf16 a norm of 1.0 stays, see the masters
    if name == "experts":
        assert "model.layers.0.mlp.experts.3.up_proj.weight" in published  # as SGLang reads it
    else:
        assert published.keys() == dict(loaded.named_parameters()).keys()
        assert all(torch.equal(p, published[n]) for n, p in loaded.named_parameters())
    if name == "tied":
        assert loaded.generation_config.eos_token_id == [2, 5]
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_an_export_is_written_in_files_of_bounded_size(tmp_path):
    whole = model("rope")
    writer = HfWriter(tmp_path, shard_bytes=4000)
    for name, parameter in whole.named_parameters():
        writer.add(name, parameter)
        assert sum(t.nbytes for t in writer._held.values()) <= max(4000, parameter.nbytes)
    writer.close(whole, torch.float32, None)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert not list(tmp_path.glob("*.part"))
    assert all(file.stat().st_size < 6000 for file in files)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for p, q in zip(loaded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)


def test_offloaded_tensors_keep_their_place():
    """Two views of one storage, and an empty tensor, as shards may be."""
    base = torch.arange(10.0)
    views = [base[:4], base[4:], torch.empty(0)]
    parts = Offloadable(lambda: views)
    assert parts.offload() == 40
    assert parts.is_offloaded
    assert base.untyped_storage().nbytes() == 0
    assert parts.offload() == 0
    assert parts.onload() == 40
    assert parts.onload() == 0
    assert torch.equal(views[1], torch.arange(4.0, 10.0))
    views[0][0] = 7.0
    assert base[0] == 7.0
