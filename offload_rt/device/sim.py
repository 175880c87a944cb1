"""A device with no hardware: virtual time, and an error for every unordered access.

Each stream has a clock in seconds and a vector clock of the operations it knows to be finished. A
buffer remembers who wrote and who read it last; touching it without having waited for them raises
`StreamOrderError`, where a GPU would silently compute with stale bytes.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from operator import itemgetter
from typing import NamedTuple

from offload_rt.device.base import CopyStatistics, Event
from offload_rt.errors import StreamOrderError

_ROUNDING_S = 1e-12  # less is no time
_end = itemgetter(1)

Access = tuple[str, int]  # stream name, number of the operation in that stream


@dataclass(eq=False, slots=True)
class SimBuffer:
    """A byte count standing for memory, with the last accesses made to it."""

    nbytes: int
    written: Access | None = None
    reads: list[Access] = field(default_factory=list)


class SimEvent(NamedTuple):
    """The operations finished, and the virtual time, when the event fires."""

    clock: dict[str, int]
    time_s: float

    def synchronize(self) -> None:
        """Return at once: simulated work is done when it is enqueued."""


class SimLink:
    """One direction of a link that several copy streams share: it carries one byte at a time.

    A copy takes the time from when it is ready that the copies enqueued before it leave free, in
    pieces if need be: so the link never idles while a copy is ready, and no enqueued copy is put
    back by a later one. (Copy engines of a GPU share a link more evenly; when the last one ends is
    the same.) An upload of a few bytes waits for the piece that is crossing, no longer.

    Attributes:
        busy_s: time it has carried bytes.
        pieces: when it carried the last copy, from when until when.
    """

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.pieces: list[tuple[float, float]] = []
        self._end_s = 0.0
        self._gaps: list[tuple[float, float]] = []  # free times before the end, in order
        self._carried: list[tuple[float, float]] = []  # what was carried, since the last upload
        self._streams: list[SimStream] = []

    def join(self, stream: "SimStream") -> None:
        """Let a stream's copies cross here."""
        self._streams.append(stream)

    def carry(self, ready_s: float, seconds: float) -> float:
        """Carry a copy that is ready at a time and takes so long; returns when it is done."""
        self.busy_s += seconds
        self.pieces = []
        gaps, rest_s, done_s = self._gaps, seconds, ready_s
        at = bisect_right(gaps, ready_s, key=_end)  # those before end before it is ready
        while at < len(gaps) and rest_s > 0.0:
            start_s, end_s = gaps[at]
            begin_s = max(start_s, ready_s)
            used_s = min(rest_s, end_s - begin_s)
            if used_s > _ROUNDING_S:
                rest_s, done_s = rest_s - used_s, begin_s + used_s
                self.pieces.append((begin_s, done_s))
            sides = ((start_s, begin_s), (begin_s + used_s, end_s))
            gaps[at : at + 1] = left = [side for side in sides if side[1] > side[0]]
            at += len(left)
        oldest_s = min([stream.time_s for stream in self._streams])
        del gaps[: bisect_right(gaps, oldest_s, key=_end)]  # no copy will be ready by then
        if rest_s > _ROUNDING_S:
            begin_s = max(self._end_s, ready_s)
            if begin_s > self._end_s:
                self._gaps.append((self._end_s, begin_s))
            self._end_s = done_s = begin_s + rest_s
            self.pieces.append((begin_s, done_s))
        self._carried += self.pieces
        return done_s

    def let_in(self, ready_s: float, piece_s: float) -> float:
        """When a few bytes cross that are ready at a time, between pieces of so many seconds.

        Uploads are asked for in the order of their times.
        """
        self._carried = [(start_s, end_s) for start_s, end_s in self._carried if end_s > ready_s]
        for start_s, end_s in self._carried:
            if start_s < ready_s:
                pieces = ceil((ready_s - start_s) / piece_s - _ROUNDING_S)
                return min(end_s, start_s + pieces * piece_s)
        return ready_s


class SimStream:
    """An in-order queue; as compute stream it runs `kernel`s, as copy stream `copy`s.

    Args:
        name: shown in errors.
        bytes_per_s: speed of `copy`.
        link: carries the copies, if others share it.
        back_bytes_per_s: speed of `store`, which has a direction of the link for itself; None: that
            of `copy`.
        delay_s: from when the last byte of a copy is carried until its events say so.

    Attributes:
        watch: is told of each copy its source, and from when until when it was carried; a copy
            that others interrupted comes in pieces.
    """

    def __init__(
        self,
        name: str,
        bytes_per_s: float = 1.0,
        *,
        link: SimLink | None = None,
        back_bytes_per_s: float | None = None,
        delay_s: float = 0.0,
    ) -> None:
        self.name, self.bytes_per_s = name, bytes_per_s
        self.watch: Callable[[SimBuffer, float, float], None] | None = None
        self._delay_s = delay_s
        self.back_bytes_per_s = back_bytes_per_s or bytes_per_s
        self.time_s = 0.0
        self._link = link
        if link is not None:
            link.join(self)
        self._clock: dict[str, int] = {name: 0}
        self._stalled_s = self._busy_s = 0.0
        self._bytes_copied = 0

    def copy(self, dst: SimBuffer, src: SimBuffer) -> None:
        """Enqueue a copy; `dst` must be idle."""
        seconds = src.nbytes / self.bytes_per_s
        done_s = self.time_s + seconds
        if self._link is not None:
            done_s = self._link.carry(self.time_s, seconds)
        pieces = self._link.pieces if self._link is not None else ()
        self._move(dst, src, done_s - self.time_s, busy_s=seconds, pieces=pieces)

    def offer(
        self, dst: SimBuffer, src: SimBuffer, after: Sequence[Event], *, last: bool = False
    ) -> "SimOffer":
        """Enqueue a copy at once: in virtual time none is put off."""
        for event in after:
            self.wait(event)
        self.copy(dst, src)
        return SimOffer(src.nbytes, self.record())

    def store(self, dst: SimBuffer, src: SimBuffer) -> None:
        """Enqueue a copy of `src` back to a home."""
        seconds = src.nbytes / self.back_bytes_per_s
        self._move(dst, src, seconds, busy_s=seconds)

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
        return SimEvent(dict(self._clock), self.time_s + self._delay_s)

    def wait(self, event: Event) -> None:
        """Order later work in this stream after `event`."""
        assert isinstance(event, SimEvent)
        clock = self._clock
        for stream, tick in event.clock.items():
            if tick > clock.get(stream, 0):
                clock[stream] = tick
        if event.time_s > self.time_s:
            self._stalled_s += event.time_s - self.time_s
            self.time_s = event.time_s

    def stalled_s(self) -> float:
        """Virtual seconds this stream has waited."""
        return self._stalled_s

    def statistics(self) -> CopyStatistics:
        """What has been copied so far, in virtual time."""
        return CopyStatistics(bytes_copied=self._bytes_copied, busy_s=self._busy_s)

    def _move(
        self,
        dst: SimBuffer,
        src: SimBuffer,
        seconds: float,
        *,
        busy_s: float,
        pieces: Sequence[tuple[float, float]] = (),
    ) -> None:
        start_s = self.time_s
        self.kernel(reads=[src], writes=[dst], seconds=seconds)
        self._busy_s += busy_s
        self._bytes_copied += src.nbytes
        if self.watch is not None:
            for piece in pieces or [(start_s, self.time_s)]:
                self.watch(src, *piece)

    def _require(self, access: Access | None, what: str) -> None:
        if access is not None and self._clock.get(access[0], 0) < access[1]:
            raise StreamOrderError(f"stream {self.name!r}: buffer {what} by {access[0]!r}")


@dataclass(frozen=True, slots=True)
class SimOffer:
    """A copy that was made when it was offered."""

    begun_bytes: int
    event: SimEvent

    def ask(self) -> SimEvent:
        """It is there, or on its way."""
        return self.event

    def drop(self) -> SimEvent:
        """It is too late for that."""
        return self.event
