"""Which part of a retrieval cache is the newest tokens, tried out for each answer. No torch here.

What a text says far back helps to summarise it; a story goes on from its last pages. With the same
budget one answer has a higher acceptance rate with chunks of the whole context, another with the
newest tokens alone. Which one only the accepted tokens tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_MEMORY = 64.0  # judged tokens a rate looks back, about
_FIRST_WAIT, _LAST_WAIT = 4, 64  # builds between tries; it doubles while they gain nothing


@dataclass(slots=True)
class _Judged:
    """What was accepted of a share's drafts, older tokens counting less."""

    accepted: float = 0.0
    tokens: float = 0.0

    @property
    def rate(self) -> float:
        return self.accepted / self.tokens if self.tokens else 0.0

    def add(self, accepted: int, tokens: int) -> None:
        kept = max(0.0, 1.0 - tokens / _MEMORY)
        self.accepted = kept * self.accepted + accepted
        self.tokens = kept * self.tokens + tokens


class RecentChoice:
    """The share of recent tokens of each build of one retrieval cache.

    Every share is tried once. Then the one with the highest acceptance is kept to, and now and then
    another is tried for one build. Only tokens decide, no times, so a seeded answer stays the same.

    Args:
        shares: what may be chosen; the first is the first.

    Attributes:
        current: share of the last build.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._judged = {share: _Judged() for share in shares}
        self.forget()

    def forget(self) -> None:
        """Begin again, for another answer."""
        self._judged = {share: _Judged() for share in self._judged}
        self._order = list(self._judged)  # the one tried longest ago comes first
        self.current = self._order[0]
        self._noted = False  # whether a draft of the last build was judged
        self._wait = self._until_try = _FIRST_WAIT
        self._tried: float | None = None

    def note(self, share: float, *, accepted: int, judged: int) -> None:
        """Count a draft.

        Args:
            share: of the build it was made with.
            accepted: how many of its tokens were.
            judged: those and the first that did not, if one did not.
        """
        self._judged[share].add(accepted, judged)
        self._noted |= share == self.current

    def next(self) -> float:
        """The share to build with now."""
        if self._noted:  # else nothing was learnt from the last build, or there was none
            self.current = self._chosen()
        self._noted = False
        self._order.remove(self.current)
        self._order.append(self.current)
        return self.current

    def _chosen(self) -> float:
        untried = [share for share, judged in self._judged.items() if not judged.tokens]
        if untried:
            return untried[0]
        best = max(self._judged, key=lambda share: self._judged[share].rate)
        if self._tried is not None:
            gained = best == self._tried
            self._wait = _FIRST_WAIT if gained else min(2 * self._wait, _LAST_WAIT)
            self._until_try, self._tried = self._wait, None
        self._until_try -= 1
        others = [share for share in self._order if share != best]
        if self._until_try > 0 or not others:
            return best
        self._tried = others[0]
        return self._tried
