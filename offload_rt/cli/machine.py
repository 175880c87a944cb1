"""Facts about this machine, for `doctor` to judge."""

import importlib.metadata
import mmap
import os
import platform
import random
import resource
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from offload_rt.config import RuntimeConfig
from offload_rt.costs.sizes import experts_of
from offload_rt.device import compiled
from offload_rt.device.base import PIECE_BYTES
from offload_rt.device.cgroup import MemoryGroup, cpu_quota
from offload_rt.device.cuda.nvml import Driver, find_driver
from offload_rt.device.kinds import CPU
from offload_rt.device.system import (
    compute_threads,
    cores,
    file_system,
    free_memory_bytes,
    narrowest_memory,
    processor,
)
from offload_rt.errors import OffloadError, ProfileError
from offload_rt.model.checkpoint import demo_folder, open_checkpoint
from offload_rt.model.gguf import ENDING
from offload_rt.model.layout import compute_dtype
from offload_rt.model.packed_files import SUFFIX
from offload_rt.profiling.decoding import times_old_experts, times_unlike
from offload_rt.profiling.identity import compare, old_profile, these_versions, this_machine
from offload_rt.profiling.profile import HardwareProfile
from offload_rt.profiling.store import BUSY, find_profile, list_profiles, load_profile, machine_name
from offload_rt.streaming.direct_io import OpenFile, open_file

_READ_BYTES, _READ_LIMIT_S = 256 * 2**20, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFacts:
    """What the installed torch says; None in its place when it cannot be imported.

    Attributes:
        cuda_build: CUDA version it was built with, or None.
        sees_gpu: whether it can use one.
    """

    version: str
    cuda_build: str | None
    sees_gpu: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertReads:
    """How fast experts of a model come from its files.

    Attributes:
        nbytes: of an expert.
        extents: in which most experts lie, each a read.
        cut: share of the experts that lie in more.
        at_once: reads in flight.
        bytes_per_s: of experts here and there in the files.
    """

    nbytes: int
    extents: int
    cut: float
    at_once: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """The file system of a folder.

    Attributes:
        kind: `ext4`, `nfs4`, ...
        direct_reads: whether O_DIRECT works; None when there was no file to try.
        read_bytes_per_s: of the model's largest file, past the page cache if possible.
        experts: the same of a mixture's experts; None for other models.
    """

    folder: Path
    kind: str
    free_bytes: int
    direct_reads: bool | None
    read_bytes_per_s: float | None
    experts: ExpertReads | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFacts:
    """Who computes.

    Attributes:
        bf16_flag: processor instruction that computes bf16, or empty.
        all_cores: of the machine.
        cores: this process may run on.
        quota: cores its cgroup may keep busy; None for no limit.
        threads: that compute.
    """

    name: str
    bf16_flag: str
    all_cores: int
    cores: int
    quota: float | None
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompilerFacts:
    """What compiles kernels for this processor.

    Attributes:
        name: with its version; empty where nothing does.
        problem: why nothing does.
        folder: where kernels are kept; None where they cannot be.
    """

    name: str
    problem: str = ""
    folder: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    """What memory there is.

    Attributes:
        free_bytes: this process may still take.
        cgroup: the group that leaves least, or None.
        swap_bytes: of swap space, and how much of it is in use.
        locked_bytes: memory one may pin; None for no limit.
    """

    ram_bytes: int
    free_bytes: int
    cgroup: MemoryGroup | None
    swap_bytes: int
    swap_used_bytes: int
    locked_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileFacts:
    """The profile plans rest on.

    Attributes:
        name: it is looked for by.
        found: whether there is one.
        problem: why it cannot be used, or empty.
        changes: what is different now, a sentence each.
        notes: that it carries of other work while it was measured, and what it was made too early
            for.
        pinned_bytes: of host memory that the system pinned at most; None if no limit was met.
    """

    name: str
    found: bool
    problem: str = ""
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    pinned_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Everything `doctor` looks at.

    Attributes:
        torch: None when torch cannot be imported, with the reason in `torch_error`.
        driver: None when no NVIDIA driver answers.
    """

    python: str
    torch: TorchFacts | None
    torch_error: str
    transformers: str | None
    cpu: CpuFacts
    compiler: CompilerFacts
    memory: MemoryFacts
    driver: Driver | None
    profile: ProfileFacts
    wsl: bool
    disk: DiskFacts
    demo: bool


def inspect_machine(model: Path | None) -> Machine:
    """Look at this machine; with a model its disk is read for two seconds, a mixture's for four."""
    torch, torch_error = _torch()
    driver = find_driver()
    return Machine(
        python=platform.python_version(),
        torch=torch,
        torch_error=torch_error,
        transformers=_version("transformers"),
        cpu=_cpu(),
        compiler=_compiler(),
        memory=_memory(),
        driver=driver,
        profile=_profile(driver, model),
        wsl="microsoft" in _read("/proc/version").lower(),
        disk=_disk(model),
        demo=(demo_folder() / "config.json").is_file(),
    )


def _cpu() -> CpuFacts:
    name, bf16_flag = processor()
    return CpuFacts(
        name=name,
        bf16_flag=bf16_flag,
        all_cores=os.cpu_count() or cores(),
        cores=cores(),
        quota=cpu_quota(),
        threads=compute_threads(),
    )


def _compiler() -> CompilerFacts:
    if problem := compiled.problem():
        return CompilerFacts(name="", problem=problem)
    return CompilerFacts(name=compiled.who(), folder=compiled.kept_in())


def _memory() -> MemoryFacts:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    swap = psutil.swap_memory()
    return MemoryFacts(
        ram_bytes=psutil.virtual_memory().total,
        free_bytes=free_memory_bytes(),
        cgroup=narrowest_memory(),
        swap_bytes=swap.total,
        swap_used_bytes=swap.used,
        locked_bytes=None if soft == resource.RLIM_INFINITY else soft,
    )


def _profile(driver: Driver | None, model: Path | None) -> ProfileFacts:
    name = machine_name()
    if name not in list_profiles():
        return ProfileFacts(name=name, found=False)
    try:
        profile = load_profile(find_profile(name))
    except ProfileError as error:
        return ProfileFacts(name=name, found=True, problem=str(error))
    changes = compare(profile, this_machine(driver), these_versions(driver))
    busy = tuple(note for note in profile.notes if note.startswith(BUSY))
    return ProfileFacts(
        name=name,
        found=True,
        changes=tuple(changes),
        notes=(*busy, *_old(profile, model)),
        pinned_bytes=profile.pinning.most_bytes if profile.pinning else None,
    )


def _old(profile: HardwareProfile, model: Path | None) -> list[str]:
    """A sentence where the profile was made too early: for any model in bf16, or for this one."""
    layers = times_unlike(profile, exact=True)
    if layers or (times_old_experts(profile) and model is not None and _has_experts(model)):
        return [old_profile(profile.name, layers=layers)]
    return []


def _has_experts(model: Path) -> bool:
    """Whether a model has plain experts and computes in bf16."""
    try:
        checkpoint = open_checkpoint(model)
        dtype = compute_dtype(checkpoint, "auto")
    except OffloadError:  # runs say what is wrong with it
        return False
    plain = (name for name in checkpoint.tensors if name not in checkpoint.stored)
    return dtype == "bfloat16" and any(".experts." in name for name in plain)


def _torch() -> tuple[TorchFacts | None, str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return None, " ".join(str(error).split())
    facts = TorchFacts(
        version=torch.__version__,
        cuda_build=torch.version.cuda,
        sees_gpu=torch.accelerator.is_available(),
    )
    return facts, ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _disk(model: Path | None) -> DiskFacts:
    folder = model or demo_folder()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    real = folder.resolve()
    endings = (".safetensors", SUFFIX, ENDING) if model else ()
    files = [path for ending in endings for path in real.glob(f"*{ending}")]
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    if largest is not None and largest.suffix == ENDING:  # a link: the file is what is read
        folder = real = largest.resolve().parent
    direct, rate = _read_rate(largest) if largest else (None, None)
    return DiskFacts(
        folder=folder,
        kind=file_system(real),
        free_bytes=psutil.disk_usage(str(real)).free,
        direct_reads=direct,
        read_bytes_per_s=rate,
        experts=None if rate is None else _expert_reads(real if model is None else model),
    )


def _read_rate(path: Path) -> tuple[bool, float | None]:
    """Whether O_DIRECT works on a file, and how fast reading it is, one read at a time."""
    buffer = mmap.mmap(-1, PIECE_BYTES)
    try:
        file = open_file(path, os.O_RDONLY)
    except OSError:
        return False, None
    try:
        return file.direct, _rate(file.fd, buffer)
    except OSError:
        return False, None
    finally:
        file.close()


def _rate(fd: int, buffer: mmap.mmap) -> float | None:
    start, done = time.perf_counter(), 0
    while done < _READ_BYTES and time.perf_counter() - start < _READ_LIMIT_S:
        count = os.preadv(fd, [buffer], done)
        done += count
        if count < PIECE_BYTES:
            break
    seconds = time.perf_counter() - start
    return done / seconds if done and seconds else None


def _expert_reads(folder: Path) -> ExpertReads | None:
    """Read experts in any order, as many reads at once as runs have; None where layers are whole.

    Importing torch takes seconds, so only a model that has some is asked which they are.
    """
    try:
        images = experts_of(open_checkpoint(folder), "auto", CPU)
    except OffloadError:  # runs say what is wrong with it
        return None
    if isinstance(images, str):
        return None
    experts = [unit for own in images.units.values() for unit in own]
    extents = Counter(len(unit.runs) for unit in experts)
    usual = extents.most_common(1)[0][0]
    random.Random(0).shuffle(experts)
    readers, count = RuntimeConfig().readers, _READ_BYTES // max(1, experts[0].file_bytes) + 1
    runs = [run for unit in experts[:count] for run in unit.runs]
    largest = max(run.file_bytes for run in runs)
    until, waiting = time.perf_counter() + _READ_LIMIT_S, iter(runs)
    files: dict[Path, OpenFile] = {}

    def read(_: int) -> int:
        buffer, done = mmap.mmap(-1, largest + 2 * mmap.PAGESIZE), 0
        with memoryview(buffer) as view:
            while time.perf_counter() < until and (run := next(waiting, None)) is not None:
                first = run.coded[0] if run.coded else run.file_offset
                start = first // mmap.PAGESIZE * mmap.PAGESIZE
                end = -(-(first + run.file_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
                done += os.preadv(files[run.path].fd, [view[: end - start]], start)
        return done

    try:
        for path in {run.path for run in runs}:
            files[path] = open_file(path, os.O_RDONLY)
        start = time.perf_counter()
        with ThreadPoolExecutor(readers) as pool:
            done = sum(pool.map(read, range(readers)))
        seconds = time.perf_counter() - start
    except OSError:
        return None
    finally:
        for file in files.values():
            file.close()
    return ExpertReads(
        nbytes=experts[0].file_bytes,
        extents=usual,
        cut=sum(number for runs_of, number in extents.items() if runs_of > usual) / len(experts),
        at_once=readers,
        bytes_per_s=done / seconds,
    )
