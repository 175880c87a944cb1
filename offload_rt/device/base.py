"""The contract every device keeps. Nothing here imports torch.

A device has memory (buffers), a compute stream and a copy stream. Streams are in-order queues; an
event is a point in a queue that another queue, or the host, can wait for. On CUDA these are CUDA's
own; on the CPU computation is synchronous and copies are done by reader threads; on the simulated
device both only advance a clock. The code above the device is the same for all three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

    from offload_rt.device.host_memory import HostBuffer
    from offload_rt.device.kinds import DeviceKind

PAGE_BYTES = 4096  # direct reads and writes are whole multiples of it
# What is copied at once. Measured with 1, 4 and 16 MiB and 1 to 8 reads in flight on a 2-core
# machine with a virtual disk: 4 MiB is within 4 % of the best everywhere (2.6 to 2.8 GB/s), 1 MiB
# loses up to 20 %.
PIECE_BYTES = 4 * 2**20
STAGING_BYTES = PIECE_BYTES + 2 * PAGE_BYTES  # and the rests of its first and last page
# Streams of copies to a GPU whose staging buffers are pinned before anything else: weights and KV.
STAGED_STREAMS = 2
# A pinned copy to a GPU is cut into pieces of it: 0.6 ms of PCIe 4.0, and 4 us of the host's time
# each. An upload waits for half of one on average; pieces half as large would cost twice the gaps.
COPY_BYTES = 16 * 2**20

BufferT = TypeVar("BufferT", contravariant=True)
SourceT = TypeVar("SourceT", contravariant=True)


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Block the host until the point is reached; raises what the work before it raised."""


class Stream(Protocol):
    """An in-order queue of work."""

    def record(self) -> Event:
        """Return an event for all work enqueued so far."""

    def wait(self, event: Event) -> None:
        """Order all later work of this stream after `event`."""


class ComputeStream(Stream, Protocol):
    """The queue kernels run in."""

    def follow(self, event: Event) -> None:
        """Order later kernels after those of another device; what this waits is no stall."""

    def stalled_s(self) -> float:
        """Seconds this stream has spent waiting for copies; call it after a host sync."""


class CopyStream(Stream, Protocol[BufferT, SourceT]):
    """The queue that fills device buffers from their home."""

    def copy(self, dst: BufferT, src: SourceT) -> None:
        """Enqueue filling `dst` with the bytes of `src`; `dst` must live until the copy is done."""

    def statistics(self) -> CopyStatistics:
        """What has been copied so far."""


class Offer(Protocol):
    """A copy that is made while nobody waits for any other one (`device/idle.py`)."""

    @property
    def begun_bytes(self) -> int:
        """Of it, that have begun to be copied."""

    def ask(self) -> Event:
        """Have what is left copied as if it had been asked for; returns an event behind it."""

    def drop(self) -> Event:
        """Copy no more of it; returns an event behind what has begun, which raises nothing."""


class OfferingStream(CopyStream[BufferT, SourceT], Protocol):
    """A copy stream that also makes copies nobody needs yet."""

    def offer(
        self, dst: BufferT, src: SourceT, after: Sequence[Event], *, last: bool = False
    ) -> Offer:
        """Offer to fill `dst`, after these events; `record` does not wait for it.

        Args:
            dst: is filled.
            src: with that.
            after: these events.
            last: behind all that is offered without that, whenever it is.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyStatistics:
    """Totals of a copy stream since it was made.

    Attributes:
        bytes_copied: bytes that arrived, alignment padding not counted.
        busy_s: seconds in which at least one copy was in flight.
    """

    bytes_copied: int
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinning:
    """Host memory that a GPU's copy engine reads directly.

    Attributes:
        pinned_bytes: of it.
        refused_bytes: that were to be pinned, and were not.
        reason: the driver's, of the last refusal.
    """

    pinned_bytes: int = 0
    refused_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUsage:
    """Memory that a device's ledger does not show.

    Attributes:
        reserved_bytes: of device memory, that the allocator had taken at most.
        driver_bytes: that the driver counts for this process now, context included; None where it
            does not say.
        pinning: of host memory.
    """

    reserved_bytes: int
    driver_bytes: int | None = None
    pinning: Pinning = Pinning()


def sum_usage(found: Sequence[DeviceUsage]) -> DeviceUsage:
    """Of several devices, whose driver counts all of them each time."""
    return DeviceUsage(
        reserved_bytes=sum(one.reserved_bytes for one in found),
        driver_bytes=found[0].driver_bytes,
        pinning=Pinning(
            pinned_bytes=sum(one.pinning.pinned_bytes for one in found),
            refused_bytes=sum(one.pinning.refused_bytes for one in found),
            reason=next((one.pinning.reason for one in found if one.pinning.reason), ""),
        ),
    )


class DeviceBuffer(Protocol):
    """A stretch of device memory of fixed size, allocated once."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""

    @property
    def tensor(self) -> torch.Tensor:
        """[nbytes] uint8 view of the memory."""


class HomeSource(Protocol):
    """The bytes of one layer at their home, in the layout they have on the device."""

    @property
    def nbytes(self) -> int:
        """Bytes that cross the link."""

    @property
    def image(self) -> DeviceBuffer | None:
        """The host memory that holds the whole image, or None if the home is a file."""

    def blocks(self, dst: DeviceBuffer) -> Sequence[CopyBlock]:
        """Split a copy into host memory into independent blocks, for any order."""

    def pieces(self) -> Sequence[CopyPiece]:
        """Split a copy through staging buffers into independent pieces, for any order."""

    def check(self) -> None:
        """Raise if the home changed under the copy (a replaced or truncated file)."""


class HomeTarget(Protocol):
    """Where bytes of the device go."""

    @property
    def image(self) -> DeviceBuffer | None:
        """The host memory that takes them, or None if it is a file."""

    def write_blocks(self, src: torch.Tensor) -> Sequence[CopyBlock]:
        """Split a copy of `src`, [nbytes] uint8 in host memory, into independent blocks."""


class TwoWayStream(CopyStream["DeviceBuffer", "HomeSource"], Protocol):
    """A copy stream of its own, for what also goes back to its home."""

    def store(self, dst: HomeTarget, src: torch.Tensor) -> None:
        """Enqueue writing `src`, [nbytes] uint8 on the device; it must stay until that is done."""

    def close(self) -> None:
        """Drop what is not started and wait for what is in flight."""


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """One part of a copy: call `run` on any thread; it moves `nbytes` bytes."""

    nbytes: int
    run: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPiece:
    """One part of a copy that goes through a staging buffer of at least `STAGING_BYTES`.

    Attributes:
        offset: where it belongs in the image.
        image_bytes: bytes it has there.
        nbytes: bytes that are moved for it; fewer or more where the number format changes.
        load: brings it into a staging buffer, on any thread; returns [image_bytes] uint8 of it.
    """

    offset: int
    image_bytes: int
    nbytes: int
    load: Callable[[HostBuffer], torch.Tensor]


MadeT = TypeVar("MadeT")
ReplayedT = TypeVar("ReplayedT", covariant=True)


class Replay(Protocol[ReplayedT]):
    """Work that was recorded."""

    def __call__(self) -> ReplayedT:
        """Enqueue all of it; what it returns is where it was when it was recorded."""


class Device(Protocol):
    """A place to compute, with its memory, its two queues and its bookkeeping."""

    @property
    def name(self) -> str:
        """`cpu`, `cuda:0`, ..."""

    @property
    def kind(self) -> DeviceKind:
        """What a device of its kind can do."""

    @property
    def torch_device(self) -> torch.device:
        """Where tensors of this device live."""

    @property
    def compute(self) -> ComputeStream:
        """The compute stream."""

    @property
    def copy(self) -> OfferingStream[DeviceBuffer, HomeSource]:
        """The copy stream."""

    @property
    def load(self) -> CopyStream[DeviceBuffer, HomeSource]:
        """The queue that fills resident memory at the start, at full speed."""

    def new_copy_stream(self) -> TwoWayStream:
        """Open another copy queue over the same link; who opens it closes it before the device."""

    def allocate(self, nbytes: int, purpose: str) -> DeviceBuffer:
        """Allocate device memory for the whole run and enter it in the ledger.

        Raises:
            DeviceError: the device has not that much memory.
        """

    def enter(self, nbytes: int, purpose: str) -> None:
        """Enter in the ledger what something else allocated for the whole run."""

    def ledger(self) -> dict[str, int]:
        """Bytes allocated so far by purpose."""

    def peak_bytes(self) -> int:
        """Most device memory this run has used at once, everything counted."""

    def usage(self) -> DeviceUsage:
        """Memory beside what the ledger and the peak say."""

    def free_bytes(self) -> int:
        """Device memory that is free now."""

    def pin(self, buffer: HostBuffer) -> None:
        """Take filled host memory as the home of a layer, not counted as the device's.

        Where it makes copies faster the memory is page-locked, unless the system refuses.
        """

    def mapped(self, buffer: HostBuffer) -> DeviceBuffer | None:
        """Host memory as kernels of this device read it where it lies.

        None where they cannot: it is not page-locked, or has no address there.
        """

    def address(self, tensor: torch.Tensor) -> int:
        """Return where a tensor of this device lies, as kernels see it."""

    def upload(self, values: Sequence[int]) -> torch.Tensor:
        """Return [len(values)] int64 on the device, without making the host wait."""

    def receive(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the same on this device, of another one of its kind; the host does not wait.

        Both devices' compute streams are in it (`several.Devices.hop`).
        """

    def download(self, values: torch.Tensor) -> list[int]:
        """Return the values of an integer tensor; the one host sync of a step."""

    def fetch(self, data: torch.Tensor) -> torch.Tensor:
        """Return bytes [n] of this device in host memory; the host waits for them."""

    def put(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of host memory on the device; the host does not wait, and may change them."""

    def record(self, work: Callable[[], MadeT], vary: Callable[[], object]) -> Replay[MadeT] | None:
        """Record kernels, to enqueue them all at once from then on.

        Args:
            work: reads and writes tensors that stay, and decides by their shapes alone; it is run
                a few times, each of which must leave the same in memory. It makes a tensor, or a
                sequence of them.
            vary: puts other numbers into what `work` reads. With them a replay is compared with
                the work itself, once, which shows whatever of it hides in Python.

        Returns:
            What does the same work on what the tensors hold by then. None if this cannot be
            recorded, or if its replay has other bits: why is said once. Other work may be; who
            asks decides whether to ask again.
        """

    def reached_s(self, event: Event, recorded_s: float) -> float:
        """When an event was reached, as `time.perf_counter` counts; it must be reached.

        The first call sets a GPU's clock, so that event must have been reached just now.

        Args:
            event: of any stream of this device.
            recorded_s: when it was recorded.
        """

    def close(self) -> None:
        """Stop threads and release the queues; buffers die with their last reference."""


def upload_together(device: Device, parts: Sequence[Sequence[int]]) -> Sequence[torch.Tensor]:
    """Upload lists of integers at once; [len(part)] int64 of each, views of one tensor."""
    sent = device.upload([value for part in parts for value in part])
    return sent.split([len(part) for part in parts])
