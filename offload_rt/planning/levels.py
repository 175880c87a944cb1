"""How fast this machine is just now against its profile, as runs found it. No torch here.

A busy hour makes seconds longer, and a profile made in one makes predictions too slow: those of
copies by another factor than those of computing. So after a run both are kept. What a pass spent
without waiting for copies says how long computing takes; what it waited says how long copies take,
by the same road that predicts a pass. A term that is a small part of a pass is not known by it, and
stays what it was.

Runs that stream have levels of their own, as what stays is computed with in another way. So do
passes in which several sequences take part, by their number to the next power of two: what many
rows take is another guess than what few do. A model's own runs count for it, as its layers may
differ from the timed ones; for a model that did not run lately the others' do, and then those of
fewer sequences, never of more. A damaged file is put aside as if there were none: it only makes
predictions better.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from offload_rt.costs.machine import Levels, Speeds
from offload_rt.costs.step import Prediction
from offload_rt.entries import read_entries, write_entries
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.planning.history import model_key

# Beyond them it is not the hour that is wrong. The shipped profile of another processor says 0.25 s
# of a mixture's products that took 0.44 to 0.48 (docs/RESULTS.md, "Looking ahead").
LEAST, MOST = 0.5, 8.0
LASTS_S = 4 * 3600.0  # then nobody knows whether the neighbours are still there
_SAME = 0.1  # a level so near to 1 is none
_NEW_SHARE = 0.5  # of the latest run
_LEAST_PASSES = 8  # of a run that says something
_LEAST_S = 0.02  # a shorter pass is mostly this program's own work, and tells nothing of others
_LATEST = 1024  # passes that are looked back at
_MOST_ENTRIES = 100
_SEEN = 0.1  # of a pass, that a term must be for it to say how long that takes
_ROUNDS = 3  # what is read slows what computes beside it, so one level moves the other
_STEPS, _NEAR = 12, 1e-3  # of a search for a level

Entry = dict[str, tuple[float, float]]  # by term: its level, and when it was seen
Price = Callable[[Levels], Prediction]
_TERMS = ("reading", "computing")


@dataclass(frozen=True, slots=True)
class Took:
    """What passes of one kind took on average, the extreme ones aside.

    Attributes:
        running: sequences that took part.
        rows: of each.
        pass_s: from begin to end.
        stall_s: of that, waiting for copies.
    """

    running: int
    rows: int
    pass_s: float
    stall_s: float


@dataclass(slots=True)
class Pace:
    """The latest passes of an engine, by about how many sequences and rows of each they are of."""

    _latest: dict[tuple[int, int], deque[Took]] = field(default_factory=dict)

    def add(self, took: Took) -> None:
        """Take in a pass."""
        kind = group_of(took.running), group_of(took.rows)
        self._latest.setdefault(kind, deque(maxlen=_LATEST)).append(took)

    @property
    def kinds(self) -> list[Took]:
        """The commonest passes of each number of sequences, where there were enough."""
        best = dict[int, deque[Took]]()
        for (running, _), passes in self._latest.items():
            if len(passes) >= max(_LEAST_PASSES, len(best.get(running, ()))):
                best[running] = passes
        return [_mean(passes) for passes in best.values()]


def _mean(passes: Iterable[Took]) -> Took:
    """Of all but the tenth that was longest and the one that was shortest."""
    rising = sorted(passes, key=lambda took: took.pass_s)
    few = math.ceil(len(rising) / 10)
    kept = rising[few:-few]
    return Took(
        running=round(statistics.fmean(took.running for took in kept)),
        rows=round(statistics.fmean(took.rows for took in kept)),
        pass_s=statistics.fmean(took.pass_s for took in kept),
        stall_s=statistics.fmean(took.stall_s for took in kept),
    )


@dataclass(frozen=True, slots=True)
class SeenLevels:
    """What passes say of a machine; None of a term that is a small part of them, or of all."""

    reading: float | None = None
    computing: float | None = None


def levels_of(took: Took, price: Price, before: Levels) -> SeenLevels:
    """The levels with which passes are predicted to take what they took.

    Args:
        took: by passes of one kind.
        price: predicts such a pass at some levels.
        before: what is known, for a term that is not seen.
    """
    computed_s = took.pass_s - took.stall_s
    computes = computed_s >= _SEEN * took.pass_s
    waits = took.stall_s >= _SEEN * took.pass_s
    levels, reading = before, None
    for _ in range(_ROUNDS):
        made = price(levels)
        if made.pass_s < _LEAST_S:
            return SeenLevels()
        if computes:
            scale = computed_s / max(made.pass_s - made.stall_s, 1e-9)
            levels = replace(levels, computing=_bounded(levels.computing * scale))
        reading = _reading(took.pass_s, price, levels) if waits else None
        levels = levels if reading is None else replace(levels, reading=reading)
    return SeenLevels(reading=reading, computing=levels.computing if computes else None)


def _reading(wanted_s: float, price: Price, at: Levels) -> float | None:
    """The level of reading with which a pass takes so long; None if none makes it wait for that."""

    def missing_s(level: float) -> float:
        return price(replace(at, reading=level)).pass_s - wanted_s

    low, high = LEAST, MOST
    longest = price(replace(at, reading=high))
    if longest.stall_s < _SEEN * longest.pass_s:
        return None
    under, over = missing_s(low), longest.pass_s - wanted_s
    if under >= 0.0 or over <= 0.0:
        return low if under >= 0.0 else high
    for _ in range(_STEPS):
        level = low - under * (high - low) / (over - under)  # on a straight line between both
        left_s = missing_s(level)
        if abs(left_s) <= _NEAR * wanted_s:
            break
        if left_s < 0.0:
            low, under, over = level, left_s, over / 2  # or an end would stay for ever
        else:
            high, over, under = level, left_s, under / 2
    return level


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelKey:
    """What a level belongs to; a profile that is measured again begins anew.

    Attributes:
        machine: the profile, who computes with how many threads.
        streams: whether layers are copied in each pass.
        model: its name and size.
        weights: the kinds that its layers have: other kernels compute with each.
        running: sequences that take part in a pass.
    """

    machine: str
    streams: bool
    model: str
    weights: str = "plain"
    running: int = 1

    @classmethod
    def of(
        cls, speeds: Speeds, threads: int, model: Checkpoint, *, streams: bool, running: int
    ) -> "LevelKey":
        """That of a run."""
        profile = speeds.profile
        return cls(
            machine=f"{profile.name} of {profile.date}, {profile.method}, {speeds.processor}, "
            f"{threads} threads",
            streams=streams,
            model=model_key(model),
            weights=_weights(model),
            running=group_of(running),
        )

    def others(self, term: str) -> str:
        """How entries of all models begin whose level of that term may be this one's.

        Of reading: the disk is theirs, too. Of computing: those with the same kinds of weights.
        """
        at_once = f" by {self.running}" if self.running > 1 else ""
        alike = f"{self.machine}, {'streamed' if self.streams else 'resident'}{at_once}, "
        return alike if term == "reading" else f"{alike}{self.weights} weights, "

    def __str__(self) -> str:
        return self.others("computing") + self.model


def _weights(model: Checkpoint) -> str:
    """The kinds of weights in a model's layers: `plain`, `packed 4 bits`, `plain of experts`."""
    kinds = sorted({f"{each.form} {each.bits} bits" for each in model.stored.values()})
    return " and ".join(kinds or ["plain"]) + (" of experts" if model.has_experts else "")


def group_of(running: int) -> int:
    """Those for whom one level is kept: a number of sequences, to the next power of two."""
    return 1 << max(0, running - 1).bit_length()


def read_levels(path: Path, key: LevelKey, now_s: float) -> Levels:
    """What recent runs say; 1 of a term where nothing is known or it is about that."""
    known = read_entries(path, _entry)
    found = {term: _level(known, term, key, now_s) for term in _TERMS}
    return Levels(**found)


def _level(known: dict[str, Entry], term: str, key: LevelKey, now_s: float) -> float:
    fresh = {
        name: entry[term][0]
        for name, entry in known.items()
        if term in entry and _lasts(entry[term][1], now_s)
    }
    while True:
        others = [level for name, level in fresh.items() if name.startswith(key.others(term))]
        if others:
            level = fresh.get(str(key)) or statistics.median(others)
            return level if abs(level - 1.0) > _SAME else 1.0
        if key.running == 1:
            return 1.0
        key = replace(key, running=key.running // 2)


def add_levels(path: Path, key: LevelKey, seen: SeenLevels, now_s: float) -> None:
    """Take in a run, and replace the file whole; what goes wrong is only logged."""
    entries = read_entries(path, _entry)
    entry = entries.pop(str(key), {})
    for term, level in (("reading", seen.reading), ("computing", seen.computing)):
        if level is not None:
            before, at_s = entry.get(term, (1.0, -math.inf))
            share = _NEW_SHARE if _lasts(at_s, now_s) else 1.0
            entry[term] = (1.0 - share) * before + share * _bounded(level), now_s
    if entry:
        entries[str(key)] = entry  # the latest is last
        write_entries(path, entries, _MOST_ENTRIES)


def _bounded(level: float) -> float:
    return min(max(level, LEAST), MOST)


def _lasts(at_s: float, now_s: float) -> bool:
    return 0.0 <= now_s - at_s <= LASTS_S


def _entry(entry: Any) -> Entry:  # noqa: ANN401 - of JSON
    if isinstance(entry, list):  # of before there was one for each term
        entry = dict.fromkeys(_TERMS, entry)
    return {str(term): _known(*pair) for term, pair in entry.items()}


def _known(level: object, at_s: object) -> tuple[float, float]:
    made = float(str(level)), float(str(at_s))
    if not (LEAST <= made[0] <= MOST and math.isfinite(made[1])):  # NaN too
        raise ValueError(f"a level of {level!r} cannot be")
    return made
