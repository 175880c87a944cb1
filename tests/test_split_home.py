"""Streamed layers of which some are in host memory and the others in their files."""

import os
import random
import shutil
import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from engines import all_logits, engine_for, generate
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes_double import nodes_engine
from test_costs_one_road import IDS, LARGE, MACHINES, SAME, asked_of_simulate, model_of, planned
from value_double import open_as, open_double
from waits import wait_until

from offload_rt.config import HomeKind, RuntimeConfig
from offload_rt.costs import sizes as sizes_module
from offload_rt.costs.drafters import Drafting
from offload_rt.costs.machine import FreeMemory
from offload_rt.costs.sizes import ahead_bytes
from offload_rt.costs.timeline import TimedLayer, TimedPass, steady_pass
from offload_rt.device.base import PAGE_BYTES, STAGING_BYTES, CopyPiece
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.host_memory import allocate_host
from offload_rt.device.kinds import CPU, CUDA, FREE_SHARE
from offload_rt.errors import CheckpointError, DeviceError, PlanError
from offload_rt.model import weight_files as files_module
from offload_rt.planning.fit import (
    PlacedRun,
    RunLoad,
    _place_ends,
    _split,
    _with_homes,
    place_run,
    with_home,
)
from offload_rt.planning.given_rates import Acceptance
from offload_rt.planning.placement import Demand, ExpertDemand, Placement, Stripe
from offload_rt.planning.striping import place_striped
from offload_rt.profiling.adjust import adjust_profile
from offload_rt.profiling.rates import disk_bytes_per_s
from offload_rt.streaming import ahead as ahead_module
from offload_rt.streaming.ahead import ReadAhead

READERS, LAYERS = 2, 10


class Layer:
    """A layer in files, of pieces of a few bytes that take a moment to read."""

    def __init__(self, data, cuts, delay_s=0.0):
        ends = [0, *cuts, len(data)]
        self.data, self.parts = data, list(zip(ends, ends[1:], strict=False))
        self.delay_s, self.error = delay_s, None

    def pieces(self):
        return [
            CopyPiece(
                offset=a,
                image_bytes=b - a,
                nbytes=b - a,
                load=lambda staging, a=a, b=b: self._load(a, b, staging),
            )
            for a, b in self.parts
        ]

    def check(self):
        pass

    def _load(self, start, stop, staging):
        time.sleep(self.delay_s * random.random())
        if self.error is not None:
            raise self.error
        return staging.tensor[: stop - start].copy_(self.data[start:stop])


def opened(layers, buffers=2, readers=READERS):
    memory = allocate_host(buffers * STAGING_BYTES)
    return closing(ReadAhead(dict(enumerate(layers)), memory, readers))


@settings(deadline=None, max_examples=40)
@given(
    cuts=st.lists(st.lists(st.integers(1, 99), max_size=4).map(sorted), min_size=1, max_size=4),
    asked=st.lists(st.integers(0, 3), max_size=12),
    buffers=st.integers(1, 5),
    readers=st.integers(1, 4),
    staged=st.booleans(),
)
def test_a_copy_has_the_bytes_of_its_layer_whatever_is_asked_for(
    cuts, asked, buffers, readers, staged
):
    """In the cycle, out of it, over again; with copies that wait for pieces behind each other."""
    dice = torch.Generator().manual_seed(1)
    layers = [
        Layer(torch.randint(255, (100,), generator=dice, dtype=torch.uint8), cut, 2e-4)
        for cut in cuts
    ]
    units = [unit % len(layers) for unit in [0, *asked]]
    with opened(layers, buffers, readers) as ahead:
        taken, waiting = [], []
        for unit in units:
            image = allocate_host(100)
            source = ahead.source(unit)
            waiting.append((unit, image, source.pieces() if staged else source.blocks(image)))
            if len(waiting) < 3 and unit % 2:  # several copies are asked for at once
                continue
            taken += [(u, copied(image, parts)) for u, image, parts in waiting]
            waiting.clear()
        taken += [(u, copied(image, parts)) for u, image, parts in waiting]
        for unit, found in taken:
            assert torch.equal(found, layers[unit].data), unit


def copied(image, parts):
    staging = allocate_host(STAGING_BYTES)
    for part in parts:
        if isinstance(part, CopyPiece):
            end = part.offset + part.image_bytes
            image.tensor[part.offset : end].copy_(part.load(staging))
        else:
            part.run()
    return image.tensor


def test_layers_are_read_while_nobody_asks_as_far_as_there_are_buffers():
    layers = [Layer(torch.arange(100, dtype=torch.uint8), [50]) for _ in range(6)]
    read = []
    for number, layer in enumerate(layers):
        layer._load = lambda a, b, s, load=layer._load, n=number: (read.append(n), load(a, b, s))[1]
    with opened(layers, buffers=5) as ahead:
        wait_until(lambda: len(read) == 5)
        time.sleep(0.02)
        assert sorted(read) == [0, 0, 1, 1, 2]
        copied(allocate_host(100), ahead.source(0).pieces())
        wait_until(lambda: len(read) == 7)
        assert sorted(read[5:]) == [2, 3]
        copied(allocate_host(100), ahead.source(4).pieces())  # what was read is dropped
        wait_until(lambda: len(read) == 14)
        assert sorted(read[7:]) == [0, 0, 1, 4, 4, 5, 5]


def test_what_cannot_be_read_is_told_to_who_copies_it():
    layers = [Layer(torch.zeros(100, dtype=torch.uint8), []) for _ in range(2)]
    with opened(layers) as ahead:
        wait_until(lambda: sum(len(each.ready) for each in ahead._readings) == 2)
        layers[1].error = CheckpointError("it was truncated")
        copied(allocate_host(100), ahead.source(0).pieces())
        copied(allocate_host(100), ahead.source(1).pieces())  # was read before
        copied(allocate_host(100), ahead.source(0).pieces())
        with pytest.raises(CheckpointError, match="truncated"):
            copied(allocate_host(100), ahead.source(1).pieces())
        assert len(ahead._free) <= 2


def test_closing_ends_a_copy_that_waits():
    gate = threading.Event()
    layer = Layer(torch.zeros(100, dtype=torch.uint8), [])
    layer._load = lambda a, b, s: (gate.wait(5), s.tensor[: b - a])[1]
    ahead = ReadAhead({0: layer}, allocate_host(STAGING_BYTES), 1)
    found = []

    def copy():
        try:
            copied(allocate_host(100), ahead.source(0).pieces())
        except DeviceError as error:
            found.append(str(error))

    threads = [threading.Thread(target=copy), threading.Thread(target=ahead.close)]
    for thread in threads:
        thread.start()
    wait_until(lambda: found)
    gate.set()
    for thread in threads:
        thread.join(5)
    assert found == ["the device was closed while a copy was waiting"]


# --- the same bits -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(make_tiny):
    return make_tiny("llama", num_hidden_layers=LAYERS, dtype="bfloat16")


@pytest.fixture
def small_pieces(monkeypatch):
    """Layers are larger than what is read at once, as those of real models are."""
    nbytes = 2 * PAGE_BYTES
    for module in (files_module, sizes_module):
        monkeypatch.setattr(module, "PIECE_BYTES", nbytes)
    for module in (sizes_module, ahead_module):
        monkeypatch.setattr(module, "STAGING_BYTES", nbytes + 2 * PAGE_BYTES)


@pytest.fixture(scope="module")
def resident(model):
    with engine_for(model) as engine:
        logits = all_logits(engine)
        engine.forget()
        return logits, generate(engine, tokens=6), engine.placement.layer_bytes[0]


def limit_for(held, layer_bytes):
    """Host memory for so many layers, and for what others are read into."""
    return held * layer_bytes + ahead_bytes(layer_bytes, READERS)


SPLIT = {"home": HomeKind.SPLIT, "readers": READERS, "resident_layers": 1}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("held", "slots", "link"), [(1, 1, None), (1, 1, (2e9,)), (2, 2, (2e9,)), (4, 3, None)]
)
def test_split_streams_the_bits_of_resident_layers(
    small_pieces, model, resident, held, slots, link
):
    logits, answer, layer_bytes = resident
    limit = limit_for(held, layer_bytes)
    options = SPLIT | {"slots": slots, "link_bytes_per_s": link, "host_limit_bytes": limit}
    with engine_for(model, **options) as engine:
        assert len(engine.placement.in_files) == LAYERS - 1 - held
        assert engine.placement.host_bytes <= limit
        assert torch.equal(all_logits(engine), logits)
        engine.forget()
        assert generate(engine, tokens=6) == answer
        assert engine.memory().device_peak_bytes <= engine.placement.device_limit_bytes
        names = {thread.name for thread in threading.enumerate()}
        assert "ahead-0" in names
    assert "ahead-0" not in {thread.name for thread in threading.enumerate()}


def test_nodes_with_split_homes_stream_the_bits_of_resident_layers(small_pieces, model, resident):
    logits, answer, layer_bytes = resident
    options = SPLIT | {"host_limit_bytes": limit_for(1, layer_bytes)}
    with nodes_engine(model, 2, **options) as engine:
        assert [len(share.in_files) for share in engine.placement.shares] == [4, 3]
        assert torch.equal(all_logits(engine), logits)
        engine.forget()
        assert generate(engine, tokens=6) == answer


@pytest.mark.usefixtures("small_pieces")
def test_a_prompt_that_breaks_off_leaves_the_order_right(
    small_pieces, model, resident, monkeypatch
):
    logits, _, layer_bytes = resident
    options = SPLIT | {"slots": 2, "host_limit_bytes": limit_for(1, layer_bytes)}
    with engine_for(model, **options) as engine:
        ring, broken = engine.runner._rings[0], [3]
        lend = ring.lend

        def fails(unit):
            broken[0] -= 1
            if broken[0] == 0:
                raise KeyboardInterrupt
            return lend(unit)

        monkeypatch.setattr(ring, "lend", fails)
        with pytest.raises(KeyboardInterrupt):
            all_logits(engine)
        engine.forget()
        assert torch.equal(all_logits(engine), logits)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("driver", "gpus"), [({}, 1), ({}, 2), ({"pin": False}, 2)])
def test_a_gpu_takes_what_host_memory_has_room_for(model, monkeypatch, driver, gpus):
    open_as(monkeypatch, CpuDevice())  # images that lie alike are computed alike
    with engine_for(model, resident_layers=LAYERS, device_limit_bytes=2**31) as engine:
        logits, layer_bytes = all_logits(engine), engine.placement.layer_bytes[0]
    open_double(monkeypatch, count=gpus, **driver)
    limit = 2 * layer_bytes + gpus * ahead_bytes(layer_bytes, READERS)
    options = {"resident_layers": 0, "slots": 2, "readers": READERS, "host_limit_bytes": limit}
    if gpus > 1:
        options["device"] = "cpu,cpu"
    with engine_for(model, device_limit_bytes=2**31, **options) as engine:
        assert engine.placement.home is HomeKind.SPLIT
        assert len(engine.placement.in_files) == LAYERS - 2
        assert torch.equal(all_logits(engine), logits)
        engine.forget()
        assert torch.equal(all_logits(engine), logits)


@pytest.mark.usefixtures("small_pieces")
def test_a_file_that_changes_ends_the_run(model, tmp_path, resident):
    folder = shutil.copytree(model, tmp_path / "copy")
    options = SPLIT | {"slots": 2, "host_limit_bytes": limit_for(1, resident[2])}
    with engine_for(folder, **options) as engine:
        all_logits(engine)
        path = next(folder.glob("*.safetensors"))
        os.utime(path, (1, 1))
        with pytest.raises(CheckpointError, match="changed while running"):
            for _ in range(3):
                engine.forget()
                all_logits(engine)


# --- what lives where ----------------------------------------------------------------------------


def placed(sizes):
    demand = Demand(layer_bytes=tuple(sizes), base_bytes=0, kv_bytes=0, workspace_bytes=0)
    return Placement(
        resident=(),
        streamed=tuple(range(len(sizes))),
        slots=2,
        slot_bytes=max(sizes),
        demand=demand,
        device_limit_bytes=1,
    )


@given(
    sizes=st.lists(st.integers(1, 100), min_size=2, max_size=12),
    limit=st.integers(0, 1300),
    kind=st.sampled_from([CPU, CUDA]),
    home=st.sampled_from([HomeKind.AUTO, HomeKind.SPLIT]),
)
def test_host_memory_is_filled_and_not_overfilled(sizes, limit, kind, home):
    sizes = [size * 2**20 for size in sizes]
    placement, limit = placed(sizes), limit * 2**20
    config = RuntimeConfig(home=home, readers=READERS)
    least = min(sizes) + ahead_bytes(max(sizes), READERS)
    try:
        found = with_home(placement, config, kind, limit)
    except PlanError as refusal:
        assert home is HomeKind.SPLIT and "no room for a layer" in str(refusal)
        assert limit < sum(sizes) and limit < max(sizes) + ahead_bytes(max(sizes), READERS)
        return
    if home is HomeKind.AUTO and kind is CPU:
        assert found.home is HomeKind.DISK
    elif sum(sizes) <= limit:
        assert found.home is HomeKind.HOST and not found.in_files
    elif found.home is HomeKind.SPLIT:
        assert least <= found.host_bytes <= limit
        assert 0 < len(found.in_files) < len(sizes)
    else:
        assert found.home is HomeKind.DISK and home is HomeKind.AUTO and not found.host_bytes


@given(count=st.integers(1, 9), layers=st.integers(1, 5), share=st.floats(0.0, 0.99))
def test_a_share_of_experts_is_what_is_held(count, layers, share):
    each = 1000
    experts = ExpertDemand(
        rest_bytes=(10,) * layers,
        slot_bytes=each,
        counts=(count,) * layers,
        per_token=1,
        image_bytes=each * count * layers,
        file_bytes=each * count * layers,
    )
    demand = Demand(
        layer_bytes=(10,) * layers, base_bytes=0, kv_bytes=0, workspace_bytes=0, experts=experts
    )
    placement = replace(placed([10] * layers), demand=demand, streamed=(), expert_slots=1)
    found = _split(placement, int(share * experts.image_bytes), READERS)
    if found is None:
        assert share * count < 1
        return
    held = int(found.expert_share * count)  # as `runner/loading.py` has it
    assert found.held_bytes == each * held * layers <= share * experts.image_bytes
    assert found.expert_share == pytest.approx(held / count)


@pytest.mark.parametrize("otherwise", [None, HomeKind.DISK, HomeKind.SPLIT])
def test_an_embedding_in_host_memory_may_be_what_makes_layers_fit(otherwise):
    whole, made = placed([10] * 3), placed([10] * 2)

    def homed(placement):
        if placement is whole and otherwise is None:
            raise PlanError("does not fit", 1)
        return replace(placement, home=HomeKind.HOST if placement is made else otherwise)

    found = _place_ends(lambda apart: made if apart else whole, homed, may_be_apart=True)
    assert found is made


def test_each_node_splits_by_its_own_host_memory():
    mib, layers = 2**20, range(12)
    demand = Demand(layer_bytes=(10 * mib,) * 12, base_bytes=0, kv_bytes=0, workspace_bytes=0)
    stripes = [Stripe(name=name, limit_bytes=20 * mib, apart=True) for name in "abc"]
    placement = place_striped(demand, stripes, slots=2, resident_layers=0)
    config = RuntimeConfig(
        home=HomeKind.SPLIT, machines=("a", "b", "c"), device="cpu,cpu,cpu", readers=1
    )
    ahead = ahead_bytes(10 * mib, 1)
    further = [(ahead + 21 * mib) / FREE_SHARE, 60 * mib]
    free = FreeMemory(
        device_bytes=0, host_bytes=0, further_host_bytes=tuple(int(n) for n in further)
    )
    made = _with_homes(placement, config, CPU, free, 80 * mib)
    assert [share.home for share in made.shares] == ["host", "split", "host"]
    assert [len(share.layers_in_files) for share in made.shares] == [0, 2, 0]
    assert (made.home, made.ahead_bytes, len(made.in_files)) == ("split", ahead, 2)
    assert made.held_bytes == 100 * mib and made.layers == list(layers)
    roomy, own = replace(free, further_host_bytes=(90 * mib,) * 2), (None, ahead + 21 * mib, None)
    stated = replace(config, host_limit_bytes=80 * mib, machine_host_bytes=own)
    made = _with_homes(placement, stated, CPU, roomy, 80 * mib)
    assert [share.home for share in made.shares] == ["host", "split", "host"]
    free = replace(free, further_host_bytes=(mib, 60 * mib))
    with pytest.raises(PlanError, match="b: --home split: host memory of 8"):
        _with_homes(placement, config, CPU, free, 80 * mib)
    unasked = _with_homes(placement, replace(config, home=HomeKind.AUTO), CUDA, free, 80 * mib)
    assert [share.home for share in unasked.shares] == ["host", "disk", "host"]
    assert unasked.home == "split" and len(unasked.in_files) == 4


# --- what it takes -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    staying=st.sets(st.integers(0, 11), min_size=1, max_size=11),
    disks=st.tuples(st.floats(0.1, 2.0), st.floats(0.1, 2.0)),
    slots=st.integers(2, 4),
    devices=st.integers(1, 2),
    own_disks=st.booleans(),
)
def test_a_pass_takes_as_long_as_the_slower_of_disk_and_link(
    staying, disks, slots, devices, own_disks
):
    """Layers of a second each; at most what it takes from host memory, and the disk in turn."""
    layers = [
        TimedLayer(
            kernel_s=0.0,
            home_bytes=800,
            read_bytes=800 if i in staying else 0,
            device=i * devices // 12,
        )
        for i in range(12)
    ]
    work = TimedPass(
        layers=layers,
        slots=slots,
        home_bytes_per_s=(800.0,) * devices,
        files_bytes_per_s=[800.0 * disk for disk in disks],
        ahead_bytes=800 * devices,
        own_disks=own_disks,
    )
    made = steady_pass(work)
    held = steady_pass(replace(work, layers=[replace(layer, read_bytes=0) for layer in layers]))
    link_s = 12 / devices
    each = [sum(layers[i].device == d for i in staying) for d in range(devices)]
    own_s = [count / disk for count, disk in zip(each, disks, strict=False)]
    disk_s = max(own_s) if own_disks else len(staying) / disks[0]
    assert max(link_s, disk_s) <= made.pass_s * (1 + 1e-9)
    assert made.pass_s <= (held.pass_s + disk_s) * (1 + 1e-6)
    assert made.transfer_s == pytest.approx(max(link_s, disk_s))


@pytest.mark.parametrize("every", [2, 3, 4, 6])
def test_disk_and_link_are_busy_at_once_where_layers_are_spread(every):
    """In turn it would take 12 + 12; one of both waits for the other at the ends of a layer."""
    layers = [
        TimedLayer(kernel_s=0.0, home_bytes=800, read_bytes=0 if i % every else 800)
        for i in range(12)
    ]
    work = TimedPass(
        layers=layers,
        slots=2,
        home_bytes_per_s=(800.0,),
        files_bytes_per_s=[800.0 / every],
        ahead_bytes=800,
    )
    assert 12 <= steady_pass(work).pass_s <= 12.5


@pytest.mark.parametrize("room", [1, 2**30])
def test_each_machine_has_the_disk_of_its_own_in_a_prediction(tmp_path, room):
    """The second one's is slow; it has no layer in its host memory, or some."""
    first = MACHINES["gpu"]
    slow = replace(first, profile=adjust_profile(first.profile, ["disk_bytes_per_s=3e8"]))
    speeds = replace(first, further=(slow,), network=(1e9, 1e-4))
    disk, own = (disk_bytes_per_s(one.profile, 4).value for one in (first, slow))
    assert own < disk / 5
    checkpoint = model_of(tmp_path, LARGE | IDS | {"model_type": "llama", "num_hidden_layers": 8})
    config = RuntimeConfig(
        machines=("desk", "shelf"),
        device="cuda:0,cuda:1",
        resident_layers=0,
        slots=2,
        machine_host_bytes=(None, room),
    )
    free = FreeMemory(
        device_bytes=2**36, host_bytes=2**36, further_bytes=(2**36,), further_host_bytes=(2**36,)
    )
    load = RunLoad(capacities=[64], prompt_tokens=64)
    placement = place_run(checkpoint, config, CUDA, load=load, free=free, speeds=speeds)
    homes = [share.home for share in placement.shares]
    assert homes == [HomeKind.HOST, HomeKind.DISK if room == 1 else HomeKind.SPLIT]
    run = PlacedRun(
        checkpoint=checkpoint, config=config, speeds=speeds, placement=placement, context_tokens=64
    )
    work = run.model.load(1)
    link, there = (rate.value for rate in run.rates(work).home)
    read = [layer.read_bytes for layer in work.layers if layer.device]
    if room == 1:
        assert there == own < link and not any(read)
        read = [layer.home_bytes for layer in work.layers if layer.device]
    else:
        assert there == link and run.times(work).files_bytes_per_s == (disk, own)
    assert sum(read) / own <= run.cost(work).pass_s <= 1.1 * sum(read) / own


@pytest.mark.parametrize("held", [1, 3])
def test_plan_and_simulate_say_the_same(tmp_path, held):
    """Law 8; and it is faster than from the files, slower than from host memory."""
    speeds = MACHINES["gpu"]
    checkpoint = model_of(tmp_path, LARGE | IDS | {"model_type": "llama", "num_hidden_layers": 8})
    found = []
    for home in (HomeKind.DISK, HomeKind.AUTO, HomeKind.HOST):
        limit = 2**29 * (held + 1) if home is HomeKind.AUTO else None
        config = RuntimeConfig(resident_layers=1, slots=2, home=home, host_limit_bytes=limit)
        case = (checkpoint, config, speeds, Drafting(), Acceptance(), 4096)
        one, other = planned(*case), asked_of_simulate(*case)
        assert one.prediction.s_per_token == pytest.approx(other.s_per_token, rel=SAME)
        assert one.prediction.limit == other.limit
        found.append((one.placement.home, one.prediction.pass_s))
    assert [home for home, _ in found] == [HomeKind.DISK, HomeKind.SPLIT, HomeKind.HOST]
    disk_s, split_s, host_s = (seconds for _, seconds in found)
    assert host_s < split_s < disk_s
