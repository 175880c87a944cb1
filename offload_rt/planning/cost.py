"""What a pass costs: the real pipeline, run on the simulated device with a profile's times.

There is no second formula for overlap that could drift from what runs: `LayerPipeline` itself
enqueues the copies, waits and kernels of a few passes, and the virtual clock says how long one
takes once the ring is full. How long each copy and each layer takes comes from the profile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from offload_rt.device.sim import SimBuffer, SimStream
from offload_rt.errors import ConfigError
from offload_rt.profiling.profile import (
    HardwareProfile,
    LayerWork,
    Number,
    Obtained,
    Processor,
)
from offload_rt.profiling.rates import attention_s, layer_s
from offload_rt.streaming.pipeline import LayerPipeline

# The lead of the copies over the kernels settles within a few passes; a period may span several.
_WARM_PASSES, _TIMED_PASSES = 8, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoad:
    """One layer in a pass.

    Attributes:
        work: its weights and arithmetic.
        home_bytes: what crosses the link if it is streamed.
        kv_bytes: cached keys and values on the device that the pass attends to.
    """

    work: LayerWork
    home_bytes: int
    kv_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLoad:
    """What a pass over the model has to do.

    Attributes:
        layers: in order.
        streamed: indices of those whose home is elsewhere, ascending.
        slots: device buffers they share.
        tokens: that go through the layers at once.
        head: final projection, for as many rows; None to leave it out.
        between_s: what the device computes before the next pass, a drafter's time for one: the
            ring is refilled meanwhile.
    """

    layers: Sequence[LayerLoad]
    streamed: Sequence[int]
    slots: int
    tokens: int = 1
    head: LayerWork | None = None
    between_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """Seconds of the parts of a pass, and where they are from.

    Attributes:
        layer_s: each layer's kernels.
        head_s: the head's.
        home_bytes_per_s: of the link or disk that streamed layers come over.
        numbers: all that the times rest on.
    """

    layer_s: tuple[float, ...]
    head_s: float
    home_bytes_per_s: float
    numbers: tuple[Number, ...]

    @property
    def obtained(self) -> Obtained:
        """How the worst of the numbers is known."""
        return max((n.obtained for n in self.numbers), key=list(Obtained).index)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCost:
    """One pass in the steady state, `between_s` included.

    Attributes:
        pass_s: from its begin to the begin of the next.
        compute_s: in which kernels run.
        stall_s: in which the compute stream waits for a copy.
        home_bytes: that cross the link.
        obtained: how the worst number behind it is known.
    """

    pass_s: float
    compute_s: float
    stall_s: float
    home_bytes: int
    obtained: Obtained


def pass_times(
    profile: HardwareProfile, load: PassLoad, processor: Processor, rate: Number
) -> PassTimes:
    """Look up how long each part of a pass takes.

    A layer takes its weights and arithmetic (`rates.layer_s`) and its attention to cached rows.

    Args:
        profile: of the machine.
        load: the pass.
        processor: who computes it.
        rate: bytes a second of the home: `rates.link_bytes_per_s` at the size of a layer, or
            `rates.disk_bytes_per_s` with the reads in flight.

    Raises:
        ProfileError: the profile lacks a number.
    """
    numbers, seconds = [rate], []
    known: dict[tuple[LayerWork, int], tuple[float, list[Number]]] = {}
    for layer in load.layers:
        key = (layer.work, layer.kv_bytes)
        if key not in known:
            parts = [layer_s(profile, layer.work, load.tokens, processor=processor)]
            if layer.kv_bytes:
                kv = attention_s(profile, layer.kv_bytes, load.tokens, processor=processor)
                parts.append(kv)
            known[key] = sum(part.value for part in parts), parts
            numbers += known[key][1]
        seconds.append(known[key][0])
    head = None
    if load.head is not None:
        head = layer_s(profile, load.head, load.tokens, processor=processor)
        numbers.append(head)
    return PassTimes(
        layer_s=tuple(seconds),
        head_s=0.0 if head is None else head.value,
        home_bytes_per_s=rate.value,
        numbers=tuple(numbers),
    )


def cost_of(load: PassLoad, times: PassTimes) -> PassCost:
    """Run a few passes of the pipeline in virtual time and take the steady ones' mean.

    Raises:
        ConfigError: layers are streamed, but there is no slot.
    """
    if load.streamed and load.slots < 1:
        raise ConfigError(f"{len(load.streamed)} layers are streamed through {load.slots} slots")
    copy, compute = SimStream("copy", times.home_bytes_per_s), SimStream("compute")
    pipeline = _pipeline(load, copy, compute)
    for _ in range(_WARM_PASSES):
        _run_pass(load, times, pipeline, compute)
    start_s, stalled_s = compute.time_s, compute.stalled_s()
    for _ in range(_TIMED_PASSES):
        _run_pass(load, times, pipeline, compute)
    return PassCost(
        pass_s=(compute.time_s - start_s) / _TIMED_PASSES,
        compute_s=sum(times.layer_s) + times.head_s + load.between_s,
        stall_s=(compute.stalled_s() - stalled_s) / _TIMED_PASSES,
        home_bytes=sum(load.layers[i].home_bytes for i in load.streamed),
        obtained=times.obtained,
    )


def _pipeline(
    load: PassLoad, copy: SimStream, compute: SimStream
) -> LayerPipeline[SimBuffer, SimBuffer] | None:
    if not load.streamed:
        return None
    home = {i: SimBuffer(load.layers[i].home_bytes) for i in load.streamed}
    slot_bytes = max(buffer.nbytes for buffer in home.values())
    ring = [SimBuffer(slot_bytes) for _ in range(load.slots)]
    return LayerPipeline(load.streamed, home, ring, copy, compute)


def _run_pass(
    load: PassLoad,
    times: PassTimes,
    pipeline: LayerPipeline[SimBuffer, SimBuffer] | None,
    compute: SimStream,
) -> None:
    streamed = set(load.streamed)
    for index, seconds in enumerate(times.layer_s):
        if index not in streamed:
            compute.kernel(reads=[], writes=[], seconds=seconds)
            continue
        assert pipeline is not None
        with pipeline.weights(index) as weights:
            compute.kernel(reads=[weights], writes=[], seconds=seconds)
    compute.kernel(reads=[], writes=[], seconds=times.head_s + load.between_s)
