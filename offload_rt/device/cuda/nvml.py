"""What the NVIDIA driver says of the GPUs, without torch and without touching them."""

import os
from collections.abc import Callable
from dataclasses import dataclass

try:
    import pynvml
except ImportError:  # then torch is asked: `tools/gpu_check.sh` takes the Python that is there
    pynvml = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that computes on a GPU.

    Attributes:
        used_bytes: of the GPU's memory; 0 where the driver does not say.
    """

    pid: int
    used_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as the driver describes it.

    Attributes:
        processes: that compute on it, this one left out.
        link_generation: of PCIe, as it is now: an idle link saves power with a lower one.
        link_width: PCIe lanes in use; 0 (of both) when the driver does not say.
    """

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    link_generation: int = 0
    link_width: int = 0
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """The NVIDIA driver and its GPUs.

    Attributes:
        cuda_version: newest CUDA it can run, such as (12, 8).
    """

    version: str
    cuda_version: tuple[int, int]
    gpus: tuple[Gpu, ...]


def find_driver() -> Driver | None:
    """Ask the driver; None when there is none or it does not answer."""
    if pynvml is None:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        count = pynvml.nvmlDeviceGetCount()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()  # 12080 is 12.8
        return Driver(
            version=_text(pynvml.nvmlSystemGetDriverVersion()),
            cuda_version=(cuda // 1000, cuda % 1000 // 10),
            gpus=tuple(_gpu(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)),
        )
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def own_gpu_bytes() -> int | None:
    """What the driver counts for this process on all GPUs; None where it does not say."""
    if pynvml is None:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        found = [
            int(one.usedGpuMemory)
            for handle in handles
            for one in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            if one.pid == os.getpid() and one.usedGpuMemory
        ]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return sum(found) or None  # in a container a process has another number


def _gpu(handle: object) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        capability=(major, minor),
        link_generation=_link(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        link_width=_link(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        processes=_processes(handle),
    )


def _processes(handle: object) -> tuple[GpuProcess, ...]:
    """Who else computes there; nobody where the driver keeps that to itself."""
    try:
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return ()
    return tuple(
        GpuProcess(pid=int(one.pid), used_bytes=int(one.usedGpuMemory or 0))
        for one in running
        if one.pid != os.getpid()
    )


def _link(ask: Callable[[object], int], handle: object) -> int:
    """A number about the link; 0 where it is not PCIe, or a virtual machine hides it."""
    try:
        return int(ask(handle))
    except pynvml.NVMLError:
        return 0


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
