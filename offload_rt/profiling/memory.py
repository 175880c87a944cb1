"""Bandwidth of host memory."""

from collections.abc import Iterator

import torch

from offload_rt.device.cpu import allocate_host
from offload_rt.device.host import compute_threads
from offload_rt.profiling.effort import Effort
from offload_rt.profiling.profile import MemorySpeed, MemoryUse
from offload_rt.profiling.timing import Tick, measured_rate, take_samples, timed


def thread_counts() -> list[int]:
    """How many threads are measured: one, half of those that compute, all."""
    most = compute_threads()
    return sorted({1, max(1, most // 2), most})


def measure_memory(effort: Effort, tick: Tick) -> tuple[MemorySpeed, ...]:
    """Read and copy more bytes than caches hold, with one thread up to one per core."""
    before = torch.get_num_threads()
    try:
        return tuple(_measure(effort, tick))
    finally:
        torch.set_num_threads(before)


def _measure(effort: Effort, tick: Tick) -> Iterator[MemorySpeed]:
    source, target = (allocate_host(effort.memory_bytes).tensor for _ in range(2))
    source.fill_(1)
    target.fill_(1)
    # Of torch's reductions this one waits for memory only, also with one thread.
    runs = {
        MemoryUse.READ: lambda: source.view(torch.int32).max(),
        MemoryUse.COPY: lambda: target.copy_(source),
    }
    for threads in thread_counts():
        torch.set_num_threads(threads)
        for use, run in runs.items():
            seconds = take_samples(timed(run), effort)
            yield MemorySpeed(
                use=use,
                threads=threads,
                block_bytes=effort.memory_bytes,
                bytes_per_s=measured_rate(effort.memory_bytes, seconds),
            )
            tick()
