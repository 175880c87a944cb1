"""Rows that ended sequences left, found by their tokens: an exact-match radix tree.

A node has the tokens of one edge, and the stretch of the pool that holds their rows. What several
sequences begin with is there once, and a prompt that begins with it, too, copies these rows into
its own cache: they are where attention reads them, and what the tree has may go at any time. A
sequence that goes on where another ended takes that one's stretch over.

Nothing is kept that memory is needed for: the longest unused leaf goes first, from its end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from offload_rt.kv.pool import KVPool, Stretch


@dataclass(eq=False, slots=True)
class Edge:
    """Tokens whose rows are one stretch.

    Attributes:
        stretches: of each pool.
        before: the edge they follow; None of the root, and of what is in no tree.
        after: edges that follow, by their first token.
        used: when, by the tree's clock.
    """

    tokens: list[int]
    stretches: list[Stretch]
    before: "Edge | None" = None
    after: "dict[int, Edge]" = field(default_factory=dict)
    used: int = 0


@dataclass(frozen=True, slots=True)
class Prefix:
    """Rows there are of a prompt's first tokens.

    Attributes:
        parts: edges in their order, and how many tokens of each; all of them but of the last.
    """

    parts: tuple[tuple[Edge, int], ...] = ()

    @property
    def tokens(self) -> int:
        """How many."""
        return sum(count for _, count in self.parts)

    @property
    def taken(self) -> Edge | None:
        """An edge that nobody else can need as it is: its rows are taken over."""
        if self.parts:
            edge, count = self.parts[-1]
            if edge.before is not None and not edge.after and count == len(edge.tokens):
                return edge
        return None


class Prefixes:
    """The tree over the pools of a model's devices, which all hold the same tokens.

    Args:
        pools: of each device.

    Attributes:
        rows: that are kept.
    """

    def __init__(self, pools: Sequence[KVPool]) -> None:
        self._pools = pools
        self._root = Edge([], [])
        self._clock = 0
        self.rows = 0

    def find(self, ids: Sequence[int]) -> Prefix:
        """The rows that are kept of a sequence's first tokens."""
        edge, at, parts = self._root, 0, []
        while at < len(ids) and (after := edge.after.get(ids[at])) is not None:
            count = common_prefix(after.tokens, ids[at : at + len(after.tokens)])
            parts.append((after, count))
            at, edge = at + count, after
            if count < len(after.tokens):
                break
        return Prefix(tuple(parts))

    def of_cache(self, index: int, tokens: int) -> Prefix:
        """The first rows of a cache that is in use."""
        return Prefix(((Edge([], [pool.of(index) for pool in self._pools]), tokens),))

    def keep(self, index: int, ids: Sequence[int]) -> None:
        """Take the rows of a cache in, which are of these tokens; it is empty then."""
        prefix = self.find(ids)
        new = list(ids[prefix.tokens :])
        stretches = [pool.keep(index, prefix.tokens) for pool in self._pools]
        if new:
            before = self._ending(prefix)
            edge = before.after[new[0]] = Edge(new, stretches, before)
            self.rows += len(new)
        else:
            for pool, stretch in zip(self._pools, stretches, strict=True):
                pool.shorten(stretch, 0)
            edge = prefix.parts[-1][0] if prefix.parts else self._root
        self._use(edge)

    def begin(self, index: int, rows: int, prefix: Prefix) -> None:
        """Give an empty cache so many rows, of which the first are these (`make_room`)."""
        parts, taken = list(prefix.parts), prefix.taken
        if parts:
            self._use(parts[-1][0])
        if taken is not None:
            parts.pop()
            self._cut(taken)
        for place, pool in enumerate(self._pools):
            copied = [(edge.stretches[place], count) for edge, count in parts]
            pool.begin(index, rows, copied, None if taken is None else taken.stretches[place])

    def make_room(self, rows: int, prefix: Prefix) -> Prefix:
        """Give rows up until a cache of so many can `begin` with a prefix.

        Returns:
            what of the prefix is left: it is given up last, from its end.
        """
        while (lacking := self._lacking(rows, prefix)) > 0:
            spared = {edge for edge, _ in prefix.parts}
            leaf = min(self._leaves(spared), key=lambda edge: edge.used, default=None)
            if leaf is not None:
                self._shorten(leaf, max(0, len(leaf.tokens) - lacking))
            elif prefix.taken is None and prefix.parts and prefix.parts[-1][0].before is not None:
                self._shorten(*prefix.parts[-1])
            elif prefix.parts:
                prefix = Prefix(prefix.parts[:-1])
            else:
                break
        return prefix

    def clear(self) -> None:
        """Keep nothing."""
        while (leaf := next(self._leaves(set()), None)) is not None:
            self._shorten(leaf, 0)

    def _lacking(self, rows: int, prefix: Prefix) -> int:
        """Rows that are not free."""
        gained = 0 if prefix.taken is None else len(prefix.taken.tokens)
        return rows - gained - min(pool.free_rows for pool in self._pools)

    def _leaves(self, spared: set[Edge]) -> Iterator[Edge]:
        """Edges that none follows, but for some."""
        todo = [self._root]
        while todo:
            edge = todo.pop()
            todo += edge.after.values()
            if not edge.after and edge.before is not None and edge not in spared:
                yield edge

    def _ending(self, prefix: Prefix) -> Edge:
        """The edge that ends where a prefix does; one it ends within is made two."""
        if not prefix.parts:
            return self._root
        edge, count = prefix.parts[-1]
        if count < len(edge.tokens):
            pairs = zip(self._pools, edge.stretches, strict=True)
            stretches = [pool.split(stretch, count) for pool, stretch in pairs]
            rest = Edge(edge.tokens[count:], stretches, edge, edge.after, edge.used)
            for after in rest.after.values():
                after.before = rest
            edge.tokens, edge.after = edge.tokens[:count], {rest.tokens[0]: rest}
        return edge

    def _shorten(self, edge: Edge, tokens: int) -> None:
        """Give up what a leaf has behind its first tokens."""
        for pool, stretch in zip(self._pools, edge.stretches, strict=True):
            pool.shorten(stretch, tokens)
        if tokens:
            self.rows -= len(edge.tokens) - tokens
            del edge.tokens[tokens:]
        else:
            self._cut(edge)

    def _cut(self, edge: Edge) -> None:
        """Take a leaf out of the tree."""
        assert edge.before is not None and not edge.after
        del edge.before.after[edge.tokens[0]]
        edge.before = None
        self.rows -= len(edge.tokens)

    def _use(self, edge: Edge) -> None:
        """An edge and all before it are used now."""
        self._clock += 1
        following: Edge | None = edge
        while following is not None:
            following.used, following = self._clock, following.before


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike; slices are compared, not tokens."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if list(one[low:middle]) == list(other[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
