"""A GPU over CPU tensors: the real CUDA device and streams, with values, copies as late as may be.

Kernels run when they are called. A copy runs only when an event behind it is waited for, by the
compute stream, by a copy that runs, or by the host: so work that lacks a wait reads what was there
before, and device memory nobody wrote is poison. What it cannot see is a copy that comes too early
(`drained`), as no kernel is late: `fake_cuda.py` sees that, without values.
"""

from dataclasses import dataclass, field
from threading import RLock

import torch
from recorded import capture

from offload_rt.attention.flash import flash_of
from offload_rt.device import kinds
from offload_rt.device.base import PAGE_BYTES
from offload_rt.device.cuda import pinned as pinned_module
from offload_rt.device.cuda.device import CudaDevice
from offload_rt.device.host_memory import allocate_host
from offload_rt.device.kinds import CUDA, Processor
from offload_rt.engine import engine as engine_module
from offload_rt.model import weight_files as files_module
from offload_rt.streaming import memory_home as home_module

POISON = 0x7F  # as bf16 and fp32: 3.4e38, which no sum survives
GIB = 2**30
PIECES = 2**18  # of tiny models; each page of the buffers that they pass through is written to


@dataclass(frozen=True, slots=True)
class LateEvent:
    """A point in a stream: what was enqueued before it."""

    stream: "LateStream"
    at: int

    def synchronize(self):
        self.stream.run(self.at)

    def done(self):
        return self.stream.finished >= self.at

    def seconds_until(self, later):
        return 1e-6


@dataclass(eq=False)
class LateStream:
    """A queue that runs when it is waited for; that of kernels has run always."""

    lock: RLock
    late: bool
    queue: list = field(default_factory=list)
    finished: int = 0

    def record(self):
        with self.lock:
            return LateEvent(self, self.finished + len(self.queue))

    def wait(self, event):
        self._enqueue(event.synchronize)

    def copy(self, dst, src):
        assert (dst.dtype, dst.shape) == (src.dtype, src.shape)
        self._enqueue(lambda: dst.copy_(src))

    def synchronize(self):
        self.record().synchronize()

    def run(self, at):
        with self.lock:
            while self.finished < at:
                self.queue.pop(0)()
                self.finished += 1

    def _enqueue(self, action):
        with self.lock:
            self.queue.append(action)
            if not self.late:
                self.synchronize()


class LateDriver:
    """The driver of `device/cuda` over CPU memory.

    Args:
        pin: whether host memory may be registered.
        allocates_pinned: whether it has pinned memory of its own.
        maps: whether kernels can read host memory.
    """

    def __init__(self, *, pin=True, allocates_pinned=False, maps=True):
        self.maps = maps
        self.pin, self.allocates_pinned, self.received = pin, allocates_pinned, 0
        self.lock = RLock()

    def missing(self, index):
        return None

    def open(self, device):
        return LateStream(self.lock, late=False), self.stream(device)

    def stream(self, device):
        return LateStream(self.lock, late=True)

    def allocate(self, nbytes, device):
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def memory(self, device):
        return 8 * GIB, 8 * GIB

    def peak_bytes(self, device):
        return 0

    def peak_reserved_bytes(self, device):
        return 0

    def register(self, address, nbytes):
        return None if self.pin else "refused by the test"

    def unregister(self, address):
        pass

    def allocate_pinned(self, nbytes):
        return allocate_host(nbytes).tensor if self.allocates_pinned else None  # whole pages

    def mapped(self, memory, device):
        return memory if self.maps else None

    def address(self, tensor):
        return tensor.data_ptr()

    def upload(self, source, device):
        return source.clone()

    def receive(self, tensor, device):
        self.received += 1
        return tensor.clone()

    def download(self, values):
        return values.tolist()

    def fetch(self, data):
        return data.clone()

    def capture(self, work, device):
        return capture(work), 0


def open_double(monkeypatch, *, count=1, **options):
    """Let the engine open the double, and CPU tensors be taken for a GPU's where code asks.

    Args:
        count: of GPUs, each with a driver's streams of its own.
        options: of each one's driver.

    Returns:
        the first of them.
    """
    for module in (files_module, home_module):
        monkeypatch.setattr(module, "PIECE_BYTES", min(module.PIECE_BYTES, PIECES))
    for name, most in (("STAGING_BYTES", PIECES + 2 * PAGE_BYTES), ("UPLOAD_BYTES", PIECES)):
        monkeypatch.setattr(pinned_module, name, min(getattr(pinned_module, name), most))
    devices = [CudaDevice(i, readers=2, driver=LateDriver(**options)) for i in range(count)]
    open_as(monkeypatch, *devices)
    return devices[0]


def open_as(monkeypatch, *devices):
    """Let the engine open these devices over CPU tensors, with all that a GPU's kind decides.

    Several have places of other numbers, so that hidden states are sent, though all is CPU memory.
    """
    flash_of(torch.device("cpu"))  # a process remembers whose it is: the processor's
    for number, device in enumerate(devices):
        device.torch_device = torch.device("cpu", number) if number else torch.device("cpu")
        device.kind = CUDA
    opened = iter(devices)
    monkeypatch.setitem(kinds.KINDS, Processor.CPU, CUDA)
    monkeypatch.setattr(engine_module, "open_device", lambda *_: next(opened))
