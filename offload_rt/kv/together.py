"""Rows of several sequences written and attended to at once, where their caches lie in memory.

Each sequence by itself is an append and a kernel in every layer: 64 sequences in a model of 28
layers are 1,792 of each in a pass, at 0.1 ms of Python. Here a layer is one call. What it reads and
writes is settled when the pass begins; a layer adds only where its rows are. The bits are those of
each sequence by itself (`attention/exact.py`).
"""

from collections.abc import Iterable, Sequence

import torch

from offload_rt.attention.exact import PackedAttention
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.kv.base import KVCache
from offload_rt.kv.resident import ResidentKV


class PackedRows:
    """New rows of some sequences, each with a cache of its own in memory.

    Args:
        caches: of the sequences; none twice.
        layer: one of those that the rows go to; the caches hold as many rows of the others.
        counts: rows of each, one sequence after the other.
        trees: which pending rows those see; None: all before them.
    """

    def __init__(
        self,
        caches: Sequence[ResidentKV],
        layer: int,
        counts: Sequence[int],
        trees: Sequence[PendingTree | None],
    ) -> None:
        before = [cache.rows_of(layer) for cache in caches]
        self._parts = list(zip(caches, counts, strict=True))
        self._where = torch.stack([cache.where for cache in caches], dim=1)  # [L, n, 6]
        self._attention = PackedAttention(list(zip(before, counts, trees, strict=True)))

    @classmethod
    def of(
        cls, layer: int, parts: Iterable[tuple[KVCache, slice, PendingTree | None]]
    ) -> "PackedRows | None":
        """Rows of caches, as many as slices are long; None where a cache is of another kind.

        Nor where one has no room, which its own `append` says.
        """
        caches, counts, trees = list[ResidentKV](), list[int](), list[PendingTree | None]()
        for cache, rows, tree in parts:
            count = rows.stop - rows.start
            if not isinstance(cache, ResidentKV) or cache.rows_of(layer) + count > cache.capacity:
                return None
            caches.append(cache)
            counts.append(count)
            trees.append(tree)
        return cls(caches, layer, counts, trees) if len({*caches}) == len(caches) else None

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Append the rows of all sequences, and attend from them.

        Args:
            layer: layer index.
            query: [H, S, D], one sequence after the other.
            key: [K, S, D], likewise.
            value: [K, S, D].
            spec: how the layer attends, by a kernel (`is_assembled`).

        Returns:
            [S, H, D].
        """
        attended = self._attention.attend(query, key, value, self._where[layer], spec)
        for cache, rows in self._parts:
            cache.wrote(layer, rows)
        return attended
