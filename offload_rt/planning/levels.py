"""How fast this machine is just now against its profile, as runs found it. No torch here.

A busy hour makes all seconds longer by about one factor, and a profile made in one makes all
predictions too slow. So after a run the seconds of its passes over the predicted ones are kept.
Runs that stream have a level of their own, as other work slows a disk and a processor differently.
So do passes in which several sequences take part, by their number to the next power of two: what
many rows take is another guess than what copies take. A model's own runs count for it, as its
layers may differ from the timed ones; for a model that did not run lately the others' do, and then
those of fewer sequences, never of more. A damaged file is put aside as if there were none: it only
makes predictions better.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from offload_rt.costs.machine import Speeds
from offload_rt.entries import read_entries, write_entries
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.planning.history import model_key

LEAST, MOST = 0.5, 4.0  # beyond them it is not the hour that is wrong
LASTS_S = 4 * 3600.0  # then nobody knows whether the neighbours are still there
_SAME = 0.1  # a level so near to 1 is none
_NEW_SHARE = 0.5  # of the latest run
_LEAST_PASSES = 8  # of a run that says something
_LEAST_S = 0.02  # a shorter pass is mostly this program's own work, and tells nothing of others
_LATEST = 1024  # passes that a level is the median of
_MOST_ENTRIES = 100


@dataclass(slots=True)
class Pace:
    """The latest passes of an engine against what was predicted of them."""

    _ratios: dict[int, deque[float]] = field(default_factory=dict)

    def add(self, pass_s: float, predicted_s: float, running: int) -> None:
        """Take in a pass in which so many sequences took part."""
        if predicted_s >= _LEAST_S:
            latest = self._ratios.setdefault(group_of(running), deque(maxlen=_LATEST))
            latest.append(pass_s / predicted_s)

    @property
    def ratios(self) -> dict[int, float]:
        """The medians over all passes of up to so many sequences, where there were enough."""
        enough = {n: found for n, found in self._ratios.items() if len(found) >= _LEAST_PASSES}
        return {running: statistics.median(found) for running, found in enough.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelKey:
    """What a level belongs to; a profile that is measured again begins anew.

    Attributes:
        machine: the profile, who computes with how many threads.
        streams: whether layers are copied in each pass.
        model: its name and size.
        running: sequences that take part in a pass.
    """

    machine: str
    streams: bool
    model: str
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
            running=group_of(running),
        )

    @property
    def others(self) -> str:
        """How entries of all models begin."""
        at_once = f" by {self.running}" if self.running > 1 else ""
        return f"{self.machine}, {'streamed' if self.streams else 'resident'}{at_once}, "

    def __str__(self) -> str:
        return self.others + self.model


def group_of(running: int) -> int:
    """Those for whom one level is kept: a number of sequences, to the next power of two."""
    return 1 << max(0, running - 1).bit_length()


def read_level(path: Path, key: LevelKey, now_s: float) -> float:
    """Times of recent runs over predicted ones; 1 where nothing is known or it is about that."""
    known = read_entries(path, _entry).items()
    fresh = {name: ratio for name, (ratio, at_s) in known if _lasts(at_s, now_s)}
    while True:
        others = [ratio for name, ratio in fresh.items() if name.startswith(key.others)]
        if others:
            ratio = fresh.get(str(key)) or statistics.median(others)
            return ratio if abs(ratio - 1.0) > _SAME else 1.0
        if key.running == 1:
            return 1.0
        key = replace(key, running=key.running // 2)


def add_level(path: Path, key: LevelKey, ratio: float, now_s: float) -> None:
    """Take in a run, and replace the file whole; what goes wrong is only logged."""
    entries = read_entries(path, _entry)
    before, at_s = entries.pop(str(key), (1.0, -math.inf))
    share = _NEW_SHARE if _lasts(at_s, now_s) else 1.0
    mean = (1.0 - share) * before + share * min(max(ratio, LEAST), MOST)
    entries[str(key)] = mean, now_s  # the latest is last
    write_entries(path, entries, _MOST_ENTRIES)


def _lasts(at_s: float, now_s: float) -> bool:
    return 0.0 <= now_s - at_s <= LASTS_S


def _entry(entry: Any) -> tuple[float, float]:  # noqa: ANN401 - of JSON
    ratio, at_s = entry
    made = float(str(ratio)), float(str(at_s))
    if not (LEAST <= made[0] <= MOST and math.isfinite(made[1])):  # NaN too
        raise ValueError(f"a level of {ratio!r} cannot be")
    return made
