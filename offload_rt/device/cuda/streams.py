"""The two queues of a GPU: kernels in one, copies into device memory in the other.

Layers in pinned host memory are copied straight from there: the host only enqueues. All others
(layers in files, host memory that could not be pinned) are brought piece by piece into small pinned
staging buffers by threads, and copied from there.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Lock

import torch

from offload_rt.device.base import (
    COPY_BYTES,
    PIECE_BYTES,
    CopyBlock,
    CopyPiece,
    CopyStatistics,
    DeviceBuffer,
    Event,
    HomeSource,
    HomeTarget,
)
from offload_rt.device.cuda.driver import DriverEvent, DriverStream
from offload_rt.device.cuda.ordered import Action, OrderedQueue, nothing
from offload_rt.device.cuda.pinned import PinnedMemory, Staging, StagingBuffer, StagingPool
from offload_rt.device.host_memory import HostBuffer
from offload_rt.device.idle import IdleCopies, LateOffer, Steps
from offload_rt.device.link_meter import LinkMeter

UNSETTLED_SPANS = 64  # timing events kept before finished ones are looked for


class CudaEvent:
    """A point in a stream that the driver may not know yet.

    A copy out of a file is enqueued to the driver by the thread that has read it. Until then there
    is nothing in the GPU's queue to wait for, so who waits has to wait on the host first. Copies
    out of pinned memory are enqueued at once and never make the host wait.
    """

    # One for all: most are known when they are made, and each had a lock.
    _settled = Condition()

    def __init__(self, event: DriverEvent | None = None) -> None:
        self._event = event
        self._error: BaseException | None = None

    def settle(self, event: DriverEvent | None, error: BaseException | None) -> None:
        """Say that all work before it is enqueued, or has failed."""
        with self._settled:
            self._event, self._error = event, error
            self._settled.notify_all()

    def enqueued(self) -> DriverEvent:
        """Return the driver's event; raise what the work before it raised on the host."""
        if self._event is None:
            with self._settled:
                self._settled.wait_for(lambda: self._event is not None or self._error is not None)
        if self._error is not None:
            raise self._error
        assert self._event is not None
        return self._event

    def synchronize(self) -> None:
        """Block the host until the point is reached."""
        self.enqueued().synchronize()


@dataclass(slots=True)
class Spans:
    """Times between pairs of events of one stream, added up once the GPU is past them."""

    total_s: float = 0.0
    nbytes: int = 0
    _open: deque[tuple[DriverEvent, DriverEvent, int]] = field(default_factory=deque)
    _lock: Lock = field(default_factory=Lock)

    def add(self, start: DriverEvent, end: DriverEvent, nbytes: int = 0) -> None:
        """Note a span and the bytes that arrive in it."""
        self._open.append((start, end, nbytes))
        if len(self._open) > UNSETTLED_SPANS:
            self.settle()

    def settle(self) -> None:
        """Add up the spans that are over."""
        with self._lock:
            while self._open and self._open[0][1].done():
                start, end, nbytes = self._open.popleft()
                self.total_s += start.seconds_until(end)
                self.nbytes += nbytes


class CudaComputeStream:
    """The stream kernels run in."""

    def __init__(self, stream: DriverStream) -> None:
        self._stream = stream
        self._stalls = Spans()

    def record(self) -> CudaEvent:
        """Return an event behind all kernels enqueued so far."""
        return CudaEvent(self._stream.record())

    def wait(self, event: Event) -> None:
        """Order later kernels after `event`; the time the GPU idles there is a stall."""
        assert isinstance(event, CudaEvent)
        # Before the host waits: the GPU may run dry meanwhile, and that is a stall too.
        idle_from = self._stream.record()
        self._stream.wait(event.enqueued())
        self._stalls.add(idle_from, self._stream.record())

    def follow(self, event: Event) -> None:
        """Order later kernels after those of another GPU."""
        assert isinstance(event, CudaEvent)
        self._stream.wait(event.enqueued())

    def stalled_s(self) -> float:
        """Seconds spent waiting, as far as the GPU has come."""
        self._stalls.settle()
        return self._stalls.total_s


class CudaCopyStream:
    """The stream that fills device memory.

    What is asked of it reaches the driver in the order it was asked, whichever thread enqueues it:
    a copy into a slot therefore comes after the wait for that slot's `drained` event and before
    the record of its `filled` event. A staging buffer is filled again only after the event behind
    the copy out of it. Pinned sources live as long as the device.

    Args:
        stream: the driver's.
        pinned: knows which sources the copy engine can read directly.
        staging: what all others go through.
        readers: pieces that are read at once.
        new_stream: opens one more of the driver's, for what is offered.
        streams: all of the device, to which it adds itself: what is offered waits for each.
    """

    def __init__(
        self,
        stream: DriverStream,
        pinned: PinnedMemory,
        staging: StagingPool,
        readers: int,
        new_stream: Callable[[], DriverStream],
        streams: "list[CudaCopyStream]",
    ) -> None:
        self._streams = streams
        streams.append(self)
        self._stream, self._pinned = stream, pinned
        self._new_stream = new_stream
        self._idle_stream: DriverStream | None = None
        self._reused: DriverEvent | None = None  # behind kernels that may use memory given out
        self._idle, self._idle_staging = IdleCopies(self._quiet), Staging(staging)
        self._latest: DriverEvent | None = None  # behind the last copy that was asked for
        self._copies = Spans()
        self._reads = LinkMeter()
        self._end: DriverEvent | None = None  # behind the last copy, if nothing was enqueued since
        # One more thread than reads: a wait whose turn has not come holds a thread.
        self._queue = OrderedQueue(readers + 1, lambda: Staging(staging))

    def copy(self, dst: DeviceBuffer, src: HomeSource) -> None:
        """Fill device memory, or the host memory of a layer's home, with the bytes of `src`."""
        image = src.image
        if isinstance(dst, HostBuffer):
            for block in src.blocks(dst):
                self._queue.prepare(partial(self._run_block, block))
        elif image is not None and self._pinned.holds(image.tensor):
            target = dst.tensor[: image.nbytes]
            self._queue.act(partial(self._copy_pinned, target, image.tensor))
            return  # what lies in memory does not change under a copy
        else:
            for piece in src.pieces():
                target = dst.tensor[piece.offset : piece.offset + piece.image_bytes]
                self._queue.prepare(partial(self._stage, piece, target))
        self._queue.act(src.check)

    def offer(
        self, dst: DeviceBuffer, src: HomeSource, after: Sequence[Event], *, last: bool = False
    ) -> "CudaOffer | LateOffer":
        """Fill device memory in a stream of its own, while no copy that was asked for is made."""
        if self._idle_stream is None:
            self._idle_stream = self._new_stream()
            if self._reused is not None:
                self._idle_stream.wait(self._reused)
        return LateOffer(self, self._idle, dst, src) if last else self._offer(dst, src, after)

    def offer_last(self, dst: DeviceBuffer, src: HomeSource) -> "CudaOffer":
        """The same behind all that is offered, cut into parts now."""
        return self._offer(dst, src, (), last=True)

    def reached(self) -> CudaEvent:
        """Return an event behind what was offered and was copied so far."""
        return CudaEvent(self.behind_idle())

    def _offer(
        self, dst: DeviceBuffer, src: HomeSource, after: Sequence[Event], *, last: bool = False
    ) -> "CudaOffer":
        image = src.image
        pieces: list[_Part]
        if image is not None and self._pinned.holds(image.tensor):
            cut = _cut(dst.tensor[: image.nbytes], image.tensor, PIECE_BYTES)
            pieces = [_Part(part.numel(), part, source) for part, source in cut]
        else:
            pieces = [
                _Part(p.nbytes, dst.tensor[p.offset : p.offset + p.image_bytes], p)
                for p in src.pieces()
            ]
        return CudaOffer(self, self._idle, pieces, src, after, last=last)

    def bring(self, part: "_Part", after: Sequence[Event]) -> None:
        """Copy a part in the stream of what is offered; the thread waits until it is there."""
        stream = self._idle_stream
        assert stream is not None  # something was offered
        for event in after:
            stream.wait(_enqueued(event))
        if isinstance(part.source, torch.Tensor):
            start = stream.record()
            stream.copy(part.target, part.source)
            end = stream.record()
            self._copies.add(start, end, part.nbytes)
        else:
            buffer = self._idle_staging.take()
            with self._reads.measure(part.nbytes):
                source = part.source.load(buffer.memory)
            stream.copy(part.target, source)
            end = buffer.drained = stream.record()
        end.synchronize()  # on the thread of what is offered

    def go_on(self, offer: "CudaOffer", parts: "Sequence[_Part]", check: Action) -> "CudaEvent":
        """Have the rest of an offered copy made in its turn; returns an event behind all of it.

        If none of it had begun, nothing has waited yet for what the copy is to come after. A thread
        of the queue does: there may be a read under way into the same memory, for a dropped copy.
        It reads again what was under way and failed.
        """

        def begun(staging: Staging) -> Action:
            after, failed = offer.settle()
            brought = nothing if failed is None else self._brought(failed, staging)

            def go_on() -> None:
                for event in after:
                    self._wait(event)
                brought()

            return go_on

        self._queue.prepare(begun)
        for part in parts:
            self._queue.prepare(partial(self._brought, part))
        self._queue.act(check)
        return self.record()

    def _brought(self, part: "_Part", staging: Staging) -> Action:
        """Read a part if it has to be; what is left to do in its turn."""
        if isinstance(part.source, torch.Tensor):
            return partial(self._copy_pinned, part.target, part.source)
        return self._stage(part.source, part.target, staging)

    def behind_idle(self) -> DriverEvent:
        """An event behind what is offered and was copied so far."""
        assert self._idle_stream is not None  # something was offered
        return self._idle_stream.record()

    def _quiet(self) -> None:
        while asked := [stream for stream in [*self._streams] if not stream._is_quiet()]:
            for stream in asked:
                stream._queue.wait_until_empty()
                if stream._latest is not None:
                    stream._latest.synchronize()

    def _is_quiet(self) -> bool:
        """Whether nothing that was asked for is on its way."""
        return self._queue.is_empty() and (self._latest is None or self._latest.done())

    def store(self, dst: HomeTarget, src: torch.Tensor) -> None:
        """Copy device memory into the host memory of a home, in its turn in the driver's queue.

        What cannot be pinned is read by the host, whatever a stream waits for, so the host waits:
        the driver makes it wait for such a copy anyway.
        """
        image = dst.image
        assert image is not None  # the planner keeps no file home for a GPU
        self._queue.act(partial(self._copy_pinned, image.tensor, src))
        if not self._pinned.holds(image.tensor):
            self.record().synchronize()

    def reuse(self, idle: Event) -> None:
        """Order later copies, offered ones too, after kernels that may use memory given out now."""
        self._reused = _enqueued(idle)
        self.wait(idle)
        if self._idle_stream is not None:
            self._idle_stream.wait(self._reused)

    def record(self) -> CudaEvent:
        """Return an event behind all copies asked for so far."""
        event = CudaEvent()
        self._queue.act(partial(self._settle, event), always=True)
        return event

    def wait(self, event: Event) -> None:
        """Order later copies after `event`."""
        self._queue.act(partial(self._wait, _enqueued(event)))

    def statistics(self) -> CopyStatistics:
        """Bytes that arrived, and the time it took them.

        Busy are the copy engine with pinned sources, and the reads (files, or memory that could not
        be pinned) with all others: the slower of the two roads they take.
        """
        self._copies.settle()
        read = self._reads.statistics()
        return CopyStatistics(
            bytes_copied=self._copies.nbytes + read.bytes_copied,
            busy_s=self._copies.total_s + read.busy_s,
        )

    def close(self) -> None:
        """Drop what is not enqueued and wait for the rest, so that buffers may die."""
        self._idle.close()
        self._queue.close()
        self._stream.synchronize()
        if self in self._streams:  # nobody waits for what is asked of it from now on
            self._streams.remove(self)

    def _settle(self, event: CudaEvent) -> None:
        if self._queue.error is not None:
            event.settle(None, self._queue.error)
            return
        try:
            event.settle(self._end or self._stream.record(), None)
        except BaseException as error:
            event.settle(None, error)  # whoever waits for it must not wait for ever
            raise

    def _wait(self, event: DriverEvent) -> None:
        self._stream.wait(event)
        self._end = None

    def _copy_pinned(self, target: torch.Tensor, source: torch.Tensor) -> None:
        start = self._stream.record()
        for part, piece in _cut(target, source, COPY_BYTES):
            self._stream.copy(part, piece)
        self._end = self._latest = self._stream.record()
        self._copies.add(start, self._end, source.numel())

    def _run_block(self, block: CopyBlock, _: Staging) -> Action:
        with self._reads.measure(block.nbytes):
            block.run()
        return nothing

    def _stage(self, piece: CopyPiece, target: torch.Tensor, staging: Staging) -> Action:
        buffer = staging.take()
        with self._reads.measure(piece.nbytes):
            source = piece.load(buffer.memory)
        return partial(self._copy_staged, target, source, buffer)

    def _copy_staged(
        self, target: torch.Tensor, source: torch.Tensor, buffer: StagingBuffer
    ) -> None:
        self._stream.copy(target, source)
        self._end = self._latest = buffer.drained = self._stream.record()


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a copy that is offered: `nbytes` are moved for it."""

    nbytes: int
    target: torch.Tensor
    source: torch.Tensor | CopyPiece


class _BehindSteps(CudaEvent):
    """Behind the step of a dropped copy that is under way; whoever uses its target waits."""

    def __init__(self, copies: CudaCopyStream, idle: IdleCopies, steps: Steps) -> None:
        super().__init__()
        self._copies, self._idle, self._steps = copies, idle, steps

    def enqueued(self) -> DriverEvent:
        """Return the driver's event, once the step is over."""
        self._idle.wait_for(self._steps)
        return self._copies.behind_idle()


class CudaOffer:
    """A copy that is made in a stream of its own while no other one is asked for."""

    def __init__(
        self,
        copies: CudaCopyStream,
        idle: IdleCopies,
        parts: Sequence[_Part],
        src: HomeSource,
        after: Sequence[Event],
        *,
        last: bool,
    ) -> None:
        self._copies, self._idle, self._parts = copies, idle, parts
        self._check, self._after = src.check, after
        self._failed: _Part | None = None  # while it was asked for
        self._blocks = [CopyBlock(p.nbytes, partial(self._step, i)) for i, p in enumerate(parts)]
        self._steps = idle.add(self._blocks, lambda block: block.run(), last=last)

    @property
    def begun_bytes(self) -> int:
        """Of the parts that have begun."""
        return self._steps.begun_bytes

    def ask(self) -> CudaEvent:
        """Have the parts that have not begun copied in their turn."""
        left = len(self._idle.take_back(self._steps, self._fails))
        if not left and not self._steps.running and self._failed is None:
            return self._copies.reached()  # it is there
        return self._copies.go_on(self, self._parts[len(self._parts) - left :], self._check)

    def drop(self) -> CudaEvent:
        """Leave the parts that have not begun."""
        self._idle.take_back(self._steps, lambda _: None)
        return _BehindSteps(self._copies, self._idle, self._steps)

    def settle(self) -> tuple[list[DriverEvent], _Part | None]:
        """Block until no part is under way.

        Returns:
            What the others come after, and the part that was under way and failed.
        """
        self._idle.wait_for(self._steps)
        return [_enqueued(event) for event in self._after], self._failed

    def _step(self, index: int) -> None:
        self._copies.bring(self._parts[index], self._after)
        if index == len(self._parts) - 1:
            self._check()

    def _fails(self, block: CopyBlock) -> None:
        """Keep the part that was under way when all was asked for."""
        self._failed = self._parts[self._blocks.index(block)]


def _enqueued(event: Event) -> DriverEvent:
    assert isinstance(event, CudaEvent)
    return event.enqueued()


def _cut(
    target: torch.Tensor, source: torch.Tensor, piece_bytes: int
) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces of a copy.

    A GPU has one engine for copies to it, and that ends a copy it has begun: what is uploaded in
    another stream waits for a piece, not for a layer.
    """
    starts = range(0, source.numel(), piece_bytes)
    return [(target[at : at + piece_bytes], source[at : at + piece_bytes]) for at in starts]
