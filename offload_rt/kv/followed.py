"""A full cache with a retrieval cache that follows it.

The protocol: `begin_pass` says what the next pass is, each layer appends and attends, `commit` ends
the pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.kv.base import KVCache, RowWatcher
from offload_rt.kv.recent_share import RecentChoice
from offload_rt.report import RetrievalCounts


class WatchedCache(KVCache, Protocol):
    """A full cache that shows the rows it attends to."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None = None,
        watcher: RowWatcher | None = None,
    ) -> torch.Tensor:
        """Attend as any cache does, and let `watcher` see every row, oldest first."""


class ChosenRows(KVCache, RowWatcher, Protocol):
    """A retrieval cache: some of a full cache's rows (`retrieval.py`)."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Parts of the budget that may be the newest tokens."""

    @property
    def built_at(self) -> int | None:
        """Tokens of the sequence it was last built from; None while it is not built."""

    @property
    def is_due(self) -> bool:
        """Whether it was never built, or is due to be built again."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing of the context is left out."""

    def leaves_out(self, length: int) -> bool:
        """Whether a build from that many rows keeps but a part of them."""

    def begin_build(self, length: int, recent_share: float) -> None:
        """Begin to choose anew in every layer."""

    def begin_layer(self, layer: int, query: torch.Tensor, spec: AttentionSpec) -> None:
        """Begin to choose for a layer: query [H, S, D] asks."""

    def end_build(self) -> None:
        """Use what was chosen."""


class FollowedKV:
    """A full cache with a retrieval cache that keeps up with it.

    A pass over the full cache either adds its rows to both, or builds the other one anew, or both.
    The rows it adds are exact, where those of a draft pass are the retrieval cache's own. A build
    asks with the newest row that is sure to stay: a prompt's last, a draft's root.

    Args:
        full: all rows; may itself be followed, so that several retrieval caches share it.
        retrieval: some of them.

    Attributes:
        choice: what part of the retrieval cache is the newest tokens, corrected by who drafts.
    """

    def __init__(self, full: WatchedCache, retrieval: ChosenRows) -> None:
        self.full, self.retrieval = full, retrieval
        self.choice = RecentChoice(retrieval.shares)
        self.wants_build = False
        self.counts = RetrievalCounts()  # whose builds are counted
        self._follows = self._builds = self._newest = False
        self._rows = 0
        self._appended: dict[int, int] = {}

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self.full.length

    @property
    def capacity(self) -> int:
        """Tokens there is room for, pending ones included."""
        return self.full.capacity

    def begin_pass(self, rows: int, *, keeps_all: bool) -> None:
        """Say what the next pass is.

        Args:
            rows: rows it appends.
            keeps_all: a prompt, of which all rows will be kept; a build then sees them too.
        """
        self.full.begin_pass(rows, keeps_all=keeps_all)
        self._rows, self._appended = rows, {}
        self._builds = keeps_all or self.wants_build or self.retrieval.is_due
        self._follows = not keeps_all
        if self._builds:
            length = self.length + (rows if keeps_all else 0)
            chooses = self.retrieval.leaves_out(length)
            self.retrieval.begin_build(length, self.choice.next() if chooses else 0.0)
            self._newest = chooses and self.choice.current == 1.0
        else:
            self.retrieval.truncate(self.length)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add pending rows: key [K, S, D], value [K, S, D]."""
        self.full.append(layer, key, value)
        self._appended[layer] = self._appended.get(layer, 0) + key.shape[1]
        if self._follows:
            self.retrieval.append(layer, key, value)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None = None,
        watcher: RowWatcher | None = None,
    ) -> torch.Tensor:
        """Attend to all rows; behind the last of the pass the retrieval cache sees them."""
        if self._builds and self._appended[layer] == self._rows:
            asking = query[:, :1] if self._follows else query[:, -1:]
            self.retrieval.begin_layer(layer, asking, spec)
            watcher = self.retrieval if watcher is None else _Both(watcher, self.retrieval)
        return self.full.attend(layer, query, spec, tree, watcher)

    def commit(self, keep: Sequence[int]) -> None:
        """Keep these pending rows of both, in this order; forget the rest."""
        self.full.commit(keep)
        if self._follows:
            self.retrieval.commit(keep)
        if self._builds:
            self.retrieval.end_build()
            self.wants_build, self._builds = False, False
            self.counts.builds += 1
            self.counts.newest_builds += self._newest

    def truncate(self, length: int) -> None:
        """Forget pending rows and all committed rows from `length` on."""
        self.full.truncate(length)
        self.retrieval.truncate(length)
        self._builds = False


@dataclass(frozen=True, slots=True)
class _Both:
    """Two watchers of the same rows."""

    one: RowWatcher
    other: RowWatcher

    def see(self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Look at rows [K, T, D]."""
        self.one.see(layer, first, key, value)
        self.other.see(layer, first, key, value)
