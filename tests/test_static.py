"""Law 7: a replayed pass equals an eager one; and law 5 for the cache that it works on."""

import random

import pytest
import recorded
import torch
from engines import PROMPT, engine_for, generate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv import CAPACITY, HEADS, SHAPES, contents, histories, plain_attention, rows_for
from test_speculation import IDS, trees
from tiny import DEEP
from torch.fx.experimental.proxy_tensor import make_fx

from offload_rt.attention.rows import attend_rows
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.config import DraftConfig, GenerationConfig, HomeKind, SamplingConfig
from offload_rt.device.cpu import CpuDevice
from offload_rt.engine import Run
from offload_rt.kv import static
from offload_rt.kv.resident import ResidentKV
from offload_rt.kv.static import StaticKV, StaticRows, StaticShape, unpack_words, visible_words
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.runner import static as runner_static
from offload_rt.runner.loading import load_drafting
from offload_rt.runner.runner import Rows
from offload_rt.runner.tree import ROOT, TokenTree
from offload_rt.sampling import make_generator

FLOOR = 4


@pytest.fixture(scope="module")
def device():
    device = CpuDevice(readers=1)
    yield device
    device.close()


def upload(values):
    return torch.tensor(list(values), dtype=torch.int64)


def static_over(cache, rows, parents, places, width):
    """The cache of a pass: these rows are the newest of those that are pending."""
    before = cache.rows_before()
    words = upload(visible_words(parents, rows, width)).view(rows, -1)
    spare = [0] * (width - len(places))
    return StaticKV(
        cache,
        StaticShape.of(before, rows, width),
        StaticRows(
            at=before.committed + before.pending + torch.arange(rows),
            committed=upload([before.committed]),
            visible=unpack_words(words, width),
            places=upload([*places, *spare]),
        ),
    )


# --- the cache -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(history=histories())
def test_after_any_commit_a_cache_equals_a_fresh_one(device, history):
    """Rows are appended by index, and committed and forgotten by the cache below."""
    cache, kept = ResidentKV(device, SHAPES, torch.float32, CAPACITY), []
    for tokens, chunks, keep, back in history:
        size = max(1, -(-len(tokens) // chunks))
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            parents = range(-1, start + len(part) - 1)
            above = static_over(cache, len(part), parents, range(len(parents)), width=8)
            for layer, shape in enumerate(SHAPES):
                above.append(layer, *rows_for(part, shape))
            cache.appended(len(part))
        above.commit(keep)
        kept += [tokens[row] for row in keep]
        length = max(0, len(kept) - back)
        above.truncate(length)
        kept = kept[:length]
        fresh = ResidentKV(device, SHAPES, torch.float32, CAPACITY)
        for layer, shape in enumerate(SHAPES):
            fresh.append(layer, *rows_for(kept, shape))
        fresh.commit(range(len(kept)))
        assert above.length == cache.length == len(kept)
        pairs = zip(contents(cache), contents(fresh), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@settings(deadline=None, max_examples=80)
@given(
    committed=st.integers(0, 13),
    tree=trees(max_nodes=6),
    newest=st.integers(1, 7),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.floats(0.5, 5.0),
    sinks=st.booleans(),
    parts=st.integers(1, 3),
)
def test_it_attends_as_rows_do_whatever_lies_behind_them(
    device, committed, tree, newest, window, softcap, sinks, parts
):
    """Rows of a tree, some of which came in an earlier pass; memory behind them is full of NaN."""
    generator = torch.Generator().manual_seed(committed * 100 + len(tree))
    parents = tree.row_parents()
    pending, rows = len(parents), min(newest, len(parents))
    cache = ResidentKV(device, SHAPES[:1], torch.float32, CAPACITY)
    for store in (*cache.memory.keys, *cache.memory.values):
        store.fill_(torch.nan)
    key, value = rows_for(range(committed + pending), SHAPES[0])
    cache.append(0, key[:, :committed], value[:, :committed])
    cache.commit(range(committed))
    old = committed + pending - rows
    cache.append(0, key[:, committed:old], value[:, committed:old])
    query = torch.randn(HEADS, rows, 8, generator=generator)
    own = torch.randn(HEADS, generator=generator) if sinks else None
    spec = AttentionSpec(scaling=0.4, window=window, softcap=softcap, sinks=own)
    places = [committed + depth for depth in (0, *tree.depths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "FLOOR_ROWS", FLOOR)
        above = static_over(cache, rows, parents, places, width=8)
        found, size = [], -(-rows // parts)
        for start in range(0, rows, size):
            part = slice(start, min(start + size, rows))
            above.append(0, key[:, old:][:, part], value[:, old:][:, part])
            found.append(above.attend(0, query[:, part], spec))
    seen = unpack_words(upload(visible_words(parents, rows, 8)).view(rows, -1), 8)[:, :pending]
    pending_rows = PendingTree(seen, upload(places))
    expected = attend_rows(query, key, value, spec, pending_rows)
    torch.testing.assert_close(torch.cat(found), expected, atol=2e-5, rtol=0)
    if tree.is_chain:
        plain = plain_attention(query, key, value, spec)
        torch.testing.assert_close(torch.cat(found), plain, atol=2e-5, rtol=0)


# --- passes --------------------------------------------------------------------------------------

FAMILIES = {
    "llama": {},
    "gemma2": {"head_dim": 16, "sliding_window": 6},  # soft caps, too
    "gpt_neox": {},
}


def recording_model(folder):
    device = CpuDevice(readers=1)
    ids = open_checkpoint(folder).embedding.shape[0]
    return load_drafting(open_checkpoint(folder), device, chunk_tokens=5, target_ids=ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_pass_equals_an_eager_one(make_tiny, recording, family):
    """Bit for bit the same pass made eagerly, and nearly what it computes over the other cache."""
    model = recording_model(make_tiny(family, **IDS, **FAMILIES[family]))
    shapes, dtype = model.network.kv_shapes, model.network.dtype
    caches = [ResidentKV(model.device, shapes, dtype, 80) for _ in range(2)]
    mine, theirs = caches
    for store in (*mine.memory.keys, *mine.memory.values):
        store.fill_(torch.nan)
    number = random.Random(3).randrange

    def check(rows_of):
        found = model.draft_logits(rows_of(mine)).clone()
        close = model.logits([rows_of(theirs)])
        torch.testing.assert_close(found, close, atol=2e-4, rtol=0)
        for store in (*mine.memory.keys, *mine.memory.values):
            before = mine.rows_before()
            store[:, before.committed + before.pending :] = torch.nan

    for cache in caches:
        model.logits([Rows.text(cache, PROMPT)])
        cache.commit(range(len(PROMPT)))
    for count in (1, 2, 3, 5, 9, 1, 2):
        parents = tuple(number(node + 1) - 1 for node in range(count - 1))
        tree = TokenTree(tuple(number(290) for _ in parents), parents)
        check(lambda cache, tree=tree: Rows.draft(cache, 77, tree))
        more = [number(count + row + 1) - 1 for row in range(3)]
        depths = [0, *tree.depths]
        for parent in more:  # as a tree grows: rows behind pending ones
            depths.append(0 if parent == ROOT else depths[parent] + 1)
        places = [mine.length + depth for depth in depths]
        all_parents = [*tree.row_parents(), *more]
        check(
            lambda cache, places=places, parents=all_parents: Rows(
                cache=cache, tokens=[5, 6, 7], places=places, parents=parents, wanted=range(3)
            )
        )
        kept = [0, *(node + 1 for node in tree.path(len(tree) - 1))]
        back = number(2)
        for cache in caches:
            cache.commit(kept)
            cache.truncate(cache.length - back)
        check(lambda cache: Rows.text(cache, [9, 8]))
        for cache in caches:
            cache.commit(range(2))
    assert recording["replayed"] == 21 > recording["recorded"]
    model.device.close()


@pytest.mark.parametrize("rows", [1, 3, 6, 12, 32])
def test_replays_have_the_bits_of_the_pass_they_repeat(make_tiny, recording, monkeypatch, rows):
    """For every size of pass; twice on the same numbers, and as `make_fx` has it."""
    model = recording_model(make_tiny("llama", num_hidden_layers=1, **IDS))
    shapes, dtype = model.network.kv_shapes, model.network.dtype
    kept = []
    for record in (
        recorded.record,
        lambda device, work, vary: work,
        lambda device, work, vary: make_fx(work)(),
    )[: 3 if rows == 3 else 2]:
        monkeypatch.setattr(CpuDevice, "record", record)
        model._recordings = None
        cache = ResidentKV(model.device, shapes, dtype, 80)
        model.logits([Rows.text(cache, PROMPT)])
        cache.commit(range(len(PROMPT)))
        made = []
        for first in (40, 90, 90):
            tree = TokenTree.chain(range(first, first + rows - 1))
            part = Rows.draft(cache, first, tree)
            made.append(model.draft_logits(part).clone())
            made += [store[:, : len(PROMPT) + rows].clone() for store in cache.memory.keys]
            cache.truncate(cache.length)
        kept.append(made)
    for others in kept[1:]:
        assert all(torch.equal(one, other) for one, other in zip(kept[0], others, strict=True))
    half = len(kept[0]) // 3
    pairs = zip(kept[0][half : 2 * half], kept[0][2 * half :], strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert not torch.equal(kept[0][0], kept[0][half])
    model.device.close()


@pytest.mark.parametrize("depth", [1, 6])
def test_a_recorded_chain_is_the_likeliest_tokens_one_by_one(make_tiny, recording, depth):
    model = recording_model(make_tiny("llama", **IDS))
    shapes, dtype = model.network.kv_shapes, model.network.dtype
    mine, theirs = (ResidentKV(model.device, shapes, dtype, 60) for _ in range(2))
    for unread in (PROMPT, [4], [7, 8, 9]):
        expected, tokens = [], unread
        chained = model.draft_chain(Rows.text(mine, unread), depth).tolist()
        for _ in range(depth):
            logits = model.logits([Rows.text(theirs, tokens)])
            theirs.commit(range(len(tokens)))
            expected.append(int(logits.argmax()))
            tokens = expected[-1:]
        mine.commit(range(len(unread) + depth - 1))
        assert chained == expected and mine.length == theirs.length
        pairs = zip(contents(mine), contents(theirs), strict=True)
        assert all(torch.allclose(one, other, atol=1e-4) for one, other in pairs)
    model.device.close()


def test_a_pass_that_cannot_be_recorded_is_made_eagerly(make_tiny, recording, monkeypatch):
    folder, prompt = make_tiny("llama", **IDS), PROMPT * 2
    draft = DraftConfig(draft=f"model:{folder}")
    monkeypatch.setattr(CpuDevice, "record", lambda device, work, vary: None)
    with engine_for(folder, prompts=[prompt], draft=draft) as engine:
        assert len(generate(engine, [prompt])[0]) == 16
        assert not engine._draft_model.records(engine._drafters[0]._cache)


@pytest.mark.parametrize(("device", "shares"), [("cpu", False), ("cpu,cpu", True)])
def test_rows_on_several_devices_are_not_recorded_and_go_with_others(
    make_tiny, recording, device, shares
):
    """As it is planned: each sequence alone where passes are recorded, and else together."""
    draft = DraftConfig(draft="self:int4", draft_tokens=4)
    place = {"resident_layers": 2, "slots": 1, "home": HomeKind.HOST, "device": device}
    with engine_for(make_tiny("llama", **DEEP, **IDS), draft=draft, **place) as engine:
        drafter = engine.drafter(0, SamplingConfig(), make_generator(0, "cpu"))
        assert (drafter.shared_model(4) is not None) is shares


def drafted(model, cache, count):
    """A pass of so many rows, which are forgotten again."""
    tokens = list(range(3, 3 + count))
    found = model.draft_logits(Rows.text(cache, tokens)).clone()
    cache.truncate(cache.length)
    torch.testing.assert_close(found, model.logits([Rows.text(cache, tokens)]))
    cache.truncate(cache.length)


def test_old_recordings_make_room_and_those_in_use_do_not(make_tiny, recording, monkeypatch):
    """Three kinds of passes that take turns where two are kept: none is recorded over and over."""
    monkeypatch.setattr(runner_static, "MOST_RECORDINGS", 2)
    monkeypatch.setattr(runner_static, "UNUSED_PASSES", 7)
    model = recording_model(make_tiny("llama", num_hidden_layers=1, **IDS))
    cache = ResidentKV(model.device, model.network.kv_shapes, model.network.dtype, 60)
    for count in (1, 2, 4) * 4:
        drafted(model, cache, count)
    assert recording == {"recorded": 2, "replayed": 8}
    for count in (2, 4) * 3:  # the one of a single row was used last twelve passes ago
        drafted(model, cache, count)
    assert recording["recorded"] == 3 and len(model._recordings._kept) == 2
    model.device.close()


def test_a_pass_is_recorded_once_it_has_come_up_a_few_times(make_tiny, recording, monkeypatch):
    """Also where the sequence has grown meanwhile, so that it is recorded anew at once."""
    monkeypatch.setattr(runner_static, "EAGER_FIRST", 2)
    model = recording_model(make_tiny("llama", num_hidden_layers=1, **IDS))
    cache = ResidentKV(model.device, model.network.kv_shapes, model.network.dtype, 60)
    counts = []
    for length in (0, 0, 0, 20, 40):
        model.logits([Rows.text(cache, [5] * (length - cache.length or 1))])
        cache.commit(range(length - cache.length))
        drafted(model, cache, 2)
        counts.append((recording["recorded"], recording["replayed"]))
    assert counts == [(0, 0), (0, 0), (1, 1), (2, 2), (3, 3)]
    model.device.close()


def test_with_a_seed_a_pass_is_recorded_when_it_first_comes_up(make_tiny, recording, monkeypatch):
    """Else the first answer would be drafted by other sums than the same answer again."""
    monkeypatch.setattr(runner_static, "EAGER_FIRST", 2)
    folder = make_tiny("llama", num_hidden_layers=1, **IDS)
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=4)
    counts = []
    for seed in (None, 3):
        sampling = SamplingConfig(temperature=0.7, seed=seed)
        with engine_for(folder, tokens=8, draft=draft) as engine:
            generate(engine, tokens=1, sampling=sampling)
            run = Run.start(engine, [PROMPT], sampling, GenerationConfig(max_tokens=8))
            run.prefill()
            before = recording["recorded"]
            run.sequences[0].drafter.propose(run.sequences[0].ids, 3)
            counts.append(recording["recorded"] - before)
    assert counts[0] == 0 < counts[1]


def test_a_program_that_stops_a_pass_does_not_spoil_a_recording(make_tiny, recording):
    """It is asked before the pass, and not while the pass is recorded."""
    model = recording_model(make_tiny("llama", num_hidden_layers=1, **IDS))
    cache = ResidentKV(model.device, model.network.kv_shapes, model.network.dtype, 60)
    asked = []
    model.network.poll = poll = lambda: asked.append(recording["recorded"])
    model.draft_logits(Rows.text(cache, [3, 4]))
    assert asked == [0] and recording["recorded"] == 1 and model.network.poll is poll

    def stop():
        raise KeyboardInterrupt

    cache.commit(range(2))
    model.network.poll = stop
    with pytest.raises(KeyboardInterrupt):
        model.draft_logits(Rows.text(cache, [5]))
    assert cache.length == 2 and cache.rows_before().pending == 0
    model.device.close()
