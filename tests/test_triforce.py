"""The retrieval cache, and TriForce's two levels: what is kept, and that both levels are exact."""

from contextlib import closing
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from engines import HOST, PROMPT, engine_for, generate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_speculation import (
    FEWER,
    SAMPLINGS,
    SEEDS,
    VOCAB,
    chi_square,
    expected_counts,
    rows_come_again,
)

from offload_rt.attention.rows import attend_rows
from offload_rt.attention.spec import AttentionSpec
from offload_rt.config import (
    AcceptRule,
    DraftConfig,
    GenerationConfig,
    RetrievalConfig,
    SamplingConfig,
)
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.kinds import CPU, CUDA
from offload_rt.engine import Run
from offload_rt.errors import CapacityError, ConfigError
from offload_rt.kv import sizes as kv_sizes
from offload_rt.kv.base import KVShape
from offload_rt.kv.followed import FollowedKV
from offload_rt.kv.recent_share import RecentChoice
from offload_rt.kv.resident import ResidentKV
from offload_rt.kv.retrieval import RetrievalKV
from offload_rt.kv.sizes import RetrievalSizes
from offload_rt.runner.tree import TokenTree
from offload_rt.sampling import Dice, make_generator, target_probs
from offload_rt.speculative import deciding
from offload_rt.speculative.base import Draft, Unlearned
from offload_rt.speculative.ngram.suffixes import SHORTEST, lookup_bytes
from offload_rt.speculative.triforce.drafter import TriForceDrafter
from offload_rt.speculative.verifier import draw, walk

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TWO = IDS | {"num_hidden_layers": 2}  # as many as differ: what a pass costs is its layers
HEADS, DIM = 2, 4
SHAPE = KVShape(heads=HEADS, key_dim=DIM, value_dim=DIM)
SPEC = AttentionSpec(scaling=0.5)


# --- what is kept --------------------------------------------------------------------------------


@st.composite
def retrievals(draw_from):
    chunk = draw_from(st.integers(1, 6))
    budget = draw_from(st.integers(4 * chunk, 40))
    share = draw_from(st.sampled_from([0.0, 0.25, 0.6, 1.0, None]))
    return RetrievalConfig(
        budget_tokens=budget, chunk_tokens=chunk, recent_share=share, rebuild_tokens=9
    )


def sizes_for(config, capacity=400, scratch=12):
    row = SHAPE.numbers_per_token * 4
    return RetrievalSizes(
        row_bytes=(row,), config=config, capacity=capacity, scratch_tokens=scratch
    )


def rows_of(retrieval, layer=0):
    """Positions of the rows each head holds, told by values that are the positions."""
    stop = retrieval._row_of(retrieval.length)
    return retrieval._values[layer][:, :stop, 0].to(torch.int64).tolist()


def numbered(length, seed):
    """Keys at random, and values that say which position they are of: [K, T, D]."""
    keys = torch.randn(HEADS, length, DIM, generator=torch.Generator().manual_seed(seed))
    return keys, torch.arange(length).float().view(1, -1, 1).repeat(HEADS, 1, DIM)


def best_chunks(config, sizes, keys, query, length):
    """What should be kept, written out: the chunks with most attention, and the newest rows."""
    (share, *_), size = config.shares, config.chunk_tokens
    start = sizes.tail_start(length, share)
    kept = []
    for head in range(HEADS):
        asked = query.view(HEADS, -1, DIM)[head]
        received = torch.softmax(asked @ keys[head, :length].T * SPEC.scaling, dim=-1).sum(0)
        scores = {
            c: float("inf") if c == 0 else float(received[c * size : c * size + size].sum())
            for c in range(start // size)
        }
        best = sorted(scores, key=scores.get, reverse=True)[: sizes.max_chunks(share)]
        chunks = {p for c in best for p in range(c * size, c * size + size)}
        kept.append(chunks | set(range(start, length)))
    return kept


@settings(deadline=None, max_examples=150)
@given(
    config=retrievals(),
    length=st.integers(1, 120),
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(1, 119), max_size=6),
    group=st.integers(1, 3),
    kind=st.sampled_from([CPU, CUDA]),
    part=st.integers(1, 200),
)
def test_the_best_chunks_are_kept_however_the_rows_come_by(
    config, length, seed, cuts, group, kind, part
):
    """In one part, or, where one head asks, in any: the share of several is known at the end."""
    sizes = sizes_for(config)
    with (
        closing(CpuDevice(readers=1)) as device,
        patch.multiple(kv_sizes, KEY_BLOCK=part, BUILD_BYTES=1),
    ):
        device.kind = kind
        retrieval = RetrievalKV(device, [SHAPE], torch.float32, sizes)
        keys, values = numbered(length, seed)
        noise = torch.Generator().manual_seed(seed)
        query = 3 * torch.randn(group * HEADS, 1, DIM, generator=noise)
        retrieval.begin_build(length, config.shares[0])
        retrieval.begin_layer(0, query, SPEC)
        borders = sorted({0, length, *(cut for cut in cuts if cut < length and group == 1)})
        for first, stop in zip(borders, borders[1:], strict=False):
            retrieval.see(0, first, keys[:, first:stop], values[:, first:stop])
        retrieval.end_build()
        held = rows_of(retrieval)
        for head, positions in enumerate(best_chunks(config, sizes, keys, query, length)):
            assert len(held[head]) == len(set(held[head]))
            assert set(held[head]) == positions
            assert len(positions) <= config.budget_tokens or length <= config.budget_tokens
            rows = torch.tensor(held[head])
            assert torch.equal(retrieval._keys[0][head, : len(rows)], keys[head][rows])
        assert retrieval.length == length


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("kind", [CPU, CUDA])
def test_what_is_kept_of_a_rings_buffers_is_what_was_in_them(kind, group):
    """They are seen again and again, each time with the next rows; a block need not be whole."""
    config = RetrievalConfig(budget_tokens=48, chunk_tokens=4, recent_share=0.25)
    keys, values = numbered(150, 4)
    noise = torch.Generator().manual_seed(2)
    query = 3 * torch.randn(group * HEADS, 1, DIM, generator=noise)
    held = []
    with closing(CpuDevice(readers=1)) as device:
        device.kind = kind
        for buffers in ([], torch.zeros(2, 2, HEADS, 16, DIM)):
            ring = [(*pair,) for pair in buffers]
            retrieval = RetrievalKV(device, [SHAPE], torch.float32, sizes_for(config))
            retrieval.begin_build(150, config.shares[0])
            retrieval.begin_layer(0, query, SPEC)
            for block, first in enumerate(range(0, 150, 16)):
                rows = keys[:, first : first + 16], values[:, first : first + 16]
                if ring and rows[0].shape[1] == 16:
                    lent = ring[block % 2]
                    for memory, part in zip(lent, rows, strict=True):
                        memory.copy_(part)
                    rows = lent
                retrieval.see(0, first, *rows)
            retrieval.end_build()
            held.append([retrieval._keys[0].clone(), rows_of(retrieval)])
    assert held[0][1] == held[1][1]
    assert torch.equal(held[0][0], held[1][0])


@settings(deadline=None, max_examples=60)
@given(config=retrievals(), data=st.data())
def test_it_follows_the_full_cache_and_never_outgrows_its_memory(config, data):
    """Any mix of drafts, rejections and passes over the full cache; the newest rows are there."""
    sizes = sizes_for(config)
    with closing(CpuDevice(readers=1)) as device:
        full = ResidentKV(device, [SHAPE], torch.float32, 400)
        cache = FollowedKV(full, RetrievalKV(device, [SHAPE], torch.float32, sizes))
        keys, values = numbered(400, 5)

        def run(rows, keep, *, keeps_all):
            cache.begin_pass(rows, keeps_all=keeps_all)
            start = cache.length
            part = slice(start, start + rows)
            cache.append(0, keys[:, part], values[:, part])
            cache.attend(0, torch.ones(2 * HEADS, rows, DIM), SPEC)
            cache.commit(range(keep))

        prompt = data.draw(st.integers(1, 60))
        run(prompt, prompt, keeps_all=True)
        for _ in range(data.draw(st.integers(0, 25))):
            drafted = data.draw(st.integers(0, 11))
            retrieval = cache.retrieval
            at = retrieval.length
            wrong = torch.full((HEADS, drafted, DIM), -1.0)
            retrieval.append(0, wrong, wrong)  # what a draft pass computes need not be exact
            retrieval.commit(range(drafted))
            if data.draw(st.booleans()):  # a draft that was broken off leaves its rows
                retrieval.truncate(at)
            run(drafted + 1, data.draw(st.integers(1, drafted + 1)), keeps_all=False)
            held = rows_of(retrieval)
            start = retrieval._layout.tail_start
            for head in held:
                assert head[-(retrieval.length - start) :] == list(range(start, retrieval.length))
                assert len(head) == len(set(head)) and min(head) == 0
            assert retrieval.length == cache.length
            assert retrieval.length - retrieval.built_at < 9 + 12 or start == 0


@pytest.mark.parametrize("inner", ["", "tree"])
def test_a_window_is_counted_in_positions(make_tiny, inner):
    """A layer with a window sees just that, so drafts that read all of it are never wrong."""
    folder = make_tiny("mistral", head_dim=16, sliding_window=10, **TWO)
    prompt = PROMPT * 5
    config = RetrievalConfig(budget_tokens=32, chunk_tokens=4, recent_share=0.25, rebuild_tokens=8)
    options = (
        {"draft": f"triforce:{folder}", "inner_tokens": 12} if inner else {"draft": "triforce"}
    )
    draft = DraftConfig(draft_tokens=5, retrieval=config, **options)
    for kv in ({}, {"kv": "disk", "kv_block_tokens": 16}):
        with engine_for(folder, prompts=[prompt], tokens=40, draft=draft, **kv) as engine:
            run = finished(engine, prompt, 40)
            assert run.report().speculation.acceptance_rate == 1.0
            assert inner == "" or run.report().speculation.retrieval.accepted > 10


def test_with_a_window_the_pinned_chunk_is_not_taken_for_a_recent_one():
    config = RetrievalConfig(budget_tokens=24, chunk_tokens=4, recent_share=0.25)
    with closing(CpuDevice(readers=1)) as device:
        retrieval = RetrievalKV(device, [SHAPE], torch.float32, sizes_for(config))
        keys, values = numbered(100, 2)
        query = torch.randn(4, 1, DIM, generator=torch.Generator().manual_seed(1))
        spec = AttentionSpec(scaling=0.5, window=60)
        retrieval.begin_build(99, 0.25)
        retrieval.begin_layer(0, query, spec)
        retrieval.see(0, 0, keys[:, :99], values[:, :99])
        retrieval.end_build()
        retrieval.append(0, keys[:, 99:], values[:, 99:])
        newest = retrieval._layout.tail_start - 4 * (retrieval._layout.chunks - 1)
        expected = attend_rows(query, keys[:, newest:], values[:, newest:], spec)
        assert 99 - newest >= 16
        assert torch.allclose(retrieval.attend(0, query, spec), expected, atol=1e-6)


GIVEN = [PROMPT * 4, PROMPT[:3], PROMPT[::-1] * 3]
WRITTEN = 15  # retrieval caches are rebuilt after 11
AGAIN = [PROMPT * 4 + [8, 9], PROMPT[:3] + [4], PROMPT]  # caches are used again


@pytest.fixture(scope="module")
def undrafted():
    """Answers to `GIVEN` and `AGAIN` of a model all of which is on the device."""

    @cache
    def of(folder):
        with engine_for(folder, prompts=GIVEN, tokens=WRITTEN) as engine:
            return [generate(engine, GIVEN, tokens=WRITTEN), generate(engine, AGAIN, tokens=6)]

    return of


KV_ON_DISK = {"kv": "disk", "kv_block_tokens": 18}


@pytest.mark.parametrize(
    ("family", "streamed", "kv"),
    [
        ("llama", False, {}),
        ("llama", False, {"kv": "host"}),
        ("llama", True, {}),
        ("gemma2", True, KV_ON_DISK),
        ("gpt_oss", False, KV_ON_DISK),
        ("qwen3", True, KV_ON_DISK),
    ],
)
def test_greedy_with_triforce_equals_greedy_without(make_tiny, undrafted, family, streamed, kv):
    config = {"head_dim": 16, **TWO}
    if family in ("gemma2", "gpt_oss"):
        config |= {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    folder = make_tiny(family, **config)
    options = {"resident_layers": 0, "slots": 1} if streamed else {}
    retrieval = RetrievalConfig(budget_tokens=32, chunk_tokens=5, rebuild_tokens=11)
    draft = DraftConfig(draft="triforce", draft_tokens=4, retrieval=retrieval)
    with engine_for(folder, prompts=GIVEN, tokens=WRITTEN, draft=draft, **kv, **options) as engine:
        answers = [generate(engine, GIVEN, tokens=WRITTEN), generate(engine, AGAIN, tokens=6)]
        assert answers == undrafted(folder)


def finished(engine, prompt, tokens, sampling=None):
    options = GenerationConfig(max_tokens=tokens)
    run = Run.start(engine, [prompt], sampling or SamplingConfig(), options)
    run.prefill()
    while run.active:
        run.step()
    return run


def test_a_budget_larger_than_the_prompt_holds_all_of_it(make_tiny):
    """Every draft is then right, as long as nothing had to be left out."""
    draft = DraftConfig(draft="triforce", draft_tokens=4, inner_tokens=2)
    with engine_for(make_tiny("llama", **TWO), tokens=40, draft=draft) as engine:
        report = finished(engine, PROMPT, 40).report().speculation
    assert report.acceptance_rate == 1.0
    assert report.retrieval.builds == 1
    assert report.passes == 1 + 8  # 39 tokens in steps of 5
    assert report.retrieval.passes <= report.drafted


def test_memory_with_a_retrieval_cache_stays_within_the_plan(make_tiny):
    config = {"hidden_size": 256, "intermediate_size": 512, "dtype": "bfloat16", **IDS}
    folder = make_tiny("llama", max_position_embeddings=4096, **config)
    prompt = PROMPT * 100
    retrieval = RetrievalConfig(budget_tokens=512, chunk_tokens=8)
    draft = DraftConfig(draft="triforce", draft_tokens=8, retrieval=retrieval)
    with engine_for(
        folder, prompts=[prompt], tokens=20, draft=draft, kv="disk", prefill_chunk_tokens=256
    ) as engine:
        generate(engine, [prompt], tokens=20)
        memory = engine.memory()
        sizes = engine._caches[0].retrieval._sizes
        assert memory.ledger["retrieval cache"] == sizes.device_bytes
        index = lookup_bytes(engine.capacities[0] + draft.nodes, SHORTEST)
        demand = engine.placement.demand
        drafter_bytes = demand.drafter_bytes - demand.recorded_bytes
        assert drafter_bytes == sizes.device_bytes + sizes.build_bytes(host_computes=True) + index
        assert memory.device_peak_bytes <= memory.device_planned_bytes


def test_too_many_pending_rows_are_refused_before_anything_is_written():
    sizes = sizes_for(RetrievalConfig(budget_tokens=8, chunk_tokens=2, rebuild_tokens=1), scratch=2)
    with closing(CpuDevice(readers=1)) as device:
        retrieval = RetrievalKV(device, [SHAPE], torch.float32, sizes)
        rows = torch.zeros(HEADS, sizes.rows + 1, DIM)
        with pytest.raises(CapacityError, match=f"{sizes.rows} rows, {sizes.rows + 1} are needed"):
            retrieval.append(0, rows, rows)
        assert retrieval._pending == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_tokens": 31}, "--retrieval-budget is 31, accepted is 32"),
        ({"chunk_tokens": 0}, "--retrieval-chunk is 0"),
        ({"recent_share": 1.01}, "--retrieval-recent is 1.01"),
        ({"recent_share": float("nan")}, "--retrieval-recent is nan"),
        ({"rebuild_tokens": 0}, "--retrieval-rebuild is 0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RetrievalConfig(**options)


@pytest.mark.parametrize("keeps_all", [True, False])
def test_who_asks_is_the_newest_row_that_is_sure_to_stay(keeps_all):
    """A prompt's last row, also behind chunks; a draft's root."""
    config = RetrievalConfig(budget_tokens=16, chunk_tokens=2, recent_share=0.0, rebuild_tokens=1)
    sizes = sizes_for(config)
    keys, values = numbered(108, 2)
    query = 3 * torch.randn(2 * HEADS, 8, DIM, generator=torch.Generator().manual_seed(1))
    with closing(CpuDevice(readers=1)) as device:
        full = ResidentKV(device, [SHAPE], torch.float32, 400)
        cache = FollowedKV(full, RetrievalKV(device, [SHAPE], torch.float32, sizes))
        for start, stop, builds in ((0, 100, True), (100, 108, keeps_all)):
            cache.wants_build = True
            cache.begin_pass(stop - start, keeps_all=builds)
            for first in range(start, stop, 4 if builds else 8):
                last = min(stop, first + (4 if builds else 8))
                cache.append(0, keys[:, first:last], values[:, first:last])
                asking = query[:, : last - first] if last < stop else query[:, first - stop :]
                cache.attend(0, asking, SPEC)
            cache.commit(range(stop - start))
        length, asked = (108, query[:, -1:]) if keeps_all else (100, query[:, :1])
        for head, kept in enumerate(best_chunks(config, sizes, keys, asked, length)):
            assert set(rows_of(cache.retrieval)[head]) == kept | set(range(length, 108))


def test_several_retrieval_caches_may_follow_one(make_tiny):
    configs = [RetrievalConfig(budget_tokens=b, chunk_tokens=3, rebuild_tokens=5) for b in (20, 32)]
    keys, values = numbered(90, 3)

    def followed(configs):
        cache = ResidentKV(device, [SHAPE], torch.float32, 400)
        for config in configs:
            cache = FollowedKV(
                cache, RetrievalKV(device, [SHAPE], torch.float32, sizes_for(config))
            )
        for start, stop in ((0, 60), (60, 66), (66, 72), (72, 90)):
            cache.begin_pass(stop - start, keeps_all=start == 0)
            cache.append(0, keys[:, start:stop], values[:, start:stop])
            cache.attend(0, torch.ones(2 * HEADS, stop - start, DIM), SPEC)
            cache.commit(range(stop - start))
        return cache

    with closing(CpuDevice(readers=1)) as device:
        both = followed(configs)
        alone = [followed([config]) for config in configs]
        assert rows_of(both.full.retrieval) == rows_of(alone[0].retrieval)
        assert rows_of(both.retrieval) == rows_of(alone[1].retrieval)


# --- both levels are exact -----------------------------------------------------------------------


class World:
    """A target, a retrieval model and a draft model whose logits depend on the last token only."""

    def __init__(self):
        generator = torch.Generator().manual_seed(4)
        self.target = torch.randn(VOCAB + 1, VOCAB, generator=generator) * 1.2
        noise = torch.randn(VOCAB + 1, VOCAB, generator=generator)
        self.retrieval = self.target + 0.7 * noise
        self.draft = self.target + torch.randn(VOCAB + 1, VOCAB, generator=generator)


@pytest.fixture(scope="module")
def world():
    return World()


probs_after = cache(target_probs)  # of a world's few rows, asked for thousands of times
OUTER = DraftConfig(draft="triforce", draft_tokens=3, inner_tokens=2)
INNER = OUTER.inner  # made once


class SampledInner(Unlearned):
    """A level 1 that draws a chain of up to two tokens."""

    name = "inner"

    def __init__(self, logits, sampling, generator):
        self._logits, self._sampling, self._generator = logits, sampling, generator

    def propose(self, ids, max_depth, max_nodes=None):
        tokens, probs, row = [], [], ids[-1]
        for _ in range(min(max_depth, 2)):
            probs.append(probs_after(self._logits, self._sampling)[row])
            row = int(torch.multinomial(probs[-1], 1, generator=self._generator))
            tokens.append(row)
        return Draft(TokenTree.chain(tokens), torch.stack(probs) if probs else None)

    def observe(self, draft, verdict):
        pass


class ChosenInner(SampledInner):
    """A level 1 that proposes the same tree whatever came before."""

    def propose(self, ids, max_depth, max_nodes=None):
        deep = TokenTree((0, 1, 2, 3), (-1, -1, 0, 1))
        return Draft(deep if max_depth > 1 else TokenTree((2,), (-1,)))


def drafted_by_triforce(world, inner, sampling, generator):
    """The outer draft, and the target's verdict on it: the first two tokens."""
    cache = SimpleNamespace(
        built_at=0, is_complete=False, truncate=lambda n: None, commit=lambda keep: None
    )

    def over_retrieval(cache, root, tree):
        return world.retrieval[[root, *tree.tokens]]

    drafter = TriForceDrafter(
        HOST,
        over_retrieval,
        SimpleNamespace(retrieval=cache, choice=RecentChoice([0.25])),
        inner(world.draft, sampling, generator),
        SimpleNamespace(nodes=OUTER.nodes, inner=INNER),
    )
    drafter.begin(sampling, generator)
    return drafter.propose([VOCAB], OUTER.draft_tokens)


@rows_come_again()
def joint_counts(world, inner, sampling, seeds):
    """Counts of the first two tokens of drafts, and of answers."""
    drafted, answered = torch.zeros(2, VOCAB, VOCAB)
    for seed in range(seeds):
        generator = make_generator(seed, "cpu")
        draft = drafted_by_triforce(world, inner, sampling, generator)
        assert len(draft.tree) == 3 and draft.probs.shape == (3, VOCAB)
        drafted[draft.tree.tokens[0], draft.tree.tokens[1]] += 1
        logits = world.target[[VOCAB, *draft.tree.tokens]]
        drawn = draw(draft, logits, sampling, AcceptRule.LOSSLESS, Dice(generator), HOST).tolist()
        verdict = walk(draft, drawn, sampling, AcceptRule.LOSSLESS)
        tokens = [draft.tree.tokens[n] for n in verdict.path] + [verdict.token]
        if len(tokens) < 2:
            last = probs_after(world.target, sampling)[tokens[-1]]
            tokens.append(int(torch.multinomial(last, 1, generator=generator)))
        answered[tokens[0], tokens[1]] += 1
    return drafted, answered


PLAIN, TOP_K, TOP_P = SAMPLINGS


@pytest.mark.parametrize(
    ("inner", "sampling", "seeds"),
    [(SampledInner, PLAIN, SEEDS), (ChosenInner, TOP_K, FEWER), (SampledInner, TOP_P, FEWER)],
    ids=["sampled-plain", "chosen-top-k", "sampled-top-p"],
)
def test_both_levels_are_exact(world, inner, sampling, seeds):
    """Drafts follow the retrieval model's law, as they have to, and answers the target's.

    `FEWER` show a rule without residuals (below).
    """
    drafted, answered = joint_counts(world, inner, sampling, seeds)
    assert chi_square(drafted, expected_counts(world.retrieval, sampling, seeds)) > 1e-4
    assert chi_square(answered, expected_counts(world.target, sampling, seeds)) > 1e-4


def published_rule(draft, logits, sampling, rule, dice, device):
    """The released code's level 1: at a rejection the verifier's distribution is sampled."""
    probs = target_probs(logits, sampling)
    nodes = len(draft.tree)
    coins = torch.rand(nodes, generator=dice.generator)
    own = torch.arange(nodes), torch.tensor(draft.tree.tokens, dtype=torch.int64)
    stands = coins * draft.probs[own] < probs[own] if nodes else torch.zeros(0)
    ends = torch.multinomial(probs, 1, generator=dice.generator)[:, 0]
    return torch.cat([stands.to(torch.int64), ends])


def test_the_published_level_1_rule_fails_the_same_test(world, monkeypatch):
    """Negative control: no residual at level 1 (reference: triforce.md 1.4)."""
    monkeypatch.setattr(deciding, "draw", published_rule)
    for counts, law in zip(
        joint_counts(world, SampledInner, PLAIN, FEWER),
        (world.retrieval, world.target),
        strict=True,
    ):
        assert chi_square(counts, expected_counts(law, PLAIN, FEWER)) < 1e-6
