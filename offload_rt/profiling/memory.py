"""Bandwidth of host memory."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from offload_rt.device.host_memory import allocate_host
from offload_rt.device.system import compute_threads
from offload_rt.profiling.curves import Place
from offload_rt.profiling.profile import MemorySpeed, MemoryUse
from offload_rt.profiling.timing import Curve, Sample, Tick, rate_of


def thread_counts() -> list[int]:
    """How many threads are measured: one, half of those that compute, all."""
    most = compute_threads()
    return sorted({1, max(1, most // 2), most})


def measure_memory(curve: Curve, tick: Tick) -> tuple[MemorySpeed, ...]:
    """Read and copy more bytes than caches hold, with one thread up to one per core."""
    before = torch.get_num_threads()
    try:
        return tuple(_measure(curve, tick))
    finally:
        torch.set_num_threads(before)


def _measure(curve: Curve, tick: Tick) -> Iterator[MemorySpeed]:
    nbytes = curve.effort.memory_bytes
    source, target = (allocate_host(nbytes).tensor for _ in range(2))
    source.fill_(1)
    target.fill_(1)
    # Of torch's reductions this one waits for memory only, also with one thread.
    runs = {
        MemoryUse.READ: lambda: source.view(torch.int32).max(),
        MemoryUse.COPY: lambda: target.copy_(source),
    }
    for use, run in runs.items():

        def pass_with(threads: int, run: Callable[[], object] = run) -> None:
            torch.set_num_threads(threads)
            run()

        passes: dict[Place, Sample] = {
            (-threads,): curve.timed(partial(pass_with, threads), computes=True)
            for threads in thread_counts()
        }
        for (fewer,), time_s in curve.numbers(curve.take(passes)).items():
            yield MemorySpeed(
                use=use,
                threads=-fewer,
                block_bytes=nbytes,
                bytes_per_s=rate_of(nbytes, time_s),
            )
            tick()
