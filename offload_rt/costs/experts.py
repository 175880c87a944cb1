"""How many experts a pass has to wait for: what a pool holds against what tokens ask for.

Where the least recently used expert of a layer is replaced, a pool of any size holds those that
were asked for most recently, so one histogram of *stack distances* (how many other experts of the
layer were asked for since, Mattson et al. 1970) has the hits of every size. A pool records it while
it runs (`streaming/experts.py`). Until one is there the prior below is used, which is cautious: it
is of routers with as little locality as any published (`docs/RESULTS.md`, "Experts one by one").
No torch here.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

# Share of a layer's experts that a pool holds, and of a token's experts that are among these:
# routers made of all 576 directions of a 135M model's states, 64 experts, 4 a token. 26 % of them
# were the token's before, too; GLM-4.7-Flash has 25.7 %, Qwen3-30B-A3B 45 %.
_HIT_RATES = (
    (0.0, 0.0),
    (0.06, 0.26),
    (0.19, 0.48),
    (0.25, 0.59),
    (0.375, 0.70),
    (0.5, 0.84),
    (0.64, 0.86),
    (1.0, 1.0),
)
# Experts that rows after each other ask for and that are not held grow with rows^(1 - b): b by
# share held, of chains of 4, 8 and 16 rows through the same pools.
_ROW_SHARING = ((0.0, 0.39), (0.125, 0.19), (0.25, 0.11), (0.5, 0.05), (1.0, 0.0))
# Different experts of n rows are E (1 - (1 - k / E)^(n^a)); a = 1 if rows were independent.
_UNION = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Distances:
    """How far back experts were that passes of like numbers of rows asked for.

    Attributes:
        calls: times a layer asked.
        counts: how often for the n-th most recently used of the layer, counted from 0; last of
            those that were never used before.
    """

    calls: int
    counts: tuple[int, ...]

    def misses(self, held: float) -> float:
        """Experts of a layer that a pass asks for and a pool lacks, on average.

        Args:
            held: experts of the layer that the pool holds.
        """
        first = int(held)
        beyond = sum(self.counts[first + 1 :])
        partly = self.counts[first] * (1.0 - (held - first)) if first < len(self.counts) else 0.0
        return (beyond + partly) / max(1, self.calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUse:
    """What is known of the experts that a model's tokens ask for.

    Attributes:
        seen: by class of a pass's rows (1, 2, 3 to 4, 5 to 8, ... as 0, 1, 2, 3, ...).
    """

    seen: Mapping[int, Distances] = field(default_factory=dict)

    def misses(self, rows: int, held: float, experts: int, per_token: int) -> float:
        """Experts of a layer that a pass of so many rows has to wait for, on average.

        Args:
            rows: of the pass.
            held: experts of the layer that the pool holds.
            experts: of the layer.
            per_token: that a row is sent to.
        """
        if (seen := self.seen.get((rows - 1).bit_length())) is not None:
            return seen.misses(held)
        share = min(1.0, held / experts)
        one = per_token * (1.0 - _between(_HIT_RATES, share))
        many = one * rows ** (1.0 - _between(_ROW_SHARING, share))
        return min(many, union(rows, experts, per_token))


def union(rows: int, experts: int, per_token: int) -> float:
    """Different experts of a layer that rows after each other are sent to."""
    idle = max(0.0, 1.0 - per_token / experts)
    return float(experts * (1.0 - idle ** (rows**_UNION)))


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Straight lines from point to point."""
    index = bisect_right([x for x, _ in points], at)
    if index >= len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = list(pairwise(points))[max(0, index - 1)]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
