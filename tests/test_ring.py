"""Law 7 on the simulated device: every access ordered, and time that follows from arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_rt.device.sim import SimBuffer, SimStream
from offload_rt.errors import StreamOrderError
from offload_rt.streaming.ring import Cycle, Ring

NBYTES, COMPUTE_S = 1000, 0.5
LAYERS = 6
COUNTS = (3, 1, 2)


class Deaf(SimStream):
    """A stream that ignores waits: what a missing wait in the ring would do."""

    def wait(self, event):
        pass


class Growing:
    """An order of layers with some blocks each, which may become more."""

    def __init__(self, counts):
        self.counts, self.home, self.events = list(counts), {}, {}

    def units(self):
        return [(k, i) for k, n in enumerate(self.counts) for i in range(n)]

    def first(self):
        return next(iter(self.units()), None)

    def after(self, unit):
        units = self.units()
        return units[(units.index(unit) + 1) % len(units)] if unit in units else self.first()

    def source(self, unit):
        return self.home.setdefault(unit, SimBuffer(NBYTES))

    def written(self, unit):
        return self.events.get(unit)


class Rig:
    """A ring on the simulated device."""

    def __init__(self, order, *, slots, copy=None, compute=None, strict=False, bytes_per_s=1000.0):
        self.order = order
        self.copy = copy or SimStream("copy", bytes_per_s)
        self.compute = compute or SimStream("compute")
        buffers = [SimBuffer(NBYTES) for _ in range(slots)]
        self.ring = Ring(order, buffers, self.copy, self.compute, strict=strict)

    def lend(self, unit, compute_s=COMPUTE_S):
        with self.ring.lend(unit) as buffer:
            self.compute.kernel(reads=[buffer], writes=[], seconds=compute_s)

    def passes(self, count, compute_s=COMPUTE_S):
        for _ in range(count):
            self.one_pass(compute_s)
        return self.compute.time_s


class LayerRig(Rig):
    """Weights: a fixed order, begun before the first pass; asking out of turn is a mistake."""

    def __init__(self, *, streamed=range(LAYERS), **options):
        self.streamed = tuple(streamed)
        home = {layer: SimBuffer(NBYTES) for layer in self.streamed}
        super().__init__(Cycle(home), strict=True, **options)
        self.ring.restart()

    def one_pass(self, compute_s):
        for layer in range(LAYERS):
            if layer in self.streamed:
                self.lend(layer, compute_s)
            else:
                self.compute.kernel(reads=[], writes=[], seconds=compute_s)


class BlockRig(Rig):
    """Blocks of KV: an order that grows; what was fetched ahead is looked at between passes."""

    def __init__(self, *, counts=COUNTS, store=None, **options):
        super().__init__(Growing(counts), **options)
        self.store = store or self.copy

    def one_pass(self, compute_s):
        for block in self.order.units():
            self.lend(block, compute_s)
        self.ring.refresh()

    def write(self, block):
        """Rows of a block change at the home, from device memory."""
        recent = SimBuffer(10)
        self.compute.kernel(reads=[], writes=[recent], seconds=0.0)
        self.store.wait(self.compute.record())
        self.store.store(self.order.source(block), recent)
        self.order.events[block] = self.store.record()


both = pytest.mark.parametrize("rig_of", [LayerRig, BlockRig])


@given(
    slots=st.integers(1, 5),
    streamed=st.sets(st.integers(0, LAYERS - 1), min_size=1),
    bytes_per_s=st.floats(100, 1e5),
    passes=st.integers(1, 4),
)
def test_every_access_is_ordered_and_time_has_the_bounds_of_arithmetic(
    slots, streamed, bytes_per_s, passes
):
    rig = LayerRig(slots=slots, bytes_per_s=bytes_per_s, streamed=sorted(streamed))
    took = rig.passes(passes)
    copies = passes * len(streamed) * NBYTES / bytes_per_s
    computes = passes * LAYERS * COMPUTE_S
    assert max(copies, computes) <= took * (1 + 1e-9)
    assert took <= (copies + computes) * (1 + 1e-9)
    assert rig.compute.stalled_s() == pytest.approx(took - computes)


@given(
    slots=st.integers(1, 5),
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    grow=st.lists(st.integers(0, 3), max_size=4),
)
def test_streaming_is_ordered_while_the_order_grows(slots, counts, grow):
    rig = BlockRig(slots=slots, counts=counts)
    rig.passes(1)
    for layer in grow:
        if layer < len(counts):
            rig.order.counts[layer] += 1
            rig.write((layer, rig.order.counts[layer] - 1))
            rig.ring.refresh()
        rig.passes(1)


@both
@pytest.mark.parametrize("deaf", ["copy", "compute"])
def test_a_missing_wait_is_caught(rig_of, deaf):
    with pytest.raises(StreamOrderError, match="buffer"):
        rig_of(slots=2, **{deaf: Deaf(deaf, 1000.0)}).passes(2)


@pytest.mark.parametrize("told", [True, False])
def test_a_unit_is_read_after_it_was_written(told):
    rig = BlockRig(slots=2, store=SimStream("store", 1000.0))
    rig.passes(1)
    rig.order.counts[0] += 1
    rig.write((0, 3))
    if told:
        rig.passes(1)
        return
    rig.order.events.clear()
    with pytest.raises(StreamOrderError, match="read before it was written"):
        rig.passes(1)


@both
def test_one_slot_is_sequential_and_two_overlap(rig_of):
    passes, units = 3, 3 * 6
    copy_s = NBYTES / 1000.0
    assert rig_of(slots=1).passes(passes) == pytest.approx(units * (copy_s + COMPUTE_S))
    assert rig_of(slots=2).passes(passes) == pytest.approx(units * copy_s + COMPUTE_S)
    fast = rig_of(slots=2, bytes_per_s=4000.0).passes(passes)
    assert fast == pytest.approx(0.25 + units * COMPUTE_S)  # compute hides the copies


@both
@pytest.mark.parametrize(("slots", "drafting_s", "ahead"), [(3, 2.0, 2), (3, 3.0, 3)])
def test_the_ring_refills_while_something_else_computes_between_passes(
    rig_of, slots, drafting_s, ahead
):
    rig = rig_of(slots=slots)
    rig.passes(1, compute_s=0.0)
    rig.compute.kernel(reads=[], writes=[], seconds=drafting_s)  # a drafter at work
    before = rig.compute.stalled_s()
    rig.passes(1, compute_s=0.0)
    assert rig.compute.stalled_s() - before == pytest.approx((6 - ahead) * NBYTES / 1000.0)


def test_a_unit_out_of_turn_is_refused_where_the_order_is_fixed():
    rig = LayerRig(slots=1)
    with pytest.raises(StreamOrderError, match="asked for 1, next in order is 0"):
        rig.lend(1)


def test_a_unit_out_of_turn_begins_anew_where_the_order_grows():
    rig = BlockRig(slots=2)
    rig.lend((2, 1), compute_s=1.0)
    with rig.ring.fetch((1, 0)) as buffer:
        rig.compute.kernel(reads=[buffer], writes=[], seconds=1.0)
    rig.passes(2)


def fail(rig, unit):
    """Break off after a kernel that reads the unit was enqueued."""
    with pytest.raises(RuntimeError), rig.ring.lend(unit) as buffer:
        rig.compute.kernel(reads=[buffer], writes=[], seconds=COMPUTE_S)
        raise RuntimeError("interrupted")


def test_a_failed_pass_keeps_its_unit_and_restart_begins_again():
    rig = LayerRig(slots=2)
    rig.lend(0)
    fail(rig, 1)
    rig.lend(1)
    fail(rig, 2)
    rig.ring.restart()
    rig.passes(1)


def test_a_failed_use_keeps_the_unit():
    rig = BlockRig(slots=2)
    fail(rig, (0, 0))
    fail(rig, (0, 0))
    rig.passes(2)


def test_what_was_fetched_ahead_is_looked_at_between_passes():
    rig = BlockRig(slots=3)
    rig.passes(1, compute_s=0.0)
    rig.order.counts[0] = 0  # its rows were forgotten: (1, 0), (2, 0) and (2, 1) are left
    rig.ring.refresh()
    rig.compute.kernel(reads=[], writes=[], seconds=6.0)  # a drafter at work
    before = rig.compute.stalled_s()
    rig.passes(1, compute_s=0.0)
    assert rig.compute.stalled_s() == before


def test_what_was_fetched_ahead_and_is_right_is_not_fetched_again():
    rig = BlockRig(slots=4, counts=(2, 3))
    rig.passes(1)
    rig.write((0, 1))
    rig.ring._slots[1].unit = "as it was before"
    before = rig.copy.statistics().bytes_copied
    rig.ring.refresh()
    assert rig.copy.statistics().bytes_copied == before + NBYTES
    rig.passes(2)


def test_a_unit_lent_out_of_turn_is_copied_again_when_its_turn_comes():
    rig = BlockRig(slots=2)
    with rig.ring.fetch((0, 0)):
        pass
    rig.lend((0, 0))  # its home may have changed since
    assert rig.copy.statistics().bytes_copied == (1 + 2 + 1) * NBYTES


def test_copies_are_counted():
    rig = LayerRig(slots=2)
    rig.passes(2)
    counted = rig.copy.statistics()
    assert counted.bytes_copied == (2 * LAYERS + 2) * NBYTES  # two layers were fetched ahead
    assert counted.busy_s == pytest.approx(counted.bytes_copied / 1000.0)
