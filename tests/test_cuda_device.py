"""The CUDA device on its own, with the driver double: pinning, errors, staging, time stamps."""

import logging
import threading
import time

import pytest
import torch
from fake_cuda import GIB, FakeCuda, fake_gpu

from offload_rt.config import HomeKind, RuntimeConfig
from offload_rt.device import opening
from offload_rt.device.base import CopyPiece
from offload_rt.device.cuda import device as cuda
from offload_rt.device.cuda import streams
from offload_rt.device.cuda.device import CudaDevice, TorchDriver
from offload_rt.device.cuda.ordered import OrderedQueue, nothing
from offload_rt.device.host_memory import allocate_host
from offload_rt.device.kinds import CPU, CUDA
from offload_rt.device.opening import open_device
from offload_rt.errors import ConfigError, DeviceError
from offload_rt.planning.fit import choose_home
from offload_rt.planning.placement import Demand, Placement
from offload_rt.streaming.memory_home import MemoryHome

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
    buffers = [buffer_of(n) for n in (3 * 4096, 840 * 1000, 5)]
    for buffer in buffers:
        device.pin(buffer)
    assert gpu.registered == {b.tensor.data_ptr(): b.nbytes for b in buffers}
    addresses = list(gpu.registered)
    device.close()
    assert (gpu.registered, gpu.unregistered) == ({}, addresses)


def test_a_refused_pin_warns_once_with_the_numbers(gpu, device, caplog):
    gpu.refuse_from = 3 * MIB
    device.pin(buffer_of(2 * MIB))
    asked = []
    register = gpu.register
    gpu.register = lambda address, nbytes: asked.append(nbytes) or register(address, nbytes)
    for size in (4 * MIB, 5 * MIB, 1 * MIB, 4 * MIB):
        device.pin(buffer_of(size))
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    for part in ("4.00 MiB", "out of memory", "2.00 MiB is pinned", "ulimit -l"):
        assert part in warning.getMessage()
    assert asked == [4 * MIB, 1 * MIB]  # not again what is as large as what was refused
    assert sorted(gpu.registered.values()) == [1 * MIB, 2 * MIB]


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
    reason = TorchDriver().register(buffer_of(4096).tensor.data_ptr(), 4096)
    assert "CUDA" in reason  # here: the driver is missing or too old


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
