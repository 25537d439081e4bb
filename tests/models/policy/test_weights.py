"""How weights leave a trainer, without an engine: buckets, handles, groups, files, checksums."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from chatlearn.errors import EngineError, EngineLost
from chatlearn.models.policy.weight_buckets import Sent, buckets, plain_memory
from chatlearn.models.policy.weight_checksums import (
    expected_checksums,
    require_equal,
    require_expected,
)
from chatlearn.models.policy.weights import (
    CollectiveSender,
    send_disk,
    send_tensors,
)

FLOAT = {"bucket_bytes": 100, "dtype": torch.float32}


def rows(*sizes):
    return [(f"w{i}", torch.arange(n, dtype=torch.float32) + 100 * i) for i, n in enumerate(sizes)]


class Refusing:
    """A receiver that takes some buckets and then fails."""

    url = "http://engine"

    def __init__(self, error=None, takes=10**9):
        self.error, self.takes = error, takes
        self.taken = 0
        self.payloads = []

    async def update_from_tensors(self, payloads):
        self.payloads.append(payloads)
        self.count()

    async def update_from_disk(self, path, *, version):
        self.count()

    def count(self):
        if self.taken == self.takes:
            raise self.error
        self.taken += 1


# ---------------------------------------------------------------------- buckets


def test_buckets_are_cut_between_tensors():
    """100 bytes are 25 floats: 10 + 10 | 10 | 40 | 5 + 20."""
    cut = [(b.names, b.used) for b in buckets(rows(10, 10, 10, 40, 5, 20), **FLOAT)]
    assert cut == [(["w0", "w1"], 80), (["w2"], 40), (["w3"], 160), (["w4", "w5"], 100)]


def test_a_bucket_has_one_dtype_and_counters_keep_theirs():
    named = [("a", torch.ones(3)), ("steps", torch.tensor([7])), ("b", torch.ones(2))]
    cut = list(buckets(named, bucket_bytes=100, dtype=torch.bfloat16))
    assert [(b.dtypes, b.used) for b in cut] == [
        (["bfloat16"], 6),
        (["int64"], 8),
        (["bfloat16"], 4),
    ]


@given(
    st.lists(st.lists(st.integers(1, 4), max_size=3), max_size=12),
    st.integers(1, 200),
)
@settings(deadline=None, max_examples=60)
def test_nothing_is_lost_or_changed_by_buckets(shapes, bucket_bytes):
    named = [(f"w{i}", torch.randn(shape)) for i, shape in enumerate(shapes)]
    back = {}
    for bucket in buckets(named, bucket_bytes=bucket_bytes, dtype=torch.float32):
        assert bucket.used <= bucket_bytes or len(bucket.names) == 1
        back.update(bucket.tensors())
    assert list(back) == [name for name, _ in named]
    assert all(torch.equal(back[name], tensor) for name, tensor in named)


async def test_never_more_than_one_bucket_in_memory():
    alive = weakref.WeakSet()
    most = 0

    def allocate(size, device):
        nonlocal most
        flat = plain_memory(size, device)
        alive.add(flat.untyped_storage())
        most = max(most, len(alive))
        return flat

    for bucket in buckets(rows(*[20] * 30), **FLOAT, allocate=allocate):
        del bucket
    assert most == 1


def test_parts_of_ranks_are_merged():
    assert Sent.merged([Sent(5, 1.0, 2), Sent(0, 3.0)]) == Sent(5, 3.0, 2)


# ---------------------------------------------------------------------- shared memory

READER = """
import base64, pickle, sys
bucket = pickle.loads(base64.b64decode(sys.stdin.read()))
for meta in bucket["metadata"]:
    part = bucket["flattened_tensor"][meta.start_idx:meta.end_idx]
    print(meta.name, part.view(meta.dtype).reshape(meta.shape).sum().item(), tuple(meta.shape))
"""


def test_a_handle_opens_in_a_process_that_is_no_relative():
    """It imports what the handle names: torch, and nothing of this package or of SGLang."""
    from chatlearn.models.policy.weights_sharing import shared_memory

    named = [("a", torch.ones(2, 3)), ("b", torch.full((5,), 2.0))]
    for bucket in buckets(named, **FLOAT, allocate=shared_memory):
        handle = bucket.payload()
        assert len(handle) < 2000
        read = subprocess.run(
            [sys.executable, "-c", READER], input=handle, capture_output=True, text=True, check=True
        )
        assert read.stdout.splitlines() == ["a 6.0 (2, 3)", "b 10.0 (5,)"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
def test_the_daemon_of_shared_memory_holds_no_pipe_of_ours():
    code = """
import os, sys, torch
from chatlearn.models.policy.weights_sharing import shared_memory
kept = shared_memory(100, torch.device("cpu"))
ours = {os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2)}
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if "torch_shm" not in open(f"/proc/{pid}/cmdline").read():
            continue
        parent = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1]
        held = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    except OSError:
        continue
    print("daemon", bool(held & ours))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "daemon False" in done.stdout
    assert "daemon True" not in done.stdout


async def test_every_rank_of_every_engine_gets_its_own_handle():
    engines = [Refusing(), Refusing()]
    sent = await send_tensors(rows(10, 20), engines, copies=2, **FLOAT)
    handles = [h for e in engines for payloads in e.payloads for h in payloads]
    assert sent.num_buckets == 2
    assert sent.num_bytes == 120
    assert [len(p) for p in engines[0].payloads] == [2, 2]
    assert len(handles) == 8


async def test_ranks_gather_even_when_they_do_not_send():
    gathered = []
    engine = Refusing()

    def gather(payload):
        gathered.append(payload)
        return ["other", payload]

    await send_tensors(rows(10, 20), [engine], gather=gather, **FLOAT)
    sent = await send_tensors(rows(10, 20), [], gather=gather, **FLOAT)
    assert (len(gathered), sent.num_bytes) == (4, 0)
    assert engine.payloads == [["other", gathered[0]], ["other", gathered[1]]]


@pytest.mark.parametrize("way", ["tensors", "collective", "disk"])
async def test_a_rank_without_a_receiver_goes_to_the_end(way, tmp_path):
    asked = []

    def named():
        for name, tensor in rows(1, 2, 3):
            asked.append(name)
            yield name, tensor

    if way == "tensors":
        sent = await send_tensors(named(), [], **FLOAT)
    elif way == "collective":
        sent = await CollectiveSender(host="127.0.0.1", backend="gloo").send(named(), [], **FLOAT)
    else:
        sent = await send_disk(named(), [], folder=tmp_path / "w", version=1, **FLOAT)
    assert asked == ["w0", "w1", "w2"]
    assert sent.num_bytes == 0


@pytest.mark.parametrize("kind", [EngineError, EngineLost])
async def test_a_refusal_in_the_middle_names_engine_and_bucket(kind):
    engine = Refusing(kind("no"), takes=1)
    with pytest.raises(kind, match=r"http://engine did not take the bucket of w1 to w2, .*: no"):
        await send_tensors(rows(20, 10, 10, 20), [engine], **FLOAT)


# ---------------------------------------------------------------------- a group of processes

PEER = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

port, name, rank, size, count, takes = sys.argv[1:]
rank, size, count = int(rank), int(size), int(count)
store = dist.TCPStore("127.0.0.1", int(port), size, False)
group, _ = c10d._new_process_group_helper(
    size, rank, [], dist.Backend("gloo"), dist.PrefixStore(name, store), group_name=name,
    timeout=timedelta(seconds=60),
)
c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
print("in", flush=True)
for line in sys.stdin:
    data = torch.empty(int(line), dtype=torch.uint8)
    dist.broadcast(data, src=0, group=group)
    print(data.view(torch.float32).sum().item(), flush=True)
"""


class Peer:
    """An engine whose one rank is a process; made the way SGLang makes its side."""

    url = "http://peer"

    def __init__(self):
        self.known_version = None
        self.heard, self.left, self.joins = [], [], 0
        self.refuses = False
        self.process = None

    async def version(self):
        return self.known_version

    async def join_group(self, *, master_port, rank_offset, world_size, group_name, **_):
        await self.end()
        self.joins += 1
        words = [master_port, group_name, rank_offset, world_size, 0, 0]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            PEER,
            *map(str, words),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert await self.process.stdout.readline() == b"in\n"

    async def update_from_group(self, names, dtypes, shapes, group_name):
        if self.refuses:
            raise EngineError("must run between begin and end")
        size = sum(torch.Size(shape).numel() for shape in shapes) * 4
        self.process.stdin.write(f"{size}\n".encode())
        line = await self.process.stdout.readline()
        if not line:
            raise EngineLost("the peer is gone")
        self.heard.append(float(line))

    async def leave_group(self, group_name):
        self.left.append(group_name)

    async def end(self):
        if self.process is not None:
            if self.process.returncode is None:
                self.process.kill()
            await self.process.communicate()
            self.process = None


@pytest.fixture
async def peers():
    made = [Peer(), Peer()]
    yield made
    for peer in made:
        await peer.end()


async def test_one_broadcast_reaches_all_and_the_group_is_kept(peers):
    sender = CollectiveSender(host="127.0.0.1", backend="gloo", timeout_s=30)
    named = rows(10, 20, 5)
    sums = [named[0][1].sum().item(), (named[1][1].sum() + named[2][1].sum()).item()]
    for peer in peers:
        peer.known_version = 1
    for _ in range(2):
        sent = await sender.send(named, peers, **FLOAT)
        assert sent.num_buckets == 2
    assert [peer.heard for peer in peers] == [sums * 2, sums * 2]
    assert [peer.joins for peer in peers] == [1, 1]
    peers[1].known_version = None  # it was started again
    await sender.send(named, peers, **FLOAT)
    assert [peer.joins for peer in peers] == [2, 2]
    await sender.send(named, peers[:1], **FLOAT)
    assert peers[0].heard == sums * 4
    await sender.close()


async def test_a_refused_broadcast_is_named_at_once(peers):
    sender = CollectiveSender(host="127.0.0.1", backend="gloo", timeout_s=40)
    peers[1].refuses = True
    started = asyncio.get_running_loop().time()
    with pytest.raises(EngineError, match=r"did not take the bucket of w0 to w0.*between begin"):
        await sender.send(rows(10_000_000), peers, **FLOAT)
    assert asyncio.get_running_loop().time() - started < 15
    peers[1].refuses = False
    await sender.send(rows(10), peers, **FLOAT)
    await sender.close()


async def test_a_peer_that_dies_in_a_broadcast_is_lost(peers):
    sender = CollectiveSender(host="127.0.0.1", backend="gloo", timeout_s=20)
    for peer in peers:
        peer.known_version = 1
    await sender.send(rows(10), peers, **FLOAT)
    peers[1].process.kill()
    with pytest.raises(EngineLost, match=r"http://peer did not take the bucket"):
        await sender.send(rows(10_000_000), peers, **FLOAT)
    await sender.close()


# ---------------------------------------------------------------------- files


async def test_what_is_written_loads_with_from_pretrained(tiny_policy, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    engine, folder = Refusing(), tmp_path / "weights"
    for _ in range(2):  # replaced as a whole
        sent = await send_disk(
            model.state_dict().items(),
            [engine],
            folder=folder,
            version=1,
            config_from=Path(tiny_policy),
            bucket_bytes=50_000,
            dtype=torch.float32,
        )
    assert len(list(folder.glob("*.safetensors"))) == sent.num_buckets > 2
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]
    back = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


# ---------------------------------------------------------------------- checksums


def sha(*tensors):
    data = b"".join(t.numpy().tobytes() for t in tensors)
    return hashlib.sha256(data).hexdigest()[:16]


def test_checksums_fuse_and_pad_as_the_engine_does():
    q, k, v = torch.randn(4, 2), torch.randn(2, 2), torch.randn(2, 2)
    gate, up, embed, norm = torch.randn(3, 2), torch.randn(3, 2), torch.randn(70, 2), torch.ones(2)
    layer = "model.layers.0."
    named = [
        ("model.embed_tokens.weight", embed),
        (f"{layer}self_attn.k_proj.weight", k),
        (f"{layer}self_attn.q_proj.weight", q),
        (f"{layer}self_attn.v_proj.weight", v),
        (f"{layer}mlp.gate_proj.weight", gate),
        (f"{layer}mlp.up_proj.weight", up),
        ("model.norm.weight", norm),
    ]
    assert expected_checksums(named, dtype=torch.float32) == {
        "model.embed_tokens.weight": sha(embed, torch.zeros(58, 2)),
        f"{layer}self_attn.qkv_proj.weight": sha(q, k, v),
        f"{layer}mlp.gate_up_proj.weight": sha(gate, up),
        "model.norm.weight": sha(norm),
    }


def test_differences_are_named():
    found = {"a": "1", "b": "2", "cache": "9"}
    require_expected({"a": "1", "b": "2", "only here": "3"}, found, url="u")
    with pytest.raises(EngineError, match=r"u does not .* 1 of 2 parameters differ, b"):
        require_expected({"a": "1", "b": "3"}, found, url="u")
    with pytest.raises(EngineError, match="nothing can be compared"):
        require_expected({"x": "1"}, found, url="u")
    require_equal({"u": found, "v": dict(found)})
    with pytest.raises(EngineError, match=r"u and v .* 1 of 3 parameters, a"):
        require_equal({"u": found, "v": {**found, "a": "0"}})
