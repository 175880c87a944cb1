"""Attention equals its definition in both ways through flash attention, in few launches."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
from flash_double import flash_of_a_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from offload_rt.attention import flash, partial, rows
from offload_rt.attention.flash import flash_of
from offload_rt.attention.partial import PartialAttention
from offload_rt.attention.rows import attend_rows
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.device.kinds import CPU, KINDS, Processor

HEADS = 4


class Calls(TorchDispatchMode):
    """Notes the operators that are called; those that only make views are free."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func.overloadpacket).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


def definition(query, key, value, spec, seen):
    """The softmax over all rows that are seen, in fp64: `seen` [S, T]."""
    each = query.shape[0] // key.shape[0]
    key, value = (x.double().repeat_interleave(each, dim=0) for x in (key, value))
    scores = query.double() @ key.transpose(1, 2) * spec.scaling
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if spec.sinks is not None:
        sinks = spec.sinks.double()[:, None, None].expand(-1, query.shape[1], 1)
        scores = torch.cat([scores, sinks], dim=2)
    weights = scores.softmax(dim=-1)[..., : key.shape[1]]
    return (weights @ value).transpose(0, 1)


def seen_rows(count, cached, window, tree=None):
    """One row at a time, straight from what a row sees."""
    committed = cached - (count if tree is None else tree.positions.numel())
    places = list(range(cached))
    if tree is not None:
        places[committed:] = tree.positions.tolist()
    seen = torch.zeros(count, cached, dtype=torch.bool)
    for row in range(count):
        own = cached - count + row
        for at in range(cached):
            sees = (
                at <= own if tree is None else at < committed or tree.visible[row, at - committed]
            )
            seen[row, at] = bool(sees) and (window is None or places[at] > places[own] - window)
    return seen


@contextmanager
def way(gpu, grouped_from, key_block=1024):
    """One of the ways through attention: a GPU's, or a CPU's with few or many committed rows."""
    with (
        flash_of_a_gpu(torch.float32) if gpu else nullcontext(),
        mock.patch.object(rows, "GROUPED_FROM", grouped_from),
        mock.patch.object(rows, "GROUPED_ROWS", 4),
        mock.patch.object(partial, "KEY_BLOCK", key_block),
    ):
        yield


@st.composite
def cases(draw):
    """Query, keys, values, spec and maybe a tree whose nodes are pending behind committed rows."""
    count, more, past = draw(st.integers(1, 9)), draw(st.integers(0, 3)), draw(st.integers(0, 24))
    branching = draw(st.booleans())
    pending = count + (more if branching else 0)
    kv_heads, size = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([8, 16, 12]))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def normal(*shape):
        return torch.randn(shape, generator=noise)

    cached = past + pending
    key, value = (normal(kv_heads, cached, size), normal(kv_heads, cached, size))
    if draw(st.booleans()):  # as offloaded rows lie: token by token
        key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (key, value))
    spec = AttentionSpec(
        scaling=0.4,
        window=draw(st.none() | st.integers(1, 30)),
        softcap=draw(st.none() | st.none() | st.just(1.5)),
        sinks=normal(HEADS) if draw(st.booleans()) else None,
    )
    tree = None
    if branching:
        parents = [draw(st.integers(-1, node - 1)) for node in range(pending)]
        visible, depths = torch.eye(pending, dtype=torch.bool), []
        for node, parent in enumerate(parents):
            depths.append(0 if parent < 0 else depths[parent] + 1)
            if parent >= 0:
                visible[node] |= visible[parent]
        tree = PendingTree(visible[-count:], past + torch.tensor(depths))
    return normal(HEADS, count, size), key, value, spec, tree


@settings(deadline=None, max_examples=150)
@given(case=cases(), gpu=st.booleans(), grouped_from=st.sampled_from([1, 1000]))
def test_attention_equals_its_definition(case, gpu, grouped_from):
    query, key, value, spec, tree = case
    with way(gpu, grouped_from, key_block=7):
        ours = attend_rows(query, key, value, spec, tree)
    seen = seen_rows(query.shape[1], key.shape[1], spec.window, tree)
    exact = definition(query, key, value, spec, seen)
    assert ours.shape == exact.shape and ours.dtype is torch.float32
    assert torch.allclose(ours.double(), exact, atol=2e-5)


@settings(deadline=None, max_examples=60)
@given(case=cases(), gpu=st.booleans(), sizes=st.lists(st.integers(1, 9), max_size=12))
def test_parts_in_any_number_before_the_newest_are_as_one(case, gpu, sizes):
    query, key, value, spec, tree = case
    spec = replace(spec, window=None)  # of parts the caller's masks know it
    start, ends = 0, key.shape[1] - (query.shape[1] if tree is None else tree.positions.numel())
    with way(gpu, 1, key_block=5):
        parts = PartialAttention(query, key.shape[0], spec)
        for size in sizes:
            stop = min(start + size, ends)
            parts.add(key[:, start:stop], value[:, start:stop])
            start = stop
        newest = tree and PendingTree(tree.visible, tree.positions - start)
        parts.add_newest(key[:, start:], value[:, start:], newest)
        ours = parts.result()
    seen = seen_rows(query.shape[1], key.shape[1], None, tree)
    assert torch.allclose(ours.double(), definition(query, key, value, spec, seen), atol=2e-5)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("window", [3, 4, 9, 12])
@pytest.mark.parametrize("as_tree", [False, True])
def test_windows_end_where_they_should(gpu, window, as_tree):
    """The newest of many rows loses a key with each row: as a chain, and as a tree that is one."""
    noise = torch.Generator().manual_seed(window)
    query, sinks = torch.randn(HEADS, 4, 8, generator=noise), torch.zeros(HEADS)
    key, value = (torch.randn(2, 20, 8, generator=noise) for _ in range(2))
    tree = PendingTree(torch.ones(4, 4, dtype=torch.bool).tril(), 16 + torch.arange(4))
    spec = AttentionSpec(scaling=0.4, window=window, sinks=sinks)
    with way(gpu, 1):
        ours = attend_rows(query, key, value, spec, tree if as_tree else None)
    exact = definition(query, key, value, spec, seen_rows(4, 20, window))
    assert torch.allclose(ours.double(), exact, atol=2e-5)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [64, 80, 100, 288])
@pytest.mark.parametrize("window", [None, 150])
def test_every_number_format_and_head_size(gpu, dtype, size, window):
    """What the kernel refuses is written out; nothing is rounded more than its results are."""
    noise = torch.Generator().manual_seed(size)
    query = torch.randn(HEADS, 5, size, generator=noise).to(dtype)
    key, value = (torch.randn(2, 300, size, generator=noise).to(dtype) for _ in range(2))
    spec = AttentionSpec(scaling=size**-0.5, window=window)
    exact = definition(query, key, value, spec, seen_rows(5, 300, window))
    with flash_of_a_gpu() if gpu else nullcontext():
        ours = attend_rows(query, key, value, spec)
    assert ours.dtype is dtype
    bound = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    assert torch.allclose(ours.double(), exact, atol=bound)


def chain(count, cached, dtype=torch.bfloat16, kv_heads=2):
    query = torch.randn(HEADS, count, 64).to(dtype)
    return query, *(torch.randn(kv_heads, cached, 64).to(dtype) for _ in range(2))


def star(count, cached):
    """A tree of a root and its children."""
    visible = torch.eye(count, dtype=torch.bool)
    visible[:, 0] = True
    return PendingTree(visible, cached - count + torch.arange(count).clamp(max=1))


def calls_of(attend):
    with Calls() as calls:
        attend()
    return calls.names


@pytest.mark.parametrize("count", [1, 2, 17, 512])
@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_chain_is_one_launch_on_a_gpu(count, window, kv_heads):
    rows_ = chain(count, 1000, kv_heads=kv_heads)
    spec = AttentionSpec(scaling=0.1, window=window)
    with flash_of_a_gpu():
        assert calls_of(lambda: attend_rows(*rows_, spec)) == ["_flash_attention_forward"]


def test_a_chain_with_sinks_is_still_flash_attention():
    spec = AttentionSpec(scaling=0.1, window=600, sinks=torch.randn(HEADS))
    rows_ = chain(17, 1000)
    with flash_of_a_gpu():
        names = calls_of(lambda: attend_rows(*rows_, spec))
    assert names.count("_flash_attention_forward") == 1 and len(names) <= 8
    assert not {"bmm", "matmul"} & {*names}


def test_a_tree_attends_to_committed_rows_by_flash():
    rows_, tree = chain(17, 5000), star(17, 5000)
    spec = AttentionSpec(scaling=0.1)
    with flash_of_a_gpu():
        names = calls_of(lambda: attend_rows(*rows_, spec, tree))
    assert names.count("_flash_attention_forward") == 1
    assert names.count("bmm") == 2  # the pending rows, written out
    assert len(names) <= 21


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_a_block_is_three_launches(gpu):
    query, key, value = chain(8, 512)
    spec = AttentionSpec(scaling=0.1)

    def attend(blocks):
        parts = PartialAttention(query, 2, spec)
        for _ in range(blocks):
            parts.add(key, value)
        parts.result()

    with flash_of_a_gpu() if gpu else nullcontext():
        few, many = (len(calls_of(lambda n=n: attend(n))) for n in (7, 77))
    assert many - few <= 3 * 70


def test_a_gpu_too_old_for_it_writes_everything_out():
    old = replace(CPU, flash=KINDS[Processor.CUDA].flash, runs_flash=lambda index: False)
    query, key, value = chain(5, 40)
    spec = AttentionSpec(scaling=0.1)
    exact = definition(query, key, value, spec, seen_rows(5, 40, None))
    flash_of.cache_clear()
    with mock.patch.dict(KINDS, {Processor.CPU: old}):
        assert flash_of(query.device) is None
        ours = attend_rows(query, key, value, spec)
    flash_of.cache_clear()
    assert torch.allclose(ours.double(), exact, atol=8e-3)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("window", [None, 9])
def test_torch_has_the_operators_as_they_are_called(count, window):
    """Shapes on meta tensors: names, order and keywords of CUDA's operator."""
    kernel = next(k for k in flash._KERNELS.values() if k.lower_right)
    query = torch.empty(6, count, 64, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, 30, 64, dtype=torch.bfloat16, device="meta")
    out, lse = kernel.attend(query, key, key, 0.1, True, window)
    assert (out.shape, lse.shape) == (query.shape, query.shape[:2])
    assert lse.dtype is torch.float32
