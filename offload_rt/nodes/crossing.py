"""The first node's side of a pass: rows go out to whoever has the next layers, and come back.

Every node makes the pass with the same modules, over the same positions and trees, and only its own
layers of it. The first node sends each of the others what a pass consists of before it begins, and
with it what became of the rows of earlier ones (`AwayKV`, `AwayPool`): so there is nothing to send
after a pass. Hidden states go by way of the first node; the others know only that one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.costs.machine import FreeMemory
from offload_rt.kv.base import KVCache
from offload_rt.kv.pool import KVPool, Stretch
from offload_rt.kv.states import HybridKV
from offload_rt.kv.striped import StripedKV
from offload_rt.nodes.carrying import ByGroup, ByLine, Carrier
from offload_rt.nodes.line import Kind, Line, NodeError
from offload_rt.nodes.roster import Roster
from offload_rt.runner.runner import Rows

Change = list[object]
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Another node of the run, as it joined.

    Attributes:
        line: to it.
        device_bytes: free on its device.
        host_bytes: free in its host memory.
        carrier: of hidden states.
    """

    line: Line
    device_bytes: int
    host_bytes: int
    carrier: Carrier = field(default_factory=ByLine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What came over a node's link so far: it is told with each answer of the node.

    Attributes:
        bytes_copied: of layers.
        busy_s: of the link.
        stalled_s: of kernels that waited for layers.
    """

    bytes_copied: int = 0
    busy_s: float = 0.0
    stalled_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Holds:
    """Device memory of a node: at most so far, where it has its own, and by purpose."""

    peak_bytes: int | None
    ledger: dict[str, int]


class PassDroppedError(Exception):
    """The first node has given a pass up."""


class Lead:
    """The first node's lines to the others.

    Args:
        members: the others, in the order of their numbers.
        roster: what the user said of all of them.

    Attributes:
        device: the node of each layer; set once that is decided.
        here: this node.
        moved: what came over the links of the others.
    """

    here = 0

    def __init__(self, members: Sequence[Member], roster: Roster) -> None:
        self.members, self.roster = members, roster
        self.moved = [Moved() for _ in members]
        self.device: Sequence[int] = ()
        self._changes: list[Change] = []
        self._passes = 0  # begun; of one that was given up, rows may be on their way yet
        self._like: torch.Tensor | None = None  # what crosses, but for its rows

    @property
    def by_group(self) -> bool:
        """Whether hidden states go from GPU to GPU."""
        return all(isinstance(member.carrier, ByGroup) for member in self.members)

    def with_free(self, free: FreeMemory) -> FreeMemory:
        """What is free here, with what is free on the others."""
        return replace(
            free,
            host_bytes=min(free.host_bytes, self.roster.nodes[0].host_bytes or free.host_bytes),
            further_bytes=tuple(member.device_bytes for member in self.members),
            further_host_bytes=tuple(member.host_bytes for member in self.members),
        )

    def place(self, device: int) -> torch.device:
        """Nothing of another node has a place here."""
        raise AssertionError(device)

    def order(self, device: Sequence[int], orders: Sequence[Mapping[str, object]]) -> None:
        """Have the others load their shares, all at once; `wait_ready` waits for them."""
        self.device = device
        for member, order in zip(self.members, orders, strict=True):
            member.line.send(Kind.ORDER, order)

    def wait_ready(self) -> None:
        """Wait until all have loaded theirs.

        Raises:
            NodeError: one could not.
        """
        for member in self.members:
            member.line.expect(Kind.READY)

    def note(self, *change: object) -> None:
        """Have the others make a change to a cache before their next pass."""
        self._changes.append([*change])

    def begin(self, parts: Sequence[Rows]) -> None:
        """Tell the others of a pass."""
        self._passes += 1
        described = [_described(part) for part in parts]
        record = {"number": self._passes, "changes": self._changes, "parts": described}
        self._changes = []
        with self._ending():
            for member in self.members:
                member.line.send(Kind.PASS, record)

    def drop(self) -> None:
        """Tell the others that the pass will not be finished."""
        for member in self.members:
            with suppress(NodeError):  # whoever is gone needs not be told
                member.line.send(Kind.DROP)

    def hop(self, tensor: torch.Tensor, source: int, target: int) -> torch.Tensor:
        """Hidden states that go from one node to another."""
        self._like = tensor.new_empty(0)  # a view would keep all rows of a prompt
        with self._ending():
            if source:
                member = self.members[source - 1]
                tensor, moved = receive_rows(member.line, member.carrier, tensor, self._passes)
                self.moved[source - 1] = Moved(**moved)
            if target:
                member = self.members[target - 1]
                member.carrier.send(member.line, tensor, _record(self._passes))
        return tensor

    def tell(self) -> list[Holds]:
        """What each of the others holds; between passes."""
        with self._ending():
            for member in self.members:
                member.line.send(Kind.TELL)
            answers: list[dict[str, Any]] = [self._told(member) for member in self.members]
        return [Holds(**answer) for answer in answers]

    def _told(self, member: Member) -> dict[str, Any]:
        """What a node answers, behind rows of a pass that was given up."""
        while (frame := member.line.take()).kind is Kind.ROWS:
            assert self._like is not None  # some have crossed
            member.carrier.take(frame, self._like)
        return member.line.checked(frame, Kind.TELL).record

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Where a node is gone, end what waits for it on a GPU."""
        try:
            yield
        except NodeError:
            self.close(abort=True)
            raise

    def close(self, *, abort: bool = False) -> None:
        """Nothing more will cross."""
        for member in self.members:
            member.carrier.close(abort=abort)

    def end(self, why: str = "") -> None:
        """End the run on all of them."""
        for member in self.members:
            member.line.end(why)


class Guest:
    """Another node's side: rows come from the first node, and go there.

    Args:
        line: to the first node.
        here: number of this one.
        device: the node of each layer.
        moved: says what came over the link so far.
        carrier: of hidden states.

    Attributes:
        number: of the pass.
    """

    number = 0

    def __init__(
        self,
        line: Line,
        here: int,
        device: Sequence[int],
        moved: Callable[[], Moved],
        carrier: Carrier,
    ) -> None:
        self._line, self.here, self.device, self._moved = line, here, device, moved
        self._carrier = carrier

    def place(self, device: int) -> torch.device:
        """Nothing of another node has a place here."""
        raise AssertionError(device)

    def begin(self, parts: Sequence[Rows]) -> None:
        """Nothing: the first node tells of passes."""

    def drop(self) -> None:
        """Nothing: the first node has dropped it."""

    def hop(self, tensor: torch.Tensor, source: int, target: int) -> torch.Tensor:
        """Hidden states that come here, or go.

        Raises:
            PassDroppedError: none will come.
        """
        if target == self.here:
            return receive_rows(self._line, self._carrier, tensor, self.number)[0]
        if source == self.here:
            record = _record(self.number, asdict(self._moved()))
            self._carrier.send(self._line, tensor, record)
        return tensor


class AwayKV:
    """Rows of a sequence on the other nodes: what becomes of them is told with the next pass.

    Args:
        lead: tells it.
        index: of the sequence.
        near: the rows here, of which there are as many.
    """

    def __init__(self, lead: Lead, index: int, near: KVCache) -> None:
        self._lead, self.index, self._near = lead, index, near

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self._near.length

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self._near.capacity

    def begin_pass(self, rows: int, *, keeps_all: bool) -> None:
        """Nothing: the pass itself is told."""

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Nobody appends here."""
        raise AssertionError(layer)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None = None,
    ) -> torch.Tensor:
        """Nobody attends here."""
        raise AssertionError(layer)

    def commit(self, keep: Sequence[int]) -> None:
        """Keep these pending rows."""
        self._lead.note("commit", self.index, list(keep))

    def truncate(self, length: int) -> None:
        """Forget rows from `length` on."""
        self._lead.note("truncate", self.index, length)


class AwayPool:
    """Memory that sequences share, cut up on the other nodes as it is here.

    Stretches that outlive their sequence have numbers there.
    """

    def __init__(self, lead: Lead, near: KVPool) -> None:
        self._lead, self._near, self.caches = lead, near, near.caches
        self._numbers: dict[Stretch, int] = {}
        self._next = 0

    @property
    def free_rows(self) -> int:
        """Rows that are in no stretch."""
        return self._near.free_rows

    def of(self, index: int) -> Stretch:
        """The stretch of a cache."""
        return self._near.of(index)

    def resize(self, index: int, rows: int) -> None:
        """Give a sequence so many rows."""
        self._near.resize(index, rows)
        self._lead.note("resize", index, rows)

    def begin(
        self,
        index: int,
        rows: int,
        parts: Sequence[tuple[Stretch, int]] = (),
        taken: Stretch | None = None,
    ) -> None:
        """Give an empty cache rows, of which the first are there already."""
        told = [[*self._named(part), count] for part, count in parts]
        self._near.begin(index, rows, parts, taken)
        number = None if taken is None else self._numbers.pop(taken)
        self._lead.note("begin", index, rows, told, number)

    def keep(self, index: int, first: int) -> Stretch:
        """Have rows of a cache outlive it."""
        kept = self._near.keep(index, first)
        self._lead.note("keep", index, first, self._number(kept))
        return kept

    def split(self, kept: Stretch, rows: int) -> Stretch:
        """Make two of a kept stretch."""
        rest = self._near.split(kept, rows)
        self._lead.note("split", self._numbers[kept], rows, self._number(rest))
        return rest

    def shorten(self, kept: Stretch, rows: int) -> None:
        """Give up what is behind the first rows of a kept stretch."""
        self._near.shorten(kept, rows)
        number = self._numbers[kept] if rows else self._numbers.pop(kept)
        self._lead.note("shorten", number, rows)

    def _number(self, kept: Stretch) -> int:
        self._numbers[kept] = self._next = self._next + 1
        return self._next

    def _named(self, stretch: Stretch) -> tuple[str, int]:
        if stretch.cache is None:
            return "kept", self._numbers[stretch]
        return "own", self.caches.index(stretch.cache)


class Follower:
    """Memory of another node that is cut up as the first node says.

    Args:
        pool: it; None where each sequence has its own.
        caches: of each sequence.
    """

    def __init__(self, pool: KVPool | None, caches: Sequence[KVCache]) -> None:
        self._pool, self._caches = pool, caches
        self._kept: dict[int, Stretch] = {}

    def follow(self, change: Sequence[Any]) -> None:
        """Make a change."""
        name, index, *rest = change
        if name in ("commit", "truncate"):
            getattr(self._caches[index], name)(*rest)
            return
        pool, kept = self._pool, self._kept
        assert pool is not None  # sequences share memory, as on the first node
        if name == "resize":
            pool.resize(index, *rest)
        elif name == "begin":
            rows, parts, taken = rest
            copied = [(pool.of(at) if of == "own" else kept[at], n) for of, at, n in parts]
            pool.begin(index, rows, copied, None if taken is None else kept.pop(taken))
        elif name == "keep":
            first, number = rest
            kept[number] = pool.keep(index, first)
        elif name == "split":
            rows, number = rest
            kept[number] = pool.split(kept[index], rows)
        elif name == "shorten":
            (rows,) = rest
            pool.shorten(kept[index] if rows else kept.pop(index), rows)


def receive_rows(
    line: Line, carrier: Carrier, like: torch.Tensor, number: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The next hidden states of a pass, in the number format and on the device of `like`.

    With them comes what the other end's link has brought. Those of an earlier pass, which was given
    up, are passed over.

    Raises:
        PassDroppedError: there will be none.
        NodeError: the line is broken, or other bytes come.
    """
    while (frame := line.take()).kind is Kind.ROWS and frame.record.get("number") != number:
        carrier.take(frame, like)
    if frame.kind is Kind.DROP:
        raise PassDroppedError
    record: dict[str, Any] = frame.record
    shape, rows = record.get("shape", []), like.shape[1]
    if frame.kind is not Kind.ROWS or shape[1:2] != [rows]:
        raise NodeError(
            f"{line.name} sent {frame.kind.name} {shape} where hidden states of {rows} rows are "
            "due: use one version of offload-run on all nodes"
        )
    return carrier.take(frame, like), record["moved"]


def _record(number: int, moved: Mapping[str, Any] = NOTHING) -> dict[str, Any]:
    """Of which pass rows are, and what the link has brought."""
    return {"number": number, "moved": dict(moved)}


def _described(part: Rows) -> dict[str, object]:
    striped = part.cache.rows if isinstance(part.cache, HybridKV) else part.cache
    assert isinstance(striped, StripedKV)  # where there are other nodes
    away = next(cache for cache in striped.parts if isinstance(cache, AwayKV))
    return {
        "cache": away.index,
        "rows": len(part.tokens),
        "places": list(part.places),
        "parents": None if part.parents is None else list(part.parents),
        "keeps_all": part.keeps_all,
    }
