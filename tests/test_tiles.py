"""Row-invariant passes by whole tiles, as on a GPU: on a double of one, whose kernels are a CPU's.

Those pick the order of their sums by shapes as well, so that each measure left out shows.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from engines import engine_for
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import SIZES, TEXT, agree, make_other, pending, random_rows, spec_of, trees
from value_double import open_double

from offload_rt.attention import exact as attention
from offload_rt.attention import fixed
from offload_rt.attention.exact import attend_exact
from offload_rt.attention.rows import attend_rows
from offload_rt.config import Exact, KVPlace
from offload_rt.device.kinds import Packing
from offload_rt.errors import PlanError
from offload_rt.model import network as networks
from offload_rt.model import tiles
from offload_rt.model.attention_function import row_axis
from offload_rt.model.checkpoint import open_checkpoint

GIB = 2**30
SPECS = [{}, {"window": 70}, {"softcap": 5.0}, {"window": 9, "sinks": torch.randn(6)}]


def fixed_spec(number, **options):
    return spec_of(**SPECS[number], fixed=True, **options)


def in_passes(query, key, value, spec, cut):
    """Rows in passes of so many, each behind all before it."""
    total = query.shape[1]
    ends = [*range(cut, total, cut), total]
    return torch.cat(
        [
            attend_exact(query[:, start:end], key[:, :end], value[:, :end], spec)
            for start, end in zip([0, *ends], ends, strict=False)
        ]
    )


@pytest.mark.parametrize("number", range(len(SPECS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_tiles_have_the_bits_of_smaller_passes(number, dtype, monkeypatch):
    for module in (attention, fixed):
        monkeypatch.setattr(module, "PART", 128)
    query, key, value = random_rows(200, heads=6, kv_heads=2, dim=16, dtype=dtype)
    spec = fixed_spec(number)
    whole = in_passes(query, key, value, spec, 64)
    for cut in (3, 33):
        assert torch.equal(in_passes(query, key, value, spec, cut), whole)
    slow = attend_rows(query, key, value, replace(spec, exact=False, fixed=False))
    close = 1e-5 if dtype is torch.float32 else 0.07
    assert (whole.float() - slow.float()).abs().max() < close


@settings(deadline=None, max_examples=15)
@given(
    parents=trees(),
    committed=st.sampled_from([0, 5, 50, 63, 64, 190]),
    number=st.integers(0, len(SPECS) - 1),
)
def test_a_row_of_a_tree_has_the_bits_of_its_path(parents, committed, number):
    spec, tree = fixed_spec(number), pending(parents, committed)
    query, key, value = random_rows(committed + len(parents), heads=6, kv_heads=2, dim=16)
    made = attend_exact(query[:, committed:], key, value, spec, tree)
    for row, seen in enumerate(tree.visible):
        path = [*range(committed), *(committed + seen.nonzero().flatten()).tolist()]
        own = query[:, committed + row : committed + row + 1]
        assert torch.equal(attend_exact(own, key[:, path], value[:, path], spec)[0], made[row])


def on_a_gpu(make_tiny, monkeypatch, family, dtype="bfloat16", **config):
    """The engine of a family on the double."""
    if family == "llama":
        folder = make_tiny("llama", **SIZES, dtype=dtype)
    else:
        folder = make_other(make_tiny, family, dtype)
    open_double(monkeypatch)
    config = {"resident_layers": 1, "slots": 1, "exact": Exact.ON, "kv": KVPlace.DEVICE} | config
    return engine_for(
        folder, prompts=(TEXT[:100], TEXT[:50]), tokens=60, device_limit_bytes=GIB, **config
    )


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "bfloat16"),
        ("gpt_oss", "bfloat16"),
        ("qwen3_next", "bfloat16"),
    ],
)
def test_a_row_has_the_same_logits_in_any_pass_of_a_gpu(family, dtype, make_tiny, monkeypatch):
    with on_a_gpu(make_tiny, monkeypatch, family, dtype) as engine:
        assert engine.exact.on and engine.exact.rows == 64
        assert agree(engine)


def as_they_are(self, forward, hidden, options):
    return forward(hidden, **options)


LEFT_OUT = {
    "layers": ("llama", networks.Network, "_in_tile", as_they_are),
    "ends": ("llama", networks, "tile_outside", lambda *_: None),
    "experts": ("gpt_oss", networks, "Regular", lambda *_: nullcontext()),
}


@pytest.mark.parametrize("measure", LEFT_OUT)
def test_each_measure_is_needed(measure, make_tiny, monkeypatch):
    family, place, name, instead = LEFT_OUT[measure]
    monkeypatch.setattr(place, name, instead)
    if measure == "layers":
        monkeypatch.setattr(
            networks.PassContext, "whole_tile", lambda _, parts: torch.cat([*parts])
        )
    with on_a_gpu(make_tiny, monkeypatch, family, "float32") as engine:
        assert not agree(engine)


def test_what_cannot_hold_on_a_gpu_is_off_with_the_reason(make_tiny, monkeypatch):
    with on_a_gpu(make_tiny, monkeypatch, "llama", exact=Exact.AUTO) as engine:
        assert (
            engine.exact.why == "what they cost on a GPU is not measured: --exact on asks for them"
        )
    away = {"kv": KVPlace.HOST, "kv_block_tokens": 16}
    said = "cannot have row-invariant passes here, as on a GPU keys and values would come once"
    with pytest.raises(PlanError, match=said), on_a_gpu(make_tiny, monkeypatch, "llama", **away):
        pass

    def by_place(rows, weight):
        return linear(rows, weight) + torch.arange(len(rows))[:, None]

    linear = tiles.functional.linear
    monkeypatch.setattr(tiles.functional, "linear", by_place)
    said = "as a product of .* has other bits in other places of a tile: leave --exact out"
    with pytest.raises(PlanError, match=said), on_a_gpu(make_tiny, monkeypatch, "llama"):
        pass


def problem(products=(), attention=(), limit_bytes=GIB):
    device = torch.device("cpu")
    return tiles.places_problem(products, attention, [], torch.float32, device, 64, limit_bytes)


def test_a_tree_is_compared_before_a_model_is_loaded(monkeypatch):
    heads = [(4, 2, 16, 16)]
    assert problem(attention=heads) == ""
    real = fixed._paths
    monkeypatch.setattr(fixed, "_paths", lambda tree, committed: real(tree, committed).flip(1))
    assert problem(attention=heads) == "attention of 4 heads of 16 has other bits in a tree"


def test_no_more_is_drawn_than_is_planned(make_tiny, monkeypatch):
    said = problem([(64, 4096)], limit_bytes=2**20)
    assert said == "a product of 64 by 4096 takes 4.06 MiB to compare, and 1.00 MiB are planned"
    asked = []
    monkeypatch.setattr(networks, "places_problem", lambda products, *_: asked.append(products))
    network = networks.Network(open_checkpoint(make_tiny("llama")), "auto", Packing.FILE)
    for ends in (True, False):
        network.exact_problem(torch.device("cpu"), 64, limit_bytes=GIB, ends=ends)
    assert asked[0] - asked[1] == {(64, network.head_rows)}  # it is on the first device only


def test_of_one_row_a_number_beside_heads_is_filled_where_the_row_is():
    """As Beam's scale of queries, [1, 1, S, 1]; a pass of one row leaves no other sign."""
    assert row_axis((1, 1, 5, 1), 5) == row_axis((1, 1, 1, 1), 1) == 2
    assert row_axis((1, 1, 64), 1) == row_axis((1, 5, 8), 5) == 1
