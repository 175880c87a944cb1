"""Passes of fixed shape over a network that is on the device whole: recorded once, then replayed.

What differs from pass to pass is packed into one row of numbers and uploaded at once. Passes of so
many rows are made as passes of the next power of two. The surplus rows see themselves alone, write
behind the last row, and nothing looks at what they make.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeGuard

import torch

from offload_rt.costs.sizes import MOST_RECORDINGS, RECORDED_ROWS
from offload_rt.device.base import Device, Replay
from offload_rt.kv.base import KVCache
from offload_rt.kv.resident import ResidentKV
from offload_rt.kv.retrieval import RetrievalKV
from offload_rt.kv.static import (
    RecordableCache,
    RowMemory,
    StaticKV,
    StaticRows,
    StaticShape,
    unpack_words,
    visible_words,
    words_of,
)
from offload_rt.model.attention_function import Segment
from offload_rt.model.network import Network, TokenBatch
from offload_rt.sampling import likeliest

# Times a kind of pass is made eagerly before it is recorded, which takes as long as some five such
# passes: what comes up once in a while is never recorded.
EAGER_FIRST = 2
# A recording makes room for another when so many passes went by without it. So where more kinds of
# passes take turns than are kept, those that are not kept are made eagerly, not recorded each time.
UNUSED_PASSES = 4 * MOST_RECORDINGS


@dataclass(frozen=True, slots=True, eq=False)
class HiddenRows:
    """Hidden states that a network reads beside its tokens, where they stay for the whole run.

    Attributes:
        made: [M, E] of its own passes: what it goes on from.
        given: [RECORDED_ROWS, n E] where those of another network are put for a recorded pass.
        prepare: makes of such [S, n E] what the network is fed: [S, E].
    """

    made: torch.Tensor
    given: torch.Tensor
    prepare: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """The hidden states of one pass.

    Attributes:
        rows: where they are.
        reads: [S] rows of `made` that are fed beside the tokens.
        given: [S, n E] those of another network that are fed instead; None: `made` is.
        writes: the first of the rows of `made` that take what the wanted rows go on from.
    """

    rows: HiddenRows
    reads: Sequence[int] = ()
    given: torch.Tensor | None = None
    writes: int = 0

    def fed(self, reads: torch.Tensor | None) -> torch.Tensor:
        """[S, E] beside the tokens; `reads` are on the device, if there are any."""
        if self.given is not None:
            return self.rows.prepare(self.given)
        assert reads is not None
        return self.rows.made[reads]


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticPass:
    """What is fixed of a pass, and how its numbers are packed.

    Attributes:
        shape: of its rows.
        results: rows whose logits are wanted: all, or one.
        chain: tokens that it goes on to choose, each fed to the next pass; 0: none, it gives
            logits.
        hidden: of a network that reads hidden states beside its tokens.
        given: it is fed those of another network.
    """

    shape: StaticShape
    results: int
    chain: int = 0
    hidden: HiddenRows | None = None
    given: bool = False

    def pack(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        places: Sequence[int],
        parents: Sequence[int],
        committed: int,
        carried: Carried | None = None,
    ) -> list[int]:
        """Numbers of one pass.

        Args:
            tokens: n ids, at most `shape.rows`.
            positions: n places in the sequence.
            places: P places of all pending rows as the cache counts them, these n the last.
            parents: P rows that they continue.
            committed: rows before them.
            carried: hidden states beside the tokens, if there are any.
        """
        rows, width, count = self.shape.rows, self.shape.width, len(tokens)
        surplus, spare = [0] * (rows - count), [0] * (width - len(places))
        alone = [-1] * (rows - count)
        first = committed + len(places) - count
        hidden: list[int] = []
        if carried is not None:
            hidden = [
                carried.writes,
                *([*carried.reads, *surplus] if carried.reads else [0] * rows),
            ]
        return [
            *(committed, first, count - 1),
            *(*tokens, *surplus),
            *(*positions, *surplus),
            *(*places, *spare),
            *visible_words([*parents, *alone], rows, width),
            *hidden,
        ]

    def vary(self, staged: torch.Tensor, known_ids: int) -> None:
        """Change the numbers of a pass to others that are as good.

        Args:
            staged: [numbers] int64, see `pack`.
            known_ids: that may be fed.
        """
        ids, positions = staged[3:].split(self.shape.rows)[:2]
        ids.add_(1).remainder_(known_ids)
        positions.sub_(1).clamp_(min=0)

    def run(
        self,
        network: Network,
        cache: RecordableCache,
        staged: torch.Tensor,
        known_ids: int,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Make the pass of the numbers in `staged`; nothing but these decides what it computes.

        Args:
            network: computes.
            cache: whose memory rows are in.
            staged: [numbers] int64, see `pack`.
            known_ids: that may be fed.
            out: [RECORDED_ROWS, V] where logits go.

        Returns:
            [R, V] logits, or [chain] int64 ids.
        """
        rows, width = self.shape.rows, self.shape.width
        sizes = [1, 1, 1, rows, rows, width, rows * words_of(width)]
        carried = 0 if self.hidden is None else 1 + rows
        committed, first, last, ids, positions, places, words, reads = staged.split(
            [*sizes, carried]
        )
        every = torch.arange(rows, device=staged.device)
        own = StaticRows(
            at=first + every,
            committed=committed,
            visible=unpack_words(words.view(rows, -1), width),
            places=places,
        )
        wanted = last if self.results == 1 else every
        segment = Segment(StaticKV(cache, self.shape, own), rows)
        batch = TokenBatch(ids, positions, [segment], wanted, self._fed(reads[1:]))
        logits, made = self._forward(network, batch)
        ids_wide = out.shape[1]
        if not self.chain:
            if self.hidden is not None and made is not None:
                self.hidden.made.index_copy_(0, reads[:1] + every[: self.results], made)
            return out[: self.results].copy_(logits[:, :ids_wide])
        tokens = [likeliest(logits[:, :ids_wide])]
        zero = torch.zeros_like(last)
        for step in range(1, self.chain):
            alone = StaticRows.next_one(first + last + step, width)
            segment = Segment(StaticKV(cache, self.shape, alone), 1)
            known = tokens[-1].clamp(0, known_ids - 1)  # where logits are no numbers it is -1
            position = positions[last] + step
            batch = TokenBatch(known, position, [segment], zero, made)
            logits, made = self._forward(network, batch)
            tokens.append(likeliest(logits[:, :ids_wide]))
        return torch.cat(tokens)

    def _fed(self, reads: torch.Tensor) -> torch.Tensor | None:
        """[S, E] beside the tokens, if there is anything."""
        if self.hidden is None:
            return None
        if self.given:
            return self.hidden.prepare(self.hidden.given[: self.shape.rows])
        return self.hidden.made[reads]

    def _forward(
        self, network: Network, batch: TokenBatch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[R, V or more] logits, and what the wanted rows go on from, if anything does."""
        if self.hidden is None:
            return network.forward(batch), None
        return network.logits_and_hidden(batch)


@dataclass(frozen=True, slots=True)
class Recorded:
    """Work on one tensor, as it was recorded.

    Attributes:
        staged: the tensor that it reads.
        replay: does the work.
    """

    staged: torch.Tensor
    replay: Replay[torch.Tensor]

    @classmethod
    def make(
        cls,
        device: Device,
        work: Callable[[torch.Tensor], torch.Tensor],
        given: torch.Tensor,
        vary: Callable[[torch.Tensor], object],
    ) -> "Recorded | None":
        """Record work on tensors that are shaped as this one; None if it cannot be recorded.

        Args:
            device: where it is done.
            work: to be recorded.
            given: what it may work on.
            vary: makes other numbers of these, in place.
        """
        with torch.inference_mode():
            staged = given.clone()  # what is uploaded may lie where the next upload goes
            replay = device.record(lambda: work(staged), lambda: vary(staged))
        return None if replay is None else cls(staged, replay)

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        """Enqueue the work on this one; the result is there until it is done again."""
        with torch.inference_mode():
            self.staged.copy_(given)
        return self.replay()


_Key: TypeAlias = tuple[RowMemory, StaticPass]


@dataclass(slots=True)
class _Kept:
    """A recording, and the number of the last pass that was a replay of it."""

    recorded: Recorded
    used: int = 0


class Recordings:
    """The recorded passes of one network.

    Logits of all of them are in one place. What a replay returns is there until the next replay,
    and the compute stream orders both.

    Args:
        network: attached to its weights, all of which are on the device.
        device: where passes run.
        known_ids: that may be fed.
        most_ids: V, that are chosen from.

    Attributes:
        refused: the device could not record one, so there are none.
        at_once: a pass is recorded when it first comes up.
    """

    def __init__(self, network: Network, device: Device, known_ids: int, most_ids: int) -> None:
        self._network, self._device, self._known_ids = network, device, known_ids
        nbytes = RECORDED_ROWS * most_ids * network.dtype.itemsize
        memory = device.allocate(nbytes, "logits of recorded passes").tensor
        self._logits = memory.view(network.dtype).view(RECORDED_ROWS, most_ids)
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()  # the longest unused first
        self._asked: Counter[tuple[int, ...]] = Counter()  # for each kind of pass
        self._passes = 0
        self.refused = self.at_once = False

    def logits(
        self,
        cache: KVCache,
        tokens: Sequence[int],
        places: Sequence[int],
        parents: Sequence[int] | None,
        wanted: Sequence[int],
        carried: Carried | None = None,
    ) -> torch.Tensor | None:
        """Make a pass (`runner.Rows`); its rows are pending then.

        Returns:
            [R, V] logits of the wanted rows; None if this pass is not one that is recorded.
        """
        every = range(len(tokens))
        alone = len(wanted) == 1 and 0 <= wanted[0] == every[-1]
        if not alone and list(wanted) != list(every):
            return None
        results = 1 if alone else 0
        found = self._replay(cache, tokens, places, parents, carried, results=results)
        return None if found is None else found[: len(wanted)]

    def chain(
        self,
        cache: KVCache,
        tokens: Sequence[int],
        places: Sequence[int],
        depth: int,
        carried: Carried | None = None,
    ) -> torch.Tensor | None:
        """Feed tokens, then the likeliest token after them, and so on; all rows are pending then.

        Returns:
            [depth] int64 ids, the last of which is not fed; `NO_TOKEN` from where logits are no
            numbers. None if this is not recorded.
        """
        return self._replay(cache, tokens, places, None, carried, results=1, depth=depth)

    def _replay(  # noqa: PLR0913 - what `Rows` has
        self,
        cache: KVCache,
        tokens: Sequence[int],
        places: Sequence[int],
        parents: Sequence[int] | None,
        carried: Carried | None,
        *,
        results: int,
        depth: int = 0,
    ) -> torch.Tensor | None:
        count, more = len(tokens), max(0, depth - 1)
        if self.refused or count > RECORDED_ROWS or not records(cache):
            return None
        before, rows = cache.rows_before(), _power_of_two(count)
        last = before.committed + before.pending + max(rows, count + more)
        if before.pending != len(places) - count or last > cache.memory.rows:
            return None
        width = _power_of_two(before.pending + max(rows, count + more))
        shape = StaticShape.of(before, rows, width)
        results = results or rows
        made = StaticPass(shape=shape, results=results, chain=depth)
        if carried is not None:
            if carried.writes + results > len(carried.rows.made):
                return None
            made = replace(made, hidden=carried.rows, given=carried.given is not None)
        if not self._replays(cache, made):
            return None
        shift = cache.length - before.committed
        packed = made.pack(
            tokens,
            places[-count:],
            [place - shift for place in places],
            range(-1, len(places) - 1) if parents is None else parents,
            before.committed,
            carried,
        )
        if carried is not None and carried.given is not None:
            with torch.inference_mode():
                carried.rows.given[:count].copy_(carried.given)
        self._network.poll()
        staged = self._device.upload(packed)
        recorded = self._recorded(cache, made, staged)
        if recorded is None:
            return None
        found = recorded(staged)
        cache.appended(count + more)
        return found

    def _replays(self, cache: RecordableCache, made: StaticPass) -> bool:
        """Whether a pass is recorded, or is to be."""
        self._passes += 1
        if (cache.memory, made) in self._kept:
            return True
        kind = (made.shape.rows, made.shape.width, made.results, made.chain, int(made.given))
        self._asked[kind] += 1
        if not self.at_once and self._asked[kind] <= EAGER_FIRST:
            return False
        if len(self._kept) < MOST_RECORDINGS:
            return True
        unused = next(iter(self._kept.values()))
        return self._passes - unused.used > UNUSED_PASSES

    def _recorded(
        self, cache: RecordableCache, made: StaticPass, numbers: torch.Tensor
    ) -> Recorded | None:
        """The recording of a pass, made with these numbers if there is none."""
        key = (cache.memory, made)
        if key not in self._kept:
            recorded = self._record(cache, made, numbers)
            if recorded is None:
                self.refused = True
                self._kept.clear()
                return None
            if len(self._kept) >= MOST_RECORDINGS:
                self._kept.popitem(last=False)
            self._kept[key] = _Kept(recorded)
        kept = self._kept[key]
        kept.used = self._passes
        self._kept.move_to_end(key)
        return kept.recorded

    def _record(
        self, cache: RecordableCache, made: StaticPass, numbers: torch.Tensor
    ) -> Recorded | None:
        network, known, out = self._network, self._known_ids, self._logits
        with self._unpolled():
            return Recorded.make(
                self._device,
                lambda staged: made.run(network, cache, staged, known, out),
                numbers,
                lambda staged: made.vary(staged, known),
            )

    @contextmanager
    def _unpolled(self) -> Iterator[None]:
        """Nobody may end a pass while it is recorded: what it raises counts as its refusal."""
        poll, self._network.poll = self._network.poll, lambda: None
        try:
            yield
        finally:
            self._network.poll = poll


def records(cache: KVCache) -> TypeGuard[RecordableCache]:
    """Whether passes over a cache may be recorded: all its rows are on one device."""
    return isinstance(cache, ResidentKV | RetrievalKV)


def _power_of_two(number: int) -> int:
    """The least that is not below a positive number."""
    return 1 << (number - 1).bit_length()
