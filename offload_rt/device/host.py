"""What the operating system says of this process's memory and cores. No torch here."""

import ctypes
import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def free_memory_bytes() -> int:
    """Memory this process may still take: what the system has free, or its cgroup's rest."""
    return min([psutil.virtual_memory().available, *_cgroup_rests()])


def cgroup_limit_bytes() -> int | None:
    """The memory limit of this process's cgroup, or None when it has none."""
    limits = [limit for limit, _ in _cgroup_memory()]
    return min(limits, default=None)


def peak_rss_bytes() -> int:
    """Peak resident bytes of this process since its start or the last restart of the count."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0))


def processor() -> tuple[str, str]:
    """The processor's name, and its bf16 instruction or nothing."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    flags = processor_flags()
    return name, next((flag for flag in _BF16_FLAGS if flag in flags), "")


@cache  # asked for every matrix that is rounded
def processor_flags() -> frozenset[str]:
    """What the processor can do, by Linux's names; empty where that is not told."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpuinfo(wanted: str) -> str:
    """The first value of that name in /proc/cpuinfo."""
    pairs = (line.partition(":") for line in _lines("/proc/cpuinfo"))
    return next((value.strip() for key, _, value in pairs if key.strip() == wanted), "")


def file_system(folder: Path) -> str:
    """Type of the file system a resolved folder is on, by the longest mount point above it."""
    mounts = [line.split() for line in _lines("/proc/self/mounts")]
    above = [(len(m[1]), i) for i, m in enumerate(mounts) if folder.is_relative_to(m[1])]
    return mounts[max(above)[1]][2] if above else "unknown"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def _cgroup_rests() -> list[int]:
    return [limit - used for limit, used in _cgroup_memory() if limit > used]


def _cgroup_memory() -> list[tuple[int, int]]:
    """Limit and use of each memory cgroup that sets a limit."""
    pairs = (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    )
    found = []
    for limit_path, usage_path in pairs:
        try:
            with open(limit_path) as limit, open(usage_path) as usage:
                found.append((int(limit.read()), int(usage.read())))
        except (OSError, ValueError):
            continue  # this kind of cgroup is not here, or it sets no limit ("max")
    return [pair for pair in found if pair[0] < 2**60]


def give_back_large_blocks() -> None:
    """Have malloc return freed blocks of 16 MiB and more to the system at once.

    glibc raises that border to the largest block freed so far, up to 32 MiB, and keeps what lies
    below it. Where weights are reordered one after the other, that left 90 MiB of holes beside 3 GB
    of a 1.5B model. Does nothing where the C library has no such border.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 16 * 2**20)
    mallopt(_M_TRIM_THRESHOLD, 32 * 2**20)


def give_back_holes() -> None:
    """Return freed memory between what is still used to the system.

    Rounding the weights of a 0.5B model left 250 to 500 MB of it. Does nothing where the C library
    cannot.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
