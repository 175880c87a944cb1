"""Lend experts as tokens ask for them, from a pool of slots."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

from offload_rt.device.base import Event, Offer, OfferingStream, Stream
from offload_rt.streaming.ring import BufferT, RingWatch


class _Sized(Protocol):
    @property
    def nbytes(self) -> int:
        """Bytes that cross the link."""


SourceT = TypeVar("SourceT", bound=_Sized)

PROMPTS = 32  # above every class of passes that check drafts, and added to those of prompts
# Share of a layer's experts that rows ask for from which on they are taken to ask for all of the
# next one: reading all of it then costs at most 1.1 times its bytes, and the disk never idles.
NEARLY_ALL = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class MissRates:
    """What an expert that a layer lacks costs.

    Attributes:
        link_s: to bring it to the device from host memory.
        host_s: to compute it there.
        file_s: to bring it from its file, where not all are in host memory.
        begin_s: of a layer that has any computed there.
    """

    link_s: float
    host_s: float
    file_s: float = 0.0
    begin_s: float = 0.0

    def on_host(self, misses: int, at_home: int) -> int:
        """How many to compute where they lie, so that all are done as soon as may be.

        Args:
            misses: experts that a layer lacks.
            at_home: of these, those in host memory.
        """
        counts = range(at_home + 1)
        return min(counts, key=lambda count: (self.until_s(misses, at_home, count), count))

    def until_s(self, misses: int, at_home: int, on_host: int) -> float:
        """Until all misses of a layer are done, of which so many are computed where they lie."""
        host_s = self.begin_s + on_host * self.host_s if on_host else 0.0
        files_s = (misses - at_home) * self.file_s
        return max(host_s, (at_home - on_host) * self.link_s + files_s)


@dataclass(slots=True, eq=False)
class ExpertSlot(Generic[BufferT]):
    """One device buffer, large enough for any expert.

    Attributes:
        filled: copy stream: the copy into `buffer` is done; None once somebody waited for it.
        drained: compute stream: the last kernel reading `buffer` is done.
        number: of the copy, counted from the first of all.
        ahead: it was copied before anybody asked for it, and nobody has yet.
        offer: its copy, which is made while no other one is asked for; None: it was asked for.
            If not `ahead`, a layer has asked, and the host has computed it meanwhile.
        noted: to be called when it is asked for or dropped, if somebody watches.
        filling: its copy was offered when the model was loaded (`ExpertPool.fill`), and nobody has
            asked for it yet.
    """

    buffer: BufferT
    filled: Event | None = None
    drained: Event | None = None
    number: int = 0
    ahead: bool = False
    offer: Offer | None = None
    noted: Callable[[], None] | None = None
    filling: bool = False

    def decided(self) -> None:
        """What was offered is asked for, or dropped."""
        self.offer, self.filling = None, False
        if self.noted is not None:
            self.noted()
            self.noted = None


@dataclass(slots=True)
class ExpertCounts:
    """What was asked of a pool.

    Attributes:
        hits: experts that were there when a layer asked for them.
        misses: experts that were asked for and had to be copied.
        ahead: of these, those whose copy began before the layer asked.
        on_host: of the misses, those that the host computed, and that are copied behind all others.
        unused: others that were copied ahead, and given up before any layer asked.
        unused_bytes: of these, that had begun to be copied; so, too, of what the host computed and
            was given up before it was asked for again.
        filled: of the hits, experts that slots were filled with when the model was loaded.
        filled_bytes: of all experts that slots were filled with, as far as they were, and were
            asked for or given up since.
        host_bytes: of all others that were copied, as far as they were, from host memory;
            `file_bytes` from files.
        calls: times a layer asked, by class of the pass (`row_class`).
        distances: by the same, how often an expert was asked for that was the
            n-th most recently used of its layer, counted from 0; last of those never used before.
            The hits of every size of pool at once (Mattson's stack distances). What a slot was
            filled with, and nobody has asked for, comes behind all that were, in the order of
            `fill`: a pool of n slots a layer was filled with the first n.
        uses: by layer, how often each expert was asked for.
    """

    hits: int = 0
    misses: int = 0
    ahead: int = 0
    on_host: int = 0
    unused: int = 0
    unused_bytes: int = 0
    filled: int = 0
    filled_bytes: int = 0
    host_bytes: int = 0
    file_bytes: int = 0
    calls: dict[int, int] = field(default_factory=dict)
    distances: dict[int, list[int]] = field(default_factory=dict)
    uses: dict[int, list[int]] = field(default_factory=dict)


def row_class(rows: int, *, prompt: bool = False) -> int:
    """Passes of like numbers of rows: 1, 2, 3 to 4, 5 to 8, 9 to 16, ... as 0, 1, 2, 3, 4, ...

    Those that read a prompt are of classes of their own: its tokens are new to the pool, those of
    a draft follow what it holds.
    """
    return (rows - 1).bit_length() + (PROMPTS if prompt else 0)


def shares_of(
    slots: int, layers: int, per_token: int, *, foresees: bool = False
) -> tuple[int, int]:
    """Slots that each layer keeps, and those that the layer that computes has besides.

    A token's experts are to be on their way together, so a layer computes with `per_token` slots at
    least. Where slots suffice for that in each layer, all are dealt out, but for as many as two
    layers ask for at once if the next one's experts are foreseen.
    """
    share = slots // layers
    if foresees and slots >= (layers + 2) * per_token:
        share = (slots - 2 * per_token) // layers
    if share < per_token:
        share = (slots - per_token) // layers
    return share, slots - share * layers


def leaves_free(share: int, spare: int, per_token: int) -> bool:
    """Whether some slot is nobody's while a layer computes with a token's experts.

    Args:
        share: slots that each layer keeps.
        spare: those that the layer that computes has besides.
        per_token: experts a token is sent to.
    """
    return spare > max(0, per_token - share)


@dataclass(frozen=True, slots=True)
class Asked:
    """What rows of a pass ask for of a layer's experts.

    Attributes:
        needed: which, each once; those that the last rows are sent to come last.
        rows: that ask for them.
        foresee: says which experts of the next layer rows will ask for, likeliest first; it is
            called once copies of those that are needed are on their way.
        on_host: of those that are needed, what is computed where it lies and is not lent.
        meanwhile: computes that; it is called once those that are there have been lent, before any
            other is waited for.
        there: how many are lent at once of those that are there.
        coming: of the others.
    """

    needed: Sequence[int]
    rows: int = 1
    foresee: Callable[[], Sequence[int]] | None = None
    on_host: Set[int] = frozenset()
    meanwhile: Callable[[], None] | None = None
    there: int = 1
    coming: int = 1


def _waits_to_fill(slot: ExpertSlot[BufferT]) -> bool:
    """Whether a slot is only offered, for the time when nothing else is read."""
    return slot.filling and slot.offer is not None and not slot.offer.begun_bytes


class ExpertPool(Generic[BufferT, SourceT]):
    """Slots for experts, a share for each layer, the least recently used of it replaced.

    One order for all layers would replace all of a pass by the next one where the pool holds less
    than a pass asks for: layers come in a cycle. So a layer replaces its own experts only. What a
    layer asks for and has comes first, while the rest is on its way. A slot that was computed from
    may take the next of them, so a layer that asks for more than there are slots has them all in
    turn. While a prompt goes through a layer in several parts (`begin`), the layer takes what other
    layers have, those first that come last, so that no part reads again what the one before it
    read; of these slots it keeps its share when the next layer begins.

    Where it is foreseen what the next layer will ask for, that is offered to the copy stream: into
    slots that nobody has, and only while no expert that was asked for is on its way. What the layer
    then asks for is a miss whose copy has begun; the rest is dropped, so that layers hold what they
    hold without. Slots that nobody has are those that do not divide by the layers, or, if
    `keeps_free`, some more.

    Some of what a layer lacks may be computed where it lies (`on_host`). That is offered likewise,
    for the next time, in the place of what would have been given up for it. So layers hold what
    they hold without, as far as the link has time; what has not begun to cross may be computed
    there again. In passes where it may, nothing else is copied before its layer asks: link and host
    share what a layer lacks by what is on the link then, and both want it while it idles.

    Rows that ask for nearly all experts of a layer will ask for nearly all of the next one. These
    are copied ahead, behind what was asked for: into slots that are free or of layers that come
    later, and into those that the layer needs no more, but for its share. So a prompt reads without
    a pause, each expert once.

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
        in_file: whether that home is a file, not host memory.
        keeps_free: keep slots free for what is foreseen.

    Attributes:
        share: slots that each layer keeps.
        leaves_free: see the function.
        may_foresee: passes can say what the next layer will ask for, and there are slots for that.
        foresees: whether the next pass is to.
        reads_prompt: whether the next pass reads one.
        rates: of misses, some of which are computed where they lie; None: none is.
    """

    def __init__(  # noqa: PLR0913 - as a ring, all by keyword
        self,
        *,
        counts: Mapping[int, int],
        slots: Sequence[BufferT],
        per_token: int,
        copy: OfferingStream[BufferT, SourceT],
        compute: Stream,
        source: Callable[[int, int], SourceT],
        place: Callable[[int, int], tuple[str, int]],
        in_file: Callable[[int, int], bool],
        keeps_free: bool = False,
    ) -> None:
        self._copy, self._compute, self._source, self._place = copy, compute, source, place
        self._in_file = in_file
        self._free = [ExpertSlot(buffer) for buffer in slots]
        self.share, spare = shares_of(len(slots), len(counts), per_token, foresees=keeps_free)
        self.leaves_free = leaves_free(self.share, spare, per_token)
        self._counts = dict(counts)
        self._held: dict[int, dict[int, ExpertSlot[BufferT]]] = {layer: {} for layer in counts}
        self._recent: dict[int, list[int]] = {layer: [] for layer in counts}
        self._unasked = {layer: set(range(count)) for layer, count in counts.items()}
        self._following = dict(pairwise(sorted(counts)))
        self._layer: int | None = None
        self._takes, self._parts_left = False, 0
        self._asked: set[int] = set()  # of the layer that computes, in all parts so far
        self._ahead: int | None = None  # the layer that is copied ahead
        self._rest: deque[int] = deque()  # of it, what there was no slot for yet
        self._foreseen: int | None = None  # the layer whose experts are offered
        self._copies = 0
        self._filling: set[ExpertSlot[BufferT]] = set()
        self.may_foresee = self.foresees = self.reads_prompt = False
        self.rates: MissRates | None = None
        self.counts = ExpertCounts(uses={layer: [0] * count for layer, count in counts.items()})
        self.watch: RingWatch | None = None

    def fill(self, uses: Mapping[int, Sequence[int]]) -> None:
        """Offer experts for the share of each layer, for the time until tokens ask for them.

        Behind all else that is offered, so they are copied while nothing else is, a step at a time,
        those of a layer first that earlier runs used most, and of those used alike that lie first.
        What a layer asks for before its copy has begun is a miss like any other. What nobody asked
        for is replaced first.

        Always, whatever the length of answers: it costs time of a link that idles and no memory,
        what is asked for on this device, of KV that is away too, shares the disk with one step of a
        few MiB at most, and who ends a run early ends it. It is worth the reads of a first prompt
        that it saves: the share that is held (docs/RESULTS.md, "Slots that are filled at load").
        Not as layers that stay are loaded, with everybody waiting: that would cost a run its pool's
        bytes before the first token, and a short answer asks for few of them.

        Args:
            uses: by layer, how often each expert was asked for; of layers that are not in it, or
                have another number of experts there, nothing is known.
        """
        for layer, count in self._counts.items():
            held, order = dict[int, ExpertSlot[BufferT]](), self._in_place(layer, range(count))
            if len(used := uses.get(layer, ())) == count:
                order.sort(key=used.__getitem__, reverse=True)
            self._recent[layer] = order[::-1]
            for expert in order[: self.share]:
                held[expert] = slot = self._free.pop()
                source = self._source(layer, expert)
                slot.offer = self._copy.offer(slot.buffer, source, (), last=True)
                slot.filling = True
                self._filling.add(slot)
            self._held[layer] = dict(reversed(held.items()))

    @property
    def filled_bytes(self) -> int:
        """Of all experts that slots were filled with, as far as they were."""
        there = (slot.offer.begun_bytes for slot in self._filling if slot.offer is not None)
        return self.counts.filled_bytes + sum(there)

    def held(self, layer: int) -> list[int]:
        """Experts of a layer that are there or on their way, least recently used first."""
        return list(self._held[layer])

    def begin(self, layer: int, parts: int) -> None:
        """A layer begins, in so many parts."""
        for other in (self._layer, self._ahead):
            if other is not None and other != layer:
                self._trim(other)
        if self._foreseen not in (None, layer):
            self._settle(self._foreseen, ())
        self._layer, self._takes, self._parts_left = layer, parts > 1, parts
        self._ahead = None
        self._asked.clear()
        self._rest.clear()

    def on_host(
        self, layer: int, needed: Sequence[int], at_home: Callable[[int], bool]
    ) -> list[int]:
        """Which of the experts that a layer lacks are best computed where they lie.

        Those come that were used last, as they should be asked for again. None is computed there of
        a prompt in parts, which has the time to read.

        Args:
            layer: whose.
            needed: by rows, each once.
            at_home: whether an expert is in host memory.
        """
        if self.rates is None or (layer == self._layer and self._takes):
            return []
        missing = [expert for expert in needed if self._is_missing(layer, expert)]
        there = [expert for expert in missing if at_home(expert)]
        used = {expert: at for at, expert in enumerate(self._recent[layer])}
        there.sort(key=lambda expert: used.get(expert, -1))
        return there[: self.rates.on_host(len(missing), len(there))]

    def _is_missing(self, layer: int, expert: int) -> bool:
        """Whether nothing of an expert is there, or on its way."""
        slot = self._held[layer].get(expert)
        return slot is None or (
            slot.offer is not None and not slot.ahead and not slot.offer.begun_bytes
        )

    def lend(self, layer: int, asked: Asked) -> Iterator[Sequence[tuple[int, BufferT]]]:
        """Lend experts in groups as is asked, none that is there with one that is not."""
        needed, rows, foresee = asked.needed, asked.rows, asked.foresee
        on_host, meanwhile = asked.on_host, asked.meanwhile
        if layer != self._layer:
            self.begin(layer, 1)
        self._parts_left -= 1
        held = self._held[layer]
        if self._foreseen == layer:
            self._settle(layer, needed)
        late = {expert for expert in needed if self._is_missing(layer, expert)}
        mine = [expert for expert in needed if expert in held and expert not in on_host]
        slots = {expert: held.pop(expert) for expert in mine}
        held.update(slots)  # as the most recently used, whatever becomes of this call
        there = {expert: slot for expert, slot in slots.items() if expert not in late}
        self._find_filled(layer, there)
        self._count(layer, needed, there, rows)
        self.counts.on_host += len(on_host)
        for expert, slot in slots.items():
            self._ask_for(slot, layer, expert)
        absent = set(needed) - slots.keys() - on_host
        queue, lent = deque(self._in_place(layer, absent)), set(slots)
        # Those that are there, then those on their way, as they come.
        due = deque(sorted(slots, key=lambda e: slots[e].number if slots[e].filled else 0))
        kept = set(needed[len(needed) - min(self.share, len(needed)) :])
        self._load(layer, queue, due, lent)
        if not queue:
            self._bring_behind(layer, on_host, lent)
        self._look_ahead(layer, needed, shared=meanwhile is not None and not self._takes)
        if foresee is not None and not queue:
            self._offer(layer, foresee)
        while due:
            self._load_ahead(layer, queue, lent | kept)
            here = held[due[0]].filled is None
            if meanwhile is not None and not here:
                meanwhile()
                meanwhile = None
            group, most = [due.popleft()], asked.there if here else asked.coming
            while due and len(group) < most and (held[due[0]].filled is None) == here:
                group.append(due.popleft())
            yield from self._use(layer, group)
            lent.difference_update(group)
            self._load(layer, queue, due, lent)
        assert not queue  # a slot that was handed back is there for the next
        if meanwhile is not None:
            meanwhile()
        self._load_ahead(layer, queue, lent | kept)
        ordered = {expert: held.pop(expert) for expert in needed if expert in held}
        held.update(ordered)

    def _use(self, layer: int, group: Sequence[int]) -> Iterator[Sequence[tuple[int, BufferT]]]:
        """Lend experts; one that cannot be read is not there afterwards."""
        slots = {expert: self._held[layer][expert] for expert in group}
        for expert, slot in slots.items():
            if slot.filled is None:
                continue
            watch = self.watch
            end = None if watch is None else watch("wait", (layer, expert), self._compute)
            try:
                self._compute.wait(slot.filled)
            except BaseException:
                slot.filled = None  # nothing is on its way into it any more
                self._free.append(self._held[layer].pop(expert))
                raise
            slot.filled = None
            if end is not None:
                end()
        try:
            yield [(expert, slot.buffer) for expert, slot in slots.items()]
        finally:
            drained = self._compute.record()
            for slot in slots.values():
                slot.drained = drained

    def _load(self, layer: int, queue: deque[int], coming: deque[int], lent: set[int]) -> None:
        """Have as many experts copied as there are slots for."""
        while queue:
            slot = self._take(layer, lent)
            if slot is None:
                return
            expert = queue.popleft()
            self._fill(slot, layer, expert, "copy")
            coming.append(expert)
            lent.add(expert)

    def _fill(self, slot: ExpertSlot[BufferT], layer: int, expert: int, why: str) -> None:
        """Have an expert copied, after every reader of the slot and what was on its way into it."""
        for event in (slot.drained, slot.filled):
            if event is not None:
                self._copy.wait(event)
        end = None if self.watch is None else self.watch(why, (layer, expert), self._copy)
        self._copy.copy(slot.buffer, self._source(layer, expert))
        slot.filled, slot.drained = self._copy.record(), None
        if end is not None:
            end()
        self._crosses(layer, expert, self._source(layer, expert).nbytes)
        self._copies += 1
        slot.number, slot.ahead = self._copies, why == "ahead"
        self._held[layer][expert] = slot

    def _bring_behind(self, layer: int, experts: Set[int], lent: set[int]) -> None:
        """Offer copies of what the host computes now, for later."""
        for expert in self._in_place(layer, experts - self._held[layer].keys()):
            slot = self._take(layer, lent | experts)
            if slot is None:
                return
            after = [event for event in (slot.drained, slot.filled) if event is not None]
            slot.offer = self._copy.offer(slot.buffer, self._source(layer, expert), after)
            self._held[layer][expert] = slot

    def _ask_for(self, slot: ExpertSlot[BufferT], layer: int, expert: int) -> None:
        """Have what is offered copied in its turn."""
        if slot.offer is None:
            return
        self._copies += 1
        slot.filled, slot.drained, slot.number = slot.offer.ask(), None, self._copies
        begun_bytes = self._was_filled(slot)
        self._crosses(layer, expert, self._source(layer, expert).nbytes - begun_bytes)
        slot.decided()

    def _find_filled(self, layer: int, there: Mapping[int, ExpertSlot[BufferT]]) -> None:
        """Of what slots were filled with, what is not all there is a miss whose copy has begun."""
        for expert, slot in there.items():
            if slot.filling and slot.offer is not None:
                slot.ahead = slot.offer.begun_bytes < self._source(layer, expert).nbytes
                self.counts.filled += not slot.ahead

    def _was_filled(self, slot: ExpertSlot[BufferT]) -> int:
        """Bytes of what a slot was filled with, which is asked for or given up now."""
        if slot.offer is None or not slot.filling:
            return 0
        self._filling.discard(slot)
        self.counts.filled_bytes += slot.offer.begun_bytes
        return slot.offer.begun_bytes

    def _offer(self, layer: int, foresee: Callable[[], Sequence[int]]) -> None:
        """Offer copies of what the next layer should ask for, into slots that nobody has."""
        following = self._following.get(layer)
        if following is None or self._ahead is not None or self._takes or not self._free:
            return
        held = self._held[following]
        for expert in foresee():
            if not self._free:
                return
            if expert in held and not _waits_to_fill(held[expert]):
                continue
            slot = self._drop(following, expert) if expert in held else self._free.pop()
            after = [event for event in (slot.drained, slot.filled) if event is not None]
            if self.watch is not None:
                slot.noted = self.watch("foreseen", (following, expert), self._copy)
            slot.offer = self._copy.offer(slot.buffer, self._source(following, expert), after)
            slot.ahead = True
            held[expert], self._foreseen = slot, following

    def _settle(self, layer: int, needed: Sequence[int]) -> None:
        """Of experts that were offered, have those copied that a layer asks for, and no others."""
        self._foreseen, held = None, self._held[layer]
        offered = [e for e, slot in held.items() if slot.offer is not None and slot.ahead]
        for expert in [expert for expert in needed if expert in offered]:
            offered.remove(expert)
            self._ask_for(held[expert], layer, expert)
        for expert in offered:
            self._free.insert(0, self._drop(layer, expert))

    def _look_ahead(self, layer: int, needed: Sequence[int], *, shared: bool) -> None:
        """See whether the next layer is to be copied ahead; once for all parts of a layer.

        Not if the host shares what layers lack, and is to have its part of the next one's.
        """
        self._asked.update(needed)
        following = self._following.get(layer)
        nearly_all = len(self._asked) >= NEARLY_ALL * self._counts[layer]
        if nearly_all and not shared and following is not None and self._ahead is None:
            held = self._held[following]
            for expert in [e for e, slot in held.items() if _waits_to_fill(slot)]:
                self._free.append(self._drop(following, expert))
            others = set(range(self._counts[following])) - held.keys()
            self._ahead, self._rest = following, deque(self._in_place(following, others))

    def _load_ahead(self, layer: int, queue: Sequence[int], kept: Set[int]) -> None:
        """Copy of the next layer what there are slots for, if this one waits for none."""
        while self._ahead is not None and self._rest and not queue:
            slot = self._take_ahead(layer, kept)
            if slot is None:
                return
            self._fill(slot, self._ahead, self._rest.popleft(), "ahead")

    def _take_ahead(self, layer: int, kept: Set[int]) -> ExpertSlot[BufferT] | None:
        """A free slot, else in the last part one of the layer, else in parts of a later layer."""
        if self._free:
            return self._free.pop()
        if self._parts_left <= 0:
            victim = next((expert for expert in self._held[layer] if expert not in kept), None)
            if victim is not None:
                return self._drop(layer, victim)
        later = [one for one in self._held if one > layer and self._spares(one)]
        if not (self._takes and later):
            return None
        return self._drop(max(later), next(iter(self._held[max(later)])))

    def _spares(self, layer: int) -> bool:
        return bool(self._held[layer]) and layer != self._ahead

    def _drop(self, layer: int, expert: int) -> ExpertSlot[BufferT]:
        """Take a slot from an expert."""
        slot = self._held[layer].pop(expert)
        offer, begun_bytes = slot.offer, self._source(layer, expert).nbytes
        if offer is not None:
            behind, begun_bytes = offer.drop(), offer.begun_bytes
            if begun_bytes:  # else the next copy comes after what this one was to
                slot.filled, slot.drained = behind, None
            begun_bytes -= self._was_filled(slot)
            self._crosses(layer, expert, begun_bytes)
            slot.decided()
        if slot.ahead or offer is not None:
            self.counts.unused_bytes += begun_bytes
        if slot.ahead:
            slot.ahead = False
            self.counts.unused += 1
        return slot

    def _crosses(self, layer: int, expert: int, nbytes: int) -> None:
        if self._in_file(layer, expert):
            self.counts.file_bytes += nbytes
        else:
            self.counts.host_bytes += nbytes

    def _in_place(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Experts in the order in which they lie."""
        return sorted(experts, key=lambda expert: self._place(layer, expert))

    def _take(self, layer: int, lent: set[int]) -> ExpertSlot[BufferT] | None:
        """A slot: a free one, else in parts one of another layer's, else one of the layer's own."""
        held = self._held[layer]
        if self._free:
            return self._free.pop()
        if self._takes and (slot := self._from_others(layer)) is not None:
            return slot
        victim = next((expert for expert in held if expert not in lent), None)
        if victim is not None:
            return self._drop(layer, victim)
        other = self._ahead  # rather than nothing
        if lent or other is None or not self._held[other]:
            return None
        return self._drop(other, next(iter(self._held[other])))

    def _from_others(self, layer: int) -> ExpertSlot[BufferT] | None:
        """The least recently used of the layer that comes last, else of one that has most."""
        others = [one for one in self._held if one != layer and self._spares(one)]
        later = [one for one in others if one > layer]
        if not others:
            return None
        other = max(later) if later else max(others, key=lambda one: len(self._held[one]))
        return self._drop(other, next(iter(self._held[other])))

    def _trim(self, layer: int) -> None:
        """Give back what a layer has beyond its share, the most recently used last."""
        held = self._held[layer]
        while len(held) > self.share:
            self._free.append(self._drop(layer, next(iter(held))))

    def _count(
        self,
        layer: int,
        needed: Sequence[int],
        there: Mapping[int, ExpertSlot[BufferT]],
        rows: int,
    ) -> None:
        counts, recent = self.counts, self._recent[layer]
        like = row_class(rows, prompt=self.reads_prompt)
        counts.calls[like] = counts.calls.get(like, 0) + 1
        filled = {e for e, slot in there.items() if slot.filling and not slot.ahead}
        ahead = sum(slot.ahead for slot in there.values())
        for slot in there.values():
            slot.ahead = False
        counts.hits += len(there) - ahead
        counts.misses += len(needed) - len(there) + ahead
        counts.ahead += ahead
        size = max(self._counts.values()) + 1
        seen = counts.distances.setdefault(like, [0] * size)
        order = {expert: at for at, expert in enumerate(reversed(recent))}
        order |= dict.fromkeys(self._unasked[layer] - filled, size - 1)
        uses = counts.uses[layer]
        for expert in needed:
            seen[order[expert]] += 1
            uses[expert] += 1
        fresh = set(needed)
        self._unasked[layer] -= fresh
        recent[:] = [expert for expert in recent if expert not in fresh]
        recent += needed
