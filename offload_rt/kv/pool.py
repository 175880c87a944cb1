"""Memory for the rows of many sequences: each has a stretch of it, as long as it needs now.

A cache of fixed size for each sequence would have to be as large as the longest answer anybody may
ask for. Here sequences share what was planned for all of them together. A stretch is consecutive,
so attention reads it as it reads any cache. One that grows where there is no room behind it has the
others moved aside: rows are copied on the device, in pieces of `PIECE_BYTES`, which takes little
beside a pass that reads weights. So nothing is ever lost to gaps.

Moves and copies are enqueued on the compute stream, as everything that reads or writes rows of a
resident cache is, between two passes. So they need no waits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from offload_rt.device.base import Device
from offload_rt.errors import CapacityError
from offload_rt.kv.base import KVShape
from offload_rt.kv.resident import ResidentKV, RowStore

PIECE_BYTES = 2**22  # of a copy that passes through memory of its own


class KVPool:
    """The caches of several sequences in one memory; at first none has room.

    Args:
        device: where the memory is taken.
        shapes: sizes per layer.
        dtype: number format of keys and values.
        rows: of all sequences together.
        sequences: how many.

    Attributes:
        caches: of each sequence; its capacity is what it was given.
    """

    def __init__(
        self,
        device: Device,
        shapes: Sequence[KVShape],
        dtype: torch.dtype,
        *,
        rows: int,
        sequences: int,
    ) -> None:
        self.rows = rows
        self._store = RowStore.allocate(device, shapes, dtype, rows)
        row_bytes = sum(shape.numbers_per_token for shape in shapes) * dtype.itemsize
        self._piece_rows = max(1, PIECE_BYTES // row_bytes)
        none = self._store.part(0, 0)
        self.caches = [ResidentKV(device, shapes, dtype, 0, none) for _ in range(sequences)]
        self._first = [0] * sequences

    @property
    def free_rows(self) -> int:
        """Rows no sequence has."""
        return self.rows - sum(cache.capacity for cache in self.caches)

    def resize(self, index: int, rows: int) -> None:
        """Give a sequence so many rows; the committed ones stay, pending ones must not be there.

        Raises:
            CapacityError: the others have too many, or more are committed; nothing was changed.
        """
        cache = self.caches[index]
        if rows < cache.length:
            raise CapacityError(f"cannot give {rows} rows to a cache of {cache.length} tokens")
        if rows - cache.capacity > self.free_rows:
            raise CapacityError(
                f"{rows} rows are wanted, {cache.capacity + self.free_rows} of {self.rows} are free"
            )
        if rows > self._room_behind(index):
            self._make_room(index, rows)
        cache.lie_in(self._store.part(self._first[index], rows))

    def copy(self, source: int, index: int, rows: int) -> None:
        """Have a sequence begin with the first committed rows of another, and nothing else."""
        into, start = self._first[index], self._first[source]
        assert rows <= self.caches[source].length
        for store in self._store.alike:
            store[:, into : into + rows] = store[:, start : start + rows]
        self.caches[index].hold(rows)

    def _room_behind(self, index: int) -> int:
        """Rows from where a sequence begins to where the next one does."""
        if not self.caches[index].capacity:
            return 0
        start = self._first[index]
        return next((o.first for o in self._others(index) if o.first > start), self.rows) - start

    def _others(self, index: int) -> list["_Stretch"]:
        """The stretches of other sequences, in their order."""
        pairs = enumerate(zip(self._first, self.caches, strict=True))
        found = [_Stretch(first, cache.capacity, at) for at, (first, cache) in pairs]
        return sorted(one for one in found if one.rows and one.whose != index)

    def _make_room(self, index: int, rows: int) -> None:
        """Move a sequence to where it has so many rows, and others out of its way."""
        others, at = self._others(index), 0
        for other in [*others, _Stretch(self.rows, 0, index)]:
            if other.first - at >= rows:
                self._move(index, at)
                return
            at = other.first + other.rows
        # Those before it go to the front, those behind it to the end: all that is free is between.
        front, end = 0, self.rows
        before = [other for other in others if other.first < self._first[index]]
        for other in before:
            self._move(other.whose, front)
            front += other.rows
        self._move(index, front)
        for other in reversed(others[len(before) :]):
            end -= other.rows
            self._move(other.whose, end)

    def _move(self, index: int, into: int) -> None:
        """Move the committed rows of a sequence, and its stretch; it may overlap the old one."""
        cache, start = self.caches[index], self._first[index]
        pieces: Sequence[int] = range(0, cache.length, self._piece_rows)
        for piece in pieces if into < start else pieces[::-1]:
            count = min(self._piece_rows, cache.length - piece)
            for store in self._store.alike if into != start else ():
                rows = store[:, start + piece : start + piece + count].clone()
                store[:, into + piece : into + piece + count] = rows
        self._first[index] = into
        cache.lie_in(self._store.part(into, cache.capacity))


class _Stretch(NamedTuple):
    first: int
    rows: int
    whose: int
