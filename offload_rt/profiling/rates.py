"""Numbers between the measured ones: what the planner asks a profile.

Each answer keeps the provenance of the worst number it rests on; its spread and samples are those
of that number. Every interpolation is of *times*, which add up: a copy is a fixed cost plus bytes
at a rate, a layer is reading its weights plus arithmetic per token.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import fmean

from offload_rt.device.kinds import KINDS, Processor
from offload_rt.errors import ProfileError
from offload_rt.model.formats.stored import AT_ONCE_FEW
from offload_rt.profiling.profile import (
    Direction,
    ExpertCurve,
    HardwareProfile,
    HeadCurve,
    LayerCurve,
    LayerWork,
    LinkLoad,
    MemoryUse,
    Number,
    Obtained,
    RecordedCurve,
    WeightOrder,
)

# Kernels of a layer of a recorded pass and of what is in none, counted for a Llama in bf16, and how
# long one is that nobody launches, which is assumed (docs/RESULTS.md, "Recorded draft passes").
LAYER_KERNELS, OTHER_KERNELS, KERNEL_S = 60, 40, 1.5e-6
UNLAUNCHED = (
    f"assumed: bytes at the best rate of the timed layers, and {LAYER_KERNELS} kernels of "
    f"{KERNEL_S * 1e6:g} us, as no layer of a recorded pass was timed"
)
# One launch and one upload of 10 us each, what is in no layer, and 20 us until the host is awake.
REPLAY_S = 4e-5 + OTHER_KERNELS * KERNEL_S
REPLAYED = "assumed: an upload, the launch of a graph, and a round trip; none was timed"

# Of a layer that is recorded in two pieces: their launches, of 10 us, and kernels that are launched
# one by one, 6 us each: of attention (3, or 8 with sinks, counted on a double of a GPU), and the
# copies of what attention and experts make. All assumed: none was timed.
PIECES_S = 2 * 1e-5 + 10 * 6e-6

# A piece of a recurrence beside its products: kernels one after the other, whatever the number of
# rows, and some passes over its state. Gated DeltaNet on one thread, 16 rows: 1.3 ms and 7.5 ns for
# each number of the state, which threads are assumed to share. 48 kernels were counted and 30 are
# assumed around them; on a GPU each is launched, 6 us
# (docs/RESULTS.md, "Trees on models with recurrent states").
_SCAN_CPU_S, _SCAN_NUMBER_S, _SCAN_GPU_S = 1.3e-3, 7.5e-9, 80 * 6e-6
SCANNED = "assumed: as Gated DeltaNet on one core of another machine; on a GPU 80 launches"

# What kernels take of torch's time for 1 to 16 rows of an expert, in the middle (docs/RESULTS.md,
# "Experts at once").
_KERNELS_SHARE = 0.6
OLD_EXPERTS = "assumed: kernels multiply few rows of an expert, the profile timed torch"
# Layers and heads of a CPU with matrix registers (`decoding.times_unlike`).
OLD_LAYERS = "assumed: kernels multiply in matrix registers in such passes, the profile timed torch"
OTHER_LAYERS = "assumed: torch multiplies in such passes, the profile timed kernels"

_WORSE = list(Obtained)


def link_bytes_per_s(
    profile: HardwareProfile,
    block_bytes: int,
    *,
    gpu: int = 0,
    direction: Direction = Direction.H2D,
    pinned: bool = True,
    load: LinkLoad = LinkLoad.ALONE,
) -> Number:
    """Bandwidth of copies of `block_bytes`: straight lines between the times of measured sizes.

    Above the largest size its bandwidth holds; below the smallest the fixed cost stays.

    Raises:
        ProfileError: the profile has no such link.
    """
    wanted = (gpu, direction, pinned, load)
    speeds = {
        link.block_bytes: link.bytes_per_s
        for link in profile.links
        if (link.gpu, link.direction, link.pinned, link.load) == wanted
    }
    memory = "pinned" if pinned else "pageable"
    _require(profile, speeds, f"speed of GPU {gpu}'s link ({direction}, {memory}, {load})")
    return _rate(speeds, block_bytes)


def disk_bytes_per_s(profile: HardwareProfile, queue_depth: int) -> Number:
    """Disk bandwidth with `queue_depth` reads in flight, in blocks of the measured size.

    Straight lines between measured depths; beyond them the nearest measured one holds.

    Raises:
        ProfileError: the profile has no disk.
    """
    speeds = {disk.queue_depth: disk.bytes_per_s for disk in profile.disk}
    _require(profile, speeds, "disk speed")
    depth = min(max(queue_depth, min(speeds)), max(speeds))
    return _between(speeds, depth)


def memory_bytes_per_s(profile: HardwareProfile, use: MemoryUse, threads: int) -> Number:
    """Host memory bandwidth of some threads; more than were measured are no faster.

    Raises:
        ProfileError: the profile has no such number.
    """
    speeds = {m.threads: m.bytes_per_s for m in profile.host_memory if m.use is use}
    _require(profile, speeds, f"host memory bandwidth ({use})")
    return _between(speeds, min(max(threads, min(speeds)), max(speeds)))


def layer_s(
    profile: HardwareProfile,
    work: LayerWork,
    tokens: int,
    *,
    processor: Processor,
    weights: WeightOrder = WeightOrder.PLAIN,
    recorded: bool = False,
) -> Number:
    """Time of a pass of `tokens` through a layer of any shape, its weights where they compute.

    A recorded pass launches no kernels. Where none was timed so, a layer is assumed to read its
    bytes at the best rate that a timed layer has, and `LAYER_KERNELS` to take `KERNEL_S` each; it
    is no slower than one that launches them.

    A measured layer's time is taken apart: that of one token is what reading the weights (and
    starting the kernels) costs, what more tokens add is arithmetic. The first part is interpolated
    between the measured layers by weight bytes, the second by flops per token; so a mixture of
    experts may give the bytes of all and the flops of the chosen experts. With one measured layer
    both scale in proportion. Between measured token counts times lie on straight lines, above the
    largest they grow with the tokens. Arithmetic is that of the measured number format.

    Raises:
        ProfileError: the profile has no such layer.
    """
    kind = (processor, weights)
    curves: list[LayerCurve | RecordedCurve] = []
    curves += [c for c in profile.recorded if recorded and (c.processor, c.weights) == kind]
    timed = bool(curves)
    curves = curves or [c for c in profile.layers if (c.processor, c.weights) == kind]
    if not curves:
        raise _lacking(profile, f"time of a layer ({processor}, {weights} weights)")
    first = {c.shape.work.weight_bytes: _curve_s(c, 1) for c in curves}
    reading = _between(first, work.weight_bytes)
    if recorded and not timed:
        reading = _unlaunched(first, work.weight_bytes, reading)
    more = {c.shape.work.flops_per_token: _arithmetic_s(c, tokens) for c in curves}
    computing = _between(more, work.flops_per_token)
    return replace(_worst([reading, computing]), value=reading.value + computing.value)


def scan_s(profile: HardwareProfile, state_numbers: int, processor: Processor) -> Number:
    """Time of a piece of a recurrence beside its products; a convolution alone takes none."""
    on_cpu = _SCAN_CPU_S + state_numbers * _SCAN_NUMBER_S / profile.machine.cores
    seconds = on_cpu if KINDS[processor].host_computes else _SCAN_GPU_S
    value = seconds if state_numbers else 0.0
    return Number(value=value, obtained=Obtained.ASSUMED, source=SCANNED)


def plain_bytes_per_s(profile: HardwareProfile, processor: Processor) -> float | None:
    """How fast plain weights are multiplied with one row, of the fastest layer that was timed."""
    mine = [
        c for c in profile.layers if c.processor is processor and c.weights is WeightOrder.PLAIN
    ]
    return max((c.shape.work.weight_bytes / _curve_s(c, 1).value for c in mine), default=None)


def _unlaunched(first: Mapping[int, Number], weight_bytes: int, launched: Number) -> Number:
    """Seconds of reading a layer in a recorded pass, from those of layers that are launched."""
    s_per_byte = min(number.value / nbytes for nbytes, number in first.items())
    seconds = weight_bytes * s_per_byte + LAYER_KERNELS * KERNEL_S
    if seconds >= launched.value:
        return launched
    return replace(launched, value=seconds, obtained=Obtained.ASSUMED, source=UNLAUNCHED)


def replay_s(profile: HardwareProfile, processor: Processor) -> Number:
    """What a recorded pass takes beside its layers and its head."""
    found = [each.replay_s for each in profile.replays if each.processor is processor]
    return found[0] if found else Number(value=REPLAY_S, obtained=Obtained.ASSUMED, source=REPLAYED)


def head_s(
    profile: HardwareProfile,
    work: LayerWork,
    rows: int,
    *,
    processor: Processor,
    weights: WeightOrder = WeightOrder.PLAIN,
    recorded: bool = False,
) -> Number:
    """Time of an output head for some rows; straight lines between measured sizes and counts.

    One whose weights lie as none in the profile does takes as long as a layer of its size. A head
    is a single kernel, so in a recorded pass it takes no less.

    Raises:
        ProfileError: the profile has no layer either.
    """
    mine = [c for c in profile.heads if c.processor is processor and c.weights is weights]
    curves = {c.weight_bytes: c for c in mine}
    if not curves:
        return layer_s(profile, work, rows, processor=processor, weights=weights, recorded=recorded)
    return _between({n: _curve_s(c, rows) for n, c in curves.items()}, work.weight_bytes)


def expert_s(
    profile: HardwareProfile,
    weight_bytes: int,
    rows: float,
    *,
    processor: Processor,
    exact: bool = False,
    old: bool = False,
) -> Number | None:
    """Time of an expert that is sent so many rows; straight lines between sizes and counts.

    That of row-invariant passes counts as any other where the profile has none of these. None
    where it has no expert by this processor.

    Args:
        profile: of the machine.
        weight_bytes: of an expert.
        rows: that it is sent.
        processor: that computes.
        exact: in a row-invariant pass.
        old: torch multiplied few rows in other passes, where kernels do now
            (`decoding.times_old_experts`). They take no longer than in row-invariant ones, or a
            share of torch's time.
    """
    mine = [c for c in profile.experts if c.processor is processor]
    curves = [c for c in mine if c.exact is exact] or mine
    if not curves:
        return None
    found = _between({c.weight_bytes: _curve_s(c, rows) for c in curves}, weight_bytes)
    if exact or not old or rows > AT_ONCE_FEW:
        return found
    known = {c.weight_bytes: _curve_s(c, rows) for c in mine if c.exact}
    kernels_s = _between(known, weight_bytes).value if known else _KERNELS_SHARE * found.value
    value = min(found.value, kernels_s)
    return replace(found, value=value, obtained=Obtained.ASSUMED, source=OLD_EXPERTS)


def disk_slowdown(profile: HardwareProfile, weight_bytes: int, weights: WeightOrder) -> float:
    """How much longer a CPU takes for a layer while the disk is read; 1 if that is not known.

    The mean over the measured token counts; straight lines between the measured sizes, beyond
    them the nearest. Weights that lie as none in the profile do are slowed as all others together.
    """
    mine = [s for s in profile.beside_disk if s.weights is weights] or profile.beside_disk
    sizes = sorted({s.weight_bytes for s in mine})
    if not sizes:
        return 1.0
    points = {
        size: replace(
            mine[0].factor,
            value=fmean(s.factor.value for s in mine if s.weight_bytes == size),
        )
        for size in sizes
    }
    return max(1.0, _between(points, min(max(weight_bytes, sizes[0]), sizes[-1])).value)


def disk_delay_s(profile: HardwareProfile, queue_depth: int) -> float:
    """How long after its bytes have come a copy from the disk is whole.

    Blocks that are read at once share the disk, so the last of a copy ends later than the bytes
    before it: with n reads in flight, that all take n times as long as one alone would, by
    (n - 1) / 2 blocks.

    Raises:
        ProfileError: the profile has no disk.
    """
    rate = disk_bytes_per_s(profile, queue_depth).value
    return (queue_depth - 1) / 2 * profile.disk[0].block_bytes / rate


def attention_s(
    profile: HardwareProfile,
    kv_bytes: int,
    query_tokens: int,
    *,
    processor: Processor,
    exact: bool = False,
) -> Number:
    """Time of attention from `query_tokens` rows to `kv_bytes` of keys and values.

    Proportional to the bytes; by query rows straight lines, above the largest count in proportion.
    That of row-invariant passes counts as any other where the profile has none of these.

    Raises:
        ProfileError: the profile has no attention by this processor.
    """
    mine = [a for a in profile.attention if a.processor is processor]
    found = [a for a in mine if a.exact is exact] or [a for a in mine if not a.exact]
    speeds = {a.query_tokens: a.s_per_kv_byte for a in found}
    _require(profile, speeds, f"attention time ({processor})")
    per_byte = _between(speeds, query_tokens)
    return replace(per_byte, value=per_byte.value * kv_bytes)


def _curve_s(curve: LayerCurve | RecordedCurve | HeadCurve | ExpertCurve, tokens: float) -> Number:
    return _between({time.tokens: time.layer_s for time in curve.times}, tokens)


def _arithmetic_s(curve: LayerCurve | RecordedCurve, tokens: int) -> Number:
    """What more tokens than one add; noise may not make it negative."""
    one, all_s = _curve_s(curve, 1), _curve_s(curve, tokens)
    return replace(_worst([one, all_s]), value=max(0.0, all_s.value - one.value))


def _rate(speeds: Mapping[int, Number], nbytes: int) -> Number:
    """Bandwidth at a size, through the times."""
    times = {size: replace(rate, value=size / rate.value) for size, rate in speeds.items()}
    time = _between(times, nbytes)
    return replace(time, value=nbytes / time.value)


def _between(points: Mapping[int, Number], x: float) -> Number:
    """Straight lines between points; in proportion to x above the last.

    Below the first the first line goes on, but its value at 0 stays between 0 and the first's.
    """
    places = sorted(points)
    last = places[-1]
    if x >= last or len(places) == 1:
        return replace(points[last], value=points[last].value * x / last)
    above = next(i for i, place in enumerate(places) if i > 0 and place > x)
    low, high = places[above - 1], places[above]
    start, end = points[low], points[high]
    worst = start if x == low else _worst([start, end])
    slope = (end.value - start.value) / (high - low)
    if x >= low:
        return replace(worst, value=start.value + slope * (x - low))
    fixed = min(max(start.value - slope * low, 0.0), start.value)
    return replace(worst, value=fixed + (start.value - fixed) * x / low)


def _worst(numbers: Iterable[Number]) -> Number:
    return max(numbers, key=lambda number: _WORSE.index(number.obtained))


def _require(profile: HardwareProfile, found: Mapping[int, Number], what: str) -> None:
    if not found:
        raise _lacking(profile, what)


def _lacking(profile: HardwareProfile, what: str) -> ProfileError:
    return ProfileError(
        f"profile {profile.name} has no {what}: measure one with `offload-run profile`, "
        "or choose another profile"
    )
