"""Accepted tokens of drafts: as expected at first, and then as seen. No torch here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from offload_rt.speculative.kind import SIZES, Points
from offload_rt.speculative.kinds import kind_of

_PRIOR_STEPS = 8.0  # steps an expectation counts for against what was seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the draft of one sequence.

    Attributes:
        drafted: nodes that were proposed; a drafter may find none.
        path: those that were accepted, from the root down.
        nested: the first m nodes are what the drafter would have proposed had it been asked for m.
        made: share of the passes a draft model may make for a tree that it made.
        likely: of each node, how probable the drafter holds it that it is accepted; empty where it
            tells nothing.
    """

    drafted: int
    path: Sequence[int]
    nested: bool
    made: float | None = None
    likely: Sequence[float] = ()


# Of the draft passes a tree may use: 0.69 to 0.80 were made on MT-Bench, 0.85 to 0.90 on HumanEval
# (docs/RESULTS.md, "The planner's grid, a third time").
MADE = 0.78


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What drafting gave so far on this machine.

    Attributes:
        accepted: per number of nodes, steps it counts for and tokens accepted in each.
        hits: share of the steps in which the drafter found something, and steps that counts for.
        made: share of the passes for trees that were made, and the same.
    """

    accepted: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    hits: tuple[float, float] = (0.0, 0.0)
    made: tuple[float, float] = (0.0, 0.0)


NOTHING_SEEN = Seen()


@dataclass(frozen=True, slots=True)
class Yield:
    """Tokens that drafts of one drafter give.

    Attributes:
        points: nodes and tokens accepted per draft that was found, by nodes.
        hits: share of the steps in which one is found.
        made: share of the passes a draft model may make for a tree that it makes.
        steps: seen, that it rests on.
    """

    points: Points
    hits: float = 1.0
    made: float = MADE
    steps: float = math.inf

    def accepted(self, nodes: int) -> float:
        """Tokens accepted of a draft of that size; straight lines over the logarithm of the nodes.

        Above the last point it stays, below the first it falls to 0 with the nodes.
        """
        places = [(0.0, 0.0), *((math.log2(1 + n), value) for n, value in self.points)]
        x = math.log2(1 + nodes)
        for (low, start), (high, end) in zip(places, places[1:], strict=False):
            if x <= high:
                return start + (end - start) * (x - low) / (high - low)
        return places[-1][1]

    def tokens(self, nodes: int) -> float:
        """Tokens per step, the model's own one included."""
        return 1.0 + self.hits * self.accepted(nodes)


def expected_yield(kind: str, seen: Seen = NOTHING_SEEN, own: Points | None = None) -> Yield:
    """What to expect of a drafter.

    Args:
        kind: its name.
        seen: what it gave on this machine.
        own: what is known of this very drafter, in place of what its kind gives.
    """
    of_kind = kind_of(kind)
    prior = Yield(own or of_kind.prior)
    points = [(size, _corrected(size, prior, seen)) for size in _sizes(prior, seen)]
    hits = _blended(of_kind.prior_hits, seen.hits)
    rising, most = [], 0.0
    for size, value in points:  # more nodes never give less; chance may say so
        most = max(most, value)
        rising.append((size, most))
    return Yield(tuple(rising), hits, _blended(MADE, seen.made), steps=seen.hits[0])


class Tally:
    """Counts what drafts gave."""

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}
        self._accepted: dict[int, int] = {}
        self._asked = self._found = self._trees = 0
        self._made = 0.0

    def add(self, asked: int, outcome: Outcome) -> None:
        """Count a draft that was asked for, of at most `asked` nodes."""
        self._asked += 1
        self._found += bool(outcome.drafted)
        if outcome.made is not None:
            self._trees += 1
            self._made += outcome.made
        if not outcome.drafted:
            return
        smaller = [size for size in SIZES if size < asked] if outcome.nested else []
        for size in [*smaller, asked]:
            self._steps[size] = self._steps.get(size, 0) + 1
            accepted = sum(node < size for node in outcome.path)
            self._accepted[size] = self._accepted.get(size, 0) + accepted

    def seen(self) -> Seen:
        """The counts as shares."""
        return Seen(
            accepted={n: (steps, self._accepted[n] / steps) for n, steps in self._steps.items()},
            hits=(self._asked, self._found / self._asked) if self._asked else (0.0, 0.0),
            made=(self._trees, self._made / self._trees) if self._trees else (0.0, 0.0),
        )


def _blended(expected: float, seen: tuple[float, float]) -> float:
    steps, share = seen
    return (steps * share + _PRIOR_STEPS * expected) / (steps + _PRIOR_STEPS)


def _sizes(prior: Yield, seen: Seen) -> Sequence[int]:
    return sorted({size for size, _ in prior.points} | set(seen.accepted))


def _corrected(size: int, prior: Yield, seen: Seen) -> float:
    """Blend what was seen of a size with what its nearest seen neighbour tells of it."""
    expected = prior.accepted(size)
    others = [s for s in seen.accepted if s != size]
    if others:
        near = min(others, key=lambda s: abs(math.log2(1 + s) - math.log2(1 + size)))
        steps, value = seen.accepted[near]
        trust = steps / (steps + _PRIOR_STEPS)
        expected *= 1.0 + trust * (value / max(prior.accepted(near), 1e-9) - 1.0)
    return _blended(expected, seen.accepted.get(size, (0.0, 0.0)))
