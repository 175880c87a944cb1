"""A network with its weights on a device: rows of tokens in, logits or hidden states out.

The target, a draft model and a rounded copy of the target are three of them. What the rows are for,
and which of them are kept, is the business of whoever asks.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from offload_rt.device.base import Device, DeviceBuffer, HomeSource, upload_together
from offload_rt.errors import DeviceError
from offload_rt.kv.base import KVCache
from offload_rt.model.attention_function import Segment
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.network import Crossing, Network, TokenBatch
from offload_rt.runner.experts import Pool
from offload_rt.runner.pieces import Pieces
from offload_rt.runner.static import Carried, Recordings, records
from offload_rt.runner.tree import TokenTree, looks_back, pending_tree
from offload_rt.streaming.ring import Ring, RingWatch

_log = logging.getLogger(__name__)

T = TypeVar("T")
LayerRing = Ring[int, DeviceBuffer, HomeSource]


@dataclass(frozen=True, slots=True)
class LayerRings:
    """The ring of each streamed layer: that of its device."""

    ring_of: Mapping[int, LayerRing]

    def lend(self, layer: int) -> AbstractContextManager[DeviceBuffer]:
        """Lend the image of a layer."""
        return self.ring_of[layer].lend(layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """New rows of one cache; they stay pending.

    Attributes:
        cache: takes them.
        tokens: S ids.
        places: [P] places in the sequence of all pending rows, these S the last of them.
        parents: [P] the pending row that each continues, ROOT for none; it sees that one, what that
            one sees, and itself. None: each sees all before it, and itself.
        wanted: which of the S give a result.
        keeps_all: all of them will be kept, as those of a prompt are.
        carried: hidden states that a network reads beside the tokens (`Network.mix_with`).
        hidden: [S, E] that it reads in place of them; else None.
    """

    cache: KVCache
    tokens: Sequence[int]
    places: Sequence[int]
    parents: Sequence[int] | None = None
    wanted: Sequence[int]
    keeps_all: bool = False
    carried: Carried | None = None
    hidden: torch.Tensor | None = None

    @classmethod
    def text(
        cls,
        cache: KVCache,
        tokens: Sequence[int],
        wanted: Sequence[int] | None = None,
        carried: Carried | None = None,
    ) -> "Rows":
        """Tokens in a row behind those of a cache; None wants the last one's result."""
        return cls(
            cache=cache,
            tokens=tokens,
            places=range(cache.length, cache.length + len(tokens)),
            wanted=[len(tokens) - 1] if wanted is None else wanted,
            keeps_all=True,
            carried=carried,
        )

    @classmethod
    def draft(cls, cache: KVCache, root: int, tree: TokenTree) -> "Rows":
        """A root and a draft behind it, with a result after the root and after each node."""
        return cls(
            cache=cache,
            tokens=[root, *tree.tokens],
            places=[cache.length + offset for offset in (0, *tree.depths)],
            parents=None if tree.is_chain else tree.row_parents(),
            wanted=range(len(tree) + 1),
        )


class Across(Crossing, Protocol):
    """Other machines that have layers of a network."""

    def begin(self, parts: Sequence[Rows], /) -> None:
        """Tell them of a pass."""

    def drop(self) -> None:
        """Tell them that it will not be finished."""


class Runner:
    """Makes passes of one network.

    Args:
        checkpoint: headers of the model.
        network: it, attached to its weights.
        device: where passes begin and end.
        rings: lend the streamed layers, one on each device that has any.
        streamed_bytes: what they copy in each pass.
        experts: the pool that experts come through, if they are units.
        across: other machines that have layers of it.
        target_ids: of a model that drafts, width of the target's logits; ids from there on are
            never drafted.

    Attributes:
        records_at_once: a pass is recorded when it first comes up. What is drafted then does not
            depend on what came before, to the last bit.
    """

    def __init__(  # noqa: PLR0913 - what a runner is made of, most of it by keyword
        self,
        checkpoint: Checkpoint,
        network: Network,
        device: Device,
        *,
        rings: Sequence[LayerRing] = (),
        streamed_bytes: int = 0,
        experts: Pool | None = None,
        across: Across | None = None,
        target_ids: int | None = None,
    ) -> None:
        self.network, self.device, self.target_ids = network, device, target_ids
        self.bytes_per_pass = streamed_bytes
        self.known_ids = checkpoint.embedding.shape[0]
        self._checkpoint, self._rings, self.experts = checkpoint, rings, experts
        self._across = across
        # What a replay cannot do: lend layers or experts, use the kernels of other devices, keep
        # states, look at what it computes.
        lends = bool(rings) or experts is not None or network.crosses
        looks = network.sorts_on_host and checkpoint.has_experts
        self._records = device.kind.records and not (lends or network.mixers or looks)
        whole = bool(rings) or network.crosses or network.mixers or network.exact
        pieced = device.kind.records and looks and not (whole or network.lends_scratch)
        self._pieces = Pieces(network, device) if pieced else None
        self.records_at_once = False
        self._recordings: Recordings | None = None  # made when the first pass is

    def watch(
        self,
        ring: RingWatch,
        experts: RingWatch,
        enter: Callable[[int], None],
        leave: Callable[[int], None],
    ) -> None:
        """Have passes tell of copies and of layers (`Ring.watch`, `Network.watch_layers`).

        Units of `experts` are layer and expert; `ahead` is a copy that nobody has asked for yet.
        """
        for each in self._rings:
            each.watch = ring
        if self.experts is not None:
            self.experts.watch = experts
        self._records = False  # a replay enters no layer
        self.network.watch_layers(enter, leave)

    def logits(self, parts: Sequence[Rows]) -> torch.Tensor:
        """Run one pass.

        Returns:
            [R, V] logits of the wanted rows, part after part; V is at most `target_ids`.

        Raises:
            ConfigError: a token is unknown to this model (families pad vocabularies differently).
        """
        return self._run(parts, self._logits)

    def draft_logits(self, part: Rows, *, recorded: bool = True) -> torch.Tensor:
        """Run one pass whose rows draft; recorded, where the device has passes recorded.

        Where rows carry hidden states, what the wanted ones go on from is written as they say.

        Args:
            part: the rows.
            recorded: it may be.

        Returns:
            [R, V] as `logits`, close to it but not the same bits; there until the next such pass.
        """
        found = None
        if recorded:
            found = self._recorded(
                part,
                lambda made: made.logits(
                    part.cache, part.tokens, part.places, part.parents, part.wanted, part.carried
                ),
            )
        if found is not None:
            return found
        if (carried := part.carried) is None:
            return self.logits([part])
        logits, hidden = self._run([part], self.network.logits_and_hidden)
        with torch.inference_mode():
            carried.rows.made[carried.writes : carried.writes + len(hidden)] = hidden
        return logits[:, : self.target_ids]

    def draft_chain(self, part: Rows, depth: int) -> torch.Tensor | None:
        """Feed rows, then the likeliest token after them, and so on, without a host sync.

        Returns:
            [depth] int64 ids, of which the last is not fed; all rows stay pending. None where
            passes are not recorded.
        """
        return self._recorded(
            part,
            lambda made: made.chain(part.cache, part.tokens, part.places, depth, part.carried),
        )

    def require_rows(self, tokens: Sequence[int]) -> None:
        """Refuse tokens of which one is unknown to this model.

        Raises:
            ConfigError: there is one.
        """
        if max(tokens) >= self.known_ids:
            self._checkpoint.require_rows(tokens)

    def records(self, cache: KVCache) -> bool:
        """Whether passes over a cache are recorded, and none was refused so far."""
        made = self._recordings
        return self._records and records(cache) and (made is None or not made.refused)

    def _recorded(
        self, part: Rows, make: Callable[[Recordings], torch.Tensor | None]
    ) -> torch.Tensor | None:
        """Have a recorded pass made, if passes are recorded."""
        if not self._records:
            return None
        if self._recordings is None and not self._make_room():
            return None
        self.require_rows(part.tokens)
        assert self._recordings is not None  # there was room
        self._recordings.at_once = self.records_at_once
        with self._whole_pass([part]):
            return make(self._recordings)

    def _make_room(self) -> bool:
        """Set memory aside for what recorded passes compute; where there is none, say so."""
        known = (self._checkpoint.head or self._checkpoint.embedding).shape[0]
        most = min(known, self.target_ids or known)
        try:
            self._recordings = Recordings(self.network, self.device, self.known_ids, most)
        except DeviceError as error:
            self._records = False
            _log.warning("draft passes are not recorded: %s", error)
        return self._records

    def hidden(self, parts: Sequence[Rows]) -> torch.Tensor:
        """Run one pass that leaves the output head out.

        Returns:
            [R, E] hidden states of the wanted rows: after the final norm, as the head is fed them.
        """
        return self._run(parts, self.network.hidden)

    def _logits(self, batch: TokenBatch) -> torch.Tensor:
        if self._pieces is not None and batch.hidden is None:
            made = self._pieces.logits(batch)
            if made is not None:
                return made[:, : self.target_ids]
        return self.network.forward(batch)[:, : self.target_ids]

    def _run(self, parts: Sequence[Rows], forward: Callable[[TokenBatch], T]) -> T:
        with self._whole_pass(parts), torch.inference_mode():
            batch = self._batch(parts)
            if self._across is not None:
                self._across.begin(parts)
            return forward(batch)

    def _batch(self, parts: Sequence[Rows]) -> TokenBatch:
        """Pack the rows of all sequences, and bring them to the device in one upload."""
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        trees: list[Sequence[int]] = []
        for part in parts:
            first = len(ids)
            self.require_rows(part.tokens)
            part.cache.begin_pass(len(part.tokens), keeps_all=part.keeps_all)
            ids += part.tokens
            positions += part.places[-len(part.tokens) :]
            wanted += [first + row for row in part.wanted]
            if part.parents is not None:
                trees += [looks_back(part.parents), part.places]
            if part.carried is not None and part.carried.given is None:
                trees += [part.carried.reads]
        sent = iter(upload_together(self.device, [ids, positions, wanted, *trees]))
        there = [next(sent) for _ in (ids, positions, wanted)]
        segments, states = [], []
        for part in parts:
            count, tree = len(part.tokens), None
            if part.parents is not None:
                tree = pending_tree(part.parents, next(sent), next(sent), count)
            segments.append(Segment(part.cache, count, tree, part.parents))
            if part.hidden is not None:
                states.append(part.hidden)
            if (carried := part.carried) is not None:
                states.append(carried.fed(next(sent) if carried.given is None else None))
        hidden = torch.cat(states) if states else None
        return TokenBatch(there[0], there[1], segments, there[2], hidden)

    @contextmanager
    def _whole_pass(self, parts: Sequence[Rows]) -> Iterator[None]:
        """Undo a pass that does not end: pending rows go, the rings start over."""
        try:
            yield
        except BaseException:
            for part in parts:
                part.cache.truncate(part.cache.length)
            for ring in self._rings:
                ring.restart()
            if self._across is not None:
                self._across.drop()
            raise
