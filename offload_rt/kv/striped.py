"""Caches of one sequence on several devices, each with the keys and values of its layers.

Each part is a whole cache that numbers its layers from 0. All of them have the same length: a pass
goes through all layers before it is committed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.kv.base import KVCache, RowWatcher
from offload_rt.kv.followed import WatchedCache
from offload_rt.kv.retrieval import RetrievalKV


@dataclass(frozen=True, slots=True)
class _Renamed:
    """A watcher to whom a layer of a part is called by its number in the network."""

    watcher: RowWatcher
    layer: int

    def see(self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Look at rows [K, T, D]."""
        self.watcher.see(self.layer, first, key, value)


def places(device: Sequence[int]) -> list[tuple[int, int]]:
    """For each layer its device, and its number among the layers there."""
    return [(number, device[:layer].count(number)) for layer, number in enumerate(device)]


class StripedKV:
    """A cache of several parts.

    Args:
        parts: by device, of those that have layers; layers of others are on other machines.
        device: the number of each layer's device.
    """

    def __init__(self, parts: Mapping[int, KVCache], device: Sequence[int]) -> None:
        self.parts = list(parts.values())
        self._of_layer = {
            layer: (parts[number], own)
            for layer, (number, own) in enumerate(places(device))
            if number in parts
        }

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self.parts[0].length

    @property
    def capacity(self) -> int:
        """Tokens there is room for, pending ones included."""
        return self.parts[0].capacity

    def begin_pass(self, rows: int, *, keeps_all: bool) -> None:
        """Say what the next pass is."""
        for part in self.parts:
            part.begin_pass(rows, keeps_all=keeps_all)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add pending rows: key [K, S, D], value [K, S, D]."""
        part, own = self._of_layer[layer]
        part.append(own, key, value)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None = None,
        watcher: RowWatcher | None = None,
    ) -> torch.Tensor:
        """Attend from the last rows appended: query [H, S, D] gives [S, H, D]."""
        part, own = self._of_layer[layer]
        if watcher is None:
            return part.attend(own, query, spec, tree)
        shown = cast(WatchedCache, part)  # only full caches are watched
        return shown.attend(own, query, spec, tree, _Renamed(watcher, layer))

    def commit(self, keep: Sequence[int]) -> None:
        """Keep these pending rows, in this order; forget the rest."""
        for part in self.parts:
            part.commit(keep)

    def truncate(self, length: int) -> None:
        """Forget pending rows and all committed rows from `length` on."""
        for part in self.parts:
            part.truncate(length)


class StripedRetrieval(StripedKV):
    """A retrieval cache of several parts, which are built of the same rows at the same time.

    Args:
        parts: by device, of those that have layers.
        device: the number of each layer's device.
    """

    def __init__(self, parts: Mapping[int, RetrievalKV], device: Sequence[int]) -> None:
        super().__init__(parts, device)
        self._parts = list(parts.values())
        self._choosing = [(parts[number], own) for number, own in places(device)]

    @property
    def shares(self) -> tuple[float, ...]:
        """Parts of the budget that may be the newest tokens."""
        return self._parts[0].shares

    @property
    def built_at(self) -> int | None:
        """Tokens of the sequence it was last built from; None while it is not built."""
        return self._parts[0].built_at

    @property
    def is_due(self) -> bool:
        """Whether it was never built, or is due to be built again."""
        return self._parts[0].is_due

    @property
    def is_complete(self) -> bool:
        """Whether nothing of the context is left out."""
        return self._parts[0].is_complete

    def leaves_out(self, length: int) -> bool:
        """Whether a build from that many rows keeps but a part of them."""
        return self._parts[0].leaves_out(length)

    def begin_build(self, length: int, recent_share: float) -> None:
        """Begin to choose anew in every layer."""
        for part in self._parts:
            part.begin_build(length, recent_share)

    def end_build(self) -> None:
        """Use what was chosen."""
        for part in self._parts:
            part.end_build()

    def begin_layer(self, layer: int, query: torch.Tensor, spec: AttentionSpec) -> None:
        """Begin to choose for a layer: query [H, S, D] asks."""
        part, own = self._choosing[layer]
        part.begin_layer(own, query, spec)

    def see(self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Choose from rows [K, T, D] of the full cache, from position `first` on, in order."""
        part, own = self._choosing[layer]
        part.see(own, first, key, value)
