"""What the CUDA device asks of CUDA: about a dozen calls, so that a double can replace them.

`cuda.TorchDriver` is the real one, `tests/fake_cuda.py` one for machines without a GPU.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

MadeT = TypeVar("MadeT")


class DriverEvent(Protocol):
    """A recorded CUDA event with a time stamp."""

    def synchronize(self) -> None:
        """Block the host until it is reached."""

    def done(self) -> bool:
        """Whether it is reached."""

    def seconds_until(self, later: "DriverEvent") -> float:
        """Seconds from this event to a later one; both are reached."""


class DriverStream(Protocol):
    """A CUDA stream."""

    def record(self) -> DriverEvent:
        """Record an event behind all work enqueued so far."""

    def wait(self, event: DriverEvent) -> None:
        """Order all later work after `event`."""

    def copy(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        """Enqueue a copy of [n] bytes between host and device; both live until it is done."""

    def synchronize(self) -> None:
        """Block the host until all work enqueued so far is done."""


class Driver(Protocol):
    """What is asked of CUDA and of torch's CUDA memory."""

    def missing(self, index: int) -> str | None:
        """Why GPU `index` cannot be used and what to do, or None if it can."""

    def open(self, device: torch.device) -> tuple[DriverStream, DriverStream]:
        """Return the current stream and a new one, and restart the count of peak memory."""

    def stream(self, device: torch.device) -> DriverStream:
        """Return one more new stream."""

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Return [nbytes] uint8 of device memory, or raise torch.OutOfMemoryError."""

    def memory(self, device: torch.device) -> tuple[int, int]:
        """Free and total bytes of device memory."""

    def peak_bytes(self, device: torch.device) -> int:
        """Most bytes allocated at once since `open`."""

    def peak_reserved_bytes(self, device: torch.device) -> int:
        """Most bytes that torch's allocator had taken at once since `open`."""

    def register(self, address: int, nbytes: int) -> str | None:
        """Pin host memory; returns the reason if it is refused, and leaves no error behind."""

    def unregister(self, address: int) -> None:
        """Unpin host memory."""

    def allocate_pinned(self, nbytes: int) -> torch.Tensor | None:
        """Return [nbytes] uint8 of host memory that is pinned from the start, or None."""

    def mapped(self, memory: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """Return registered host memory as a tensor of the device; None if it has no address there.

        Args:
            memory: [n] uint8; the result keeps it alive.
            device: whose kernels read it.
        """

    def address(self, tensor: torch.Tensor) -> int:
        """Where a tensor of the device lies."""

    def upload(self, source: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a copy of pinned host memory on the device, enqueued in the current stream."""

    def receive(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a copy on another GPU, made behind what both compute streams were given so far."""

    def download(self, values: torch.Tensor) -> list[int]:
        """Return the values of an integer tensor; the host waits for the current stream."""

    def fetch(self, data: torch.Tensor) -> torch.Tensor:
        """Return bytes [n] in host memory; the host waits for the current stream."""

    def capture(
        self, work: Callable[[], MadeT], device: torch.device
    ) -> tuple[Callable[[], MadeT], int]:
        """Run work a few times, then capture it as a graph.

        Returns:
            What enqueues the graph in the current stream, and returns where its result is; and the
            bytes that the pool of all graphs grew by.

        Raises:
            RuntimeError: it cannot be captured.
        """
