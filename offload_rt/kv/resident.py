"""A KV cache that lies on the device, one stretch of memory per sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch

from offload_rt.attention.rows import attend_rows
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.device.base import Device
from offload_rt.errors import CapacityError
from offload_rt.kernels.attending import lie
from offload_rt.kv.base import KVShape, RowWatcher
from offload_rt.kv.static import RowMemory, RowsBefore


@dataclass(frozen=True, slots=True)
class RowStore:
    """Device memory for rows of all layers.

    Attributes:
        keys: per layer [K, rows, D].
        values: per layer [K, rows, D].
        alike: the same memory as few views as there can be (`stores_alike`).
        rows: of each.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    alike: Sequence[torch.Tensor]
    rows: int

    @classmethod
    def allocate(
        cls, device: Device, shapes: Sequence[KVShape], dtype: torch.dtype, rows: int
    ) -> "RowStore":
        """Take memory of a device."""
        numbers = sum(shape.numbers_per_token for shape in shapes) * rows
        memory = device.allocate(numbers * dtype.itemsize, "KV cache").tensor.view(dtype)
        keys, values = split_rows(memory, shapes, rows)
        return cls(keys, values, stores_alike(memory, shapes, rows), rows)

    def part(self, first: int, rows: int) -> "RowStore":
        """Some of the rows, where they are."""
        cut = slice(first, first + rows)
        return RowStore(
            [keys[:, cut] for keys in self.keys],
            [values[:, cut] for values in self.values],
            [both[:, cut] for both in self.alike],
            rows,
        )


class ResidentKV:
    """Keys and values of one sequence on the device.

    Args:
        device: where the memory is taken.
        shapes: sizes per layer.
        dtype: number format of keys and values.
        capacity: tokens to set aside room for.
        store: memory for them; None takes some of its own.
    """

    def __init__(
        self,
        device: Device,
        shapes: Sequence[KVShape],
        dtype: torch.dtype,
        capacity: int,
        store: RowStore | None = None,
    ) -> None:
        self._device = device
        self._length = 0
        self._pending = [0] * len(shapes)
        self.lie_in(store or RowStore.allocate(device, shapes, dtype, capacity))

    def lie_in(self, store: RowStore) -> None:
        """Be where these rows are; the first of them are the committed ones, brought along."""
        self._keys, self._values, self._alike = store.keys, store.values, store.alike
        self._where: torch.Tensor | None = None
        self.capacity = store.rows
        self.memory = RowMemory(store.keys, store.values, store.rows)

    def hold(self, length: int) -> None:
        """Take the first rows of the memory for committed: somebody wrote them there."""
        if length > self.capacity:
            raise CapacityError(f"cannot hold {length} tokens: there is room for {self.capacity}")
        self._length = length
        self._pending = [0] * len(self._pending)

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self._length

    @property
    def where(self) -> torch.Tensor:
        """[L, 6] int64, where the rows of each layer lie (`kernels/attending.py`, `lie`)."""
        if self._where is None:
            pairs = zip(self._keys, self._values, strict=True)
            self._where = torch.tensor([lie(*pair) for pair in pairs])
        return self._where

    def rows_of(self, layer: int) -> int:
        """Rows of a layer, committed and pending."""
        return self._length + self._pending[layer]

    def wrote(self, layer: int, rows: int) -> None:
        """Somebody wrote so many pending rows of a layer."""
        self._pending[layer] += rows

    def begin_pass(self, rows: int, *, keeps_all: bool) -> None:
        """Nothing: every pass is alike to this cache."""

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add pending rows: key [K, S, D], value [K, S, D]."""
        start = self._length + self._pending[layer]
        stop = start + key.shape[1]
        if stop > self.capacity:
            raise CapacityError(
                f"the KV cache has room for {self.capacity} tokens, {stop} are needed: "
                "raise --context"
            )
        self._keys[layer][:, start:stop] = key
        self._values[layer][:, start:stop] = value
        self._pending[layer] = stop - self._length

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None = None,
        watcher: RowWatcher | None = None,
    ) -> torch.Tensor:
        """Attend from the last rows appended: query [H, S, D] gives [S, H, D]."""
        stop = self._length + self._pending[layer]
        keys, values = self._keys[layer][:, :stop], self._values[layer][:, :stop]
        if watcher is not None:
            watcher.see(layer, 0, keys, values)
        return attend_rows(query, keys, values, spec, tree)

    def commit(self, keep: Sequence[int]) -> None:
        """Keep these pending rows, in this order; forget the rest."""
        pending = min(self._pending, default=max(keep, default=-1) + 1)
        if any(not 0 <= row < pending for row in keep):
            raise CapacityError(f"cannot keep rows {list(keep)}: {pending} rows are pending")
        if list(keep) != list(range(len(keep))):
            rows = self._device.upload([self._length + row for row in keep])
            for store in self._alike:
                store[:, self._length : self._length + len(keep)] = store[:, rows]
        self._length += len(keep)
        self._pending = [0] * len(self._pending)

    def rows_before(self) -> RowsBefore:
        """What a recorded pass finds."""
        return RowsBefore(committed=self._length, pending=min(self._pending))

    def appended(self, rows: int) -> None:
        """A recorded pass wrote that many pending rows of every layer."""
        self._pending = [pending + rows for pending in self._pending]

    def truncate(self, length: int) -> None:
        """Forget pending rows and all committed rows from `length` on."""
        if not 0 <= length <= self._length:
            raise CapacityError(f"cannot go back to {length} tokens: {self._length} are cached")
        self._length = length
        self._pending = [0] * len(self._pending)


def split_rows(
    memory: torch.Tensor, shapes: Sequence[KVShape], rows: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Cut one stretch of numbers into keys and values of each layer: [K, rows, D] views."""
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    offset = 0
    for shape in shapes:
        for store, dim in ((keys, shape.key_dim), (values, shape.value_dim)):
            size = shape.heads * rows * dim
            store.append(memory[offset : offset + size].view(shape.heads, rows, dim))
            offset += size
    return keys, values


def stores_alike(memory: torch.Tensor, shapes: Sequence[KVShape], rows: int) -> list[torch.Tensor]:
    """The same stretch as few views as there can be: neighbours of one head size are one.

    Returns:
        [K of all of them, rows, D] views; of a model whose layers are alike a single one.
    """
    heads = [(dim, s.heads) for s in shapes for dim in (s.key_dim, s.value_dim)]
    views: list[torch.Tensor] = []
    offset = 0
    for dim, group in groupby(heads, key=itemgetter(0)):
        count = sum(number for _, number in group)
        size = count * rows * dim
        views.append(memory[offset : offset + size].view(count, rows, dim))
        offset += size
    return views
