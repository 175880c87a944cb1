"""Law 7 on the simulated device: every access ordered, and time that follows from arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_rt.device.sim import SimBuffer, SimStream
from offload_rt.errors import StreamOrderError
from offload_rt.streaming.pipeline import LayerPipeline

LAYERS, NBYTES, COMPUTE_S = 6, 1000, 0.5


class Deaf(SimStream):
    """A stream that ignores waits: what a missing wait in the pipeline would do."""

    def wait(self, event):
        pass


class Rig:
    """A pipeline on the simulated device."""

    def __init__(self, *, slots, copy=None, compute=None, bytes_per_s=1000.0, streamed=None):
        self.copy = copy or SimStream("copy", bytes_per_s)
        self.compute = compute or SimStream("compute")
        self.streamed = tuple(range(LAYERS)) if streamed is None else streamed
        home = {i: SimBuffer(NBYTES) for i in self.streamed}
        ring = [SimBuffer(NBYTES) for _ in range(slots)]
        self.pipe = LayerPipeline(self.streamed, home, ring, self.copy, self.compute)

    def passes(self, count, compute_s=COMPUTE_S):
        for _ in range(count):
            for layer in range(LAYERS):
                if layer in self.streamed:
                    with self.pipe.weights(layer) as weights:
                        self.compute.kernel(reads=[weights], writes=[], seconds=compute_s)
                else:
                    self.compute.kernel(reads=[], writes=[], seconds=compute_s)
        return self.compute.time_s


@given(
    slots=st.integers(1, 5),
    streamed=st.sets(st.integers(0, LAYERS - 1), min_size=1),
    bytes_per_s=st.floats(100, 1e5),
    passes=st.integers(1, 4),
)
def test_every_access_is_ordered_and_time_has_the_bounds_of_arithmetic(
    slots, streamed, bytes_per_s, passes
):
    rig = Rig(slots=slots, bytes_per_s=bytes_per_s, streamed=tuple(sorted(streamed)))
    took = rig.passes(passes)
    copies = passes * len(streamed) * NBYTES / bytes_per_s
    computes = passes * LAYERS * COMPUTE_S
    assert max(copies, computes) <= took * (1 + 1e-9)
    assert took <= (copies + computes) * (1 + 1e-9)
    assert rig.compute.stalled_s() == pytest.approx(took - computes)


@pytest.mark.parametrize("deaf", ["copy", "compute"])
def test_a_missing_wait_is_caught(deaf):
    with pytest.raises(StreamOrderError, match="buffer"):
        Rig(slots=2, **{deaf: Deaf(deaf, 1000.0)}).passes(2)


def test_one_slot_is_sequential_and_two_overlap():
    passes, layers = 3, 3 * LAYERS
    copy_s = NBYTES / 1000.0
    assert Rig(slots=1).passes(passes) == pytest.approx(layers * (copy_s + COMPUTE_S))
    assert Rig(slots=2).passes(passes) == pytest.approx(layers * copy_s + COMPUTE_S)
    fast = Rig(slots=2, bytes_per_s=4000.0).passes(passes)
    assert fast == pytest.approx(0.25 + layers * COMPUTE_S)  # compute hides the copies


def test_the_ring_refills_while_something_else_computes_between_passes():
    rig = Rig(slots=3)
    rig.passes(1, compute_s=0.0)
    rig.compute.kernel(reads=[], writes=[], seconds=2.0)  # a drafter at work
    before = rig.compute.stalled_s()
    rig.passes(1, compute_s=0.0)
    assert rig.compute.stalled_s() - before == pytest.approx((LAYERS - 2) * NBYTES / 1000.0)


def test_wrong_layer_is_refused():
    rig = Rig(slots=1)
    with pytest.raises(StreamOrderError, match="next in order is 0"), rig.pipe.weights(1):
        pass


def test_a_failed_pass_keeps_its_layer_and_restart_begins_again():
    rig = Rig(slots=2)
    with rig.pipe.weights(0):
        pass
    with pytest.raises(RuntimeError), rig.pipe.weights(1):
        raise RuntimeError("interrupted")
    with rig.pipe.weights(1):
        pass
    rig.pipe.restart()
    rig.passes(1)


def test_copies_are_counted():
    rig = Rig(slots=2)
    rig.passes(2)
    counted = rig.copy.statistics()
    assert counted.bytes_copied == (2 * LAYERS + 2) * NBYTES  # two layers were fetched ahead
    assert counted.busy_s == pytest.approx(counted.bytes_copied / 1000.0)
