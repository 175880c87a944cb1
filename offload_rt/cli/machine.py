"""Facts about this machine, for `doctor` to judge."""

import importlib.metadata
import mmap
import os
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from offload_rt.device.host import (
    cgroup_limit_bytes,
    cores,
    file_system,
    free_memory_bytes,
    processor,
)
from offload_rt.device.nvml import Driver, find_driver
from offload_rt.model.checkpoint import demo_folder

_READ_BYTES, _READ_LIMIT_S = 256 * 2**20, 2.0
_BLOCK_BYTES = 4 * 2**20


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
class DiskFacts:
    """The file system of a folder.

    Attributes:
        kind: `ext4`, `nfs4`, ...
        direct_reads: whether O_DIRECT works; None when there was no file to try.
        read_bytes_per_s: of the model's largest file, past the page cache if possible.
    """

    folder: Path
    kind: str
    free_bytes: int
    direct_reads: bool | None
    read_bytes_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Everything `doctor` looks at.

    Attributes:
        torch: None when torch cannot be imported, with the reason in `torch_error`.
        bf16_flag: processor instruction that computes bf16, or empty.
        memlock_bytes: memory one may pin; None for no limit.
        driver: None when no NVIDIA driver answers.
    """

    python: str
    torch: TorchFacts | None
    torch_error: str
    transformers: str | None
    cpu: str
    cores: int
    bf16_flag: str
    ram_bytes: int
    free_bytes: int
    cgroup_bytes: int | None
    memlock_bytes: int | None
    driver: Driver | None
    wsl: bool
    disk: DiskFacts
    demo: bool


def inspect_machine(model: Path | None) -> Machine:
    """Look at this machine; with a model folder its disk is read for up to two seconds."""
    torch, torch_error = _torch()
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    cpu, bf16_flag = processor()
    return Machine(
        python=platform.python_version(),
        torch=torch,
        torch_error=torch_error,
        transformers=_version("transformers"),
        cpu=cpu,
        cores=cores(),
        bf16_flag=bf16_flag,
        ram_bytes=psutil.virtual_memory().total,
        free_bytes=free_memory_bytes(),
        cgroup_bytes=cgroup_limit_bytes(),
        memlock_bytes=None if soft == resource.RLIM_INFINITY else soft,
        driver=find_driver(),
        wsl="microsoft" in _read("/proc/version").lower(),
        disk=_disk(model),
        demo=(demo_folder() / "config.json").is_file(),
    )


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
    files = real.glob("*.safetensors") if model else iter(())
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    direct, rate = _read_rate(largest) if largest else (None, None)
    return DiskFacts(
        folder=folder,
        kind=file_system(real),
        free_bytes=psutil.disk_usage(str(real)).free,
        direct_reads=direct,
        read_bytes_per_s=rate,
    )


def _read_rate(path: Path) -> tuple[bool, float | None]:
    """Whether O_DIRECT works on a file, and how fast reading it is, one read at a time."""
    buffer = mmap.mmap(-1, _BLOCK_BYTES)
    for flag in (os.O_DIRECT, 0):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag)
        except OSError:
            continue
        try:
            return bool(flag), _rate(fd, buffer)
        except OSError:
            continue
        finally:
            os.close(fd)
    return False, None


def _rate(fd: int, buffer: mmap.mmap) -> float | None:
    start, done = time.perf_counter(), 0
    while done < _READ_BYTES and time.perf_counter() - start < _READ_LIMIT_S:
        count = os.preadv(fd, [buffer], done)
        done += count
        if count < _BLOCK_BYTES:
            break
    seconds = time.perf_counter() - start
    return done / seconds if done and seconds else None
