"""The cost of a pass: arithmetic where there is a formula, measured passes where there are some."""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_profile import PROJECT, curve, measured, profile, shape

from offload_rt.costs.pass_cost import (
    Decoded,
    ExpertWork,
    LayerLoad,
    LinkRates,
    PassLoad,
    PassTimes,
    cost_of,
    pass_times,
)
from offload_rt.device import compiled
from offload_rt.device.kinds import Processor
from offload_rt.errors import ConfigError, ProfileError
from offload_rt.profiling import decoding
from offload_rt.profiling.codec import decode, encode
from offload_rt.profiling.decoding import SHARES
from offload_rt.profiling.profile import (
    AttentionSpeed,
    Decoder,
    DecodeSpeed,
    DiskSlowdown,
    DiskSpeed,
    ExpertCurve,
    LayerTime,
    LayerWork,
    Number,
    Obtained,
    WeightOrder,
)
from offload_rt.profiling.rates import link_bytes_per_s
from offload_rt.profiling.store import load_profile

MIB = 2**20
WORK = LayerWork(weight_bytes=1000, flops_per_token=1000)


def load_of(layers, streamed, slots, **changed):
    made = [LayerLoad(work=WORK, home_bytes=1000) for _ in range(layers)]
    return PassLoad(layers=made, streamed=streamed, slots=slots, **changed)


def times_of(seconds, bytes_per_s=1000.0, head_s=0.0):
    return PassTimes(
        layer_s=tuple(seconds),
        head_s=head_s,
        home_bytes_per_s=bytes_per_s,
        numbers=(measured(1.0),),
    )


@given(
    seconds=st.lists(st.floats(0, 3), min_size=1, max_size=12),
    streamed=st.sets(st.integers(0, 11)),
    slots=st.integers(1, 5),
    between_s=st.floats(0, 5),
)
@settings(deadline=None)
def test_a_pass_takes_at_least_its_copies_or_kernels_and_at_most_both(
    seconds, streamed, slots, between_s
):
    order = sorted(i for i in streamed if i < len(seconds))
    load = load_of(len(seconds), order, slots, between_s=between_s)
    cost = cost_of(load, times_of(seconds))
    copies, kernels = len(order) * 1.0, sum(seconds) + between_s
    assert max(copies, kernels) <= cost.pass_s + 1e-6
    assert cost.pass_s <= copies + kernels + 1e-6
    assert cost.compute_s == pytest.approx(kernels)
    assert cost.stall_s == pytest.approx(cost.pass_s - kernels, abs=1e-6)
    assert cost.home_bytes == 1000 * len(order)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("kernel_s", [0.3, 1.0, 2.0])
def test_equal_layers_overlap_from_two_slots_on(slots, kernel_s):
    cost = cost_of(load_of(6, range(6), slots), times_of([kernel_s] * 6))
    assert cost.pass_s == pytest.approx(6 * (max(1.0, kernel_s) if slots > 1 else 1 + kernel_s))


@pytest.mark.parametrize("between_s", [0.5, 2.0, 9.0])
def test_a_drafter_hides_as_many_copies_as_there_are_slots(between_s):
    cost = cost_of(load_of(6, range(6), 3, between_s=between_s), times_of([0.0] * 6))
    assert cost.pass_s == pytest.approx(max(6.0, between_s + 3.0))


def test_resident_layers_between_streamed_ones_keep_the_link_busy():
    spread = cost_of(load_of(8, [1, 3, 5, 7], 2), times_of([0.5] * 8))
    behind = cost_of(load_of(8, [4, 5, 6, 7], 2), times_of([0.5] * 8))
    assert spread.pass_s == pytest.approx(4.0)
    assert behind.pass_s > spread.pass_s + 0.5


def test_streaming_without_slots_is_refused():
    with pytest.raises(ConfigError, match="2 layers are streamed through 0 slots"):
        cost_of(load_of(3, [0, 2], 0), times_of([0.0] * 3))


def test_dequantising_takes_the_measured_time_of_its_form_and_decoder(monkeypatch):
    monkeypatch.setattr(compiled, "problem", lambda: "")

    def speed(decoder, form, bits, rate, processor=Processor.CPU):
        return DecodeSpeed(
            processor=processor,
            decoder=decoder,
            form=form,
            bits=bits,
            numbers_per_s=measured(rate),
        )

    def seconds(made, *decoded):
        layer = LayerLoad(work=shape(1).work, home_bytes=5, decoded=decoded)
        load = PassLoad(layers=[layer], streamed=[], slots=0)
        times = pass_times(made, load, Processor.CPU, measured(1e9))
        return times.layer_s[0] - 1.0, times.obtained

    four = Decoded(numbers=10**9, form="packed", bits=4, decoder=Decoder.TORCH)
    quick = replace(four, decoder=Decoder.COMPILED)
    curves = (curve(1, {1: 1.0}),)
    assert seconds(profile(layers=curves)) == (0.0, Obtained.MEASURED)
    bare = profile(layers=curves)
    assert seconds(bare, four) == (pytest.approx(1e9 / 1.6e9), Obtained.ASSUMED)
    assert seconds(bare, quick) == (pytest.approx(1e9 / 6.5e9), Obtained.ASSUMED)
    speeds = (
        speed(Decoder.TORCH, "packed", 4, 2e9),
        speed(Decoder.TORCH, "awq", 4, 0.5e9),
        speed(Decoder.COMPILED, "packed", 4, 10e9),
        speed(Decoder.TORCH, "packed", 4, 1.0, Processor.CUDA),
    )
    made = profile(layers=curves, dequantising=speeds)
    assert seconds(made, four) == (pytest.approx(0.5), Obtained.MEASURED)
    assert seconds(made, quick) == (pytest.approx(0.1), Obtained.MEASURED)
    odd = pytest.approx(0.5 / SHARES["packed", 0])  # not as the slowest
    assert seconds(made, replace(four, bits=3)) == (odd, Obtained.ASSUMED)
    assert seconds(made, four, quick)[0] == pytest.approx(0.6)
    assert decode(encode(made)) == made


def test_experts_take_what_experts_were_timed_to_take():
    """Of those that some row is sent to; as parts of their layer where none was timed."""

    def timed(seconds, nbytes=100, exact=False):
        times = tuple(LayerTime(tokens=n, layer_s=measured(s)) for n, s in seconds.items())
        return ExpertCurve(processor=Processor.CPU, exact=exact, weight_bytes=nbytes, times=times)

    whole = curve(4, {1: 4.0})
    known = (timed({1: 1.0, 3: 2.0}), timed({1: 3.0, 3: 4.0}, 300), timed({1: 9.0}, exact=True))
    rest = shape(1).work
    experts = ExpertWork(count=2.5, nbytes=100, rows=1.0, rest=rest)

    def seconds(made, work, tile=1):
        layer = LayerLoad(
            work=whole.shape.work, home_bytes=5, expert_work=work, expert_part=0.25, missed_part=0.1
        )
        load = PassLoad(layers=[layer, layer], streamed=[], slots=0, tile=tile)
        times = pass_times(made, load, Processor.CPU, measured(1e9))
        return [(x, y) for x, y in zip(times.layer_s, times.experts_s, strict=True)][1]

    curves = (curve(1, {1: 1.0}), whole)
    plain, made = profile(layers=curves), profile(layers=curves, experts=known)
    assert seconds(plain, experts) == (4.0, 1.0) == seconds(made, None)
    assert seconds(made, experts) == (pytest.approx(1.0 + 2.5), pytest.approx(2.5))
    assert seconds(made, replace(experts, rows=2.0))[1] == pytest.approx(2.5 * 1.5)
    assert seconds(made, replace(experts, nbytes=200))[1] == pytest.approx(2.5 * 2.0)
    assert seconds(made, experts, tile=16)[1] == pytest.approx(2.5 * 9.0)
    assert decode(encode(made)) == made


@pytest.mark.parametrize("twin", [True, False])
def test_few_rows_of_an_expert_are_guessed_where_the_profile_timed_them_without_kernels(
    twin, monkeypatch
):
    """As in row-invariant passes, or a share of torch's time; of many rows torch's is right."""
    there = [True]
    monkeypatch.setattr(decoding, "kernels_multiply_plain", lambda: there[0])

    def timed(seconds, **more):
        times = tuple(LayerTime(tokens=n, layer_s=measured(s)) for n, s in seconds.items())
        return ExpertCurve(processor=Processor.CPU, weight_bytes=100, times=times, **more)

    usual = timed({1: 1.0, 16: 4.0, 64: 16.0})
    exact = (timed({1: 0.5, 16: 5.0, 64: 6.0}, exact=True),) if twin else ()

    def priced(rows, usual=usual, tile=1, dtype="bfloat16"):
        work = ExpertWork(count=1.0, nbytes=100, rows=rows, rest=shape(1).work)
        layer = LayerLoad(work=shape(2).work, home_bytes=5, expert_work=work, expert_part=0.5)
        load = PassLoad(layers=[layer], streamed=[], slots=0, tile=tile, dtype=dtype)
        made = profile(layers=(curve(1, {1: 1.0}),), experts=(usual, *exact))
        times = pass_times(made, load, Processor.CPU, measured(1e9))
        return times.experts_s[0], times.obtained, times.old_profile

    assert priced(1.0) == (pytest.approx(0.5 if twin else 0.6), Obtained.ASSUMED, True)
    assert priced(16.0)[0] == pytest.approx(4.0 if twin else 2.4)
    assert priced(64.0) == (pytest.approx(16.0), Obtained.MEASURED, False)
    assert not priced(1.0, tile=16)[2] and not priced(1.0, dtype="float32")[2]
    for few_rows in (32, 0):
        assert priced(1.0, replace(usual, few_rows=few_rows)) == (1.0, Obtained.MEASURED, False)
    there[0] = False
    assert priced(1.0) == (1.0, Obtained.MEASURED, False)


def test_layers_that_were_timed_in_other_passes_are_assumed():
    """Where kernels multiply bf16 in matrix registers in row-invariant passes, torch in others."""
    made = profile(layers=(curve(1, {1: 1.0, 16: 1.0}),))
    own = replace(made.machine, cpu="another", kernels=True, matrix_registers=True)
    as_timed = (Obtained.MEASURED, False)

    def known(tile, marked, machine=own, dtype="bfloat16"):
        layer = LayerLoad(work=shape(1).work, home_bytes=5)
        load = PassLoad(layers=[layer], streamed=[], slots=0, tile=tile, dtype=dtype)
        timed = replace(made, machine=machine, layers_exact=marked)
        assert decode(encode(timed)) == timed
        times = pass_times(timed, load, Processor.CPU, measured(1e9))
        return times.obtained, times.old_profile

    assert known(16, True) == known(1, False) == as_timed
    assert known(16, False) == (Obtained.ASSUMED, True)
    assert known(1, True) == (Obtained.ASSUMED, False)
    for machine in (replace(own, kernels=False), replace(own, matrix_registers=False)):
        assert known(16, False, machine=machine) == known(1, True, machine=machine) == as_timed
    assert known(16, False, machine=replace(own, kernels=None)) == as_timed  # it stands in
    assert known(1, True, dtype="float32") == as_timed


@pytest.mark.parametrize("kernel_s", [0.0, 0.4, 1.0])
def test_reads_are_slower_while_layers_compute(kernel_s):
    """In 8 n seconds of a pass of p, where p = 8 + half of these seconds' reads, 8 (8 n / p)."""
    load = load_of(8, range(8), 2)
    times = replace(
        times_of([kernel_s] * 8), slowdown=(1.0,) * 9, read_slowdown=1.5, device_bytes_per_s=(1e3,)
    )
    expected = 4.0 + (16.0 + 32.0 * kernel_s) ** 0.5
    assert cost_of(load, times).pass_s == pytest.approx(expected, rel=0.03)
    alone = replace(times, read_slowdown=1.0)
    assert cost_of(load, alone).pass_s == pytest.approx(8.0)


def test_who_dequantises_is_who_the_profile_timed(monkeypatch):
    """Whatever is here, unless it is the profile's own processor, or nothing was timed."""

    def speed(decoder):
        return DecodeSpeed(
            processor=Processor.CPU,
            decoder=decoder,
            form="packed",
            bits=4,
            numbers_per_s=measured(1e9 if decoder is Decoder.TORCH else 1e10),
        )

    both = (speed(Decoder.TORCH), speed(Decoder.COMPILED))
    here, there = "this processor", "another processor"
    monkeypatch.setattr(decoding, "processor", lambda: (here, ""))
    four = Decoded(numbers=10**10, form="packed", bits=4, decoder=Decoder.COMPILED, direct=True)
    as_stored = 10 / 6.5 - 1.0  # at a rate that is assumed, less the second of the product
    cases = [  # a profile's CPU, what it timed, whether it multiplies; kernels here; seconds
        (there, both, False, False, 1.0),
        (there, both, True, False, 0.0),
        (there, both[:1], False, True, 10.0),
        (there, both[:1], None, True, as_stored),
        (here, both, True, False, 10.0),
        (here, both, False, True, 0.0),
        (here, (), None, True, as_stored),
    ]
    for cpu, timed, multiplies, kernels, expected in cases:
        problem = "" if kernels else "not installed"
        monkeypatch.setattr(compiled, "problem", lambda problem=problem: problem)
        monkeypatch.setattr(decoding, "kernels_multiply", lambda kernels=kernels, **_: kernels)
        made = profile(layers=(curve(1, {1: 1.0}),), dequantising=timed)
        made = replace(made, machine=replace(made.machine, cpu=cpu, kernels=multiplies))
        layer = LayerLoad(work=shape(1).work, home_bytes=5, decoded=(four,))
        load = PassLoad(layers=[layer], streamed=[], slots=0)
        times = pass_times(made, load, Processor.CPU, measured(1e9))
        assert times.layer_s[0] - 1.0 == pytest.approx(expected), (cpu, timed, multiplies, kernels)
        assert decode(encode(made)) == made
    curves = (curve(1, {1: 1.0, 16: 1.0}),)
    registers = replace(made.machine, cpu=there, kernels=True, matrix_registers=True)
    made = replace(made, machine=registers, dequantising=both, layers=curves)
    for tile, expected in ((1, 1.0), (16, 0.0)):  # only in row-invariant passes
        times = pass_times(made, replace(load, tile=tile), Processor.CPU, measured(1e9))
        assert times.layer_s[0] - 1.0 == pytest.approx(expected), tile


def test_times_come_from_the_profile():
    attention = AttentionSpeed(
        processor=Processor.CPU,
        query_tokens=1,
        queries_per_head=1,
        kv_bytes=MIB,
        s_per_kv_byte=Number(value=1e-9, obtained=Obtained.ASSUMED, source="a guess"),
    )
    made = profile(layers=(curve(1, {1: 1.0, 8: 3.0}),), attention=(attention,))
    plain = LayerLoad(work=shape(1).work, home_bytes=5)
    reading = LayerLoad(work=shape(1).work, home_bytes=5, kv_bytes=10**9)
    head = LayerWork(
        weight_bytes=2 * plain.work.weight_bytes, flops_per_token=2 * plain.work.flops_per_token
    )
    load = PassLoad(layers=[plain, reading], streamed=[], slots=0, head=head)
    times = pass_times(made, load, Processor.CPU, measured(1e9))
    assert times.layer_s == pytest.approx((1.0, 2.0)) and times.head_s == pytest.approx(2.0)
    assert times.obtained is Obtained.ASSUMED
    exactly = replace(attention, s_per_kv_byte=measured(3e-9), exact=True)
    both = replace(made, attention=(attention, exactly))
    times = pass_times(both, replace(load, tile=16), Processor.CPU, measured(1e9))
    assert times.layer_s[1] - times.layer_s[0] == pytest.approx(3.0)
    away = replace(plain, kv_home_bytes=10**9)
    blocks = PassLoad(layers=[away], streamed=[], slots=0, kv_slots=2, kv_block_bytes=3 * 10**8)
    for block_s, kv_s in ((0.2, 1.0), (0.5, 4 * 0.5)):  # the host enqueues while kernels run
        times = pass_times(made, replace(blocks, kv_block_s=block_s), Processor.CPU, measured(1e9))
        assert times.kv_s == pytest.approx((kv_s,))
    only = PassLoad(layers=[plain], streamed=[], slots=0, tokens=8)
    times = pass_times(made, only, Processor.CPU, measured(1e9))
    assert times.layer_s == pytest.approx((3.0,)) and times.obtained is Obtained.MEASURED
    with pytest.raises(ProfileError, match="cuda"):
        pass_times(made, only, Processor.CUDA, measured(1e9))


def test_row_invariant_passes_take_their_rows_as_the_processor_multiplies_them():
    made = profile(layers=(curve(1, {1: 1.0, 16: 2.0, 32: 3.0, 128: 5.0}),))
    apart = replace(
        made, machine=replace(made.machine, cpu="another", kernels=False, matrix_registers=True)
    )
    load = PassLoad(layers=[LayerLoad(work=shape(1).work, home_bytes=5)], streamed=[], slots=0)

    def seconds(profile, rows, tile, processor=Processor.CPU):
        exact = replace(load, tokens=rows, tile=tile, head=shape(1).work)
        times = pass_times(profile, exact, processor, measured(1e9))
        assert times.head_s == pytest.approx(times.layer_s[0])
        return times.layer_s[0]

    assert [seconds(apart, n, 16) for n in (1, 17, 33, 64, 128)] == pytest.approx([2, 3, 5, 6, 12])
    assert seconds(apart, 128, 1) == seconds(made, 128, 16) == pytest.approx(5.0)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_kernels_take_longer_for_as_long_as_the_disk_is_read(factor):
    """All the time where the disk is the limit, never where nothing is streamed."""
    disk = DiskSpeed(
        file_system="ext4", direct=True, block_bytes=1, queue_depth=4, bytes_per_s=measured(100.0)
    )
    slowdown = DiskSlowdown(weight_bytes=1, tokens=1, factor=measured(factor))
    made = profile(layers=(curve(1, {1: 1.0}),), disk=(disk,), beside_disk=(slowdown,))
    layer = LayerLoad(work=shape(1).work, home_bytes=10**4)
    rates = LinkRates(home=(measured(100.0),), readers=4)

    def kernels_s(streamed, who=Processor.CPU, rates=rates):
        load = PassLoad(layers=[layer] * 4, streamed=streamed, slots=2)
        return cost_of(load, pass_times(made, load, who, rates)).compute_s

    assert kernels_s([]) == pytest.approx(4.0)
    assert kernels_s(range(4)) == pytest.approx(4.0 * factor, rel=1e-3)
    paced = replace(rates, readers=None)
    assert kernels_s(range(4), rates=paced) == pytest.approx(4.0, rel=1e-3)


def test_each_layer_is_slowed_as_its_weights_lie():
    """And the head, which comes last."""
    disk = DiskSpeed(
        file_system="ext4", direct=True, block_bytes=1, queue_depth=4, bytes_per_s=measured(100.0)
    )
    factors = {WeightOrder.PLAIN: 1.25, WeightOrder.PACKED: 1.5}
    made = profile(
        layers=tuple(replace(curve(1, {1: 1.0}), weights=order) for order in factors),
        disk=(disk,),
        beside_disk=tuple(
            DiskSlowdown(weights=order, weight_bytes=1, tokens=1, factor=measured(factor))
            for order, factor in factors.items()
        ),
    )
    plain, packed = (LayerLoad(work=shape(1).work, home_bytes=5, weights=o) for o in factors)
    load = PassLoad(layers=[plain, packed], streamed=[0], slots=2, head=plain.work)
    packed_head = replace(load, head_weights=WeightOrder.PACKED)
    rates = LinkRates(home=(measured(100.0),), readers=4)
    found = [pass_times(made, one, Processor.CPU, rates).slowdown for one in (load, packed_head)]
    assert found == [pytest.approx((1.25, 1.5, 1.25)), pytest.approx((1.25, 1.5, 1.5))]


def test_part_of_a_pass_without_reads_is_not_slowed():
    """A pass whose kernels take 8 s beside 2 s of reads: a fifth of it is slowed, at most."""
    times = times_of([1.0] * 8, bytes_per_s=4000.0)
    load = load_of(8, range(8), 8)
    plain = cost_of(load, times)
    slowed = cost_of(load, replace(times, slowdown=(1.5,) * 9))
    assert plain.compute_s == pytest.approx(8.0)
    assert 8.5 < slowed.compute_s < 9.0


def test_a_copy_that_is_whole_later_is_waited_for_where_copies_are_the_limit():
    """Two slots: a layer's kernels begin later by the delay, and so the refill of its slot."""
    times = times_of([0.9] * 6, bytes_per_s=1000.0)
    plain = cost_of(load_of(6, range(6), 2), times)
    later = cost_of(load_of(6, range(6), 2), replace(times, home_delay_s=0.4))
    ahead = cost_of(load_of(6, range(6), 6), replace(times, home_delay_s=0.4))
    assert plain.pass_s == pytest.approx(6.0)
    assert later.pass_s == pytest.approx(6 * (1.0 + 0.4 + 0.9) / 2)  # each slot in turn
    assert ahead.pass_s == pytest.approx(6.0)


def test_kernels_that_fill_a_pass_leave_nothing_to_wait_for():
    """However their sum is rounded."""
    rounded = [0.12, 0.33, 0.72, 0.71, 0.94, 0.42]
    for seconds in (rounded, rounded[::-1], rounded * 5, [0.1] * 30):
        assert cost_of(load_of(len(seconds), [], 0), times_of(seconds)).stall_s == 0.0


def gpu_pass(name, layer_bytes, layers, streamed, tokens=1):
    """Streaming from pinned memory through two slots, streamed layers spread evenly."""
    work = LayerWork(weight_bytes=layer_bytes, flops_per_token=layer_bytes)
    made = load_profile(PROJECT / "profiles" / f"{name}.json")
    order = [i * layers // streamed for i in range(streamed)]
    loads = [LayerLoad(work=work, home_bytes=layer_bytes) for _ in range(layers)]
    load = PassLoad(layers=loads, streamed=order, slots=2, tokens=tokens)
    rate = link_bytes_per_s(made, layer_bytes)
    return cost_of(load, pass_times(made, load, Processor.CUDA, rate))


def test_a_published_pass_on_a_4090():
    # Sequoia's baseline (project page). The link rate was derived from it, so what this checks is
    # that kernels and pipeline add nothing to a pass that its bytes do not explain. More published
    # times: test_published.py.
    sequoia = gpu_pass("rtx4090-pcie4x16", 1_711_276_032, 80, 69)
    assert sequoia.pass_s == pytest.approx(4.54, rel=0.02)


@pytest.mark.parametrize(("kernels_s", "measured_s"), [(1.72 - 1.25, 1.72), (1.70 - 0.43, 1.70)])
def test_measured_passes_on_two_cores(kernels_s, measured_s):
    # docs/RESULTS.md, "Streaming against raw reads": 24 of 30 layers, 4.83 GB a pass, two slots,
    # raw reads at 2.75 and 2.72 GB/s; kernels are the pass less its wait.
    layer_bytes = round(4.83e9 / 24)
    loads = [LayerLoad(work=WORK, home_bytes=layer_bytes) for _ in range(30)]
    streamed = [i for i in range(30) if i % 5]
    load = PassLoad(layers=loads, streamed=streamed, slots=2)
    cost = cost_of(load, times_of([kernels_s / 30] * 30, bytes_per_s=2.75e9))
    assert cost.pass_s == pytest.approx(measured_s, rel=0.05)


def test_a_cost_is_quick_enough_to_search_with():
    load, times = load_of(80, range(80), 4), times_of([0.1] * 80)
    start = time.process_time()
    cost_of(load, times)
    assert time.process_time() - start < 0.1
