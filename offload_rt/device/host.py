"""What the operating system says of this process's memory and cores. No torch here."""

import os

import psutil


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
