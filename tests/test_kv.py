"""Law 5: after any commit a cache equals a fresh prefill of the same tokens."""

from functools import cache
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_rt.attention import rows as attention
from offload_rt.attention.rows import attend_rows
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.device.cpu import CpuDevice
from offload_rt.errors import CapacityError
from offload_rt.kv.base import KVShape
from offload_rt.kv.resident import ResidentKV

SHAPES = [KVShape(heads=2, key_dim=8, value_dim=8), KVShape(heads=1, key_dim=8, value_dim=4)]
CAPACITY, HEADS = 24, 4


@pytest.fixture(scope="module")
def device():
    device = CpuDevice(readers=1)
    yield device
    device.close()


@cache
def row_for(seed, heads, dim):
    return torch.randn(heads, 1, dim, generator=torch.Generator().manual_seed(seed))


def rows_for(tokens, shape):
    """Keys [K, S, D] and values that a token alone decides."""
    made = []
    for salt, dim in ((1, shape.key_dim), (2, shape.value_dim)):
        parts = [row_for(token * 10 + salt, shape.heads, dim) for token in tokens]
        made.append(torch.cat(parts, dim=1) if parts else torch.empty(shape.heads, 0, dim))
    return made


def append(cache, tokens, chunks=1):
    for layer, shape in enumerate(SHAPES):
        size = max(1, -(-len(tokens) // chunks))
        for start in range(0, len(tokens), size):
            cache.append(layer, *rows_for(tokens[start : start + size], shape))


def contents(cache):
    return [store[:, : cache.length].clone() for store in (*cache._keys, *cache._values)]


@st.composite
def histories(draw):
    """Appends of several rows, each with the rows that are kept, in any order."""
    steps, length, token = [], 0, 0
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 6))
        if length + count > CAPACITY:
            break
        tokens = list(range(token, token + count))
        keep = draw(st.lists(st.sampled_from(range(count)), unique=True))
        back = draw(st.integers(0, 3))
        steps.append((tokens, draw(st.integers(1, 3)), keep, back))
        token += count
        length = max(0, length + len(keep) - back)
    return steps


@settings(deadline=None, max_examples=60)
@given(history=histories())
def test_after_any_commit_a_cache_equals_a_fresh_one(device, history):
    cache, kept = ResidentKV(device, SHAPES, torch.float32, CAPACITY), []
    for tokens, chunks, keep, back in history:
        append(cache, tokens, chunks)
        assert cache.length == len(kept)  # pending rows do not count
        cache.commit(keep)
        kept += [tokens[row] for row in keep]
        length = max(0, len(kept) - back)
        cache.truncate(length)
        kept = kept[:length]
        fresh = ResidentKV(device, SHAPES, torch.float32, CAPACITY)
        append(fresh, kept)
        fresh.commit(range(len(kept)))
        assert cache.length == len(kept)
        pairs = zip(contents(cache), contents(fresh), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_rows_beyond_the_capacity_are_refused_before_anything_is_written(device):
    cache = ResidentKV(device, SHAPES, torch.float32, 4)
    append(cache, [1, 2, 3])
    cache.commit(range(3))
    before = contents(cache)
    with pytest.raises(CapacityError, match="room for 4 tokens, 5 are needed"):
        append(cache, [4, 5])
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), before, strict=True))


def test_rows_that_are_not_pending_cannot_be_kept(device):
    cache = ResidentKV(device, SHAPES, torch.float32, 4)
    append(cache, [1, 2])
    with pytest.raises(CapacityError, match="2 rows are pending"):
        cache.commit([0, 2])
    with pytest.raises(CapacityError, match="cannot go back to 1 tokens: 0"):
        cache.truncate(1)


def plain_attention(query, key, value, spec):
    """One query row and one head at a time, straight from the definition."""
    heads, rows, _ = query.shape
    kv_heads, cached, _ = key.shape
    out = torch.zeros(rows, heads, value.shape[-1])
    for row in range(rows):
        at = cached - rows + row
        first = 0 if spec.window is None else max(0, at - spec.window + 1)
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = key[kv, first : at + 1] @ query[head, row] * spec.scaling
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            if spec.sinks is not None:
                scores = torch.cat([scores, spec.sinks[head : head + 1]])
            weights = torch.softmax(scores, 0)[: at + 1 - first]
            out[row, head] = weights @ value[kv, first : at + 1]
    return out


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 7),
    past=st.integers(0, 9),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.floats(0.5, 5.0),
    sinks=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4]),
    value_dim=st.sampled_from([8, 4]),
    grouped=st.booleans(),
)
def test_attention_equals_its_definition(
    rows, past, window, softcap, sinks, kv_heads, value_dim, grouped
):
    generator = torch.Generator().manual_seed(rows * 100 + past)
    query = torch.randn(HEADS, rows, 8, generator=generator)
    key = torch.randn(kv_heads, rows + past, 8, generator=generator)
    value = torch.randn(kv_heads, rows + past, value_dim, generator=generator)
    spec = AttentionSpec(
        scaling=0.4,
        window=window,
        softcap=softcap,
        sinks=torch.randn(HEADS, generator=generator) if sinks else None,
    )
    with mock.patch.object(attention, "GROUPED_FROM", 1 if grouped else 100):
        ours = attend_rows(query, key, value, spec)
    assert torch.allclose(ours, plain_attention(query, key, value, spec), atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(2, 7),
    more=st.integers(0, 5),
    past=st.integers(1, 30),
    window=st.none() | st.integers(20, 60),
    data=st.data(),
)
def test_rows_of_a_tree_taken_apart_attend_as_together(rows, more, past, window, data):
    """With and without the way of many committed rows: any rows of a tree, any of them pending."""
    generator = torch.Generator().manual_seed(rows * 100 + past)
    pending = rows + more
    query = torch.randn(HEADS, rows, 8, generator=generator)
    key = torch.randn(2, past + pending, 8, generator=generator)
    value = torch.randn(2, past + pending, 8, generator=generator)
    seen = data.draw(
        st.lists(
            st.lists(st.booleans(), min_size=pending, max_size=pending),
            min_size=rows,
            max_size=rows,
        )
    )
    visible = torch.tensor(seen)
    visible[:, more:] |= torch.eye(rows, dtype=torch.bool)
    visible &= torch.ones(rows, pending, dtype=torch.bool).tril(more)
    positions = past + torch.arange(pending)
    spec, tree = AttentionSpec(scaling=0.4, window=window), PendingTree(visible, positions)
    with mock.patch.object(attention, "GROUPED_FROM", 1000):
        together = attend_rows(query, key, value, spec, tree)
    with mock.patch.object(attention, "GROUPED_FROM", 1):
        apart = attend_rows(query, key, value, spec, tree)
    assert torch.allclose(apart, together, atol=1e-5)


def test_explicit_attention_is_the_same_in_blocks(monkeypatch):
    from offload_rt.attention import partial

    query, key, value = torch.randn(HEADS, 9, 8), torch.randn(2, 12, 8), torch.randn(2, 12, 8)
    spec = AttentionSpec(scaling=0.3, softcap=2.0)
    whole = attend_rows(query, key, value, spec)
    monkeypatch.setattr(partial, "SCORE_BYTES", HEADS * 12 * 4 * 2)
    monkeypatch.setattr(partial, "KEY_BLOCK", 5)
    assert torch.allclose(attend_rows(query, key, value, spec), whole, atol=1e-6)
