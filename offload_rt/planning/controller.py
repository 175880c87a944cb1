"""How many tokens to draft, corrected step by step by measured tokens and seconds. No torch here.

A step with a draft of n nodes emits `tokens(n)` in `draft_s(n) + pass_s(n)` seconds. The plan
expects some of each, every step corrects them, and the next one drafts the size with the most
tokens a second. Sizes that are not in use are judged by what is known of them:

- a draft whose beginnings are drafts themselves tells how many tokens of its smaller sizes would
  have been accepted;
- the seconds of one size scale those expected of the others, the more the nearer they are;
- now and then a neighbour is tried.

Where several sequences take part in a pass, drafts of many make it large, and a size that pays for
one of them may not pay for sixteen. So seconds of a pass are known by its rows, and a size is
chosen for each number of sequences, powers of two apart; what is accepted is the same for all.
"""

from bisect import bisect_left
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
    """What was seen of one size: tokens of a draft, and seconds to make one."""

    accepted: _Average = field(default_factory=_Average)
    draft_s: _Average = field(default_factory=_Average)


@dataclass(slots=True)
class _Choice:
    """The size for some number of sequences, and which other is tried when.

    Attributes:
        current: the size in use.
        probe: the one that is tried now.
        interval: steps between tries; `until_probe` of them are left.
        since_probe_s: time since the last try.
        tries: so far.
    """

    current: int
    probe: int | None = None
    interval: int = _FIRST_PROBE
    until_probe: int = _FIRST_PROBE
    since_probe_s: float = 0.0
    tries: int = 0

    @property
    def nodes(self) -> int:
        """The size of the next step."""
        return self.current if self.probe is None else self.probe


class Controller:
    """Chooses the number of tokens to draft for each of the sequences in a pass.

    Args:
        outlooks: what to expect of each size that may be chosen, by size; the first drafts nothing.
            Times are those of a step in which all sequences take part.
        nodes: the size to begin with where all do; None takes the best expected.
        sequences: that may take part.
        alone: what to expect of a step of a single one, where there may be more.
    """

    def __init__(
        self,
        outlooks: Sequence[StepOutlook],
        nodes: int | None = None,
        *,
        sequences: int = 1,
        alone: Sequence[StepOutlook] = (),
    ) -> None:
        if not outlooks or outlooks[0].nodes != 0:
            raise ValueError("the first outlook must be that of drafting nothing")
        self._outlooks = {outlook.nodes: outlook for outlook in outlooks}
        self._sizes, self._sequences = list(self._outlooks), sequences
        self._seen = {size: _Seen() for size in self._sizes}
        self._hits = _Average(memory=4 * _MEMORY)  # all or nothing, so it takes more of them
        self._draft_scale = _Average()
        planned = {1 + one.nodes: one.pass_s for one in alone if 1 + one.nodes < sequences}
        planned |= {sequences * (1 + one.nodes): one.pass_s for one in outlooks}
        groups = {self._group(count) for count in range(1, sequences + 1)}
        points = {group * (1 + size) for group in groups for size in self._sizes}
        self._points = sorted(points | planned.keys())
        self._expected_s = {rows: max(_between(planned, rows), 1e-9) for rows in self._points}
        self._pass_s = {rows: _Average() for rows in self._points}
        self._choices: dict[int, _Choice] = {}
        if nodes is not None:
            self._choices[sequences] = _Choice(self._size(nodes))
        self._rested = False  # the last step drafted nothing

    @property
    def nodes(self) -> int:
        """How many to draft in the next step if one sequence takes part in it."""
        return self.nodes_for(1)

    def nodes_for(self, running: int) -> int:
        """How many to draft for each of so many sequences in the next step."""
        return self._choice(running).nodes

    @property
    def chosen(self) -> dict[int, int]:
        """The size in use for up to so many sequences, of those numbers that occurred."""
        return {group: choice.current for group, choice in sorted(self._choices.items())}

    @property
    def sizes(self) -> Sequence[int]:
        """What can be chosen."""
        return self._sizes

    def expect(self, size: int, running: int = 1) -> StepOutlook:
        """What is expected now of a step of so many sequences; tokens are those of each."""
        seen = self._seen[size]
        draft_prior = self._draft_prior_s(size) * self._draft_scale.known_or(1.0)
        point = self._point(running * (1 + size))
        pass_prior = self._pass_prior_s(point)
        return StepOutlook(
            nodes=size,
            tokens=1.0 + self._accepted(size),
            draft_s=running * seen.draft_s.with_prior(draft_prior) if size else 0.0,
            pass_s=self._pass_s[point].with_prior(pass_prior),
        )

    def accepted(self) -> dict[int, tuple[float, float]]:
        """Per size that was seen: how many steps that counts for, and tokens accepted in each."""
        return {
            size: (seen.accepted.weight, seen.accepted.value)
            for size, seen in self._seen.items()
            if size and seen.accepted.weight
        }

    def observe(
        self,
        asked: int,
        outcomes: Sequence[Outcome],
        *,
        draft_s: float,
        pass_s: float,
        rows: int | None = None,
        running: int = 1,
    ) -> None:
        """Take in a step.

        Args:
            asked: `nodes_for` those that ran when it began.
            outcomes: of sequences that took part.
            draft_s: time spent drafting, of all of them.
            pass_s: time from there until their tokens were known.
            rows: of the pass; None: those of the outcomes.
            running: sequences that took part.
        """
        drafts = [outcome for outcome in outcomes if outcome.drafted]
        if rows is None:
            rows = sum(1 + outcome.drafted for outcome in outcomes)
        self._pass_s[self._point(rows)].add_time(pass_s)
        if asked:
            self._hits.add(len(drafts) / max(1, len(outcomes)))
        for outcome in drafts:
            self._count(asked, outcome)
        if drafts and not self._rested:  # after a rest the drafter reads what it has missed
            size, each_s = self._size(asked), draft_s / running
            self._seen[size].draft_s.add_time(each_s)
            if (expected_s := self._draft_prior_s(size)) > 0.0:
                self._draft_scale.add_time(each_s / expected_s)
        self._rested = not asked
        choice = self._choice(running)
        choice.since_probe_s += draft_s + pass_s
        self._choose(choice, running)

    def _group(self, running: int) -> int:
        """The number of sequences for which a choice is made: the next power of two."""
        return min(self._sequences, 1 << max(0, running - 1).bit_length())

    def _choice(self, running: int) -> _Choice:
        group = self._group(running)
        if group not in self._choices:
            best = min(self._sizes, key=lambda size: self.expect(size, group).s_per_token)
            self._choices[group] = _Choice(best)
        return self._choices[group]

    def _point(self, rows: int) -> int:
        """The least number of rows, of those that times are kept for, that is not below."""
        return self._points[min(bisect_left(self._points, rows), len(self._points) - 1)]

    def _pass_prior_s(self, point: int) -> float:
        """What is expected of a pass of so many rows that was not measured.

        The plan's seconds are scaled as those of others were, the more the nearer their rows are;
        and fewer rows take no longer than more of them did.
        """
        scale = weight = 0.0
        most = float("inf")
        for rows, seen in self._pass_s.items():
            if seen.weight:
                near = seen.weight * (min(rows, point) / max(rows, point)) ** 2
                scale += near * seen.value / self._expected_s[rows]
                weight += near
                most = min(most, seen.value) if rows > point else most
        return min(most, self._expected_s[point] * (scale / weight if weight else 1.0))

    def _draft_prior_s(self, size: int) -> float:
        """What the plan expects of drafting for one sequence."""
        return self._outlooks[size].draft_s / self._sequences

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

    def _choose(self, choice: _Choice, running: int) -> None:
        """Take the size that gains most, and try another now and then."""
        expected = {size: self.expect(size, running) for size in self._sizes}
        rate = self._rate(expected[choice.current], expected[0])

        def gain(size: int) -> float:
            step = expected[size]
            return step.tokens - rate * (step.draft_s + step.pass_s)

        best = max(self._sizes, key=gain)
        if gain(best) > gain(choice.current) + _WORTHWHILE * expected[best].tokens:
            choice.current, choice.interval = best, _FIRST_PROBE
            choice.probe, choice.until_probe = None, _FIRST_PROBE
            return
        choice.until_probe -= 1
        if choice.until_probe > 0:
            return
        if choice.probe is None:
            others = [size for size in self._sizes if size != choice.current]
            hopeful = max(others, key=gain, default=None)
            probe = hopeful if choice.tries % 2 else self._neighbour(choice)
            if probe is not None and _loss_s(expected[probe], expected[choice.current]) <= (
                _PROBE_COST * choice.since_probe_s
            ):
                choice.probe = probe
                choice.tries, choice.until_probe = choice.tries + 1, _PROBE_STEPS
        else:
            choice.probe, choice.since_probe_s = None, 0.0
            choice.interval = min(2 * choice.interval, _LAST_PROBE)
            choice.until_probe = choice.interval

    def _rate(self, drafting: StepOutlook, plain: StepOutlook) -> float:
        """Tokens a second when a draft is found as often as it was."""
        hits = self._hits.with_prior(1.0) if drafting.nodes else 0.0
        tokens = hits * drafting.tokens + (1.0 - hits) * plain.tokens
        seconds = hits * (drafting.draft_s + drafting.pass_s) + (1.0 - hits) * plain.pass_s
        return tokens / max(seconds, 1e-9)

    def _neighbour(self, choice: _Choice) -> int | None:
        """A size next to the one in use, above and below in turn."""
        place, upwards = self._sizes.index(choice.current), choice.tries % 4 == 0
        above, below = place + 1 < len(self._sizes), place > 0
        if above and (upwards or not below):
            return self._sizes[place + 1]
        return self._sizes[place - 1] if below else None

    def _size(self, nodes: int) -> int:
        """The smallest size of at least that many nodes, or the largest."""
        return next((size for size in self._sizes if size >= nodes), self._sizes[-1])


def _loss_s(probe: StepOutlook, current: StepOutlook) -> float:
    """Time that trying a size is expected to lose against the one in use."""
    return _PROBE_STEPS * probe.tokens * (probe.s_per_token - current.s_per_token)


def _between(planned: Mapping[int, float], rows: int) -> float:
    """Seconds of a pass of so many rows, in between if the plan says nothing of it."""
    known = sorted(planned)
    place = bisect_left(known, rows)
    if place == len(known) or known[place] == rows or not place:
        return planned[known[min(place, len(known) - 1)]]
    below, above = known[place - 1], known[place]
    share = (rows - below) / (above - below)
    return planned[below] + share * (planned[above] - planned[below])
