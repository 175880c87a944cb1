"""The CUDA device on its own, with the driver double: pinning, errors, staging, time stamps."""

import logging
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import GIB, FakeCuda, fake_gpu

from offload_rt.config import HomeKind, RuntimeConfig
from offload_rt.device import opening
from offload_rt.device.base import COPY_BYTES, CopyPiece
from offload_rt.device.cuda import device as cuda
from offload_rt.device.cuda import nvml, present, streams, torch_driver
from offload_rt.device.cuda import pinned as pinned_module
from offload_rt.device.cuda.device import CudaDevice, TorchDriver
from offload_rt.device.cuda.nvml import Driver, Gpu
from offload_rt.device.cuda.ordered import OrderedQueue, nothing
from offload_rt.device.cuda.pinned import PinnedMemory, UploadRing
from offload_rt.device.cuda.present import missing_gpu
from offload_rt.device.host_memory import allocate_host
from offload_rt.device.kinds import CPU, CUDA, check_device
from offload_rt.device.opening import open_device
from offload_rt.device.several import Devices
from offload_rt.errors import ConfigError, DeviceError
from offload_rt.planning.fit import choose_home
from offload_rt.planning.placement import Demand, Placement
from offload_rt.streaming.memory_home import MemoryHome
from offload_rt.units import format_size

MIB = 2**20


@pytest.fixture
def gpu():
    return FakeCuda()


@pytest.fixture
def device(gpu):
    device = CudaDevice(0, driver=gpu)
    yield device
    device.close()


def buffer_of(nbytes):
    buffer = allocate_host(nbytes)
    buffer.tensor.copy_(torch.arange(nbytes) % 251)
    return buffer


def test_memory_is_pinned_in_exactly_its_size_and_unpinned_at_close(gpu):
    device = CudaDevice(0, driver=gpu)
    before = dict(gpu.registered)
    buffers = [buffer_of(n) for n in (3 * 4096, 840 * 1000, 5)]
    for buffer in buffers:
        device.pin(buffer)
    assert gpu.registered == before | {b.tensor.data_ptr(): b.nbytes for b in buffers}
    addresses = sorted(gpu.registered)
    device.close()
    assert (gpu.registered, sorted(gpu.unregistered)) == ({}, addresses)


def test_a_refused_pin_warns_once_with_the_numbers(gpu, device, caplog):
    gpu.refuse_from = 3 * MIB
    first = Counter(gpu.registered.values())
    pinned = format_size(sum(first.elements()) + 2 * MIB)
    device.pin(buffer_of(2 * MIB))
    asked = []
    register = gpu.register
    gpu.register = lambda address, nbytes: asked.append(nbytes) or register(address, nbytes)
    for size in (4 * MIB, 5 * MIB, 1 * MIB, 4 * MIB):
        device.pin(buffer_of(size))
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    for part in ("4.00 MiB", "out of memory", f"{pinned} is pinned", "ulimit -l"):
        assert part in warning.getMessage()
    assert asked == [4 * MIB, 1 * MIB]  # not again what is as large as what was refused
    assert Counter(gpu.registered.values()) - first == Counter([1 * MIB, 2 * MIB])


def copied(gpu, monkeypatch):
    """Let the double note the bytes of every copy."""
    pieces = []
    copy = streams.CudaCopyStream._copy_staged
    monkeypatch.setattr(
        streams.CudaCopyStream,
        "_copy_staged",
        lambda self, dst, src, buffer: (
            pieces.append((dst.storage_offset(), src.clone())),
            copy(self, dst, src, buffer),
        ),
    )
    return pieces


def test_what_is_not_pinned_arrives_whole_through_staging(gpu, device, monkeypatch):
    gpu.refuse_from = 8 * MIB
    image = buffer_of(9 * MIB + 4096)
    device.pin(image)
    pieces = copied(gpu, monkeypatch)
    with fake_gpu(gpu):
        slot = device.allocate(image.nbytes, "slots")
        device.copy.copy(slot, MemoryHome(image))
        device.copy.record().synchronize()
    assert [offset for offset, _ in pieces] == [0, 4 * MIB, 8 * MIB]
    assert torch.equal(torch.cat([data for _, data in pieces]), image.tensor)
    assert gpu.unpinned_copies == 0
    assert device.copy.statistics().bytes_copied == image.nbytes


def test_pinned_memory_is_copied_at_once_by_the_caller(gpu, device):
    image = buffer_of(9 * MIB)
    device.pin(image)
    with fake_gpu(gpu):
        slot = device.allocate(image.nbytes, "slots")
        device.copy.copy(slot, MemoryHome(image))
        assert ("copy", "buffer 0") in gpu.trace
    statistics = device.copy.statistics()
    assert statistics.bytes_copied == image.nbytes
    assert statistics.busy_s == pytest.approx(image.nbytes / 1e9)
    assert not [t for t in threading.enumerate() if t.name.startswith("feeder")]


def test_copies_into_new_memory_come_after_kernels_that_used_it_before(gpu, device):
    with fake_gpu(gpu):
        device.allocate(40, "slots")
    assert gpu.trace[-2:] == [("record", "compute"), ("wait", "copy")]


def test_stall_is_the_time_the_gpu_waits_for_copies(gpu, device):
    image = buffer_of(MIB)
    device.pin(image)
    with fake_gpu(gpu):
        device.copy.copy(device.allocate(MIB, "slots"), MemoryHome(image))
        device.compute.wait(device.copy.record())
        device.compute.wait(device.compute.record())
    assert device.compute.stalled_s() == pytest.approx(MIB / 1e9)


class _Slow:
    """A source of which pieces are ready in the wrong order."""

    nbytes, image = 40, None

    def check(self):
        pass

    def pieces(self):
        def load(index, staging):
            time.sleep(0.02 * (4 - index))
            return staging.tensor[:10].fill_(index)

        return [
            CopyPiece(
                offset=10 * i, image_bytes=10, nbytes=10, load=lambda staging, i=i: load(i, staging)
            )
            for i in range(4)
        ]


def test_copies_are_enqueued_in_order_whatever_is_read_first(gpu, device, monkeypatch):
    pieces = copied(gpu, monkeypatch)
    with fake_gpu(gpu):
        slot = device.allocate(40, "slots")
        gpu.trace.clear()
        device.copy.copy(slot, _Slow())
        first = device.copy.record()
        device.copy.wait(device.compute.record())
        device.copy.copy(slot, _Slow())
        second = device.copy.record()
        first.synchronize()
        second.synchronize()
    assert [offset for offset, _ in pieces] == [0, 10, 20, 30] * 2
    kinds = [(kind, name) for kind, name, *_ in gpu.trace if kind in ("copy", "wait")]
    assert kinds == [("copy", "buffer 0")] * 4 + [("wait", "copy")] + [("copy", "buffer 0")] * 4


def test_an_error_reaches_every_later_wait(gpu, device, monkeypatch):
    def fail(self, staging):
        raise OSError("no such page")

    monkeypatch.setattr(_Slow, "pieces", lambda self: [piece_of(fail)])

    def piece_of(load):
        return CopyPiece(offset=0, image_bytes=1, nbytes=1, load=lambda s: load(None, s))

    with fake_gpu(gpu):
        slot = device.allocate(40, "slots")
        before = device.copy.record()
        device.copy.copy(slot, _Slow())
        for event in (device.copy.record(), device.copy.record()):
            with pytest.raises(OSError, match="no such page"):
                device.compute.wait(event)
            with pytest.raises(OSError, match="no such page"):
                event.synchronize()
        before.synchronize()


def test_close_ends_what_waits(gpu):
    device = CudaDevice(0, driver=gpu, readers=1)
    with fake_gpu(gpu):
        slot = device.allocate(40, "slots")
        for _ in range(400):
            device.copy.copy(slot, _Slow())
        event = device.copy.record()
    start = time.perf_counter()
    device.close()
    assert time.perf_counter() - start < 5.0
    with pytest.raises(DeviceError, match="closed"):
        event.synchronize()
    assert gpu.registered == {}


def test_a_queue_with_one_thread_does_not_lock_up():
    queue = OrderedQueue(1, list)
    done = []
    for i in range(50):
        queue.prepare(lambda local, i=i: local.append(i) or (lambda: done.append(i)))
        queue.act(lambda i=i: done.append(-i))
    finished = threading.Event()
    queue.prepare(lambda _: nothing)
    queue.act(finished.set)
    assert finished.wait(5)
    assert done == [sign * i for i in range(50) for sign in (1, -1)]
    queue.close()


def test_a_runs_own_context_is_there_already(gpu, device):
    assert Devices([device]).free_bytes() == [gpu.free_bytes + CUDA.context_bytes]


@pytest.mark.parametrize(("pids", "own"), [((1, 7, 7), 5 * MIB), ((1, 2, 3), None), (None, None)])
def test_what_the_driver_counts_for_this_process_on_all_gpus(monkeypatch, pids, own):
    refusal = nvml.pynvml.NVMLError(nvml.pynvml.NVML_ERROR_NO_PERMISSION)

    def running(handle):
        if pids is None:
            raise refusal
        return [SimpleNamespace(pid=pids[handle], usedGpuMemory=(handle + 1) * MIB)]

    double = SimpleNamespace(
        NVMLError=nvml.pynvml.NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=running,
    )
    monkeypatch.setattr(nvml, "pynvml", double)
    monkeypatch.setattr(nvml.os, "getpid", lambda: 7)
    assert nvml.own_gpu_bytes() == own


def test_memory_that_is_not_there(gpu, device):
    with fake_gpu(gpu):
        device.allocate(6 * GIB, "resident layers")
        with pytest.raises(DeviceError) as caught:
            device.allocate(3 * GIB, "slots")
    for part in ("3.00 GiB", "slots", "2.00 GiB of 8.00 GiB", "6.00 GiB before", "--device-memory"):
        assert part in str(caught.value)
    assert device.ledger() == {"resident layers": 6 * GIB}
    assert device.free_bytes() == 2 * GIB


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_machine_without_gpu_says_so(name):
    with pytest.raises(DeviceError, match=r"cuda:\d.*--device cpu"):
        open_device(RuntimeConfig(device=name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_auto_is_the_cpu_without_gpu():
    device = open_device(RuntimeConfig(device="auto"))
    assert (device.name, device.kind) == ("cpu", CPU)
    device.close()


@pytest.mark.parametrize(
    ("newest", "reason"),
    [
        ((12, 2), "driver 535.1 runs CUDA up to 12.2, torch is built for 13.0: update the driver"),
        ((13, 0), None),
        ((13, 1), None),
    ],
)
def test_a_driver_that_is_too_old(monkeypatch, newest, reason):
    """Said without torch where the version is sure to be too old, and by torch."""
    gpu = Gpu(name="one", total_bytes=2**30, free_bytes=2**30, capability=(9, 0))
    driver = Driver(version="535.1", cuda_version=newest, gpus=(gpu,))
    monkeypatch.setattr(nvml, "find_driver", lambda: driver)
    monkeypatch.setattr(present, "version", lambda _: "2.14.1+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    early, late = missing_gpu(0), TorchDriver().missing(0)
    if reason is None:
        assert early is None and "no NVIDIA GPU" in late
    else:
        assert reason in early and reason in late
    with pytest.raises(DeviceError, match="this machine has one GPU: use cuda:0$"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        CudaDevice(3, driver=TorchDriver())


@pytest.mark.parametrize(
    ("second", "said"), [("one", None), ("other", "GPU 0 is a one, GPU 1 a other, .*: name one of")]
)
def test_a_model_is_spread_over_equal_cards_only(monkeypatch, second, said):
    size = {"total_bytes": 2**30, "free_bytes": 2**30, "capability": (9, 0)}
    gpus = tuple(Gpu(name=name, **size) for name in ("one", second))
    driver = Driver(version="580.1", cuda_version=(13, 0), gpus=gpus)
    monkeypatch.setattr(nvml, "find_driver", lambda: driver)
    monkeypatch.setattr(present, "version", lambda _: "2.14.1+cu130")
    runtime = RuntimeConfig(device="cuda:0,cuda:1")
    with nullcontext() if said is None else pytest.raises(DeviceError, match=said):
        check_device(runtime)


def test_why_there_is_no_gpu(monkeypatch):
    driver = TorchDriver()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in driver.missing(0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU" in driver.missing(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert driver.missing(1) is None
    assert "2 GPUs: use cuda:0 to cuda:1" in driver.missing(2)


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_reason_of_a_refused_pin_is_cudas_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: torch._C._cudart)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    reason = TorchDriver().register(buffer_of(4096).tensor.data_ptr(), 4096)
    assert "CUDA" in reason  # here: the driver is missing or too old


class ManyGpus:
    """`torch.cuda` of a machine with several GPUs: where contexts are made, and the last error.

    As CUDA 12 and torch do: a thread begins with GPU 0, setting a GPU makes a context there, the
    end of `device` does not go back to a GPU without one, the end of `stream` does. A refused call
    leaves its error with the thread.
    """

    def __init__(self):
        self.contexts, self.error, self.launches, self._thread = set(), 0, 0, threading.local()

    @property
    def current(self):
        return getattr(self._thread, "gpu", 0)

    def use(self, index):
        self._thread.gpu = index
        self.contexts.add(index)

    @contextmanager
    def device(self, device):
        before = self.current
        self.use(device.index)
        yield
        if before in self.contexts:
            self._thread.gpu = before

    @contextmanager
    def stream(self, stream):
        before = self.current
        self.use(stream.device.index)
        yield
        self.use(before)

    def Stream(self, device):
        return SimpleNamespace(device=device)

    current_stream = Stream

    def init(self):
        pass

    def reset_peak_memory_stats(self, device):
        self.use(self.current)

    def cudart(self):
        return self

    def cudaHostRegister(self, address, nbytes, flags):
        self.use(self.current)
        self.error = 712 if address < 0 else 0
        return self.error

    def cudaHostUnregister(self, address):
        self.use(self.current)

    def cudaGetErrorString(self, error):
        return f"error {error}"

    def cudaGetLastError(self):
        error, self.error = self.error, 0
        return error

    def launch(self, *size, device):
        self.launches += 1
        if self.cudaGetLastError():
            raise RuntimeError("CUDA error: invalid argument")


@pytest.fixture
def many(monkeypatch):
    gpus = ManyGpus()
    monkeypatch.setattr(torch, "cuda", gpus)
    monkeypatch.setattr(torch_driver, "_loaded_runtime", lambda: gpus)
    return gpus


CALLS = {
    "copy": lambda driver, copies: copies.copy(torch.zeros(3), torch.ones(3)),
    "register": lambda driver, _: driver.register(4096, 4096),
    "refused": lambda driver, _: driver.register(-1, 4096),
    "unregister": lambda driver, _: driver.unregister(4096),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_second_gpu_alone_makes_no_context_on_the_first(many, call):
    """Whatever a thread does first, this one or another."""
    driver = TorchDriver()
    _, copies = driver.open(torch.device("cuda", 1))
    thread = threading.Thread(target=call, args=(driver, copies))
    thread.start()
    thread.join()
    call(driver, copies)
    assert many.contexts == {1}


@pytest.mark.parametrize("linked_in", [False, True])
def test_a_refused_pin_leaves_no_error_to_the_next_kernel(many, monkeypatch, linked_in):
    if linked_in:
        monkeypatch.setattr(torch_driver, "_loaded_runtime", lambda: None)
        monkeypatch.setattr(torch, "zeros", many.launch)
    assert TorchDriver().register(-1, 4096) == "error 712"
    assert many.error == 0
    assert many.launches == linked_in


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_the_runtime_that_torch_has_loaded_is_found():
    runtime = torch_driver._loaded_runtime()
    assert runtime is not None and runtime._name is not None
    assert runtime.cudaGetLastError.argtypes is None


def test_a_long_copy_is_cut_so_that_uploads_wait_for_a_piece(gpu, device):
    image = buffer_of(2 * COPY_BYTES + MIB)
    device.pin(image)
    with fake_gpu(gpu):
        slot = device.allocate(image.nbytes, "slots")
        device.copy.copy(slot, MemoryHome(image))
    assert gpu.copy_sizes == [COPY_BYTES, COPY_BYTES, MIB]
    assert device.copy.statistics().bytes_copied == image.nbytes
    assert device.copy.statistics().busy_s == pytest.approx(image.nbytes / 1e9)


def test_values_go_up_in_parts_of_pinned_memory(monkeypatch):
    """Also more of them than a part holds, and again and again through the same parts."""
    monkeypatch.setattr(pinned_module, "UPLOAD_BYTES", 8 * 10)
    sent, events = [], []

    class Drained:
        def __init__(self):
            self.waited = False
            events.append(self)

        def done(self):
            return False

        def synchronize(self):
            self.waited = True

    ring = UploadRing(PinnedMemory(FakeCuda()), Drained)
    for values in ([3], list(range(25)), range(7), [], [2**62, -(2**62)]):
        sent += [(list(values), torch.cat([p.clone() for p in ring.send(values, torch.clone)]))]
    assert all(got.tolist() == values for values, got in sent)
    assert [event.waited for event in events] == [True] * 3 + [False] * 4  # 7 parts, a ring of 4


def test_rows_stay_in_their_part_until_they_are_up(monkeypatch):
    """An upload reads its part as late as may be: when somebody waits for an event behind it."""
    late = []

    class Event:
        def __init__(self):
            self.copies = late[:]

        def done(self):
            return False

        def synchronize(self):
            for source, made in self.copies:
                if any(each[1] is made for each in late):
                    late[:] = [each for each in late if each[1] is not made]
                    made.copy_(source)

    def upload(source):
        late.append((source, torch.zeros_like(source)))
        return late[-1][1]

    ring = UploadRing(PinnedMemory(FakeCuda()), Event)
    sent = [torch.full((2, 8), float(number)) for number in range(9)]
    made = [ring.send_rows(rows, upload) for rows in sent]
    Event().synchronize()
    assert all(map(torch.equal, made, sent))
    rows, sizes = torch.rand(700, 1024), []  # 2.7 MiB
    whole = ring.send_rows(rows, lambda part: (sizes.append(part.nbytes), part.clone())[1])
    assert torch.equal(whole, rows)
    assert len(sizes) == 3 and max(sizes) <= pinned_module.UPLOAD_BYTES


def test_staging_is_pinned_before_layers_and_kept(gpu, caplog):
    """Where 96 MiB may be pinned in all, layers get what staging and uploads leave."""
    gpu.pinnable_bytes = 96 * MIB
    device = CudaDevice(0, driver=gpu)
    images = [buffer_of(9 * MIB) for _ in range(3)]
    for image in images:
        device.pin(image)
    state = device.usage().pinning
    assert (state.refused_bytes, state.reason) == (18 * MIB, "out of memory")
    assert state.pinned_bytes == sum(gpu.registered.values()) <= gpu.pinnable_bytes
    streams = device.copy, device.new_copy_stream()
    with fake_gpu(gpu):
        for stream in streams:
            slot = device.allocate(9 * MIB, "slots")
            for image in images:
                stream.copy(slot, MemoryHome(image))
            stream.record().synchronize()
        device.upload([1, 2, 3])
    assert (gpu.unpinned_copies, gpu.unpinned_uploads) == (0, 0)
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "pinning 9.00 MiB" in warning.getMessage()
    for stream in streams:
        stream.close()
    device.close()


@pytest.mark.parametrize("allocates", [True, False])
def test_what_cannot_be_registered_is_asked_of_the_driver(gpu, allocates):
    gpu.refuse_from, gpu.allocates_pinned = 0, allocates
    device = CudaDevice(0, driver=gpu)
    image = buffer_of(9 * MIB)
    device.pin(image)
    with fake_gpu(gpu):
        device.copy.copy(device.allocate(9 * MIB, "slots"), MemoryHome(image))
        device.copy.record().synchronize()
        device.upload([1, 2, 3])
    assert bool(gpu.unpinned_copies) is bool(gpu.unpinned_uploads) is not allocates
    device.close()
    assert not gpu.unregistered


def test_copies_of_every_stream_come_after_kernels_that_used_the_memory(gpu, device):
    stream = device.new_copy_stream()
    with fake_gpu(gpu):
        device.allocate(40, "slots")
    assert gpu.trace[-3:] == [("record", "compute"), ("wait", "copy"), ("wait", "kv")]
    stream.close()


def test_so_do_copies_that_are_offered(gpu, device):
    """Into memory given out before their stream was opened, and after."""
    device.torch_device = torch.device("cpu")  # its memory is real: fake tensors are of one thread
    gpu.computes[device.torch_device] = gpu.compute
    image = buffer_of(40)
    device.pin(image)
    slot = device.allocate(40, "slots")
    begin = len(gpu.trace)
    device.copy.offer(slot, MemoryHome(image), []).ask().synchronize()
    assert [one for one in gpu.trace[begin:] if "kv" in one[:2]][0] == ("wait", "kv")
    device.allocate(40, "slots")
    assert gpu.trace[-3:] == [("record", "compute"), ("wait", "copy"), ("wait", "kv")]


@pytest.mark.parametrize(
    ("name", "opened"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")]
)
def test_names_of_devices(gpu, monkeypatch, name, opened):
    monkeypatch.setattr(cuda, "TorchDriver", lambda: gpu)
    monkeypatch.setattr(opening, "TorchDriver", lambda: gpu)
    device = open_device(RuntimeConfig(device=name))
    assert (device.name, device.kind) == (opened, CUDA)
    device.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:0,cuda:1"}, "several devices"),
        ({"device": "cuda:x"}, "cuda:x is not known"),
        ({"device": "tpu"}, "tpu is not known"),
        (
            {"device": "cuda:0", "home": HomeKind.HOST, "link_bytes_per_s": 1e9},
            "--link-bandwidth",
        ),
    ],
)
def test_names_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        open_device(RuntimeConfig(**options))


@pytest.mark.parametrize(
    ("kind", "host_limit", "home"),
    [
        (CUDA, 200, HomeKind.HOST),
        (CUDA, 199, HomeKind.DISK),
        (CPU, 200, HomeKind.DISK),
    ],
)
def test_the_home_is_host_memory_where_it_fits(kind, host_limit, home):
    demand = Demand(layer_bytes=(100,) * 3, base_bytes=0, kv_bytes=0, workspace_bytes=0)
    placement = Placement(
        resident=(1,), streamed=(0, 2), slots=2, slot_bytes=100, demand=demand, device_limit_bytes=1
    )
    assert choose_home(HomeKind.AUTO, kind, placement, host_limit) is home
