"""Laws 1, 5, 6 and 7 for keys and values that live outside the device."""

import errno
import os
import re
import resource
import sys
import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
from engines import PROMPT, all_logits, engine_for, generate
from fake_cuda import FakeCuda, build_for_real, fake_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv import plain_attention

from offload_rt.attention.partial import PartialAttention
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.config import (
    DraftConfig,
    GenerationConfig,
    HomeKind,
    KVPlace,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.device import opening
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.cuda import device as cuda
from offload_rt.device.cuda import streams
from offload_rt.device.kinds import CPU, CUDA
from offload_rt.engine import Engine, Run, decoding
from offload_rt.engine import engine as engine_module
from offload_rt.errors import CapacityError, ConfigError, DeviceError, PlanError, StreamOrderError
from offload_rt.kv import sizes as kv_sizes
from offload_rt.kv.base import KVShape
from offload_rt.kv.home import FileHome, RamHome
from offload_rt.kv.offloaded import KVOptions, KVSpace, OffloadedKV, _Order
from offload_rt.kv.resident import ResidentKV
from offload_rt.kv.sizes import KVSizes, block_tokens_for, shared_kv_bytes, spread_layers
from offload_rt.model.checkpoint import open_checkpoint

SHAPES = [
    KVShape(heads=2, key_dim=8, value_dim=8),
    KVShape(heads=1, key_dim=8, value_dim=4),
    KVShape(heads=2, key_dim=8, value_dim=8),
]
CAPACITY, HEADS = 40, 4


@pytest.fixture(scope="module")
def device():
    device = CpuDevice(readers=2)
    yield device
    device.close()


@contextmanager
def offloaded(
    device,
    *,
    home="ram",
    block=4,
    slots=2,
    scratch=6,
    resident=(),
    host=False,
    shapes=SHAPES,
    capacity=CAPACITY,
    dtype=torch.float32,
    folder=None,
    **faults,
):
    """A cache and what is under it."""
    sizes = KVSizes(
        row_bytes=tuple(s.numbers_per_token * dtype.itemsize for s in shapes),
        capacity=capacity,
        block_tokens=block,
        slots=slots,
        scratch_tokens=scratch,
        resident=frozenset(resident),
    )
    space = KVSpace(device, sizes.staging_bytes)
    try:
        place = RamHome(device, sizes) if home == "ram" else FileHome(sizes, folder, **faults)
        space.own(place)
        cache = OffloadedKV(space, shapes, dtype, sizes, place, KVOptions(attend_on_host=host))
        yield cache
    finally:
        space.close()


def rows_for(tokens, shape, salt=0):
    """Keys [K, S, D] and values that a token alone decides."""
    table = torch.Generator().manual_seed(99 + salt)
    keys = torch.randn(64, shape.heads, shape.key_dim, generator=table)
    values = torch.randn(64, shape.heads, shape.value_dim, generator=table)
    index = torch.tensor(tokens, dtype=torch.int64)
    return [store[index].transpose(0, 1) for store in (keys, values)]


def advance(caches, tokens, spec, *, chunks=1, tree=None):
    """Append rows layer by layer, in chunks, and attend after each; what each cache answered."""
    answers = [[] for _ in caches]
    size = max(1, -(-len(tokens) // chunks))
    for layer, shape in enumerate(SHAPES):
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            noise = torch.Generator().manual_seed(layer * 100 + sum(part))
            query = torch.randn(HEADS, len(part), shape.key_dim, generator=noise)
            for cache, said in zip(caches, answers, strict=True):
                cache.append(layer, *rows_for(part, shape, layer))
                said.append(cache.attend(layer, query, spec, tree))
    return answers


def agree(answers):
    first, *others = answers
    return all(
        torch.allclose(a, b, atol=1e-5)
        for other in others
        for a, b in zip(first, other, strict=True)
    )


def tree_of(draw, pending, start):
    """A random tree over `pending` rows, root first."""
    parents = [None] + [draw(st.integers(0, row - 1)) for row in range(1, pending)]
    visible, depth = torch.eye(pending, dtype=torch.bool), [0] * pending
    for row, parent in enumerate(parents):
        if parent is not None:
            visible[row] |= visible[parent]
            depth[row] = depth[parent] + 1
    return PendingTree(visible, torch.tensor(depth) + start)


specs = st.builds(
    lambda window, softcap, sinks: AttentionSpec(
        scaling=0.4,
        window=window,
        softcap=softcap,
        sinks=torch.linspace(-1, 1, HEADS) if sinks else None,
    ),
    st.none() | st.integers(1, 12),
    st.none() | st.just(2.0),
    st.booleans(),
)


@st.composite
def histories(draw):
    """Passes: tokens, chunks, a tree or not, rows kept, rows taken back afterwards."""
    steps, length = [], 0
    for _ in range(draw(st.integers(1, 7))):
        count = draw(st.sampled_from([1, 1, 2, 3, 5, 6, 9, 17]))
        if length + count > CAPACITY:
            break
        tokens = draw(st.lists(st.integers(0, 63), min_size=count, max_size=count))
        chain = count > 6 or draw(st.booleans())
        tree = None if chain else tree_of(draw, count, length)
        some = draw(st.lists(st.sampled_from(range(count)), unique=True))
        keep = list(range(draw(st.integers(count // 2, count)))) if chain else some
        chunks = draw(st.integers(1, 3)) if chain else 1
        back = draw(st.sampled_from([0, 0, 0, 1, 4, 30]))
        steps.append((tokens, chunks, tree, keep, back))
        length = max(0, length + len(keep) - back)
    return steps


configurations = st.fixed_dictionaries(
    {
        "block": st.sampled_from([1, 2, 3, 4, 7, 16, 64]),
        "slots": st.integers(1, 4),
        "home": st.sampled_from(["ram", "file"]),
        "resident": st.sampled_from([(), (1,), (0, 2), (0, 1, 2)]),
        "scratch": st.sampled_from([6, 8]),
    }
)


@settings(deadline=None, max_examples=35)
@given(history=histories(), spec=specs, config=configurations, write=st.sampled_from([1, 2, 5]))
def test_offloaded_equals_resident_and_a_fresh_prefill(device, history, spec, config, write):
    check_history(device, history, spec, config, write)


@settings(deadline=None, max_examples=12)
@given(history=histories(), spec=specs, config=configurations, write=st.sampled_from([1, 2, 5]))
def test_attending_at_the_home_is_the_same(device, history, spec, config, write):
    check_history(device, history, spec, config | {"home": "ram", "host": True}, write)


def check_history(device, history, spec, config, write):
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_sizes, "WRITE_TOKENS", write)
        patch.setattr(kv_sizes, "PAGE_BYTES", 64 if config["home"] == "ram" else 4096)
        with offloaded(device, **config) as cache:
            resident = ResidentKV(device, SHAPES, torch.float32, CAPACITY)
            for tokens, chunks, tree, keep, back in history:
                assert agree(advance([resident, cache], tokens, spec, chunks=chunks, tree=tree))
                length = max(0, len(kept) + len(keep) - back)
                for each in (resident, cache):
                    each.commit(keep)
                    each.truncate(length)
                kept = (kept + [tokens[row] for row in keep])[:length]
                assert cache.length == len(kept)
            fresh = ResidentKV(device, SHAPES, torch.float32, CAPACITY + 1)
            if kept:
                advance([fresh], kept, spec)
                fresh.commit(range(len(kept)))
            if len(kept) < CAPACITY:
                assert agree(advance([fresh, cache], [33], spec))


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    rows=st.integers(1, 4),
    softcap=st.none() | st.just(1.5),
    sinks=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4]),
    value_dim=st.sampled_from([8, 4]),
)
def test_the_merge_of_parts_is_the_softmax_over_all(
    sizes, rows, softcap, sinks, kv_heads, value_dim
):
    noise = torch.Generator().manual_seed(sum(sizes))
    total = sum(sizes) + rows
    query = torch.randn(HEADS, rows, 8, generator=noise) * 3
    key = torch.randn(kv_heads, total, 8, generator=noise) * 3
    value = torch.randn(kv_heads, total, value_dim, generator=noise)
    spec = AttentionSpec(
        scaling=0.5, softcap=softcap, sinks=torch.linspace(-2, 2, HEADS) if sinks else None
    )
    parts, start = PartialAttention(query, kv_heads, spec), 0
    for size in sizes:
        parts.add(key[:, start : start + size], value[:, start : start + size])
        start += size
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    parts.add(key[:, start:], value[:, start:], causal)
    assert torch.allclose(parts.result(), plain_attention(query, key, value, spec), atol=1e-5)


def test_a_part_nobody_sees_adds_nothing():
    query, key = torch.randn(HEADS, 2, 8), torch.randn(2, 3, 8)
    parts = PartialAttention(query, 2, AttentionSpec(scaling=1.0))
    for _ in range(9):  # more than are kept before a merge
        parts.add(key, key, torch.zeros(2, 3, dtype=torch.bool))
    parts.add(key, key)
    alone = PartialAttention(query, 2, AttentionSpec(scaling=1.0))
    alone.add(key, key)
    assert torch.allclose(parts.result(), alone.result(), atol=1e-6)


def test_bfloat16_is_as_close_as_its_rounding(device):
    shape = KVShape(heads=2, key_dim=64, value_dim=64)
    noise = torch.Generator().manual_seed(3)
    key, value = (torch.randn(2, 300, 64, generator=noise).bfloat16() for _ in range(2))
    query = torch.randn(HEADS, 1, 64, generator=noise).bfloat16()
    spec = AttentionSpec(scaling=0.125)
    config = {"shapes": [shape], "capacity": 320, "block": 64, "dtype": torch.bfloat16}
    with offloaded(device, **config) as cache:
        cache.append(0, key[:, :299], value[:, :299])
        cache.commit(range(299))
        cache.append(0, key[:, 299:], value[:, 299:])
        ours = cache.attend(0, query, spec)
    exact = plain_attention(query.float(), key.float(), value.float(), spec)
    assert ours.dtype is torch.bfloat16
    assert torch.allclose(ours.float(), exact, atol=4e-3)


class Count:
    """Counts what a home is asked for, and keeps what reaches it."""

    def __init__(self, home):
        self.home, self.read, self.stored = home, [], []

    def source(self, layer, row, rows):
        self.read.append((layer, row, rows))
        return self.home.source(layer, row, rows)

    def target(self, layer, row, rows):
        self.stored.append((layer, row, rows))
        return self.home.target(layer, row, rows)

    def rows(self, layer, row, rows):
        return self.home.rows(layer, row, rows)

    def close(self):
        self.home.close()


def counted(cache):
    count = Count(cache._home)
    cache._home = cache._order.home = count
    return count


PLAIN = AttentionSpec(scaling=0.4)


def settle(cache):
    cache._space.copy.record().synchronize()
    return cache._space.copy.statistics().bytes_copied


@pytest.mark.parametrize("home", ["ram", "file"])
@pytest.mark.parametrize("block", [16, 64, 200])
def test_a_prompt_leaves_once_and_a_pass_reads_each_committed_row_once(device, home, block):
    capacity, prompt, scratch = 700, [i % 64 for i in range(600)], 8
    config = {
        "capacity": capacity,
        "block": block,
        "scratch": scratch,
        "slots": 3,
        "resident": (1,),
    }
    with offloaded(device, home=home, **config) as cache:
        count, sizes = counted(cache), cache._sizes
        advance([cache], prompt, PLAIN, chunks=7)
        at_home = sizes.home_rows(600)
        assert not count.read
        cache.commit(range(600))
        assert count.stored == [(0, 0, at_home), (2, 0, at_home)]
        before = settle(cache)  # the ring is full: it has the first blocks of the next pass
        for _ in range(min(3, sizes.write_tokens - (600 - at_home) - 1)):
            advance([cache], [5], PLAIN)
            cache.commit([0])
            moved, before = settle(cache) - before, settle(cache)
            assert moved == at_home * (sizes.row_bytes[0] + sizes.row_bytes[2])
        assert len(count.stored) == 2
        seen = count.read[: -(-at_home // block) * 2]
        assert len(set(seen)) == len(seen)
        assert [layer for layer, _, _ in seen] == sorted(layer for layer, _, _ in seen)


def test_a_rejected_row_never_reaches_the_home(device):
    with offloaded(device, scratch=30, capacity=400, block=16) as cache:
        count = counted(cache)
        accepted = 0
        for _ in range(12):
            advance([cache], list(range(30)), PLAIN)
            cache.commit([0, 2, 29])
            accepted += 3
        settle(cache)
        rows = cache._sizes.home_rows(accepted)
        assert sum(n for layer, _, n in count.stored if layer == 0) == rows > 0
        keys, _ = cache._layers[0].format.views(
            cache._layers[0].format.memory(count.rows(0, 0, rows))
        )
        expected, _ = rows_for([0, 2, 29] * 12, SHAPES[0])
        assert torch.equal(keys, expected[:, :rows])


def test_a_window_reads_only_the_blocks_it_touches(device):
    spec = AttentionSpec(scaling=0.4, window=40)
    with offloaded(device, capacity=700, block=32, slots=2) as cache:
        advance([cache], [i % 64 for i in range(600)], spec)
        cache.commit(range(600))
        count = counted(cache)
        advance([cache], [1], spec)
        first = (600 - 40 + 1) // 32 * 32
        assert {row for _, row, _ in count.read} == set(
            range(first, cache._sizes.home_rows(600), 32)
        )


def test_device_memory_is_what_the_sizes_say(device):
    before = device.ledger()
    with offloaded(device, home="file", resident=(1,), capacity=500, block=64) as cache:
        sizes = cache._sizes
        taken = {
            name: size - before.get(name, 0)
            for name, size in device.ledger().items()
            if size > before.get(name, 0)
        }
        assert taken == {
            "KV cache": sizes.resident_bytes,
            "KV blocks": sizes.slots * sizes.slot_bytes,
            "KV recent rows": sizes.recent_bytes,
            "KV staging": sizes.staging_bytes,
        }
        assert sum(taken.values()) == sizes.device_bytes + shared_kv_bytes([sizes], writers=0)


def test_a_gpu_reads_larger_blocks_so_that_its_host_keeps_up():
    """A block costs the host 0.07 to 0.34 ms; PCIe 4.0 brings 4 MiB in 0.17 ms, 32 in 1.3."""
    for row in (2**10, 2**12, 2**14):
        assert block_tokens_for(row, CPU) * row == 4 * 2**20 or row == 2**14
        assert block_tokens_for(row, CUDA) * row == 32 * 2**20


def test_sizes_of_a_long_context():
    """Qwen2.5-1.5B at 16k tokens: 448 MiB at home, a few on the device besides one layer."""
    row = 2 * 2 * 128 * 2
    sizes = KVSizes(row_bytes=(row,) * 28, capacity=16384, block_tokens=block_tokens_for(row, CPU))
    assert sizes.home_bytes == 28 * 16 * 2**20
    assert (sizes.slot_bytes, sizes.staging_bytes) == (4 * 2**20, 16 * 2**20)
    assert sizes.device_bytes == 4 * 4 * 2**20 + 28 * (32 + 64) * row


@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    block=st.integers(1, 600),
    lengths=st.lists(st.integers(0, 3000), min_size=2, max_size=2),
)
def test_rows_go_home_in_whole_pages_and_never_back(rows, block, lengths):
    sizes = KVSizes(row_bytes=tuple(16 * n for n in rows), capacity=4000, block_tokens=block)
    low, high = sorted(lengths)
    assert sizes.home_rows(low) <= sizes.home_rows(high) <= high
    assert sizes.home_rows(sizes.home_rows(high)) == sizes.home_rows(high)
    assert high - sizes.home_rows(high) < sizes.write_tokens
    rest = sizes.home_rows(high) % block
    assert all(rest * size % 4096 == 0 for size in sizes.row_bytes)


def test_resident_layers_are_spread():
    assert spread_layers(0, 4) == frozenset()
    assert spread_layers(2, 4) == {1, 3}
    assert spread_layers(4, 4) == {0, 1, 2, 3}


# Two sequences share the staging memory.


def test_prompts_of_several_sequences_stage_in_one_place(device):
    sizes = KVSizes(
        row_bytes=tuple(s.numbers_per_token * 4 for s in SHAPES),
        capacity=300,
        block_tokens=64,
        scratch_tokens=4,
    )
    space = KVSpace(device, sizes.staging_bytes)
    caches = [
        OffloadedKV(space, SHAPES, torch.float32, sizes, RamHome(device, sizes)) for _ in range(2)
    ]
    plain = [ResidentKV(device, SHAPES, torch.float32, 300) for _ in range(2)]
    prompts = [[i % 64 for i in range(200)], [i * 7 % 64 for i in range(150)]]
    for layer, shape in enumerate(SHAPES):
        for k, prompt in enumerate(prompts):
            for start in range(0, len(prompt), 70):
                part = prompt[start : start + 70]
                query = torch.randn(HEADS, len(part), shape.key_dim)
                answers = []
                for cache in (plain[k], caches[k]):
                    cache.append(layer, *rows_for(part, shape, layer))
                    answers.append(cache.attend(layer, query, PLAIN))
                assert torch.allclose(*answers, atol=1e-5)
    for k, prompt in enumerate(prompts):
        for cache in (plain[k], caches[k]):
            cache.commit(range(len(prompt)))
        assert agree(advance([plain[k], caches[k]], [1, 2], PLAIN))
    space.close()


# Limits and faults.


def test_capacity_and_pending_rows_are_checked(device):
    with offloaded(device, capacity=4) as cache:
        advance([cache], [1, 2, 3], PLAIN)
        with pytest.raises(CapacityError, match="3 rows are pending"):
            cache.commit([0, 3])
        cache.commit(range(3))
        with pytest.raises(CapacityError, match="room for 4 tokens, 5 are needed"):
            advance([cache], [4, 5], PLAIN)
        with pytest.raises(CapacityError, match="cannot go back to 4 tokens: 3"):
            cache.truncate(4)


def test_of_a_prompt_only_a_beginning_can_be_kept(device):
    with (
        offloaded(device, scratch=4, block=2) as cache,
        pytest.raises(CapacityError, match="first"),
    ):
        advance([cache], list(range(20)), PLAIN)
        cache.commit([0, 5])


def test_attending_at_a_file_is_refused(device):
    with pytest.raises(ConfigError, match="in memory"), offloaded(device, home="file", host=True):
        pass


def test_a_full_disk_is_met_at_the_start(device, monkeypatch, tmp_path):
    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refusal = pytest.raises(
        PlanError, match=r"needs .*KiB of disk in .*, .*iB is free: .*--kv-fold"
    )
    with refusal, offloaded(device, home="file", folder=tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_limit_of_file_sizes_is_no_full_disk(device, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    refusal = pytest.raises(PlanError, match=r"at most 64.0 KiB here \(ulimit -f\): raise that")
    try:
        with refusal, offloaded(device, home="file", folder=tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_is_not_there_is_named(device, tmp_path):
    refusal = pytest.raises(DeviceError, match="nowhere: No such file or directory; choose another")
    with refusal, offloaded(device, home="file", folder=tmp_path / "nowhere"):
        pass


@pytest.mark.parametrize("what", ["reading", "writing"])
def test_an_io_error_is_one_sentence(device, what):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    faults = {"preadv": fail} if what == "reading" else {"pwrite": fail}
    refusal = pytest.raises(DeviceError, match=f"{what} .* bytes .*Input/output error; check the d")
    with offloaded(device, home="file", block=128, capacity=300, **faults) as cache, refusal:
        advance([cache], [i % 64 for i in range(280)], PLAIN)
        cache.commit(range(280))
        advance([cache], [1], PLAIN)
        settle(cache)


def test_short_reads_and_writes_are_finished(device):
    def preadv(fd, buffers, offset):
        return os.preadv(fd, [buffers[0][:4096]], offset)

    def pwrite(fd, view, offset):
        return os.pwrite(fd, view[:4096], offset)

    config = {"home": "file", "block": 128, "capacity": 300, "preadv": preadv, "pwrite": pwrite}
    with offloaded(device, **config) as cache:
        resident = ResidentKV(device, SHAPES, torch.float32, 300)
        prompt = [i % 64 for i in range(280)]
        assert agree(advance([resident, cache], prompt, PLAIN))
        for each in (resident, cache):
            each.commit(range(280))
        assert agree(advance([resident, cache], [1, 2], PLAIN))


@pytest.mark.parametrize("direct", [True, False])
def test_nothing_is_left_on_disk(device, tmp_path, direct):
    with offloaded(device, home="file", folder=tmp_path, direct=direct) as cache:
        assert not list(tmp_path.iterdir())
        fd = cache._home._file.fd
        assert os.fstat(fd).st_nlink == 0
        assert os.fstat(fd).st_size >= cache._sizes.home_bytes
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_the_default_folder_is_not_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    sizes = KVSizes(row_bytes=(64,), capacity=8, block_tokens=8)
    home = FileHome(sizes)
    assert home.folder == tmp_path
    home.close()
    monkeypatch.delenv("TMPDIR")
    home = FileHome(sizes)
    assert re.fullmatch("/var/tmp", str(home.folder))
    home.close()


# The whole engine.

LONG = [(i * i + 3 * i) % 290 for i in range(400)]
PLACES = [
    {"kv": KVPlace.DISK},
    {"kv": KVPlace.HOST},
    {"kv": KVPlace.HOST, "home": HomeKind.HOST, "resident_layers": 1, "link_bytes_per_s": 1e9},
    {"kv": KVPlace.HOST, "link_bytes_per_s": 1e9},
]


@pytest.fixture(scope="module")
def answered(make_tiny):
    """What the model of a family answers; where all rows are on the device it is asked once."""
    known = {}

    def ask(family, **place):
        model = make_tiny(family, num_hidden_layers=3, sliding_window=32)
        long = LONG[:170]
        prompts, second = [long, PROMPT], [[*long, 5, 6, 7], long[:30]]
        limits = {"tokens": 24, "prefill_chunk_tokens": 64, "device_limit_bytes": None}
        with engine_for(model, prompts=prompts, **limits, **place) as engine:
            return [generate(engine, asked, tokens=8) for asked in (prompts, second)]

    def answer(family, **place):
        if place:
            return ask(family, **place)
        if family not in known:
            known[family] = ask(family, kv=KVPlace.DEVICE)
        return known[family]

    return answer


@pytest.mark.parametrize(
    ("family", "place"),
    [
        *(("llama", place) for place in PLACES),
        *(("gemma2", PLACES[0]), ("gemma2", PLACES[2])),
        *(("gpt_oss", PLACES[1]), ("gpt_oss", PLACES[3])),
    ],
)
def test_answers_are_those_of_a_resident_cache(answered, family, place):
    assert answered(family, kv_block_tokens=48, **place) == answered(family)


def test_streamed_weights_and_streamed_kv(make_tiny):
    model, long = make_tiny("llama", num_hidden_layers=3), LONG[:150]
    config = {"prompts": [long], "tokens": 20, "prefill_chunk_tokens": 100, "resident_layers": 1}
    with engine_for(model, kv=KVPlace.DEVICE, **config) as engine:
        expected = all_logits(engine, long, steps=8)
    for place in PLACES:
        with engine_for(model, kv_block_tokens=32, **(config | place)) as engine:
            found = all_logits(engine, long, steps=8)
        assert torch.allclose(found, expected, atol=2e-4, rtol=1e-4), place


def test_drafts_over_streamed_kv(make_tiny):
    model = make_tiny("llama")
    prompt = (LONG[:50] * 3)[:140]
    options = {"prompts": [prompt], "tokens": 60, "prefill_chunk_tokens": 64}
    with engine_for(model, kv=KVPlace.DEVICE, **options) as engine:
        expected = generate(engine, [prompt], tokens=60)
    options |= {"kv": KVPlace.DISK, "kv_block_tokens": 64}
    for draft_tokens in (3, 24):
        draft = DraftConfig(draft="ngram", draft_tokens=draft_tokens)
        with engine_for(model, draft=draft, **options) as engine:
            assert generate(engine, [prompt], tokens=60) == expected, draft_tokens


def test_the_ledger_is_the_plan(make_tiny):
    model = make_tiny("llama", num_hidden_layers=4)
    options = {
        "prompts": [LONG],
        "kv": KVPlace.DISK,
        "kv_block_tokens": 64,
        "prefill_chunk_tokens": 64,
    }
    with engine_for(model, **options) as engine:
        generate(engine, [LONG], tokens=16)
        kv, ledger = engine.placement.demand.kv, engine.device.ledger()
        taken = sum(size for name, size in ledger.items() if name.startswith("KV"))
        assert taken + kv.writers * kv_sizes.WRITE_PIECE_BYTES == engine.placement.demand.kv_bytes
        assert engine.memory().device_peak_bytes <= engine.placement.device_bytes


def test_kv_leaves_the_device_when_it_does_not_fit(make_tiny):
    model = make_tiny("llama", num_hidden_layers=4)
    many = {"prompts": [LONG], "tokens": 100_000, "prefill_chunk_tokens": 64}
    limit = 150 * 2**20
    with engine_for(model, device_limit_bytes=limit, **many) as engine:
        assert engine.placement.demand.kv.place is KVPlace.DISK
        assert engine.placement.device_bytes <= limit
        generate(engine, [LONG], tokens=4)
    with (
        pytest.raises(PlanError, match="KV cache"),
        engine_for(model, device_limit_bytes=limit, kv=KVPlace.DEVICE, **many),
    ):
        pass


def test_an_interrupted_pass_leaves_no_trace(make_tiny):
    model = make_tiny("llama", num_hidden_layers=4)
    options = {
        "prompts": [LONG],
        "kv": KVPlace.DISK,
        "kv_block_tokens": 64,
        "prefill_chunk_tokens": 64,
    }
    with engine_for(model, **options) as engine:
        expected = all_logits(engine, LONG)
    with engine_for(model, **options) as engine:
        layer = engine.network._layers[2]
        for rows in ([(0, LONG)], [(0, LONG[:300])], [(0, LONG)]):
            forward = layer.forward
            layer.forward = lambda *args, **given: (_ for _ in ()).throw(KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.forward(rows, reuse=True)
            layer.forward = forward
            engine.forward([(0, LONG[:200])], reuse=True)
        engine.truncate(0, 0)
        assert torch.equal(all_logits(engine, LONG), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": KVPlace.HOST, "kv_folder": "/var/tmp"}, "--kv-folder .* add --kv disk"),
        ({"kv": KVPlace.DEVICE, "kv_block_tokens": 64}, "--kv-block-tokens has no effect"),
        ({"kv_block_tokens": 0}, "--kv-block-tokens is 0"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig(**options)


def test_a_gpu_reads_no_kv_from_a_file():
    with pytest.raises(ConfigError, match="--kv disk is for --device cpu"):
        kv_sizes.kv_places(RuntimeConfig(kv=KVPlace.DISK), CUDA)
    assert kv_sizes.kv_places(RuntimeConfig(), CUDA) == (KVPlace.DEVICE, KVPlace.HOST)


# The GPU that is not there (`fake_cuda`): order of accesses, host syncs, pinned memory.


@pytest.fixture
def gpu(monkeypatch):
    double = FakeCuda()
    monkeypatch.setattr(cuda, "TorchDriver", lambda: double)
    monkeypatch.setattr(opening, "TorchDriver", lambda: double)
    monkeypatch.setattr(decoding, "make_generator", lambda *_: torch.Generator())
    monkeypatch.setattr(engine_module, "Network", build_for_real(engine_module.Network))
    # A part of host memory is to be real, with an address, and known as part of the whole.
    monkeypatch.setattr(RamHome, "_part", build_for_real(RamHome._part))
    monkeypatch.setattr(kv_sizes, "PAGE_BYTES", 64)
    return double


def steps_on(gpu, model, steps=5):
    """Prompts in chunks, then enough steps that rows of both go home and blocks grow."""
    prompts = [LONG[:60], LONG[:28]]
    config = RuntimeConfig(
        device="cuda:0",
        home=HomeKind.HOST,
        resident_layers=1,
        slots=2,
        kv=KVPlace.HOST,
        kv_block_tokens=16,
        prefill_chunk_tokens=32,
    )
    checkpoint, waits = open_checkpoint(model), []
    with (
        fake_gpu(gpu),
        Engine(checkpoint, config, capacities=[80, 50], prompt_tokens=88) as engine,
    ):
        run = Run.start(engine, prompts, SamplingConfig(), GenerationConfig(max_tokens=steps + 1))
        gpu.strict = True
        for advance_run in [run.prefill, *[run.step] * steps]:
            advance_run()
            waits.append(gpu.host_syncs[threading.current_thread().name])
        gpu.strict = False
    return waits


def test_kv_streams_to_a_gpu_in_order_and_without_host_syncs(gpu, make_tiny):
    model = make_tiny("llama", num_hidden_layers=3)
    waits = steps_on(gpu, model)
    assert len(set(waits)) == 1, "the program waited for an event in a step"
    assert gpu.unpinned_copies == 0
    rows = sum(n - n % 16 for n in (60 + 5, 28 + 5))  # blocks of 16 are smaller than a write
    assert gpu.copied_back_bytes == 3 * rows * 2 * 2 * 16 * 4


@pytest.mark.parametrize("waiting", ["CudaComputeStream", "CudaCopyStream"])
def test_without_either_wait_the_order_breaks(gpu, make_tiny, monkeypatch, waiting):
    model, wait = make_tiny("llama", num_hidden_layers=3), getattr(streams, waiting).wait

    def forget(self, event):
        if self._stream.sim.name == "kv" or event.enqueued().event.clock.get("kv", 0):
            event.enqueued()
        else:
            wait(self, event)

    monkeypatch.setattr(getattr(streams, waiting), "wait", forget)
    with pytest.raises(StreamOrderError, match="buffer .* by '(kv|kv back|compute)'"):
        steps_on(gpu, model)


def test_blocks_are_read_after_they_were_written(gpu, make_tiny, monkeypatch):
    monkeypatch.setattr(_Order, "written", lambda self, block: None)
    with pytest.raises(StreamOrderError, match="'kv': buffer read before .* by 'kv back'"):
        steps_on(gpu, make_tiny("llama", num_hidden_layers=3))


@pytest.mark.parametrize("orders", [True, False])
def test_forgotten_rows_are_overwritten_after_they_were_read(gpu, monkeypatch, orders):
    """The ring has fetched blocks ahead when their last rows are forgotten and come anew."""
    shape = KVShape(heads=4, key_dim=64, value_dim=64)  # a row fills a part of the double's memory
    spec, rows = AttentionSpec(scaling=0.4), 32
    if not orders:
        wait = streams.CudaCopyStream.wait
        monkeypatch.setattr(
            streams.CudaCopyStream,
            "wait",
            lambda self, event: (
                None if sys._getframe(1).f_code.co_name == "_fetch_back" else wait(self, event)
            ),
        )
    sizes = KVSizes(row_bytes=(2048,), capacity=100, block_tokens=16, slots=4, scratch_tokens=40)
    device = cuda.CudaDevice(0, driver=gpu)
    with fake_gpu(gpu), torch.no_grad():
        space, home = KVSpace(device, sizes.staging_bytes), RamHome(device, sizes)
        cache = OffloadedKV(space, [shape], torch.float32, sizes, home)

        def add():
            made = torch.zeros(4, rows, 64, device=device.torch_device)
            cache.append(0, made, made)
            cache.attend(0, made, spec)
            cache.commit(range(rows))

        add()
        cache.truncate(0)  # with any left, the next pass would wait for the blocks of these
        refusal = pytest.raises(StreamOrderError, match="overwritten while being read by 'kv'")
        with nullcontext() if orders else refusal:
            add()
            space.back.record().synchronize()
        space.close()
    device.close()
