"""Passes of the real rings in virtual time.

`streaming/ring.py`, the ring that runs, enqueues the copies, waits and kernels of passes on
simulated streams; nothing here computes what overlaps with what.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate
from math import floor
from typing import TypeAlias

from offload_rt.costs.experts import IN_VAIN
from offload_rt.device.base import CopyStatistics, Event
from offload_rt.device.sim import SimBuffer, SimEvent, SimLink, SimStream
from offload_rt.streaming.ring import Cycle, Ring, UnitT

# A link is fed in blocks of KV by the thousand; more of them in a pass are replayed in larger
# ones. The ring then holds more bytes than it does, by less than a hundredth of the KV.
_MOST_BLOCKS = 512
_MIN_SLOTS = 2
# The lead of the copies over the kernels settles within a few passes, then every pass repeats the
# one before (so 5,992 of 6,000 random small ones). Else the mean of the last ones is taken.
_MOST_PASSES, _TIMED_PASSES = 12, 4
_SAME = 1e-9  # of a pass: rounding
_AHEAD_PARTS = 8  # a layer that is read ahead comes and goes in pieces; these are larger

_Block: TypeAlias = tuple[int, int]  # its layer, and which of the layer's it is
_Ring: TypeAlias = Ring[UnitT, SimBuffer, SimBuffer]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedLayer:
    """One layer in a pass.

    Attributes:
        kernel_s: its kernels, but for attention to streamed blocks.
        home_bytes: of its weights that are copied; None if they are resident.
        read_bytes: that are read from files for that, into host memory; 0: they are there.
        kv_bytes: of cached rows that are copied, in blocks.
        kv_kernel_s: attention to these.
        back_bytes: of new rows that go home, after the pass.
        device: that computes it.
        missed_bytes: of experts that are copied after the layer's router has chosen them.
        experts_s: of `kernel_s`, the experts', which come last.
        missed_s: of these, the copied ones', which wait for it.
        misses: how likely it is that 0, 1, ... of the experts that it asks for are copied, of which
            `missed_bytes` is the mean; empty: it is the same each time.
        foreseen_bytes: of `missed_bytes`, those that are offered to the link when the router of the
            layer before has chosen; others are offered among them in vain.
        host_s: from when the router has chosen until what the host computes is there, which then is
            waited for with the copies; 0: it computes nothing.
        behind_bytes: of experts, that are copied behind all others, and waited for by nobody.
        ahead: `missed_bytes` are copied once the router of the layer before has chosen.
        in_turn: copied experts are computed each as it comes; else all once the last is there.
    """

    kernel_s: float
    home_bytes: int | None = None
    read_bytes: int = 0
    kv_bytes: int = 0
    kv_kernel_s: float = 0.0
    back_bytes: int = 0
    device: int = 0
    missed_bytes: int = 0
    experts_s: float = 0.0
    missed_s: float = 0.0
    misses: tuple[float, ...] = ()
    foreseen_bytes: int = 0
    host_s: float = 0.0
    behind_bytes: int = 0
    ahead: bool = False
    in_turn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedPass:
    """A pass, and the devices it runs on.

    Attributes:
        layers: in order.
        slots: device buffers for streamed layers, on each device.
        kv_slots: device buffers for KV blocks, on each device.
        kv_block_bytes: of such a block.
        home_bytes_per_s: of each device's link, for weights.
        kv_bytes_per_s: for KV blocks, the same direction of the same links; of each, or of all.
        back_bytes_per_s: the other direction, likewise.
        home_delay_s: from when a layer's last byte has crossed until the copy is whole.
        hop_s: until the hidden state is on another device.
        end_s: what the first device computes after the layers: the head.
        draft_s: what it computes then for the next draft.
        draft_passes: in so many passes.
        piece_s: that a piece of a copy crosses the link in. What a pass uploads waits for the piece
            that is crossing; 0: it does not wait.
        files_bytes_per_s: of a disk, for layers that are read ahead: of each device's own, or of
            the one for all together.
        ahead_bytes: host memory for what is read ahead, for all devices together.
        own_disks: each device reads from a disk of its own; else all from one.
    """

    layers: Sequence[TimedLayer]
    slots: int
    kv_slots: int = 0
    kv_block_bytes: int = 0
    home_bytes_per_s: Sequence[float] = (1.0,)
    kv_bytes_per_s: Sequence[float] | float = 1.0
    back_bytes_per_s: Sequence[float] | float = 1.0
    home_delay_s: float = 0.0
    hop_s: float = 0.0
    end_s: float = 0.0
    draft_s: float = 0.0
    draft_passes: int = 0
    piece_s: float = 0.0
    files_bytes_per_s: Sequence[float] = ()
    ahead_bytes: int = 0
    own_disks: bool = False


@dataclass(frozen=True, slots=True)
class SteadyPass:
    """A pass in the steady state.

    Attributes:
        pass_s: its length, drafting included.
        transfer_s: busy time of the busiest link in it.
        draft_wait_s: that uploads of the drafter's passes wait.
    """

    pass_s: float
    transfer_s: float
    draft_wait_s: float = 0.0


class SpanKind(StrEnum):
    """What a stream is busy with."""

    WEIGHTS = "weights"
    KV = "KV"
    KV_BACK = "KV back"
    ATTENTION = "attention"
    LAYER = "layer"
    END = "end"
    DRAFTING = "drafting"


@dataclass(frozen=True, slots=True)
class Span:
    """A stream is busy with a layer; what comes after the layers has no number."""

    kind: SpanKind
    device: int
    layer: int
    start_s: float
    end_s: float
    nbytes: int = 0


@lru_cache(maxsize=256)  # the same of most layers, in each pass
def _mean(chances: tuple[float, ...]) -> float:
    """Of a number, by how likely 0, 1, ... are."""
    return sum(count * chance for count, chance in enumerate(chances))


@lru_cache(maxsize=256)
def _tails(chances: tuple[float, ...]) -> tuple[list[float], list[float]]:
    """For each number: how likely so many or more are, and the part of the mean that these are."""
    weighed = [count * chance for count, chance in enumerate(chances)]
    each, means = ([*accumulate(reversed(c), initial=0.0)] for c in (chances, weighed))
    return each[::-1], means[::-1]


def steady_pass(work: TimedPass) -> SteadyPass:
    """Run passes until one repeats the one before, and measure it."""
    devices = [_Device(work, device) for device in range(len(work.home_bytes_per_s))]
    starts, steady = _run_passes(work, devices)
    timed = 1 if steady else _TIMED_PASSES
    links_s = [_link_s(work, device) for device in range(len(devices))]
    pass_s = (starts[-1] - starts[-1 - timed]) / timed
    waits_s = sum(devices[0].draft_waits_s[-timed:]) / timed
    # A link that is a little behind may lose its lead over more passes than were run.
    return SteadyPass(max(pass_s, *links_s), max(links_s), waits_s)


def steady_spans(work: TimedPass) -> list[Span]:
    """What the streams do in the last of these passes, from its begin on.

    What reaches over an end of the pass is cut there: as passes repeat each other, the rest of it
    is at the other end.
    """
    devices = [_Device(work, device) for device in range(len(work.home_bytes_per_s))]
    for device in devices:
        device.watch()
    starts, _ = _run_passes(work, devices)
    begin_s, end_s = starts[-2:]
    cut = []
    for span in (span for device in devices for span in device.spans):
        start_s, stop_s = max(span.start_s, begin_s), min(span.end_s, end_s)
        if stop_s > start_s:
            cut.append(replace(span, start_s=start_s - begin_s, end_s=stop_s - begin_s))
    return sorted(cut, key=lambda span: (span.start_s, span.end_s))


def _run_passes(work: TimedPass, devices: Sequence["_Device"]) -> tuple[list[float], bool]:
    """Run passes until one repeats the one before; returns when each began, and whether one did."""
    starts, last, steady = [0.0], list[float](), False
    while len(starts) <= _MOST_PASSES and not steady:
        trace = [time_s - starts[-1] for time_s in _run_pass(work, devices)]
        starts.append(devices[0].compute.time_s)
        steady = _repeats(last, trace, starts[-1] - starts[-2])
        last = trace
    return starts, steady


def _repeats(last: Sequence[float], trace: Sequence[float], length_s: float) -> bool:
    """Whether every stream is where it was a pass ago, at every layer.

    Then all that follows repeats, since it depends on nothing else.
    """
    pairs = zip(last, trace, strict=False)
    return bool(last) and all(abs(a - b) <= _SAME * length_s for a, b in pairs)


def _link_s(work: TimedPass, device: int) -> float:
    rate = work.home_bytes_per_s[device]
    mine = [layer for layer in work.layers if layer.device == device]
    missed = sum(layer.missed_bytes + layer.behind_bytes for layer in mine)
    weights_s = (sum(layer.home_bytes or 0 for layer in mine) + missed) / rate
    kv_s = sum(layer.kv_bytes for layer in mine) / _of(work.kv_bytes_per_s, device)
    return max(weights_s + kv_s, _files_s(work, device))


def _files_s(work: TimedPass, device: int) -> float:
    """What a device's disk takes for the layers that are read ahead, of all who share it."""
    mine = (layer for layer in work.layers if not work.own_disks or layer.device == device)
    read_bytes = sum(layer.read_bytes for layer in mine)
    disk = device if work.own_disks else 0
    return read_bytes / work.files_bytes_per_s[disk] if read_bytes else 0.0


def _of(rates: Sequence[float] | float, device: int) -> float:
    return rates if isinstance(rates, float) else rates[device]


def _run_pass(work: TimedPass, devices: Sequence["_Device"]) -> list[float]:
    """Enqueue a pass; returns where every stream was after every layer of its device."""
    trace: list[float] = []
    here = devices[0]
    here.upload(work.piece_s)
    for index, layer in enumerate(work.layers):
        here = _hop(here, devices[layer.device], work.hop_s)
        here.run_layer(index, layer)
        trace += here.times()
    for device in devices:
        device.end_pass()
    _hop(here, devices[0], work.hop_s)
    devices[0].run_end(work)
    for device in devices:
        trace += device.times()
    return trace


def _hop(source: "_Device", target: "_Device", hop_s: float) -> "_Device":
    if source is not target:
        target.compute.wait(source.compute.record())
        target.compute.kernel(reads=[], writes=[], seconds=hop_s)
    return target


@dataclass(slots=True)
class _Rows:
    """A layer's new rows on the device, and the event behind the write that reads them."""

    memory: SimBuffer
    sent: SimEvent | None = None


class _Device:
    """One device's streams, rings and homes.

    Weights and KV have a copy stream each and share the link; rows go home in a stream of their
    own, over the link's other direction (`kv/offloaded.py`).
    """

    def __init__(self, work: TimedPass, device: int) -> None:
        mine = {i: layer for i, layer in enumerate(work.layers) if layer.device == device}
        home = {i: SimBuffer(n) for i, layer in mine.items() if (n := layer.home_bytes) is not None}
        missed = {
            i: SimBuffer(layer.missed_bytes) for i, layer in mine.items() if layer.missed_bytes
        }
        moves_kv = any(layer.kv_bytes or layer.back_bytes for layer in mine.values())
        # A stream that nobody uses would stay behind: it would seem that no pass repeats another.
        copies = bool(home or missed)
        shared = copies and moves_kv
        self._link = link = SimLink() if shared or work.piece_s else None
        self.spans: list[Span] = []
        self._chosen: SimEvent | None = None  # the layer before knew its experts
        self.draft_waits_s: list[float] = []  # of each pass
        self._watched, self._device, self._home = False, device, home
        self._missed = missed
        self._slots = {index: SimBuffer(source.nbytes) for index, source in missed.items()}
        self.compute = SimStream(f"compute {device}")
        rate, delay_s = work.home_bytes_per_s[device], work.home_delay_s
        self._copy = copy = SimStream(f"copy {device}", rate, link=link, delay_s=delay_s)
        self._kv_copy = SimStream(f"KV {device}", _of(work.kv_bytes_per_s, device), link=link)
        self._back = SimStream(
            f"KV back {device}", back_bytes_per_s=_of(work.back_bytes_per_s, device)
        )
        self._streams = [self.compute, *([copy] if copies else []), *[self._kv_copy] * moves_kv]
        self._streams += [self._back] * any(layer.back_bytes for layer in mine.values())
        self._ahead = _ahead_of(work, mine, home, copy, device)
        self._streams += [self._ahead.disk] if self._ahead else []
        self._weights = _layer_ring(work, home, self._ahead or copy, self.compute) if home else None
        self._kv_order, self._kv = _block_ring(work, mine, self._kv_copy, self.compute)
        self._blocks: dict[int, list[_Block]] = {index: [] for index in mine}
        for block in self._kv_order.home:
            self._blocks[block[0]].append(block)
        self._rows = {
            i: _Rows(SimBuffer(layer.back_bytes)) for i, layer in mine.items() if layer.back_bytes
        }

    def times(self) -> list[float]:
        """Where the streams in use are."""
        return [stream.time_s for stream in self._streams]

    def watch(self) -> None:
        """Keep in `spans` what the streams do from now on."""
        weights, home = [*self._home.items(), *self._missed.items()], self._kv_order.home
        what = {id(source): (SpanKind.WEIGHTS, layer) for layer, source in weights}
        what |= {id(source): (SpanKind.KV, layer) for (layer, *_), source in home.items()}
        what |= {id(rows.memory): (SpanKind.KV_BACK, i) for i, rows in self._rows.items()}

        def keep(source: SimBuffer, start_s: float, end_s: float) -> None:
            nbytes = source.nbytes
            if self._ahead is not None and id(source) not in what:  # a buffer of what is ahead
                source = self._ahead.now
            kind, layer = what[id(source)]
            self.spans.append(Span(kind, self._device, layer, start_s, end_s, nbytes))

        self._copy.watch = self._kv_copy.watch = self._back.watch = keep
        self._watched = True

    def upload(self, piece_s: float) -> None:
        """Enqueue what goes up before a pass: it waits for the piece that crosses the link."""
        if self._link is not None and piece_s:
            self.compute.wait(SimEvent({}, self._link.let_in(self.compute.time_s, piece_s)))

    def run_end(self, work: TimedPass) -> None:
        """Enqueue what follows the layers: the head, then the passes of a drafter."""
        self._compute(SpanKind.END, -1, work.end_s)
        waited_s, passes = self.compute.stalled_s(), max(1, work.draft_passes)
        for _ in range(passes if work.draft_s else 0):
            if work.draft_passes:
                self.upload(work.piece_s)
            self._compute(SpanKind.DRAFTING, -1, work.draft_s / passes)
        self.draft_waits_s.append(self.compute.stalled_s() - waited_s)

    def _compute(
        self,
        kind: SpanKind,
        layer: int,
        seconds: float,
        reads: Sequence[SimBuffer] = (),
        writes: Sequence[SimBuffer] = (),
    ) -> None:
        start_s = self.compute.time_s
        self.compute.kernel(reads=reads, writes=writes, seconds=seconds)
        if self._watched:
            self.spans.append(Span(kind, self._device, layer, start_s, self.compute.time_s))

    def run_layer(self, index: int, layer: TimedLayer) -> None:
        """Enqueue a layer: attention to blocks as they come in, then the rest of its kernels."""
        rows = self._rows.get(index)
        if rows is not None and rows.sent is not None:
            self.compute.wait(rows.sent)
        with self._lent(index, layer) as weights:
            blocks = self._blocks[index]
            for block in blocks:
                with self._kv.lend(block) as buffer:
                    seconds = layer.kv_kernel_s / len(blocks)
                    self._compute(SpanKind.ATTENTION, index, seconds, reads=[buffer])
            written = [rows.memory] if rows is not None else []
            kernel_s = layer.kernel_s - layer.experts_s
            self._compute(SpanKind.LAYER, index, kernel_s, weights, written)
            if index in self._missed or layer.host_s:
                self._run_experts(index, layer, weights)
            elif layer.experts_s:
                self._compute(SpanKind.LAYER, index, layer.experts_s, weights)

    def _run_experts(self, index: int, layer: TimedLayer, weights: Sequence[SimBuffer]) -> None:
        """Enqueue experts that are there while others cross the link, or the host computes them."""
        chosen = self.compute.record()
        there = SimEvent({}, self.compute.time_s + layer.host_s)
        missed = self._missed.get(index)
        if missed is not None:
            missed.nbytes = layer.missed_bytes - self._brought(layer)
            self._copy.wait(self._chosen if layer.ahead and self._chosen else chosen)
            self._chosen = chosen
            start_s = self._copy.time_s
            self._copy.copy(self._slots[index], missed)
            done = self._copy.record()
            if layer.misses:
                done = SimEvent(done.clock, self._until_s(layer, start_s, done.time_s))
        self._compute(SpanKind.LAYER, index, layer.experts_s - layer.missed_s, weights)
        self.compute.wait(there)
        if missed is not None:
            self.compute.wait(done)
            self._compute(SpanKind.LAYER, index, layer.missed_s, [self._slots[index]])

    def _until_s(self, layer: TimedLayer, start_s: float, end_s: float) -> float:
        """Until missed experts are waited for, on average: of many some are, of none nothing is.

        Args:
            layer: has chosen now.
            start_s: when their copies begin.
            end_s: when they end, if it misses as many as on average.
        """
        most, here_s = len(layer.misses) - 1, self.compute.time_s
        each_s = (self._copy.time_s - start_s) / _mean(layer.misses)
        expert_s, delay_s = layer.experts_s / most, end_s - self._copy.time_s
        came_s = start_s + delay_s - here_s
        # What is waited for grows with the number of misses, by so much with each of them.
        none_s, more_s = came_s - most * expert_s, each_s + expert_s
        if layer.in_turn:  # all are since the first is there, the last once it is there itself
            more_s = max(each_s, expert_s)
            none_s += expert_s if each_s >= expert_s else each_s
        fewest = max(1, floor(-none_s / more_s) + 1)  # that any time is waited for
        chances, misses = _tails(layer.misses)
        at = min(fewest, most + 1)
        mean_s = none_s * chances[at] + more_s * misses[at]
        return here_s + layer.experts_s - layer.missed_s + mean_s

    def _brought(self, layer: TimedLayer) -> int:
        """Of what a layer's router chose, that has crossed since the one before it chose.

        What is offered crosses while nothing that was asked for does, right and wrong in turn.
        """
        if self._chosen is None or not layer.foreseen_bytes:
            return 0
        idle_s = self.compute.time_s - max(self._chosen.time_s, self._copy.time_s)
        crossed = max(0.0, idle_s) * self._copy.bytes_per_s / (1.0 + IN_VAIN)
        return min(layer.foreseen_bytes, int(crossed))

    def end_pass(self) -> None:
        """Send new rows home; what the first layer will ask for is not foreseen."""
        self._chosen = None
        for index, rows in self._rows.items():
            self._back.wait(self.compute.record())
            self._back.store(SimBuffer(0), rows.memory)  # they go behind those that are read
            rows.sent = self._back.record()
            if blocks := self._blocks[index]:
                self._kv_order.events[blocks[-1]] = rows.sent
        self._kv.refresh()

    @contextmanager
    def _lent(self, index: int, layer: TimedLayer) -> Iterator[list[SimBuffer]]:
        if layer.home_bytes is None:
            yield []
            return
        assert self._weights is not None
        with self._weights.lend(index) as buffer:
            yield [buffer]


class _Ahead:
    """A copy stream that has some layers from files, by way of host memory (`streaming/ahead.py`).

    Host memory is a ring itself: a disk fills it, and the copy stream reads it.

    Attributes:
        disk: the stream of reads.
        now: the layer that was copied last.
    """

    def __init__(
        self, copy: SimStream, disk: SimStream, layers: Sequence[SimBuffer], buffers: int
    ) -> None:
        self._copy, self.disk = copy, disk
        parts = {
            (id(layer), part): SimBuffer(layer.nbytes // _AHEAD_PARTS)
            for layer in layers
            for part in range(_AHEAD_PARTS)
        }
        self._layers = {id(layer) for layer in layers}
        self.now = layers[0]
        each = max(part.nbytes for part in parts.values())
        memory = [SimBuffer(each) for _ in range(max(1, buffers // max(1, each)))]
        self._ring: _Ring[tuple[int, int]] = Ring(Cycle(parts), memory, disk, copy, strict=True)
        self._ring.restart()

    def copy(self, dst: SimBuffer, src: SimBuffer) -> None:
        """Enqueue a copy of a layer."""
        self.now = src
        if id(src) not in self._layers:
            self._copy.copy(dst, src)
            return
        for part in range(_AHEAD_PARTS):
            with self._ring.lend((id(src), part)) as buffer:
                self._copy.copy(dst, buffer)

    def record(self) -> SimEvent:
        """An event behind all copies so far."""
        return self._copy.record()

    def wait(self, event: Event) -> None:
        """Order later copies after `event`."""
        self._copy.wait(event)

    def statistics(self) -> CopyStatistics:
        """What has been copied so far, in virtual time."""
        return self._copy.statistics()


def _ahead_of(
    work: TimedPass,
    mine: Mapping[int, TimedLayer],
    home: Mapping[int, SimBuffer],
    copy: SimStream,
    device: int,
) -> _Ahead | None:
    """The layers of a device that are read ahead; of the disk it has the part it needs."""
    layers = [buffer for i, buffer in home.items() if mine[i].read_bytes]
    if not layers:
        return None
    # Bytes of images a second: what is in the file may be fewer.
    rate = sum(layer.nbytes for layer in layers) / _files_s(work, device)
    share = sum(mine[i].read_bytes for i in home) / sum(one.read_bytes for one in work.layers)
    return _Ahead(copy, SimStream(f"files {device}", rate), layers, int(work.ahead_bytes * share))


def _layer_ring(
    work: TimedPass,
    home: Mapping[int, SimBuffer],
    copy: SimStream | _Ahead,
    compute: SimStream,
) -> _Ring[int]:
    slot_bytes = max(buffer.nbytes for buffer in home.values())
    slots = [SimBuffer(slot_bytes) for _ in range(work.slots)]
    ring = Ring(Cycle(home), slots, copy, compute, strict=True)
    ring.restart()
    return ring


class _WrittenBlocks(Cycle[_Block, SimBuffer]):
    """Blocks, the last of a layer with the rows that are written each pass."""

    def __init__(self, home: Mapping[_Block, SimBuffer]) -> None:
        super().__init__(home)
        self.home = home
        self.events: dict[_Block, SimEvent] = {}

    def written(self, unit: _Block) -> SimEvent | None:
        """The event behind the last write to a block."""
        return self.events.get(unit)


def _block_ring(
    work: TimedPass, mine: Mapping[int, TimedLayer], copy: SimStream, compute: SimStream
) -> tuple[_WrittenBlocks, _Ring[_Block]]:
    """The blocks of a device's layers at the home, and the ring they come through."""
    block_bytes, slots = _coarse(work)
    home = {
        (index, start // block_bytes): SimBuffer(min(block_bytes, layer.kv_bytes - start))
        for index, layer in mine.items()
        if layer.kv_bytes
        for start in range(0, layer.kv_bytes, block_bytes)
    }
    order = _WrittenBlocks(home)
    return order, Ring(order, [SimBuffer(block_bytes) for _ in range(slots)], copy, compute)


def _coarse(work: TimedPass) -> tuple[int, int]:
    """Size of a block and number of slots to replay with."""
    counts = [-(-layer.kv_bytes // work.kv_block_bytes) for layer in work.layers if layer.kv_bytes]
    factor = -(-sum(counts) // max(_MOST_BLOCKS, len(counts)))
    if factor <= 1:
        return work.kv_block_bytes, work.kv_slots
    return factor * work.kv_block_bytes, min(
        work.kv_slots, max(_MIN_SLOTS, work.kv_slots // factor)
    )
