"""Layers that stay in their files, read into host memory before their turn comes.

Where host memory has room for most of the streamed layers and not for all, the others come from
their files. Copies to a device are made in the order of the layers. A disk that is asked for a
layer when its turn comes idles while layers in memory are copied, and the link idles meanwhile. So
threads read on, in the order in which passes need these layers, as far as there are buffers.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from offload_rt.device.base import STAGING_BYTES, CopyBlock, CopyPiece, DeviceBuffer, HomeSource
from offload_rt.device.host_memory import HostBuffer
from offload_rt.errors import DeviceError


@dataclass(slots=True, eq=False)
class _Reading:
    """A layer that is read once, for one copy of it.

    Attributes:
        unit: the layer.
        pieces: of it, in order.
        begun: pieces whose reading has begun.
        ready: those that are there, or why they are not, until somebody took them.
        asked: a copy takes it; else it is read because it should come next.
        dropped: it did not come next.
    """

    unit: int
    pieces: Sequence[CopyPiece]
    begun: int = 0
    ready: dict[int, "tuple[torch.Tensor, HostBuffer] | BaseException"] = field(
        default_factory=dict
    )
    asked: bool = False
    dropped: bool = False


class ReadAhead:
    """Reads layers in a cycle, at most as far ahead as there are buffers.

    What was read ahead and is not what is asked for next (a pass broke off and begins anew) is
    dropped. Buffers are taken in the order in which pieces are read, so the piece that is waited
    for has one, whatever the number of buffers.

    Args:
        sources: the layers in their files, in the order in which passes need them.
        memory: host memory, cut into buffers of a piece each.
        readers: pieces that are read at once.
    """

    def __init__(self, sources: Mapping[int, HomeSource], memory: HostBuffer, readers: int) -> None:
        units = list(sources)
        self._sources = sources
        self._after = dict(zip(units, [*units[1:], *units[:1]], strict=True))
        self._free = [
            HostBuffer(memory.tensor[at : at + STAGING_BYTES], memory.view[at : at + STAGING_BYTES])
            for at in range(0, memory.nbytes - STAGING_BYTES + 1, STAGING_BYTES)
        ]
        self._readings: deque[_Reading] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._append(units[0])
        self._threads = [
            threading.Thread(target=self._work, name=f"ahead-{i}", daemon=True)
            for i in range(readers)
        ]
        for thread in self._threads:
            thread.start()

    def source(self, unit: int) -> "AheadSource":
        """The bytes of a layer, from here."""
        return AheadSource(self, unit, self._sources[unit])

    def ask(self, unit: int) -> _Reading:
        """The next copy is of this layer."""
        with self._changed:
            coming = next((each for each in self._readings if not each.asked), None)
            if coming is None or coming.unit != unit:
                self._drop()
                coming = self._append(unit)
            coming.asked = True
            self._changed.notify_all()
        return coming

    def take(self, reading: _Reading, number: int) -> tuple[torch.Tensor, HostBuffer]:
        """Wait for a piece of a layer that was asked for; `give_back` its buffer.

        Raises:
            DeviceError: all was closed meanwhile.
            CheckpointError: it could not be read.
        """
        with self._changed:
            self._changed.wait_for(lambda: number in reading.ready or self._closed)
            if number not in reading.ready:
                raise DeviceError("the device was closed while a copy was waiting")
            found = reading.ready.pop(number)
            if reading.begun == len(reading.pieces) and not reading.ready:
                self._forget(reading)
        if isinstance(found, BaseException):
            raise found
        return found

    def give_back(self, buffer: HostBuffer) -> None:
        """What was in a buffer has been copied."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads; who waits for a piece is told."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _append(self, unit: int) -> _Reading:
        reading, self._last = _Reading(unit, self._sources[unit].pieces()), unit
        self._readings.append(reading)
        return reading

    def _forget(self, reading: _Reading) -> None:
        if reading in self._readings:
            self._readings.remove(reading)

    def _drop(self) -> None:
        """Forget what nobody asked for."""
        for each in [each for each in self._readings if not each.asked]:
            each.dropped = True
            self._free += [found[1] for found in each.ready.values() if isinstance(found, tuple)]
            each.ready.clear()
            self._readings.remove(each)

    def _next(self) -> tuple[_Reading, int, HostBuffer] | None:
        """A piece to read now, and where to."""
        if not self._free:
            return None
        for reading in self._readings:
            if reading.begun < len(reading.pieces):
                break
        else:
            reading = self._append(self._after[self._last])
        reading.begun += 1
        return reading, reading.begun - 1, self._free.pop()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (found := self._next()) is None:
                    self._changed.wait()
                if self._closed:
                    return
            assert found is not None
            reading, number, buffer = found
            made: tuple[torch.Tensor, HostBuffer] | BaseException
            try:
                made = reading.pieces[number].load(buffer), buffer
            except BaseException as error:  # noqa: BLE001 - handed to whoever takes the piece
                made = error
            with self._changed:
                if reading.dropped or not isinstance(made, tuple):
                    self._free.append(buffer)
                if not reading.dropped:
                    reading.ready[number] = made
                self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class AheadSource:
    """A layer in its files that is read ahead; a copy of it takes what is there."""

    ahead: ReadAhead
    unit: int
    file: HomeSource

    @property
    def nbytes(self) -> int:
        """Bytes that cross a link: those of the image."""
        return sum(piece.image_bytes for piece in self.file.pieces())

    @property
    def image(self) -> None:
        """It is nowhere whole."""
        return None

    def blocks(self, dst: DeviceBuffer) -> Sequence[CopyBlock]:
        """The memory copies that fill `dst`."""
        reading = self.ahead.ask(self.unit)
        return [
            CopyBlock(piece.image_bytes, partial(self._put, reading, number, dst.tensor))
            for number, piece in enumerate(reading.pieces)
        ]

    def pieces(self) -> Sequence[CopyPiece]:
        """The memory copies that bring it through staging buffers."""
        reading = self.ahead.ask(self.unit)
        return [
            CopyPiece(
                offset=piece.offset,
                image_bytes=piece.image_bytes,
                nbytes=piece.image_bytes,
                load=partial(self._load, reading, number),
            )
            for number, piece in enumerate(reading.pieces)
        ]

    def check(self) -> None:
        """Compare the files with what they were at the start.

        Raises:
            CheckpointError: one changed.
        """
        self.file.check()

    def _put(self, reading: _Reading, number: int, image: torch.Tensor) -> None:
        piece = reading.pieces[number]
        made, buffer = self.ahead.take(reading, number)
        try:
            image[piece.offset : piece.offset + piece.image_bytes].copy_(made)
        finally:
            self.ahead.give_back(buffer)

    def _load(self, reading: _Reading, number: int, staging: HostBuffer) -> torch.Tensor:
        made, buffer = self.ahead.take(reading, number)
        try:
            return staging.tensor[: made.numel()].copy_(made)
        finally:
            self.ahead.give_back(buffer)
