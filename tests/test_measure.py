"""Measuring: each part against a machine whose speeds are known, and what it leaves behind."""

import ctypes
import mmap
import os
import statistics
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count, cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from offload_rt.device import compiled, system
from offload_rt.device.base import PIECE_BYTES
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.cuda import nvml
from offload_rt.device.kinds import CUDA, Processor
from offload_rt.device.system import cache_bytes, file_system, thread_times
from offload_rt.errors import DeviceError, ProfileError
from offload_rt.kernels import assembling, products
from offload_rt.kernels.layers import MANY_ROWS
from offload_rt.kernels.products import MOST_ROWS
from offload_rt.kernels.rounded import RoundedProduct
from offload_rt.model import exactness
from offload_rt.model.attention_function import CONTEXT_KEYWORD, PassContext, Segment
from offload_rt.model.experts import compute_experts, lend_experts
from offload_rt.model.formats import on_gpu
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.packed import can_pack
from offload_rt.model.formats.stored import AT_ONCE_FEW
from offload_rt.model.weight_files import WeightFiles
from offload_rt.profiling import compute, dequantising, experts, link, neighbours, timing
from offload_rt.profiling import disk as disk_module
from offload_rt.profiling import measure as measure_module
from offload_rt.profiling.compute import (
    TimedLayer,
    measure_attention,
    measure_beside_reads,
    measure_heads,
    measure_layers,
    measure_reads_beside,
)
from offload_rt.profiling.disk import (
    JUST_WRITTEN,
    default_folder,
    folder_to_read,
    measure_disk,
    open_for_reading,
)
from offload_rt.profiling.effort import Effort
from offload_rt.profiling.measure import measure
from offload_rt.profiling.memory import measure_memory, thread_counts
from offload_rt.profiling.profile import (
    Direction,
    LayerCurve,
    LinkLoad,
    MemoryUse,
    Obtained,
    WeightOrder,
)
from offload_rt.profiling.run_memory import RunMemory
from offload_rt.profiling.store import BUSY
from offload_rt.profiling.timing import (
    Curve,
    Timed,
    measured,
    measured_rate,
    take_in_turns,
    take_samples,
    typical,
)

KIB, MIB = 2**10, 2**20
QUICK = Effort(
    least_samples=2,
    most_samples=2,
    number_s=0.0,
    again_s=0.0,
    link_blocks=(KIB, 4 * KIB),
    link_sample_bytes=8 * KIB,
    disk_depths=(1, 2),
    disk_file_bytes=4 * MIB,
    disk_sample_bytes=MIB,
    memory_bytes=MIB,
    pin_bytes=MIB,
    pin_most_bytes=4 * MIB,
    shapes=((64, 128, 4, 2, 16),),
    cold_bytes=200 * KIB,
    caches=0,
    compute_sample_s=0.0,
    tokens=(1, 4),
    packed_tokens=(1, 2),
    heads=((64, 128),),
    head_rows=(1, 4),
    experts=((32, 64), (32, 128)),
    expert_rows=(1, 4),
    beside_disk=(0, 1),
    beside_tokens=(1, 4),
    beside_read_bytes=MIB,
    beside_sample_s=0.0,
    kv_bytes=64 * KIB,
    query_tokens=(1, 4),
    dequantised_side=256,
)


def nothing():
    pass


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Whatever else runs on the machine of the tests."""
    monkeypatch.setattr(neighbours, "_waited_s", lambda: 0.0)
    monkeypatch.setattr(neighbours, "_stolen_s", lambda: 0.0)


@pytest.fixture
def on_disk(tmp_path):
    if file_system(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("the folder for tests is in memory")
    return tmp_path


def test_samples_stop_when_time_or_count_is_reached():
    runs = []

    def sample_s():
        runs.append(time.sleep(0.002))
        return float(len(runs))

    effort = Effort(least_samples=3, most_samples=5, scattered_samples=5, number_s=60.0)
    assert take_samples(sample_s, effort) == [2.0, 3.0, 4.0, 5.0, 6.0]  # the first warms up
    runs.clear()
    assert take_samples(sample_s, replace(effort, number_s=0.0)) == [2.0, 3.0, 4.0]


def test_a_sample_of_something_short_is_the_lower_quartile_of_many_runs(monkeypatch):
    now, lengths = [0.0], iter([3.0, 2.9, 2.99, 9.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def run():
        now[0] += next(lengths)

    assert Timed(run, least_s=6.0)() == pytest.approx(2.945)
    assert Timed(run)() == 9.0


@pytest.mark.parametrize("idle, second", [(True, 5.0), (False, 1.03)])
def test_where_nothing_else_computes_the_typical_run_counts(idle, second, monkeypatch):
    now, lengths = [0.0], iter([1.0, 2.0, 9.0, 3.0, 5.0, 9.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def run():
        now[0] += next(lengths)

    sample = Curve(Effort(idle=idle)).timed(run, 10.0, computes=False)
    assert sample() == pytest.approx(2.0 if idle else 1.03)
    assert sample() == pytest.approx(second)  # the quickest of before says nothing of later


def test_the_quickest_run_shows_what_is_enough(monkeypatch):
    """However often other work disturbs, and whatever the kernel says of it."""
    now, lengths = [0.0], iter([9.0, 9.0, 1.0, 9.0, 9.0, 9.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def run():
        now[0] += next(lengths)

    sample = Timed(run, least_s=18.5)
    assert sample() == pytest.approx(1.03) and sample.is_disturbed
    assert sample() == pytest.approx(1.03)  # of the runs before, too
    alone = Timed(lambda: now.__setitem__(0, now[0] + 2.0), least_s=9.0)
    assert alone() == 2.0 and not alone.is_disturbed


@pytest.mark.parametrize("others", [0.0, 0.1, 0.5])
def test_what_a_run_needs_is_the_processor_time_of_the_thread_that_asks(others, monkeypatch):
    """Nine of ten seconds it slept, as others had no core; or one of them did most of the work."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "thread_time", lambda: now[0] / 10)
    monkeypatch.setattr(timing.time, "process_time", lambda: now[0] * (0.1 + others))
    monkeypatch.setattr(timing, "compute_threads", lambda: 2)

    def run():
        now[0] += 10.0

    sample, needed = Timed(run, computes=True), max(1.0, 10.0 * (0.1 + others) / 2)
    assert sample() == pytest.approx(needed) and not sample.is_disturbed
    assert typical(run, 1.0)() == pytest.approx(needed)
    assert Timed(run)() == pytest.approx(10.0)  # it goes on elsewhere while this thread sleeps


def test_what_is_compared_takes_turns():
    """Two that are equally fast at each moment look equal, however the moments differ."""
    clock = count()
    effort = replace(QUICK, least_samples=2, most_samples=3, scattered_samples=3, number_s=60.0)
    both = [lambda: float(next(clock) // 2)] * 2
    assert take_in_turns(both, effort) == [[1.0, 2.0, 3.0]] * 2
    assert take_in_turns(both, replace(effort, number_s=0.0)) == [[5.0, 6.0]] * 2


def test_each_number_has_its_own_share_of_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def lasting(seconds):
        def sample_s():
            now[0] += seconds
            return seconds

        return sample_s

    effort = replace(QUICK, least_samples=2, most_samples=9, number_s=1.0)
    long, short = take_in_turns([lasting(2.0), lasting(0.25)], effort)
    assert (len(long), len(short)) == (2, 4)
    assert now[0] == 2 * 2.0 + 5 * 0.25  # the warm-up of the long one is a sample


def test_a_number_is_the_lower_decile_with_the_distance_of_the_quartiles():
    number = measured([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (number.value, number.spread, number.samples) == (1.4, 2.0, 5)
    assert number.obtained is Obtained.MEASURED
    assert measured([7.0]).spread == 0.0
    rate = measured_rate(12, [1.0, 2.0, 3.0, 4.0, 100.0])
    assert rate.value == pytest.approx(12 / 1.4) and rate.samples == 5
    assert rate.spread == pytest.approx(12 / 1.4 - 12 / 3.4)


class SlowDisk:
    """A disk whose reads take equally long, however many are in flight."""

    def __init__(self, monkeypatch, read_s):
        self.read_s, self.now, self.most, self.done = read_s, 0, 0, 0
        files = partial(WeightFiles, preadv=self.preadv)
        monkeypatch.setattr(disk_module, "WeightFiles", files)

    def preadv(self, fd, buffers, offset):
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(self.read_s)
        self.now -= 1
        self.done += 1
        return os.preadv(fd, buffers, offset)


def test_disk_by_queue_depth(on_disk, monkeypatch):
    slow = SlowDisk(monkeypatch, 0.02)
    effort = replace(QUICK, disk_sample_bytes=4 * PIECE_BYTES, disk_file_bytes=4 * PIECE_BYTES)
    one, four = measure_disk(on_disk, Curve(replace(effort, disk_depths=(1, 4))), nothing)
    assert slow.most == 4
    assert [one.queue_depth, four.queue_depth] == [1, 4]
    assert one.block_bytes == PIECE_BYTES and one.direct
    assert one.bytes_per_s.value <= PIECE_BYTES / 0.02
    assert four.bytes_per_s.value > 2 * one.bytes_per_s.value


def test_the_temporary_file_has_no_name_while_it_is_read(on_disk):
    seen = []
    measure_disk(on_disk, Curve(QUICK), lambda: seen.append(os.listdir(on_disk)))
    assert seen == [[], []]


def test_a_model_is_read_and_nothing_is_written(on_disk, monkeypatch):
    path = on_disk / "model.safetensors"
    path.write_bytes(os.urandom(3 * MIB + 123))
    reads = []

    def preadv(fd, buffers, offset):
        reads.append((os.readlink(f"/proc/self/fd/{fd}"), offset))
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(disk_module, "WeightFiles", partial(WeightFiles, preadv=preadv))
    monkeypatch.setattr(disk_module, "_fill", None)  # calling it would fail
    before = path.stat().st_mtime_ns
    measure_disk(on_disk, Curve(QUICK), nothing)
    assert {name for name, _ in reads} == {str(path)}
    assert {offset for _, offset in reads} == {0, MIB, 2 * MIB}  # turns over all of the file
    assert os.listdir(on_disk) == [path.name] and path.stat().st_mtime_ns == before


def cached_pages(path):
    """How many pages of a file the page cache holds, without touching them."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        found = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        address = ctypes.addressof(anchor := ctypes.c_char.from_buffer(view))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), len(view), found) == 0
        del anchor
        return sum(page & 1 for page in found)


def test_the_largest_model_that_can_be_read_is_chosen(on_disk, monkeypatch):
    """Not one that is too small, whose file is gone, or that is in memory."""
    monkeypatch.setenv("HF_HUB_CACHE", str(on_disk))
    monkeypatch.setattr(disk_module, "demo_folder", lambda: on_disk / "demo")
    assert folder_to_read(1) == default_folder()
    folders = [on_disk / "demo", *(on_disk / f"models--a--{n}/snapshots/1" for n in "bcde")]
    for folder, nbytes in zip(folders, (3, 5, 4, 9, 8), strict=True):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(nbytes))
    (folders[3] / "model.safetensors").unlink()
    (folders[3] / "model.safetensors").symlink_to("gone")
    kinds = {folders[4]: "tmpfs"}
    monkeypatch.setattr(disk_module, "file_system", lambda path: kinds.get(path.parent, "ext4"))
    assert folder_to_read(5) == folders[1]
    assert folder_to_read(6) == default_folder()


def test_the_page_cache_holds_nothing_of_what_is_timed(on_disk, monkeypatch):
    path = on_disk / "model.safetensors"
    path.write_bytes(os.urandom(2 * MIB))
    os.sync()
    timed, cached = disk_module.Timed, []

    def look(run):
        cached.append(cached_pages(path))
        path.read_bytes()  # somebody else wants it in the cache
        return timed(run)

    path.read_bytes()
    assert cached_pages(path) == 2 * MIB // mmap.PAGESIZE
    monkeypatch.setattr(disk_module, "Timed", look)
    measure_disk(on_disk, Curve(QUICK), nothing)
    assert cached == [0] * 6


def test_a_speed_of_memory_is_refused(on_disk, monkeypatch):
    monkeypatch.setattr(disk_module, "_cached", lambda fd, offset: True)
    with pytest.raises(ProfileError, match="served from memory.*--folder"):
        measure_disk(on_disk, Curve(QUICK), nothing)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no folder in memory")
def test_a_folder_in_memory_is_refused():
    with pytest.raises(ProfileError, match="/dev/shm is served from memory .tmpfs.*--folder"):
        measure_disk(Path("/dev/shm"), Curve(QUICK), nothing)
    with (
        pytest.raises(ProfileError, match="/dev/shm is served from memory .tmpfs.*--folder"),
        open_for_reading(Path("/dev/shm"), QUICK, 2),
    ):
        pass


def test_a_missing_or_full_folder_is_a_sentence(on_disk):
    with pytest.raises(ProfileError, match="absent is no folder.*--folder"):
        measure_disk(on_disk / "absent", Curve(QUICK), nothing)
    with pytest.raises(ProfileError, match="free, measuring its disk needs 2.00 EiB|2097152 TiB"):
        measure_disk(on_disk, Curve(replace(QUICK, disk_file_bytes=2**60)), nothing)


def test_host_memory_by_threads():
    threads = torch.get_num_threads()
    speeds = measure_memory(Curve(QUICK), nothing)
    assert [(s.use, s.threads) for s in speeds] == [
        (use, count) for use in MemoryUse for count in thread_counts()
    ]
    assert all(s.bytes_per_s.samples == 2 for s in speeds)
    assert torch.get_num_threads() == threads


def timed_dequantising(monkeypatch, device):
    """What is found where a run takes 4 ms and has to make numbers."""
    called, ticked = [], []

    def timed(run, least_s, *, computes):
        def sample_s():
            bring, stored, _, out, *_ = run.args
            run()
            assert out.isfinite().all() and out.any()
            out.zero_()
            called.append((stored.form, stored.bits))
            return 0.004

        return sample_s

    monkeypatch.setattr(Curve, "timed", lambda curve, *given, **named: timed(*given, **named))
    effort = Curve(replace(QUICK, again_s=0.0))
    found = dequantising.measure_dequantising(
        device, torch.bfloat16, effort, partial(ticked.append, 1)
    )
    assert len(ticked) == len(dequantising.MEASURED)
    assert set(called) == {(Form(s.form), s.bits) for s in found}
    return found


def test_dequantising_is_timed_for_each_form_and_whoever_does_it(monkeypatch):
    cpu = CpuDevice()
    try:
        found = timed_dequantising(monkeypatch, cpu)
    finally:
        cpu.close()
    assert all(s.numbers_per_s.value == pytest.approx(256 * 256 / 0.004) for s in found)
    kinds = [(Form(s.form), s.bits) for s in found if s.decoder == "torch"]
    if compiled.problem():
        assert kinds == [*dequantising.MEASURED]
        return
    both = [(f, b) for f, b in dequantising.MEASURED if f is not Form.CODED]
    assert kinds == both  # of codes numpy is never timed beside numba
    twice = [(Form(s.form), s.bits) for s in found if s.decoder == "compiled"]
    integers = [(Form.PACKED, 4), (Form.PACKED, 8), (Form.AWQ, 4), (Form.GPTQ, 4)]
    assert twice == [*integers, (Form.CODED, 12), (Form.CODED, 11)]


@pytest.mark.parametrize("triton", [True, False])
def test_dequantising_on_a_gpu_is_timed_for_whoever_does_it(monkeypatch, triton):
    """On a double: Triton's kernels where there are some, and eight of them before a wait."""
    launched, waited = [], []

    def fake(kernel, tensors, numbers, out):
        launched.append(kernel)
        out.fill_(1.0)

    monkeypatch.setattr(on_gpu, "dequantise", fake)
    monkeypatch.setattr(on_gpu, "is_there", lambda: triton)
    event = SimpleNamespace(synchronize=lambda: waited.append(len(launched)))
    double = SimpleNamespace(
        kind=CUDA,
        torch_device=torch.device("cpu"),
        compute=SimpleNamespace(record=lambda: event),
    )
    found = timed_dequantising(monkeypatch, double)
    assert {s.processor for s in found} == {Processor.CUDA}
    by = {(Form(s.form), s.bits): s.decoder for s in found}
    if not triton:
        assert not launched and set(by.values()) == {"torch"}
        assert by.keys() == set(dequantising.MEASURED) - {(Form.CODED, 12), (Form.CODED, 11)}
        return
    slow = {(Form.BNB4, 4), (Form.BNB8, 8), (Form.PACKED, 3)}
    assert by == {k: "torch" if k in slow else "compiled" for k in dequantising.MEASURED}
    assert all(s.numbers_per_s.value == pytest.approx(8 * 256 * 256 / 0.004) for s in found)
    assert set(launched) == {
        *["integers", "grid", "fours", "coded", "nested", "blocks", "super_blocks"]
    }
    assert len(launched) * len(by) == 8 * len(waited) * (len(by) - len(slow))


class Links:
    """A machine with GPUs whose links need a fixed time for a copy, then run at a rate."""

    FIXED_S = 1e-5
    RATES = {("h2d", True): 2e10, ("d2h", True): 1.5e10, ("h2d", False): 5e9, ("d2h", False): 4e9}

    def __init__(self, gpus=1, refuse=None, most=None):
        self.gpus, self.refuse, self.most = gpus, refuse, most
        self.registered, self.on_device, self.busy = {}, set(), 0

    def missing(self, index):
        return None if index < self.gpus else "no such GPU"

    def open(self, device):
        return None, Stream(self, slower=1 + device.index)

    def allocate(self, nbytes, device):
        memory = torch.empty(nbytes, dtype=torch.uint8)
        self.on_device.add(memory.data_ptr())
        return memory

    def register(self, address, nbytes):
        if self.most is not None and sum(self.registered.values()) + nbytes > self.most:
            return "out of memory"
        if self.refuse is None:
            self.registered[address] = nbytes
        return self.refuse

    def unregister(self, address):
        del self.registered[address]

    def copy_s(self, dst, src):
        h2d = dst.data_ptr() in self.on_device
        host = src if h2d else dst
        assert (src.data_ptr() in self.on_device) is not h2d
        pinned = host.data_ptr() in self.registered
        return self.FIXED_S + src.numel() / self.RATES["h2d" if h2d else "d2h", pinned]


class Stream:
    """A queue with a clock of its own; a stream of GPU n is n + 1 times as slow."""

    def __init__(self, machine, slower):
        self.machine, self.slower, self.now_s = machine, slower, 0.0

    def record(self):
        at = self.now_s
        return SimpleNamespace(
            at=at, synchronize=nothing, seconds_until=lambda later: later.at - at
        )

    def copy(self, dst, src):
        self.now_s += self.slower * self.machine.copy_s(dst, src)

    def synchronize(self):
        pass


def links_of(machine, *, is_pinned):
    roads = link.open_roads(machine, machine.gpus, QUICK)
    if not is_pinned:
        return link.measure_links(roads, Curve(QUICK), nothing, is_pinned=False)
    with link.pinned(machine, roads) as refused:
        assert refused is None
        return link.measure_links(roads, Curve(QUICK), nothing, is_pinned=True)


@pytest.mark.parametrize("is_pinned", [True, False])
def test_links_by_block_size_direction_and_memory(is_pinned):
    machine = Links(gpus=2)
    found = links_of(machine, is_pinned=is_pinned)
    for speed in found:
        rate = Links.RATES[str(speed.direction), is_pinned]
        seconds = (1 + speed.gpu) * (Links.FIXED_S + speed.block_bytes / rate)
        assert speed.bytes_per_s.value == pytest.approx(speed.block_bytes / seconds)
        assert speed.pinned is is_pinned
    alone = {(s.gpu, s.direction, s.block_bytes) for s in found if s.load is LinkLoad.ALONE}
    assert alone == {(g, d, b) for g in (0, 1) for d in Direction for b in QUICK.link_blocks}
    loads = {s.load for s in found}
    assert loads == (set(LinkLoad) if is_pinned else {LinkLoad.ALONE})
    assert machine.registered == {}


def test_one_gpu_is_not_measured_together_with_itself():
    found = links_of(Links(), is_pinned=True)
    assert {s.load for s in found} == {LinkLoad.ALONE, LinkLoad.CPU_BUSY}


def test_page_locking_and_its_refusal():
    machine = Links()
    (speed,) = link.measure_pinning(machine, QUICK, nothing)
    assert speed.block_bytes == MIB and speed.bytes_per_s.value > 0 and machine.registered == {}
    assert link.measure_pinning(Links(refuse="out of memory"), QUICK, nothing) == ()


@pytest.fixture
def cpu():
    device = CpuDevice()
    yield device
    device.close()


def test_the_timed_layer_is_the_shape_it_claims(cpu):
    (shape,) = QUICK.layer_shapes("float32", 4)
    layer = TimedLayer(shape, cpu, torch.float32, WeightOrder.PLAIN, QUICK)
    linears = [m for m in layer._layers[0].modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in linears)
    assert shape.weight_bytes == 4 * weights
    assert shape.work.flops_per_token == 2 * weights
    assert len(layer._layers) == -(-QUICK.cold_bytes // shape.weight_bytes) > 1
    addresses = {
        m.weight.data_ptr() for one in layer._layers for m in one.modules() if m in linears
    }
    assert len(addresses) == len(linears)


def test_memory_is_lent_again_and_what_it_has_no_room_for_is_new(cpu, monkeypatch):
    monkeypatch.setattr(cpu, "free_bytes", lambda: 40 * MIB)  # a quarter of it
    memory = RunMemory()
    lent = [memory.take(cpu, nbytes) for nbytes in (3 * MIB, 3 * MIB, MIB, 5 * MIB)]
    for value, each in enumerate(lent):
        each.fill_(value)
    assert [(len(each), *each.unique().tolist()) for each in lent] == [
        (3 * MIB, 0),
        (3 * MIB, 1),
        (MIB, 2),
        (5 * MIB, 3),
    ]
    starts = [each.data_ptr() for each in lent]
    assert starts[1] == starts[0] + 4 * MIB and not starts[0] % (2 * MIB)  # whole large pages
    memory.begin()
    assert memory.take(cpu, 7 * MIB).data_ptr() == starts[0]


def test_memory_is_new_where_the_system_maps_no_more_than_is_asked_for(cpu, monkeypatch):
    """As under `ulimit -v`, or without overcommitment."""
    monkeypatch.setattr(cpu, "free_bytes", lambda: 2**60)
    memory = RunMemory()
    lent = [memory.take(cpu, 3 * MIB).fill_(value) for value in (1, 2)]
    assert [each.unique().tolist() for each in lent] == [[1], [2]]


@torch.inference_mode()
@pytest.mark.parametrize("order", [*WeightOrder])
def test_copies_of_a_timed_layer_compute_the_same_from_weights_of_their_own(cpu, order):
    if order is WeightOrder.PACKED and not can_pack(torch.bfloat16, torch.device("cpu")):
        pytest.skip("this CPU has no bf16 instructions")
    effort = replace(QUICK, shapes=((128, 256, 2, 1, 64),), cold_bytes=600 * KIB)
    (shape,) = effort.layer_shapes("bfloat16", 2)
    layer = TimedLayer(shape, cpu, torch.bfloat16, order, effort)
    rows, positions = layer._inputs[:, :3], torch.arange(3)[None]

    def all_of_them():
        found = []
        for _ in layer._layers:
            context = PassContext([Segment(layer._cache, 3)])
            options = {
                "position_embeddings": layer._rotary(rows, positions),
                CONTEXT_KEYWORD: context,
            }
            found.append(next(layer._turns)(rows, **options).clone())
            layer._cache.commit([])
        return found

    first, *others = all_of_them()
    assert others and all(torch.equal(first, other) for other in others)
    down = layer._layers[0].mlp.down_proj
    product = getattr(down, "product", None)
    if isinstance(product, RoundedProduct):
        product.memory.zero_()
    elif order is WeightOrder.PACKED:
        ctypes.memset(torch.ops.mkldnn.data_ptr(down.weight), 0, 2 * 128 * 256)
    else:
        down.weight.zero_()
    assert [torch.equal(first, made) for made in all_of_them()].count(False) == 1


def test_weights_are_cold_that_are_more_than_the_largest_cache(cpu, monkeypatch):
    """A model's layers together at most, as no pass has more; a GPU has other caches."""
    monkeypatch.setattr(compute, "cache_bytes", lambda: 400 * MIB)
    effort = Effort()
    assert compute.beyond_caches(cpu, effort, 10 * MIB) == effort.cold_bytes == 256 * MIB
    assert compute.beyond_caches(cpu, effort, 300 * MIB) == 300 * MIB
    assert compute.beyond_caches(cpu, effort) == effort.caches * 400 * MIB
    assert compute.beyond_caches(SimpleNamespace(kind=CUDA), effort) == 256 * MIB
    monkeypatch.setattr(cpu, "free_bytes", lambda: 2000 * MIB)
    assert compute.beyond_caches(cpu, effort) == 500 * MIB
    monkeypatch.setattr(compute, "cache_bytes", lambda: 2 * MIB)
    (shape,) = QUICK.layer_shapes("float32", 4)
    layer = TimedLayer(shape, cpu, torch.float32, WeightOrder.PLAIN, replace(QUICK, caches=1))
    assert len(layer._layers) * shape.weight_bytes >= 2 * MIB


def test_no_cache_holds_what_a_pass_uses_once(cpu, monkeypatch):
    """Layers that stay, KV, heads, weights to dequantise; but for layers that may only draft."""
    monkeypatch.setattr(compute, "cache_bytes", lambda: 2 * MIB)
    effort, used = replace(QUICK, caches=1, query_tokens=(1,), head_rows=(1,)), Counter()
    (shape,) = effort.layer_shapes("bfloat16", 2)
    for order, cold_bytes in ((WeightOrder.PACKED, 2 * MIB), (WeightOrder.INT8, QUICK.cold_bytes)):
        found = compute._cold_bytes(shape, order, cpu, effort)
        assert cold_bytes <= found < cold_bytes + shape.weight_bytes
    attend, made = compute.attend_rows, compute._copies
    monkeypatch.setattr(
        compute,
        "attend_rows",
        lambda query, key, *more: (used.update([key.data_ptr()]), attend(query, key, *more))[1],
    )
    many = Curve(replace(effort, least_samples=40, most_samples=40))
    measure_attention(cpu, "float32", many, nothing)
    assert len(used) == 30  # a model's; they are 64 KiB each
    counts = []
    monkeypatch.setattr(
        compute,
        "_copies",
        lambda module, count, on: (counts.append(count), made(module, count, on))[1],
    )
    measure_heads(cpu, "float32", WeightOrder.PLAIN, Curve(effort), nothing)
    assert counts == [2 * MIB // (64 * 128 * 4)]
    sizes = []
    monkeypatch.setattr(dequantising, "MEASURED", dequantising.MEASURED[:1])
    monkeypatch.setattr(
        dequantising, "cycle", lambda weights: (sizes.append(len(weights)), cycle(weights))[1]
    )
    [*dequantising.measure_dequantising(cpu, torch.bfloat16, Curve(effort), nothing)]
    assert sizes[0] >= 2 * MIB // (256 * 256)


def test_the_largest_cache_is_known_where_linux_tells_it():
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    told = [int(path.read_text().strip("K\n")) * KIB for path in sizes]
    assert cache_bytes() == max(told, default=0)


def test_a_size_that_is_written_otherwise_is_not_told(tmp_path, monkeypatch):
    for number, size in enumerate(("32K\n", "2048K\n", "9M\n", "unknown\n", "\n")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(size)
    elsewhere = lambda path: tmp_path if path.endswith("/cache") else Path(path)  # noqa: E731
    monkeypatch.setattr(system, "Path", elsewhere)
    assert cache_bytes.__wrapped__() == 2048 * KIB


@torch.inference_mode()
def test_timed_experts_are_those_of_a_pass_and_none_comes_again_soon():
    memory = torch.randn(3 * 32 * 64 * 40)
    lender = experts.ColdExperts(memory, 32, 64)
    module = experts._experts(32, 64, lender.count)
    lend_experts(module, lender)
    calls = [lender.next() for _ in range(lender.count // experts.PER_TOKEN)]
    assert sorted(sum(calls, [])) == [*range(40)] != sum(calls, [])
    places = {lender.at_home(expert)["down_proj"].data_ptr() for expert in range(40)}
    assert len(places) == 40
    hidden, index = torch.randn(2, 32), torch.tensor([calls[0]] * 2)
    weights = torch.rand(2, experts.PER_TOKEN)
    expected = 0
    for place, expert in enumerate(calls[0]):
        gate, up, down = memory.view(40, -1)[expert].split(32 * 64)
        made = torch.nn.functional.silu(hidden @ gate.view(64, 32).T) * (hidden @ up.view(64, 32).T)
        expected = expected + weights[:, place, None] * (made @ down.view(32, 64).T)
    torch.testing.assert_close(compute_experts(module, hidden, index, weights), expected)


def test_experts_are_timed_by_size_and_rows(cpu, monkeypatch):
    """Of a call the seconds of each of its experts; of row-invariant passes as these compute."""
    regular, ticks = [], []
    usual = experts.Regular
    monkeypatch.setattr(experts, "Regular", lambda: regular.append(1) or usual())

    def took(run):
        before = len(regular)
        run()
        return 2.0 if len(regular) > before else 1.0

    monkeypatch.setattr(timing, "_computed_s", took)
    monkeypatch.setattr(timing, "_TYPICAL", 1.0)
    found = experts.measure_experts(cpu, "bfloat16", Curve(QUICK), partial(ticks.append, 1))
    sizes = [2 * 3 * 32 * 64, 2 * 3 * 32 * 128]
    assert [one.weight_bytes for one in found] == sizes * 2
    assert [one.exact for one in found] == [False, False, True, True]
    for one in found:
        assert [time.tokens for time in one.times] == [1, 4]
        seconds = (2.0 if one.exact else 1.0) / experts.PER_TOKEN
        assert {time.layer_s.value for time in one.times} == {seconds}
    assert len(ticks) == 8


@pytest.mark.skipif(bool(products.problem()), reason=products.problem())
def test_it_is_kept_whether_kernels_took_few_rows_of_an_expert(cpu):
    """Of each size, in passes that need not be row-invariant; older profiles timed without."""
    effort = replace(QUICK, experts=((64, 128), (72, 136)), expert_rows=(1,))
    for dtype, rows in (("bfloat16", [AT_ONCE_FEW, 0]), ("float32", [0, 0])):
        found = experts.measure_experts(cpu, dtype, Curve(effort), nothing)
        assert [each.few_rows for each in found] == [*rows, None, None]


@pytest.mark.parametrize("kernels", [True, False])
def test_it_is_kept_whether_layers_were_timed_as_in_row_invariant_passes(kernels, monkeypatch):
    monkeypatch.setattr(exactness, "takes_matrix_registers", lambda _: True)
    monkeypatch.setattr(exactness, "kernels_multiply_plain", lambda: kernels)
    shape = QUICK.layer_shapes("bfloat16", 2)[0]
    curve = LayerCurve(processor=Processor.CPU, weights=WeightOrder.PLAIN, shape=shape, times=())
    session = SimpleNamespace(nvml=[None] * 99, notes=[])  # as many GPUs as nowhere
    made = measure_module._assemble("a machine", session, [curve], "by hand")
    assert made.layers_exact is kernels


@pytest.mark.parametrize("part", ["layers", "heads", "experts"])
def test_a_part_that_was_disturbed_leaves_no_doubt_about_the_next(part, cpu, monkeypatch):
    monkeypatch.setattr(neighbours, "_waited_s", lambda: 0.0)
    monkeypatch.setattr(neighbours, "_stolen_s", lambda: 0.0)
    repair, doubted = timing.monotone, []

    def monotone(values, *, by_bytes):
        doubted.append(by_bytes)
        return repair(values, by_bytes=by_bytes)

    monkeypatch.setattr(timing, "monotone", monotone)
    curve = Curve(QUICK, disturbed=True)
    shapes = QUICK.layer_shapes("float32", 4)
    {
        "layers": lambda: measure_layers(shapes, cpu, WeightOrder.PLAIN, curve, nothing),
        "heads": lambda: measure_heads(cpu, "float32", WeightOrder.PLAIN, curve, nothing),
        "experts": lambda: experts.measure_experts(cpu, "float32", curve, nothing),
    }[part]()
    assert doubted and not any(doubted)


@torch.inference_mode()
def test_a_pass_uses_the_copies_in_turn_and_forgets_its_rows(cpu):
    (shape,) = QUICK.layer_shapes("float32", 4)
    layer = TimedLayer(shape, cpu, torch.float32, WeightOrder.PLAIN, QUICK)
    seen = []
    for index, one in enumerate(layer._layers):
        one.register_forward_hook(lambda *_, index=index: seen.append(index))
    run = layer.pass_over(4)
    for _ in range(3 * len(layer._layers)):
        run()  # more rows than the cache has room for, if they stayed
    assert seen == seen[: len(layer._layers)] * 3
    assert sorted(seen[: len(layer._layers)]) == [*range(len(layer._layers))]
    assert layer._cache.length == 0 and set(layer._cache._pending) == {0}


@pytest.mark.skipif(bool(products.problem()), reason=products.problem())
@torch.inference_mode()
def test_a_layer_is_timed_with_the_kernels_that_networks_run_it_with(cpu, monkeypatch):
    (shape,) = replace(QUICK, shapes=((64, 128, 1, 1, 64),)).layer_shapes("bfloat16", 2)
    effort, runs = replace(QUICK, tokens=(1, MANY_ROWS + 1)), []
    together = assembling.together
    monkeypatch.setattr(assembling, "together", lambda *given: runs.append(together(*given)))
    most = {WeightOrder.PLAIN: 0, WeightOrder.PACKED: MOST_ROWS, WeightOrder.INT8: MANY_ROWS}
    for order, rows in most.items():
        layer = TimedLayer(shape, cpu, torch.bfloat16, order, effort)
        for tokens in {1, MOST_ROWS, MOST_ROWS + 1, MANY_ROWS, MANY_ROWS + 1}:
            run, before = layer.pass_over(tokens), len(runs)
            run()
            if tokens <= rows:
                assert len(runs) == before + 2  # kernels, one on each side of attention
            elif order is not WeightOrder.INT8:
                assert len(runs) == before


def test_rows_on_both_sides_of_where_other_kernels_begin_are_timed():
    effort = Effort()
    for last in (MOST_ROWS, MANY_ROWS):
        assert {last, last + 1} <= set(effort.packed_tokens)
    assert {MOST_ROWS, MOST_ROWS + 1} <= set(effort.head_rows)
    assert {AT_ONCE_FEW, AT_ONCE_FEW + 1} <= set(effort.expert_rows)


def test_layer_curves_and_attention(cpu):
    (shape,) = QUICK.layer_shapes("float32", 4)
    ticks = []
    (curve,) = measure_layers(
        [shape], cpu, WeightOrder.PLAIN, Curve(QUICK), lambda: ticks.append(1)
    )
    assert [t.tokens for t in curve.times] == list(QUICK.tokens) and len(ticks) == 2
    assert all(t.layer_s.value > 0 and t.layer_s.samples == 2 for t in curve.times)
    speeds = measure_attention(cpu, "float32", Curve(QUICK), nothing)
    assert [s.query_tokens for s in speeds] == [1, 4]
    assert {s.kv_bytes for s in speeds} == {QUICK.kv_bytes}
    assert {s.processor for s in speeds} == {Processor.CPU}
    exact = measure_attention(cpu, "float32", Curve(QUICK), nothing, exact=True)
    assert [(s.query_tokens, s.exact) for s in exact] == [(1, True), (4, True)]


@pytest.mark.parametrize("order", [WeightOrder.PLAIN, WeightOrder.PACKED])
def test_heads_by_size_and_rows(cpu, order):
    if order is WeightOrder.PACKED and not can_pack(torch.bfloat16, torch.device("cpu")):
        pytest.skip("this CPU has no bf16 instructions")
    effort, ticks = replace(QUICK, heads=((64, 256), (64, 128))), []
    dtype = "bfloat16" if order is WeightOrder.PACKED else "float32"
    curve = Curve(effort)
    small, large = measure_heads(cpu, dtype, order, curve, lambda: ticks.append(1))
    assert (small.weights, large.weights) == (order, order)
    itemsize = getattr(torch, dtype).itemsize
    assert (small.weight_bytes, large.weight_bytes) == (64 * 128 * itemsize, 64 * 256 * itemsize)
    assert [t.tokens for t in small.times] == list(QUICK.head_rows) and len(ticks) == 4
    assert small.times[0].layer_s.value <= large.times[1].layer_s.value


def test_the_disk_is_read_for_as_long_as_asked(on_disk, monkeypatch):
    slow = SlowDisk(monkeypatch, 0.002)
    with open_for_reading(on_disk, replace(QUICK, beside_read_bytes=PIECE_BYTES), 2) as reading:
        assert not slow.now
        for _ in range(2):
            with reading():
                until = time.monotonic() + 30.0
                while not slow.now and time.monotonic() < until:
                    time.sleep(0.001)
                assert slow.now
            assert not slow.now
    assert slow.most == 2 and os.listdir(on_disk) == []


def test_reading_has_begun_when_something_is_timed_beside_it(on_disk, monkeypatch):
    slow = SlowDisk(monkeypatch, 0.02)
    with open_for_reading(on_disk, replace(QUICK, beside_read_bytes=PIECE_BYTES), 2) as reading:
        for _ in range(2):
            done = slow.done
            with reading():
                assert slow.done > done


@pytest.mark.parametrize("weights", [WeightOrder.PLAIN, WeightOrder.PACKED])
def test_a_layer_beside_reads_is_no_faster(cpu, weights):
    (shape,) = QUICK.layer_shapes("bfloat16", 2)
    began, ticks = [], []

    @contextmanager
    def reading():
        began.append(1)
        yield

    tick = partial(ticks.append, 1)
    layer = TimedLayer(shape, cpu, torch.bfloat16, weights, QUICK)
    found = measure_beside_reads(layer, reading, Curve(QUICK), tick)
    places = [(s.weights, s.weight_bytes, s.tokens) for s in found]
    assert places == [(weights, shape.weight_bytes, tokens) for tokens in (1, 4)]
    assert all(s.factor.value >= 1.0 for s in found) and began and len(ticks) == 2


def test_reads_beside_a_layer_take_as_much_longer_as_they_do(cpu, monkeypatch):
    """A disk that gives 300 bytes a second, and 200 of them while a layer computes."""
    (shape,) = QUICK.layer_shapes("bfloat16", 2)
    now, come, ticks = [0.0], [0.0], []

    def spend(rate):
        now[0] += 0.1
        come[0] += 0.1 * rate

    @contextmanager
    def reading():
        yield lambda: come[0]

    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda s: spend(300.0))
    monkeypatch.setattr(compute, "time", clock)
    monkeypatch.setattr(TimedLayer, "pass_over", lambda *_: partial(spend, 200.0))
    tick = partial(ticks.append, 1)
    layer = TimedLayer(shape, cpu, torch.bfloat16, WeightOrder.PLAIN, QUICK)
    found = measure_reads_beside(layer, reading, Curve(QUICK), tick)
    assert found.factor.value == pytest.approx(1.5) and len(ticks) == 1


def test_what_slows_most_runs_is_in_a_typical_time_and_what_slows_some_or_one_less_is_not(
    monkeypatch,
):
    """Of twenty runs one falls between two reads and nine beside other work."""
    now, runs = [0.0], iter([3.0] * 10 + [2.0] + [30.0] * 9)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "thread_time", lambda: now[0])

    def run():
        now[0] += next(runs)

    assert typical(run, 302.0)() == pytest.approx(3.0)
    assert next(runs, None) is None


def test_a_whole_measurement(on_disk, monkeypatch):
    """The disk is read first and last; others slow one number of reads at first, one at last."""
    reports, read = [], []

    def disk_beside_others(*given):
        found = measure_disk(*given)
        slowed = found[len(read)]
        rate = replace(slowed.bytes_per_s, value=1.0)
        read.append(found)
        return tuple(replace(s, bytes_per_s=rate) if s is slowed else s for s in found)

    monkeypatch.setattr(measure_module, "measure_disk", disk_beside_others)
    made = measure(
        "here",
        device="cpu",
        folder=on_disk,
        effort=QUICK,
        report=lambda done, total, what: reports.append((done, total, what)),
    )
    done = [d for d, _, _ in reports]
    said = dict.fromkeys(what for _, _, what in reports)
    plain = "cpu, layers with plain weights, also beside reads"
    assert list(said)[:3] == ["disk", "host memory", plain]
    assert done == sorted(done) and reports[-1][0] == reports[-1][1] and len(set(done)) > 8
    assert made.name == "here" and made.links == () and made.pinning is None
    assert [s.exact for s in made.attention] == [False, False, True, True] and made.layers
    assert made.disk == (read[1][0], read[0][1])
    assert [c.exact for c in made.experts] == [False, False, True, True]
    assert made.beside_computing.factor.value >= 1.0
    assert JUST_WRITTEN in made.notes
    assert made.notes[-1] == "no link was measured: on the CPU weights need not cross one"
    assert statistics.median(t.layer_s.value for c in made.layers for t in c.times) < 1


@pytest.mark.parametrize(
    ("waited_s", "stolen_s", "load", "scatter", "says"),
    [
        (0.04, 0.0, 99.0, 0.9, None),  # the load of others who leave cores to us
        (2.0, 0.0, 1.0, 0.1, "threads waited for a core 20% of the time, load average 1.0"),
        (0.5, 2.0, 1.0, 0.1, "threads waited for a core 15% of the time, load average 1.0"),
        (6.0, 0.0, 1.0, 0.6, "scatter by 60% and are not to be believed: measure again when"),
        (None, 0.0, 0.9, 0.9, None),
        (None, 0.0, 1.1, 0.1, "running (load average 1.1 on 2 cores): measure again when"),
        (None, 0.0, 4.1, 0.9, "not to be believed"),
    ],
)
def test_other_work_is_a_note(waited_s, stolen_s, load, scatter, says, monkeypatch):
    monkeypatch.setattr(neighbours, "compute_threads", lambda: 1)
    monkeypatch.setattr(neighbours, "cores", lambda: 2)
    monkeypatch.setattr(neighbours.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(neighbours.time, "perf_counter", lambda: 110.0)
    monkeypatch.setattr(neighbours, "_waited_s", lambda: waited_s)
    monkeypatch.setattr(neighbours, "_stolen_s", lambda: stolen_s)
    before = None if waited_s is None else 0.0
    note = neighbours.Neighbours(began_s=100.0, waited_s=before, stolen_s=0.0).note(scatter)
    assert note is None if says is None else says in note and note.startswith(BUSY)


def test_a_busy_machine_is_a_note_of_the_profile(monkeypatch, on_disk):
    waited = count(step=10**6)
    monkeypatch.setattr(neighbours, "_waited_s", lambda: next(waited))
    made = measure("here", device="cpu", folder=on_disk, effort=QUICK)
    assert made.notes[0].startswith(BUSY)


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="nothing is counted")
def test_the_kernel_counts_how_long_threads_run_and_wait():
    start, before = time.perf_counter(), thread_times()[str(os.getpid())]
    while time.perf_counter() < start + 0.02:
        pass
    after = thread_times()[str(os.getpid())]
    whole_ns = 1e9 * (time.perf_counter() - start)
    passed = [now - then for now, then in zip(after, before, strict=True)]
    assert min(passed) >= 0 and 10e6 <= sum(passed) <= whole_ns + 5e6


def test_a_default_folder_that_cannot_be_measured_is_a_note(monkeypatch, on_disk):
    monkeypatch.setattr(disk_module, "_cached", lambda fd, offset: True)
    monkeypatch.setattr(disk_module, "_FORGETTING_S", 0.0)
    monkeypatch.setattr(measure_module, "folder_to_read", lambda least_bytes: on_disk)
    made = measure("here", device="cpu", effort=QUICK)
    assert (
        made.disk == () and any("served from memory" in note for note in made.notes) and made.layers
    )
    assert made.beside_disk == () and len(set(made.notes)) == len(made.notes)
    with pytest.raises(ProfileError, match="served from memory"):
        measure("here", device="cpu", folder=on_disk, effort=QUICK)


def test_links_in_a_whole_measurement(monkeypatch, on_disk):
    monkeypatch.setattr(measure_module, "TorchDriver", lambda: Links(gpus=1))
    monkeypatch.setattr(measure_module, "CudaDevice", lambda index: CpuDevice())
    made = measure("here", folder=on_disk, effort=QUICK)
    assert {s.pinned for s in made.links} == {True, False}
    assert made.pinning is not None and not any("pinned" in note for note in made.notes)
    monkeypatch.setattr(measure_module, "_compute_parts", lambda *_: ())
    monkeypatch.setattr(measure_module, "TorchDriver", lambda: Links(gpus=1, refuse="ulimit"))
    made = measure("here", folder=on_disk, effort=QUICK)
    assert {s.pinned for s in made.links} == {False} and made.pinning is None
    assert made.notes[-1] == "no pinned memory was measured: it was refused (ulimit)"


@pytest.mark.parametrize("parts", [None, 1, 12, 40, 63])
def test_how_much_can_be_pinned_together(parts):
    machine = Links(most=None if parts is None else parts * MIB // 16 + 100)
    found = link.measure_pinning(machine, QUICK, lambda: None)
    assert not machine.registered
    (speed,) = found
    assert speed.most_bytes == (None if parts is None else parts * MIB // 16)
    assert speed.block_bytes == min(MIB, speed.most_bytes or MIB)


def test_a_machine_that_pins_next_to_nothing_has_no_pinning():
    assert link.measure_pinning(Links(most=MIB // 16 - 1), QUICK, lambda: None) == ()


class Nvml:
    """The NVIDIA driver's library; the link is slow until it has been asked before."""

    NVMLError = type("NVMLError", (Exception,), {})
    nvmlSystemGetCudaDriverVersion = staticmethod(lambda: 12080)
    nvmlSystemGetDriverVersion = staticmethod(lambda: "570.1")
    nvmlDeviceGetCount = staticmethod(lambda: 1)
    nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)
    nvmlDeviceGetMemoryInfo = staticmethod(lambda handle: SimpleNamespace(total=2**34, free=2**33))
    nvmlDeviceGetCudaComputeCapability = staticmethod(lambda handle: (8, 9))
    nvmlDeviceGetName = staticmethod(lambda handle: "GPU X")
    nvmlDeviceGetCurrPcieLinkWidth = staticmethod(lambda handle: 16)
    nvmlDeviceGetComputeRunningProcesses = staticmethod(
        lambda handle: [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in (1, os.getpid())]
    )
    copying = False

    def nvmlInit(self):
        pass

    def nvmlShutdown(self):
        pass

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle):
        return 4 if self.copying else 1


class Hidden(Nvml):
    """In a virtual machine that hides the link."""

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle):
        raise self.NVMLError

    nvmlDeviceGetCurrPcieLinkWidth = nvmlDeviceGetCurrPcieLinkGeneration


def test_the_link_is_identified_while_bytes_cross_it(monkeypatch, on_disk):
    library = Nvml()
    monkeypatch.setattr(nvml, "pynvml", library)
    monkeypatch.setattr(measure_module, "TorchDriver", lambda: Links(gpus=1))
    monkeypatch.setattr(measure_module, "CudaDevice", lambda index: CpuDevice())
    monkeypatch.setattr(measure_module, "_compute_parts", lambda *_: ())
    while_copying = link.while_copying

    def watched(roads, ask):
        library.copying = True
        while_copying(roads, ask)
        library.copying = False

    monkeypatch.setattr(link, "while_copying", watched)
    (gpu,) = measure("here", folder=on_disk, effort=QUICK).machine.gpus
    assert (gpu.name, gpu.link_generation, gpu.link_width) == ("GPU X", 4, 16)
    monkeypatch.setattr(nvml, "pynvml", Hidden())
    (gpu,) = measure("here", device="cpu", folder=on_disk, effort=QUICK).machine.gpus
    assert (gpu.link_generation, gpu.link_width, gpu.memory_bytes) == (0, 0, 2**34)


def test_others_that_compute_on_a_gpu_are_named(monkeypatch):
    monkeypatch.setattr(nvml, "pynvml", Nvml())
    (gpu,) = nvml.find_driver().gpus
    assert gpu.processes == (nvml.GpuProcess(pid=1, used_bytes=0),)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(measure_module, "TorchDriver", lambda: Links(gpus=0))
    with pytest.raises(DeviceError, match="--device cuda cannot be measured: no such GPU"):
        measure("here", device="cuda", effort=QUICK)
    assert measure_module._choose_gpus(Links(gpus=0), "auto") == 0
    assert measure_module._choose_gpus(Links(gpus=2), "auto") == 2
    assert measure_module._choose_gpus(Links(gpus=2), "cpu") == 0
