"""Feed blocks of keys and values to the compute stream, as many ahead as there are slots."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from offload_rt.device.base import CopyStream, Event, Stream

BufferT = TypeVar("BufferT")
SourceT = TypeVar("SourceT")
SourceOutT = TypeVar("SourceOutT", covariant=True)


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of one layer; two are equal only if they hold as many rows."""

    layer: int
    index: int
    rows: int


class BlockOrder(Protocol[SourceOutT]):
    """What comes after what; it grows with the sequence, so it is asked anew for each block."""

    def first(self) -> Block | None:
        """The block a pass needs first, or None while there is none."""

    def after(self, block: Block) -> Block | None:
        """The block needed after this one, in this pass or the next."""

    def source(self, block: Block) -> SourceOutT:
        """The bytes of a block at the home."""

    def written(self, block: Block) -> Event | None:
        """The event behind the last write to a block, if one may still be under way."""


@dataclass(slots=True)
class Slot(Generic[BufferT]):
    """One device buffer, large enough for any block.

    Attributes:
        block: what it holds or is being filled with; None before its first use.
        filled: copy stream: the copy into `buffer` is done.
        drained: compute stream: the last kernel reading `buffer` is done.
    """

    buffer: BufferT
    block: Block | None = None
    filled: Event | None = None
    drained: Event | None = None


class BlockPipeline(Generic[BufferT, SourceT]):
    """Streams KV blocks from home to device, cyclically, ahead of use.

    It is `LayerPipeline` with an order that grows: which block comes next is asked when a slot is
    refilled, not fixed at the start. The same two waits keep it safe and are enough for the same
    reason: a slot has one writer, the copy stream, in order, and its readers are all enqueued
    between `filled` and `drained`. A third wait orders a copy after the write of the rows it reads,
    since homes, unlike weights, change: `written`.

    What was fetched ahead may turn out not to be what comes next: rows were added to a block or
    forgotten, a window moved, a pass broke off. A slot names its block with its number of rows, and
    asking for any other begins anew from there. Beginning anew first orders the copy stream after
    every reader and after the copies it had enqueued itself, so that no buffer has two writers.

    Args:
        order: which block comes when, and where its bytes are.
        slots: the ring; kept for the whole run.
        copy: the stream that fills slots.
        compute: the stream that reads them.
    """

    def __init__(
        self,
        order: BlockOrder[SourceT],
        slots: Sequence[BufferT],
        copy: CopyStream[BufferT, SourceT],
        compute: Stream,
    ) -> None:
        self._order, self._copy, self._compute = order, copy, compute
        self._ring = deque(Slot(buffer) for buffer in slots)

    @contextmanager
    def lend(self, block: Block) -> Iterator[BufferT]:
        """Lend the device copy of a block; on exit its slot is refilled with a later one."""
        if self._ring[0].block != block:
            self._begin(block)
        slot = self._ring[0]
        assert slot.filled is not None  # _fill sets it
        self._compute.wait(slot.filled)
        yield slot.buffer
        slot.drained = self._compute.record()
        last = self._ring[-1].block
        self._fill(slot, last and self._order.after(last))
        self._ring.rotate(-1)

    @contextmanager
    def fetch(self, block: Block) -> Iterator[BufferT]:
        """Lend a block out of turn; nothing is fetched ahead until `refresh` or the next `lend`."""
        self._begin(None)
        slot = self._ring[0]
        self._fill(slot, block)
        assert slot.filled is not None  # _fill sets it
        self._compute.wait(slot.filled)
        yield slot.buffer
        slot.drained = self._compute.record()
        slot.block = None

    def refresh(self) -> None:
        """Between passes: see that what was fetched ahead is what the next pass needs."""
        expected = first = self._order.first()
        for slot in self._ring:
            if slot.block != expected:
                self._begin(first)
                return
            expected = expected and self._order.after(expected)

    def _begin(self, block: Block | None) -> None:
        self._copy.wait(self._compute.record())
        for slot in self._ring:
            if slot.filled is not None:
                self._copy.wait(slot.filled)
        for slot in self._ring:
            self._fill(slot, block)
            block = block and self._order.after(block)

    def _fill(self, slot: Slot[BufferT], block: Block | None) -> None:
        slot.block = block
        if block is None:
            return
        if slot.drained is not None:
            self._copy.wait(slot.drained)
        if (written := self._order.written(block)) is not None:
            self._copy.wait(written)
        self._copy.copy(slot.buffer, self._order.source(block))
        slot.filled = self._copy.record()
