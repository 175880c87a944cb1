"""Memory for the rows of many sequences: each has a stretch of it, as long as it needs now.

A cache of fixed size for each sequence would have to be as large as the longest answer anybody may
ask for. Here sequences share what was planned for all of them together. A stretch is consecutive,
so attention reads it as it reads any cache. One that grows where there is no room behind it has the
others moved aside: rows are copied on the device, in pieces of `PIECE_BYTES`, which takes little
beside a pass that reads weights. So nothing is ever lost to gaps. Rows of sequences that ended are
stretches, too, as long as somebody keeps them (`prefixes.py`).

Moves and copies are enqueued on the compute stream, as everything that reads or writes rows of a
resident cache is, between two passes. So they need no waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload_rt.device.base import Device
from offload_rt.errors import CapacityError
from offload_rt.kv.base import KVShape
from offload_rt.kv.resident import ResidentKV, RowStore

PIECE_BYTES = 2**22  # of a copy that passes through memory of its own


@dataclass(eq=False, slots=True)
class Stretch:
    """Consecutive rows of the memory.

    Attributes:
        first: where they begin.
        rows: how many.
        cache: whose they are; None: nobody's, and all of them are committed.
    """

    first: int
    rows: int
    cache: ResidentKV | None = None

    @property
    def committed(self) -> int:
        """Rows that must stay what they are."""
        return self.rows if self.cache is None else self.cache.length


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
        self._piece_rows = max(1, PIECE_BYTES // max(1, row_bytes))
        none = self._store.part(0, 0)
        self.caches = [ResidentKV(device, shapes, dtype, 0, none) for _ in range(sequences)]
        self._own = [Stretch(0, 0, cache) for cache in self.caches]
        self._kept: list[Stretch] = []

    @property
    def free_rows(self) -> int:
        """Rows that are in no stretch."""
        return self.rows - sum(stretch.rows for stretch in (*self._own, *self._kept))

    def of(self, index: int) -> Stretch:
        """The stretch of a cache."""
        return self._own[index]

    def resize(self, index: int, rows: int) -> None:
        """Give a sequence so many rows; the committed ones stay, pending ones must not be there.

        Raises:
            CapacityError: the others have too many, or more are committed; nothing was changed.
        """
        own = self._own[index]
        if rows < own.committed:
            raise CapacityError(f"cannot give {rows} rows to a cache of {own.committed} tokens")
        self._resize(own, rows)

    def begin(
        self,
        index: int,
        rows: int,
        parts: Sequence[tuple[Stretch, int]] = (),
        taken: Stretch | None = None,
    ) -> None:
        """Give an empty cache so many rows, of which the first are there already.

        Args:
            index: the cache.
            rows: it has then.
            parts: stretches, and how many of their first rows are copied, one behind the other.
            taken: a kept stretch that is the cache's from now on, behind those.

        Raises:
            CapacityError: so many are not free; nothing was changed.
        """
        before = sum(count for _, count in parts)
        own = self._own[index] if taken is None else taken
        held = 0 if taken is None else taken.rows
        self._resize(own, rows)
        cache = self.caches[index]
        if taken is not None:
            self._shift(own.first, own.first + before, held)
            self._kept.remove(taken)
            taken.cache, self._own[index] = cache, taken
            self._settle(taken)
        into = own.first
        for part, count in parts:
            for store in self._store.alike:
                store[:, into : into + count] = store[:, part.first : part.first + count]
            into += count
        cache.hold(before + held)

    def keep(self, index: int, first: int) -> Stretch:
        """Have the committed rows of a cache from `first` on outlive it; it is empty then."""
        own, cache = self._own[index], self.caches[index]
        kept = Stretch(own.first + first, cache.length - first)
        self._kept.append(kept)
        cache.truncate(0)
        own.rows = 0
        self._settle(own)
        return kept

    def split(self, kept: Stretch, rows: int) -> Stretch:
        """Make two of a kept stretch; returns the one behind its first rows."""
        rest = Stretch(kept.first + rows, kept.rows - rows)
        kept.rows = rows
        self._kept.append(rest)
        return rest

    def shorten(self, kept: Stretch, rows: int) -> None:
        """Give up what is behind the first rows of a kept stretch; 0 gives up all of it."""
        kept.rows = rows
        if not rows:
            self._kept.remove(kept)

    def _resize(self, stretch: Stretch, rows: int) -> None:
        if rows - stretch.rows > self.free_rows:
            raise CapacityError(
                f"{rows} rows are wanted, {stretch.rows + self.free_rows} of {self.rows} are free"
            )
        if rows > self._room_behind(stretch):
            self._make_room(stretch, rows)
        stretch.rows = rows
        self._settle(stretch)

    def _settle(self, stretch: Stretch) -> None:
        """Tell a cache where its rows are."""
        if stretch.cache is not None:
            stretch.cache.lie_in(self._store.part(stretch.first, stretch.rows))

    def _room_behind(self, stretch: Stretch) -> int:
        """Rows from where a stretch begins to where the next one does."""
        if not stretch.rows:
            return 0
        start = stretch.first
        return next((o.first for o in self._others(stretch) if o.first > start), self.rows) - start

    def _others(self, stretch: Stretch) -> list[Stretch]:
        """All other stretches that have rows, in their order."""
        found = [o for o in (*self._own, *self._kept) if o.rows and o is not stretch]
        return sorted(found, key=lambda one: one.first)

    def _make_room(self, stretch: Stretch, rows: int) -> None:
        """Move a stretch to where it has so many rows, and others out of its way."""
        others, at = self._others(stretch), 0
        for first, end in [*((o.first, o.first + o.rows) for o in others), (self.rows, self.rows)]:
            if first - at >= rows:
                self._move(stretch, at)
                return
            at = end
        # Those before it go to the front, those behind it to the end: all that is free is between.
        front, end = 0, self.rows
        before = [other for other in others if other.first < stretch.first]
        for other in before:
            self._move(other, front)
            front += other.rows
        self._move(stretch, front)
        for other in reversed(others[len(before) :]):
            end -= other.rows
            self._move(other, end)

    def _move(self, stretch: Stretch, into: int) -> None:
        """Move a stretch; it may overlap where it was."""
        self._shift(stretch.first, into, stretch.committed)
        stretch.first = into
        self._settle(stretch)

    def _shift(self, start: int, into: int, rows: int) -> None:
        """Copy rows to where they may overlap themselves."""
        pieces: Sequence[int] = range(0, rows, self._piece_rows)
        for piece in pieces if into < start else pieces[::-1]:
            count = min(self._piece_rows, rows - piece)
            for store in self._store.alike if into != start else ():
                moved = store[:, start + piece : start + piece + count].clone()
                store[:, into + piece : into + piece + count] = moved
