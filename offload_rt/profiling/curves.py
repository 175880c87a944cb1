"""Times that must rise with the work: implausible ones are found, and taken down.

Other work on the machine only makes a time longer. So where more work was faster, the longer time
is wrong: a pass of fewer tokens, or through a smaller layer, needs at most the seconds of the
larger one. No torch here.
"""

from collections.abc import Mapping

# A place on a curve. A place none of whose numbers is smaller than another's is at least as much
# work; sizes that make it less (reads in flight) are written with a minus.
Place = tuple[int, ...]

# One row is up to an eighth slower than two where it has kernels of its own; what is further above
# the times of more work than this was disturbed.
_CLOSE = 1.15


def impossible(times: Mapping[Place, float]) -> dict[Place, Place]:
    """Places clearly slower than one with more work, and the fastest such one."""
    least = {place: min(_above(times, place), key=times.__getitem__) for place in times}
    return {place: fast for place, fast in least.items() if times[place] > _CLOSE * times[fast]}


def monotone(times: Mapping[Place, float]) -> dict[Place, float]:
    """The times, where more work is no faster; those that rise already stay as they are.

    A time far above one of more work is taken down to it. What then is left lies between the least
    time of all that is more work and the largest of all that is less: both rise with the work, and
    so does the middle between them.
    """
    least = {place: min(times[p] for p in _above(times, place)) for place in times}
    near = {p: least[p] if time > _CLOSE * least[p] else time for p, time in times.items()}
    most = {place: max(near[p] for p in times if _no_less(place, p)) for place in times}
    return {
        place: low if low == most[place] else (low * most[place]) ** 0.5
        for place, low in least.items()
    }


def _above(times: Mapping[Place, float], place: Place) -> list[Place]:
    return [other for other in times if _no_less(other, place)]


def _no_less(one: Place, other: Place) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True))
