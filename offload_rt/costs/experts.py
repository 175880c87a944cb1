"""How many experts a pass has to wait for: what a pool holds against what tokens ask for.

Where the least recently used expert of a layer is replaced, a pool of any size holds those that
were asked for most recently, so one histogram of *stack distances* (how many other experts of the
layer were asked for since, Mattson et al. 1970) has the hits of every size. A pool records it while
it runs (`streaming/experts.py`), and what runs recorded is kept by model (`planning/history.py`).
Until one is there the prior below is used, which is cautious: it is of routers with as little
locality as any published (`docs/RESULTS.md`, "Experts one by one").
No torch here.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from math import comb

from offload_rt.device.kinds import DeviceKind
from offload_rt.streaming.experts import MissRates, row_class

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
# The same by how many tokens' experts are held, as a part of what chance would miss: where a layer
# has few experts for each that a token is sent to, a share of them is few tokens' worth. With 2 and
# 4 of Mixtral-8x7B's 8 held this says 0.41 and 0.65, the table above 0.59 and 0.84; Eliseev and
# Mazur 2023 found 40 to 60 % there.
_BEYOND_CHANCE = ((0.0, 0.0), (1.0, 0.21), (3.0, 0.36), (4.0, 0.45), (6.0, 0.52), (8.0, 0.68))
# Experts that rows after each other ask for and that are not held grow with rows^(1 - b): b by
# share held, of chains of 4, 8 and 16 rows through the same pools.
_ROW_SHARING = ((0.0, 0.39), (0.125, 0.19), (0.25, 0.11), (0.5, 0.05), (1.0, 0.0))
# On a GPU the host waits for the router once a layer (30 us from an event to the next launch, as of
# `REPLAY_S`), and launches some ten kernels for each expert, 6 us each. Assumed: none was timed.
_ROUND_TRIP_S, _LAUNCHES_S = 30e-6, 60e-6
# Where few rows are multiplied with experts as they are stored, all that are there take ten kernels
# together, and those that come ten more (counted on a double of a GPU, docs/RESULTS.md).
_GROUPS = 2
# Of the experts that a layer will lack, those that the next router names a layer before; and bytes
# read in vain for each byte of these (docs/RESULTS.md, "Looking ahead": a bench mixture with as
# little locality as any published one, 1,147 of 2,189 and 1,218). Of all experts of a token, those
# that are there among them, GLM-5.2's routers name 0.72 and 0.74 (colibri, issue 200).
FORESEEN, IN_VAIN = 0.52, 1.06
# Of the host, to fetch rows with the router's choice, in each layer: five launches of 6 us; and to
# send back what it made: five more, two uploads of 10 us, and 20 us to gather and spread rows.
# Assumed: none was timed on a GPU.
FETCH_S, SEND_BACK_S = 30e-6, 70e-6
# Bytes a second, where nothing is known of a machine: PCIe 4.0, and what it leaves of DDR5.
_UNKNOWN_LINK, _UNKNOWN_HOST = 25e9, 40e9
# Different experts of n rows of a text are E (1 - (1 - k / E)^(n^a)); of different texts, whose
# rows are independent, a = 1.
_UNION = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Distances:
    """How far back experts were that passes of like numbers of rows asked for.

    Attributes:
        calls: times a layer asked.
        counts: how often for the n-th most recently used of the layer, counted from 0; last of
            those that were never used before.
    """

    calls: float
    counts: tuple[float, ...]

    def joined(self, newer: "Distances", most_calls: float) -> "Distances":
        """Both together; of the older one as much as leaves room for no more than so many calls."""
        kept = min(1.0, max(0.0, most_calls - newer.calls) / max(1.0, self.calls))
        if len(self.counts) != len(newer.counts):
            return newer  # of another model by the same name
        counts = zip(self.counts, newer.counts, strict=True)
        return Distances(
            calls=kept * self.calls + newer.calls,
            counts=tuple(kept * old + new for old, new in counts),
        )

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
        seen: by class of a pass (`row_class`).
        uses: by layer, how often each expert was asked for, of late.
        hit_rate: of a token's experts, those that are held, if it is stated; then nothing is seen.
    """

    seen: Mapping[int, Distances] = field(default_factory=dict)
    uses: Mapping[int, Sequence[int]] = field(default_factory=dict)
    hit_rate: float | None = None

    def misses(
        self,
        rows: int,
        held: float,
        experts: int,
        per_token: int,
        *,
        prompt: bool = False,
        sequences: int = 1,
    ) -> float:
        """Experts of a layer that a pass of so many rows has to wait for, on average.

        Args:
            rows: of the pass.
            held: experts of the layer that the pool holds.
            experts: of the layer.
            per_token: that a row is sent to.
            prompt: the pass reads one.
            sequences: that the rows belong to, as many to each.
        """
        if (seen := self.seen.get(row_class(rows, prompt=prompt))) is not None:
            return seen.misses(held)
        return self._expected(rows / sequences, held, experts, per_token, sequences)

    def _expected(
        self, rows: float, held: float, experts: int, per_token: int, sequences: int
    ) -> float:
        """The same of so many rows of each sequence, of which nothing was seen.

        Texts share slots: each finds again what it asked for as if it had its part of them, and
        beyond that what others asked for, as chance has it. What several lack is brought once. (A
        pool of drawn routes, docs/RESULTS.md "Batches of mixtures".)
        """
        own = min(held, experts) / sequences
        if (single := self.seen.get(0)) is not None:
            one = single.misses(own)
        elif self.hit_rate is not None:
            one, own = per_token * (1.0 - self.hit_rate), min(held, experts)
        else:
            one = per_token * (1.0 - prior_hit_rate(own, experts, per_token))
        text = one * rows ** (1.0 - _between(_ROW_SHARING, own / experts))
        elsewhere = 1.0 - (min(held, experts) - own) / max(1e-9, experts - own)
        all_asked = union(rows * sequences, experts, per_token, sequences)
        once = all_asked / union(rows, experts, per_token)
        missed = max(1.0 - min(1.0, held / experts), one / per_token * elsewhere)
        return min(text * elsewhere * once, missed * all_asked)


@dataclass(frozen=True, slots=True)
class Split:
    """Experts that a layer lacks, on average, where some are computed by the host.

    Attributes:
        on_host: those.
        over_link: those that are waited for.
        until_s: until both are done.
    """

    on_host: float
    over_link: float
    until_s: float


@lru_cache(maxsize=4096)
def split_of(misses: float, most: int, share: float, rates: MissRates) -> Split:
    """How a pool splits what a layer lacks, which is a whole number each time.

    Args:
        misses: of a layer, on average.
        most: experts that it asks for.
        share: of all experts, those in host memory.
        rates: of them.
    """
    host = link = until_s = 0.0
    for lacking, at_home, chance in _chances(misses, most, share):
        on_host = rates.on_host(lacking, at_home)
        host, link = host + chance * on_host, link + chance * (lacking - on_host)
        until_s += chance * rates.until_s(lacking, at_home, on_host)
    return Split(host, link, until_s)


def _chances(misses: float, most: int, share: float) -> Iterator[tuple[int, int, float]]:
    """How many experts lack, how many of these are in host memory, and how likely that is."""
    for lacking, chance in enumerate(chances_of(misses, most)):
        for at_home in range(lacking + 1):
            yield lacking, at_home, chance * _binomial(at_home, lacking, share)


@lru_cache(maxsize=4096)
def chances_of(misses: float, most: int) -> tuple[float, ...]:
    """How likely a layer lacks 0, 1, ... of the experts it asks for.

    Each lacks as likely as any other, whatever the others do.

    Args:
        misses: of a layer, on average.
        most: experts that it asks for.
    """
    chance = min(1.0, misses / most)
    return tuple(_binomial(lacking, most, chance) for lacking in range(most + 1))


def _binomial(count: int, most: int, chance: float) -> float:
    return comb(most, count) * chance**count * (1.0 - chance) ** (most - count)


def choosing_s(device: DeviceKind, per_token: int, *, together: bool = False) -> float:
    """Of the host for a layer of one row, until it knows its experts and has launched them.

    Args:
        device: what computes; a CPU is the host itself.
        per_token: experts that a token is sent to.
        together: all that are there are multiplied in one launch.
    """
    launches = _GROUPS if together else per_token
    return 0.0 if device.host_computes else _ROUND_TRIP_S + launches * launching_s(device)


def launching_s(device: DeviceKind) -> float:
    """Of the host, to launch the kernels of an expert; a CPU is the host itself."""
    return 0.0 if device.host_computes else _LAUNCHES_S


def unknown_rates(nbytes: int) -> MissRates:
    """Of experts of so many bytes, where nothing is known of the machine."""
    link_s, host_s = nbytes / _UNKNOWN_LINK, nbytes / _UNKNOWN_HOST
    return MissRates(link_s=link_s, host_s=host_s, file_s=link_s, begin_s=SEND_BACK_S)


def prior_hit_rate(held: float, experts: int, per_token: int) -> float:
    """Share of a token's experts that a pool holds, before any run of the model.

    Args:
        held: experts of the layer that the pool holds.
        experts: of the layer.
        per_token: that a token is sent to.
    """
    share = min(1.0, held / experts)
    beyond = _between(_BEYOND_CHANCE, held / per_token)
    return min(_between(_HIT_RATES, share), share + (1.0 - share) * beyond)


def union(rows: float, experts: int, per_token: int, sequences: int = 1) -> float:
    """Different experts of a layer that rows are sent to, which so many sequences share evenly."""
    idle = max(0.0, 1.0 - per_token / experts)
    return float(experts * (1.0 - idle ** (sequences * (rows / sequences) ** _UNION)))


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Straight lines from point to point."""
    index = bisect_right([x for x, _ in points], at)
    if index >= len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = list(pairwise(points))[max(0, index - 1)]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
