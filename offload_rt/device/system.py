"""What the operating system says of this process's memory and cores. No torch here."""

import ctypes
import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from offload_rt.device.cgroup import MemoryGroup, cpu_quota, memory_groups, unescaped
from offload_rt.errors import ConfigError

_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16")
# Of GNU's OpenMP (in turns of its loop; 300,000 by default) and of LLVM's. With 1,000 a pass of a
# small model took 37 ms on an idle machine, with 5,000 and more 30 ms; beside two busy programs 60
# with 1,000, 64 with 10,000, 73 with 30,000, 78 to 109 by default (2 cores, medians of 30 passes).
_SPIN_LIMITS = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "0"}
# Kernels that oneDNN and its caller in torch keep. They make one for each shape of matrix and each
# number of rows, of some 0.5 MB, and keep 1,024 by default: checking 2 to 33 tokens of a model with
# six shapes took 114 MB, with 32 kept 14. A pass has five to ten shapes; a kernel takes 0.4 ms.
_KERNEL_LIMITS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
# Of what oneDNN takes: the first that is not empty counts, and a word it does not know is no limit.
_LIMITS = "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"
_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA = 158, 0x1023, 18  # of x86-64
_MATRIX_FLAGS = {"bfloat16": "amx_bf16", "float16": "amx_fp16"}
_WITHOUT_MATRICES = (  # oneDNN's "CPU Dispatcher Control"; tried with torch 2.14.1
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"),
    *("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", "AVX10_2", "AVX10_2_512"),
)
_LARGE_PAGE_BYTES = 2**21
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# asm-generic/mman-common.h of Linux, the last since 6.1.
_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_COLLAPSE = 4, 14, 25
_MAP_FIXED = 0x10  # likewise
_FOR_GPUS = re.compile(r"/lib(cu|nv|nccl)[^/]*\.so[^/]*$")
_TABLE_BYTES = 16 * 2**20  # smaller ones are not worth a file
_TABLES, _COMPARED_BYTES = ".tables", 2**16
_IN_MEMORY = ("tmpfs", "ramfs")
_AREA = re.compile(  # of /proc/self/smaps, where a file is mapped
    r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<rights>\S{4}) \S+ \S+ \d+ +(?P<path>/.*)\n"
    r"(?P<sizes>(?:\w+: .*\n)+)",
    re.MULTILINE,
)
_AREA_SIZE = re.compile(r"^(Rss|Anonymous): +(\d+) kB$", re.MULTILINE)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)  # making one makes classes, 20 us each time


def free_memory_bytes() -> int:
    """Memory this process may still take: what the system has free, or the rest of its cgroup."""
    import psutil  # 30 ms, which help does not need

    rests = [group.rest_bytes for group in memory_groups()]
    return min([psutil.virtual_memory().available, *rests])


def narrowest_memory() -> MemoryGroup | None:
    """The cgroup around this process that leaves it least memory, or None without a limit."""
    return min(memory_groups(), key=lambda group: group.rest_bytes, default=None)


def peak_rss_bytes() -> int:
    """Peak resident bytes of this process since its start or the last restart of the count."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    return int(psutil.Process().memory_info().rss)


def rss_bytes() -> tuple[int, int]:
    """Resident bytes of this process, and those of them that are of files; in 14 us."""
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return resident * _PAGE_BYTES, shared * _PAGE_BYTES


def restart_peak() -> None:
    """Have `peak_rss_bytes` count from now on; where that is not allowed it goes on counting."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def cores() -> int:
    """Processor cores this process may run on: its affinity, which a cpuset narrows too."""
    return len(os.sched_getaffinity(0))


def compute_threads() -> int:
    """Threads that compute: OMP_NUM_THREADS, else one for each core within the cgroup's quota.

    A quota of 1.5 cores gives 1: two threads would wait for each other while the group is held up.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return machine_threads()


def machine_threads() -> int:
    """The same, whatever OMP_NUM_THREADS says."""
    return max(1, min(cores(), int(cpu_quota() or cores())))


_settled: set[str] = set()  # variables that are ours, not the user's


def settle_math() -> None:
    """Have waiting threads soon sleep and few kernels be kept; call it before torch is imported.

    Beside other work a thread that spins holds the core its partner needs, and kernels kept for
    every number of rows outgrow any plan. Whoever sets one of these keeps it.
    """
    spins = {} if {"OMP_WAIT_POLICY", *_SPIN_LIMITS} & set(os.environ) else _SPIN_LIMITS
    ours = {n: v for n, v in (spins | _KERNEL_LIMITS).items() if n not in os.environ}
    os.environ.update(ours)
    _settled.update(ours)


def wait_asleep() -> None:
    """Have waiting threads sleep at once, where no user says how; call it as `settle_math`, after.

    A thread's processor time is then that of its own work, and of being woken. What is computed
    takes longer: on an idle machine of 2 cores layers of 7 and 28 MiB 1.3 to 1.5 times as long.
    """
    os.environ.update({name: "0" for name in _SPIN_LIMITS if name in _settled})


def users_environment() -> dict[str, str]:
    """The environment as the user gave it, for programs of others: without what is settled here."""
    return {name: value for name, value in os.environ.items() if name not in _settled}


def thread_times() -> dict[str, tuple[int, int]]:
    """Per thread of this process: ns that it ran, and ns that it could have but had no core.

    Empty where the kernel does not count them.
    """
    found = {}
    with suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError, ValueError):  # it has just ended
                with open(f"/proc/self/task/{thread}/schedstat") as file:
                    ran, waited, _ = file.read().split()
                found[thread] = int(ran), int(waited)
    return found


@cache
def processor() -> tuple[str, str]:
    """The processor's name, and its bf16 instruction or nothing."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    flags = processor_flags()
    return name, next((flag for flag in _BF16_FLAGS if flag in flags), "")


@cache  # asked for every matrix that is rounded
def processor_flags() -> frozenset[str]:
    """What the processor can do, by Linux's names; empty where that is not told."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


@cache
def cache_bytes() -> int:
    """Of the largest cache that a core reads through; 0 where that is not told."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = (re.fullmatch(r"(\d+)K", "".join(_lines(str(size)))) for size in sizes)
    return max((int(size[1]) * 1024 for size in found if size), default=0)


def takes_matrix_registers(dtype: str) -> bool:
    """Whether oneDNN multiplies numbers of a format (torch's name) with matrix registers here."""
    limit = next(filter(None, map(os.environ.get, _LIMITS)), "")
    there = _MATRIX_FLAGS.get(dtype) in processor_flags()
    return there and limit.upper() not in _WITHOUT_MATRICES


@cache
def may_use_matrix_registers() -> bool:
    """Ask Linux for them, which a process has to before it uses them (`arch_prctl(2)`)."""
    try:
        call = ctypes.CDLL(None, use_errno=True).syscall
        return bool(call(_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA) == 0)
    except (OSError, AttributeError):
        return False


def _cpuinfo(wanted: str) -> str:
    """The first value of that name in /proc/cpuinfo."""
    pairs = (line.partition(":") for line in _lines("/proc/cpuinfo"))
    return next((value.strip() for key, _, value in pairs if key.strip() == wanted), "")


def file_system(folder: Path) -> str:
    """Type of the file system a resolved folder is on, by the longest mount point above it."""
    mounts = [line.split() for line in _lines("/proc/self/mounts")]
    points = [unescaped(mount[1]) for mount in mounts]
    above = [(len(point), i) for i, point in enumerate(points) if folder.is_relative_to(point)]
    return mounts[max(above)[1]][2] if above else "unknown"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def give_back_large_blocks(border_bytes: int = 16 * 2**20) -> None:
    """Have malloc return freed blocks of that size and more to the system at once.

    glibc raises that border to the largest block freed so far, up to 32 MiB, and keeps what lies
    below it. Where weights are reordered one after the other, that left 90 MiB of holes beside 3 GB
    of a 1.5B model. Blocks above it are cleared by the system each time they are taken
    (docs/RESULTS.md, "Freed blocks and long prompts"). Does nothing where the C library has no such
    border.
    """
    try:
        mallopt = _libc().mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, border_bytes)
    mallopt(_M_TRIM_THRESHOLD, 32 * 2**20)


def give_back_holes() -> None:
    """Return freed memory between what is still used to the system.

    Rounding the weights of a 0.5B model left 250 to 500 MB of it. Does nothing where the C library
    cannot.
    """
    with suppress(OSError, AttributeError):
        _libc().malloc_trim(0)


LIBRARIES = re.compile(r"\.so(\.[\d.]+)?$")  # for `give_back_code`
_read: list[int] = []  # bytes of files that were there when code was given back


def most_read(since: int) -> tuple[int, int]:
    """The most bytes of files there were when `give_back_code` was called.

    Args:
        since: of calls after so many.

    Returns:
        those bytes, 0 where there was no such call; and the number of calls so far.
    """
    return max(_read[since:], default=0), len(_read)


_seen_mapped: set[str] = set()  # lines of /proc/self/maps that `give_back_code` has dealt with
_seen_loaded: dict[re.Pattern[str], int] = {}  # `_loads` when it did, by what it was asked for


class _Loads(ctypes.Structure):
    """What `dl_iterate_phdr(3)` tells of a library: the process's loads are counted in it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("address", "path", "headers")),
        ("header_count", ctypes.c_uint16),
        ("loads", ctypes.c_ulonglong),
    )


def _loads() -> int:
    """How often a library was loaded so far; -1 where the C library does not count."""
    counted = [-1]

    def first(info: Any, *_: object) -> int:  # noqa: ANN401 - a pointer of ctypes
        counted[0] = info.contents.loads
        return 1  # ask for no other library

    told = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Loads), ctypes.c_size_t, ctypes.c_void_p)
    with suppress(OSError, AttributeError):
        _libc().dl_iterate_phdr(told(first), None)
    return counted[0]


def give_back_code(libraries: re.Pattern[str], *, again: bool = False) -> int:
    """Return memory that holds unchanged parts of mapped files; what is used again is read again.

    Importing torch maps its libraries for GPUs and touches 140 MB of them, triton's 70 more. Where
    nothing was mapped since the last call nothing is done: to ask for sizes takes 26 ms, half of
    what opening a small model does, and what was read again since is in use.

    Args:
        libraries: found in the paths of such files.
        again: what was read since the last call is not in use any more.

    Returns:
        the bytes that were given back; 0 where the system does not tell what is mapped.
    """
    loads = _loads()
    if loads == _seen_loaded.get(libraries) and loads >= 0 and not again:
        return 0
    _seen_loaded[libraries] = loads
    mapped = {line for line in _lines("/proc/self/maps") if libraries.search(line)}
    if mapped <= _seen_mapped and not again:
        return 0
    _seen_mapped.update(mapped)
    there_bytes = rss_bytes()[1]
    _read.append(there_bytes)
    with suppress(OSError, AttributeError):
        madvise = _libc().madvise
        for start, nbytes in _unchanged(libraries, frozenset(mapped)):
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), _MADV_DONTNEED)
    return max(0, there_bytes - rss_bytes()[1])


@lru_cache(maxsize=8)
def _unchanged(libraries: re.Pattern[str], mapped: frozenset[str]) -> list[tuple[int, int]]:
    """Where mapped files lie as they are, and how long: what nobody may write to stays so.

    Args:
        libraries: found in the paths of such files.
        mapped: their lines of /proc/self/maps, of which this is.
    """
    return [
        (area.start, area.nbytes)
        for area in _mapped_areas()
        # What was changed since it was read (by relocation) would be lost.
        if "w" not in area.rights and not area.changed_bytes and libraries.search(area.path)
    ]


def put_tables_aside(folder: Path) -> int:
    """Have what libraries for GPUs made of memory when they were loaded lie in a file instead.

    cuBLASLt fills 81 MiB of tables, of which nothing is asked where no GPU is. In a file they are
    the same bytes, also to whoever does ask, and memory that the system can take back. All but 0.7
    MiB of addresses are the same in every process, so the file is kept. Nobody may be writing there
    meanwhile, so call it before a GPU is used.

    Args:
        folder: where the file is; made if it is not there.

    Returns:
        the bytes that were put aside; 0 where they are already, or where that cannot be done.
    """
    moved, owner, end = 0, "", 0
    for line in _lines("/proc/self/maps"):
        area, rights, _, _, inode, *path = line.split(maxsplit=5)
        start, stop = (int(number, 16) for number in area.split("-"))
        behind = not path and inode == "0" and start == end and _FOR_GPUS.search(owner)
        if behind and rights == "rw-p" and stop - start >= _TABLE_BYTES:
            with suppress(OSError, ConfigError):
                _put_into_file(start, stop - start, folder / _tables_name(Path(owner)))
                moved += stop - start
        owner, end = path[0] if path else owner, stop
    return moved


def _tables_name(library: Path) -> str:
    """Of the file for a library's tables: another for each build of it."""
    import hashlib

    stat = library.stat()
    whose = f"{library.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return f"{library.name}-{hashlib.sha256(whose.encode()).hexdigest()[:16]}{_TABLES}"


def _put_into_file(start: int, nbytes: int, path: Path) -> None:
    """Replace private memory by a file that has its bytes, mapped so that writes stay private.

    Pages that are others in the file stay memory. A file that is not there, or is of another size,
    is written, and files of other libraries are removed.

    Raises:
        OSError: there is no such file, as where files are memory, or it has other bytes; nothing
            was changed.
        ConfigError: it cannot be written; likewise.
    """
    import mmap

    from offload_rt.writing import replacing

    path.parent.mkdir(parents=True, exist_ok=True)
    if file_system(path.parent.resolve()) in _IN_MEMORY:
        raise OSError(f"{path} is in memory")
    if not path.is_file() or path.stat().st_size != nbytes:
        for old in path.parent.glob(f"*{_TABLES}"):
            old.unlink(missing_ok=True)
        with replacing(path, lasting=False) as made, made.open("wb") as written:
            written.write(memoryview((ctypes.c_char * nbytes).from_address(start)))
    with path.open("rb") as file:
        with mmap.mmap(file.fileno(), nbytes, mmap.MAP_PRIVATE) as kept:
            others = _other_pages(start, (ctypes.c_char * nbytes).from_buffer(kept))
        if sum(map(len, others.values())) > nbytes // 2:
            raise OSError(f"{path} has other bytes")
        map_file = ctypes.CDLL(None, use_errno=True).mmap
        map_file.restype = ctypes.c_void_p
        kinds = (mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED)
        numbers = (ctypes.c_void_p(start), ctypes.c_size_t(nbytes), *kinds, file.fileno())
        if map_file(*numbers, ctypes.c_long(0)) != start:
            raise OSError(ctypes.get_errno(), "a file of tables cannot be mapped")
    for at, page in others.items():
        ctypes.memmove(start + at, page, len(page))


def _other_pages(start: int, kept: "ctypes.Array[ctypes.c_char]") -> dict[int, bytes]:
    """Pages of memory that a file has otherwise, by their place."""
    compare = _libc().memcmp
    compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    there, nbytes = ctypes.addressof(kept), len(kept)
    found = {}
    for block in range(0, nbytes, _COMPARED_BYTES):
        end = min(block + _COMPARED_BYTES, nbytes)
        if compare(start + block, there + block, end - block):
            for at in range(block, end, _PAGE_BYTES):
                size = min(_PAGE_BYTES, end - at)
                if compare(start + at, there + at, size):
                    found[at] = ctypes.string_at(start + at, size)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Area:
    """Part of this process's memory that a file is mapped to."""

    start: int
    nbytes: int
    rights: str
    path: str
    resident_bytes: int
    changed_bytes: int


def _mapped_areas() -> list[_Area]:
    """What files are mapped to; from /proc/self/smaps."""
    found = []
    for text in _AREA.finditer(Path("/proc/self/smaps").read_text(errors="surrogateescape")):
        start, end = (int(text[name], 16) for name in ("start", "end"))
        sizes = dict(_AREA_SIZE.findall(text["sizes"]))
        found.append(
            _Area(
                start=start,
                nbytes=end - start,
                rights=text["rights"],
                path=text["path"],
                resident_bytes=int(sizes["Rss"]) * 1024,
                changed_bytes=int(sizes["Anonymous"]) * 1024,
            )
        )
    return found


def ask_for_large_pages(start: int, nbytes: int) -> None:
    """Have what memory holds lie in pages of 2 MiB, where the system does that.

    Args:
        start: address of memory of this process.
        nbytes: from there on. Only whole large pages count.
    """
    first = -(-start // _LARGE_PAGE_BYTES) * _LARGE_PAGE_BYTES
    room = (start + nbytes) // _LARGE_PAGE_BYTES * _LARGE_PAGE_BYTES - first
    if room <= 0:
        return
    with suppress(OSError, AttributeError):
        madvise = _libc().madvise
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(room), advice)
