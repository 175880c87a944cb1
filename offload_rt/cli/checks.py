"""The checks of `doctor`: each judges facts it is given (`machine.py` finds them)."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from offload_rt.cli.machine import Machine
from offload_rt.costs.sizes import BUILD_FOR_GPUS_BYTES
from offload_rt.device.compiled import EXTRA
from offload_rt.units import format_rate, format_size

_PYTHON, _TORCH, _TRANSFORMERS = (3, 11), (2, 6), (5, 3)  # as in pyproject.toml
_SMALL_FREE_BYTES = 2 * 2**30
_SLOW_READ_BYTES_PER_S = 0.2e9  # a disk with platters; 1 GB of layers would take 5 s per token
_MOST_CUT = 0.05  # of experts, that lie in more extents than most: each costs reads more
_SWAPPED_SHARE = 0.05  # of memory; less has lain there since the machine was started
_SHOWN_PROCESSES = 3
_NETWORK_KINDS = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "drvfs", "ceph", "glusterfs")
_INSTALL = "run `bash tools/setup.sh`"
_MORE_PINNED = {True: "; WSL's driver sets this limit: Linux itself has none", False: ""}


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        what: what was looked at.
        detail: what was found.
        fix: what to do; empty when nothing needs to be done.
    """

    level: Level
    what: str
    detail: str
    fix: str = ""


def diagnose(machine: Machine) -> list[Finding]:
    """All findings about a machine."""
    return [check(machine) for check in _CHECKS]


def check_python(machine: Machine) -> Finding:
    """Whether Python is new enough."""
    if _release(machine.python) < _PYTHON:
        return Finding(Level.FAIL, "Python", machine.python, "use Python 3.11 or newer")
    return Finding(Level.OK, "Python", machine.python)


def check_torch(machine: Machine) -> Finding:
    """Whether torch can be imported and is new enough."""
    if machine.torch is None:
        return Finding(Level.FAIL, "torch", f"not usable: {machine.torch_error}", _INSTALL)
    build = f"CUDA {machine.torch.cuda_build}" if machine.torch.cuda_build else "CPU only"
    detail = f"{machine.torch.version} ({build})"
    if _release(machine.torch.version) < _TORCH:
        return Finding(Level.FAIL, "torch", detail, f"2.6 or newer is needed: {_INSTALL}")
    return Finding(Level.OK, "torch", detail)


def check_transformers(machine: Machine) -> Finding:
    """Whether transformers is there and new enough."""
    if machine.transformers is None:
        return Finding(Level.FAIL, "transformers", "not installed", _INSTALL)
    if _release(machine.transformers) < _TRANSFORMERS:
        fix = f"5.3 or newer is needed: {_INSTALL}"
        return Finding(Level.FAIL, "transformers", machine.transformers, fix)
    return Finding(Level.OK, "transformers", machine.transformers)


def check_cpu(machine: Machine) -> Finding:
    """Whether the processor computes bf16 itself."""
    cpu = machine.cpu
    detail = f"{cpu.name}, {cpu.all_cores} cores"
    if cpu.bf16_flag:
        return Finding(Level.OK, "processor", f"{detail}, bf16 by {cpu.bf16_flag}")
    fix = "bf16 models compute slowly on the CPU here: try --dtype float32 if memory allows"
    return Finding(Level.WARN, "processor", f"{detail}, no bf16 instructions", fix)


def check_threads(machine: Machine) -> Finding:
    """How many threads compute, and what narrows that."""
    cpu = machine.cpu
    limits = []
    if cpu.cores < cpu.all_cores:
        limits.append(f"affinity to {cpu.cores} of {cpu.all_cores} cores")
    if narrow := cpu.quota is not None and cpu.quota < cpu.cores:
        limits.append(f"CPU quota of {cpu.quota:g} cores (cgroup)")
    detail = ", ".join([f"{cpu.threads} for computing", *limits])
    if cpu.quota is not None and cpu.threads > (most := max(1, int(cpu.quota))):
        fix = f"threads above the quota wait for each other: unset OMP_NUM_THREADS, or set {most}"
        return Finding(Level.WARN, "threads", detail, fix)
    if narrow:
        fix = "raise it where the container is started, `docker run --cpus`, if it may have more"
        return Finding(Level.WARN, "threads", detail, fix)
    return Finding(Level.OK, "threads", detail)


def check_compiler(machine: Machine) -> Finding:
    """Whether quantised weights are dequantised by kernels compiled for this processor."""
    compiler, what = machine.compiler, "kernels"
    if not compiler.name:
        detail = f"torch's, which dequantise slower on the CPU: numba is {compiler.problem}"
        if "installed" in compiler.problem:
            detail += f"; `pip install {EXTRA}` brings it"
        return Finding(Level.OK, what, detail)
    if compiler.folder is None:
        detail = f"compiled by {compiler.name} in each process: no folder to keep them in"
        fix = "set OFFLOAD_RT_CACHE to a folder that you may write to and others may not"
        return Finding(Level.WARN, what, detail, fix)
    return Finding(Level.OK, what, f"compiled by {compiler.name}, kept in {compiler.folder}")


def check_memory(machine: Machine) -> Finding:
    """Whether there is memory to work with."""
    memory = machine.memory
    free, total = format_size(memory.free_bytes), format_size(memory.ram_bytes)
    detail = f"{free} free of {total}"
    if memory.free_bytes < _SMALL_FREE_BYTES:
        fix = "close other programs; --device-memory bounds the bytes of a run"
        return Finding(Level.WARN, "memory", detail, fix)
    return Finding(Level.OK, "memory", detail)


def check_cgroup(machine: Machine) -> Finding:
    """Whether a cgroup limits memory below what the machine has."""
    group, total = machine.memory.cgroup, machine.memory.ram_bytes
    if group is None or group.limit_bytes >= total:
        return Finding(Level.OK, "cgroup", "no memory limit below the machine's")
    limit, used = format_size(group.limit_bytes), format_size(group.used_bytes)
    detail = f"memory limit {limit} of {format_size(total)}, {used} of it in use"
    fix = "runs keep to it; raise it where the process is started: `docker run --memory`, MemoryMax"
    return Finding(Level.WARN, "cgroup", detail, fix)


def check_swap(machine: Machine) -> Finding:
    """Whether other programs have been pushed out of memory."""
    total, used = machine.memory.swap_bytes, machine.memory.swap_used_bytes
    if not total:
        return Finding(Level.OK, "swap", "none")
    detail = f"{format_size(used)} in use of {format_size(total)}"
    if used < _SWAPPED_SHARE * machine.memory.ram_bytes:
        return Finding(Level.OK, "swap", detail)
    fix = "programs wait for the disk that layers stream from: end some, or lower --device-memory"
    return Finding(Level.WARN, "swap", detail, fix)


def check_gpu(machine: Machine) -> Finding:
    """Whether there is a GPU and torch can use it."""
    driver, torch = machine.driver, machine.torch
    if driver is None or not driver.gpus:
        detail = "no NVIDIA GPU: runs use the CPU"
        if torch is not None and torch.cuda_build is not None:
            less = format_size(BUILD_FOR_GPUS_BYTES)
            index = "https://download.pytorch.org/whl/cpu"
            detail += f"; torch for CPUs takes {less} less: `pip install torch --index-url {index}`"
        return Finding(Level.OK, "GPU", detail)
    gpus = ", ".join(
        f"{gpu.name} ({format_size(gpu.free_bytes)} free of {format_size(gpu.total_bytes)})"
        for gpu in driver.gpus
    )
    detail = f"{gpus}, driver {driver.version}"
    if len(driver.gpus) > 1 and len({gpu.name for gpu in driver.gpus}) == 1:
        names = ",".join(f"cuda:{index}" for index in range(len(driver.gpus)))
        detail += f"; --device {names} streams over all their links"
    elif len(driver.gpus) > 1:
        detail += "; a model is spread over equal cards only"
    if torch is None or torch.sees_gpu:
        return Finding(Level.OK, "GPU", detail)
    if torch.cuda_build is None:
        fix = "install a CUDA build: `pip install torch --index-url https://download.pytorch.org/whl/cu128`"
        return Finding(Level.FAIL, "GPU", f"{detail}, but torch was built for CPU only", fix)
    newest = ".".join(map(str, driver.cuda_version))
    if _release(torch.cuda_build) > driver.cuda_version:
        fix = f"update the NVIDIA driver, or install torch for CUDA {newest} or older"
        why = f"the driver runs CUDA up to {newest}, torch needs {torch.cuda_build}"
        return Finding(Level.FAIL, "GPU", f"{detail}, but {why}", fix)
    fix = "check CUDA_VISIBLE_DEVICES and the permissions of /dev/nvidia*"
    return Finding(Level.FAIL, "GPU", f"{detail}, but torch cannot use it", fix)


def check_gpu_processes(machine: Machine) -> Finding:
    """Whether others compute on the GPUs."""
    gpus = () if machine.driver is None else machine.driver.gpus
    found = [
        f"process {one.pid} on GPU {index} ({format_size(one.used_bytes)})"
        for index, gpu in enumerate(gpus)
        for one in gpu.processes
    ]
    if not found:
        return Finding(Level.OK, "GPU use", "nobody else computes there" if gpus else "no GPU")
    shown = ", ".join(found[:_SHOWN_PROCESSES])
    more = f" and {len(found) - _SHOWN_PROCESSES} more" if len(found) > _SHOWN_PROCESSES else ""
    fix = "its memory and time are taken: end it, choose --device cuda:N, or set --device-memory"
    return Finding(Level.WARN, "GPU use", shown + more, fix)


def check_profile(machine: Machine) -> Finding:
    """Whether plans rest on what was measured here."""
    profile, measure = machine.profile, "run `offload-run profile`, one to two minutes"
    if not profile.found:
        return Finding(Level.WARN, "profile", "none: plans use another machine's speeds", measure)
    if profile.problem:
        return Finding(Level.WARN, "profile", profile.problem, measure)
    if wrong := [*profile.changes, *profile.notes]:
        return Finding(Level.WARN, "profile", "; ".join(wrong), measure)
    return Finding(Level.OK, "profile", f"{profile.name}, measured here")


def check_pinning(machine: Machine) -> Finding:
    """Whether layers can be pinned: as it was measured, and by the limit on locked memory."""
    most, limit = machine.profile.pinned_bytes, machine.memory.locked_bytes
    if most is not None:
        detail = f"{format_size(most)} at most when it was measured: the rest of streamed layers"
        fix = "use less host memory (--home disk, a quantised model)" + _MORE_PINNED[machine.wsl]
        return Finding(Level.WARN, "pinning", f"{detail} is copied once more on its way", fix)
    if limit is None:
        return Finding(Level.OK, "pinning", "no limit on locked memory")
    detail = f"up to {format_size(limit)} of locked memory (ulimit -l)"
    if limit >= machine.memory.ram_bytes // 2 or machine.driver is None:
        return Finding(Level.OK, "pinning", detail)
    fix = "raise memlock in /etc/security/limits.conf, or `docker run --ulimit memlock=-1`"
    return Finding(Level.WARN, "pinning", f"{detail}: layers may not be pinned", fix)


def check_wsl(machine: Machine) -> Finding:
    """Whether this is Windows' Linux, where memory and pinning are scarce."""
    if not machine.wsl:
        return Finding(Level.OK, "system", "Linux")
    fix = "set memory= in .wslconfig, and keep models inside WSL, not under /mnt/c"
    detail = "WSL: half of the memory by default, and less of it can be pinned"
    return Finding(Level.WARN, "system", detail, fix)


def check_disk(machine: Machine) -> Finding:
    """Whether layers can be read quickly from where the model is."""
    disk = machine.disk
    parts = [f"{disk.folder} on {disk.kind}", f"{format_size(disk.free_bytes)} free"]
    if disk.direct_reads is not None:
        parts.append("direct reads" if disk.direct_reads else "no direct reads")
    if disk.read_bytes_per_s is not None:
        parts.append(f"{format_rate(disk.read_bytes_per_s)}, one read at a time")
    if (experts := disk.experts) is not None:
        reads = f"{experts.extents} reads" if experts.extents > 1 else "one read"
        parts.append(
            f"experts, {format_size(experts.nbytes)} in {reads}, {experts.at_once} at once: "
            f"{format_rate(experts.bytes_per_s)}"
        )
        if experts.cut > _MOST_CUT:
            parts.append(f"{experts.cut:.0%} of the experts lie in more reads than most")
    detail = ", ".join(parts)
    if disk.kind.startswith(_NETWORK_KINDS):
        fix = "copy the model to a local disk: streaming runs at the speed of the network"
    elif disk.kind in ("tmpfs", "ramfs"):
        fix = "copy the model to a disk: here it takes memory that the run could use"
    elif disk.read_bytes_per_s is not None and disk.read_bytes_per_s < _SLOW_READ_BYTES_PER_S:
        fix = "copy the model to an NVMe disk, or use --home host if it fits memory"
    elif disk.direct_reads is False:
        fix = "reads go through the page cache here: keep the model on ext4 or xfs"
    else:
        return Finding(Level.OK, "disk", detail)
    return Finding(Level.WARN, "disk", detail, fix)


def check_demo(machine: Machine) -> Finding:
    """Whether the demo model is there."""
    if machine.demo:
        return Finding(Level.OK, "demo model", "present: offload-run generate demo")
    return Finding(Level.WARN, "demo model", "not downloaded", "run `bash tools/demo.sh`")


def _release(version: str) -> tuple[int, int]:
    """Major and minor number of a version such as `2.14.1+cpu`."""
    numbers = [int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2]]
    return numbers[0], numbers[1] if len(numbers) > 1 else 0


_CHECKS: tuple[Callable[[Machine], Finding], ...] = (
    check_python,
    check_torch,
    check_transformers,
    check_cpu,
    check_threads,
    check_compiler,
    check_memory,
    check_cgroup,
    check_swap,
    check_gpu,
    check_gpu_processes,
    check_pinning,
    check_wsl,
    check_disk,
    check_profile,
    check_demo,
)
