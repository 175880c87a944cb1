"""One NVIDIA GPU as a device.

Kernels run in the stream that is current when the device is opened, copies in a stream of their
own (`streams.py`).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils._pytree import tree_leaves

from offload_rt.device.base import STAGED_STREAMS, DeviceUsage, Event, MadeT, Replay
from offload_rt.device.cuda.driver import Driver, DriverEvent, DriverStream
from offload_rt.device.cuda.nvml import own_gpu_bytes
from offload_rt.device.cuda.pinned import PinnedMemory, StagingPool, UploadRing
from offload_rt.device.cuda.streams import CudaComputeStream, CudaCopyStream, CudaEvent
from offload_rt.device.cuda.torch_driver import TorchDriver
from offload_rt.device.host_memory import HostBuffer
from offload_rt.device.kinds import CUDA
from offload_rt.errors import DeviceError
from offload_rt.units import format_size

_log = logging.getLogger(__name__)


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
        self._uploads = UploadRing(self._pinned, compute.record)
        self._staging = StagingPool(self._pinned, STAGED_STREAMS * (readers + 1))
        self.compute = CudaComputeStream(compute)
        self._copies: list[CudaCopyStream] = []
        self.load = self.copy = self._copy_stream(copy)
        self._ledger: dict[str, int] = {}
        self._unrecorded = set[str]()  # why: what was said
        self._clock: tuple[DriverEvent, float] | None = None  # an event, and when it was reached

    def new_copy_stream(self) -> CudaCopyStream:
        """Open another stream for copies both ways."""
        return self._copy_stream(self._driver.stream(self.torch_device))

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
        idle = self.compute.record()
        for stream in self._copies:
            stream.reuse(idle)
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

    def mapped(self, buffer: HostBuffer) -> CudaBuffer | None:
        """Pinned memory has an address of the GPU too: what is read of it crosses the link."""
        if not self._pinned.holds(buffer.tensor):
            return None
        made = self._driver.mapped(buffer.tensor, self.torch_device)
        return None if made is None else CudaBuffer(made)

    def usage(self) -> DeviceUsage:
        """What torch had reserved at most, what NVML counts now, and what is pinned."""
        return DeviceUsage(
            reserved_bytes=self._driver.peak_reserved_bytes(self.torch_device),
            driver_bytes=own_gpu_bytes(),
            pinning=self._pinned.state(),
        )

    def address(self, tensor: torch.Tensor) -> int:
        """Return where a tensor lies in the GPU's memory."""
        return self._driver.address(tensor)

    def upload(self, values: Sequence[int]) -> torch.Tensor:
        """Return [len(values)] int64 on the device; the host does not wait."""
        parts = self._uploads.send(values, self._upload)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def receive(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of another GPU's tensor on this one."""
        return self._driver.receive(tensor, self.torch_device)

    def fetch(self, data: torch.Tensor) -> torch.Tensor:
        """Return bytes [n] in host memory; the host waits for them."""
        return self._driver.fetch(data)

    def put(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of host memory on the GPU, by way of pinned memory; the host goes on."""
        return self._uploads.send_rows(rows, self._upload)

    def download(self, values: torch.Tensor) -> list[int]:
        """Return the values of an integer tensor; the one host sync of a step."""
        return self._driver.download(values)

    def record(self, work: Callable[[], MadeT], vary: Callable[[], object]) -> Replay[MadeT] | None:
        """Capture a graph and try it; where that fails, say so and go on without."""
        try:
            replay, grown = self._driver.capture(work, self.torch_device)
            vary()
            if not self._has_bits_of(work(), replay):
                raise DeviceError("a replayed graph computed something else")
        except Exception as error:  # noqa: BLE001 - whatever it is, the work itself can still be done
            why = str(error).partition("\n")[0] or type(error).__name__
            if why not in self._unrecorded:
                self._unrecorded.add(why)
                _log.warning(
                    "%s: some passes are not recorded as a graph (%s): they run kernel by kernel",
                    self.name,
                    why,
                )
            return None
        if grown:
            self.enter(grown, "recorded passes")
        return replay

    def _has_bits_of(self, result: MadeT, replay: Replay[MadeT]) -> bool:
        """Whether a replay makes the same bits, NaN included; the host waits for it."""
        wanted = [
            _bits(each).clone() for each in tree_leaves(result)
        ]  # it may go to the same place
        pairs = zip(tree_leaves(replay()), wanted, strict=True)
        equal = torch.stack([(_bits(again) == each).all() for again, each in pairs])
        return all(self._driver.download(equal.to(torch.int64)))

    def reached_s(self, event: Event, recorded_s: float) -> float:
        """When the GPU reached an event; the first one sets the clock."""
        assert isinstance(event, CudaEvent)
        if self._clock is None:
            self._clock = event.enqueued(), recorded_s
        origin, origin_s = self._clock
        return origin_s + origin.seconds_until(event.enqueued())

    def _upload(self, source: torch.Tensor) -> torch.Tensor:
        return self._driver.upload(source, self.torch_device)

    def _copy_stream(self, stream: DriverStream) -> CudaCopyStream:
        new_stream = partial(self._driver.stream, self.torch_device)
        return CudaCopyStream(
            stream, self._pinned, self._staging, self._readers, new_stream, self._copies
        )

    def close(self) -> None:
        """End the copies, then unpin."""
        try:
            self.copy.close()
        finally:
            self._pinned.release()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """[bytes] uint8 of a tensor."""
    return tensor.contiguous().view(torch.uint8)
