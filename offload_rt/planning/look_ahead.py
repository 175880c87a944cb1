"""Whether it pays to copy experts before their layer asks for them, found out while running.

What is copied ahead in vain changes nothing of what a pool holds afterwards (`streaming/experts.py`
), so passes with and without it may take turns: a trial compares their times, two by two. It ends
as soon as one of the two is faster beyond doubt, and otherwise in favour of looking ahead only if
that was faster. What was decided is tried again later, ever more seldom. No torch here.
"""

import math
from dataclasses import dataclass, field

from offload_rt.config import LookAhead

# Of a run: memory is touched for the first time, and the pool is what a prompt left.
_FIRST_PASSES = 2
_FEWEST_PAIRS, _MOST_PAIRS = 6, 32
_DOUBT = 2.5  # standard errors of a mean that is beyond doubt
_OUTLIER = 1.0  # of a logarithm: what else the machine did counts as no more
_FIRST_REST, _LAST_REST = 256, 4096  # passes until it is tried again


@dataclass(slots=True)
class _Trial:
    """Passes of like numbers of rows.

    Attributes:
        looks: what was decided.
        rest: passes that are made so before the next trial.
        with_s: of the first half of a pair; None: that comes next.
        gains: logarithms of times without by times with it, a pair each.
        since: passes since the trial before.
        running: a trial is under way.
        left: passes that are made before the first one.
    """

    looks: bool = False
    rest: int = _FIRST_REST
    with_s: float | None = None
    gains: list[float] = field(default_factory=list)
    since: int = 0
    running: bool = True
    left: int = _FIRST_PASSES

    def next_looks(self) -> bool:
        """Whether the next pass looks ahead."""
        return self.with_s is None if self.running and not self.left else self.looks

    def add(self, seconds: float) -> None:
        """Take in a pass that was made as `next_looks` said."""
        if self.left:
            self.left -= 1
        elif not self.running:
            self.since += 1
            if self.since >= self.rest:
                self.since, self.running = 0, True
                self.rest = min(_LAST_REST, 2 * self.rest)
        elif self.with_s is None:
            self.with_s = seconds
        else:
            gain = math.log(seconds / self.with_s)
            self.gains.append(min(_OUTLIER, max(-_OUTLIER, gain)))
            self.with_s = None
            self._decide()

    def _decide(self) -> None:
        """End the trial if it told enough."""
        pairs = len(self.gains)
        if pairs < _FEWEST_PAIRS:
            return
        mean = sum(self.gains) / pairs
        spread = sum((gain - mean) ** 2 for gain in self.gains) / (pairs - 1)
        error = math.sqrt(spread / pairs)
        if abs(mean) > _DOUBT * error or pairs >= _MOST_PAIRS:
            self.looks = mean > error
            self.running = False
            self.gains.clear()


class LookAheadJudge:
    """Says of each pass whether it looks ahead.

    Args:
        mode: whether that is settled.
        above: passes of no more rows than this never do.
    """

    def __init__(self, mode: LookAhead, above: int = 0) -> None:
        self._mode, self._above = mode, above
        self._trials: dict[int, _Trial] = {}
        self._passes = self._looked = 0

    def looks(self, rows: int) -> bool:
        """Whether the next pass, of so many rows, looks ahead."""
        if rows <= self._above:
            return False
        if self._mode is LookAhead.AUTO:
            return self._trial(rows).next_looks()
        return self._mode is LookAhead.ON

    def observe(self, rows: int, seconds: float) -> None:
        """Take in how long that pass took."""
        self._passes += 1
        self._looked += self.looks(rows)
        if self._mode is LookAhead.AUTO and rows > self._above and seconds > 0.0:
            self._trial(rows).add(seconds)

    @property
    def share(self) -> float:
        """Of the passes so far, those that looked ahead."""
        return self._looked / max(1, self._passes)

    def _trial(self, rows: int) -> _Trial:
        return self._trials.setdefault((rows - 1).bit_length(), _Trial())
