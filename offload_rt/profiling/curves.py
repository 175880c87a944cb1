"""Times that must rise with the work: implausible ones are found, and taken down.

Other work on the machine only makes a time longer. So where more work was faster, the longer time
is wrong: a pass of fewer tokens, or through a smaller layer, needs at most the seconds of the
larger one. And where a time is a fixed part and one for each byte, it needs at most those of any
smaller piece of work (which has the fixed part) and its share of any larger one (which has the
bytes) together. No torch here.
"""

from collections.abc import Mapping

# A place on a curve. A place none of whose numbers is smaller than another's is at least as much
# work; sizes that make it less (reads in flight) are written with a minus.
Place = tuple[int, ...]

# One row is up to an eighth slower than two where it has kernels of its own; what is further above
# the times of more work than this was disturbed.
_CLOSE = 1.15


def impossible(times: Mapping[Place, float], *, by_bytes: bool = False) -> dict[Place, Place]:
    """Places clearly slower than one with more work, and the fastest such one.

    Args:
        times: seconds of each place.
        by_bytes: the first number of a place is bytes, of which each takes the same time. Then
            also places clearly slower than a smaller and a larger one allow, and the larger one.
    """
    least = {place: _least(times, place, by_bytes) for place in times}
    return {place: at for place, (most_s, at) in least.items() if times[place] > _CLOSE * most_s}


def monotone(times: Mapping[Place, float], *, by_bytes: bool = False) -> dict[Place, float]:
    """The times, where more work is no faster; those that rise already stay as they are.

    What is `by_bytes` is first taken down to what a smaller and a larger place allow. Then a time
    far above one of more work is taken down to it. What is left lies between the least time of all
    that is more work and the largest of all that is less: both rise with the work, and so does the
    middle between them.
    """
    if by_bytes:
        wrong = impossible(times, by_bytes=True)
        times = {p: _least(times, p, True)[0] if p in wrong else time for p, time in times.items()}
    least = {place: min(times[p] for p in _above(times, place)) for place in times}
    near = {p: least[p] if time > _CLOSE * least[p] else time for p, time in times.items()}
    most = {place: max(near[p] for p in times if _no_less(place, p)) for place in times}
    return {
        place: low if low == most[place] else (low * most[place]) ** 0.5
        for place, low in least.items()
    }


def _least(times: Mapping[Place, float], place: Place, by_bytes: bool) -> tuple[float, Place]:
    """The seconds a place needs at most, by all others, and the one with more work that says so."""
    found = [(times[other], other) for other in _above(times, place)]
    if by_bytes:
        nbytes, *rest = place
        like = {other[0]: time for other, time in times.items() if [*other[1:]] == rest}
        found += [
            (time + nbytes / more * like[more], (more, *rest))
            for less, time in like.items()
            for more in like
            if less < nbytes < more
        ]
    return min(found)


def _above(times: Mapping[Place, float], place: Place) -> list[Place]:
    return [other for other in times if _no_less(other, place)]


def _no_less(one: Place, other: Place) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True))
