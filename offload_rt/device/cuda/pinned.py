"""Host memory the copy engine reads directly, and what is used where that is refused."""

import ctypes
import logging
from array import array
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import torch

from offload_rt.device.base import STAGING_BYTES, Pinning
from offload_rt.device.cuda.driver import Driver, DriverEvent
from offload_rt.device.host_memory import HostBuffer, allocate_host
from offload_rt.units import format_size

logger = logging.getLogger(__name__)

UPLOAD_BYTES = 2**20  # ids, places and wanted rows of 1,024 tokens, and what 300 of them see
UPLOADS = 4  # the host is never so many passes ahead of the GPU that it has to wait for one
_ID_BYTES = 8


class PinnedMemory:
    """Host memory registered with the driver, which the copy engine reads directly.

    Memory is mapped by us and registered after it was filled, in exactly its size: torch's own
    pinned allocator rounds up to powers of two (+89 % for the layers of Qwen2.5-7B).
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._held: dict[int, HostBuffer] = {}  # by address; keeps them alive until unregistered
        self._starts: list[int] = []  # their addresses, rising
        self._made: set[int] = set()  # addresses of the driver's own, which it takes back itself
        self._least_refused: int | None = None  # no use in asking again for as much
        self._refused_bytes, self._reason = 0, ""
        self._lock = Lock()

    def pin(self, buffer: HostBuffer) -> None:
        """Register a buffer; when that is refused it stays pageable, and a warning says so."""
        with self._lock:
            if not self._register(buffer):
                self._refuse(buffer.nbytes)

    def allocate(self, nbytes: int) -> HostBuffer:
        """Map memory and pin it: registered, else the driver's own, else pageable."""
        buffer = allocate_host(nbytes)
        buffer.tensor.zero_()  # pages that were never touched take longer to register
        with self._lock:
            if self._register(buffer):
                return buffer
            made = self._driver.allocate_pinned(nbytes)
            if made is None:
                self._refuse(nbytes)
                return buffer
            view = (ctypes.c_char * nbytes).from_address(made.data_ptr())
            buffer = HostBuffer(made, memoryview(view).cast("B"))
            self._made.add(self._hold(buffer))
            return buffer

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a buffer, or of a part of one, is pinned."""
        address = tensor.data_ptr()
        place = bisect_right(self._starts, address)
        if not place:
            return False
        start = self._starts[place - 1]
        return address < start + self._held[start].nbytes

    def state(self) -> Pinning:
        """How much is pinned, and how much was to be."""
        held = sum(buffer.nbytes for buffer in self._held.values())
        return Pinning(pinned_bytes=held, refused_bytes=self._refused_bytes, reason=self._reason)

    def release(self) -> None:
        """Unregister everything."""
        for address in self._held.keys() - self._made:
            self._driver.unregister(address)
        self._held, self._starts, self._made = {}, [], set()

    def _hold(self, buffer: HostBuffer) -> int:
        address = buffer.tensor.data_ptr()
        self._held[address] = buffer
        insort(self._starts, address)
        return address

    def _register(self, buffer: HostBuffer) -> bool:
        if self._least_refused is not None and buffer.nbytes >= self._least_refused:
            return False
        reason = self._driver.register(buffer.tensor.data_ptr(), buffer.nbytes)
        if reason is None:
            self._hold(buffer)
            return True
        self._least_refused, self._reason = buffer.nbytes, reason
        return False

    def _refuse(self, nbytes: int) -> None:
        first, self._refused_bytes = not self._refused_bytes, self._refused_bytes + nbytes
        if first:
            logger.warning(
                "pinning %s of host memory was refused (%s); %s is pinned. What is not pinned "
                "crosses one more memory copy on its way to the GPU, which often halves its speed "
                "(8-15 GB/s where PCIe 4.0 has 25): use less host memory, or raise `ulimit -l` or "
                "the memory limit of the container or of WSL",
                format_size(nbytes),
                self._reason,
                format_size(self.state().pinned_bytes),
            )


@dataclass(slots=True, eq=False)
class StagingBuffer:
    """Pinned host memory that one piece at a time passes through.

    Attributes:
        drained: the copy out of it that was enqueued last.
    """

    memory: HostBuffer
    drained: DriverEvent | None = None


class StagingPool:
    """Staging buffers that are pinned before anything else is, and kept.

    Where little can be pinned (WSL) layers would leave nothing for them, and all copies would be
    made by the host.

    Args:
        pinned: makes them.
        threads: that need them, two each; more are made when more ask.
    """

    def __init__(self, pinned: PinnedMemory, threads: int) -> None:
        self._pinned = pinned
        self._pairs = [self._make() for _ in range(threads)]

    def pair(self) -> list[StagingBuffer]:
        """Two buffers, for as long as the device lives."""
        try:
            return self._pairs.pop()
        except IndexError:
            return self._make()

    def _make(self) -> list[StagingBuffer]:
        return [StagingBuffer(self._pinned.allocate(STAGING_BYTES)) for _ in range(2)]


class Staging:
    """The two staging buffers of one thread: while one is copied out of, the other is filled."""

    def __init__(self, pool: StagingPool) -> None:
        self._pool = pool
        self._ring: deque[StagingBuffer] = deque()

    def take(self) -> StagingBuffer:
        """Return the next buffer, once the last copy out of it is done."""
        if not self._ring:
            self._ring.extend(self._pool.pair())
        self._ring.rotate(1)
        buffer = self._ring[0]
        if buffer.drained is not None:
            buffer.drained.synchronize()  # on a feeding thread: the program does not wait
        return buffer


class UploadRing:
    """Pinned host memory that integers and rows go up from, part by part, in the compute stream.

    A part is written again only after the event behind the copy out of it.

    Args:
        pinned: makes the memory.
        record: records such an event.
    """

    def __init__(self, pinned: PinnedMemory, record: Callable[[], DriverEvent]) -> None:
        self._ring = deque(StagingBuffer(pinned.allocate(UPLOAD_BYTES)) for _ in range(UPLOADS))
        self._record = record

    def send(
        self, values: Sequence[int], upload: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        """Upload integers of 64 bits; what is longer than a part goes in several."""
        most = UPLOAD_BYTES // _ID_BYTES
        return [
            self._send(values[start : start + most], upload)
            for start in range(0, max(1, len(values)), most)
        ]

    def _send(
        self, values: Sequence[int], upload: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        buffer, nbytes = self._next(), _ID_BYTES * len(values)
        buffer.memory.view[:nbytes] = array("q", values).tobytes()
        source = torch.empty(0, dtype=torch.int64)
        if values:
            source = torch.frombuffer(buffer.memory.view, dtype=torch.int64, count=len(values))
        sent = upload(source)
        buffer.drained = self._record()
        return sent

    def send_rows(
        self, rows: torch.Tensor, upload: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Upload rows [n, E], as many at a time as a part takes."""
        sent = []
        for some in rows.split(max(1, UPLOAD_BYTES // (rows.shape[1] * rows.itemsize))):
            buffer = self._next()
            source = buffer.memory.tensor[: some.nbytes].view(rows.dtype).view(some.shape)
            sent.append(upload(source.copy_(some)))
            buffer.drained = self._record()
        return sent[0] if len(sent) == 1 else torch.cat(sent)

    def _next(self) -> StagingBuffer:
        """The part that was written longest ago, once it has gone up."""
        self._ring.rotate(1)
        buffer = self._ring[0]
        if buffer.drained is not None and not buffer.drained.done():
            buffer.drained.synchronize()
        return buffer
