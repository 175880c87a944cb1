"""Recurrent states of one sequence, beside its keys and values, with exact rollback.

A layer that mixes tokens by a recurrence (Gated DeltaNet, KDA, Mamba-2, a short convolution) keeps
a state instead of rows, and a state cannot forget a token. So it is kept at an *anchor*, a place
that is a multiple of A, together with the layer's *inputs* since then. Each pass feeds those again
before its own rows, in pieces of exactly A rows that begin at multiples of A, the last one padded
with zeros behind its rows. What a row comes to then depends on its place and on what is before it,
to the last bit, and not on how a text was cut into passes. Rejected rows are dropped from the
inputs, and nothing else happens to them.

Only committed rows move the anchor: those of a prompt at once, others in the pass after their
commit, when the layer's weights are there again. So a sequence can go back to any place from its
anchor on. Further back it can go to the end of its newest prompt, of which the state is kept, too:
a chat's next prompt begins with it. Else it begins anew.

A layer's state is where the layer computes. Of several machines each has those of its own layers,
and the first decides for all how far a sequence goes back: a pass that was given up may have moved
anchors on some machines only, so there it counts with as far as they may have moved.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.errors import CapacityError
from offload_rt.kv.base import KVCache, RowWatcher

STATES = "recurrent states"  # in a device's ledger


@dataclass(frozen=True, slots=True)
class LayerState:
    """The state of one layer behind some token, by transformers' number of it.

    Attributes:
        conv: the newest inputs of a convolution, [1, C, width] each.
        recurrent: [1, ...] each.
    """

    conv: Mapping[int, torch.Tensor] = field(default_factory=dict)
    recurrent: Mapping[int, torch.Tensor] = field(default_factory=dict)


# A piece [A, E] from a state, None at the start of a text; returns [A, E] and the state behind it.
Step = Callable[[torch.Tensor, LayerState | None], tuple[torch.Tensor, LayerState]]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows that are computed together.

    Attributes:
        rows: places among a layer's inputs, at most A.
        after: the piece whose state it begins from; None: the anchor.
        given: pairs of a place in the piece and of one among the new rows, whose result it is.
    """

    rows: tuple[int, ...]
    after: int | None
    given: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class _Kept:
    """What is kept of a layer.

    Attributes:
        anchor: tokens that are in the state.
        state: behind them; None: of no tokens.
        inputs: [R, E] of the rows since then, pending ones last; None: no rows.
    """

    anchor: int = 0
    state: LayerState | None = None
    inputs: torch.Tensor | None = None

    @property
    def stop(self) -> int:
        """The place behind its last row."""
        return self.anchor + (0 if self.inputs is None else len(self.inputs))

    def cut(self, length: int) -> None:
        """Forget rows from a place on."""
        if self.inputs is not None:
            self.inputs = self.inputs[: length - self.anchor]


class MixerStates:
    """The states of one sequence.

    Args:
        layers: that have one.
        rows: A, rows of a piece; the anchor is always a multiple of it.
        elsewhere: other machines have more such layers, and follow what becomes of these.
    """

    def __init__(self, layers: Sequence[int], rows: int, *, elsewhere: bool = False) -> None:
        self._layers, self._rows, self._elsewhere = tuple(layers), rows, elsewhere
        self.length = 0
        self._keeps_all = False
        self._forget()

    def _forget(self) -> None:
        self._kept = {layer: _Kept() for layer in self._layers}
        self._prompt: dict[int, _Kept] = {}
        self.prompt_length = 0  # of the prompt whose state is kept
        self._prompt_anchor = 0
        self._far_anchor = 0  # how far other machines' may have moved
        self.length = 0

    def begin_pass(self, rows: int, *, keeps_all: bool) -> None:
        """Say how many rows the next pass has, and whether all are kept, as those of a prompt."""
        self._keeps_all = keeps_all
        if self._elsewhere:
            reached = self._floor(self.length + (rows if keeps_all else 0))
            self._far_anchor = max(self._far_anchor, reached)

    def _floor(self, length: int) -> int:
        return length // self._rows * self._rows

    @property
    def _anchor(self) -> int:
        """The furthest of any layer."""
        return max([self._far_anchor, *(kept.anchor for kept in self._kept.values())])

    def mix(
        self,
        layer: int,
        new: torch.Tensor,
        step: Step,
        parents: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Add pending rows to a layer and compute them.

        Args:
            layer: layer index.
            new: [S, E] inputs.
            step: computes a piece.
            parents: [P] of all pending rows, these S the last of them, the one that each continues,
                or -1. None: each continues the one before it.

        Returns:
            [S, E].
        """
        kept = self._kept[layer]
        before = 0 if kept.inputs is None else len(kept.inputs)
        rows = new.clone() if kept.inputs is None else torch.cat([kept.inputs, new])
        committed = max(0, self.length - kept.anchor)  # of them; the anchor is ahead amid a prompt
        standing = self._standing(kept, len(rows))
        out = torch.empty_like(new)
        behind: dict[int, LayerState] = {}
        moved, last = 0, kept.state
        pieces = _pieces(before, len(new), committed, parents, self._rows)
        waiting = Counter(piece.after for piece in pieces)
        for number, piece in enumerate(pieces):
            state = kept.state if piece.after is None else behind[piece.after]
            waiting[piece.after] -= 1
            if piece.after is not None and not waiting[piece.after]:
                del behind[piece.after]
            made, state = step(self._padded(_taken(rows, piece.rows)), state)
            if waiting[number]:
                behind[number] = state
            for run in _runs(piece.given):
                out[run[0][1] : run[-1][1] + 1] = made[run[0][0] : run[-1][0] + 1]
            if piece.rows[-1] == moved + self._rows - 1 < standing:
                moved += self._rows  # in order: what stands is a chain
                last = state
        if moved:
            kept.state, kept.anchor = last, kept.anchor + moved
            rows = rows[moved:].clone()  # what lies before it goes
        kept.inputs = rows
        return out

    def _standing(self, kept: _Kept, rows: int) -> int:
        """How many of a layer's rows are kept for good, and may move its anchor."""
        return rows if self._keeps_all else self.length - kept.anchor

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, E] as a whole piece [A, E]: rows behind the last change nothing before them."""
        lacking = self._rows - len(rows)
        return rows if not lacking else torch.cat([rows, rows.new_zeros(lacking, rows.shape[1])])

    def commit(self, keep: Sequence[int]) -> None:
        """Keep the pending rows with these indices, in this order; forget the rest.

        Raises:
            CapacityError: an index is not a pending row, or a prompt is not kept whole.
        """
        stops = [kept.stop for kept in self._kept.values()]
        most = self.length + max(keep, default=-1) + 1
        pending = min(stops, default=most) - self.length
        if any(not 0 <= row < pending for row in keep):
            raise CapacityError(f"cannot keep rows {list(keep)}: {pending} rows are pending")
        length = self.length + len(keep)
        chain = list(keep) == list(range(len(keep)))
        if self._keeps_all and not (chain and len(keep) == pending):
            raise CapacityError(f"cannot keep {len(keep)} of {pending} rows of a prompt's pass")
        for kept in self._kept.values():
            if not chain:
                assert kept.inputs is not None  # there are pending rows
                first = self.length - kept.anchor
                index = [*range(first), *(first + row for row in keep)]
                kept.inputs = kept.inputs[torch.tensor(index, device=kept.inputs.device)]
            kept.cut(length)
        self.length = length
        if self._keeps_all and keep:
            self._prompt = {layer: replace(kept) for layer, kept in self._kept.items()}
            self.prompt_length, self._prompt_anchor = length, self._anchor
        self._keeps_all = False

    def reach(self, length: int) -> int:
        """The last place up to `length` that the sequence can go back to."""
        if length >= self._anchor:
            return min(length, self.length)
        return min(length, self.prompt_length) if self._prompt_anchor <= length else 0

    def truncate(self, length: int) -> int:
        """Forget pending rows and all committed rows from `length` on, and more where it must.

        Returns:
            the tokens that are left: `reach(length)`.

        Raises:
            CapacityError: there are not so many.
        """
        if not 0 <= length <= self.length:
            raise CapacityError(f"cannot go back to {length} tokens: {self.length} are cached")
        reached = self.reach(length)
        self._keeps_all = False
        if reached == 0:
            self._forget()
            return 0
        if reached < self._anchor:
            self._kept = {layer: replace(kept) for layer, kept in self._prompt.items()}
        for kept in self._kept.values():
            kept.cut(reached)
        self._far_anchor = min(self._far_anchor, self._floor(reached))
        if reached < self.prompt_length:  # and not below its anchor
            self._prompt = {layer: replace(kept) for layer, kept in self._prompt.items()}
            for kept in self._prompt.values():
                kept.cut(reached)
            self.prompt_length = reached
        self.length = reached
        return reached

    def state(self, layer: int) -> tuple[int, LayerState | None, torch.Tensor | None]:
        """What is kept of a layer: its anchor, the state there, and the inputs since then."""
        kept = self._kept[layer]
        return kept.anchor, kept.state, kept.inputs


def _pieces(
    before: int, new: int, committed: int, parents: Sequence[int] | None, size: int
) -> list[_Piece]:
    """Cut the rows of a layer into pieces, for each path down a tree those that others lack.

    Depth first, so that no more states wait than pieces that a path down a tree fills, and one.

    Args:
        before: rows that are there already.
        new: rows to compute.
        committed: rows of those that are there that stand.
        parents: as of `MixerStates.mix`.
        size: rows of a piece.
    """
    total = before + new
    if parents is None:
        paths = [tuple(range(total))]
    else:
        paths = [path for path in _paths(parents, committed, total) if path[-1] >= before]
    made: dict[tuple[int, ...], int] = {}
    pieces: list[_Piece] = []
    done: set[int] = set()
    for path in paths:
        after = None
        for start in range(0, len(path), size):
            rows = path[start : start + size]
            key = path[: start + len(rows)]
            if key not in made:
                fresh = [(at, row) for at, row in enumerate(rows) if row >= before]
                given = tuple((at, row - before) for at, row in fresh if row not in done)
                done |= {row for _, row in fresh}
                made[key] = len(pieces)
                pieces.append(_Piece(rows, after, given))
            after = made[key]
    return pieces


def _paths(parents: Sequence[int], committed: int, total: int) -> list[tuple[int, ...]]:
    """From the anchor to each leaf of a tree: what stands, then pending rows."""
    assert committed + len(parents) == total
    inner = set(parents)
    stands = tuple(range(committed))
    ways: list[tuple[int, ...]] = []
    for row, parent in enumerate(parents):
        ways.append((*(stands if parent < 0 else ways[parent]), committed + row))
    return sorted(way for row, way in enumerate(ways) if row not in inner)  # depth first


def _taken(rows: torch.Tensor, index: tuple[int, ...]) -> torch.Tensor:
    """Some rows: a view where they follow each other."""
    if index == tuple(range(index[0], index[0] + len(index))):
        return rows[index[0] : index[0] + len(index)]
    return rows[torch.tensor(index, device=rows.device)]


def _runs(given: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Pairs that follow each other on both sides, together."""
    runs: list[list[tuple[int, int]]] = []
    for pair in given:
        if runs and (runs[-1][-1][0] + 1, runs[-1][-1][1] + 1) == pair:
            runs[-1].append(pair)
        else:
            runs.append([pair])
    return runs


class HybridKV:
    """A cache of a model of which some layers have a state, and some keys and values.

    A layer may have either, both, or neither.

    Args:
        rows: keys and values of the layers that attend, numbered from 0.
        states: of the others.
        attending: layers that attend, ascending.
    """

    def __init__(self, rows: KVCache, states: MixerStates, attending: Sequence[int]) -> None:
        self.rows, self.states = rows, states
        self._number = {layer: number for number, layer in enumerate(attending)}

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self.states.length

    @property
    def capacity(self) -> int:
        """Tokens there is room for, pending ones included."""
        return self.rows.capacity

    def begin_pass(self, rows: int, *, keeps_all: bool) -> None:
        """Say what the next pass is."""
        self.rows.begin_pass(rows, keeps_all=keeps_all)
        self.states.begin_pass(rows, keeps_all=keeps_all)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add pending rows: key [K, S, D], value [K, S, D]."""
        self.rows.append(self._number[layer], key, value)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None = None,
        watcher: RowWatcher | None = None,
    ) -> torch.Tensor:
        """Attend from the last rows appended: query [H, S, D] gives [S, H, D]."""
        assert watcher is None  # nothing follows the rows of such a model
        return self.rows.attend(self._number[layer], query, spec, tree)

    def commit(self, keep: Sequence[int]) -> None:
        """Keep these pending rows, in this order; forget the rest."""
        self.rows.commit(keep)
        self.states.commit(keep)

    def truncate(self, length: int) -> None:
        """Forget pending rows and all committed rows from `length` on, and more where it must."""
        self.rows.truncate(self.states.truncate(length))
