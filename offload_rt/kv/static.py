"""A KV cache for recorded passes: where rows go and what they see is in tensors.

It has no rows of its own. It lies over the memory of a cache that keeps lengths as Python numbers
(`kv/resident.py`, `kv/retrieval.py`), which goes on taking prompts, commits and truncations. A pass
of fixed shape appends by index and looks at a stretch of fixed size; what of that stretch is there
is a matter of numbers that are uploaded before the pass. Memory behind the rows that are there may
hold anything, NaN included: it is never looked at.

Committed rows are looked at in two parts. Those below `StaticShape.floor`, a multiple of
`FLOOR_ROWS`, are known when the pass is recorded and need no mask. So a pass is recorded anew each
time a sequence has grown by `FLOOR_ROWS`, and what is masked does not grow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload_rt.attention.partial import PartialAttention
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.kv.base import KVCache

# Rows below which no mask is needed go up in steps of so many. Larger: fewer recordings, and more
# rows whose scores are written out.
FLOOR_ROWS = 512
WORD_BITS = 32  # rows that one uploaded number says whether they are seen


@dataclass(frozen=True, slots=True, eq=False)
class RowMemory:
    """Rows of every layer, where they stay for the whole run.

    Attributes:
        keys: per layer [K, T, D].
        values: per layer [K, T, D].
        rows: T.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsBefore:
    """What of a memory is there before a pass.

    Attributes:
        committed: rows, the first of all.
        pending: rows behind them.
        window_first: row from which on no position is missing, for layers with a window.
    """

    committed: int
    pending: int
    window_first: int = 0


class RecordableCache(KVCache, Protocol):
    """A cache over whose memory a pass can be recorded."""

    @property
    def memory(self) -> RowMemory:
        """Its rows."""

    def rows_before(self) -> RowsBefore:
        """What of them is there now."""

    def appended(self, rows: int) -> None:
        """A replayed pass wrote that many pending rows of every layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticShape:
    """What is fixed when a pass is recorded.

    Attributes:
        rows: S, that it appends.
        width: P, rows behind the committed ones that it may look at.
        floor: committed rows there are at least.
        window_first: see `RowsBefore`.
    """

    rows: int
    width: int
    floor: int
    window_first: int = 0

    @classmethod
    def of(cls, before: RowsBefore, rows: int, width: int) -> "StaticShape":
        """The shape of a pass behind those rows."""
        return cls(
            rows=rows,
            width=width,
            floor=before.committed // FLOOR_ROWS * FLOOR_ROWS,
            window_first=before.window_first,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticRows:
    """Where the rows of one pass go and what they see, on the device.

    Attributes:
        at: [S] int64, rows of the memory that are written, one behind the other.
        committed: [1] int64, rows that all of them see.
        visible: [S, P] bool, which rows behind those they see.
        places: [P] int64, place of each of these; of a committed row it is its number.
    """

    at: torch.Tensor
    committed: torch.Tensor
    visible: torch.Tensor
    places: torch.Tensor

    @classmethod
    def chain(cls, device: torch.device, rows: int) -> "StaticRows":
        """The first rows of a memory, each of which sees all before it, and itself."""
        at = torch.arange(rows, device=device)
        visible = at[:, None] >= at
        return cls(at=at, committed=torch.zeros_like(at[:1]), visible=visible, places=at)

    @classmethod
    def next_one(cls, at: torch.Tensor, width: int) -> "StaticRows":
        """One row [1] that sees all before it."""
        behind = torch.arange(width, device=at.device)
        return cls(at=at, committed=at, visible=behind[None] == 0, places=at + behind)


class StaticKV:
    """Keys and values of one pass.

    Args:
        cache: whose memory it is.
        shape: of the pass.
        rows: of the pass.
    """

    def __init__(self, cache: RecordableCache, shape: StaticShape, rows: StaticRows) -> None:
        self._cache, self._memory = cache, cache.memory
        self._shape, self._rows = shape, rows
        self._done = [0] * len(self._memory.keys)  # rows that were appended
        self._seen: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self._cache.length

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return self._memory.rows

    def begin_pass(self, rows: int, *, keeps_all: bool) -> None:
        """Nothing: every pass is alike to this cache."""

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the next rows: key [K, S, D], value [K, S, D]."""
        done = self._done[layer]
        self._done[layer] = stop = done + key.shape[1]
        at = self._rows.at[done:stop]
        self._memory.keys[layer].index_copy_(1, at, key)
        self._memory.values[layer].index_copy_(1, at, value)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None = None,
    ) -> torch.Tensor:
        """Attend from the last rows appended: query [H, S, D] gives [S, H, D]."""
        assert tree is None  # what rows see was uploaded
        keys, values = self._memory.keys[layer], self._memory.values[layer]
        attention = PartialAttention(query, keys.shape[0], spec)
        start = floor = self._shape.floor
        if spec.window is not None:  # no row that is seen comes before this one
            start = min(floor, max(self._shape.window_first, floor - spec.window + 1))
        elif floor:
            attention.add(keys[:, :floor], values[:, :floor])
        stop = min(floor + FLOOR_ROWS + self._shape.width, self._memory.rows)
        part = slice(self._done[layer] - query.shape[1], self._done[layer])
        key = (part.start, part.stop, start, spec.window)
        if key not in self._seen:
            self._seen[key] = self._visible(part, start, stop, spec.window)
        visible, missing = self._seen[key]
        known = values[:, start:stop].masked_fill(missing[:, None], 0)  # 0 times NaN is NaN
        attention.add(keys[:, start:stop], known, visible)
        return attention.result()

    def commit(self, keep: Sequence[int]) -> None:
        """Keep these pending rows, in this order; forget the rest."""
        self._cache.commit(keep)

    def truncate(self, length: int) -> None:
        """Forget pending rows and all committed rows from `length` on."""
        self._cache.truncate(length)

    def _visible(
        self, part: slice, start: int, stop: int, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of rows `start` to `stop`, [S, T] which are seen and [T] which were never written.

        Args:
            part: those of the pass that look.
            start: the first that is looked at.
            stop: behind the last.
            window: of the layer.
        """
        rows, width, at = self._rows, self._shape.width, self._rows.at[part]
        number = torch.arange(start, stop, device=at.device)
        behind = number - rows.committed
        index = behind.clamp(0, width - 1)
        pending = (behind >= 0) & (behind < width)
        visible = (behind < 0) | (pending & rows.visible[part][:, index])
        first = self._shape.window_first
        if window is not None:
            own = rows.places[at - rows.committed]
            place = torch.where(pending, rows.places[index], number)
            visible &= (place > own[:, None] - window) & (number >= first)
        return visible, number > at[-1:]


def visible_words(parents: Sequence[int], rows: int, width: int) -> list[int]:
    """Which pending rows the newest ones see, 32 of them in a number.

    Args:
        parents: P pending rows, the one that each continues, before it; below 0: none of them.
        rows: S, the newest of them, which look.
        width: pending rows a pass may look at, at least P.

    Returns:
        S times `words_of(width)` numbers, row after row.
    """
    seen: list[int] = []
    for row, parent in enumerate(parents):
        seen.append(1 << row | (seen[parent] if parent >= 0 else 0))
    mask = (1 << WORD_BITS) - 1
    shifts = range(0, words_of(width) * WORD_BITS, WORD_BITS)
    return [path >> shift & mask for path in seen[len(parents) - rows :] for shift in shifts]


def words_of(width: int) -> int:
    """Numbers that say which of so many rows one row sees."""
    return -(-width // WORD_BITS)


def unpack_words(words: torch.Tensor, width: int) -> torch.Tensor:
    """[S, words] int64 of `visible_words` as [S, width] bool."""
    bits = words[:, :, None] >> torch.arange(WORD_BITS, device=words.device) & 1
    return bits.flatten(1)[:, :width].bool()
