"""Which GPUs there are, without torch: the driver's libraries are asked."""

import ctypes
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
    if index >= count:
        some = f"{count} GPUs" if count > 1 else "one GPU"
        return f"this machine has {some}: use {'cuda:0 to ' if count > 1 else ''}cuda:{count - 1}"
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
