"""Host memory the copy engine reads directly, and what is used where that is refused."""

import logging
from collections import deque

import torch

from offload_rt.device.base import STAGING_BYTES
from offload_rt.device.cuda.driver import Driver, DriverEvent
from offload_rt.device.host_memory import HostBuffer, allocate_host
from offload_rt.units import format_size

logger = logging.getLogger(__name__)


class PinnedMemory:
    """Host memory registered with the driver, which the copy engine reads directly.

    Memory is mapped by us and registered after it was filled, in exactly its size: torch's own
    pinned allocator rounds up to powers of two (+89 % for the layers of Qwen2.5-7B).
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._held: dict[int, HostBuffer] = {}  # by address; keeps them alive until unregistered
        self._refused_bytes: int | None = None  # smallest size refused: no use in asking again

    def pin(self, buffer: HostBuffer) -> None:
        """Register a buffer; when that is refused it stays pageable, and a warning says so."""
        if self._refused_bytes is not None and buffer.nbytes >= self._refused_bytes:
            return
        address = buffer.tensor.data_ptr()
        reason = self._driver.register(address, buffer.nbytes)
        if reason is None:
            self._held[address] = buffer
            return
        self._refused_bytes = buffer.nbytes
        pinned = sum(held.nbytes for held in self._held.values())
        logger.warning(
            "pinning %s of host memory was refused (%s); %s is pinned. What is not pinned crosses "
            "one more memory copy on its way to the GPU, which often halves its speed (8-15 GB/s "
            "where PCIe 4.0 has 25): use less host memory, or raise `ulimit -l` or the memory "
            "limit of the container or of WSL",
            format_size(buffer.nbytes),
            reason,
            format_size(pinned),
        )

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a buffer, or of a part of one, is pinned."""
        address = tensor.data_ptr()
        if address in self._held:
            return True
        ends = ((start, start + held.nbytes) for start, held in self._held.items())
        return any(start <= address < end for start, end in ends)

    def release(self) -> None:
        """Unregister everything."""
        for address in self._held:
            self._driver.unregister(address)
        self._held = {}


class StagingBuffer:
    """Pinned host memory that one piece at a time passes through.

    Attributes:
        drained: the copy out of it that was enqueued last.
    """

    def __init__(self, pinned: PinnedMemory) -> None:
        self.memory = allocate_host(STAGING_BYTES)
        self.memory.tensor.zero_()  # pages that were never touched take longer to register
        pinned.pin(self.memory)
        self.drained: DriverEvent | None = None


class Staging:
    """The two staging buffers of one thread: while one is copied out of, the other is filled."""

    def __init__(self, pinned: PinnedMemory) -> None:
        self._pinned = pinned
        self._ring: deque[StagingBuffer] = deque()

    def take(self) -> StagingBuffer:
        """Return the next buffer, once the last copy out of it is done."""
        if not self._ring:
            self._ring.extend(StagingBuffer(self._pinned) for _ in range(2))
        self._ring.rotate(1)
        buffer = self._ring[0]
        if buffer.drained is not None:
            buffer.drained.synchronize()  # on a feeding thread: the program does not wait
        return buffer
