"""A profile as lines of text."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from offload_rt.printable import printable
from offload_rt.profiling.profile import (
    DiskSlowdown,
    HardwareProfile,
    LayerCurve,
    Machine,
    Number,
    Obtained,
    RecordedCurve,
    Versions,
)
from offload_rt.units import format_size

_HEAD_WIDTH = 26
_PER_LINE = 6

Cell = tuple[str, float, Number]  # where on the curve, the value as shown, what it is from


def profile_table(profile: HardwareProfile) -> str:
    """All numbers of a profile, one row a curve."""
    head = (f"{profile.name}, {profile.date}: {profile.method}", _machine(profile.machine))
    heads = (*head, *_gpus(profile.machine), _versions(profile.versions))
    lines = [printable(line) for line in heads if line]
    for title, rows in _sections(profile):
        made = list(rows)
        if made:
            lines += [title, *made]
    return "\n".join([*lines, *(f"note: {printable(note)}" for note in profile.notes)])


def _sections(profile: HardwareProfile) -> Iterator[tuple[str, Iterable[str]]]:
    yield "link, GB/s by block size", _links(profile)
    disk = [(str(d.queue_depth), _gb(d.bytes_per_s), d.bytes_per_s) for d in profile.disk]
    kinds = {f"{d.file_system}, {'direct' if d.direct else 'page cache'}" for d in profile.disk}
    yield "disk, GB/s by reads in flight", [_row(printable(kind), disk) for kind in sorted(kinds)]
    yield "host memory, GB/s by threads", _memory(profile)
    if profile.pinning is not None:
        rate = profile.pinning.bytes_per_s
        cell = (format_size(profile.pinning.block_bytes), _gb(rate), rate)
        most = profile.pinning.most_bytes
        limit = "" if most is None else f" (no more than {format_size(most)} can be locked)"
        yield f"page-locking, GB/s{limit}", [_row("host memory", [cell])]
    yield "layers, ms by tokens in a pass", _layers(profile.layers)
    yield "layers of recorded passes, ms by tokens in a pass", _layers(profile.recorded)
    yield "a recorded pass beside its layers, ms", _replays(profile)
    if profile.heads:
        yield "output heads, ms by rows", _heads(profile)
    if profile.experts:
        yield "experts, ms by the rows that each is sent", _experts(profile)
    if profile.beside_disk:
        yield "layers while the disk is read, times as long by tokens", _beside(profile)
    if profile.dequantising:
        yield "dequantising, billions of weights a second", _dequantising(profile)
    yield "attention, GB/s of keys and values by query rows", _attention(profile)


def _links(profile: HardwareProfile) -> Iterator[str]:
    for key, group in groupby(
        profile.links, key=lambda link: (link.gpu, link.direction, link.pinned, link.load)
    ):
        gpu, direction, pinned, load = key
        memory = "pinned" if pinned else "pageable"
        cells = [(format_size(s.block_bytes), _gb(s.bytes_per_s), s.bytes_per_s) for s in group]
        yield _row(f"GPU {gpu} {direction} {memory}, {load}", cells)


def _memory(profile: HardwareProfile) -> Iterator[str]:
    for use in dict.fromkeys(speed.use for speed in profile.host_memory):
        speeds = [speed for speed in profile.host_memory if speed.use is use]
        yield _row(use, [(str(s.threads), _gb(s.bytes_per_s), s.bytes_per_s) for s in speeds])


def _replays(profile: HardwareProfile) -> Iterator[str]:
    for each in profile.replays:
        yield _row(each.processor, [("", each.replay_s.value * 1e3, each.replay_s)])


def _layers(curves: Sequence[LayerCurve | RecordedCurve]) -> Iterator[str]:
    for curve in curves:
        size = format_size(curve.shape.weight_bytes)
        head = f"{curve.processor} {curve.weights}, {size} {curve.shape.dtype}"
        cells = [(str(t.tokens), t.layer_s.value * 1e3, t.layer_s) for t in curve.times]
        yield _row(head, cells)


def _heads(profile: HardwareProfile) -> Iterator[str]:
    for curve in profile.heads:
        cells = [(str(t.tokens), t.layer_s.value * 1e3, t.layer_s) for t in curve.times]
        size = format_size(curve.weight_bytes)
        yield _row(f"{curve.processor} {curve.weights}, {size}", cells)


def _experts(profile: HardwareProfile) -> Iterator[str]:
    for curve in profile.experts:
        cells = [(str(t.tokens), t.layer_s.value * 1e3, t.layer_s) for t in curve.times]
        way = ", exact" if curve.exact else ""
        yield _row(f"{curve.processor}{way}, {format_size(curve.weight_bytes)}", cells)


def _beside(profile: HardwareProfile) -> Iterator[str]:
    def kind(slowdown: DiskSlowdown) -> str:
        return f"{slowdown.weights}, {format_size(slowdown.weight_bytes)}"

    for head, group in groupby(profile.beside_disk, key=kind):
        cells = [(str(s.tokens), s.factor.value, s.factor) for s in group]
        yield _row(head, cells)


def _dequantising(profile: HardwareProfile) -> Iterator[str]:
    for who in dict.fromkeys((speed.processor, speed.decoder) for speed in profile.dequantising):
        mine = [s for s in profile.dequantising if (s.processor, s.decoder) == who]
        cells = [
            (f"{s.form} {s.bits} bits", 1e-9 * s.numbers_per_s.value, s.numbers_per_s)
            for s in sorted(mine, key=lambda speed: (speed.form, speed.bits))
        ]
        yield _row(", ".join(who), cells)


def _attention(profile: HardwareProfile) -> Iterator[str]:
    for way in dict.fromkeys((speed.processor, speed.exact) for speed in profile.attention):
        processor, exact = way
        speeds = [s for s in profile.attention if (s.processor, s.exact) == way]
        cells = [
            (str(s.query_tokens), 1e-9 / s.s_per_kv_byte.value, s.s_per_kv_byte) for s in speeds
        ]
        yield _row(f"{processor}, exact" if exact else processor, cells)


def _row(head: str, cells: Sequence[Cell]) -> str:
    """A curve; a long one goes on in further lines."""
    texts = [f"{at}: {_short(value)}" for at, value, _ in cells]
    parts = [texts[i : i + _PER_LINE] for i in range(0, len(texts), _PER_LINE)]
    lines = ["  ".join(f"{text:<13}" for text in part).rstrip() for part in parts]
    lines[-1] += f"  ({_provenance([number for _, _, number in cells])})"
    indent = " " * _HEAD_WIDTH
    first = (
        f"  {head}" if len(head) > _HEAD_WIDTH - 4 else f"  {head:<{_HEAD_WIDTH - 2}}{lines.pop(0)}"
    )
    return "\n".join([first, *(indent + line for line in lines)])


def _provenance(numbers: Sequence[Number]) -> str:
    """How the numbers are known, and how far measured ones scatter."""
    kinds = [str(kind) for kind in Obtained if any(n.obtained is kind for n in numbers)]
    scatter = max((n.spread or 0.0) / n.value for n in numbers)
    repaired = sum(n.obtained is Obtained.MEASURED and bool(n.source) for n in numbers)
    return (
        ", ".join(kinds)
        + (f", quartiles up to {scatter:.0%} apart" if scatter else "")
        + (f", {repaired} repaired" if repaired else "")
    )


def _machine(machine: Machine) -> str:
    return f"{machine.cpu}, {machine.cores} cores, {format_size(machine.ram_bytes)} of memory"


def _gpus(machine: Machine) -> Iterator[str]:
    for index, gpu in enumerate(machine.gpus):
        link = f", PCIe {gpu.link_generation}.0 x{gpu.link_width}" if gpu.link_width else ""
        yield f"GPU {index}: {gpu.name}, {format_size(gpu.memory_bytes)}{link}"


def _versions(versions: Versions) -> str:
    pairs = [
        ("offload_rt", versions.offload_rt),
        ("Python", versions.python),
        ("torch", versions.torch),
        ("transformers", versions.transformers),
        ("NVIDIA driver", versions.driver),
    ]
    return ", ".join(f"{name} {version}" for name, version in pairs if version)


def _gb(rate: Number) -> float:
    return rate.value / 1e9


def _short(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
