"""Measure this machine: one to two minutes, part by part."""

import datetime
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from offload_rt.config import RuntimeConfig
from offload_rt.device.base import Device
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.cuda.device import CudaDevice, TorchDriver
from offload_rt.device.cuda.driver import Driver
from offload_rt.device.cuda.nvml import find_driver
from offload_rt.device.kinds import KINDS
from offload_rt.device.system import compute_threads
from offload_rt.errors import DeviceError, ProfileError
from offload_rt.model.exactness import are_quickest
from offload_rt.model.formats.packed import can_pack
from offload_rt.profiling import link
from offload_rt.profiling.compute import (
    Reading,
    TimedLayer,
    measure_attention,
    measure_beside_reads,
    measure_heads,
    measure_layers,
    measure_reads_beside,
    measure_recorded,
    measure_replay,
)
from offload_rt.profiling.dequantising import MEASURED, measure_dequantising
from offload_rt.profiling.disk import (
    JUST_WRITTEN,
    folder_to_read,
    measure_disk,
    open_for_reading,
    reads_a_model,
)
from offload_rt.profiling.effort import Effort
from offload_rt.profiling.experts import measure_experts
from offload_rt.profiling.identity import these_versions, this_machine
from offload_rt.profiling.memory import measure_memory, thread_counts
from offload_rt.profiling.neighbours import Neighbours
from offload_rt.profiling.profile import (
    SCHEMA_VERSION,
    AttentionSpeed,
    DecodeSpeed,
    DiskSlowdown,
    DiskSpeed,
    ExpertCurve,
    HardwareProfile,
    HeadCurve,
    LayerCurve,
    LayerShape,
    LinkSpeed,
    MemorySpeed,
    PinSpeed,
    ReadSlowdown,
    RecordedCurve,
    ReplayTime,
    Versions,
    WeightOrder,
)
from offload_rt.profiling.timing import Curve, Tick

logger = logging.getLogger(__name__)

Record = (
    LinkSpeed
    | DiskSpeed
    | MemorySpeed
    | PinSpeed
    | LayerCurve
    | RecordedCurve
    | ReplayTime
    | HeadCurve
    | ExpertCurve
    | DiskSlowdown
    | ReadSlowdown
    | DecodeSpeed
    | AttentionSpeed
)
Report = Callable[[int, int, str], None]  # numbers done, numbers in all, what is measured now


@dataclass(frozen=True, slots=True)
class Part:
    """One thing to measure.

    Attributes:
        label: what it is, in words.
        ticks: how often `run` calls what it is given.
        run: measures; a ProfileError becomes a note.
    """

    label: str
    ticks: int
    run: Callable[[Tick], Sequence[Record]]


@dataclass(slots=True)
class _Session:
    """What is known of the machine while it is measured.

    Attributes:
        curve: how much is measured, and what could not be.
        folder: the disk.
        strict: it was asked for, so that it can be measured.
        undo: closes it when all is measured.
    """

    curve: Curve
    folder: Path
    strict: bool
    undo: ExitStack
    notes: list[str] = field(default_factory=list)
    nvml: list[tuple[int, int]] = field(default_factory=list)
    _reading: Reading | None = None

    def refuse(self, error: ProfileError) -> None:
        """Go on without what could not be measured, and say so once; else raise it."""
        if self.strict:
            raise error
        if str(error) not in self.notes:
            self.notes.append(str(error))

    def reading(self) -> Reading:
        """What reads the disk; opened once.

        Raises:
            ProfileError: it cannot be read.
        """
        if self._reading is None:
            opened = open_for_reading(self.folder, self.curve.effort, RuntimeConfig().readers)
            self._reading = self.undo.enter_context(opened)
        return self._reading

    @property
    def spent_s(self) -> tuple[float, float]:
        """Seconds of timing, the first time and again."""
        return self.curve.doubts.timed_s, self.curve.doubts.again_s


def measure(
    name: str,
    *,
    device: str = "auto",
    folder: Path | None = None,
    effort: Effort | None = None,
    report: Report = lambda done, total, what: None,
) -> HardwareProfile:
    """Measure this machine.

    Args:
        name: of the profile.
        device: auto, cpu or cuda; on a GPU machine `cpu` leaves the GPUs out.
        folder: the disk to measure, or a model on it; None: where temporary files are kept.
        effort: how much is measured.
        report: called before each part and after each number.

    Raises:
        DeviceError: there is no such device.
        ProfileError: the folder cannot be measured.
    """
    curve = Curve(effort or Effort())
    driver: Driver = TorchDriver()
    gpus = _choose_gpus(driver, device)
    began, neighbours = time.perf_counter(), Neighbours()
    disk = folder or folder_to_read(curve.effort.disk_sample_bytes)
    with _open_devices(gpus) as devices, ExitStack() as undo:
        session = _Session(curve, disk, folder is not None, undo)
        records = _run(_parts(session, driver, gpus, devices), session, report)
        doubts = session.curve.doubts
        notes = [neighbours.note(doubts.scatter), doubts.note]
    session.notes[:0] = [note for note in notes if note is not None]
    if not gpus:
        session.notes.append("no link was measured: on the CPU weights need not cross one")
    seconds = time.perf_counter() - began
    return _assemble(name, session, records, f"measured by offload-run profile in {seconds:.0f} s")


def _choose_gpus(driver: Driver, device: str) -> int:
    reason = driver.missing(0)
    if device == "cpu" or (device == "auto" and reason is not None):
        return 0
    if reason is not None:
        raise DeviceError(f"--device {device} cannot be measured: {reason}")
    return link.count_gpus(driver)


@contextmanager
def _open_devices(gpus: int) -> Iterator[list[Device]]:
    """The CPU, and the first GPU if there is one."""
    devices: list[Device] = [CpuDevice()]
    torch.set_num_threads(compute_threads())
    with ExitStack() as stack:
        stack.callback(devices[0].close)
        if gpus:
            devices.append(CudaDevice(0))
            stack.callback(devices[1].close)
        yield devices


def _parts(session: _Session, driver: Driver, gpus: int, devices: Sequence[Device]) -> list[Part]:
    curve = session.curve
    effort = curve.effort
    if not reads_a_model(session.folder):
        session.notes.append(JUST_WRITTEN)

    def run_disk(tick: Tick) -> Sequence[Record]:
        return measure_disk(session.folder, curve, tick)

    parts = [
        Part("disk", len(effort.disk_depths), run_disk),
        Part("host memory", 2 * len(thread_counts()), lambda tick: measure_memory(curve, tick)),
    ]
    if gpus:
        parts.append(Part("links", 2, partial(_measure_links, session, driver, gpus)))
        parts.append(Part("pinning", 1, lambda tick: link.measure_pinning(driver, effort, tick)))
    for device in devices:
        parts += _compute_parts(session, device)
    for device in devices:
        dequantise = partial(measure_dequantising, device, getattr(torch, _dtype(device)), curve)
        parts.append(Part(f"{device.name}, dequantising", len(MEASURED), dequantise))
    parts.append(Part("disk, again", len(effort.disk_depths), run_disk))
    return parts


def _undisturbed(records: Iterable[DiskSpeed]) -> tuple[DiskSpeed, ...]:
    """Of each number of reads in flight the fastest: others may have read the disk meanwhile.

    It is measured first and last, minutes apart. Nothing else tells that others read.
    """
    best: dict[int, DiskSpeed] = {}
    for record in records:
        known = best.setdefault(record.queue_depth, record)
        if record.bytes_per_s.value > known.bytes_per_s.value:
            best[record.queue_depth] = record
    return tuple(best.values())


def _orders(device: Device) -> list[WeightOrder]:
    """In which unrounded weights lie on a device."""
    packs = can_pack(getattr(torch, _dtype(device)), device.torch_device)
    return [WeightOrder.PLAIN, WeightOrder.PACKED][: 1 + packs]


def _compute_parts(session: _Session, device: Device) -> Iterator[Part]:
    """Layers and attention on one device; the host's layers too, for a drafter may run there."""
    curve = session.curve
    effort = curve.effort
    dtype = _dtype(device)
    unrounded = _orders(device)
    orders = dict(zip(unrounded, (effort.tokens, effort.packed_tokens), strict=False))
    for weights, formats in device.kind.kernels.items():
        if dtype in formats:
            orders[WeightOrder(weights)] = effort.packed_tokens
    shapes = effort.layer_shapes(dtype, getattr(torch, dtype).itemsize)
    for order, counts in orders.items():

        def run(tick: Tick, order: WeightOrder = order) -> Sequence[Record]:
            return measure_layers(shapes, device, order, curve, tick)

        label, ticks = f"{device.name}, layers with {order} weights", len(shapes) * len(counts)
        if device.kind.host_computes and order in unrounded:
            beside = _Beside(session, shapes[slice(*effort.beside_disk)])
            yield Part(
                f"{label}, also beside reads",
                ticks + beside.ticks,
                partial(beside.measure, shapes, device, order),
            )
        else:
            yield Part(label, ticks, run)
    if device.kind.records:
        plain = [order for order in orders if order is not WeightOrder.PACKED]
        yield from _recorded_parts(curve, device, shapes, plain)
    for order in unrounded:

        def run_heads(tick: Tick, order: WeightOrder = order) -> Sequence[Record]:
            return measure_heads(device, dtype, order, curve, tick)

        label = f"{device.name}, output heads with {order} weights"
        yield Part(label, len(effort.heads) * len(effort.head_rows), run_heads)
    if device.kind.host_computes:
        count = 2 * len(effort.experts) * len(effort.expert_rows)
        experts = partial(measure_experts, device, dtype, curve)
        yield Part(f"{device.name}, experts", count, experts)
    yield from _attention_parts(curve, device, dtype)


@dataclass(frozen=True, slots=True)
class _Beside:
    """Layers that are timed beside reads from the disk, too, while they are there.

    Attributes:
        session: of the machine.
        shapes: of these layers, by size, ascending; reads are timed beside the last.
    """

    session: _Session
    shapes: Sequence[LayerShape]

    @property
    def ticks(self) -> int:
        """Numbers of an order of weights; reads are timed beside plain ones only."""
        return len(self.shapes) * len(self.session.curve.effort.beside_tokens) + 1

    def measure(
        self, shapes: Sequence[LayerShape], device: Device, order: WeightOrder, tick: Tick
    ) -> Sequence[Record]:
        """Time layers of all shapes, and those beside reads."""
        found = list[Record]()

        def then(shape: LayerShape, layer: TimedLayer) -> None:
            if shape not in self.shapes:
                return
            curve = self.session.curve
            try:
                reading = self.session.reading()
                found.extend(measure_beside_reads(layer, reading, curve, tick))
                if order is WeightOrder.PLAIN and shape == self.shapes[-1]:
                    found.append(measure_reads_beside(layer, reading, curve, tick))
            except ProfileError as error:
                self.session.refuse(error)

        curves = measure_layers(shapes, device, order, self.session.curve, tick, then=then)
        return [*curves, *found]


def _attention_parts(curve: Curve, device: Device, dtype: str) -> Iterator[Part]:
    """Both ways of it, where row-invariant passes are on by themselves."""
    ways = {"attention": False}
    if device.kind.host_computes:
        ways["attention of row-invariant passes"] = True
    for label, exact in ways.items():

        def run(tick: Tick, exact: bool = exact) -> Sequence[Record]:
            return measure_attention(device, dtype, curve, tick, exact=exact)

        yield Part(f"{device.name}, {label}", len(curve.effort.query_tokens), run)


def _recorded_parts(
    curve: Curve, device: Device, shapes: Sequence[LayerShape], orders: Sequence[WeightOrder]
) -> Iterator[Part]:
    """What passes take there that are launched at once."""
    yield Part(
        f"{device.name}, the launch of a recorded pass",
        1,
        lambda tick: measure_replay(device, curve, tick),
    )
    for order in orders:

        def run(tick: Tick, order: WeightOrder = order) -> Sequence[Record]:
            return measure_recorded(shapes, device, order, curve, tick)

        label = f"{device.name}, recorded layers with {order} weights"
        yield Part(label, len(shapes) * len(curve.effort.recorded_tokens), run)


def _dtype(device: Device) -> str:
    """The 16-bit format models have; any CPU computes bf16, see `model/formats/wide.py`."""
    if not device.kind.own_memory:
        return "bfloat16"
    nvml = find_driver()
    old = nvml is not None and bool(nvml.gpus) and nvml.gpus[0].capability < (8, 0)
    return "float16" if old else "bfloat16"


def _measure_links(session: _Session, driver: Driver, gpus: int, tick: Tick) -> Sequence[Record]:
    curve = session.curve
    roads = link.open_roads(driver, gpus, curve.effort)
    found = link.measure_links(roads, curve, tick, is_pinned=False)
    with link.pinned(driver, roads) as refused:
        if refused is not None:
            session.notes.append(f"no pinned memory was measured: it was refused ({refused})")
            tick()
            return found
        link.while_copying(roads, lambda: _note_links(session))
        return found + link.measure_links(roads, curve, tick, is_pinned=True)


def _note_links(session: _Session) -> None:
    nvml = find_driver()
    if nvml is not None:
        session.nvml = [(gpu.link_generation, gpu.link_width) for gpu in nvml.gpus]


def _run(parts: Sequence[Part], session: _Session, report: Report) -> list[Record]:
    total = sum(part.ticks for part in parts)
    done, what, records = 0, "", list[Record]()

    def tick() -> None:
        nonlocal done
        done += 1
        report(done, total, what)

    for part in parts:
        start, begin_s, what = done, time.perf_counter(), part.label
        before, neighbours = session.spent_s, Neighbours()
        report(done, total, what)
        logger.debug("measuring %s", what)
        try:
            records += part.run(tick)
        except ProfileError as error:
            session.refuse(error)
        done = start + part.ticks
        report(done, total, what)
        timed_s, again_s = (now - then for now, then in zip(session.spent_s, before, strict=True))
        whole_s = time.perf_counter() - begin_s
        took = (whole_s, whole_s - timed_s - again_s, timed_s, again_s)
        text = "%s took %.1f s: %.1f to prepare, %.1f to time, %.1f to time again; waited %.0f%%"
        logger.debug(text, part.label, *took, 100 * (neighbours.share() or 0.0))
    return records


def _assemble(
    name: str, session: _Session, records: Sequence[Record], method: str
) -> HardwareProfile:
    driver = find_driver()
    machine = this_machine(driver)
    if len(session.nvml) == len(machine.gpus):
        under_load = zip(machine.gpus, session.nvml, strict=True)
        gpus = (
            replace(gpu, link_generation=generation, link_width=width)
            for gpu, (generation, width) in under_load
        )
        machine = replace(machine, gpus=tuple(gpus))
    versions: Versions = these_versions(driver)
    layers = tuple(r for r in records if isinstance(r, LayerCurve))
    return HardwareProfile(
        schema_version=SCHEMA_VERSION,
        name=name,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        method=method,
        notes=tuple(session.notes),
        versions=versions,
        machine=machine,
        links=tuple(r for r in records if isinstance(r, LinkSpeed)),
        disk=_undisturbed(r for r in records if isinstance(r, DiskSpeed)),
        host_memory=tuple(r for r in records if isinstance(r, MemorySpeed)),
        pinning=next((r for r in records if isinstance(r, PinSpeed)), None),
        layers=layers,
        layers_exact=any(
            are_quickest(layer.shape.dtype, KINDS[layer.processor]) for layer in layers
        ),
        heads=tuple(r for r in records if isinstance(r, HeadCurve)),
        experts=tuple(r for r in records if isinstance(r, ExpertCurve)),
        recorded=tuple(r for r in records if isinstance(r, RecordedCurve)),
        replays=tuple(r for r in records if isinstance(r, ReplayTime)),
        beside_disk=tuple(r for r in records if isinstance(r, DiskSlowdown)),
        beside_computing=next((r for r in records if isinstance(r, ReadSlowdown)), None),
        dequantising=tuple(r for r in records if isinstance(r, DecodeSpeed)),
        attention=tuple(r for r in records if isinstance(r, AttentionSpeed)),
    )
