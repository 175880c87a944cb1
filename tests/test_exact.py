"""Row-invariant passes: a row's logits are the same bits, whatever the pass it is in.

Each measure that makes them so is switched off once and must be missed.
"""

import os
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import forks
import pytest
import quantised
import torch
from engines import engine_for
from expert_models import make_mixture
from gguf_files import write_gguf
from hybrids import HYBRIDS, make_short
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.llama import modeling_llama

from offload_rt.attention import exact as attention
from offload_rt.attention import rows as all_rows
from offload_rt.attention.blocks import PIECE
from offload_rt.attention.exact import PART, attend_exact
from offload_rt.attention.rows import attend_rows
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.config import DraftConfig, Exact, KVPlace, SamplingConfig
from offload_rt.device import system
from offload_rt.device.compiled import kept_in
from offload_rt.device.system import processor_flags
from offload_rt.errors import PlanError
from offload_rt.kernels import attending, products, registers, tiles
from offload_rt.kernels.tiles import evenly
from offload_rt.kv import offloaded, states
from offload_rt.kv.together import PackedRows
from offload_rt.model import exact, fits, network
from offload_rt.model import tiles as of_tiles
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats import packed
from offload_rt.model.locate import resolve_model
from offload_rt.runner.tree import ROOT, TokenTree
from offload_rt.sampling import target_probs

# Odd widths, more inputs than a block of oneDNN's, and heads whose groups fill no tile.
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 1419,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
# What kernels of our own multiply.
PACKED = SIZES | {"hidden_size": 1152, "intermediate_size": 1280, "head_dim": 64}
TEXT = [(i * 37 + 11) % 300 for i in range(150)]
TREE = TokenTree((9, 8, 7, 6, 5, 4, 3, 2), (ROOT, 0, 1, 0, 3, ROOT, 5, 4))


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(shared_cache, monkeypatch):
    """What is found of products here is kept from the user's, and once for this file."""
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(shared_cache))


@pytest.fixture
def own_cache(tmp_path, cache, monkeypatch):
    """What a test finds of products that it changed is not known to the next."""
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def short_parts(monkeypatch):
    """Parts that a short text has several of, and merges often."""
    monkeypatch.setattr(attention, "PART", PIECE)
    monkeypatch.setattr(offloaded, "PART", PIECE)
    monkeypatch.setattr(attention, "MERGE_AT", 2)


# --- attention -----------------------------------------------------------------------------------


def random_rows(rows, heads=6, kv_heads=2, dim=16, dtype=torch.bfloat16):
    made = torch.Generator().manual_seed(rows)
    shapes = ((heads, rows, dim), (kv_heads, rows, dim), (kv_heads, rows, dim))
    return [torch.randn(shape, generator=made).mul(2).to(dtype) for shape in shapes]


def cancelling_rows(rows, **sizes):
    """The same, but all of the last row's weights are equal and its values come to nothing."""
    query, key, value = random_rows_of(rows, **sizes)
    made = torch.Generator().manual_seed(0)
    half = value[:, : rows // 2] * 2.0 ** torch.randint(0, 16, (rows // 2, 1), generator=made)
    both = torch.cat([half, -half[:, torch.randperm(rows // 2, generator=made)]], 1)
    return query * 0, key, both.to(value.dtype)


def one_by_one(query, key, value, spec, places):
    """Each of these rows in a pass of its own."""
    return torch.cat(
        [
            attend_exact(query[:, i : i + 1], key[:, : i + 1], value[:, : i + 1], spec)
            for i in places
        ]
    )


def spec_of(**more):
    return AttentionSpec(scaling=0.3, exact=True, **more)


SPECS = [
    spec_of(),
    spec_of(window=50),
    spec_of(window=200, softcap=3.0),
    spec_of(sinks=torch.linspace(-1, 2, 6)),
]


IN_REGISTERS = [
    pytest.param(False, id="vectors"),
    pytest.param(
        True,
        id="registers",
        marks=pytest.mark.skipif(bool(registers.problem()), reason=registers.problem()),
    ),
]
NUMBERS = [
    (torch.bfloat16, 16),
    (torch.bfloat16, 96),
    (torch.float16, 64),
    (torch.float32, 16),
    (torch.float32, 64),
]
TAKEN = [
    *((300, spec, *numbers) for spec in range(len(SPECS)) for numbers in NUMBERS),
    *((70, *each) for each in zip(range(4), *zip(*NUMBERS[1:], strict=True), strict=True)),
]
TAKEN_IN_REGISTERS = [
    *((300, spec, torch.bfloat16, dim) for spec in range(len(SPECS)) for dim in (32, 96, 192)),
    (70, 0, torch.bfloat16, 128),
]


def attend_in_registers(on, monkeypatch):
    """Have attention in bf16 be that of matrix registers, or of vectors."""
    assert not on or not registers.problem()  # which asks the system for them
    monkeypatch.setattr(attending, "in_registers", lambda dtype: on and dtype is torch.bfloat16)


@pytest.mark.parametrize(
    ("cached", "spec", "dtype", "dim", "on"),
    [
        pytest.param(*each, *way.values, marks=way.marks)
        for taken, way in zip((TAKEN, TAKEN_IN_REGISTERS), IN_REGISTERS, strict=True)
        for each in taken
    ],
)
def test_attention_of_a_row_has_the_same_bits_in_any_pass(
    cached, spec, dtype, dim, on, short_parts, monkeypatch
):
    """Of the newest 66; every fifth of them alone, and those beside the ends of a tile."""
    attend_in_registers(on, monkeypatch)
    spec, (query, key, value) = SPECS[spec], random_rows(cached, dim=dim, dtype=dtype)
    places = [i for i in range(cached - 66, cached) if i % 5 == 0 or i % 16 in (0, 15)]
    at = [i - cached for i in places]
    for count in (1, 3):
        with threads(count):
            whole = attend_exact(query, key, value, spec)
            assert torch.equal(one_by_one(query, key, value, spec, places), whole[at])
            for rows in (1, 2, 5, 16, 33, 66):
                assert torch.equal(attend_exact(query[:, -rows:], key, value, spec), whole[-rows:])
    plain = AttentionSpec(
        **{n: getattr(spec, n) for n in ("scaling", "window", "softcap", "sinks")}
    )
    wide = [rows.double().float() for rows in (query, key, value)]
    expected = attend_rows(*wide, plain)[-66:]
    # Results are up to 8, where bf16 rounds by a 64th; the kernel rounds weights as well.
    near = 2e-5 if dtype is torch.float32 else 1.6e-2
    narrow = dtype is torch.bfloat16 and dim != 16
    assert torch.allclose(whole[-66:].float(), expected, atol=near, rtol=2**-8 if narrow else 0)


@pytest.mark.skipif(bool(registers.problem()), reason=registers.problem())
def test_matrix_registers_are_as_near_as_vectors(monkeypatch):
    """Other bits, and no larger errors; of 448 rows, which are taken in two goes, and of one."""
    query, key, value = random_rows(640, heads=7, kv_heads=1, dim=64)
    spec, errors, found = AttentionSpec(scaling=0.125, exact=True), [], []
    wide = (query.double() * 0.125, key.double(), value.double())
    scores = (wide[0][:, -64:] @ wide[1].mT).masked_fill(
        torch.ones(64, 640, dtype=torch.bool).triu(640 - 63), float("-inf")
    )
    expected = (scores.softmax(-1) @ wide[2]).transpose(0, 1)
    for on in (False, True):
        attend_in_registers(on, monkeypatch)
        with threads(1):
            rows = attend_exact(query[:, -64:], key, value, spec)
            alone = one_by_one(query, key, value, spec, range(576, 640, 9))
        assert torch.equal(rows[::9], alone)
        found.append(rows)
        errors.append((rows.double() - expected).square().mean().sqrt())
    assert not torch.equal(*found)
    assert errors[1] < 1.01 * errors[0] < 0.01


@pytest.mark.parametrize("on", IN_REGISTERS)
@pytest.mark.parametrize("dim", [16, 64])
def test_parts_of_usual_size_are_cut_alike(dim, on, monkeypatch):
    attend_in_registers(on, monkeypatch)
    query, key, value = random_rows(PART + 200, dim=dim)
    alone = one_by_one(query, key, value, SPECS[0], range(PART + 195, PART + 200))
    assert torch.equal(attend_exact(query[:, -70:], key, value, SPECS[0])[-5:], alone)
    assert torch.equal(attend_exact(query, key, value, SPECS[0])[-5:], alone)


random_rows_of = random_rows


@st.composite
def trees(draw_from):
    nodes = draw_from(st.integers(1, 24))
    deep = draw_from(st.booleans())
    return [draw_from(st.integers(max(ROOT, n - 2) if deep else ROOT, n - 1)) for n in range(nodes)]


def pending(parents, committed):
    """What each row of a tree sees, and where it is."""
    visible = torch.eye(len(parents), dtype=torch.bool)
    for row, parent in enumerate(parents):
        if parent != ROOT:
            visible[row] |= visible[parent]
    return PendingTree(visible, committed + visible.sum(1) - 1, parents)


def tree_bits(parents, committed, spec, dtype=torch.bfloat16, dim=16):
    """Rows of a tree, and the same as newest rows of the chains that are their paths."""
    tree = pending(parents, committed)
    query, key, value = random_rows(committed + len(parents), dim=dim, dtype=dtype)
    together = attend_exact(query[:, committed:], key, value, spec, tree)
    paths = []
    for row, seen in enumerate(tree.visible):
        path = [*range(committed), *(committed + seen.nonzero().flatten()).tolist()]
        own = query[:, committed + row : committed + row + 1]
        paths.append(attend_exact(own, key[:, path], value[:, path], spec))
    return together, torch.cat(paths)


@settings(deadline=None, max_examples=15)
@given(
    parents=trees(),
    committed=st.sampled_from([0, 5, 50, 63, 64, 190]),
    spec=st.integers(0, 3),
    dim=st.sampled_from([16, 64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_a_row_of_a_tree_has_the_bits_of_its_path(parents, committed, spec, dim, dtype):
    together, alone = tree_bits(parents, committed, SPECS[spec], dtype, dim)
    assert torch.equal(together, alone)


@pytest.mark.skipif(bool(registers.problem()), reason=registers.problem())
@settings(deadline=None, max_examples=15)
@example(  # a path that ends 63 rows behind its first, without two of them
    parents=[*range(ROOT, 60), 60, 60, 60], committed=0, spec=0, dim=64
)
@given(
    parents=trees(),
    committed=st.sampled_from([0, 5, 50, 63, 64, 190]),
    spec=st.integers(0, 3),
    dim=st.sampled_from([32, 64]),
)
def test_in_matrix_registers_too(parents, committed, spec, dim):
    with pytest.MonkeyPatch.context() as patch:
        attend_in_registers(True, patch)
        together, alone = tree_bits(parents, committed, SPECS[spec], dim=dim)
    assert torch.equal(together, alone)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 16), (torch.bfloat16, 64)])
def test_scattered_columns_of_a_tree_are_missed(dtype, dim, monkeypatch):
    def scattered(tree, committed, most):
        (group, *others) = real(tree, committed, most)
        assert not others
        pieces = group.piece.clone()
        for line, at in zip(pieces, group.at.tolist(), strict=True):
            line[: at + 1] = line[: at + 1].flip(0)  # all it sees, in another order
        return [replace(group, piece=pieces)]

    real = attention._groups_of_tree
    monkeypatch.setattr(attention, "_groups_of_tree", scattered)
    monkeypatch.setitem(globals(), "random_rows", cancelling_rows)
    assert not torch.equal(*tree_bits([ROOT, *range(39)], 24, SPECS[0], dtype, dim))


@pytest.mark.skipif(bool(attending.problem()), reason=f"no kernel: {attending.problem()}")
@pytest.mark.parametrize("on", IN_REGISTERS)
def test_numbers_that_are_none_stay_none_and_many_heads_are_shared(on, monkeypatch):
    """Of one KV head, of seven query heads each in three threads; a row that is broken shows."""
    attend_in_registers(on, monkeypatch)
    query, key, value = random_rows(130, heads=7, kv_heads=1, dim=32)
    spec = spec_of()
    with threads(3):
        whole = attend_exact(query, key, value, spec)
        query[3, -1, 5] = float("nan")
        broken = attend_exact(query[:, -2:], key, value, spec)
    assert torch.equal(broken[0], whole[-2])
    assert broken[1, 3].isnan().all()
    assert not broken[1, 2].isnan().any()


def test_every_number_is_in_a_whole_vector():
    for dtype in (torch.float32, torch.bfloat16):
        for size in (1, 63, 3 * 1419, 2**15 + 7, 3 * 2**15 + 100):
            numbers = torch.randn(size).to(dtype)
            for count in (1, 2, 3):
                with threads(count):
                    whole = torch.cat([evenly(torch.sigmoid, part) for part in numbers.split(1000)])
                    assert torch.equal(evenly(torch.sigmoid, numbers), whole)


# --- a network -----------------------------------------------------------------------------------


# Rows of a text that are computed one by one: of the first, those beside the ends of a tile of
# rows, of a chunk of a prompt, of a piece of keys, and the last. Each end is one of states, too.
WHOLE = 72
ENDS = 16, 48, 64
ALONE = (range(1, 3), *(range(end - 1, end + 1) for end in ENDS), range(WHOLE - 1, WHOLE))


def logits_of_passes(engine):
    """The same rows of a text in many ways: [S, V] each, of rows from some place on."""
    done = 0
    for places in ALONE:
        engine.forward([(0, TEXT[done : places.start])], reuse=not done)
        alone = [engine.forward([(0, [TEXT[i]])], reuse=False)[0].clone() for i in places]
        yield places.start, torch.stack(alone)
        done = places.stop
    yield from logits_of_larger_passes(engine)


def logits_of_larger_passes(engine):
    """The same without those of one row; the whole text was in the cache once."""
    for start, rows in ((40, 17), (7, 64), (5, 3), (0, WHOLE - 1)):
        go_back(engine, start)
        (logits,) = engine.check([(0, TEXT[start], TokenTree.chain(TEXT[start + 1 :][: rows - 1]))])
        engine._caches[0].truncate(start)
        yield start, logits.clone()
    engine.truncate(0, 0)
    yield WHOLE - 1, engine.forward([(0, TEXT[:WHOLE])], reuse=True).clone()
    engine.truncate(0, 0)
    both = engine.forward([(0, TEXT[:60]), (1, TEXT[70:95])], reuse=True).clone()
    yield 59, both[:1]
    tree = TokenTree((TEXT[61], 9, TEXT[62], 8, TEXT[63]), (ROOT, ROOT, 0, 0, 2))
    (logits, _) = engine.check([(0, TEXT[60], tree), (1, 7, TREE)])
    yield 60, logits[[0, 1, 3, 5]].clone()


def go_back(engine, length):
    """Have the text's first tokens in the cache; a recurrent state reads some of them again."""
    engine.truncate(0, length)
    if (kept := engine.kept_tokens(0)) < length:
        engine.forward([(0, TEXT[kept:length])], reuse=True)


def agree(engine):
    """Whether all of them have the bits of rows that were computed one by one."""
    return all_agree(logits_of_passes(engine))


def all_agree(passes):
    """Whether all rows are those of the largest pass, and the last one is as it was alone."""
    found = list(passes)
    largest = max((rows for start, rows in found if not start), key=len)
    alone = found[len(ALONE) - 1][1]
    whole = torch.cat([largest, alone[-1:]])
    assert len(whole) == WHOLE and whole.unique(dim=0).shape[0] > 50
    return all(torch.equal(rows, whole[start:][: len(rows)]) for start, rows in found)


def disagree(engine):
    """Whether `agree` would find another bit; it looks no further than to the first."""
    larger = list(logits_of_larger_passes(engine))
    assert max(rows.unique(dim=0).shape[0] for _, rows in larger) > 50
    engine.truncate(0, 0)
    for place, token in enumerate(TEXT[:WHOLE]):
        row = engine.forward([(0, [token])], reuse=not place)[0]
        inside = [rows[place - start] for start, rows in larger if 0 <= place - start < len(rows)]
        if place and not all(torch.equal(row, other) for other in inside):
            return True
    return False


@contextmanager
def engines(folder, **config):
    config = {"exact": Exact.ON, "prefill_chunk_tokens": 48} | config
    with ExitStack() as stack:
        made = engine_for(folder, prompts=(TEXT[:WHOLE], TEXT[:50]), tokens=60, **config)
        try:
            engine = stack.enter_context(made)
        except PlanError as refusal:  # as is right: torch's fp32 is MKL's, with several threads
            parallel = config.get("threads", torch.get_num_threads()) > 1
            wide = open_checkpoint(folder).config.dtype == "float32" and parallel
            if wide and "amx_bf16" in processor_flags() and "of 512 rows" in str(refusal):
                pytest.skip(f"this processor's library: {refusal}")
            raise
        yield engine


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_row_has_the_same_logits_in_any_pass(dtype, count, make_tiny, monkeypatch):
    with engines(make_tiny("llama", **SIZES, dtype=dtype), threads=count) as engine:
        assert engine.exact.on
        assert agree(engine)


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_other_families_too(family, make_tiny, short_parts):
    window = {"head_dim": 32, "sliding_window": 40, "pad_token_id": 0}
    with engines(make_tiny(family, **(SIZES | window), dtype="bfloat16"), threads=2) as engine:
        assert engine.exact.on
        assert agree(engine)


# Two kinds of states, with experts, bare activations, gates and routers; experts alone, whose
# weights lie the other way round.
ALIKE = {"qwen3_next-dense", "qwen3_5_moe", "bamba"}  # of a state and experts that others have
KEPT_OTHERWISE = [(n, "bfloat16", 1) for n in HYBRIDS if n not in ALIKE | {"qwen3_next"}]
KEPT_OTHERWISE += [
    ("qwen3_next", "bfloat16", 3),
    ("qwen3_next", "float32", 3),
    ("gpt_oss", "bfloat16", 1),
]


def make_other(make_tiny, name, dtype):
    """With one layer of each kind, where a family lets one choose."""
    if name in HYBRIDS:
        return make_short(make_tiny, name, dtype=dtype)
    return make_mixture(make_tiny, name, dtype=dtype, num_hidden_layers=2)


@pytest.mark.parametrize(("name", "dtype", "count"), KEPT_OTHERWISE)
def test_states_and_experts_too(name, dtype, count, make_tiny):
    streamed = {"resident_layers": 0, "slots": 1}
    with engines(make_other(make_tiny, name, dtype), threads=count, **streamed) as engine:
        assert engine.exact.on
        assert agree(engine)


STREAMED = {"resident_layers": 1, "slots": 1}
ON_DISK = STREAMED | {"kv": KVPlace.DISK, "kv_block_tokens": 24}


@pytest.fixture(scope="module")
def on_the_device():
    """Logits of passes of a model that was all there, by its folder."""
    return {}


@pytest.mark.parametrize(
    ("sizes", "config"),
    [(SIZES, STREAMED), (SIZES, ON_DISK), (SIZES, {"prefill_chunk_tokens": 7}), (PACKED, STREAMED)],
)
def test_where_things_are_changes_no_bit(sizes, config, make_tiny, short_parts, on_the_device):
    folder = make_tiny("llama", **sizes, dtype="bfloat16")
    if folder not in on_the_device:
        with engines(folder) as engine:
            on_the_device[folder] = list(logits_of_passes(engine))
    expected = on_the_device[folder]
    with engines(folder, **config) as engine:
        found = list(logits_of_passes(engine))
    assert all_agree(found)
    for (_, one), (_, other) in zip(expected, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_without_bf16_instructions(dtype, make_tiny, own_cache, short_parts, monkeypatch):
    """Products in fp32 blocks, attention written out."""
    monkeypatch.setattr("offload_rt.model.formats.wide.processor", lambda: ("some", ""))
    monkeypatch.setattr(products, "problem", always("the processor has no AVX-512 BF16"))
    monkeypatch.setattr(attending, "products_problem", products.problem)
    attending.problem.cache_clear()
    try:
        assert not attending.takes(getattr(torch, dtype), 64, 64)
        folder = make_tiny("llama", **(SIZES | {"head_dim": 64}), dtype=dtype)
        with engines(folder) as engine:
            assert engine.exact.on
            assert agree(engine)
    finally:
        attending.problem.cache_clear()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("qwen3_next-dense", quantised.compressed_tensors(4, 32)),
        ("qwen3_5", quantised.fp8((32, 32))),
    ],
    ids=["four bits", "fp8"],
)
def test_quantised_weights_beside_states(name, how, make_tiny, tmp_path):
    """The plain model of the same numbers, resident and streamed, with every draft rolled back."""
    source = make_other(make_tiny, name, "bfloat16")
    pair = quantised.write_twins(source, tmp_path, *how, dtype=torch.bfloat16)

    def logits(engine):
        engine.forward([(0, TEXT[:WHOLE])], reuse=True)
        return list(logits_of_larger_passes(engine))

    with engines(pair.plain) as engine:
        expected = logits(engine)
    whole = expected[3][1]
    assert all(torch.equal(rows, whole[start:][: len(rows)]) for start, rows in expected[:3])
    for config in ({}, STREAMED):
        with engines(pair.folder, **config) as engine:
            assert engine.exact.on
            assert engine.network.dequantises
            for (_, one), (_, other) in zip(expected, logits(engine), strict=True):
                assert torch.equal(one, other)


def no_tiles(forward, rows, **_):
    return forward(rows)


def inexact(query, key, value, spec, tree=None):
    plain = AttentionSpec(scaling=spec.scaling, window=spec.window, softcap=spec.softcap)
    return attend_rows(query, key, value, plain, tree)


def always(value):
    return lambda *_, **__: value


def untouched(_, function, types, args=(), kwargs=None):
    return function(*args, **kwargs or {})


UNSEEN = (exact, "unlike_product", always(""))  # not found when the model is loaded
UNSEEN_ATTENTION = (exact, "unlike_attention", always(""))
MEASURES = {
    "tiles": [(exact, "in_tiles", no_tiles), UNSEEN],
    "bare products": [(exact.Regular, "__torch_function__", untouched)],
    "bare activations": [(exact, "_UNEVEN", frozenset())],
    "pieces": [(states.MixerStates, "_padded", lambda _, rows: rows)],
    "vectors": [(exact, "evenly", no_tiles)],
    "attention": [(all_rows, "attend_exact", inexact), (PackedRows, "of", always(None))],
    "query rows": [(attention, "TILE", 1), (attending, "takes", always(False)), UNSEEN_ATTENTION],
    "blocks": [
        (packed, "blocks_of", lambda inputs, outputs, tile: products.blocks_of(inputs, outputs)),
        (network, "unlike_when_packed", always(frozenset())),
    ],
}


def switch_off(measure, monkeypatch):
    monkeypatch.setattr(fits, "_looks", {})  # what is seen without it is not known to other tests
    for place, name, value in MEASURES[measure]:
        monkeypatch.setattr(place, name, value)


MUTANTS = [("tiles", "float32"), ("vectors", "float32"), ("query rows", "float32")]
MUTANTS += [("attention", "float32"), ("attention", "bfloat16")]


@pytest.mark.parametrize(("measure", "dtype"), MUTANTS)
def test_each_measure_is_missed(measure, dtype, make_tiny, own_cache, monkeypatch):
    folder = make_tiny("llama", **SIZES, dtype=dtype)
    switch_off(measure, monkeypatch)
    with engines(folder, threads=3) as engine:
        assert disagree(engine)


@pytest.mark.parametrize("even", [True, False])
def test_powers_that_are_no_products_are_computed_in_whole_vectors(even, monkeypatch):
    """1.7, as some families have it, and 2 to the power of numbers; squares stay as they are."""
    if not even:
        monkeypatch.setattr(exact, "_UNEVEN", frozenset())
        monkeypatch.setattr(exact, "_POWERS", frozenset())
    seen, real = [], exact.evenly
    monkeypatch.setattr(exact, "evenly", lambda f, numbers: seen.append(f) or real(f, numbers))
    numbers = torch.rand(64 * 1419) + 0.5
    for power in (lambda n: n.pow(1.7), lambda n: n**1.7, lambda n: 2.0**n):
        with threads(1), exact.Regular():
            parts = torch.cat([power(part) for part in numbers.split(1419)])
            assert torch.equal(power(numbers), parts) is even
    assert bool(seen) is even
    count = len(seen)
    with exact.Regular():
        numbers.pow(2), numbers**0.5, torch.pow(numbers, exponent=3)
    assert len(seen) == count


@pytest.mark.parametrize("changed", [[], [(of_tiles, "attend_exact", inexact)]])
def test_attention_is_compared_when_a_model_is_loaded(changed, make_tiny, own_cache, monkeypatch):
    """Written out, it rests on torch's products; what is alike is not compared again."""
    monkeypatch.setattr(attending, "takes", always(False))
    for place, name, value in changed:
        monkeypatch.setattr(place, name, value)
    folder, found = make_tiny("llama", **SIZES, dtype="float32"), []
    real = exact.unlike_attention
    monkeypatch.setattr(exact, "unlike_attention", lambda *a: found.append(a[0]) or real(*a))
    for _ in range(2):
        with engine_for(folder, exact=Exact.AUTO, threads=1, **STREAMED) as engine:
            assert engine.exact.on is not bool(changed)
            assert not changed or "attention of 6 heads of 32 has other bits" in engine.exact.why
    assert found == [(6, 2, 32, 32)] * (1 + len(changed))


OTHER_MUTANTS = [
    ("bare products", "mixtral", "float32"),
    ("bare activations", "qwen3_next", "float32"),
    ("pieces", "qwen3_next", "float32"),
]


@pytest.mark.parametrize(("measure", "name", "dtype"), OTHER_MUTANTS)
def test_each_measure_for_states_and_experts_is_missed(
    measure, name, dtype, make_tiny, monkeypatch
):
    switch_off(measure, monkeypatch)
    with engines(make_other(make_tiny, name, dtype), threads=3) as engine:
        assert disagree(engine)


@pytest.mark.skipif(bool(products.problem()), reason=f"torch multiplies: {products.problem()}")
def test_few_outputs_are_computed_tile_by_tile(monkeypatch):
    assert not exact.unlike_product(64, 4, torch.bfloat16, torch.nn.functional.linear)
    monkeypatch.setattr(exact, "FEW_OUTPUTS", 0)
    monkeypatch.setattr(tiles, "goes_by_count", always(False))
    assert exact.unlike_product(64, 4, torch.bfloat16, torch.nn.functional.linear)


def test_a_product_is_compared_with_all_its_outputs(own_cache, tmp_path, monkeypatch):
    """Or with as many as fit, which is kept with what was found."""
    monkeypatch.setattr(exact, "_COMPARED_NUMBERS", 2**16)
    linear, bf16 = torch.nn.functional.linear, torch.bfloat16

    def product(rows, weight, bias):
        return linear(rows, weight) + (len(weight) > 1024 and len(rows) > 32)

    assert not exact.unlike_product(128, 1024, bf16, product)
    assert "other bits in passes of" in exact.unlike_product(128, 1088, bf16, product)
    assert not exact.unlike_product(128, 1088, bf16, product, 1024)
    for limit, count in ((2**20, 512), (3 * 2**20, 832), (2**30, 1088)):
        assert exact._outputs_within(128, 1088, bf16, limit) == count
        found = exact._compared([(128, 1088)], bf16, product, limit)
        assert bool(found) is (count == 1088)
        kept = exact._read(tmp_path / "cache" / "exact.json")
        assert found or kept[-1].endswith(f"128 by 1088, {count} compared, 1 tiles at once")
    assert exact._compared([(64, 64), (128, 1088)], bf16, product, 2**30)
    kept = exact._read(tmp_path / "cache" / "exact.json")
    assert kept[-1].endswith("64 by 64, 64 compared, 1 tiles at once")  # before what differs


@pytest.mark.parametrize(
    ("flag", "limit", "dtype", "given"),
    [
        ("amx_bf16", None, "bfloat16", [16, 16, 16]),
        ("amx_bf16", "AVX512_CORE_AMX", "bfloat16", [16, 16, 16]),
        ("amx_bf16", "AVX512_CORE_BF16", "bfloat16", [48]),
        ("amx_bf16", "avx2", "bfloat16", [48]),
        ("amx_bf16", "", "bfloat16", [16, 16, 16]),
        ("amx_bf16", "no such word", "bfloat16", [16, 16, 16]),
        ("amx_bf16", None, "float16", [48]),
        ("amx_fp16", None, "float16", [16, 16, 16]),
        ("avx512_bf16", None, "bfloat16", [48]),
    ],
)
def test_with_matrix_registers_each_tile_is_a_product(flag, limit, dtype, given, monkeypatch):
    has_matrix_registers(monkeypatch, flag)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    rows, seen = torch.randn(40, 8).to(getattr(torch, dtype)), []
    made = tiles.in_tiles(lambda tile: seen.append(len(tile)) or tile + 1, rows)
    assert seen == given
    assert torch.equal(made, rows + 1)
    tiles.in_tiles(lambda tile: seen.append(len(tile)) or tile, rows.to("meta"))
    assert seen == [*given, 48]  # another device has its own kernels


@pytest.mark.skipif(bool(products.problem()), reason=f"torch multiplies: {products.problem()}")
def test_matrices_that_no_module_has_are_multiplied_by_the_same_kernel(monkeypatch):
    """As those of experts; in other formats, and where they do not lie row by row, by torch."""
    rows, weight = torch.randn(5, 128).bfloat16(), torch.randn(192, 128).bfloat16()
    bias, asked = torch.randn(192).bfloat16(), []
    of = 128, 192, torch.bfloat16, torch.device("cpu")
    plain = exact.plain_for(*of, exact=True)
    assert plain is not None and exact.plain_for(*of, exact=True) is plain

    def plain_for(*shape, **_):
        return lambda *given: asked.append(shape[:2]) or plain(*given)

    monkeypatch.setattr(exact, "plain_for", plain_for)
    linear = torch.nn.functional.linear
    with exact.Regular():
        made = linear(rows, weight, bias), linear(rows, weight, bias=bias), linear(rows, weight)
        assert asked == [(128, 192)] * 3
        linear(rows, weight.t().contiguous().t())
        linear(rows.float(), weight.float())
    assert len(asked) == 3
    assert torch.equal(made[0], plain(rows, weight, bias)) and torch.equal(made[0], made[1])
    assert torch.equal(made[2], plain(rows, weight, None))


def has_matrix_registers(monkeypatch, flag="amx_bf16"):
    monkeypatch.setattr(system, "processor_flags", lambda: frozenset({flag}))
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def by_count_above(limit):
    """A product that computes as many rows as `limit` in one way, and more in another."""
    linear = torch.nn.functional.linear

    def product(rows, weight, bias):
        made = linear(rows.double(), weight.double(), bias)
        return (made if len(rows) <= limit else made + 1e-3).to(rows.dtype)

    return product


@pytest.mark.parametrize(
    ("limit", "given", "kept"),
    [(32, [32, 16], "2 tiles at once"), (16, [16] * 3, "1 tiles at once")],
)
def test_two_tiles_are_a_product_where_their_bits_are_those_of_two(
    limit, given, kept, own_cache, tmp_path, monkeypatch
):
    has_matrix_registers(monkeypatch)
    monkeypatch.setattr(tiles, "_IN_PAIRS", set())
    product, bf16 = by_count_above(limit), torch.bfloat16
    monkeypatch.setattr(torch.nn.functional, "linear", product)
    rows, seen = torch.randn(40, 64).to(bf16), []
    for times in (1, 2):  # compared, then found among what was kept
        assert not exact._compared([(64, 96)], bf16, product, 2**30)
        tiles.in_tiles(lambda part: seen.append(len(part)) or part, rows, outputs=96)
        assert seen == given * times
        monkeypatch.setattr(tiles, "_IN_PAIRS", set())
        assert exact._read(tmp_path / "cache" / "exact.json")[0].endswith(
            f"64 by 96, 96 compared, {kept}"
        )


WITH_MATRIX_REGISTERS = """
import json, sys
from itertools import pairwise
from engines import engine_for, generate
from test_exact import NGRAMS, STREAMED, TEXT, WHOLE, agree, engines
from offload_rt.config import Exact
from offload_rt.device.system import takes_matrix_registers
from offload_rt.model.formats.wired import WiredLinear
assert takes_matrix_registers("bfloat16")
dense, mixture, *stored = sys.argv[1:]
with engine_for(dense, prompts=[TEXT], tokens=60, exact=Exact.ON, prefill_chunk_tokens=192) as one:
    seen, text = set(), TEXT + TEXT[:42]
    for count in (1, 17, 48, 64, 192):
        one.forget()
        for start, stop in pairwise([0, *range(170 if count == 1 else count, 192, count), 192]):
            rows = one.forward([(0, text[start:stop])], reuse=not start)
        seen.add(str(rows.float().tolist()))
    print("passes", len(seen) == 1)
with engines(mixture, **STREAMED) as made:
    print("rows", made.exact.on and agree(made))
texts = []
for draft in ({}, {"draft": NGRAMS}):
    with engine_for(dense, tokens=24, exact=Exact.ON, **STREAMED, **draft) as made:
        texts.append(generate(made, tokens=24))
print("drafted", texts[0] == texts[1])
for name, folder, plain in zip(*[iter(stored)] * 3):
    logits, linears = [], []
    for each in (plain, folder):
        with engines(each, dtype="bfloat16", **STREAMED) as made:
            logits.append(made.forward([(0, TEXT[:WHOLE])], reuse=True).clone())
            made.truncate(0, 0)
            same = each == plain or agree(made)
            modules = [m for layer in made.network._layers for m in layer.modules()]
            linears += [m._direct is not None for m in modules if isinstance(m, WiredLinear)]
    print(name, same and len(linears) == 14 and all(linears) and logits[0].equal(logits[1]))
"""
NGRAMS = DraftConfig(draft="ngram", draft_tokens=40)


@pytest.mark.skipif("amx_bf16" not in processor_flags(), reason="no matrix registers of bf16")
def test_a_row_has_the_same_logits_with_matrix_registers(make_tiny, tmp_path):
    """In a process of its own: the others' oneDNN is kept from them (`conftest.py`).

    Weights as they are stored have the bits of plain ones of the same numbers.
    """
    environment = {n: v for n, v in os.environ.items() if not n.endswith("_MAX_CPU_ISA")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    environment |= {"NUMBA_CACHE_DIR": str(folder)} if (folder := kept_in()) else {}
    # Of 1,152 by 192 a product of 192 rows has other bits than one of 144 (a Xeon, torch 2.14.1).
    sizes = SIZES | {"hidden_size": 1152, "intermediate_size": 192, "head_dim": 32}
    dense = make_tiny("llama", **sizes, dtype="bfloat16")
    mixture = make_mixture(make_tiny, "mixtral", **sizes, dtype="bfloat16")
    blocks = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    source = make_tiny("llama", **SIZES | blocks, dtype="bfloat16")
    twins = quantised.write_twins(
        source, tmp_path / "gptq", *quantised.gptq(4, 32), dtype=torch.bfloat16
    )
    file, plain = write_gguf(source, tmp_path / "gguf" / "tiny.gguf", {"proj": "Q4_K"})
    stored = ["gptq", twins.folder, twins.plain, "q4_k", resolve_model(str(file)), plain]
    words = [sys.executable, "-c", WITH_MATRIX_REGISTERS, dense, mixture, *stored]
    made = forks.run(words, env=environment)
    assert made.returncode == 0, made.stderr
    found = made.stdout.splitlines()
    assert found == [f"{name} True" for name in ("passes", "rows", "drafted", "gptq", "q4_k")]


@pytest.mark.skipif(
    bool(products.problem()) or tiles.goes_by_count(torch.bfloat16),
    reason=f"no kernels that read a reordered matrix: {products.problem()}",
)
def test_the_order_of_sums_of_few_rows_is_missed(make_tiny, own_cache, monkeypatch):
    folder = make_tiny("llama", **PACKED, dtype="bfloat16")
    with engines(folder) as engine:
        linear = engine.network._layers[0].mlp.down_proj
        assert linear.exact
        assert linear.product is not None
        assert agree(engine)
    switch_off("blocks", monkeypatch)
    with engines(folder) as engine:
        assert disagree(engine)


def test_merging_by_counts_is_missed(make_tiny, short_parts, monkeypatch):
    folder = make_tiny("llama", **SIZES, dtype="float32")
    blocks = offloaded.OffloadedKV._attend_by_blocks
    monkeypatch.setattr(offloaded.OffloadedKV, "_attend_exactly", blocks)
    with engines(folder, **ON_DISK) as engine:
        assert disagree(engine)


# --- sampling ------------------------------------------------------------------------------------


def test_a_probability_is_the_same_in_any_number_of_rows():
    logits = torch.randn(5, 2**17 + 3) * 4
    sampling = SamplingConfig(temperature=0.7, seed=1)
    with threads(3):
        together = target_probs(logits, sampling)
        alone = torch.cat([target_probs(row[None], sampling) for row in logits])
    assert torch.equal(together, alone)


# --- who decides ---------------------------------------------------------------------------------


def test_auto_is_on_where_something_streams_or_drafts(make_tiny):
    folder, auto = make_tiny("llama"), {"exact": Exact.AUTO}
    with engine_for(folder, **auto) as engine:
        assert engine.exact.why == "all is on the device and nobody drafts"
        assert not engine.network.exact
    with engine_for(folder, repeats=True, **auto) as engine:
        assert engine.exact.on  # to be compared with an engine where somebody drafts
    with engine_for(folder, exact=Exact.OFF, **STREAMED) as engine:
        assert engine.exact.why == "--exact off"
    for more in (STREAMED, {"draft": DraftConfig(draft="ngram", draft_tokens=4)}):
        with engine_for(folder, **auto, **more) as engine:
            assert (engine.exact.rows, engine.exact.key_block) == (tiles.ROW_TILE, PIECE)
    with engine_for(make_mixture(make_tiny), expert_slots=8, **auto) as engine:
        assert engine.placement.streams and not engine.placement.streamed and engine.exact.on


def test_what_cannot_be_exact_says_why(make_tiny, own_cache, monkeypatch):
    monkeypatch.setattr(exact, "in_tiles", no_tiles)
    streamed, folder = {"exact": Exact.AUTO} | STREAMED, make_tiny("llama", dtype="float32")
    with engine_for(folder, **streamed) as engine:
        assert "has other bits in passes of" in engine.exact.why
        assert not engine.network.exact
    refusal = pytest.raises(PlanError, match="as a product of .* has other bits")
    with refusal as refused, engine_for(folder, exact=Exact.ON):
        pass
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    ("compute", "why"),
    [
        (lambda hidden: hidden @ hidden.transpose(1, 2) @ hidden, "matmul multiplies outside"),
        (lambda hidden: hidden.clone().sigmoid_(), "sigmoid_ works in place"),
        (lambda hidden: hidden**hidden, "pow takes exponents from a tensor"),
        (lambda hidden: torch.pow(2.0, hidden), "pow takes exponents from a tensor"),
    ],
)
def test_what_nobody_cares_for_is_seen(compute, why, make_tiny, monkeypatch):
    def forward(norm, hidden):
        return compute(real(norm, hidden))

    real = modeling_llama.LlamaRMSNorm.forward
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(fits, "_looks", {})
    with engine_for(make_tiny("llama"), exact=Exact.AUTO, **STREAMED) as engine:
        assert why in engine.exact.why


def test_squares_in_place_are_no_matter(make_tiny, monkeypatch):
    def forward(norm, hidden):
        return hidden.clone().pow_(2)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(fits, "_looks", {})
    with engine_for(make_tiny("llama"), exact=Exact.AUTO, **STREAMED) as engine:
        assert engine.exact.on


def test_registers_multiply_no_fp16(own_cache, monkeypatch):
    has_matrix_registers(monkeypatch, "amx_fp16")
    monkeypatch.setattr(exact, "multiplies_in_registers", always(True))
    assert not exact._compared([(64, 64)], torch.float16, torch.nn.functional.linear, 2**30)


def test_what_was_alike_is_not_compared_again(make_tiny, own_cache, monkeypatch):
    folder, compared = make_tiny("llama"), []
    real = exact.unlike_product
    monkeypatch.setattr(exact, "unlike_product", lambda *a: compared.append(a) or real(*a))
    for _ in range(2):
        with engine_for(folder, exact=Exact.AUTO, **STREAMED) as engine:
            assert engine.exact.on
    assert len(compared) == len(set(compared)) > 2


def test_drafts_keep_the_fast_path(make_tiny):
    folder = make_tiny("llama")
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=4)
    with engine_for(folder, draft=draft, exact=Exact.AUTO) as engine:
        assert engine.exact.on
        assert not engine._draft_model.network.exact
