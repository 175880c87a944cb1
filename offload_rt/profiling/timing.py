"""Repeating a measurement until it says what the hardware does when nobody disturbs.

Other work makes times longer and hardly ever shorter, so the lower decile of the samples counts.
Where the CPU computes, what counts of a run is the processor time of the thread that asks for the
work: it does its share, and where it sleeps while it waits for others (`wait_asleep`) nothing else
(docs/RESULTS.md, "Five profiles beside other work"). On an idle machine threads wait as they do in
runs: being woken takes more there than the work of a small layer
(docs/RESULTS.md, "Profiles of threads that sleep").

What the kernel tells of the time that threads waited for a core is not subtracted: a wait is told
when it is over, so a run of less than a millisecond is told of waits from before it.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from offload_rt.device.system import compute_threads
from offload_rt.profiling.curves import Place, impossible, monotone
from offload_rt.profiling.effort import Effort
from offload_rt.profiling.neighbours import Neighbours
from offload_rt.profiling.profile import Number, Obtained
from offload_rt.profiling.run_memory import RunMemory

Tick = Callable[[], None]  # called after each number, for a progress bar
Sample = Callable[[], float]

_SHORTEST_S = 1e-9
_APART = 1.1  # the median over the lower decile: most samples were disturbed
_DISTURBED = 1.25  # the median run over the quickest; alone it is 1.05 to 1.14
_TYPICAL = 1.03  # the lower decile of runs over the quickest, alone
_AGAIN = 3  # times that points are measured again, at most
_log = logging.getLogger(__name__)
REPAIRED = "taken down: more work was faster"


def take_samples(sample_s: Sample, effort: Effort) -> list[float]:
    """Seconds of several runs after one that only warms up; `sample_s` runs once and times it."""
    return take_in_turns([sample_s], effort)[0]


def take_in_turns(samples: Sequence[Sample], effort: Effort) -> list[list[float]]:
    """The same of several that are to be compared, A B C A B C: a bad moment is shared by all.

    Each has `least_samples`, and more until they last `number_s`; a warm-up as long as that counts.
    Those whose samples lie apart beside other work have twice that, and up to `scattered_samples`.
    Where nothing else runs, more of them say the same.
    """
    taken: list[list[float]] = [[] for _ in samples]
    spent_s, neighbours = [0.0] * len(samples), Neighbours()
    for turn in range(1 + max(effort.most_samples, effort.scattered_samples)):
        quiet = neighbours.quiet
        for index, sample_s in enumerate(samples):
            own, is_warm_up = taken[index], turn == 0
            if len(own) >= effort.least_samples and not is_warm_up:
                scattered = not quiet and _scattered(own, sample_s)
                if spent_s[index] > effort.number_s * (2 if scattered else 1):
                    continue
                if len(own) >= effort.most_samples and not scattered:
                    continue
            start = time.perf_counter()
            own.append(sample_s())
            spent_s[index] += time.perf_counter() - start
            if is_warm_up and not spent_s[index] > effort.number_s > 0.0:
                own.clear()
    return taken


def _scattered(seconds: Sequence[float], sample_s: Sample) -> bool:
    if isinstance(sample_s, Timed) and sample_s.is_disturbed:
        return True
    return statistics.median(seconds) > _APART * undisturbed(seconds)


def _spent_s(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(slots=True)
class Doubts:
    """What was found that cannot be.

    Attributes:
        timed_s: spent on all.
        again_s: spent on those that were measured again.
        points: measured.
        found: times above that of more work.
        again: of those, measured again.
        repaired: taken down in the end.
        scatters: of each number, the distance of its quartiles over its value.
    """

    timed_s: float = 0.0
    again_s: float = 0.0
    points: int = 0
    found: int = 0
    again: int = 0
    repaired: int = 0
    scatters: list[float] = field(default_factory=list)

    @property
    def scatter(self) -> float:
        """The median of them."""
        return statistics.median(self.scatters) if self.scatters else 0.0

    @property
    def note(self) -> str | None:
        """A sentence for the profile, if there is something to say."""
        if not self.found:
            return None
        return (
            f"{self.found} of {self.points} times are implausible (more work was faster): "
            f"{self.again} were measured again, {self.repaired} are taken down"
        )


@dataclass(slots=True)
class Curve:
    """Measures the points of a curve in turns, and again where they cannot be.

    Args:
        effort: how much is measured.
        doubts: counts what could not be.
        by_bytes: a time is a fixed part and one for each byte, the first number of its place.
            So it is nearly: matrices of other shapes are multiplied better or worse, and norms and
            attention grow with their sides. So nothing is doubted for that but beside other work.
        disturbed: other work ran meanwhile, or may have.
        memory: that weights and KV are laid out in.
    """

    effort: Effort
    doubts: Doubts = field(default_factory=Doubts)
    by_bytes: bool = False
    disturbed: bool = False
    memory: RunMemory = field(default_factory=RunMemory)

    def for_part(self) -> "Curve":
        """The same for a part of the machine whose times are by bytes; nothing disturbed it yet."""
        return replace(self, by_bytes=True, disturbed=False)

    def timed(self, run: Callable[[], object], least_s: float = 0.0, *, computes: bool) -> "Timed":
        """A sample of work; where nothing else computes, of its typical run."""
        return Timed(run, least_s, computes, typical=self.effort.idle)

    def take(self, samples: Mapping[Place, Sample]) -> dict[Place, list[float]]:
        """Seconds of each place; what cannot be is measured again beside what contradicts it."""
        neighbours, begun_s = Neighbours(), time.perf_counter()
        taken = dict(zip(samples, take_in_turns([*samples.values()], self.effort), strict=True))
        timed_s = time.perf_counter()
        least = self.effort.least_samples
        effort = replace(self.effort, most_samples=least, scattered_samples=least)
        until_s = timed_s + self.effort.again_s
        wrong: set[Place] = set()
        repeated: set[Place] = set()
        for repetition in range(_AGAIN):
            if repetition and neighbours.quiet:
                break
            times = {place: undisturbed(own) for place, own in taken.items()}
            by_bytes = self.by_bytes and not neighbours.quiet
            found = impossible(times, by_bytes=by_bytes)
            wrong |= set(found)
            chosen = self._affordable([*found, *found.values()], times, until_s)
            more = take_in_turns([samples[place] for place in chosen], effort)
            for place, own in zip(chosen, more, strict=True):
                taken[place] += own
            repeated |= set(chosen)
        self.disturbed |= not neighbours.quiet
        self.doubts.timed_s += timed_s - begun_s
        self.doubts.again_s += time.perf_counter() - timed_s
        self.doubts.points += len(samples)
        self.doubts.found += len(wrong)
        self.doubts.again += len(wrong & repeated)
        return taken

    def _affordable(
        self, places: Sequence[Place], times: Mapping[Place, float], until_s: float
    ) -> list[Place]:
        """The quickest of them, as many as there is time for."""
        left_s, chosen = until_s - time.perf_counter(), []
        for place in sorted(set(places), key=times.__getitem__):
            left_s -= (1 + self.effort.least_samples) * max(
                times[place], self.effort.compute_sample_s
            )
            if left_s >= 0.0:
                chosen.append(place)
        return chosen

    def numbers(self, taken: Mapping[Place, Sequence[float]]) -> dict[Place, Number]:
        """A number for each place; more work is no faster."""
        made = {place: measured(times) for place, times in taken.items()}
        values = {place: number.value for place, number in made.items()}
        by_bytes = self.by_bytes and self.disturbed
        rising = monotone(values, by_bytes=by_bytes)
        wrong = impossible(values, by_bytes=by_bytes)
        for place, other in wrong.items():
            text = "of %s: %.4g s are %.4g, as %s takes %.4g"
            _log.debug(text, place, values[place], rising[place], other, values[other])
        self.doubts.repaired += len(wrong)
        self.doubts.scatters += [(n.spread or 0.0) / n.value for n in made.values()]
        return {
            place: replace(number, value=rising[place], source=REPAIRED if place in wrong else "")
            for place, number in made.items()
        }


@dataclass(slots=True)
class Timed:
    """A sample of work of this thread: the lower quartile of the runs that fill `least_s`.

    It is never more than the quickest run so far shows to be enough: other work makes no run
    quicker. Beside five other programs on two cores the quickest of some 200 passes over 1.4, 7 and
    28 MiB took 1.13, 1.13 and 1.05 times that on the quiet machine; of 116 MiB none was undisturbed
    (2.9 times).

    Args:
        run: the work.
        least_s: how long to go on.
        computes: it computes on this process's threads, which share it evenly: the processor time
            of this thread is enough.
        typical: nothing else runs, so the median run counts: what a run of a model meets, too.
        runs: seconds of each so far.
    """

    run: Callable[[], object]
    least_s: float = 0.0
    computes: bool = False
    typical: bool = False
    runs: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        """Run, and return the seconds of one run."""
        start, first = time.perf_counter(), len(self.runs)
        spent_s = _computed_s if self.computes else _spent_s
        while len(self.runs) == first or time.perf_counter() - start < self.least_s:
            self.runs.append(spent_s(self.run))
        own = self.runs[first:]
        if self.typical:
            return max(statistics.median(own), _SHORTEST_S)
        return max(min(_quartiles(own)[0], _TYPICAL * min(self.runs)), _SHORTEST_S)

    @property
    def is_disturbed(self) -> bool:
        """Whether most runs took clearly longer than the quickest: more of them find it free."""
        return statistics.median(self.runs) > _DISTURBED * min(self.runs)


def typical(run: Callable[[], object], least_s: float) -> Sample:
    """Turn work on this process's threads into a sample: the lower decile of runs that fill it.

    For what slows every run, as reads from a disk do: the quickest was between two reads, the mean
    holds what other work did. What that took from the threads does not count, see `Timed`.
    """

    def sample_s() -> float:
        start, taken = time.perf_counter(), list[float]()
        while time.perf_counter() - start < least_s or not taken:
            taken.append(_computed_s(run))
        return max(undisturbed(taken), _SHORTEST_S)

    return sample_s


def _computed_s(run: Callable[[], object]) -> float:
    """Seconds that are enough for a run on this process's threads."""
    begun_s, all_s = time.thread_time(), time.process_time()
    took_s = _spent_s(run)
    # Where threads share work as they come, the one that asks may be held up and do next to none.
    each_s = (time.process_time() - all_s) / compute_threads()
    return min(took_s, max(time.thread_time() - begun_s, each_s))


def undisturbed(seconds: Iterable[float]) -> float:
    """The lower decile."""
    values = [*seconds]
    return statistics.quantiles(values, n=10, method="inclusive")[0] if values[1:] else values[0]


def measured(seconds: Sequence[float]) -> Number:
    """Lower decile of samples, and the difference between their quartiles."""
    low, high = _quartiles(seconds)
    value = undisturbed(seconds)
    return Number(value=value, obtained=Obtained.MEASURED, spread=high - low, samples=len(seconds))


def measured_rate(nbytes: int, seconds: Sequence[float]) -> Number:
    """Bandwidth from the times of `nbytes`."""
    return rate_of(nbytes, measured(seconds))


def rate_of(nbytes: int, time_s: Number) -> Number:
    """Bandwidth from a measured time of `nbytes`."""
    rate = nbytes / time_s.value
    slower = nbytes / (time_s.value + (time_s.spread or 0.0))
    return replace(time_s, value=rate, spread=rate - slower)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
