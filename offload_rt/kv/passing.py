"""Keys and values that live as long as a layer computes, for texts that are only read.

All rows of a pass go through a layer before the next is touched, so what a layer wrote is of no use
once the next one writes. One layer's memory serves all of them: a model of 80 layers reads 80 times
as many tokens in one pass as with caches that stay.
"""

from collections.abc import Sequence

import torch

from offload_rt.attention.rows import attend_rows
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.device.base import Device
from offload_rt.errors import CapacityError
from offload_rt.kv.base import KVShape


class PassingKV:
    """Keys and values of one sequence in the layer that computes; nothing can be committed.

    Args:
        device: where the memory is taken.
        shapes: sizes per layer.
        dtype: number format of keys and values.
        capacity: tokens to set aside room for.
    """

    length = 0

    def __init__(
        self, device: Device, shapes: Sequence[KVShape], dtype: torch.dtype, capacity: int
    ) -> None:
        self.capacity = capacity
        self._shapes = tuple(shapes)
        numbers = max(shape.numbers_per_token for shape in shapes) * capacity
        self._memory = device.allocate(numbers * dtype.itemsize, "KV of one layer").tensor.view(
            dtype
        )
        self._layer, self._pending = -1, 0

    def begin_pass(self, rows: int, *, keeps_all: bool) -> None:
        """Nothing: every pass is alike to this cache."""

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add pending rows: key [K, S, D], value [K, S, D]; those of another layer go."""
        start = self._pending if layer == self._layer else 0
        stop = start + key.shape[1]
        if stop > self.capacity:
            raise CapacityError(f"{stop} tokens of one text, there is room for {self.capacity}")
        self._layer, self._pending = layer, stop
        keys, values = self._views(layer)
        keys[:, start:stop] = key
        values[:, start:stop] = value

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None = None,
    ) -> torch.Tensor:
        """Attend from the last rows appended: query [H, S, D] gives [S, H, D]."""
        assert layer == self._layer  # a layer appends before it attends
        keys, values = self._views(layer)
        return attend_rows(query, keys[:, : self._pending], values[:, : self._pending], spec, tree)

    def commit(self, keep: Sequence[int]) -> None:
        """Only nothing can be kept."""
        if keep:
            raise CapacityError(f"cannot keep {len(keep)} rows: this cache keeps none")
        self._pending = 0

    def truncate(self, length: int) -> None:
        """Forget the pending rows."""
        if length:
            raise CapacityError(f"cannot go back to {length} tokens: none are cached")
        self._pending = 0

    def _views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, [K, capacity, D] each."""
        shape = self._shapes[layer]
        sizes = [shape.heads * dim * self.capacity for dim in (shape.key_dim, shape.value_dim)]
        parts = self._memory[: sum(sizes)].split(sizes)
        keys, values = (part.view(shape.heads, self.capacity, -1) for part in parts)
        return keys, values
