"""Memory that sequences share: rows stay what they are, wherever their stretch is moved to."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv import SHAPES, append, contents, device, rows_for  # noqa: F401 - a fixture

from offload_rt.errors import CapacityError
from offload_rt.kv import pool as pool_module
from offload_rt.kv.pool import KVPool
from offload_rt.kv.prefixes import Prefixes, common_prefix
from offload_rt.kv.resident import ResidentKV

ROWS, SEQUENCES = 20, 4
ROW_BYTES = 4 * sum(shape.numbers_per_token for shape in SHAPES)


def made(device):  # noqa: F811
    return KVPool(device, SHAPES, torch.float32, rows=ROWS, sequences=SEQUENCES)


def expected(tokens):
    parts = [rows_for(tokens, shape) for shape in SHAPES]
    return [keys for keys, _ in parts] + [values for _, values in parts]


ACTIONS = st.tuples(
    st.sampled_from(["resize", "append", "truncate", "begin", "keep", "split", "shorten"]),
    st.integers(0, SEQUENCES - 1),
    st.integers(0, SEQUENCES - 1),
    st.integers(0, ROWS),
)


@settings(deadline=None, max_examples=150)
@given(actions=st.lists(ACTIONS, min_size=4, max_size=24), piece=st.integers(1, 4))
def test_rows_stay_what_they_are_and_no_room_is_lost(device, actions, piece):  # noqa: F811, C901
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "PIECE_BYTES", piece * ROW_BYTES)
        pool = made(device)
    told, token, kept = [[] for _ in range(SEQUENCES)], 0, {}
    for what, one, other, count in actions:
        cache = pool.caches[one]
        if what == "resize":
            others = ROWS - pool.free_rows - cache.capacity
            if len(told[one]) <= count <= ROWS - others:
                pool.resize(one, count)
                assert cache.capacity == count
            else:
                with pytest.raises(CapacityError, match=rf"\b{count} rows"):
                    pool.resize(one, count)
        elif what == "append":
            new = list(range(token, token + min(count, cache.capacity - cache.length)))
            append(cache, new)
            cache.commit(range(len(new)))
            told[one], token = told[one] + new, token + len(new)
        elif what == "truncate":
            cache.truncate(min(count, cache.length))
            told[one] = told[one][:count]
        elif what == "keep":
            first = min(count, cache.length)
            kept[pool.keep(one, first)], told[one] = told[one][first:], []
        elif what == "begin":
            cache.truncate(0)
            pool.resize(one, 0)
            parts = [(pool.of(other), told[other])] if one != other else []
            parts = [(stretch, tokens[: count // 3]) for stretch, tokens in [*parts, *kept.items()]]
            taken = list(kept)[-1] if kept and count % 2 else None
            parts = [(stretch, tokens) for stretch, tokens in parts[:2] if stretch is not taken]
            told[one] = [t for _, tokens in parts for t in tokens]
            told[one] += [] if taken is None else kept[taken]
            counted = [(stretch, len(tokens)) for stretch, tokens in parts]
            room = pool.free_rows + (0 if taken is None else taken.rows)
            if room < len(told[one]):
                with pytest.raises(CapacityError, match="are wanted"):
                    pool.begin(one, len(told[one]), counted, taken)
                told[one] = []
            else:
                pool.begin(one, min(room, len(told[one]) + other), counted, taken)
                kept.pop(taken, None)
        elif kept:
            stretch = list(kept)[other % len(kept)]
            tokens = kept[stretch]
            cut = min(count // 2, len(tokens))
            kept[stretch] = tokens[:cut]
            if what == "split":
                kept[pool.split(stretch, cut)] = tokens[cut:]
            else:
                pool.shorten(stretch, cut)
                if not cut:
                    del kept[stretch]
        used = sum(c.capacity for c in pool.caches) + sum(map(len, kept.values()))
        assert pool.free_rows == ROWS - used
        for stretch, tokens in kept.items():
            part = pool._store.part(stretch.first, stretch.rows)
            assert all(map(torch.equal, [*part.keys, *part.values], expected(tokens)))
        for tokens, each in zip(told, pool.caches, strict=True):
            assert each.length == len(tokens)
            assert all(map(torch.equal, contents(each), expected(tokens)))


def test_all_rows_can_be_had_by_one_after_the_others(device):  # noqa: F811
    pool = made(device)
    for index in range(SEQUENCES):
        pool.resize(index, 5)
        append(pool.caches[index], [index])
        pool.caches[index].commit([0])
    pool.resize(0, 1)
    pool.resize(2, 1)
    pool.resize(1, 13)  # what the two gave back lies on both sides of it
    assert [len(rows[0]) and rows.shape[1] for rows in contents(pool.caches[1])[:1]] == [1]
    with pytest.raises(CapacityError, match="14 rows are wanted, 13 of 20 are free"):
        pool.resize(1, 14)
    with pytest.raises(CapacityError, match="cannot give 0 rows to a cache of 1 tokens"):
        pool.resize(3, 0)


def test_a_stretch_is_full_where_its_rows_end(device):  # noqa: F811
    pool = made(device)
    pool.resize(0, 3)
    pool.resize(1, 3)
    append(pool.caches[1], [7, 8, 9])
    pool.caches[1].commit(range(3))
    append(pool.caches[0], [1, 2])
    pool.caches[0].commit(range(2))
    with pytest.raises(CapacityError, match="room for 3 tokens, 4 are needed"):
        append(pool.caches[0], [3, 4])
    pool.caches[0].truncate(2)
    assert all(map(torch.equal, contents(pool.caches[1]), expected([7, 8, 9])))


def test_attention_reads_a_stretch_as_it_reads_a_cache(device):  # noqa: F811
    """The same bits: heads of a stretch lie further apart, which kernels must not feel."""
    from offload_rt.attention.spec import AttentionSpec

    pool, alone = made(device), ResidentKV(device, SHAPES, torch.float32, 9)
    pool.resize(0, 4)
    pool.resize(1, 9)
    query, spec = torch.randn(4, 3, 8), AttentionSpec(scaling=0.3)
    for cache in (pool.caches[1], alone):
        append(cache, range(9))
    for layer in range(len(SHAPES)):
        found = [c.attend(layer, query, spec) for c in (pool.caches[1], alone)]
        assert torch.equal(*found)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6), kinds=st.integers(1, 3))
def test_whatever_is_found_of_ended_sequences_is_as_it_was(device, seed, kinds):  # noqa: F811
    """Prompts of few kinds of tokens come and go in little memory: law 5 for what is kept."""
    draw, pools = random.Random(seed), [made(device), made(device)]
    prefixes, told, ended, lost = Prefixes(pools), [[] for _ in range(SEQUENCES)], [], False
    for _ in range(40):
        index = draw.randrange(SEQUENCES)
        if told[index]:
            prefixes.keep(index, told[index])
            ended.append(told[index])
            told[index] = []
        else:
            ids = [draw.randrange(kinds) for _ in range(draw.randrange(1, 12))]
            if ended and draw.random() < 0.5:
                ids = [*draw.choice(ended), *ids][:12]
            rows = len(ids) + draw.randrange(3)
            found = prefixes.find(ids)
            live = max(range(SEQUENCES), key=lambda i: common_prefix(told[i], ids))
            if (common := common_prefix(told[live], ids)) > found.tokens:
                found = prefixes.of_cache(live, common)
            if not lost:  # until memory is short for the first time
                known = [common_prefix(ids, one) for one in (*ended, *told)]
                assert found.tokens == max(known)
            if pools[0].free_rows + prefixes.rows < rows:
                continue
            kept, fits = prefixes.rows, pools[0].free_rows >= rows
            left = prefixes.make_room(rows, found)
            lost = lost or prefixes.rows < kept
            assert left.tokens == found.tokens or not fits
            prefixes.begin(index, rows, left)
            assert [pool.caches[index].length for pool in pools] == [left.tokens] * 2
            for pool in pools:
                append(pool.caches[index], ids[left.tokens :])
                pool.caches[index].commit(range(len(ids) - left.tokens))
            told[index] = ids
        for pool in pools:
            own = sum(cache.capacity for cache in pool.caches)
            assert own + prefixes.rows + pool.free_rows == ROWS
            for tokens, each in zip(told, pool.caches, strict=True):
                assert all(map(torch.equal, contents(each), expected(tokens)))
    prefixes.clear()
    assert prefixes.rows == 0 and not prefixes.find([0, 1, 2]).parts


def test_the_longest_unused_goes_first_and_from_its_end(device):  # noqa: F811
    pool = made(device)
    prefixes = Prefixes([pool])

    def answer(index, ids, rows=None):
        found = prefixes.make_room(rows or len(ids), prefixes.find(ids))
        prefixes.begin(index, rows or len(ids), found)
        append(pool.caches[index], ids[found.tokens :])
        pool.caches[index].commit(range(len(ids) - found.tokens))
        return found.tokens

    shared = [1, 2, 3, 4]
    for tail in ([5, 5, 5], [6, 6, 6], [7, 7, 7]):
        assert answer(0, [*shared, *tail]) == (0 if tail[0] == 5 else 4)
        prefixes.keep(0, [*shared, *tail])
    assert prefixes.rows == 4 + 9 and pool.free_rows == 7  # what all begin with is there once
    assert answer(0, [*shared, 5, 5, 5, 8]) == 7  # gone on with: its rows are taken over
    assert prefixes.rows == 4 + 6 and pool.free_rows == 2
    answer(1, [9, 9, 9, 9])
    assert prefixes.find([*shared, 6, 6, 6]).tokens == 5  # two of its rows were needed
    assert prefixes.find([*shared, 7, 7, 7]).tokens == 7
    prefixes.keep(0, [*shared, 5, 5, 5, 8])
    assert prefixes.rows == 4 + 4 + 3 + 1 and pool.free_rows == 4
    assert answer(0, [*shared, 5, 5, 5, 8], rows=12) == 8  # all but what it goes on with is gone
    assert prefixes.rows == 4 and pool.free_rows == 0
    prefixes.keep(0, [*shared, 5, 5, 5, 8])
    assert answer(0, [*shared, 5, 5, 5, 8], rows=16) == 4  # both edges have no room beside it
    assert prefixes.rows == 0 and pool.free_rows == 0
