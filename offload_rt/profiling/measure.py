"""Measure this machine: one to two minutes, part by part."""

import datetime
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from offload_rt.device.base import Device
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.cuda import CudaDevice, TorchDriver
from offload_rt.device.driver import Driver
from offload_rt.device.host import compute_threads, cores
from offload_rt.device.nvml import find_driver
from offload_rt.errors import DeviceError, ProfileError
from offload_rt.model.packed import can_pack
from offload_rt.profiling import link
from offload_rt.profiling.compute import measure_attention, measure_layer
from offload_rt.profiling.disk import default_folder, measure_disk
from offload_rt.profiling.effort import Effort
from offload_rt.profiling.identity import these_versions, this_machine
from offload_rt.profiling.memory import measure_memory, thread_counts
from offload_rt.profiling.profile import (
    SCHEMA_VERSION,
    AttentionSpeed,
    DiskSpeed,
    HardwareProfile,
    LayerCurve,
    LayerShape,
    LinkSpeed,
    MemorySpeed,
    PinSpeed,
    Versions,
    WeightOrder,
)
from offload_rt.profiling.timing import Tick

_QUIET_LOAD = 0.5  # of the cores: the average still holds what ran a minute ago

logger = logging.getLogger(__name__)

Record = LinkSpeed | DiskSpeed | MemorySpeed | PinSpeed | LayerCurve | AttentionSpeed
Report = Callable[[int, int], None]  # numbers done, numbers in all


@dataclass(frozen=True, slots=True)
class Part:
    """One thing to measure.

    Attributes:
        label: for the log.
        ticks: how often `run` calls what it is given.
        run: measures; a ProfileError becomes a note.
    """

    label: str
    ticks: int
    run: Callable[[Tick], Sequence[Record]]


@dataclass(slots=True)
class _Session:
    """What is known of the machine while it is measured."""

    effort: Effort
    notes: list[str] = field(default_factory=list)
    nvml: list[tuple[int, int]] = field(default_factory=list)


def measure(
    name: str,
    *,
    device: str = "auto",
    folder: Path | None = None,
    effort: Effort | None = None,
    report: Report = lambda done, total: None,
) -> HardwareProfile:
    """Measure this machine.

    Args:
        name: of the profile.
        device: auto, cpu or cuda; on a GPU machine `cpu` leaves the GPUs out.
        folder: the disk to measure, or a model on it; None: where temporary files are kept.
        effort: how much is measured.
        report: called after each number.

    Raises:
        DeviceError: there is no such device.
        ProfileError: the folder cannot be measured.
    """
    session = _Session(effort or Effort())
    driver: Driver = TorchDriver()
    gpus = _choose_gpus(driver, device)
    if (load := os.getloadavg()[0]) > _QUIET_LOAD * cores():
        session.notes.append(
            f"other work was running (load average {load:.1f} on {cores()} cores): measure again "
            "when the machine is quiet"
        )
    began = time.perf_counter()
    with _open_devices(gpus) as devices:
        parts = _parts(session, driver, gpus, devices, folder)
        records = _run(parts, session, report, strict=folder is not None)
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


def _parts(
    session: _Session, driver: Driver, gpus: int, devices: Sequence[Device], folder: Path | None
) -> list[Part]:
    effort = session.effort
    disk = folder or default_folder()
    parts = [
        Part("disk", len(effort.disk_depths), lambda tick: measure_disk(disk, effort, tick)),
        Part("host memory", 2 * len(thread_counts()), lambda tick: measure_memory(effort, tick)),
    ]
    if gpus:
        parts.append(Part("links", 2, partial(_measure_links, session, driver, gpus)))
        parts.append(Part("pinning", 1, lambda tick: link.measure_pinning(driver, effort, tick)))
    for device in devices:
        parts += _compute_parts(effort, device)
    return parts


def _compute_parts(effort: Effort, device: Device) -> Iterator[Part]:
    """Layers and attention on one device; the host's layers too, for a drafter may run there."""
    dtype = _dtype(device)
    packs = can_pack(getattr(torch, dtype), device.torch_device)
    orders = {WeightOrder.PLAIN: effort.tokens}
    if packs:
        orders[WeightOrder.PACKED] = effort.packed_tokens
    if device.torch_device.type == "cpu":
        orders[WeightOrder.INT8] = effort.packed_tokens
    if dtype == "bfloat16":  # a GPU's kernels for 4 bits know no other
        orders[WeightOrder.INT4] = effort.packed_tokens
    for shape in effort.layer_shapes(dtype, getattr(torch, dtype).itemsize):
        for order, counts in orders.items():

            def run(
                tick: Tick, shape: LayerShape = shape, order: WeightOrder = order
            ) -> Sequence[Record]:
                return [measure_layer(shape, device, order, effort, tick)]

            label = f"{device.name}: layer of {shape.hidden}, {order} weights"
            yield Part(label, len(counts), run)
    yield Part(
        f"{device.name}: attention",
        len(effort.query_tokens),
        lambda tick: measure_attention(device, dtype, effort, tick),
    )


def _dtype(device: Device) -> str:
    """The 16-bit format models have; any CPU computes bf16, see `model/wide.py`."""
    if device.torch_device.type == "cpu":
        return "bfloat16"
    nvml = find_driver()
    old = nvml is not None and bool(nvml.gpus) and nvml.gpus[0].capability < (8, 0)
    return "float16" if old else "bfloat16"


def _measure_links(session: _Session, driver: Driver, gpus: int, tick: Tick) -> Sequence[Record]:
    roads = link.open_roads(driver, gpus, session.effort)
    found = link.measure_links(roads, session.effort, tick, is_pinned=False)
    with link.pinned(driver, roads) as refused:
        if refused is not None:
            session.notes.append(f"no pinned memory was measured: it was refused ({refused})")
            tick()
            return found
        link.while_copying(roads, lambda: _note_links(session))
        return found + link.measure_links(roads, session.effort, tick, is_pinned=True)


def _note_links(session: _Session) -> None:
    nvml = find_driver()
    if nvml is not None:
        session.nvml = [(gpu.link_generation, gpu.link_width) for gpu in nvml.gpus]


def _run(parts: Sequence[Part], session: _Session, report: Report, *, strict: bool) -> list[Record]:
    total = sum(part.ticks for part in parts)
    done, records = 0, list[Record]()

    def tick() -> None:
        nonlocal done
        done += 1
        report(done, total)

    for part in parts:
        start, begin_s = done, time.perf_counter()
        logger.debug("measuring %s", part.label)
        try:
            records += part.run(tick)
        except ProfileError as error:
            if strict:
                raise
            session.notes.append(str(error))
        done = start + part.ticks
        report(done, total)
        logger.debug("%s took %.1f s", part.label, time.perf_counter() - begin_s)
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
    return HardwareProfile(
        schema_version=SCHEMA_VERSION,
        name=name,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        method=method,
        notes=tuple(session.notes),
        versions=versions,
        machine=machine,
        links=tuple(r for r in records if isinstance(r, LinkSpeed)),
        disk=tuple(r for r in records if isinstance(r, DiskSpeed)),
        host_memory=tuple(r for r in records if isinstance(r, MemorySpeed)),
        pinning=next((r for r in records if isinstance(r, PinSpeed)), None),
        layers=tuple(r for r in records if isinstance(r, LayerCurve)),
        attention=tuple(r for r in records if isinstance(r, AttentionSpeed)),
    )
