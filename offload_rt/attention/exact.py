"""Attention whose bits for a row depend on the row and its past alone, not on the pass it is in.

Kernels pick the order of their sums by the shapes they are given. So shapes follow from a row's
position here, and from nothing else:

    columns [0, own)      whole multiples of `PIECE`, in parts of `PART` from the first on
    columns [own, + 64)   the piece the row itself is in; what comes after the row is masked

Rows are attended together if they share a piece. Of a tree, each row's path is put into consecutive
columns, as a chain has it: in scattered columns not one row of 50 had the bits of a chain
(docs/RESULTS.md, "Row-invariant passes"). Where there is a kernel for a layer's heads
(`kernels/attending.py`) it goes over the columns piece by piece. Else scores are written out in
fp32, rows padded to a multiple of `TILE`, and parts are merged by the number of columns, never by
how many came at once. A layer has the one or the other in all its passes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Protocol

import torch

from offload_rt.attention.blocks import KEY_BLOCK, PIECE, SCORE_BYTES, TILE
from offload_rt.attention.fixed import FixedAttention, first_seen, wide
from offload_rt.attention.partial import UNSEEN
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.kernels import attending
from offload_rt.kernels.tiles import evenly

PART = KEY_BLOCK  # columns
MERGE_AT = 8  # parts
_PLANS_KEPT = 16  # of trees: those of a pass
assert attending.COLUMNS == PIECE


def attend_exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spec: AttentionSpec,
    tree: PendingTree | None = None,
) -> torch.Tensor:
    """Attend from the last S of T rows to all of them, causally or along a tree.

    Args:
        query: [H, S, D].
        key: [K, T, D], from the first row of the sequence on; the last S are the query's own.
        value: [K, T, D].
        spec: how the layer attends.
        tree: which of the last rows each query row sees; None: all before it, and itself.

    Returns:
        [S, H, D].
    """
    rows, (kv_heads, cached, _) = query.shape[1], key.shape
    committed = cached - (rows if tree is None else tree.positions.numel())
    attention = exact_attention(query, (kv_heads, value.shape[2]), spec, committed, tree)
    for start in range(0, attention.tail, PART):
        part = slice(start, start + PART)
        attention.add(start, key[:, part], value[:, part])
    return attention.result(key[:, attention.tail :], value[:, attention.tail :])


class ExactAttention(Protocol):
    """Attention of one query to committed rows that come part by part, then to the rest."""

    @property
    def tail(self) -> int:
        """The first column that is in no whole part of committed ones."""

    def add(self, start: int, key: torch.Tensor, value: torch.Tensor, /) -> None:
        """Attend to the committed columns from `start`: [K, PART, D] each; part after part."""

    def result(self, key: torch.Tensor, value: torch.Tensor, /) -> torch.Tensor:
        """Attend to the columns from `tail` on: [K, T, D] each, all pending ones last.

        Returns:
            [S, H, D].
        """


def exact_attention(
    query: torch.Tensor,
    kv: tuple[int, int],
    spec: AttentionSpec,
    committed: int,
    tree: PendingTree | None = None,
) -> ExactAttention:
    """Begin to attend, by a kernel of our own where there is one for such heads.

    Args:
        query: [H, S, D].
        kv: K, and D of values.
        spec: how the layer attends.
        committed: columns before the pending ones.
        tree: which pending rows each sees; None: the query's own, each all before it.
    """
    if spec.fixed:
        return FixedAttention(query, kv, spec, committed, tree)
    made = _Assembled if is_assembled(query, kv[1], spec) else _WrittenOut
    return made(query, kv, spec, committed, tree)


def is_assembled(query: torch.Tensor, value_dim: int, spec: AttentionSpec) -> bool:
    """Whether a kernel of our own attends from query [H, S, D] to values of so many numbers."""
    capped = spec.softcap is not None
    there = spec.exact and not spec.fixed
    return there and attending.takes(query.dtype, query.shape[2], value_dim, capped=capped)


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Query rows that share a piece, and all that comes before it.

    Attributes:
        rows: which of the query.
        own: column at which their piece begins.
        at: [n] position of each.
        places: [n] the same as `rows`.
        path: pending rows in the columns from the committed ones up to `own`, of a tree.
        piece: [n, PIECE] of a tree, what is in each column of the piece: a number of a row, counted
            from the first that is committed and in the piece; None: rows as they lie.
    """

    rows: slice | torch.Tensor
    own: int
    at: torch.Tensor
    places: torch.Tensor
    path: torch.Tensor | None = None
    piece: torch.Tensor | None = None


class _Assembled:
    """By `kernels/attending.py`, which needs no merging: each row is carried on tile by tile."""

    def __init__(
        self,
        query: torch.Tensor,
        kv: tuple[int, int],
        spec: AttentionSpec,
        committed: int,
        tree: PendingTree | None,
    ) -> None:
        self._committed, self.tail = committed, committed // PART * PART
        self._window = spec.window
        self._out = query.new_empty(query.shape[1], query.shape[0], kv[1])
        self._groups = _groups(tree, committed, query.shape[1], PIECE, query.device)
        at, self._places = (
            torch.cat([getattr(group, name) for group in self._groups]) for name in ("at", "places")
        )
        order = None if tree is None else self._places
        self._seen = _attending(query, kv, spec, at, order)
        self._first = [0, *accumulate(len(group.at) for group in self._groups)]

    def add(self, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """As of `ExactAttention`."""
        key, value = _in_lines(key), _in_lines(value)
        reads = []
        for place, group in zip(self._first, self._groups, strict=False):
            first = max(start, first_seen(group.own, self._window))
            if (tiles := (start + PART - first) // PIECE) > 0:
                index = _columns_from(first - start, PART)
                read = attending.Read(index, 0, place, len(group.at), tiles, first, PART - 1)
                reads.append([*attending.lie(key, value), *read])
        if reads:
            self._seen.add(torch.tensor(reads))

    def result(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """As of `ExactAttention`."""
        key, value = _in_lines(key), _in_lines(value)
        past = _Past(self._committed, self.tail, key.shape[1] - 1)
        kept, where = list[torch.Tensor](), attending.lie(key, value)
        reads = [
            [*where, *_read(group, place, past, self._window, kept)]
            for place, group in zip(self._first, self._groups, strict=False)
        ]
        self._seen.add(torch.tensor(reads), (self._out, self._places))
        return self._out


class PackedAttention:
    """Attention of several sequences at once, by one call of the kernel in each layer of a pass.

    Args:
        parts: of each sequence, rows in its cache before those of the pass, how many these are,
            and which pending rows they see (`attend_exact`).
    """

    def __init__(self, parts: Sequence[tuple[int, int, PendingTree | None]]) -> None:
        self._groups: list[tuple[_Group, int, _Past]] = []  # with the number of its first token
        at, order, sequence = list[int](), list[int](), list[int]()
        moves, start, host = list[list[int]](), 0, torch.device("cpu")
        for number, (before, rows, tree) in enumerate(parts):
            committed = before if tree is None else before + rows - tree.positions.numel()
            past = _Past(committed, 0, before + rows - 1)
            for group in _groups(tree, committed, rows, PIECE, host):
                self._groups.append((group, len(at), past))
                at += group.at.tolist()
                order += [start + place for place in group.places.tolist()]
                sequence.append(number)
            moves.append([before, start, rows])
            start += rows
        self._at, self._order = torch.tensor(at), torch.tensor(order)
        self._moves, self._sequence = torch.tensor(moves), torch.tensor(sequence)
        self._in_order = order == list(range(start))
        self._reads: dict[int | None, torch.Tensor] = {}  # by window
        self._kept: list[torch.Tensor] = []

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        where: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Write the new rows of all sequences, and attend from them.

        Args:
            query: [H, S, D], one sequence after the other.
            key: [K, S, D], likewise.
            value: [K, S, D].
            where: [sequences, 6] int64, where each has its rows of the layer (`attending.lie`).
            spec: how the layer attends; `is_assembled`.

        Returns:
            [S, H, D].
        """
        assert query.dtype == key.dtype == value.dtype  # as the caches have it
        if spec.window not in self._reads:
            made = [_read(*group, spec.window, self._kept) for group in self._groups]
            self._reads[spec.window] = torch.tensor(made)
        reads = torch.cat([where[self._sequence], self._reads[spec.window]], dim=1)
        new = attending.New(
            _in_lines(key), _in_lines(value), torch.cat([where, self._moves], dim=1)
        )
        kv, order = (key.shape[0], value.shape[2]), None if self._in_order else self._order
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        seen = _attending(query, kv, spec, self._at, order)
        seen.add(reads, (out, self._order), new)
        return out


@dataclass(frozen=True, slots=True)
class _Past:
    """What a sequence has in memory when it attends.

    Attributes:
        committed: columns before the pending ones.
        tail: the first column that is there.
        last: number of the last row that is there, counted from `tail`.
    """

    committed: int
    tail: int
    last: int


def _attending(
    query: torch.Tensor,
    kv: tuple[int, int],
    spec: AttentionSpec,
    at: torch.Tensor,
    order: torch.Tensor | None,
) -> attending.Attending:
    """Begin to attend from query [H, S, D].

    Args:
        query: of all tokens.
        kv: K, and D of values.
        spec: how the layer attends.
        at: [S] positions, in the order that tokens are read for.
        order: [S] which tokens those are; None: one after the other.
    """
    sinks = None if spec.sinks is None else spec.sinks.float().contiguous()
    way = attending.Way(scaling=spec.scaling, window=spec.window, cap=spec.softcap, sinks=sinks)
    grouped = query.unflatten(0, (kv[0], -1)).transpose(1, 2)  # [K, S, G, D]
    grouped = grouped if order is None else grouped[:, order]
    rows = grouped.contiguous().view(kv[0], -1, query.shape[2])
    return attending.Attending(rows, at, kv[1], way)


def _read(
    group: _Group, first_token: int, past: _Past, window: int | None, kept: list[torch.Tensor]
) -> attending.Read:
    """What a group reads behind the whole parts, up to its own piece; what that is in is `kept`."""
    committed, tail = past.committed, past.tail
    first = max(tail, first_seen(group.own, window))
    index, piece, stop = _columns_from(first - tail, group.own + PIECE - tail), 0, group.own + PIECE
    if group.piece is not None:
        kept.append(group.piece + (min(group.own, committed) - tail))
        piece, stop = kept[-1].data_ptr(), max(first, group.own)
        if group.path is not None:
            before = torch.arange(first, max(first, committed))
            path = (group.path + committed)[max(0, first - committed) :]
            kept.append(torch.cat([before, path]) - tail)
            index = kept[-1].data_ptr()
    tiles = (stop - first) // PIECE
    return attending.Read(index, piece, first_token, len(group.at), tiles, first, past.last)


def _in_lines(rows: torch.Tensor) -> torch.Tensor:
    """[K, T, D] whose numbers of a row lie side by side."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _columns_from(first: int, stop: int) -> int:
    """Address of the numbers from `first` to `stop`."""
    return _counted(1 << (stop - 1).bit_length()).data_ptr() + first * 8


@cache
def _counted(count: int) -> torch.Tensor:
    return torch.arange(count)


class _WrittenOut:
    """With scores that are written out, by torch's products."""

    def __init__(
        self,
        query: torch.Tensor,
        kv: tuple[int, int],
        spec: AttentionSpec,
        committed: int,
        tree: PendingTree | None,
    ) -> None:
        heads, self._rows, _ = query.shape
        kv_heads = kv[0]
        self._heads, self._spec, self._like = heads // kv_heads, spec, query
        self._committed, self.tail = committed, committed // PART * PART
        most = max(1, SCORE_BYTES // (heads * (PART + PIECE) * 4))
        self._groups = _groups(tree, committed, self._rows, most, query.device)
        wide = query.unflatten(0, (kv_heads, -1)).float() * spec.scaling  # [K, G, S, D]
        self._queries = [_tiled(wide[:, :, group.rows].flatten(1, 2)) for group in self._groups]
        self._parts: list[list[_Part]] = [[] for _ in self._groups]

    def add(self, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """As of `ExactAttention`."""
        window = self._spec.window
        seeing = [n for n, g in enumerate(self._groups) if first_seen(g.own, window) < start + PART]
        if not seeing:  # out of sight for all rows there may be in their pieces
            return
        key, value = wide(key), wide(value)
        for number in seeing:
            self._add_whole(number, start, key, value)

    def result(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """As of `ExactAttention`."""
        done = [self._finished(number, key, value) for number in range(len(self._groups))]
        if len(done) == 1 and isinstance(self._groups[0].rows, slice):
            return done[0]
        out = done[0].new_empty(self._rows, *done[0].shape[1:])
        for group, rows in zip(self._groups, done, strict=True):
            out[group.rows] = rows
        return out

    def _finished(self, number: int, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """A group's rows [n, H, D]."""
        group, tail, count = self._groups[number], self.tail, len(self._groups[number].at)
        past = [_before(rows, group, self._committed - tail, tail) for rows in (key, value)]
        start = tail
        while start + PART <= group.own:
            part = slice(start - tail, start - tail + PART)
            self._add_whole(number, start, *(wide(rows[:, part]) for rows in past))
            start += PART
        first = max(start, first_seen(group.own, self._spec.window))
        past = [wide(rows[:, first - tail :]) for rows in past]
        own = group.own if group.piece is None else min(group.own, self._committed)
        behind = [rows[:, own - tail :] for rows in (key, value)]
        self._add_last(number, first, past, behind)
        parts = self._parts[number]
        if (sinks := self._spec.sinks) is not None:
            nothing, sums = parts[0]
            given = sinks.float().view(-1, self._heads, 1).expand(-1, -1, count)
            filled = torch.zeros_like(sums)
            filled[:, : self._heads * count] = given.flatten(1)
            parts.append((torch.zeros_like(nothing), filled))
        out = parts[0][0] if len(parts) == 1 else _merge(parts)[0]
        out = out[:, : self._heads * count].unflatten(1, (self._heads, count))
        return out.permute(2, 0, 1, 3).flatten(1, 2).to(self._like.dtype)

    def _add_whole(self, number: int, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Attend to columns [start, start + PART), in fp32, all before the group's piece."""
        group = self._groups[number]
        first = max(start, first_seen(group.own, self._spec.window))
        if first >= start + PART:
            return
        key, value = key[:, first - start :], value[:, first - start :]
        scores = self._scores(number, key)
        self._hide(scores, group, first)
        weights = torch.softmax(scores, dim=-1)
        self._append(number, torch.matmul(weights, value), scores, weights)

    def _add_last(
        self, number: int, first: int, past: list[torch.Tensor], behind: list[torch.Tensor]
    ) -> None:
        """Attend to columns from `first` on, of which `past` are before the group's piece."""
        group, width = self._groups[number], past[0].shape[1]
        if group.piece is None:
            behind = [rows[:, :PIECE] for rows in behind]
        key, value = (_filled(rows) for rows in behind)
        if group.piece is None:
            scores = self._scores(number, torch.cat([past[0], key], dim=1))
        else:
            found = self._scores(number, key)
            scores = found.new_zeros(*found.shape[:2], width + PIECE)
            if width:
                scores[..., :width] = self._scores(number, past[0])
            index = group.piece.expand(found.shape[0], self._heads, -1, -1)
            shown, target = self._by_row(found, group), self._by_row(scores, group)
            target[..., width:] = shown.gather(-1, index)
        self._hide(scores, group, first, group.own)
        weights = torch.softmax(scores, dim=-1)
        own = weights[..., width:]
        if group.piece is None:
            out = torch.matmul(own, value)
        else:  # [K, n, G, PIECE] and [K, n, PIECE, D]
            by_row = _tiled(self._by_row(own, group).transpose(1, 2))
            made = torch.matmul(by_row, value[:, group.piece])[:, :, : self._heads]
            out = _tiled(made.transpose(1, 2).flatten(1, 2))
        if width:
            out = torch.matmul(weights[..., :width], past[1]) + out
        self._append(number, out, scores, weights)

    def _scores(self, number: int, key: torch.Tensor) -> torch.Tensor:
        """[K, R, columns] of a group's rows and keys [K, columns, D]."""
        scores = torch.matmul(self._queries[number], key.transpose(1, 2))
        cap = self._spec.softcap
        return scores if cap is None else evenly(torch.tanh, scores / cap) * cap

    def _by_row(self, numbers: torch.Tensor, group: _Group) -> torch.Tensor:
        """[K, R, ...] without what fills it up: a view [K, G, n, ...]."""
        count = len(group.at)
        return numbers[:, : self._heads * count].unflatten(1, (self._heads, count))

    def _hide(
        self, scores: torch.Tensor, group: _Group, first: int, own: int | None = None
    ) -> None:
        """Hide what rows do not see of columns from `first` on; of their piece, what is later."""
        width, window = scores.shape[-1], self._spec.window
        at = group.at[:, None]
        if window is not None:
            columns = torch.arange(first, first + width, device=scores.device)
            hidden = columns <= at - window
            if own is not None:
                hidden |= columns > at
            self._by_row(scores, group).masked_fill_(hidden, UNSEEN)
        elif own is not None:
            columns = torch.arange(own, own + PIECE, device=scores.device)
            piece = self._by_row(scores, group)[..., width - PIECE :]
            piece.masked_fill_(columns > at, UNSEEN)

    def _append(
        self, number: int, out: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor
    ) -> None:
        parts = self._parts[number]
        # The largest weight is exp(largest score - log of the sum).
        parts.append((out, scores.amax(dim=-1) - evenly(torch.log, weights.amax(dim=-1))))
        if len(parts) == MERGE_AT:
            self._parts[number] = [_merge(parts)]


_Part = tuple[torch.Tensor, torch.Tensor]  # [K, R, D] and its log-sum-exp [K, R], fp32


def _merge(parts: list[_Part]) -> _Part:
    """One part of several, each row by itself."""
    sums = torch.stack([lse for _, lse in parts], dim=-1)  # [K, R, P]
    weights = torch.softmax(sums, dim=-1)
    out = parts[0][0] * weights[..., :1]
    for place, (part, _) in enumerate(parts[1:], 1):
        out += part * weights[..., place : place + 1]
    return out, sums.amax(dim=-1) - evenly(torch.log, weights.amax(dim=-1))


def _before(rows: torch.Tensor, group: _Group, committed: int, tail: int) -> torch.Tensor:
    """Rows [K, T, D] before a group's piece, of which so many are committed."""
    if group.path is None:
        return rows[:, : group.own - tail]
    return torch.cat([rows[:, :committed], rows[:, committed:][:, group.path]], dim=1)


def _tiled(rows: torch.Tensor) -> torch.Tensor:
    """[..., R, D] with rows of zeros up to a multiple of `TILE`."""
    return _padded(rows, TILE)


def _filled(rows: torch.Tensor) -> torch.Tensor:
    """[K, T, D] in fp32 with zeros up to a multiple of `PIECE`."""
    return _padded(wide(rows), PIECE)


def _padded(rows: torch.Tensor, unit: int) -> torch.Tensor:
    missing = -rows.shape[-2] % unit
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()


def _groups(
    tree: PendingTree | None, committed: int, rows: int, most: int, device: torch.device
) -> tuple[_Group, ...]:
    """Rows that are attended together, at most so many."""
    if tree is None:
        return _of_chain(committed, rows, most, device)
    return _of_tree(tree, committed, most)


@lru_cache(maxsize=64)
def _of_chain(committed: int, rows: int, most: int, device: torch.device) -> tuple[_Group, ...]:
    """Rows by their piece, at most so many together."""
    groups, start = [], committed
    while start < committed + rows:
        own = start // PIECE * PIECE
        stop = min(own + PIECE, start + most, committed + rows)
        at = torch.arange(start, stop, device=device)
        groups.append(_Group(slice(start - committed, stop - committed), own, at, at - committed))
        start = stop
    return tuple(groups)


_plans: "OrderedDict[tuple[int, int, int], tuple[PendingTree, tuple[_Group, ...]]]" = OrderedDict()


def _of_tree(tree: PendingTree, committed: int, most: int) -> tuple[_Group, ...]:
    """The same of a tree; found once for all layers."""
    key = id(tree), committed, most
    if key not in _plans:  # kept with the tree, so that no other one has its number
        _plans[key] = tree, tuple(_groups_of_tree(tree, committed, most))
        while len(_plans) > _PLANS_KEPT:
            _plans.popitem(last=False)
    return _plans[key][1]


def _groups_of_tree(tree: PendingTree, committed: int, most: int) -> list[_Group]:
    """Rows by their piece and their path up to it."""
    device = tree.visible.device
    paths = [  # parents come before children, so a path is in the order of its places
        [row for row, seen in enumerate(line) if seen] for line in tree.visible.tolist()
    ]  # host sync
    by_past: dict[tuple[int, ...], list[int]] = {}
    for row, path in enumerate(paths):
        own = (committed + len(path) - 1) // PIECE * PIECE
        by_past.setdefault((own, *path[: max(0, own - committed)]), []).append(row)
    groups = []
    for (own, *past), members in by_past.items():
        for start in range(0, len(members), most):
            rows = members[start : start + most]
            places = torch.tensor(rows, device=device)
            before = max(0, committed - own)  # committed rows in the piece
            pieces = []
            for row in rows:
                there = [*range(before), *(before + p for p in paths[row][len(past) :])]
                pieces.append([*there, *[there[-1]] * (PIECE - len(there))])
            groups.append(
                _Group(
                    rows=places,
                    places=places,
                    own=own,
                    at=torch.tensor(
                        [committed + len(paths[row]) - 1 for row in rows], device=device
                    ),
                    path=torch.tensor(past, device=device) if past else None,
                    piece=torch.tensor(pieces, device=device),
                )
            )
    return groups
