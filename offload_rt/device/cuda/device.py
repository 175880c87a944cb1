"""One NVIDIA GPU as a device. The only file that names `torch.cuda`.

Kernels run in the stream that is current when the device is opened, copies in a stream of their
own (`streams.py`).
"""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from offload_rt.device.base import Event
from offload_rt.device.cuda.driver import Driver, DriverEvent
from offload_rt.device.cuda.pinned import PinnedMemory
from offload_rt.device.cuda.streams import CudaComputeStream, CudaCopyStream, CudaEvent
from offload_rt.device.host_memory import HostBuffer
from offload_rt.device.kinds import CUDA
from offload_rt.errors import DeviceError
from offload_rt.units import format_size

REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU, not only the current one


@dataclass(frozen=True, slots=True)
class TorchEvent:
    """A `torch.cuda.Event`."""

    event: torch.cuda.Event

    def synchronize(self) -> None:
        """Block the host until it is reached."""
        self.event.synchronize()

    def done(self) -> bool:
        """Whether it is reached."""
        return bool(self.event.query())

    def seconds_until(self, later: DriverEvent) -> float:
        """Seconds from this event to a later one."""
        assert isinstance(later, TorchEvent)
        return float(self.event.elapsed_time(later.event)) / 1000


@dataclass(frozen=True, slots=True)
class TorchStream:
    """A `torch.cuda.Stream`."""

    stream: torch.cuda.Stream

    def record(self) -> TorchEvent:
        """Record an event; a host that waits for it sleeps instead of spinning."""
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(self.stream)
        return TorchEvent(event)

    def wait(self, event: DriverEvent) -> None:
        """Order all later work after `event`."""
        assert isinstance(event, TorchEvent)
        self.stream.wait_event(event.event)

    def copy(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        """Enqueue a copy between host and device."""
        with torch.cuda.stream(self.stream):
            dst.copy_(src, non_blocking=True)

    def synchronize(self) -> None:
        """Block the host until the stream is empty."""
        self.stream.synchronize()


class TorchDriver:
    """CUDA through torch."""

    def missing(self, index: int) -> str | None:
        """Why GPU `index` cannot be used and what to do, or None if it can."""
        if torch.version.cuda is None:
            return (
                f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch, "
                "or use --device cpu"
            )
        if not torch.cuda.is_available():
            return (
                f"torch {torch.__version__} finds no NVIDIA GPU or no driver for CUDA "
                f"{torch.version.cuda}: check that nvidia-smi works, or use --device cpu"
            )
        count = torch.cuda.device_count()
        if index >= count:
            return f"this machine has {count} GPUs: use cuda:0 to cuda:{count - 1}"
        return None

    def open(self, device: torch.device) -> tuple[TorchStream, TorchStream]:
        """Return the current stream and a new one, and restart the count of peak memory."""
        torch.cuda.init()  # what follows does not do it by itself
        torch.cuda.reset_peak_memory_stats(device)
        return TorchStream(torch.cuda.current_stream(device)), TorchStream(
            torch.cuda.Stream(device)
        )

    def stream(self, device: torch.device) -> TorchStream:
        """Return one more new stream."""
        return TorchStream(torch.cuda.Stream(device))

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Return [nbytes] uint8 of device memory."""
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def memory(self, device: torch.device) -> tuple[int, int]:
        """Free and total bytes; what torch holds in reserve without using it counts as free."""
        free, total = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + idle, total

    def peak_bytes(self, device: torch.device) -> int:
        """Most bytes allocated at once since `open`."""
        return int(torch.cuda.max_memory_allocated(device))

    def register(self, address: int, nbytes: int) -> str | None:
        """Pin host memory."""
        runtime = torch.cuda.cudart()
        result = runtime.cudaHostRegister(address, nbytes, REGISTER_PORTABLE)
        if int(result) == 0:
            return None
        # The error stays with the thread, and the next kernel launch would report it as its own.
        with suppress(AttributeError):  # a runtime that is linked statically has no such symbol
            ctypes.CDLL(None).cudaGetLastError()
        return str(runtime.cudaGetErrorString(result))

    def unregister(self, address: int) -> None:
        """Unpin host memory."""
        torch.cuda.cudart().cudaHostUnregister(address)

    def upload(self, values: Sequence[int], device: torch.device) -> torch.Tensor:
        """Copy through pinned memory of torch's pool: a block is used again after its copy only."""
        try:
            staged = torch.tensor(values, dtype=torch.int64, pin_memory=True)
        except RuntimeError:  # pinning is refused; the driver then copies through its own memory
            staged = torch.tensor(values, dtype=torch.int64)
        return staged.to(device, non_blocking=True)

    def download(self, values: torch.Tensor) -> list[int]:
        """Return the values of an integer tensor."""
        return [int(v) for v in values.flatten().tolist()]  # host sync


@dataclass(frozen=True, slots=True)
class CudaBuffer:
    """Device memory of exactly the size asked for.

    Attributes:
        tensor: [nbytes] uint8.
    """

    tensor: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.tensor.numel()


class CudaDevice:
    """One GPU.

    Args:
        index: which one.
        readers: file reads kept in flight.
        driver: how CUDA is reached.

    Raises:
        DeviceError: it is not there.
    """

    kind = CUDA

    def __init__(self, index: int, *, readers: int = 4, driver: Driver | None = None) -> None:
        self._driver = driver or TorchDriver()
        self.name = f"cuda:{index}"
        if (reason := self._driver.missing(index)) is not None:
            raise DeviceError(f"--device {self.name} cannot be used: {reason}")
        self.torch_device = torch.device(self.name)
        compute, copy = self._driver.open(self.torch_device)
        self._pinned, self._readers = PinnedMemory(self._driver), readers
        self.compute = CudaComputeStream(compute)
        self.load = self.copy = CudaCopyStream(copy, self._pinned, readers)
        self._ledger: dict[str, int] = {}
        self._clock: tuple[DriverEvent, float] | None = None  # an event, and when it was reached

    def new_copy_stream(self) -> CudaCopyStream:
        """Open another stream for copies both ways."""
        return CudaCopyStream(self._driver.stream(self.torch_device), self._pinned, self._readers)

    def allocate(self, nbytes: int, purpose: str) -> CudaBuffer:
        """Allocate device memory for the whole run and enter it in the ledger."""
        try:
            tensor = self._driver.allocate(nbytes, self.torch_device)
        except torch.OutOfMemoryError as error:
            free, total = self._driver.memory(self.torch_device)
            raise DeviceError(
                f"{self.name} has no {format_size(nbytes)} left for {purpose}: "
                f"{format_size(free)} of {format_size(total)} is free, this run took "
                f"{format_size(sum(self._ledger.values()))} before; end other programs on the GPU "
                "or lower --device-memory"
            ) from error
        # torch may hand out memory that kernels enqueued before still use.
        self.copy.wait(self.compute.record())
        self.enter(nbytes, purpose)
        return CudaBuffer(tensor)

    def free_bytes(self) -> int:
        """Device memory that may still be taken."""
        return self._driver.memory(self.torch_device)[0]

    def enter(self, nbytes: int, purpose: str) -> None:
        """Enter in the ledger what something else allocated for the whole run."""
        self._ledger[purpose] = self._ledger.get(purpose, 0) + nbytes

    def ledger(self) -> dict[str, int]:
        """Bytes allocated so far by purpose."""
        return dict(self._ledger)

    def peak_bytes(self) -> int:
        """Most device memory torch had allocated at once since the device was opened."""
        return self._driver.peak_bytes(self.torch_device)

    def pin(self, buffer: HostBuffer) -> None:
        """Let the copy engine read host memory directly, if the driver allows it."""
        self._pinned.pin(buffer)

    def upload(self, values: Sequence[int]) -> torch.Tensor:
        """Return [len(values)] int64 on the device; the host does not wait."""
        return self._driver.upload(values, self.torch_device)

    def download(self, values: torch.Tensor) -> list[int]:
        """Return the values of an integer tensor; the one host sync of a step."""
        return self._driver.download(values)

    def reached_s(self, event: Event, recorded_s: float) -> float:
        """When the GPU reached an event; the first one sets the clock."""
        assert isinstance(event, CudaEvent)
        if self._clock is None:
            self._clock = event.enqueued(), recorded_s
        origin, origin_s = self._clock
        return origin_s + origin.seconds_until(event.enqueued())

    def close(self) -> None:
        """End the copies, then unpin."""
        try:
            self.copy.close()
        finally:
            self._pinned.release()
