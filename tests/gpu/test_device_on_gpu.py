"""The CUDA device on a real GPU: slots under stress, pinning, speed of the link."""

import time

import pytest
import torch

from offload_rt.device.cuda.device import CudaDevice, TorchDriver
from offload_rt.device.cuda.streams import CudaCopyStream
from offload_rt.device.host_memory import allocate_host
from offload_rt.errors import DeviceError
from offload_rt.streaming.memory_home import MemoryHome
from offload_rt.streaming.ring import Cycle, Ring

MIB = 2**20
LAYERS, LAYER_BYTES = 7, 8 * MIB
SLEEP_CYCLES = 2_000_000  # about 1 ms: longer than the copy of a layer


@pytest.fixture
def device():
    device = CudaDevice(0)
    yield device
    device.close()


def sources_of(device, *, pin=True):
    """Layer i is filled with i + 1."""
    sources = {}
    for layer in range(LAYERS):
        image = allocate_host(LAYER_BYTES)
        image.tensor.fill_(layer + 1)
        if pin:
            device.pin(image)
        sources[layer] = MemoryHome(image)
    return sources


def stale_reads(device, slots, sources, rounds=20):
    """Read slots as late as possible; returns how many layers were not what they should be."""
    buffers = [device.allocate(LAYER_BYTES, "slots") for _ in range(slots)]
    wrong = torch.zeros((), dtype=torch.int64, device=device.torch_device)
    ring = Ring(Cycle(sources), buffers, device.copy, device.compute, strict=True)
    ring.restart()
    for _ in range(rounds):
        for layer in range(LAYERS):
            with ring.lend(layer) as buffer:
                torch.cuda._sleep(SLEEP_CYCLES)
                wrong += (buffer.tensor != layer + 1).any()
    return wrong.item()


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("pin", [True, False])
def test_no_slot_is_overwritten_while_it_is_read(device, slots, pin):
    assert stale_reads(device, slots, sources_of(device, pin=pin)) == 0


def test_without_the_drained_wait_slots_are_overwritten(device, monkeypatch):
    sources = sources_of(device)
    monkeypatch.setattr(CudaCopyStream, "wait", lambda self, event: None)
    assert stale_reads(device, 2, sources) > 0


def test_kernels_read_rows_of_pinned_memory_where_it_lies(device):
    """The embedding of a model whose layers are streamed: no device memory is taken for it."""
    image = allocate_host(64 * MIB)
    weight = image.tensor.view(torch.int16).view(-1, 1024)
    weight.copy_(torch.randint(-(2**15), 2**15, weight.shape, dtype=torch.int16))
    assert device.mapped(image) is None  # not pinned yet
    device.pin(image)
    before = torch.cuda.memory_allocated()
    found = device.mapped(image)
    assert found is not None and torch.cuda.memory_allocated() == before
    ids = torch.randint(0, len(weight), (300,))
    rows = torch.nn.functional.embedding(
        ids.to(device.torch_device), found.tensor.view(torch.bfloat16).view(-1, 1024)
    )
    assert torch.equal(rows.view(torch.int16).cpu(), weight[ids])


def test_the_link_is_as_fast_as_a_plain_pinned_copy(device):
    image = allocate_host(512 * MIB)
    image.tensor.fill_(1)
    device.pin(image)
    slot = device.allocate(image.nbytes, "slots")
    plain = torch.ones(image.nbytes, dtype=torch.uint8, pin_memory=True)
    rates = {}
    for name in ("plain", "ours") * 3:
        torch.cuda.synchronize()
        start = time.perf_counter()
        if name == "plain":
            slot.tensor.copy_(plain, non_blocking=True)
        else:
            device.copy.copy(slot, MemoryHome(image))
        torch.cuda.synchronize()
        rate = image.nbytes / (time.perf_counter() - start)
        rates[name] = max(rate, rates.get(name, 0.0))
    assert rates["ours"] > 0.9 * rates["plain"], rates
    statistics = device.copy.statistics()
    assert statistics.bytes_copied == 3 * image.nbytes
    assert 0.5 < statistics.bytes_copied / statistics.busy_s / rates["ours"] < 2


def test_stalls_are_measured(device):
    image = allocate_host(256 * MIB)
    device.pin(image)
    device.copy.copy(device.allocate(image.nbytes, "slots"), MemoryHome(image))
    device.compute.wait(device.copy.record())
    torch.cuda.synchronize()
    busy_s = device.copy.statistics().busy_s
    assert 0.5 * busy_s < device.compute.stalled_s() < 2 * busy_s


def test_pinned_memory_is_known_to_torch(device):
    image = allocate_host(3 * MIB + 4096)
    device.pin(image)
    assert image.tensor.is_pinned()
    device.close()
    assert not image.tensor.is_pinned()


def test_a_refused_pin_leaves_no_error_behind(device):
    image = allocate_host(MIB)
    driver = TorchDriver()
    assert driver.register(image.tensor.data_ptr(), image.nbytes) is None
    reason = driver.register(image.tensor.data_ptr(), image.nbytes)  # it is pinned already
    assert reason
    assert torch.ones(3, device=device.torch_device).sum().item() == 3
    driver.unregister(image.tensor.data_ptr())


def test_too_much_memory_is_refused_with_numbers(device):
    _, total = TorchDriver().memory(device.torch_device)
    with pytest.raises(DeviceError, match="left for slots: .* is free"):
        device.allocate(2 * total, "slots")
    assert device.allocate(MIB, "slots").nbytes == MIB


def test_values_go_up_and_down(device):
    values = list(range(100_000))
    assert device.download(device.upload(values)) == values
