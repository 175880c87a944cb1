"""Repeating a measurement until its median is worth something."""

import statistics
import time
from collections.abc import Callable, Sequence

from offload_rt.profiling.effort import Effort
from offload_rt.profiling.profile import Number, Obtained

Tick = Callable[[], None]  # called after each number, for a progress bar


def take_samples(sample_s: Callable[[], float], effort: Effort) -> list[float]:
    """Seconds of several runs after one that only warms up; `sample_s` runs once and times it."""
    return take_in_turns([sample_s], effort)[0]


def take_in_turns(samples: Sequence[Callable[[], float]], effort: Effort) -> list[list[float]]:
    """The same of several that are to be compared, A B C A B C: a bad moment is shared by all."""
    began, most_s = time.perf_counter(), effort.number_s * len(samples)
    for sample_s in samples:
        sample_s()
    taken: list[list[float]] = [[] for _ in samples]
    for number in range(effort.most_samples):
        if number >= effort.least_samples and time.perf_counter() - began > most_s:
            break
        for own, sample_s in zip(taken, samples, strict=True):
            own.append(sample_s())
    return taken


def timed(run: Callable[[], object], least_s: float = 0.0) -> Callable[[], float]:
    """Turn work of this thread into a sample: the mean of as many runs as fill `least_s`."""

    def sample_s() -> float:
        start, runs, elapsed = time.perf_counter(), 0, 0.0
        while not runs or elapsed < least_s:
            run()
            runs += 1
            elapsed = time.perf_counter() - start
        return elapsed / runs

    return sample_s


def measured(values: Sequence[float]) -> Number:
    """Median of samples, and the difference between their quartiles."""
    spread = 0.0
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        spread = high - low
    return Number(
        value=statistics.median(values),
        obtained=Obtained.MEASURED,
        spread=spread,
        samples=len(values),
    )


def measured_rate(nbytes: int, seconds: Sequence[float]) -> Number:
    """Bandwidth from the times of `nbytes`."""
    return measured([nbytes / s for s in seconds])
