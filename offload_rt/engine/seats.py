"""Which cache a sequence gets, and which rows of its prompt are there already.

Where sequences share one memory for rows, those of ended sequences are kept in a tree (`Prefixes`)
as long as nobody needs the memory, and any beginning of them is used again; rows of a sequence that
goes on are copied. Elsewhere, with recurrent states or with KV off the device, each cache keeps
what it held last, and only a whole one is gone on with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from offload_rt.engine.engine import Engine
from offload_rt.kv.prefixes import Prefix, common_prefix


@dataclass(frozen=True, slots=True)
class Found:
    """Rows there are of a prompt's first tokens.

    Attributes:
        tokens: how many.
        prefix: in memory that sequences share.
        index: the free cache that has them, where each has its own.
    """

    tokens: int = 0
    prefix: Prefix = Prefix()
    index: int = -1


class Seats:
    """The caches of an engine.

    Attributes:
        free: those nobody uses, the longest unused first.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.free = list(range(engine.sequences))

    @property
    def kept_tokens(self) -> int:
        """Rows of KV that hold what sequences are or were."""
        engine, prefixes = self._engine, self._engine.prefixes
        own = sum(map(engine.kept_tokens, range(engine.sequences)))
        return own + (0 if prefixes is None else prefixes.rows)

    def may_hold(self, tokens: int) -> bool:
        """Whether there would be a cache for so many, if no ended sequence were kept."""
        engine, prefixes = self._engine, self._engine.prefixes
        kept = 0 if prefixes is None else prefixes.rows
        if prefixes is None and engine.shares_kv:
            kept = sum(map(engine.kept_tokens, self.free))
        return max(map(engine.room_for, self.free), default=0) + kept >= tokens

    def find(self, ids: Sequence[int]) -> Found:
        """The rows there are of a prompt."""
        engine = self._engine
        if engine.prefixes is not None:
            prefix = engine.find_rows(ids)
            return Found(prefix.tokens, prefix)
        most = max(((engine.cached_tokens(i, ids), i) for i in self.free), default=(0, -1))
        return Found(most[0], index=most[1]) if most[0] else Found()

    def take(self, ids: Sequence[int], tokens: int, found: Found) -> int | None:
        """A cache with room for so many tokens, of which those found are there.

        Returns:
            None if there is no room yet; nothing was changed then.
        """
        engine = self._engine
        fitting = [index for index in self.free if engine.capacities[index] >= tokens]
        if not fitting or not self.may_hold(tokens):
            return None
        if engine.prefixes is not None:
            index = max(fitting, key=lambda i: common_prefix(engine.last_ids(i), ids))
            engine.begin(index, ids, tokens, found.prefix)
        elif (index := self._cleared(fitting, tokens, found)) < 0:
            return None
        self.free.remove(index)
        return index

    def give_back(self, index: int) -> None:
        """A sequence ended; what it was is kept until its memory is needed."""
        self._engine.put_away(index)
        self.free.append(index)

    def forget(self, index: int) -> None:
        """Forget what a cache holds."""
        self._engine.truncate(index, 0)
        self._engine.release(index)

    def forget_all(self) -> None:
        """Forget what ended sequences were."""
        for index in self.free:
            self.forget(index)
        if self._engine.prefixes is not None:
            self._engine.prefixes.clear()

    def _cleared(self, fitting: Sequence[int], tokens: int, found: Found) -> int:
        """Make room in the cache that has what was found, or in the longest unused one.

        Returns:
            the cache; -1 if others hold too much.
        """
        engine = self._engine
        goes_on = found.index in fitting
        index = found.index if goes_on else fitting[0]
        others = [i for i in self.free if i != index] if engine.shares_kv else []
        if engine.room_for(index) + sum(map(engine.kept_tokens, others)) < tokens:
            return -1
        if not goes_on:
            self.forget(index)
        while engine.room_for(index) < tokens:
            self.forget(others.pop(0))
        engine.truncate(index, found.tokens if goes_on else 0)
        engine.reserve(index, tokens)
        return index
