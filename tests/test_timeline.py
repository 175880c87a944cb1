"""Passes in virtual time: one link for weights and KV, two devices, and when a pass is steady."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_profile import PROJECT

from offload_rt.costs import timeline
from offload_rt.costs.pass_cost import (
    LayerLoad,
    Limit,
    LinkRates,
    PassLoad,
    PassTimes,
    cost_of,
    pass_times,
)
from offload_rt.costs.timeline import TimedLayer, TimedPass, steady_pass
from offload_rt.device.kinds import Processor
from offload_rt.device.sim import SimBuffer, SimLink, SimStream
from offload_rt.errors import ConfigError
from offload_rt.profiling.profile import LayerWork, Number, Obtained
from offload_rt.profiling.store import load_profile

SECONDS = st.floats(0, 3)
COPIES = st.lists(st.tuples(st.integers(0, 2), SECONDS, SECONDS), min_size=1, max_size=25)


@given(copies=COPIES)
def test_a_shared_link_carries_one_byte_at_a_time_and_never_idles(copies):
    link, tick = SimLink(), 0.01  # a clock of ticks is the slow formula: who is first, crosses
    streams = [SimStream(str(i), link=link) for i in range(3)]
    taken: set[int] = set()
    for number, wait, seconds in copies:
        stream = streams[number]
        wait, ticks = round(wait / tick), round(seconds / tick)
        stream.time_s += wait * tick
        begin = round(stream.time_s / tick)
        free = (t for t in itertools.count(begin) if t not in taken)
        mine = list(itertools.islice(free, ticks))
        stream.copy(SimBuffer(0), SimBuffer(ticks * tick))
        assert stream.time_s == pytest.approx((mine[-1] + 1) * tick if mine else begin * tick)
        taken |= set(mine)
    assert link.busy_s == pytest.approx(len(taken) * tick)


@given(copies=COPIES, uploads=st.lists(SECONDS, max_size=6), piece=st.integers(1, 80))
def test_an_upload_waits_for_the_piece_that_is_crossing(copies, uploads, piece):
    link, tick = SimLink(), 0.01  # the slow formula follows each piece of each copy
    stream, ends = SimStream("copies", link=link), {}
    for _, wait, seconds in copies:
        stream.time_s += round(wait / tick) * tick
        begin, ticks = round(stream.time_s / tick), round(seconds / tick)
        for start in range(begin, begin + ticks, piece):
            stop = min(start + piece, begin + ticks)
            ends |= dict.fromkeys(range(start + 1, stop + 1), stop)  # asked within, at its end
        stream.copy(SimBuffer(0), SimBuffer(ticks * tick))
    for ready in sorted(round(ready / tick) for ready in uploads):
        asked_s = ready * tick - tick / 2  # else rounding decides on which side of an end it is
        crosses_s = link.let_in(asked_s, piece * tick)
        assert crosses_s == pytest.approx(ends[ready] * tick if ready in ends else asked_s)


@pytest.mark.parametrize("passes", [1, 4, 16])
def test_drafting_waits_for_pieces_or_else_for_layers(passes):
    """Layers of 1 s come in all the time; a drafter computes 0.8 s for each step."""
    layers = [TimedLayer(kernel_s=0.0, home_bytes=1)] * 6
    work = TimedPass(layers=layers, slots=3, draft_s=0.8, draft_passes=passes)

    def waits_s(piece_s):
        return steady_pass(replace(work, piece_s=piece_s)).draft_wait_s

    assert waits_s(0.0) == 0.0
    assert waits_s(0.01) <= passes * 0.01
    # The first pass begins as a layer has come; uncut, each of three more then hold up another.
    assert waits_s(1.0) == pytest.approx(min(passes - 1, 3) * (1.0 - 0.8 / passes))


def test_a_store_uses_the_other_direction():
    link = SimLink()
    one = SimStream("one", 1.0, link=link, back_bytes_per_s=2.0)
    other = SimStream("other", 1.0, link=link)
    one.store(SimBuffer(0), SimBuffer(6))
    other.copy(SimBuffer(0), SimBuffer(5))
    assert (one.time_s, other.time_s, link.busy_s) == (3.0, 5.0, 5.0)


LAYER = st.builds(
    TimedLayer,
    kernel_s=SECONDS,
    home_bytes=st.one_of(st.none(), st.integers(0, 5)),
    kv_bytes=st.integers(0, 9),
    kv_kernel_s=SECONDS,
    back_bytes=st.integers(0, 2),
    device=st.integers(0, 1),
)
PASS = st.builds(
    TimedPass,
    layers=st.lists(LAYER, min_size=1, max_size=8),
    slots=st.integers(1, 4),
    kv_slots=st.integers(1, 4),
    kv_block_bytes=st.integers(1, 4),
    home_bytes_per_s=st.just((1.0, 2.0)),
    kv_bytes_per_s=st.just(1.5),
    back_bytes_per_s=st.just(4.0),
    hop_s=st.floats(0, 0.5),
    end_s=SECONDS,
    draft_s=SECONDS,
    draft_passes=st.integers(0, 5),
    piece_s=st.sampled_from([0.0, 0.1, 2.0]),
)


def kernels_s(work):
    own = sum(layer.kernel_s + layer.kv_kernel_s * (layer.kv_bytes > 0) for layer in work.layers)
    places = [0, *(layer.device for layer in work.layers), 0]
    hops = sum(a != b for a, b in itertools.pairwise(places))
    return own + hops * work.hop_s + work.end_s + work.draft_s


@given(work=PASS)
@settings(deadline=None)
def test_a_pass_takes_at_least_its_busiest_part_and_at_most_all_of_them(work):
    done = steady_pass(work)
    copies = sum((layer.home_bytes or 0) + layer.kv_bytes for layer in work.layers)
    back = sum(layer.back_bytes for layer in work.layers) / work.back_bytes_per_s
    assert done.pass_s >= max(done.transfer_s, kernels_s(work)) - 1e-6
    uploads_s = (1 + work.draft_passes) * work.piece_s
    assert done.pass_s <= copies + kernels_s(work) + back + uploads_s + 1e-6
    assert 0.0 <= done.draft_wait_s <= work.draft_passes * work.piece_s + 1e-9


@given(work=PASS)
@settings(deadline=None, max_examples=60)
def test_a_pass_that_repeats_itself_is_the_long_run_mean(work):
    devices = [timeline._Device(work, device) for device in range(2)]
    ends = []
    for _ in range(120):
        timeline._run_pass(work, devices)
        ends.append(devices[0].compute.time_s)
    mean = (ends[-1] - ends[59]) / 60
    # Where the copies catch up with the kernels by a little each pass it is not steady so soon.
    assert steady_pass(work).pass_s == pytest.approx(mean, rel=0.02, abs=1e-9)


def kv_layers(count, kv_bytes, **changed):
    return [TimedLayer(kernel_s=0.1, kv_bytes=kv_bytes, kv_kernel_s=0.1, **changed)] * count


def test_streamed_kv_costs_its_bytes_and_two_slots_hide_attention():
    base = {"slots": 0, "kv_block_bytes": 10, "kv_bytes_per_s": 100.0}
    one = steady_pass(TimedPass(layers=kv_layers(4, 100), kv_slots=1, **base))
    two = steady_pass(TimedPass(layers=kv_layers(4, 100), kv_slots=2, **base))
    # With one slot only the first block of a layer comes in while another layer's kernels run.
    assert one.pass_s == pytest.approx(4 * (1.0 + 0.1))
    assert two.pass_s == pytest.approx(4.0, rel=0.1) and two.pass_s > 3.99


@pytest.mark.parametrize("draft_s", [1.0, 15.0, 40.0, 90.0])
@pytest.mark.parametrize("weights", [False, True])
def test_while_a_drafter_works_both_rings_go_on_filling(draft_s, weights):
    """As many blocks and layers as there are slots come in meanwhile, the rest after it."""
    home_bytes, slots = (6, 2) if weights else (None, 0)
    layers = kv_layers(4, 10, home_bytes=home_bytes)
    layers = [replace(layer, kernel_s=0.0, kv_kernel_s=0.0) for layer in layers]
    work = TimedPass(layers=layers, slots=slots, kv_slots=3, kv_block_bytes=5, end_s=draft_s)
    copies_s, ahead_s = 4 * 10.0, 3 * 5.0
    if weights:
        copies_s, ahead_s = copies_s + 4 * 6.0, ahead_s + 2 * 6.0
    assert steady_pass(work).pass_s == pytest.approx(max(copies_s, draft_s + copies_s - ahead_s))


def test_larger_blocks_for_the_replay_change_nothing_that_matters(monkeypatch):
    layers = kv_layers(8, 10_000, home_bytes=3000)
    rates = {"home_bytes_per_s": (1e4,), "kv_bytes_per_s": 1e4}
    work = TimedPass(layers=layers, slots=2, kv_slots=4, kv_block_bytes=40, end_s=1.0, **rates)
    coarse = steady_pass(work)
    monkeypatch.setattr(timeline, "_MOST_BLOCKS", 10**6)
    assert coarse.pass_s == pytest.approx(steady_pass(work).pass_s, rel=0.01)
    assert coarse.transfer_s == pytest.approx(8 * 1.3)


def test_two_devices_share_the_streaming():
    layers = [TimedLayer(kernel_s=0.01, home_bytes=10) for _ in range(8)]
    striped = [TimedLayer(kernel_s=0.01, home_bytes=10, device=i % 2) for i in range(8)]
    one = steady_pass(TimedPass(layers=layers, slots=2, home_bytes_per_s=(10.0,)))
    two = steady_pass(
        TimedPass(layers=striped, slots=2, home_bytes_per_s=(10.0, 10.0), hop_s=0.001)
    )
    slow = steady_pass(TimedPass(layers=striped, slots=2, home_bytes_per_s=(10.0, 5.0)))
    assert one.pass_s == pytest.approx(8.0)
    assert two.pass_s == pytest.approx(4.0, rel=0.02)
    assert slow.pass_s == pytest.approx(8.0, rel=0.02)


def test_rows_go_home_while_blocks_come():
    still = TimedPass(layers=kv_layers(4, 100), slots=0, kv_slots=2, kv_block_bytes=10)
    moving = replace(still, layers=kv_layers(4, 100, back_bytes=20))
    assert steady_pass(moving).pass_s == pytest.approx(steady_pass(still).pass_s, rel=0.02)


def test_a_block_comes_after_its_newest_rows_are_home():
    layers = [TimedLayer(kernel_s=0.0, kv_bytes=1, back_bytes=100)]
    work = TimedPass(layers=layers, slots=0, kv_slots=1, kv_block_bytes=1)
    assert steady_pass(work).pass_s == pytest.approx(100, rel=0.02)


NUMBERS = (Number(value=1.0, obtained=Obtained.ASSUMED, source="a guess"),)
WORK = LayerWork(weight_bytes=10, flops_per_token=10)


@pytest.mark.parametrize(
    ("layer_s", "between_s", "limit"),
    [(0.1, 0.0, Limit.TRANSFER), (2.0, 0.0, Limit.COMPUTE), (0.1, 9.0, Limit.DRAFTING)],
)
def test_the_limit_of_a_pass_is_named(layer_s, between_s, limit):
    layers = [LayerLoad(work=WORK, home_bytes=10)] * 4
    load = PassLoad(layers=layers, streamed=range(4), slots=2, between_s=between_s)
    times = PassTimes(layer_s=(layer_s,) * 4, head_s=0.0, home_bytes_per_s=10.0, numbers=NUMBERS)
    assert cost_of(load, times).limit is limit


def test_what_uploads_of_a_drafter_wait_counts_as_drafting():
    layers = [LayerLoad(work=WORK, home_bytes=10)] * 6
    load = PassLoad(layers=layers, streamed=range(6), slots=3, between_s=0.8, between_passes=16)
    times = PassTimes(layer_s=(0.1,) * 6, head_s=0.1, home_bytes_per_s=10.0, numbers=NUMBERS)
    alone, cut = cost_of(load, times), cost_of(load, replace(times, piece_s=0.02))
    assert 0.8 == alone.between_s < cut.between_s <= 0.8 + 16 * 0.02
    for cost in (alone, cut):
        assert cost.compute_s == pytest.approx(0.7 + cost.between_s)
        assert cost.pass_s == pytest.approx(cost.compute_s + cost.stall_s)


@pytest.mark.parametrize(
    ("processor", "readers", "piece_s"),
    [
        (Processor.CUDA, None, 16 * 2**20 / 25e9),
        (Processor.CUDA, 4, 0.0),
        (Processor.CPU, None, 0.0),
    ],
)
def test_uploads_wait_on_links_to_gpus_that_memory_feeds(processor, readers, piece_s):
    name = {Processor.CUDA: "rtx4090-pcie4x16", Processor.CPU: "cpu-2core-avx512bf16"}[processor]
    profile = load_profile(PROJECT / "profiles" / f"{name}.json")
    rates = LinkRates(home=(Number(value=25e9, obtained=Obtained.MEASURED),), readers=readers)
    load = PassLoad(layers=[], streamed=(), slots=0)
    assert pass_times(profile, load, processor, rates).piece_s == pytest.approx(piece_s)


def test_one_slot_is_bound_by_latency():
    layers = [LayerLoad(work=WORK, home_bytes=10)] * 4
    load = PassLoad(layers=layers, streamed=range(4), slots=1)
    times = PassTimes(layer_s=(1.0,) * 4, head_s=0.0, home_bytes_per_s=10.0, numbers=NUMBERS)
    assert cost_of(load, times).limit is Limit.LATENCY


def test_kv_without_slots_and_devices_without_links_are_refused():
    times = PassTimes(
        layer_s=(1.0,),
        head_s=0.0,
        home_bytes_per_s=1.0,
        numbers=NUMBERS,
        device_bytes_per_s=(1.0,),
    )
    layers = [LayerLoad(work=WORK, home_bytes=10, kv_home_bytes=5)]
    with pytest.raises(ConfigError, match="KV of 1 layers .* 0 slots of 64 bytes"):
        cost_of(PassLoad(layers=layers, streamed=[], slots=0, kv_block_bytes=64), times)
    away = [LayerLoad(work=WORK, home_bytes=10, device=1)]
    with pytest.raises(ConfigError, match="2 devices, but the speeds of 1 links"):
        cost_of(PassLoad(layers=away, streamed=[], slots=0), times)
