"""Curves: monotone whatever the noise, the same beside a busy neighbour, and repaired by name."""

import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_rt.profiling import neighbours, timing
from offload_rt.profiling.curves import impossible, monotone
from offload_rt.profiling.effort import Effort
from offload_rt.profiling.timing import REPAIRED, Curve, Timed

SIZES, TOKENS = (7, 28, 116, 416), (1, 2, 4, 8, 16, 32, 64)
PLACES = list(product(SIZES, TOKENS))
times = st.floats(1e-6, 1e3)


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    """The kernel does not tell how long threads waited for a core."""
    monkeypatch.setattr(neighbours, "_waited_s", lambda: None)
    monkeypatch.setattr(neighbours, "_stolen_s", lambda: 0.0)


def rises(curve):
    pairs = product(curve, curve)
    above = [(a, b) for a, b in pairs if all(x >= y for x, y in zip(a, b, strict=True))]
    return all(curve[a] >= curve[b] for a, b in above)


@given(st.lists(times, min_size=len(PLACES), max_size=len(PLACES)))
@settings(max_examples=100, deadline=None)
def test_a_repaired_curve_rises_whatever_was_measured(values):
    made = monotone(dict(zip(PLACES, values, strict=True)))
    assert list(made) == PLACES and rises(made) and not impossible(made)
    assert all(min(values) <= time <= max(values) for time in made.values())


@given(st.lists(times, min_size=8, max_size=8).map(sorted))
def test_a_curve_that_rises_stays_as_it_is(values):
    curve = {(i,): value for i, value in enumerate(values)}
    assert monotone(curve) == curve and impossible(curve) == {}


def test_more_reads_in_flight_are_less_work():
    """A minus turns the order round."""
    assert impossible({(-1,): 4.0, (-8,): 5.0, (-32,): 3.9}) == {(-8,): (-1,)}
    assert monotone({(-1,): 4.0, (-8,): 50.0, (-32,): 3.9})[-8,] == pytest.approx(4.0)


@given(st.lists(times, min_size=len(PLACES), max_size=len(PLACES)))
@settings(max_examples=100, deadline=None)
def test_bytes_are_no_dearer_in_a_small_layer_whatever_was_measured(values):
    made = monotone(dict(zip(PLACES, values, strict=True)), by_bytes=True)
    assert list(made) == PLACES and rises(made)
    assert all(0.0 < time <= max(values) for time in made.values())


@given(times, times, st.floats(0.0, 0.1))
def test_a_fixed_part_and_one_for_each_byte_stay_as_they_are(fixed_s, byte_s, noise):
    curve = {
        (size, n): (fixed_s + byte_s * size * n) * (1 + noise * (size == 28)) for size, n in PLACES
    }
    assert impossible(curve, by_bytes=True) == {}
    curve = {p: time for p, time in curve.items() if not noise or p[0] != 28}
    assert monotone(curve, by_bytes=True) == curve


def test_a_small_layer_takes_no_more_than_its_share_of_a_large_one_and_a_smaller():
    curve = {(1, 1): 1.0, (10, 1): 4.0, (100, 1): 11.0, (100, 2): 12.0}
    assert impossible(curve) == {} and monotone(curve) == curve
    assert impossible(curve, by_bytes=True) == {(10, 1): (100, 1)}
    assert monotone(curve, by_bytes=True) == curve | {(10, 1): pytest.approx(2.1)}


def test_what_was_disturbed_takes_what_more_work_took():
    found = monotone({(7, 1): 2.8, (28, 1): 22.6, (28, 2): 5.7, (116, 1): 11.0})
    assert found == {(7, 1): 2.8, (28, 1): 5.7, (28, 2): 5.7, (116, 1): 11.0}
    one_row = monotone({(1,): 1.1, (2,): 1.0})  # such kernels there are
    assert one_row[1,] == one_row[2,] == pytest.approx(1.05, abs=0.01)


def true_s(place):
    """A layer's undisturbed time."""
    size, tokens = place
    return 1e-4 * size * (1 + 0.02 * tokens)


class Neighbour:
    """Other work that takes a share of the core, in slices, from whoever computes here.

    What it takes is counted as processor time while threads spin, or they sleep.
    """

    def __init__(self, monkeypatch, share, *, asleep=False, seed=0, slice_s=0.004):
        self.now, self.share, self.slice_s = 0.0, share, slice_s
        self.random = random.Random(seed)
        self.left = self.taken = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(
            timing.time, "thread_time", lambda: self.now - self.taken if asleep else self.now
        )
        monkeypatch.setattr(timing.time, "process_time", lambda: 0.0)

    def work(self, seconds):
        seconds *= self.random.uniform(1.0, 1.03)
        while seconds > 0.0:
            if self.left <= 0.0:
                self.left = self.random.expovariate(1 / self.slice_s)
                if self.random.random() < self.share:
                    taken = self.random.expovariate(1 / self.slice_s)
                    self.now, self.taken = self.now + taken, self.taken + taken
            done = min(seconds, self.left)
            self.now, self.left, seconds = self.now + done, self.left - done, seconds - done


def profile_of(machine, places=PLACES, **changed):
    curve = Curve(replace(Effort(), **changed))
    sample_s = curve.effort.compute_sample_s
    passes = {
        place: Timed(lambda p=place: machine.work(true_s(p)), sample_s, computes=True)
        for place in places
    }
    return curve.numbers(curve.take(passes)), curve.doubts


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
def test_threads_that_sleep_while_they_wait_show_what_a_layer_takes(share, monkeypatch):
    found, _ = profile_of(Neighbour(monkeypatch, share, asleep=True))
    values = {place: number.value for place, number in found.items()}
    assert rises(values)
    assert max(abs(values[place] / true_s(place) - 1.0) for place in PLACES) < 0.05


def test_a_thread_that_asks_and_does_little_of_the_work_is_not_all_it_takes(monkeypatch):
    machine = Neighbour(monkeypatch, 0.5, asleep=True)
    shares = random.Random(1)
    done = [0.0]
    work = machine.work

    def shared(seconds):
        done[0] += seconds * shares.random()
        work(seconds)

    machine.work = shared
    threads = timing.compute_threads()
    monkeypatch.setattr(timing.time, "thread_time", lambda: done[0])
    monkeypatch.setattr(
        timing.time, "process_time", lambda: threads * (machine.now - machine.taken)
    )
    found, _ = profile_of(machine)
    assert max(abs(found[place].value / true_s(place) - 1.0) for place in PLACES) < 0.05


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_nor_much_where_they_spin(share, monkeypatch):
    """Passes that fit between two interruptions: those of small models, which decide on drafts."""
    found, _ = profile_of(Neighbour(monkeypatch, share))
    values = {place: number.value for place, number in found.items()}
    assert rises(values)
    errors = [values[place] / true_s(place) - 1.0 for place in PLACES if true_s(place) < 0.01]
    assert max(map(abs, errors)) < 0.25


def test_a_bad_moment_is_measured_again_and_leaves_no_trace(monkeypatch):
    """Two numbers fell together into a time when nothing could run undisturbed."""
    machine, bad = Neighbour(monkeypatch, 0.0), {(28, 1): 9, (28, 2): 9}
    work = machine.work

    def disturbed(place):
        bad[place] = bad.get(place, 0) - 1
        work(true_s(place) * (20 if bad[place] >= 0 else 1))

    curve = Curve(replace(Effort(), compute_sample_s=0.0, scattered_samples=9))
    taken = curve.take({p: Timed(lambda p=p: disturbed(p)) for p in PLACES})
    found = curve.numbers(taken)
    assert found[28, 1].value == pytest.approx(true_s((28, 1)), rel=0.15)
    assert curve.doubts.again >= 2 and "measured again" in curve.doubts.note
    assert len(taken[416, 64]) < len(taken[28, 1])  # only what was doubted


def test_what_stays_impossible_is_taken_down_and_says_so(monkeypatch):
    machine = Neighbour(monkeypatch, 0.0)
    curve = Curve(replace(Effort(), again_s=0.0))
    slow = {p: 20.0 if p == (28, 1) else 1.0 for p in PLACES}
    passes = {p: Timed(lambda p=p: machine.work(slow[p] * true_s(p))) for p in PLACES}
    found = curve.numbers(curve.take(passes))
    assert found[28, 1].source == REPAIRED and found[28, 2].source == ""
    assert found[28, 1].value < 1.15 * true_s((28, 2)) and found[28, 1].spread is not None
    assert curve.doubts.repaired == 1
    assert curve.doubts.note.endswith("0 were measured again, 1 are taken down")


def test_samples_that_lie_apart_are_followed_by_more(monkeypatch):
    """Other work leaves alone few of the first samples: the later ones find the machine free."""
    machine, asked = Neighbour(monkeypatch, 0.0), {(1,): 0, (2,): 0}

    def disturbed(place):
        asked[place] += 1
        machine.work(
            0.01
            * place[0]
            * (3 if place == (1,) and asked[place] not in (4, 7, *range(14, 99)) else 1)
        )

    curve = Curve(replace(Effort(), least_samples=3, most_samples=9, again_s=0.0))
    taken = curve.take({p: Timed(lambda p=p: disturbed(p)) for p in asked})
    found = curve.numbers(taken)
    assert found[1,].value == pytest.approx(0.01, rel=0.05)
    assert len(taken[2,]) == 9 < len(taken[1,]) <= curve.effort.scattered_samples


@pytest.mark.parametrize("quiet", [True, False])
def test_where_nothing_else_runs_what_was_measured_stands(quiet, monkeypatch):
    """Matrices of a middle size that are multiplied worse, in runs that lie apart by themselves."""
    machine, apart = Neighbour(monkeypatch, 0.0), random.Random(3)
    waited_s = (lambda: 0.0) if quiet else (lambda: machine.now)
    monkeypatch.setattr(neighbours, "_waited_s", waited_s)
    worse = {p: 1.6 if p[0] == 28 else 1.0 for p in PLACES}

    def run(place):
        machine.work(worse[place] * true_s(place) * apart.choice([1.0, 1.0, 1.4, 1.5, 1.6]))

    curve = Curve(replace(Effort(), compute_sample_s=0.0), by_bytes=True)
    taken = curve.take({p: Timed(lambda p=p: run(p)) for p in PLACES})
    found = curve.numbers(taken)
    error = found[28, 8].value / (1.6 * true_s((28, 8))) - 1.0
    assert (abs(error) < 0.05, curve.doubts.repaired == 0, curve.doubts.found == 0) == (quiet,) * 3
    assert (max(map(len, taken.values())) > curve.effort.most_samples) is not quiet
    assert 0.0 < curve.doubts.timed_s <= machine.now


def test_measuring_again_ends(monkeypatch):
    """However wrong the numbers stay, no more than `again_s` is spent on them."""
    machine = Neighbour(monkeypatch, 0.0)
    passes = {(i,): Timed(lambda i=i: machine.work(0.5 / (1 + i))) for i in range(8)}
    effort = Effort(least_samples=2, most_samples=2, number_s=0.0, again_s=2.0)
    Curve(replace(effort, again_s=0.0)).take(passes)
    first, machine.now = machine.now, 0.0
    Curve(effort).take(passes)
    assert first < machine.now <= first + 2.0 * 1.1
