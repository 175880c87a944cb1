"""Several sequences in one pass: one call a layer, and for each the bits it has alone."""

import pytest
import torch
from engines import engine_for
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_exact import IN_REGISTERS, SPECS, TEXT, attend_in_registers, pending, threads, trees
from test_kv import device  # noqa: F401 - a fixture
from test_lean import FAMILIES, WIDE

from offload_rt.config import Exact
from offload_rt.kernels import assembling, attending
from offload_rt.kv.base import KVShape
from offload_rt.kv.passing import PassingKV
from offload_rt.kv.pool import KVPool
from offload_rt.kv.resident import ResidentKV
from offload_rt.kv.together import PackedRows
from offload_rt.runner.tree import ROOT, TokenTree

pytestmark = pytest.mark.skipif(
    bool(attending.problem()), reason=f"no kernel: {attending.problem()}"
)
HEADS = 6
SHAPES = [KVShape(heads=2, key_dim=64, value_dim=32), KVShape(heads=1, key_dim=32, value_dim=32)]


def rows_of(number, layer, count, dtype):
    """Queries [H, S, D], keys [K, S, D] and values of a sequence."""
    shape, made = SHAPES[layer], torch.Generator().manual_seed(100 * number + layer)
    sizes = (HEADS, shape.key_dim), (shape.heads, shape.key_dim), (shape.heads, shape.value_dim)
    return [torch.randn(n, count, dim, generator=made).mul(2).to(dtype) for n, dim in sizes]


class Sequence:
    """Rows of a sequence: some committed, some pending, and the newest ones that attend."""

    def __init__(self, number, committed, before, rows, parents, dtype):
        count = committed + before + rows
        self.rows = [rows_of(number, layer, count, dtype) for layer in range(len(SHAPES))]
        self.committed, self.there, self.count, self.tree = (
            committed,
            committed + before,
            rows,
            None,
        )
        if parents is not None:
            whole = pending(parents, committed)
            self.tree = type(whole)(whole.visible[before:], whole.positions, whole.parents)

    def fill(self, cache):
        for layer, (_, key, value) in enumerate(self.rows):
            cache.append(layer, key[:, : self.committed], value[:, : self.committed])
        cache.commit(range(self.committed))
        for layer, (_, key, value) in enumerate(self.rows):
            pair = (rows[:, self.committed : self.there] for rows in (key, value))
            cache.append(layer, *pair)

    def new(self, layer):
        return [rows[:, self.there :] for rows in self.rows[layer]]

    def attend(self, cache, layer, spec):
        query, key, value = self.new(layer)
        cache.append(layer, key, value)
        return cache.attend(layer, query, spec, self.tree)


@st.composite
def sequences(draw):
    """Chains of one row and of more, and trees whose first rows came in an earlier pass."""
    found = []
    for _ in range(draw(st.integers(1, 5))):
        committed = draw(st.sampled_from([0, 5, 63, 64, 130, 300]))
        if draw(st.booleans()):
            found.append((committed, 0, draw(st.sampled_from([1, 1, 3, 70])), None))
        else:
            parents = draw(trees())
            before = draw(st.integers(0, len(parents) - 1))
            found.append((committed, before, len(parents) - before, parents))
    return found


def stored(cache, layer):
    rows = cache.rows_of(layer)
    return cache._keys[layer][:, :rows], cache._values[layer][:, :rows]


@pytest.mark.parametrize("on", IN_REGISTERS)
@settings(deadline=None, max_examples=40)
@example(  # rows of the first piece and of the second take turns
    given=[(63, 0, 5, [ROOT, 0, ROOT, 1, 2]), (5, 0, 1, None)],
    spec=0,
    dtype=torch.bfloat16,
    count=1,
)
@given(
    given=sequences(),
    spec=st.integers(0, len(SPECS) - 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    count=st.sampled_from([1, 3]),
)
def test_each_sequence_has_the_bits_it_has_alone(
    device,  # noqa: F811
    given,
    spec,
    dtype,
    count,
    on,
):
    with pytest.MonkeyPatch.context() as patch:
        attend_in_registers(on, patch)
        each_alone(device, given, spec, torch.bfloat16 if on else dtype, count)


def each_alone(device, given, spec, dtype, count):  # noqa: F811
    some = [Sequence(number, *one, dtype) for number, one in enumerate(given)]
    room = [one.there + one.count for one in some]
    pool = KVPool(device, SHAPES, dtype, rows=sum(room), sequences=len(some))
    caches = [ResidentKV(device, SHAPES, dtype, rows) for rows in room]
    for index, one in enumerate(some):
        pool.resize(index, room[index])
        one.fill(caches[index])
        one.fill(pool.caches[index])
    ends = [sum(one.count for one in some[:n]) for n in range(len(some) + 1)]
    cuts = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
    parts = list(zip(pool.caches, cuts, (one.tree for one in some), strict=True))
    packed = PackedRows.of(0, parts)
    for layer in range(len(SHAPES)):
        own = SPECS[spec] if layer else SPECS[0]  # layers with a window and without
        with threads(1):
            alone = [one.attend(cache, layer, own) for one, cache in zip(some, caches, strict=True)]
        rows = [torch.cat(part, 1) for part in zip(*(one.new(layer) for one in some), strict=True)]
        with threads(count):
            assert torch.equal(packed.attend(layer, *rows, own), torch.cat(alone))
        for cache, other in zip(caches, pool.caches, strict=True):
            pairs = zip(stored(cache, layer), stored(other, layer), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)
    for cache, other in zip(caches, pool.caches, strict=True):
        assert cache.rows_before() == other.rows_before()


@pytest.mark.parametrize("count", [1, 64])
def test_a_layer_is_one_call_for_any_number_of_sequences(device, count, monkeypatch):  # noqa: F811
    some = [Sequence(number, number, 0, 1, None, torch.bfloat16) for number in range(count)]
    caches = [ResidentKV(device, SHAPES, torch.bfloat16, count) for _ in some]
    for one, cache in zip(some, caches, strict=True):
        one.fill(cache)
    packed = PackedRows.of(0, [(c, slice(n, n + 1), None) for n, c in enumerate(caches)])
    calls, real = [], assembling.together
    monkeypatch.setattr(assembling, "together", lambda *given: calls.append(0) or real(*given))
    for layer in range(len(SHAPES)):
        rows = [torch.cat(part, 1) for part in zip(*(one.new(layer) for one in some), strict=True)]
        packed.attend(layer, *rows, SPECS[0])
        assert len(calls) == layer + 1


def test_what_cannot_be_packed_is_left_to_each_cache(device):  # noqa: F811
    """No room, which is said where rows are appended; twice the same; another kind."""
    one, other = (ResidentKV(device, SHAPES, torch.bfloat16, 4) for _ in range(2))
    passing = PassingKV(device, SHAPES, torch.bfloat16, 4)
    assert PackedRows.of(0, [(one, slice(0, 4), None), (other, slice(4, 8), None)])
    assert PackedRows.of(0, [(one, slice(0, 5), None), (other, slice(5, 6), None)]) is None
    assert PackedRows.of(0, [(one, slice(0, 1), None), (one, slice(1, 2), None)]) is None
    assert PackedRows.of(0, [(one, slice(0, 1), None), (passing, slice(1, 2), None)]) is None


# --- a network -----------------------------------------------------------------------------------

LENGTHS = (100, 63, 64, 5, 30)
DRAFTS = (
    TokenTree((), ()),
    TokenTree.chain([5, 9, 200, 31]),
    TokenTree((5, 9, 200, 31, 7), (ROOT, ROOT, 0, 0, 1)),
    TokenTree((), ()),
    TokenTree((8, 7), (ROOT, ROOT)),
)
WAYS = [("qwen2", {}), ("qwen2", {"resident_layers": 1, "slots": 1}), ("mistral", {})]


def passes(engine, indices, left=()):
    """Logits of prompts and of drafts behind them, of each sequence."""
    for index in indices:
        engine.truncate(index, 0)
    engine.leave_with(lambda _: False)
    read = engine.forward([(i, TEXT[: LENGTHS[i]]) for i in indices], reuse=True).clone()
    layers = []
    engine.poll_with(lambda: layers.append(0))
    engine.leave_with(lambda index: index in left and len(layers) > 1)
    checked = engine.check([(index, 7, DRAFTS[index]) for index in indices])
    return [torch.cat([row[None], rows]) for row, rows in zip(read, checked, strict=True)]


@pytest.mark.parametrize(("family", "config"), WAYS)
def test_logits_of_a_sequence_are_those_it_has_alone(family, config, make_tiny):
    """Prompts in chunks of 48 rows, whose borders are within sequences; two leave in a pass."""
    folder = make_tiny(family, **WIDE, **FAMILIES[family])
    config = {"exact": Exact.ON, "prefill_chunk_tokens": 48, **config}
    prompts = [TEXT[:length] for length in LENGTHS]
    with engine_for(folder, prompts=prompts, **config) as engine:
        alone = [passes(engine, [index])[0] for index in range(len(LENGTHS))]
        for order in (range(len(LENGTHS)), (3, 0, 2)):
            together = passes(engine, list(order))
            assert all(torch.equal(alone[i], rows) for i, rows in zip(order, together, strict=True))
        left = passes(engine, range(len(LENGTHS)), left={1, 3})
        assert all(torch.equal(alone[i], left[i]) for i in (0, 2, 4))
        assert not torch.equal(alone[1], left[1])
