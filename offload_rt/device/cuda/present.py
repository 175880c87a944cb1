"""Which GPUs there are, without torch: the driver's libraries are asked."""

import ctypes
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


def free_gpus() -> Sequence[int]:
    """Free bytes of each GPU; none where the driver does not answer."""
    from offload_rt.device.cuda.nvml import find_driver  # not needed for a CPU, and slow to import

    driver = find_driver()
    return [] if driver is None else [gpu.free_bytes for gpu in driver.gpus]


def missing_gpu(index: int) -> str | None:
    """Why GPU `index` cannot be used and what to do, or None; torch may still find more wrong."""
    from offload_rt.device.cuda.nvml import find_driver

    try:
        torch = version("torch")
    except PackageNotFoundError:
        return "torch is not installed: see `offload-run doctor`"
    if "+cpu" in torch:
        return (
            f"torch {torch} is built without CUDA: install a CUDA build of torch, or use --device "
            "cpu"
        )
    driver = find_driver()
    count = _cuda_devices() if driver is None else len(driver.gpus)
    if not count:
        return (
            "no NVIDIA GPU answers, or no driver: check that nvidia-smi works, or use --device cpu"
        )
    build = re.search(r"\+cu(\d+)(\d)$", torch)
    # Within a major version an older driver runs what a newer one was meant for.
    too_old = driver is not None and build is not None and driver.cuda_version[0] < int(build[1])
    reason = old_driver(f"{build[1]}.{build[2]}") if too_old and build is not None else None
    return reason or absent_gpu(index, count)


def absent_gpu(index: int, count: int) -> str | None:
    """That there are not so many GPUs, and what to name instead."""
    if index < count:
        return None
    some = f"{count} GPUs" if count > 1 else "one GPU"
    return f"this machine has {some}: use {'cuda:0 to ' if count > 1 else ''}cuda:{count - 1}"


def old_driver(cuda_build: str) -> str | None:
    """That the driver runs no such CUDA, if so, and what to do."""
    from offload_rt.device.cuda.nvml import find_driver

    driver = find_driver()
    built = tuple(map(int, cuda_build.split(".")[:2]))
    if driver is None or driver.cuda_version >= built:
        return None
    newest = ".".join(map(str, driver.cuda_version))
    return (
        f"the NVIDIA driver {driver.version} runs CUDA up to {newest}, torch is built for "
        f"{cuda_build}: update the driver, install torch for CUDA {newest} or older, or use "
        "--device cpu"
    )


def unequal_gpus(indices: Sequence[int]) -> str | None:
    """Why GPUs that are there cannot share a model, or None; where there is no NVML, nobody asks.

    A plan has one speed of a layer's kernels, that of the first.
    """
    from offload_rt.device.cuda.nvml import find_driver

    driver = find_driver()
    if driver is None or max(indices) >= len(driver.gpus):
        return None
    first, name = indices[0], driver.gpus[indices[0]].name
    for index in indices[1:]:
        if (other := driver.gpus[index].name) != name:
            return (
                f"GPU {first} is a {name}, GPU {index} a {other}, and layers are spread over equal "
                "cards only: name one of them"
            )
    return None


def _cuda_devices() -> int:
    """GPUs that CUDA itself counts, where there is no NVML, as on Jetson."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
