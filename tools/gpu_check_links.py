"""The part of `gpu_check.py` about links: copies, uploads behind them, pinning, two GPUs."""

import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from gpu_check_parts import MIB, Bench, median_of, opened, timed, wait_for

from offload_rt.config import RuntimeConfig
from offload_rt.device.base import Device, DeviceBuffer, Stream, TwoWayStream
from offload_rt.device.cuda import streams
from offload_rt.device.host_memory import allocate_host
from offload_rt.device.opening import open_device
from offload_rt.device.several import Devices
from offload_rt.streaming.memory_home import MemoryHome

SAMPLES = 6


class Lane(NamedTuple):
    """A queue over a link, with memory at both ends."""

    device: Device
    queue: TwoWayStream
    slot: DeviceBuffer
    home: MemoryHome

    def to(self) -> None:
        """Enqueue a copy to the device."""
        self.queue.copy(self.slot, self.home)

    def back(self) -> None:
        """Enqueue a copy from it."""
        self.queue.store(self.home, self.slot.tensor)


def check(bench: Bench) -> None:
    """Of one GPU, and of the next one beside it where there is one."""
    with opened(bench) as device:
        for block in bench.sizes.blocks:
            _copies(bench, device, block)
        _pinning(bench, device)
        _uploads(bench, device)
        other = _other(bench)
        if other is not None:
            beside = device if other == "cpu" else None
            second = open_device(RuntimeConfig(device=other), beside)
            try:
                _two(bench, device, second)
            finally:
                second.close()


def _other(bench: Bench) -> str | None:
    """Another GPU's name; the processor stands for its own second."""
    if not bench.on_gpu:
        return "cpu"
    count = torch.cuda.device_count()
    return None if count < 2 else f"cuda:{(int(bench.device.partition(':')[2] or 0) + 1) % count}"


@contextmanager
def lanes(devices: Sequence[Device], block: int) -> Iterator[list[Lane]]:
    """Lanes with pinned memory, one for each that is named."""
    made = []
    for device in devices:
        host = allocate_host(block)
        host.tensor.zero_()
        device.pin(host)
        slot, home = device.allocate(block, "slots"), MemoryHome(host)
        made.append(Lane(device, device.new_copy_stream(), slot, home))
    try:
        yield made
    finally:
        for lane in made:
            lane.queue.close()


def seconds_of(work: Sequence[Callable[[], object]], queues: Sequence[Stream]) -> float:
    """Until all that is enqueued at once is done: the median, the first time left out."""

    def all_at_once() -> None:
        for one in work:
            one()

    def wait() -> None:
        for queue in queues:
            wait_for(queue)

    return median_of([timed(all_at_once, wait) for _ in range(SAMPLES)][1:])[1]


def _copies(bench: Bench, device: Device, block: int) -> None:
    """To the device, from it, and both at once, each by its own copy engine."""
    with lanes([device, device], block) as (there, back):
        to_s = seconds_of([there.to], [there.queue])
        from_s = seconds_of([back.back], [back.queue])
        both_s = seconds_of([there.to, back.back], [there.queue, back.queue])
    bench.fact(
        f"copies of {block} bytes",
        to_bytes_per_s=block / to_s,
        from_bytes_per_s=block / from_s,
        each_of_both_bytes_per_s=block / both_s,
    )


def _pinning(bench: Bench, device: Device) -> None:
    """Touched memory of large pages, and of small ones."""
    block, rates = max(bench.sizes.blocks), {}
    for name in ("large_pages", "small_pages"):
        host = allocate_host(block)
        memory = host.view.obj
        if name == "small_pages" and isinstance(memory, mmap.mmap) and block >= 2 * MIB:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        host.tensor.zero_()
        began = time.perf_counter()
        device.pin(host)
        rates[f"{name}_bytes_per_s"] = block / (time.perf_counter() - began)
    bench.fact(f"pinning {block} bytes", **rates)


def _uploads(bench: Bench, device: Device) -> None:
    """What 4 KiB wait behind a layer, cut into pieces as layers are, and whole."""
    large = bench.sizes.large
    with lanes([device], large) as (lane,):
        work = partial(device.upload, range(512)), partial(wait_for, device.compute)
        waits = {}
        for name, piece in (("idle", 0), ("behind_a_layer", streams.COPY_BYTES), ("whole", large)):
            taken = []
            for _ in range(SAMPLES):
                with patch.object(streams, "COPY_BYTES", piece):
                    if piece:
                        lane.to()
                    taken.append(timed(*work))
                    wait_for(lane.queue)
            waits[f"{name}_s"] = median_of(taken[1:])[1]
    bench.fact("upload of 4 KiB", **waits)


def _two(bench: Bench, first: Device, second: Device) -> None:
    """Two links alone and together, and what a hidden state takes from one GPU to the other."""
    block = max(bench.sizes.blocks)
    with lanes([first, second], block) as both:
        alone = [seconds_of([lane.to], [lane.queue]) for lane in both]
        both_s = seconds_of([lane.to for lane in both], [lane.queue for lane in both])
    bench.fact(
        "two links",
        first_bytes_per_s=block / alone[0],
        second_bytes_per_s=block / alone[1],
        together_bytes_per_s=2 * block / both_s,
        times_one=2 * max(alone) / both_s,
    )
    devices = Devices([first, second])
    for rows in (1, 64):
        state = torch.zeros(rows, 8192, dtype=torch.bfloat16, device=first.torch_device)

        def there_and_back(state: torch.Tensor = state) -> None:
            devices.hop(devices.hop(state, 0, 1), 1, 0)

        hop_s = seconds_of([there_and_back], [first.compute, second.compute]) / 2
        bench.fact(f"a hop of {state.nbytes} bytes", seconds=hop_s)
