"""Whether a GPU that is asked for is there, without torch: the driver's libraries are asked."""

import ctypes
import re
from importlib.metadata import PackageNotFoundError, version

from offload_rt.errors import ConfigError, DeviceError

CUDA = re.compile(r"cuda(?::(\d{1,4}))?")


def check_device(name: str) -> None:
    """Refuse a device that is not known or not there; torch may still find more that is wrong.

    Args:
        name: value of --device.

    Raises:
        ConfigError: it is no device's name, or several.
        DeviceError: there is no such GPU, or torch is built without CUDA.
    """
    if name in ("auto", "cpu"):
        return
    index = cuda_index(name)
    reason = _missing(index)
    if reason is not None:
        raise DeviceError(f"--device {name} cannot be used: {reason}")


def cuda_index(name: str) -> int:
    """The number in `cuda` or `cuda:N`.

    Raises:
        ConfigError: it is neither.
    """
    if "," in name:
        raise ConfigError(f"--device {name}: several devices are not supported yet, name one")
    if (match := CUDA.fullmatch(name)) is None:
        raise ConfigError(f"--device {name} is not known: use auto, cpu, cuda or cuda:N")
    return int(match[1] or 0)


def _missing(index: int) -> str | None:
    from offload_rt.device.cuda.nvml import find_driver  # not needed for a CPU, and slow to import

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
