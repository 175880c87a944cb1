"""Law 6, planned: a placement keeps its limit, covers each layer once, names what would do."""

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from offload_rt.errors import ConfigError, PlanError
from offload_rt.planning.placement import Demand, place

MIB = 2**20


@st.composite
def demands(draw):
    layers = draw(st.integers(1, 100))
    size = draw(st.integers(0, 300 * MIB))
    uneven = draw(st.booleans())
    return Demand(
        layer_bytes=tuple(size + (i * MIB if uneven else 0) for i in range(layers)),
        base_bytes=draw(st.integers(0, 500 * MIB)),
        kv_bytes=draw(st.integers(0, 500 * MIB)),
        workspace_bytes=draw(st.integers(0, 300 * MIB)),
        packed_head_bytes=draw(st.sampled_from([0, MIB, 500 * MIB])),
    )


limits = st.integers(1, 40 * 2**30)
counts = st.none() | st.integers(1, 6)


def try_place(demand, limit, **options):
    try:
        return place(demand, limit, **options)
    except (PlanError, ConfigError):
        return None


@given(demand=demands(), left=st.integers(-600 * MIB, 1000 * MIB))
def test_a_reordered_head_takes_what_all_layers_leave_and_costs_none(demand, left):
    limit = max(1, demand.fixed_bytes + sum(demand.layer_bytes) + left)
    placement = try_place(demand, limit)
    plain = try_place(replace(demand, packed_head_bytes=0), limit)
    assert (placement is None) == (plain is None)
    if placement is None:
        return
    assert (placement.resident, placement.slots) == (plain.resident, plain.slots)
    fits = plain.device_bytes + demand.packed_head_bytes <= limit and not plain.streamed
    assert placement.packs_head == (fits and demand.packed_head_bytes > 0)
    more = demand.packed_head_bytes * placement.packs_head
    assert placement.device_bytes == plain.device_bytes + more
    assert placement.base_bytes == demand.base_bytes + more


@given(demand=demands(), limit=limits, slots=counts)
def test_a_placement_keeps_its_limit_and_covers_each_layer_once(demand, limit, slots):
    placement = try_place(demand, limit, slots=slots)
    assume(placement is not None)
    assert placement.device_bytes <= limit
    covered = sorted(placement.resident + placement.streamed)
    assert covered == list(range(len(demand.layer_bytes)))
    assert all(demand.layer_bytes[i] <= placement.slot_bytes for i in placement.streamed)
    assert placement.slots <= len(placement.streamed)
    assert bool(placement.slots) == bool(placement.streamed)
    if slots is not None:
        assert placement.slots == slots


@given(demand=demands(), limit=limits, more=st.integers(0, 10 * 2**30))
def test_more_memory_never_keeps_fewer_layers(demand, limit, more):
    small, large = try_place(demand, limit), try_place(demand, limit + more)
    if small is not None:
        assert large is not None
        assert len(large.resident) >= len(small.resident)


@given(demand=demands(), limit=limits)
def test_a_refusal_names_a_limit_that_works_and_one_mib_less_does_not(demand, limit):
    try:
        place(demand, limit)
    except PlanError as error:
        named = int(re.search(r"--device-memory (\d+)MiB", str(error))[1]) * MIB
        assert place(demand, named).device_bytes <= named
        if named > MIB:
            with pytest.raises(PlanError):
                place(demand, named - MIB)


@given(layers=st.integers(2, 80), resident=st.integers(1, 79))
def test_resident_layers_are_spread_evenly(layers, resident):
    assume(resident < layers)
    demand = Demand(layer_bytes=(MIB,) * layers, base_bytes=0, kv_bytes=0, workspace_bytes=0)
    placement = place(demand, 1000 * MIB, resident_layers=resident)
    assert len(placement.resident) == resident
    gaps = [b - a for a, b in zip(placement.resident, placement.resident[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_what_is_left_of_the_limit_becomes_slots():
    demand = Demand(layer_bytes=(10 * MIB,) * 8, base_bytes=MIB, kv_bytes=MIB, workspace_bytes=MIB)
    tight = place(demand, 23 * MIB, resident_layers=0)
    assert (tight.slots, tight.device_bytes) == (2, 23 * MIB)
    assert place(demand, 43 * MIB, resident_layers=0).slots == 4
    assert place(demand, 13 * MIB).slots == 1  # copying and computing in turn, but it runs


@pytest.mark.parametrize(("mib", "slots"), [(100, 2), (16, 2), (10, 3), (7, 4), (1, 4)])
def test_small_layers_get_a_ring_that_keeps_the_link_busy(mib, slots):
    demand = Demand(layer_bytes=(mib * MIB,) * 30, base_bytes=0, kv_bytes=0, workspace_bytes=0)
    limit = (10 + slots) * mib * MIB  # no room to spare
    placement = place(demand, limit)
    assert (placement.slots, len(placement.resident)) == (slots, 10)
    assert place(demand, limit, slots=2).slots == 2


def test_more_resident_layers_than_the_model_has_is_an_error():
    demand = Demand(layer_bytes=(MIB,) * 3, base_bytes=0, kv_bytes=0, workspace_bytes=0)
    with pytest.raises(ConfigError, match="--resident-layers is 4, the model has 3 layers"):
        place(demand, MIB, resident_layers=4)
