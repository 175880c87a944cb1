"""A device with no hardware: virtual time, and an error for every unordered access.

Each stream has a clock in seconds and a vector clock of the operations it knows to be finished. A
buffer remembers who wrote and who read it last; touching it without having waited for them raises
`StreamOrderError`, where a GPU would silently compute with stale bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from offload_rt.device.base import CopyStatistics, Event
from offload_rt.errors import StreamOrderError

Access = tuple[str, int]  # stream name, number of the operation in that stream


@dataclass(eq=False, slots=True)
class SimBuffer:
    """A byte count standing for memory, with the last accesses made to it."""

    nbytes: int
    written: Access | None = None
    reads: list[Access] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SimEvent:
    """The operations finished, and the virtual time, when the event fires."""

    clock: dict[str, int]
    time_s: float

    def synchronize(self) -> None:
        """Return at once: simulated work is done when it is enqueued."""


class SimStream:
    """An in-order queue; as compute stream it runs `kernel`s, as copy stream `copy`s.

    Args:
        name: shown in errors.
        bytes_per_s: speed of `copy`.
    """

    def __init__(self, name: str, bytes_per_s: float = 1.0) -> None:
        self.name, self.bytes_per_s = name, bytes_per_s
        self.time_s = 0.0
        self._clock: dict[str, int] = {name: 0}
        self._stalled_s = self._busy_s = 0.0
        self._bytes_copied = 0

    def copy(self, dst: SimBuffer, src: SimBuffer) -> None:
        """Enqueue a copy; `dst` must be idle."""
        seconds = src.nbytes / self.bytes_per_s
        self.kernel(reads=[src], writes=[dst], seconds=seconds)
        self._busy_s += seconds
        self._bytes_copied += src.nbytes

    def store(self, dst: SimBuffer, src: SimBuffer) -> None:
        """Enqueue a copy back to a home; it costs what a copy of `src` costs."""
        self.copy(dst, src)

    def kernel(
        self, *, reads: Sequence[SimBuffer], writes: Sequence[SimBuffer], seconds: float
    ) -> None:
        """Enqueue work that reads and writes the given buffers.

        Raises:
            StreamOrderError: one of them is in use by work this stream has not waited for.
        """
        for buffer in reads:
            self._require(buffer.written, "read before it was written")
        for buffer in writes:
            self._require(buffer.written, "overwritten while being written")
            for read in buffer.reads:
                self._require(read, "overwritten while being read")
        self._clock[self.name] += 1
        self.time_s += seconds
        here = (self.name, self._clock[self.name])
        for buffer in writes:
            buffer.written, buffer.reads = here, []
        for buffer in reads:
            buffer.reads.append(here)

    def record(self) -> SimEvent:
        """Return an event for all work enqueued so far."""
        return SimEvent(dict(self._clock), self.time_s)

    def wait(self, event: Event) -> None:
        """Order later work in this stream after `event`."""
        assert isinstance(event, SimEvent)
        for stream, tick in event.clock.items():
            self._clock[stream] = max(self._clock.get(stream, 0), tick)
        self._stalled_s += max(0.0, event.time_s - self.time_s)
        self.time_s = max(self.time_s, event.time_s)

    def stalled_s(self) -> float:
        """Virtual seconds this stream has waited."""
        return self._stalled_s

    def statistics(self) -> CopyStatistics:
        """What has been copied so far, in virtual time."""
        return CopyStatistics(bytes_copied=self._bytes_copied, busy_s=self._busy_s)

    def _require(self, access: Access | None, what: str) -> None:
        if access is not None and self._clock.get(access[0], 0) < access[1]:
            raise StreamOrderError(f"stream {self.name!r}: buffer {what} by {access[0]!r}")
