"""Memory that sequences share: rows stay what they are, wherever their stretch is moved to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv import SHAPES, append, contents, device, rows_for  # noqa: F401 - a fixture

from offload_rt.errors import CapacityError
from offload_rt.kv import pool as pool_module
from offload_rt.kv.pool import KVPool
from offload_rt.kv.resident import ResidentKV

ROWS, SEQUENCES = 20, 4
ROW_BYTES = 4 * sum(shape.numbers_per_token for shape in SHAPES)


def made(device):  # noqa: F811
    return KVPool(device, SHAPES, torch.float32, rows=ROWS, sequences=SEQUENCES)


def expected(tokens):
    parts = [rows_for(tokens, shape) for shape in SHAPES]
    return [keys for keys, _ in parts] + [values for _, values in parts]


ACTIONS = st.tuples(
    st.sampled_from(["resize", "append", "truncate", "copy"]),
    st.integers(0, SEQUENCES - 1),
    st.integers(0, SEQUENCES - 1),
    st.integers(0, ROWS),
)


@settings(deadline=None, max_examples=150)
@given(actions=st.lists(ACTIONS, min_size=4, max_size=24), piece=st.integers(1, 4))
def test_rows_stay_what_they_are_and_no_room_is_lost(device, actions, piece):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "PIECE_BYTES", piece * ROW_BYTES)
        pool = made(device)
    told, token = [[] for _ in range(SEQUENCES)], 0
    for what, one, other, count in actions:
        cache = pool.caches[one]
        if what == "resize":
            others = sum(c.capacity for c in pool.caches) - cache.capacity
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
        elif one != other:
            rows = min(count, cache.capacity, pool.caches[other].length)
            pool.copy(other, one, rows)
            told[one] = told[other][:rows]
        assert pool.free_rows == ROWS - sum(c.capacity for c in pool.caches)
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
