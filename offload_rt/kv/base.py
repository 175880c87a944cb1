"""What every KV cache owes its caller.

A pass *appends* rows layer by layer, *attends* to them, and at its end the engine *commits* the
rows that are kept. Until then they are pending: visible to this pass, forgotten by the next.
`commit` is the only place `length` grows, so a rejected draft costs nothing and a layer can never
leave a cache half-advanced.

Layout, stated here once: keys and values of a layer are [K, T, D], heads outermost, so that the
rows of one head are consecutive and a prefix of tokens is a view. Letters: `attention/spec.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload_rt.attention.spec import AttentionSpec, PendingTree


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """Sizes of one layer's cache: K heads of D_k and D_v numbers."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers_per_token(self) -> int:
        """Numbers one token takes in this layer."""
        return self.heads * (self.key_dim + self.value_dim)


NO_KV = KVShape(heads=0, key_dim=0, value_dim=0)  # of a layer that does not attend


class RowWatcher(Protocol):
    """Whoever looks at the rows a cache attends to."""

    def see(self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Look at rows [K, T, D] while they are lent; work is enqueued on the compute stream.

        Args:
            layer: layer index.
            first: position of the first of them.
            key: [K, T, D] rotated.
            value: [K, T, D].
        """


class KVCache(Protocol):
    """Keys and values of one sequence, all layers."""

    @property
    def length(self) -> int:
        """Committed tokens."""

    @property
    def capacity(self) -> int:
        """Tokens there is room for, pending ones included."""

    def begin_pass(self, rows: int, *, keeps_all: bool) -> None:
        """Say what the next pass is.

        Args:
            rows: rows it appends.
            keeps_all: all of them will be kept, as those of a prompt are.
        """

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add pending rows.

        Args:
            layer: layer index.
            key: [K, S, D] rotated keys.
            value: [K, S, D].

        Raises:
            CapacityError: there is no room; nothing was written.
        """

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None = None,
    ) -> torch.Tensor:
        """Attend from the last S rows appended to `layer` to all rows before and among them.

        Args:
            layer: layer index.
            query: [H, S, D].
            spec: how the layer attends.
            tree: which pending rows each of them sees; None: all before it, and itself.

        Returns:
            [S, H, D].
        """

    def commit(self, keep: Sequence[int]) -> None:
        """Keep the pending rows with these indices, in this order; forget the rest.

        A chain of which n rows are accepted is `range(n)`, a path of a tree is its node indices.

        Raises:
            CapacityError: an index is not a pending row.
        """

    def truncate(self, length: int) -> None:
        """Forget pending rows and all committed rows from `length` on.

        A recurrent state may have to go back further (`kv/states.py`): `length` then says how far.
        """
