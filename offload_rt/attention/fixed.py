"""Row-invariant attention where a kernel is picked by all of a product's shape, as on a GPU.

As `exact.py` has it, columns are looked at in whole parts of absolute positions and then in the
piece of the row itself. Besides, all products of a pass have shapes that follow from positions
alone: always `PIECE` rows, those that are missing filled up, and of the piece each row has columns
of its own, put in consecutive places, in a chain as in a tree. So for a row neither the kernels nor
the order of its sums depend on what is beside it. What is left to see on a machine is that a row
has the same bits in any place of such a product (`model/tiles.py` does when a model is loaded).

Of rows that are in different pieces, or on different paths of a tree, all are computed with each of
these pasts, and each row keeps its own: no row is looked up, so the host waits for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload_rt.attention.blocks import KEY_BLOCK, PIECE
from offload_rt.attention.partial import UNSEEN
from offload_rt.attention.spec import ROOT, AttentionSpec, PendingTree

PART = KEY_BLOCK  # columns
MERGE_AT = 8  # parts
_Part = tuple[torch.Tensor, torch.Tensor]  # [K, G * PIECE, D] and its log-sum-exp, fp32


@dataclass(frozen=True, slots=True)
class _Past:
    """What rows that share a piece have before it.

    Attributes:
        own: column at which the piece begins.
        row: one of them, counted in the query; its path is theirs up to `own`.
        after: the last pending row of that path; ROOT: none is before the piece.
    """

    own: int
    row: int
    after: int = ROOT


class FixedAttention:
    """Attention of one query of at most `PIECE` rows, as of `exact.ExactAttention`.

    Args:
        query: [H, S, D].
        kv: K, and D of values.
        spec: how the layer attends.
        committed: columns before the pending ones.
        tree: which pending rows each sees; None: the query's own, each all before it.
    """

    def __init__(
        self,
        query: torch.Tensor,
        kv: tuple[int, int],
        spec: AttentionSpec,
        committed: int,
        tree: PendingTree | None,
    ) -> None:
        heads, rows, _ = query.shape
        assert rows <= PIECE  # passes are made in tiles of so many
        self._rows, self._kv_heads, self._group = rows, kv[0], heads // kv[0]
        self._spec, self._committed, self._tree = spec, committed, tree
        self.tail = committed // PART * PART
        grouped = query.unflatten(0, (kv[0], -1)).float() * spec.scaling  # [K, G, S, D]
        self._query = _filled(grouped, dim=2).contiguous()
        self._like = query
        device = query.device
        if tree is None:
            at = torch.arange(committed, committed + PIECE, device=device)
            self._at = at.clamp_(max=committed + rows - 1)  # [PIECE], the place of each row
            self._path: torch.Tensor | None = None
        else:
            self._at = _filled(tree.positions[-rows:], dim=0)
            self._path = _paths(tree, committed)  # [S, W] pending rows by their places
        self._pasts = _pasts(tree, committed, rows)
        self._parts: list[list[_Part]] = [[] for _ in self._pasts]

    def add(self, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """As of `ExactAttention`."""
        made = dict[int, _Part]()
        for number, past in enumerate(self._pasts):
            if (first := max(start, first_seen(past.own, self._spec.window))) < start + PART:
                if first not in made:
                    part = slice(first - start, None)
                    made[first] = self._whole(first, wide(key[:, part]), wide(value[:, part]))
                self._append(number, made[first])

    def result(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """As of `ExactAttention`."""
        done = [self._finished(number, key, value) for number in range(len(self._pasts))]
        out = done[0]
        for past, rows in zip(self._pasts[1:], done[1:], strict=True):
            out = torch.where(self._has(past)[:, None, None], rows, out)
        return out[: self._rows]

    def _has(self, past: _Past) -> torch.Tensor:
        """[PIECE] bool, which rows have this past."""
        found = (self._at >= past.own) & (self._at < past.own + PIECE)
        if past.after == ROOT:
            return found
        assert self._tree is not None  # no row of a chain is behind another's path
        return found & _filled(self._tree.visible[:, past.after], dim=0)

    def _finished(self, number: int, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[PIECE, H, D], right for the rows that have this past."""
        past, tail = self._pasts[number], self.tail
        before = self._before(past)
        start = tail
        while start + PART <= past.own:
            if (first := max(start, first_seen(past.own, self._spec.window))) < start + PART:
                part = slice(first - tail, start + PART - tail)
                pair = wide(_rows_at(key, before, part)), wide(_rows_at(value, before, part))
                self._append(number, self._whole(first, *pair))
            start += PART
        first = max(start, first_seen(past.own, self._spec.window))
        part = slice(first - tail, past.own - tail)
        pair = wide(_rows_at(key, before, part)), wide(_rows_at(value, before, part))
        self._append(number, self._last(past, first, *pair, key, value))
        parts = list(self._parts[number])
        if (sinks := self._spec.sinks) is not None:
            given = sinks.float().view(self._kv_heads, self._group, 1)
            given = given.expand(-1, -1, PIECE).flatten(1)
            parts.append((torch.zeros_like(parts[0][0]), given))
        out = parts[0][0] if len(parts) == 1 else _merge(parts)[0]
        out = out.unflatten(1, (self._group, PIECE))
        return out.permute(2, 0, 1, 3).flatten(1, 2).to(self._like.dtype)

    def _before(self, past: _Past) -> torch.Tensor | None:
        """Which rows, counted from `tail`, are before a piece; None: as they lie."""
        if self._path is None or past.own <= self._committed:
            return None
        path = self._path[past.row, : past.own - self._committed] + (self._committed - self.tail)
        there = torch.arange(self._committed - self.tail, device=path.device)
        return torch.cat([there, path])

    def _in_piece(self, past: _Past) -> torch.Tensor:
        """[PIECE, PIECE] for each row what is in each column of its piece, counted from `tail`."""
        columns = past.own + torch.arange(PIECE, device=self._at.device)
        # What is behind a row is hidden; there is its own in place of it.
        columns = torch.minimum(columns, self._at[:, None].clamp(min=past.own))
        if self._path is None:
            return columns - self.tail
        width = self._path.shape[1]
        index = (columns - self._committed).clamp(0, width - 1)
        pending = _filled(self._path, dim=0).gather(1, index) + self._committed
        return torch.where(columns < self._committed, columns, pending) - self.tail

    def _whole(self, first: int, key: torch.Tensor, value: torch.Tensor) -> _Part:
        """Attend to columns from `first` on, all before the rows' pieces."""
        scores = self._capped(torch.matmul(self._query.flatten(1, 2), key.transpose(1, 2)))
        self._hide(scores, first)
        weights = torch.softmax(scores, dim=-1)
        return torch.matmul(weights, value), _log_sums(scores, weights)

    def _last(
        self,
        past: _Past,
        first: int,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> _Part:
        """Attend to columns from `first` on, up to the end of the piece."""
        index, shape = self._in_piece(past), (PIECE, PIECE)
        keys, values = (
            wide(rows[:, index.flatten()]).unflatten(1, shape) for rows in (key, value)
        )  # [K, PIECE, PIECE, D]
        by_row = self._query.transpose(1, 2)  # [K, PIECE, G, D]
        own = torch.matmul(by_row, keys.transpose(2, 3)).transpose(1, 2).flatten(1, 2)
        before = torch.matmul(self._query.flatten(1, 2), past_key.transpose(1, 2))
        scores = self._capped(torch.cat([before, own], dim=-1))
        self._hide(scores, first, past.own)
        weights = torch.softmax(scores, dim=-1)
        width = past_key.shape[1]
        mine = weights[..., width:].unflatten(1, (self._group, PIECE)).transpose(1, 2)
        out = torch.matmul(mine, values).transpose(1, 2).flatten(1, 2)
        if width:
            out = torch.matmul(weights[..., :width], past_value) + out
        return out, _log_sums(scores, weights)

    def _capped(self, scores: torch.Tensor) -> torch.Tensor:
        cap = self._spec.softcap
        return scores if cap is None else torch.tanh(scores / cap) * cap

    def _hide(self, scores: torch.Tensor, first: int, own: int | None = None) -> None:
        """Hide what rows do not see of columns from `first` on; of their piece, what is later."""
        window, at = self._spec.window, self._at[:, None]
        if window is None and own is None:
            return
        columns = torch.arange(first, first + scores.shape[-1], device=scores.device)
        hidden = columns > at if own is not None else torch.zeros_like(columns, dtype=torch.bool)
        if window is not None:
            hidden = hidden | (columns <= at - window)
        scores.unflatten(1, (self._group, PIECE)).masked_fill_(hidden, UNSEEN)

    def _append(self, number: int, part: _Part) -> None:
        parts = self._parts[number]
        parts.append(part)
        if len(parts) == MERGE_AT:
            self._parts[number] = [_merge(parts)]


def _log_sums(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The largest weight is exp(largest score - log of the sum)."""
    return scores.amax(dim=-1) - weights.amax(dim=-1).log_()


def _merge(parts: list[_Part]) -> _Part:
    """One part of several, each row by itself."""
    sums = torch.stack([lse for _, lse in parts], dim=-1)
    weights = torch.softmax(sums, dim=-1)
    out = parts[0][0] * weights[..., :1]
    for place, (part, _) in enumerate(parts[1:], 1):
        out = out + part * weights[..., place : place + 1]
    return out, sums.amax(dim=-1) - weights.amax(dim=-1).log_()


def first_seen(own: int, window: int | None) -> int:
    """The first column that a row of the piece that begins at `own` may see, as a whole piece."""
    return 0 if window is None else max(0, own - window + 1) // PIECE * PIECE


def wide(rows: torch.Tensor) -> torch.Tensor:
    """In fp32 and in memory of its own, laid out alike wherever the rows come from."""
    return rows.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _rows_at(rows: torch.Tensor, index: torch.Tensor | None, part: slice) -> torch.Tensor:
    return rows[:, part] if index is None else rows[:, index[part]]


def _filled(rows: torch.Tensor, *, dim: int) -> torch.Tensor:
    """With copies of the last of them, up to `PIECE`."""
    if not (missing := PIECE - rows.shape[dim]):
        return rows
    last = rows.narrow(dim, rows.shape[dim] - 1, 1)
    shape = [-1] * rows.dim()
    shape[dim] = missing
    return torch.cat([rows, last.expand(shape)], dim=dim)


def _paths(tree: PendingTree, committed: int) -> torch.Tensor:
    """[S, W] the pending row that each row has at place `committed` + w of its path, if it has."""
    rows, pending = tree.visible.shape
    assert tree.parents is not None  # of a pass
    width = max(_depths(tree.parents)) + 1
    places = (tree.positions - committed).expand(rows, -1)
    numbers = torch.arange(pending, device=places.device).expand(rows, -1)
    seen = torch.where(tree.visible, numbers, -1)
    found = numbers.new_zeros(rows, width)
    return found.scatter_reduce_(1, places, seen, "amax")


def _depths(parents: Sequence[int]) -> list[int]:
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent == ROOT else depths[parent] + 1)
    return depths


def _pasts(tree: PendingTree | None, committed: int, rows: int) -> list[_Past]:
    """Those that there are among the rows."""
    if tree is None:
        first, last = committed // PIECE, (committed + rows - 1) // PIECE
        return [_Past(piece * PIECE, 0) for piece in range(first, last + 1)]
    found = dict[tuple[int, int], _Past]()
    assert tree.parents is not None  # of a pass
    pending = len(tree.parents)
    depths = _depths(tree.parents)
    for row in range(rows):
        node = pending - rows + row
        own = (committed + depths[node]) // PIECE * PIECE
        while node != ROOT and committed + depths[node] >= own:
            node = tree.parents[node]
        found.setdefault((own, node), _Past(own, row, node))
    return list(found.values())
