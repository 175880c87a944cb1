"""Links between host memory and GPUs, and page-locking, through the calls that run models make.

Times are those of events on the copy stream. A link is measured by block size, both ways, from
pinned and pageable memory. Then all GPUs are measured at once, and with every core copying memory
meanwhile.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from offload_rt.device.cuda.driver import Driver, DriverStream
from offload_rt.device.host_memory import HostBuffer, allocate_host
from offload_rt.device.system import cores, free_memory_bytes
from offload_rt.profiling.curves import Place
from offload_rt.profiling.effort import Effort
from offload_rt.profiling.profile import Direction, LinkLoad, LinkSpeed, PinSpeed
from offload_rt.profiling.timing import Curve, Sample, Tick, measured_rate, rate_of, take_samples

_LOAD_BYTES = 64 * 2**20
_MOST_GPUS = 16
_PIN_PARTS = 16


@dataclass(frozen=True, slots=True)
class Road:
    """One GPU's link: a stream, and memory at both ends.

    Attributes:
        host: as large as the largest block.
        device: [n] uint8, as large.
    """

    gpu: int
    stream: DriverStream
    host: HostBuffer
    device: torch.Tensor


def count_gpus(driver: Driver) -> int:
    """GPUs that torch can use."""
    return next(i for i in range(_MOST_GPUS + 1) if i == _MOST_GPUS or driver.missing(i))


def open_roads(driver: Driver, gpus: int, effort: Effort) -> list[Road]:
    """Take the memory for measuring all links; it is pageable."""
    nbytes = max(effort.link_blocks)
    roads = []
    for gpu in range(gpus):
        device = torch.device(f"cuda:{gpu}")
        _, stream = driver.open(device)
        host = allocate_host(nbytes)
        host.tensor.zero_()
        roads.append(Road(gpu, stream, host, driver.allocate(nbytes, device)))
    return roads


@contextmanager
def pinned(driver: Driver, roads: Sequence[Road]) -> Iterator[str | None]:
    """Page-lock the host memory of all roads while the body runs; yields the reason if refused."""
    held: list[int] = []
    reason = None
    try:
        for road in roads:
            address = road.host.tensor.data_ptr()
            reason = reason or driver.register(address, road.host.nbytes)
            if reason is None:
                held.append(address)
        yield reason
    finally:
        for address in held:
            driver.unregister(address)


def measure_links(
    roads: Sequence[Road], curve: Curve, tick: Tick, *, is_pinned: bool
) -> tuple[LinkSpeed, ...]:
    """Measure each link alone; if pinned, also all at once and with busy cores."""
    effort = curve.effort
    found = [
        speed
        for road in roads
        for direction in Direction
        for speed in _alone(road, direction, is_pinned, curve)
    ]
    if is_pinned:
        largest = max(effort.link_blocks)
        for direction in Direction:
            if len(roads) > 1:
                found += _measure(roads, largest, direction, LinkLoad.TOGETHER, True, effort)
            with _busy_cores():
                for road in roads:
                    found += _measure([road], largest, direction, LinkLoad.CPU_BUSY, True, effort)
    tick()
    return tuple(found)


def measure_pinning(driver: Driver, effort: Effort, tick: Tick) -> tuple[PinSpeed, ...]:
    """Page-lock memory that was touched before; nothing if little is refused, too."""
    nbytes, most = effort.pin_bytes, _most_pinned(driver, effort)
    if most is not None:
        nbytes = min(nbytes, most)
        if nbytes < effort.pin_bytes // _PIN_PARTS:
            tick()
            return ()
    memory = allocate_host(nbytes)
    memory.tensor.zero_()
    address = memory.tensor.data_ptr()

    def sample_s() -> float:
        start = time.perf_counter()
        refused = driver.register(address, memory.nbytes)
        took = time.perf_counter() - start
        if refused is None:
            driver.unregister(address)
        return took

    rate = measured_rate(memory.nbytes, take_samples(sample_s, effort))
    tick()
    return (PinSpeed(block_bytes=memory.nbytes, bytes_per_s=rate, most_bytes=most),)


def _most_pinned(driver: Driver, effort: Effort) -> int | None:
    """How much can be locked together, to a sixteenth of what is locked at once; None if all is.

    Under WSL a driver refuses from about 0.5 to 1 GB on, whatever memory there is.
    """
    part, held = effort.pin_bytes, list[HostBuffer]()
    wanted = min(effort.pin_most_bytes, max(part, free_memory_bytes() // 2))
    try:
        while sum(buffer.nbytes for buffer in held) + part <= wanted:
            buffer = allocate_host(part)
            buffer.tensor.zero_()  # pages that were never touched take longer to lock
            if driver.register(buffer.tensor.data_ptr(), part) is None:
                held.append(buffer)
            elif part > effort.pin_bytes // _PIN_PARTS:
                part //= 2
            else:
                return sum(buffer.nbytes for buffer in held)
        return None if part == effort.pin_bytes else sum(buffer.nbytes for buffer in held)
    finally:
        for buffer in held:
            driver.unregister(buffer.tensor.data_ptr())


def while_copying(roads: Sequence[Road], ask: Callable[[], None]) -> None:
    """Call `ask` while bytes cross all links: an idle one shows less than it can do."""
    for _ in range(16):
        for road in roads:
            road.stream.copy(road.device, road.host.tensor)
    ask()
    for road in roads:
        road.stream.synchronize()


def _alone(road: Road, direction: Direction, is_pinned: bool, curve: Curve) -> Iterator[LinkSpeed]:
    """Time copies of all block sizes over one link, in turns."""

    def copy_s(block: int) -> float:
        repeats = max(1, curve.effort.link_sample_bytes // block)
        return _copy_s([road], block, direction, repeats)[0] / repeats

    passes: dict[Place, Sample] = {
        (block,): partial(copy_s, block) for block in curve.effort.link_blocks
    }
    for (block,), time_s in curve.numbers(curve.take(passes)).items():
        yield LinkSpeed(
            gpu=road.gpu,
            direction=direction,
            pinned=is_pinned,
            load=LinkLoad.ALONE,
            block_bytes=block,
            bytes_per_s=rate_of(block, time_s),
        )


def _measure(
    roads: Sequence[Road],
    block: int,
    direction: Direction,
    load: LinkLoad,
    is_pinned: bool,
    effort: Effort,
) -> Iterator[LinkSpeed]:
    """Time copies of one block size on several links at once; a number for each."""
    repeats = max(1, effort.link_sample_bytes // block)
    taken: list[list[float]] = []

    def sample_s() -> float:
        seconds = _copy_s(roads, block, direction, repeats)
        taken.append(seconds)
        return max(seconds)

    kept = len(take_samples(sample_s, effort))
    for road, seconds in zip(roads, zip(*taken[-kept:], strict=True), strict=True):
        yield LinkSpeed(
            gpu=road.gpu,
            direction=direction,
            pinned=is_pinned,
            load=load,
            block_bytes=block,
            bytes_per_s=measured_rate(repeats * block, seconds),
        )


def _copy_s(roads: Sequence[Road], block: int, direction: Direction, repeats: int) -> list[float]:
    """Seconds of the copies by each link's own events."""
    starts = [road.stream.record() for road in roads]
    for _ in range(repeats):
        for road in roads:
            host, device = road.host.tensor[:block], road.device[:block]
            if direction is Direction.H2D:
                road.stream.copy(device, host)
            else:
                road.stream.copy(host, device)
    ends = [road.stream.record() for road in roads]
    for end in ends:
        end.synchronize()
    return [start.seconds_until(end) for start, end in zip(starts, ends, strict=True)]


@contextmanager
def _busy_cores() -> Iterator[None]:
    """Let every core but one copy memory; that one enqueues."""
    stop = threading.Event()

    def copy_memory() -> None:
        source, target = (allocate_host(_LOAD_BYTES).tensor for _ in range(2))
        while not stop.is_set():
            target.copy_(source)

    threads = [threading.Thread(target=copy_memory, daemon=True) for _ in range(cores() - 1)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
