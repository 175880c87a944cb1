"""Lend experts as tokens ask for them, from a pool of slots."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic

from offload_rt.device.base import CopyStream, Event, Stream
from offload_rt.streaming.ring import BufferT, RingWatch, SourceT


@dataclass(slots=True, eq=False)
class ExpertSlot(Generic[BufferT]):
    """One device buffer, large enough for any expert.

    Attributes:
        filled: copy stream: the copy into `buffer` is done; None once somebody waited for it.
        drained: compute stream: the last kernel reading `buffer` is done.
    """

    buffer: BufferT
    filled: Event | None = None
    drained: Event | None = None


@dataclass(slots=True)
class ExpertCounts:
    """What was asked of a pool.

    Attributes:
        hits: experts that were there when a layer asked for them.
        misses: experts that were copied.
        calls: times a layer asked, by rows of the pass (`row_class`).
        distances: by the same, how often an expert was asked for that was the
            n-th most recently used of its layer, counted from 0; last of those never used before.
            The hits of every size of pool at once (Mattson's stack distances).
    """

    hits: int = 0
    misses: int = 0
    calls: dict[int, int] = field(default_factory=dict)
    distances: dict[int, list[int]] = field(default_factory=dict)


def row_class(rows: int) -> int:
    """Passes of like numbers of rows: 1, 2, 3 to 4, 5 to 8, 9 to 16, ... as 0, 1, 2, 3, 4, ..."""
    return (rows - 1).bit_length()


def shares_of(slots: int, layers: int, per_token: int) -> tuple[int, int]:
    """Slots that each layer keeps, and those that the layer that computes has besides.

    A token's experts are to be on their way together, so a layer computes with `per_token` slots at
    least. Where slots suffice for that in each layer, all are dealt out.
    """
    share = slots // layers
    if share < per_token:
        share = (slots - per_token) // layers
    return share, slots - share * layers


class ExpertPool(Generic[BufferT, SourceT]):
    """Slots for experts, a share for each layer, the least recently used of it replaced.

    One order for all layers would replace all of a pass by the next one where the pool holds less
    than a pass asks for: layers come in a cycle. So a layer replaces its own experts only. What a
    layer asks for and has comes first, while the rest is on its way. A slot that was computed from
    may take the next of them, so a layer that asks for more than there are slots has them all in
    turn. While a prompt goes through a layer in several parts (`begin`), the layer takes what other
    layers have, those first that come last, so that no part reads again what the one before it
    read; of these slots it keeps its share when the next layer begins.

    The two event waits of a ring keep slots safe: compute waits `filled` before reading a slot,
    copy waits `drained` before overwriting it. A slot has one writer, the copy stream, and it is
    asked to write only after whoever reads it has enqueued that (a slot is taken when it was not
    asked for in this call, or was handed back).

    Args:
        counts: experts of each layer that has some.
        slots: the buffers; kept for the whole run.
        per_token: experts a token is sent to.
        copy: the stream that fills slots.
        compute: the stream that reads them.
        source: the bytes of an expert of a layer at their home.
        place: where these lie, for a disk.
    """

    def __init__(  # noqa: PLR0913 - as a ring, all by keyword
        self,
        *,
        counts: Mapping[int, int],
        slots: Sequence[BufferT],
        per_token: int,
        copy: CopyStream[BufferT, SourceT],
        compute: Stream,
        source: Callable[[int, int], SourceT],
        place: Callable[[int, int], tuple[str, int]],
    ) -> None:
        self._copy, self._compute, self._source, self._place = copy, compute, source, place
        self._free = [ExpertSlot(buffer) for buffer in slots]
        self._slots = len(slots)
        self.share, self._spare = shares_of(len(slots), len(counts), per_token)
        self._counts = dict(counts)
        self._held: dict[int, dict[int, ExpertSlot[BufferT]]] = {layer: {} for layer in counts}
        self._recent: dict[int, list[int]] = {layer: [] for layer in counts}
        self._layer: int | None = None
        self._takes = False
        self.counts = ExpertCounts()
        self.watch: RingWatch | None = None

    def held(self, layer: int) -> list[int]:
        """Experts of a layer that are there or on their way, least recently used first."""
        return list(self._held[layer])

    def begin(self, layer: int, parts: int) -> None:
        """A layer begins, in so many parts."""
        if (before := self._layer) is not None:
            self._trim(before)
        self._layer, self._takes = layer, parts > 1

    def lend(
        self, layer: int, needed: Sequence[int], rows: int = 1
    ) -> Iterator[tuple[int, BufferT]]:
        """Lend experts, each until the next is asked for.

        Args:
            layer: whose.
            needed: which, each once, the one that was used last as the last.
            rows: of the pass, that ask for them.

        Returns:
            Each with its buffer: those that are there, then the others as they come.
        """
        if layer != self._layer:
            self.begin(layer, 1)
        held = self._held[layer]
        hits = [expert for expert in needed if expert in held]
        missing = sorted((e for e in needed if e not in held), key=lambda e: self._place(layer, e))
        self._count(layer, needed, len(hits), rows)
        slots = {expert: held.pop(expert) for expert in hits}
        held.update(slots)  # as the most recently used, whatever becomes of this call
        queue, coming, lent = deque(missing), deque[int](), set(hits)
        self._load(layer, queue, coming, lent)
        for expert in hits:
            yield from self._use(layer, expert, slots[expert])
            lent.discard(expert)
            self._load(layer, queue, coming, lent)
        while coming:
            expert = coming.popleft()
            yield from self._use(layer, expert, held[expert])
            lent.discard(expert)
            self._load(layer, queue, coming, lent)
        assert not queue  # a slot that was handed back is there for the next
        ordered = {expert: held.pop(expert) for expert in needed if expert in held}
        held.update(ordered)

    def _use(
        self, layer: int, expert: int, slot: ExpertSlot[BufferT]
    ) -> Iterator[tuple[int, BufferT]]:
        """Lend one that is there or on its way; one that cannot be read is not there afterwards."""
        if slot.filled is not None:
            end = None if self.watch is None else self.watch("wait", layer, self._compute)
            try:
                self._compute.wait(slot.filled)
            except BaseException:
                self._free.append(self._held[layer].pop(expert))
                raise
            slot.filled = None
            if end is not None:
                end()
        try:
            yield expert, slot.buffer
        finally:
            slot.drained = self._compute.record()

    def _load(self, layer: int, queue: deque[int], coming: deque[int], lent: set[int]) -> None:
        """Have as many experts copied as there are slots for."""
        while queue:
            slot = self._take(layer, lent)
            if slot is None:
                return
            expert = queue.popleft()
            for event in (slot.drained, slot.filled):  # still on its way: a pass broke off
                if event is not None:
                    self._copy.wait(event)
            end = None if self.watch is None else self.watch("copy", layer, self._copy)
            self._copy.copy(slot.buffer, self._source(layer, expert))
            slot.filled, slot.drained = self._copy.record(), None
            if end is not None:
                end()
            self._held[layer][expert] = slot
            coming.append(expert)
            lent.add(expert)

    def _take(self, layer: int, lent: set[int]) -> ExpertSlot[BufferT] | None:
        """A slot: a free one, else one of the layer's own, else in parts one of another layer's."""
        held = self._held[layer]
        room = len(held) < (self._slots if self._takes else self.share + self._spare)
        if room and self._free:
            return self._free.pop()
        if room and self._takes and (slot := self._from_others(layer)) is not None:
            return slot
        victim = next((expert for expert in held if expert not in lent), None)
        return None if victim is None else held.pop(victim)

    def _from_others(self, layer: int) -> ExpertSlot[BufferT] | None:
        """The least recently used of the layer that comes last, else of one that has most."""
        later = [other for other, has in self._held.items() if other > layer and has]
        before = [other for other, has in self._held.items() if other < layer and has]
        if not (later or before):
            return None
        other = max(later) if later else max(before, key=lambda one: len(self._held[one]))
        has = self._held[other]
        return has.pop(next(iter(has)))

    def _trim(self, layer: int) -> None:
        """Give back what a layer has beyond its share, the most recently used last."""
        held = self._held[layer]
        while len(held) > self.share:
            self._free.append(held.pop(next(iter(held))))

    def _count(self, layer: int, needed: Sequence[int], hits: int, rows: int) -> None:
        counts, recent = self.counts, self._recent[layer]
        like = row_class(rows)
        counts.calls[like] = counts.calls.get(like, 0) + 1
        counts.hits += hits
        counts.misses += len(needed) - hits
        size = max(self._counts.values()) + 1
        seen = counts.distances.setdefault(like, [0] * size)
        order = {expert: at for at, expert in enumerate(reversed(recent))}
        for expert in needed:
            seen[order.get(expert, size - 1)] += 1
        fresh = set(needed)
        recent[:] = [expert for expert in recent if expert not in fresh]
        recent += needed
