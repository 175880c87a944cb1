"""How many tokens to draft, corrected step by step by measured tokens and seconds. No torch here.

A step with a draft of n nodes emits `tokens(n)` in `draft_s(n) + pass_s(n)` seconds. The plan
expects some of each, every step corrects them, and the next one drafts the size with the most
tokens a second. Sizes that are not in use are judged by what is known of them:

- a draft whose beginnings are drafts themselves tells how many tokens of its smaller sizes would
  have been accepted;
- the seconds of one size scale those expected of the others;
- now and then a neighbour is tried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from offload_rt.planning.yields import Outcome

_MEMORY = 16  # steps an average looks back, about
_PRIOR_WEIGHT = 2.0  # steps the plan's expectation counts for
_OUTLIER = 3.0  # a time above that many averages counts as that many: somebody else was busy
_WORTHWHILE = 0.03  # of the tokens of a step, which a change must gain
_PROBE_STEPS = 3
_FIRST_PROBE, _LAST_PROBE = 12, 96  # steps between tries; it doubles while they gain nothing
_PROBE_COST = 0.02  # of the time since the last try, which the next one may be expected to lose


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutlook:
    """What a step with a draft of some size should give and take.

    Attributes:
        nodes: of the draft; 0 drafts nothing.
        tokens: emitted, the model's own one included.
        draft_s: time to draft.
        pass_s: time of the pass that checks it.
    """

    nodes: int
    tokens: float
    draft_s: float
    pass_s: float

    @property
    def s_per_token(self) -> float:
        """Seconds of the step for each of its tokens."""
        return (self.draft_s + self.pass_s) / self.tokens


@dataclass(slots=True)
class _Average:
    """The mean of the first numbers, and then of the latest."""

    value: float = 0.0
    weight: float = 0.0
    memory: float = _MEMORY

    def add(self, number: float) -> None:
        self.weight = min(self.weight + 1.0, self.memory)
        self.value += (number - self.value) / self.weight

    def add_time(self, seconds: float) -> None:
        self.add(min(seconds, _OUTLIER * self.value) if self.weight else seconds)

    def known_or(self, prior: float) -> float:
        return self.value if self.weight else prior

    def with_prior(self, prior: float) -> float:
        whole = self.weight + _PRIOR_WEIGHT
        return (self.weight * self.value + _PRIOR_WEIGHT * prior) / whole


@dataclass(slots=True)
class _Seen:
    """What was seen of one size."""

    accepted: _Average = field(default_factory=_Average)
    draft_s: _Average = field(default_factory=_Average)
    pass_s: _Average = field(default_factory=_Average)


class Controller:
    """Chooses the number of tokens to draft.

    Args:
        outlooks: what to expect of each size that may be chosen, by size; the first drafts nothing.
        nodes: the size to begin with; None takes the best expected.
    """

    def __init__(self, outlooks: Sequence[StepOutlook], nodes: int | None = None) -> None:
        if not outlooks or outlooks[0].nodes != 0:
            raise ValueError("the first outlook must be that of drafting nothing")
        self._outlooks = {outlook.nodes: outlook for outlook in outlooks}
        self._sizes = list(self._outlooks)
        self._seen = {size: _Seen() for size in self._sizes}
        self._hits = _Average(memory=4 * _MEMORY)  # all or nothing, so it takes more of them
        self._draft_scale, self._pass_scale = _Average(), _Average()
        best = min(outlooks, key=lambda outlook: outlook.s_per_token).nodes
        self._current = best if nodes is None else self._size(nodes)
        self._interval, self._until_probe = _FIRST_PROBE, _FIRST_PROBE
        self._probe: int | None = None
        self._since_probe_s = 0.0
        self._tries = 0
        self._rested = False  # the last step drafted nothing

    @property
    def nodes(self) -> int:
        """How many to draft in the next step."""
        return self._current if self._probe is None else self._probe

    @property
    def sizes(self) -> Sequence[int]:
        """What can be chosen."""
        return self._sizes

    def expect(self, size: int) -> StepOutlook:
        """What is expected of a size now."""
        prior, seen = self._outlooks[size], self._seen[size]
        draft_prior = prior.draft_s * self._draft_scale.known_or(1.0)
        pass_prior = prior.pass_s * self._pass_scale.known_or(1.0)
        return StepOutlook(
            nodes=size,
            tokens=1.0 + self._accepted(size),
            draft_s=seen.draft_s.with_prior(draft_prior) if size else 0.0,
            pass_s=seen.pass_s.with_prior(pass_prior),
        )

    def accepted(self) -> dict[int, tuple[float, float]]:
        """Per size that was seen: how many steps that counts for, and tokens accepted in each."""
        return {
            size: (seen.accepted.weight, seen.accepted.value)
            for size, seen in self._seen.items()
            if size and seen.accepted.weight
        }

    def observe(
        self, asked: int, outcomes: Sequence[Outcome], *, draft_s: float, pass_s: float
    ) -> None:
        """Take in a step.

        Args:
            asked: `nodes` when it began.
            outcomes: of each sequence that took part.
            draft_s: time spent drafting, of all of them.
            pass_s: time from there until their tokens were known.
        """
        drafts = [outcome for outcome in outcomes if outcome.drafted]
        rows = max((outcome.drafted for outcome in drafts), default=0)
        self._time(self._size(rows), pass_s)
        if asked:
            self._hits.add(len(drafts) / max(1, len(outcomes)))
        for outcome in drafts:
            self._count(asked, outcome)
        if drafts and not self._rested:  # after a rest the drafter reads what it has missed
            seen, expected = self._seen[self._size(asked)], self._outlooks[self._size(asked)]
            seen.draft_s.add_time(draft_s)
            if expected.draft_s > 0.0:
                self._draft_scale.add_time(draft_s / expected.draft_s)
        self._rested = not asked
        self._since_probe_s += draft_s + pass_s
        self._choose()

    def _time(self, size: int, pass_s: float) -> None:
        self._seen[size].pass_s.add_time(pass_s)
        self._pass_scale.add_time(pass_s / max(self._outlooks[size].pass_s, 1e-9))

    def _count(self, asked: int, outcome: Outcome) -> None:
        for size in self._sizes[1:]:
            if size == asked or (outcome.nested and size < asked):
                self._seen[size].accepted.add(sum(node < size for node in outcome.path))

    def _accepted(self, size: int) -> float:
        """Accepted tokens of a draft of that size: seen, or what the nearest seen size tells."""
        if not size:
            return 0.0
        prior = self._outlooks[size].tokens - 1.0
        own = self._seen[size].accepted
        known = [s for s in self._sizes[1:] if self._seen[s].accepted.weight > own.weight]
        if known:
            near = min(known, key=lambda s: abs(s - size))
            base = self._outlooks[near].tokens - 1.0
            seen = self._seen[near].accepted.with_prior(base)
            prior *= seen / base if base > 0.0 else 1.0
        return own.with_prior(prior)

    def _choose(self) -> None:
        """Take the size that gains most, and try another now and then."""
        expected = {size: self.expect(size) for size in self._sizes}
        rate = self._rate(expected[self._current], expected[0])

        def gain(size: int) -> float:
            step = expected[size]
            return step.tokens - rate * (step.draft_s + step.pass_s)

        best = max(self._sizes, key=gain)
        if gain(best) > gain(self._current) + _WORTHWHILE * expected[best].tokens:
            self._current, self._interval = best, _FIRST_PROBE
            self._probe, self._until_probe = None, _FIRST_PROBE
            return
        self._until_probe -= 1
        if self._until_probe > 0:
            return
        if self._probe is None:
            others = [size for size in self._sizes if size != self._current]
            hopeful = max(others, key=gain, default=None)
            probe = hopeful if self._tries % 2 else self._neighbour()
            if probe is not None and self._loss_s(expected, probe) <= (
                _PROBE_COST * self._since_probe_s
            ):
                self._probe = probe
                self._tries, self._until_probe = self._tries + 1, _PROBE_STEPS
        else:
            self._probe, self._since_probe_s = None, 0.0
            self._interval = min(2 * self._interval, _LAST_PROBE)
            self._until_probe = self._interval

    def _rate(self, drafting: StepOutlook, plain: StepOutlook) -> float:
        """Tokens a second when a draft is found as often as it was."""
        hits = self._hits.with_prior(1.0) if drafting.nodes else 0.0
        tokens = hits * drafting.tokens + (1.0 - hits) * plain.tokens
        seconds = hits * (drafting.draft_s + drafting.pass_s) + (1.0 - hits) * plain.pass_s
        return tokens / max(seconds, 1e-9)

    def _loss_s(self, expected: Mapping[int, StepOutlook], probe: int) -> float:
        """Time that trying a size is expected to lose against the one in use."""
        lost_s = expected[probe].s_per_token - expected[self._current].s_per_token
        return _PROBE_STEPS * expected[probe].tokens * lost_s

    def _neighbour(self) -> int | None:
        """A size next to the one in use, above and below in turn."""
        place, upwards = self._sizes.index(self._current), self._tries % 4 == 0
        above, below = place + 1 < len(self._sizes), place > 0
        if above and (upwards or not below):
            return self._sizes[place + 1]
        return self._sizes[place - 1] if below else None

    def _size(self, nodes: int) -> int:
        """The smallest size of at least that many nodes, or the largest."""
        return next((size for size in self._sizes if size >= nodes), self._sizes[-1])
