"""How much of the time of this process's threads other work took."""

import os
import time
from dataclasses import dataclass, field

import psutil

from offload_rt.device.system import compute_threads, cores, thread_times
from offload_rt.profiling.store import BUSY

_QUIET = 0.05  # of the time threads could have computed: without a core, or to other machines
_LITTLE = 0.15  # of it; threads of this process and of the kernel wait for each other, too
_BELIEVABLE = 0.5  # between the quartiles of a number, of its value; the median of all numbers
_QUIET_LOAD = 0.5  # of the cores: the average still holds what ran a minute ago
_IDLE_PERCENT, _LOOKED_S = 10.0, 0.5  # of all cores' time, where nobody else computes


@dataclass(slots=True)
class Neighbours:
    """How much of the time of this process's threads other work took, from here on."""

    began_s: float = field(default_factory=time.perf_counter)
    waited_s: float | None = field(default_factory=lambda: _waited_s())
    stolen_s: float = field(default_factory=lambda: _stolen_s())

    def share(self) -> float | None:
        """Of the time they could have computed; None where the kernel does not count it."""
        waited_s = _waited_s()
        if waited_s is None or self.waited_s is None:
            return None
        passed_s = max(time.perf_counter() - self.began_s, 1e-9)
        lost_s = max(0.0, waited_s - self.waited_s) / compute_threads()
        return (lost_s + (_stolen_s() - self.stolen_s) / cores()) / passed_s

    @property
    def quiet(self) -> bool:
        """Whether it was little, as far as the kernel counts it."""
        share = self.share()
        return share is not None and share <= _LITTLE

    def note(self, scatter: float) -> str | None:
        """A sentence for the profile, if the machine was not quiet.

        Args:
            scatter: of the numbers, the distance of their quartiles over their value.
        """
        share, load = self.share(), os.getloadavg()[0]
        if share is None:
            known, busy = "", load > _QUIET_LOAD * cores()
        else:
            known, busy = f"threads waited for a core {share:.0%} of the time, ", share > _QUIET
        if not busy:
            return None
        advice = "measure again when the machine is quiet"
        if scatter > _BELIEVABLE:
            advice = f"the numbers scatter by {scatter:.0%} and are not to be believed: {advice}"
        return f"{BUSY} ({known}load average {load:.1f} on {cores()} cores): {advice}"


def is_idle() -> bool:
    """Whether nothing else computes at present; looks for half a second."""
    return bool(psutil.cpu_percent(_LOOKED_S) < _IDLE_PERCENT)


def _waited_s() -> float | None:
    """Seconds this process's threads were kept from a core, all together."""
    waits = [waited for _, waited in thread_times().values()]
    return sum(waits) / 1e9 if waits else None


def _stolen_s() -> float:
    """Seconds of all cores that went to other virtual machines."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))
