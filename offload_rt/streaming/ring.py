"""Feed units (layers, blocks of KV) to the compute stream, as many ahead as there are slots."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from offload_rt.device.base import CopyStream, Event, Stream
from offload_rt.errors import StreamOrderError

UnitT = TypeVar("UnitT", bound=Hashable)
BufferT = TypeVar("BufferT")
SourceT = TypeVar("SourceT")
SourceOutT = TypeVar("SourceOutT", covariant=True)
# Called with `copy` or `wait`, the unit and the stream before either is enqueued; what it returns
# is called behind it.
RingWatch = Callable[[str, object, Stream], Callable[[], None]]


class Order(Protocol[UnitT, SourceOutT]):
    """Which unit comes when; it may change, so it is asked anew for each unit."""

    def first(self) -> UnitT | None:
        """The unit a pass needs first, or None while there is none."""

    def after(self, unit: UnitT) -> UnitT | None:
        """The unit needed after this one, in this pass or the next."""

    def source(self, unit: UnitT) -> SourceOutT:
        """The bytes of a unit at its home."""

    def written(self, unit: UnitT) -> Event | None:
        """The event behind the last write to a unit's home, if one may still be under way."""


class Cycle(Generic[UnitT, SourceT]):
    """An order that never changes: every pass needs all units, one after the other.

    Args:
        home: the bytes of each unit, in the order a pass needs them.
    """

    def __init__(self, home: Mapping[UnitT, SourceT]) -> None:
        units = list(home)
        self._home, self._first = home, units[0] if units else None
        self._after = dict(zip(units, [*units[1:], *units[:1]], strict=True))

    def first(self) -> UnitT | None:
        """The unit a pass needs first."""
        return self._first

    def after(self, unit: UnitT) -> UnitT:
        """The next unit; after the last one the first."""
        return self._after[unit]

    def source(self, unit: UnitT) -> SourceT:
        """The bytes of a unit at its home."""
        return self._home[unit]

    def written(self, unit: UnitT) -> Event | None:
        """None: a home changes only by the stream that copies from it, if at all."""
        return None


@dataclass(slots=True)
class Slot(Generic[UnitT, BufferT]):
    """One device buffer, large enough for any unit.

    Attributes:
        unit: what it holds or is being filled with; None if nothing.
        filled: copy stream: the copy into `buffer` is done.
        drained: compute stream: the last kernel reading `buffer` is done.
    """

    buffer: BufferT
    unit: UnitT | None = None
    filled: Event | None = None
    drained: Event | None = None


class Ring(Generic[UnitT, BufferT, SourceT]):
    """Streams units from home to device, ahead of use and across passes.

    A slot is refilled as soon as it is drained, with what the order says comes after the last unit
    that was asked of the copy stream. So the copy engine runs up to n units ahead: while a drafter
    works or a token is sampled, the first units of the next pass are already coming in. Two event
    waits keep it safe: compute waits `filled` before reading a slot, copy waits `drained` before
    overwriting it. They are enough: a slot has one writer (the copy stream, in order) and its
    readers are all enqueued between the two events. A third wait orders a copy after the write of
    the bytes it reads, where homes, unlike those of weights, change: `Order.written`.

    What was fetched ahead may turn out not to be what comes next: rows were added to a block or
    forgotten, a window moved, a pass broke off. `refresh` fetches what differs again. Asking for
    any other unit begins anew from there, and so does `restart`. Filling a slot anew first orders
    the copy stream after every reader and after the copy it had enqueued into that slot itself, so
    that no buffer has two writers.

    Args:
        order: which unit comes when, and where its bytes are.
        slots: the buffers; kept for the whole run.
        copy: the stream that fills slots.
        compute: the stream that reads them.
        strict: asking for a unit out of turn is an error.
    """

    def __init__(
        self,
        order: Order[UnitT, SourceT],
        slots: Iterable[BufferT],
        copy: CopyStream[BufferT, SourceT],
        compute: Stream,
        *,
        strict: bool = False,
    ) -> None:
        self._order, self._copy, self._compute, self._strict = order, copy, compute, strict
        self._slots = deque(Slot[UnitT, BufferT](buffer) for buffer in slots)
        self.watch: RingWatch | None = None

    @contextmanager
    def lend(self, unit: UnitT) -> Iterator[BufferT]:
        """Lend the device copy of a unit; on exit its slot is refilled with a later one.

        If the work on the unit fails, the slot keeps it, and asking again for it is fine.

        Raises:
            StreamOrderError: the ring is strict and `unit` is not the next one.
        """
        expected = self._slots[0].unit
        if expected != unit:
            if self._strict:
                raise StreamOrderError(f"asked for {unit}, next in order is {expected}")
            self._begin(unit)
        slot = self._slots[0]
        yield self._await(slot)
        slot.drained = self._compute.record()
        self._fill(slot, self._following(self._slots[-1].unit))
        self._slots.rotate(-1)

    @contextmanager
    def fetch(self, unit: UnitT) -> Iterator[BufferT]:
        """Lend a unit out of turn; nothing is fetched ahead until `refresh` or the next `lend`."""
        self._begin(None)
        slot = self._slots[0]
        self._fill(slot, unit)
        yield self._await(slot)
        slot.drained = self._compute.record()
        slot.unit = None

    def refresh(self) -> None:
        """Between passes: fetch anew what was fetched ahead and is not what is needed next."""
        unit, others = self._order.first(), []
        for slot in self._slots:
            if slot.unit != unit:
                others.append((slot, unit))
            unit = self._following(unit)
        if others:
            self._refill(others)

    def restart(self) -> None:
        """Begin with the first unit of the order: at the start, or after a pass that broke off."""
        self._begin(self._order.first())

    def _await(self, slot: Slot[UnitT, BufferT]) -> BufferT:
        """Have kernels wait until a slot is filled."""
        assert slot.filled is not None and slot.unit is not None  # _fill sets it
        end = None if self.watch is None else self.watch("wait", slot.unit, self._compute)
        self._compute.wait(slot.filled)
        if end is not None:
            end()
        return slot.buffer

    def _begin(self, unit: UnitT | None) -> None:
        units = []
        for slot in self._slots:
            units.append((slot, unit))
            unit = self._following(unit)
        self._refill(units)

    def _refill(self, units: Sequence[tuple[Slot[UnitT, BufferT], UnitT | None]]) -> None:
        """Fill slots anew, after every reader and after what was on its way into them."""
        self._copy.wait(self._compute.record())
        for slot, _ in units:
            if slot.filled is not None:
                self._copy.wait(slot.filled)
        for slot, unit in units:
            self._fill(slot, unit)

    def _following(self, unit: UnitT | None) -> UnitT | None:
        return None if unit is None else self._order.after(unit)

    def _fill(self, slot: Slot[UnitT, BufferT], unit: UnitT | None) -> None:
        slot.unit = unit
        if unit is None:
            return
        if slot.drained is not None:
            self._copy.wait(slot.drained)
        if (written := self._order.written(unit)) is not None:
            self._copy.wait(written)
        end = None if self.watch is None else self.watch("copy", unit, self._copy)
        self._copy.copy(slot.buffer, self._order.source(unit))
        slot.filled = self._copy.record()
        if end is not None:
            end()
