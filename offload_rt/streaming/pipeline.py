"""Feed streamed layers to the compute stream, as many layers ahead as there are slots."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Generic, TypeVar

from offload_rt.device.base import CopyStream, Event, Stream
from offload_rt.errors import StreamOrderError

BufferT = TypeVar("BufferT")
SourceT = TypeVar("SourceT")


@dataclass(slots=True)
class Slot(Generic[BufferT]):
    """One device buffer, large enough for any streamed layer.

    Attributes:
        filled: copy stream: the copy into `buffer` is done.
        drained: compute stream: the last kernel reading `buffer` is done.
    """

    buffer: BufferT
    layer: int = -1
    filled: Event | None = None
    drained: Event | None = None


class LayerPipeline(Generic[BufferT, SourceT]):
    """Streams layer weights from home to device in a fixed cyclic order.

    Layer k of the order goes to slot k mod n. A slot is refilled as soon as it is drained, so the
    copy engine runs up to n layers ahead and across passes: while a drafter works or a token is
    sampled, the first layers of the next pass are already coming in. Two event waits keep it safe:
    compute waits `filled` before reading a slot, copy waits `drained` before overwriting it. They
    are enough: a slot has one writer (the copy stream, in order) and its readers are all enqueued
    between the two events.

    Args:
        order: the streamed layers, in the order a pass needs them.
        home: the bytes of each of them.
        slots: the ring; kept for the whole run.
        copy: the stream that fills slots.
        compute: the stream that reads them.
    """

    def __init__(
        self,
        order: Sequence[int],
        home: Mapping[int, SourceT],
        slots: Sequence[BufferT],
        copy: CopyStream[BufferT, SourceT],
        compute: Stream,
    ) -> None:
        self._home, self._copy, self._compute = home, copy, compute
        self._order = tuple(order)
        self._ring = deque(Slot(buffer) for buffer in slots)
        self.restart()

    @contextmanager
    def weights(self, layer: int) -> Iterator[BufferT]:
        """Lend the device copy of `layer`; on exit its slot is refilled with a later layer.

        If the work on the layer fails, the slot keeps the layer, and asking again for it is fine.

        Raises:
            StreamOrderError: `layer` is not the next one in the order.
        """
        slot = self._ring[0]
        if slot.layer != layer:
            raise StreamOrderError(f"asked for layer {layer}, next in order is {slot.layer}")
        assert slot.filled is not None  # _fill sets it
        self._compute.wait(slot.filled)
        yield slot.buffer
        slot.drained = self._compute.record()
        self._fill(slot)
        self._ring.rotate(-1)

    def restart(self) -> None:
        """Begin again with the first layer of the order, after a pass that was not finished."""
        self._copy.record().synchronize()
        # Kernels of the unfinished pass may still read a slot.
        self._copy.wait(self._compute.record())
        self._next_layer = cycle(self._order)
        for slot in self._ring:
            self._fill(slot)

    def _fill(self, slot: Slot[BufferT]) -> None:
        if slot.drained is not None:
            self._copy.wait(slot.drained)
        slot.layer = next(self._next_layer)
        self._copy.copy(slot.buffer, self._home[slot.layer])
        slot.filled = self._copy.record()
