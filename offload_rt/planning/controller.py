"""How many tokens to draft, corrected step by step by measured tokens and seconds. No torch here.

A step with a draft of n nodes emits `tokens(n)` in `draft_s(n) + pass_s(n)` seconds. The plan
expects some of each, every step corrects them, and the next one drafts the size with the most
tokens a second. Sizes that are not in use are judged by what is known of them:

- a draft whose beginnings are drafts themselves tells how many tokens of its smaller sizes would
  have been accepted;
- where the drafter tells how probable its nodes are, these say what each size should give, larger
  ones too, and what was accepted says how far to believe them: of a few steps that is known far
  better than what those happened to have accepted;
- the seconds of one size scale those expected of the others, the more the nearer they are;
- the next larger and smaller sizes are tried at once if that should cost little, and a neighbour
  now and then;
- drafting nothing is tried at once where steps are slower than was planned without drafts;
- where few nodes or none are checked, drafts that are found in memory are compared with the tokens
  that come.

Where several sequences take part in a pass, drafts of many make it large, and a size that pays for
one of them may not pay for sixteen. So seconds of a pass are known by its rows, and a size is
chosen for each number of sequences, powers of two apart; what is accepted is the same for all.

A drafter reads a text before its first draft, and what was written while nobody drafted. Where
answers come and go, hardly a step is without such a first draft, so seconds are told apart by how
many tokens were read (`_Reading`). Each text is read once, however much is drafted: its seconds
are shared by the tokens of an answer, and speak for drafting nothing only.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from offload_rt.planning.yields import Outcome

_MEMORY = 16  # steps an average looks back, about
_PRIOR_WEIGHT = 2.0  # steps the plan's expectation counts for
# How far a drafter's probabilities are to be believed changes less than what they say, and little
# from size to size (docs/RESULTS.md, "A first run's draft size"): steps it is seen for, and that
# what all sizes say of it counts for against one of them.
_BELIEF_MEMORY, _BELIEF_WEIGHT = 64, 16.0
_OUTLIER = 3.0  # a time above that many averages counts as that many: somebody else was busy
_FIRST_OUTLIER = 1.3  # and a first one above that many times what was expected, as that many
_WORTHWHILE = 0.03  # of the tokens of a step, which a change must gain
_PROBE_STEPS = 3
_FIRST_PROBE, _LAST_PROBE = 12, 96  # steps between tries; it doubles while they gain nothing
_PROBE_COST = 0.02  # of the time since the last try, which the next one may be expected to lose
# Steps a new size is tried for, until it had so many; and steps after which the first is, the last.
_SCOUT_STEPS, _SCOUTED, _FIRST_SCOUT, _LAST_SCOUT = 2, 4, 3, 48
# Nodes of a draft that nobody checks: few, as tokens to come decide about each. Finding them takes
# 0.14 ms (docs/RESULTS.md, "Host time of a step"), which is to be 1 % of a pass.
_WATCHED, _WATCHED_S = 4, 0.014
# Times the seconds of a token without drafts, with which a size is not tried where it is known
# without a try what of it would be accepted.
_HOPELESS = 1.25
_LONGER = 1.15  # times what is planned: then the plan may be wrong about other sizes, too
# Steps with as many rows that the plan's time of a pass counts for against a time of others: that
# 130 rows compute longer than planned says little of 4, which wait for copies.
_PLANNED_WEIGHT = 0.3
_READING_MEMORY = 64  # steps for which seconds of drafting and of reading are told apart
_MOST_READING = 0.5  # of a step's drafting: beyond, what is left of it says too little of a size
_TURNOVER_MEMORY = 256  # steps in which answers are counted that took the place of others


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
    last_s: float = 0.0  # as it was measured

    def add(self, number: float) -> None:
        self.weight = min(self.weight + 1.0, self.memory)
        self.value += (number - self.value) / self.weight

    def add_time(self, seconds: float, expected_s: float) -> None:
        """Take in a time; of one far above what was expected the next will tell.

        Where that is as long, both count.
        """
        most = _OUTLIER * self.value if self.weight else _FIRST_OUTLIER * expected_s
        both_s = min(seconds, self.last_s)
        if both_s > most:
            self.value, most = (both_s if self.weight == 1.0 else self.value), both_s
        self.last_s = seconds
        self.add(min(seconds, most))

    def known_or(self, prior: float) -> float:
        return self.value if self.weight else prior

    def with_prior(self, prior: float, steps: float = _PRIOR_WEIGHT) -> float:
        whole = self.weight + steps
        return (self.weight * self.value + steps * prior) / whole


@dataclass(slots=True)
class _Belief:
    """How many of the tokens that drafters held probable were accepted."""

    accepted: _Average = field(default_factory=lambda: _Average(memory=_BELIEF_MEMORY))
    likely: _Average = field(default_factory=lambda: _Average(memory=_BELIEF_MEMORY))

    def add(self, accepted: int, likely: float) -> None:
        self.accepted.add(accepted)
        self.likely.add(likely)

    def share(self, prior: float, steps: float) -> float:
        likely = self.likely.value
        return self.accepted.with_prior(prior * likely, steps) / likely if likely else prior


@dataclass(slots=True)
class _Reading:
    """Seconds in which drafters read, told apart from those in which they draft.

    Both are one time. By what is planned to draft it is y = scale + token_s * x, where x is the
    number of tokens read by the same; the line that steps are nearest to tells both. The plan
    stands, always, for steps without reading that take what is planned, so that it is known what is
    drafting even where each step reads as much as the others.

    Attributes:
        weight: steps that count, and of these, older ones less, sums of x, y and their products.
    """

    weight: float = _PRIOR_WEIGHT
    x: float = 0.0
    y: float = _PRIOR_WEIGHT
    xx: float = 0.0
    xy: float = 0.0

    @property
    def scale(self) -> float:
        """Seconds of drafting, by planned ones."""
        return max(0.0, (self.y - self.token_s * self.x) / self.weight)

    @property
    def token_s(self) -> float:
        """Seconds of each token that is read."""
        spread = self.weight * self.xx - self.x**2
        return max(0.0, (self.weight * self.xy - self.x * self.y) / spread) if spread > 0.0 else 0.0

    def add(self, draft_s: float, tokens: int, planned_s: float) -> None:
        """Take in the drafting of a step, for which so many tokens were read."""
        x, y = tokens / planned_s, draft_s / planned_s
        kept, plan = 1.0 - 1.0 / _READING_MEMORY, _PRIOR_WEIGHT / _READING_MEMORY
        self.weight = kept * self.weight + plan + 1.0
        self.x, self.y = kept * self.x + x, kept * self.y + plan + y
        self.xx, self.xy = kept * self.xx + x * x, kept * self.xy + x * y


@dataclass(slots=True)
class _Turnover:
    """Texts of answers that took the place of others that ended.

    Those that all begin with are no turnover: that they are read once is no reason to stop.

    Attributes:
        running: sequences of the last step.
        vacant: places of ended ones that nobody took yet.
        texts: tokens that had to be read in a step; `emitted` of all answers.
    """

    running: int = 0
    vacant: int = 0
    texts: _Average = field(default_factory=lambda: _Average(memory=_TURNOVER_MEMORY))
    emitted: _Average = field(default_factory=lambda: _Average(memory=_TURNOVER_MEMORY))

    def add(self, running: int, came: Sequence[int], emitted: float) -> None:
        """Take in a step, and the tokens of texts of those that had not taken part before."""
        self.vacant += max(0, self.running + len(came) - running)
        followed = min(self.vacant, len(came))
        self.running, self.vacant = running, self.vacant - followed
        self.texts.add(sum(came) * followed / len(came) if came else 0.0)
        self.emitted.add(emitted)

    @property
    def texts_per_token(self) -> float:
        """Tokens to be read for each that is emitted."""
        return self.texts.value / self.emitted.value if self.emitted.value else 0.0


@dataclass(slots=True)
class _Seen:
    """What was seen of one size.

    Attributes:
        accepted: tokens of a draft.
        draft_scale: seconds to make one, by those that were planned.
        likely: accepted tokens that nodes beyond the next smaller size should add, by what the
            drafter holds probable.
        belief: how far that is so of drafts of this size.
    """

    accepted: _Average = field(default_factory=_Average)
    draft_scale: _Average = field(default_factory=_Average)
    likely: _Average = field(default_factory=_Average)
    belief: _Belief = field(default_factory=_Belief)


@dataclass(slots=True)
class _Choice:
    """The size for some number of sequences, and which other is tried when.

    Attributes:
        current: the size in use.
        probe: the one that is tried now.
        interval: steps between tries; `until_probe` of them are left.
        since_probe_s: time since the last try.
        tries: so far.
        steps: so far, and the time of them.
        tried: steps of each size.
        scouts: the probe is a new size.
        scout_s: time that trying those has lost.
    """

    current: int
    probe: int | None = None
    interval: int = _FIRST_PROBE
    until_probe: int = _FIRST_PROBE
    since_probe_s: float = 0.0
    tries: int = 0
    steps: int = 0
    steps_s: float = 0.0
    tried: Counter[int] = field(default_factory=Counter)
    scouts: bool = False
    scout_s: float = 0.0

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
        self._alone_s = {one.nodes: one.draft_s for one in alone}
        self._sizes, self._sequences = list(self._outlooks), sequences
        self._seen = {size: _Seen() for size in self._sizes}
        self._belief = _Belief()
        self._hits = _Average(memory=4 * _MEMORY)  # all or nothing, so it takes more of them
        self._draft_scale = _Average()
        self._reading, self._turnover = _Reading(), _Turnover()
        self._watches = False
        self._unread = 0  # tokens that drafters would have to read first, after a step without
        planned = {1 + one.nodes: one.pass_s for one in alone if 1 + one.nodes < sequences}
        planned |= {sequences * (1 + one.nodes): one.pass_s for one in outlooks}
        groups = {self._group(count) for count in range(1, sequences + 1)}
        points = {group * (1 + size) for group in groups for size in self._sizes}
        self._points = sorted(points | planned.keys())
        self._expected_s = {rows: max(between(planned, rows), 1e-9) for rows in self._points}
        self._pass_s = {rows: _Average() for rows in self._points}
        self._choices: dict[int, _Choice] = {}
        if nodes is not None:
            self._choices[sequences] = _Choice(self._size(nodes))

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
        scale = seen.draft_scale.with_prior(self._draft_scale.known_or(1.0))
        point = self._point(running * (1 + size))
        pass_prior = self._pass_prior_s(point)
        tokens, draft_s = 1.0 + self._accepted(size), 0.0
        if size:
            read = self._turnover.texts_per_token * tokens * running
            draft_s = scale * self._planned_draft_s(size, running) + self._reading.token_s * read
        return StepOutlook(
            nodes=size,
            tokens=tokens,
            draft_s=draft_s,
            pass_s=self._pass_s[point].with_prior(pass_prior),
        )

    def accepted(self) -> dict[int, tuple[float, float]]:
        """Per size that was seen: how many steps that counts for, and tokens accepted in each."""
        return {
            size: (seen.accepted.weight, seen.accepted.value)
            for size, seen in self._seen.items()
            if size and seen.accepted.weight
        }

    def watched_size(self, nodes: int, running: int = 1) -> int:
        """Nodes of drafts that nobody checks, where so many are checked; 0: it would not pay.

        One is made for each sequence that is running, in a pass of them all.
        """
        size = self._size(_WATCHED)
        pays = nodes < size and self.expect(nodes, running).pass_s >= running * _WATCHED_S
        return size if pays else 0

    def watched(self, size: int, outcome: Outcome) -> None:
        """Take in what would have become of a draft of that size, which nobody checked."""
        self._watches = True
        self._hits.add(float(outcome.drafted > 0))
        if outcome.drafted:
            self._count(size, outcome)

    def observe(  # noqa: PLR0913 - all that a step tells
        self,
        asked: int,
        outcomes: Sequence[Outcome],
        *,
        draft_s: float,
        pass_s: float | None,
        rows: int | None = None,
        running: int = 1,
        unread: int = 0,
        came: Sequence[int] = (),
    ) -> None:
        """Take in a step.

        Args:
            asked: `nodes_for` those that ran when it began.
            outcomes: of sequences that took part.
            draft_s: time spent drafting, of all of them.
            pass_s: time from there until their tokens were known; None where prompts were read in
                the same pass, so that it tells nothing.
            rows: of the pass; None: those of the outcomes.
            running: sequences that took part.
            unread: tokens of theirs that drafters had not seen when it began, the last step's
                aside; they read them before they draft.
            came: of sequences that took part for the first time, the tokens that their drafters
                had not seen.
        """
        drafts = [outcome for outcome in outcomes if outcome.drafted]
        if rows is None:
            rows = sum(1 + outcome.drafted for outcome in outcomes)
        if pass_s is not None:
            point = self._point(rows)
            self._pass_s[point].add_time(pass_s, self._pass_prior_s(point))
        if asked:
            self._hits.add(len(drafts) / max(1, len(outcomes)))
        for outcome in drafts:
            self._count(asked, outcome)
        if drafts:
            self._time_draft(self._size(asked), draft_s, running, unread)
        self._unread = 0 if asked else unread
        tokens = sum(1 + len(outcome.path) for outcome in outcomes) / max(1, len(outcomes))
        self._turnover.add(running, came, running * tokens)
        choice = self._choice(running)
        step_s = draft_s + (self.expect(asked, running).pass_s if pass_s is None else pass_s)
        choice.since_probe_s += step_s
        choice.steps, choice.steps_s = choice.steps + 1, choice.steps_s + step_s
        choice.tried[asked] += 1
        self._choose(choice, running)

    def _time_draft(self, size: int, draft_s: float, running: int, unread: int) -> None:
        """Take in the time of drafts, for which so many tokens were read first."""
        planned_s = self._planned_draft_s(size, running)
        self._reading.add(draft_s, unread, planned_s)
        read_s = self._reading.token_s * unread
        if read_s <= _MOST_READING * draft_s:
            scale = (draft_s - read_s) / planned_s
            self._seen[size].draft_scale.add_time(scale, self._draft_scale.known_or(scale))
        else:
            scale = self._reading.scale
        self._draft_scale.add_time(scale, scale)

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
        scale = weight = _PLANNED_WEIGHT
        most = float("inf")
        for rows, seen in self._pass_s.items():
            if seen.weight:
                near = seen.weight * (min(rows, point) / max(rows, point)) ** 2
                scale += near * seen.value / self._expected_s[rows]
                weight += near
                most = min(most, seen.value) if rows > point else most
        return min(most, self._expected_s[point] * scale / weight)

    def _planned_draft_s(self, size: int, running: int) -> float:
        """What the plan expects of drafting for so many sequences."""
        whole_s, most = self._outlooks[size].draft_s, self._sequences
        alone_s = self._alone_s.get(size, whole_s / most)
        more = (whole_s - alone_s) * (running - 1) / (most - 1) if most > 1 else 0.0
        return max(alone_s + more, 1e-6)

    def _count(self, asked: int, outcome: Outcome) -> None:
        likely, smaller = outcome.likely if outcome.nested else (), 0
        counted = [s for s in self._sizes[1:] if s == asked or (outcome.nested and s < asked)]
        for size in counted:
            seen, accepted = self._seen[size], sum(node < size for node in outcome.path)
            seen.accepted.add(accepted)
            if likely:
                seen.likely.add(sum(likely[smaller:size]))
            if self._tells:  # where this draft does not, its size is believed more, or less
                told = sum(likely[:size]) if likely else self._likely(size)
                seen.belief.add(accepted, told)
            smaller = size
        if self._tells:
            self._belief.add(len(outcome.path), sum(likely) or self._likely(asked))

    @property
    def _tells(self) -> bool:
        """Whether it was ever told how probable nodes are."""
        return any(seen.likely.weight for seen in self._seen.values())

    def _accepted(self, size: int) -> float:
        """Accepted tokens of a draft of that size: seen, or what the nearest seen size tells."""
        if not size:
            return 0.0
        prior = self._outlooks[size].tokens - 1.0
        if not self._tells:
            return self._accepted_alone(size)
        belief = self._belief.share(1.0, _PRIOR_WEIGHT)
        belief = self._seen[size].belief.share(belief, _BELIEF_WEIGHT)
        told = belief * self._likely(size)
        return _Average(told, self._belief.likely.weight).with_prior(prior)

    def _likely(self, size: int) -> float:
        """Tokens that a draft of that size should have accepted, by its nodes' probabilities.

        Nodes beyond all that were seen should add as much as those before them did, by what the
        plan expects of both.
        """
        total = expected = ratio = 0.0
        for each in self._sizes[1:]:
            adds = self._outlooks[each].tokens - 1.0 - expected
            expected += adds
            likely = self._seen[each].likely
            if likely.weight:
                gain = likely.with_prior(ratio * adds, _PRIOR_WEIGHT if ratio else 0.0)
            else:
                gain = ratio * adds
            total += gain
            ratio = gain / adds if adds > 0.0 else ratio
            if each == size:
                break
        return total

    def _accepted_alone(self, size: int) -> float:
        """The same where nothing tells how probable nodes are."""
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
            choice.probe, choice.scouts, choice.until_probe = None, False, _FIRST_PROBE
            return
        if choice.probe is None and choice.current and not choice.tried[0]:
            planned_s = self._expected_s[self._point(running)]
            if rate * planned_s < 1.0:  # nobody need draft for that, if the plan is right there
                choice.probe, choice.scouts, choice.until_probe = 0, True, 1
                return
        if choice.probe is None and (scout := self._scout(choice, expected, running)) is not None:
            choice.probe, choice.scouts, choice.until_probe = scout, True, _SCOUT_STEPS
            return
        choice.until_probe -= 1
        if choice.until_probe > 0:
            return
        if choice.probe is None:
            others = [size for size in self._sizes if size != choice.current]
            hopeful = max(others, key=gain, default=None)
            probe = hopeful if choice.tries % 2 else self._neighbour(choice)
            if probe is not None:
                self._try(choice, expected, probe)
        elif choice.scouts:
            steps = _SCOUT_STEPS if choice.probe else 1  # of drafting nothing one tells
            lost_s = _loss_s(expected[choice.probe], expected[choice.current], steps)
            choice.scout_s += max(0.0, lost_s)
            choice.probe, choice.scouts, choice.until_probe = None, False, choice.interval
        else:
            choice.probe, choice.since_probe_s = None, 0.0
            choice.interval = min(2 * choice.interval, _LAST_PROBE)
            choice.until_probe = choice.interval

    def _try(self, choice: _Choice, expected: Mapping[int, StepOutlook], size: int) -> None:
        """Try a size in the next steps if that should lose little."""
        known = self._watches and not choice.current
        if known and expected[size].s_per_token > _HOPELESS * expected[0].s_per_token:
            return
        steps, loss_s = _PROBE_STEPS, _loss_s(expected[size], expected[choice.current])
        if self._unread_s > loss_s:  # then more steps of it cost little more
            steps = _FIRST_PROBE
            loss_s = _loss_s(expected[size], expected[choice.current], steps)
        if loss_s + self._unread_s <= _PROBE_COST * choice.since_probe_s:
            choice.probe = size
            choice.tries, choice.until_probe = choice.tries + 1, steps

    def _scout(
        self, choice: _Choice, expected: Mapping[int, StepOutlook], running: int
    ) -> int | None:
        """A size that was hardly tried, if that should lose little: a larger, or else a smaller.

        A smaller one where passes take longer than planned. It may be rows that do, or what passes
        share; its own, not measured yet, is taken to be in the middle of both.
        """
        if not _FIRST_SCOUT <= choice.steps <= _LAST_SCOUT:
            return None
        above = (s for s in self._sizes if s > choice.current and choice.tried[s] < _SCOUTED)
        below = [s for s in self._sizes[1:] if s < choice.current][-1:]
        for size in [*islice(above, 1), *(s for s in below if not choice.tried[s])]:
            step, planned_s = expected[size], self._expected_s[self._point(running * (1 + size))]
            if size < choice.current:
                if step.pass_s < _LONGER * planned_s:
                    continue
                step = replace(step, pass_s=math.sqrt(step.pass_s * planned_s))
            loss_s = _loss_s(step, expected[choice.current], _SCOUT_STEPS) + self._unread_s
            if choice.scout_s + loss_s <= _PROBE_COST * choice.steps_s:
                return size
        return None

    @property
    def _unread_s(self) -> float:
        """Time in which drafters would read what they have not seen."""
        return self._reading.token_s * self._unread

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


def _loss_s(probe: StepOutlook, current: StepOutlook, steps: int = _PROBE_STEPS) -> float:
    """Time that trying a size is expected to lose against the one in use."""
    return steps * probe.tokens * (probe.s_per_token - current.s_per_token)


def between(planned: Mapping[int, float], count: int) -> float:
    """Seconds of a pass of so many rows, or sequences; in between if none are planned of it."""
    known = sorted(planned)
    place = bisect_left(known, count)
    if place == len(known) or known[place] == count or not place:
        return planned[known[min(place, len(known) - 1)]]
    below, above = known[place - 1], known[place]
    share = (count - below) / (above - below)
    return planned[below] + share * (planned[above] - planned[below])
