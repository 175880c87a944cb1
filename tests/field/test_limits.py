"""Limits that a machine's groups set, wherever they are mounted: memory, cores, and what is used.

The layouts are made below a folder that stands for `/`; one test joins a group of its own.
"""

import ctypes
import gc
import mmap
import os
import re
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import forks
import pytest

from offload_rt.costs.sizes import process_bytes
from offload_rt.device import cpu, system
from offload_rt.device.cgroup import MemoryGroup, cpu_quota, memory_groups

MIB = 2**20


class Root:
    """A folder that stands for `/`, with the groups a kernel would show there."""

    def __init__(self, path):
        self.path, self.mounts = path, []
        (path / "proc/self").mkdir(parents=True)

    def member(self, *lines):
        (self.path / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
        return self

    def mount(self, point, controllers="", shown="/"):
        """Mount a controller's groups, "" is version 2; `shown` is the group at the mount."""
        kind = f"cgroup cgroup rw,{controllers}" if controllers else "cgroup2 cgroup2 rw"
        shown, written = (text.replace(" ", "\\040") for text in (shown, point))
        self.mounts.append(f"40 30 0:35 {shown} {written} rw,nosuid shared:9 - {kind}\n")
        (self.path / "proc/self/mountinfo").write_text("".join(self.mounts))
        return self

    def group(self, place, **files):
        folder = self.path / place.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(f"{text}\n")
        return self


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path)


def least(root):
    return min((group.rest_bytes for group in memory_groups(root.path)), default=None)


def test_no_groups_are_no_limit(root):
    assert memory_groups(root.path) == [] and cpu_quota(root.path) is None
    root.member("0::/").mount("/sys/fs/cgroup").group("/sys/fs/cgroup")
    assert memory_groups(root.path) == [] and cpu_quota(root.path) is None


@pytest.mark.parametrize("place", ["/", "/user.slice", "/user.slice/user-1.slice/run-9.scope"])
def test_version_2_in_any_group_of_the_path(root, place):
    """systemd-run, Slurm and user slices put a process below the top; each group above counts."""
    path = "/user.slice/user-1.slice/run-9.scope"
    root.member(f"0::{path}").mount("/sys/fs/cgroup")
    root.group(f"/sys/fs/cgroup{path}", memory__max="max", cpu__max="max 100000")
    limited = {"memory__max": 900 * MIB, "memory__current": 300 * MIB, "cpu__max": "150000 100000"}
    stat = f"anon {200 * MIB}\ninactive_file {100 * MIB}\nactive_file {50 * MIB}"
    root.group(f"/sys/fs/cgroup{place}", memory__stat=stat, **limited)
    assert least(root) == 700 * MIB
    assert cpu_quota(root.path) == 1.5


@pytest.mark.parametrize("point", ["/sys/fs/cgroup/memory", "/cgroup/mem and more"])
def test_version_1_wherever_it_is_mounted(root, point):
    root.member("9:memory:/slurm/job 7", "1:cpu,cpuacct:/slurm")
    root.mount(point, "memory").mount("/sys/fs/cgroup/cpu", "cpu,cpuacct")
    root.group(f"{point}/slurm", memory__limit_in_bytes=2**63 - 4096)
    root.group(
        f"{point}/slurm/job 7",
        memory__limit_in_bytes=512 * MIB,
        memory__usage_in_bytes=400 * MIB,
        memory__stat=f"cache 9\ntotal_inactive_file {60 * MIB}",
    )
    quota = {"cpu__cfs_quota_us": 50000, "cpu__cfs_period_us": 100000}
    root.group("/sys/fs/cgroup/cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    root.group("/sys/fs/cgroup/cpu/slurm", **quota)
    assert memory_groups(root.path) == [MemoryGroup(limit_bytes=512 * MIB, used_bytes=340 * MIB)]
    assert cpu_quota(root.path) == 0.5


def test_a_container_sees_its_own_group_at_the_mount(root):
    """The path is the host's, the mount begins at the container's group."""
    root.member("0::/docker/abc/inner").mount("/sys/fs/cgroup", shown="/docker/abc")
    root.group("/sys/fs/cgroup", memory__max=8 * MIB, memory__current=MIB)
    root.group("/sys/fs/cgroup/inner", memory__max=4 * MIB, memory__current=MIB)
    assert [group.limit_bytes for group in memory_groups(root.path)] == [4 * MIB, 8 * MIB]


@pytest.mark.parametrize("path", ["/", "/../other", "/kubepods/pod1/abc"])
def test_a_group_that_is_not_below_the_mount_takes_its_top(root, path):
    root.member(f"5:memory:{path}").mount("/m", "memory", shown="/docker/abc")
    root.group("/m", memory__limit_in_bytes=8 * MIB, memory__usage_in_bytes=3 * MIB)
    assert least(root) == 5 * MIB


def test_both_versions_beside_each_other(root):
    root.member("4:memory:/a", "0::/b").mount("/c/memory", "memory").mount("/c/unified")
    root.group("/c/memory/a", memory__limit_in_bytes=9 * MIB, memory__usage_in_bytes=MIB)
    root.group("/c/unified/b", cpu__max="300000 100000")
    assert (least(root), cpu_quota(root.path)) == (8 * MIB, 3.0)


def test_limits_of_groups_that_are_not_mounted_count(root):
    root.member("4:memory:/a/b").mount("/m", "memory", shown="/a/b")
    root.group(
        "/m",
        memory__limit_in_bytes=2**62,
        memory__usage_in_bytes=MIB,
        memory__stat=f"hierarchical_memory_limit {7 * MIB}",
    )
    assert least(root) == 6 * MIB


def test_slowing_down_is_a_limit_too(root):
    root.member("0::/").mount("/g")
    root.group("/g", memory__max="max", memory__high=5 * MIB, memory__current=MIB)
    assert least(root) == 4 * MIB


def test_use_above_the_limit_leaves_nothing(root, monkeypatch):
    root.member("0::/").mount("/g")
    root.group("/g", memory__max=3 * MIB, memory__current=5 * MIB)
    (group,) = memory_groups(root.path)
    monkeypatch.setattr(system, "memory_groups", lambda: [group])
    assert group.rest_bytes == 0 == system.free_memory_bytes()
    assert system.narrowest_memory() == group


@pytest.mark.parametrize(
    "text", ["", "0", "nonsense", "0::", "x:y", "0:::", "9:memory", "\0", "0::/a (deleted)"]
)
def test_files_that_say_something_else_are_no_limit(root, text):
    root.member(text).mount("/g").group("/g", memory__max=text, cpu__max=text)
    assert memory_groups(root.path) == [] and cpu_quota(root.path) is None
    (root.path / "proc/self/mountinfo").write_text(f"{text}\n - \n1 2 3 - cgroup2\n")
    assert memory_groups(root.path) == []


@pytest.mark.parametrize(
    ("quota", "asked", "threads"),
    [
        (None, "", 8),
        (0.5, "", 1),
        (1.9, "", 1),
        (2.0, "", 2),
        (64.0, "", 8),
        (0.5, "3", 3),
        (None, "2,1", 2),
        (2.5, "0", 2),
        (2.5, "many", 2),
    ],
)
def test_threads_that_compute(quota, asked, threads, monkeypatch):
    """No more than the quota gives whole cores, unless the user says so."""
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(system, "cpu_quota", lambda: quota)
    monkeypatch.setattr(system.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert system.compute_threads() == threads


def test_waiting_threads_sleep_unless_somebody_said_how(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    system.settle_math()
    assert int(os.environ["GOMP_SPINCOUNT"]) <= 10_000
    system.wait_asleep()
    assert os.environ["GOMP_SPINCOUNT"] == "0"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setattr(system, "_settled", set())  # it is the user's
    system.wait_asleep()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.delenv("KMP_BLOCKTIME")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    system.settle_math()
    assert "GOMP_SPINCOUNT" not in os.environ


MANY_ROWS = """
import sys
from offload_rt.device.system import give_back_holes, give_back_large_blocks, settle_math
settle_math()
import psutil, torch
give_back_large_blocks()
weights = [torch.ones(rows, 64).bfloat16() for rows in range(64, 256, 64)]
def multiply(rows):
    for weight in weights:
        torch.nn.functional.linear(torch.ones(rows, 64).bfloat16(), weight)
for rows in range(2, 11):
    multiply(rows)
give_back_holes()
start = psutil.Process().memory_info().rss
for rows in range(11, 67):
    multiply(rows)
give_back_holes()
print(psutil.Process().memory_info().rss - start)
"""


@pytest.mark.parametrize("kept", ["ours", "1024"])
def test_numbers_of_rows_keep_no_memory(kept, monkeypatch):
    """The memory a run takes does not grow with the numbers of tokens its passes have had."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
        if kept != "ours":
            monkeypatch.setenv(name, kept)
    grown = int(forks.run([sys.executable, "-c", MANY_ROWS]).stdout)
    assert (grown < 4 * MIB) == (kept == "ours"), grown  # what the user sets stays, grows or not


USED_AGAIN = """
from offload_rt.device.system import settle_math
settle_math()
import torch
from offload_rt.device.cpu import MemoryMeter
first = [torch.ones(2**18) for _ in range(200)]
pins = [torch.ones(2**10) for _ in range(200) if first.pop() is not None]
meter = MemoryMeter()
second = [torch.ones(2**18) for _ in range(150)]
print(meter.growth_bytes())
"""


def test_memory_that_an_earlier_engine_freed_counts_again():
    """What malloc kept of the first would else be taken by the second and count as nothing."""
    ran = forks.run([sys.executable, "-c", USED_AGAIN])
    assert int(ran.stdout) > 140 * MIB


def test_what_is_read_of_mapped_files_is_no_growth(tmp_path):
    """Linux drops the code of a process that waits where memory is short; a run reads it again."""
    (path := tmp_path / "code").write_bytes(bytes(64 * MIB))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as code:
        meter = cpu.MemoryMeter()
        assert sum(code[i] for i in range(0, len(code), mmap.PAGESIZE)) == 0
        assert meter.growth_bytes() < 32 * MIB
        own = bytearray(os.urandom(MIB)) * 48
        assert len(own) <= meter.growth_bytes() < 80 * MIB


def test_what_is_dropped_again_before_the_end_is_no_growth(tmp_path):
    (path := tmp_path / "code").write_bytes(bytes(64 * MIB))
    with (
        closing(cpu.CpuDevice(readers=1)) as device,
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as code,
    ):
        assert sum(code[i] for i in range(0, len(code), mmap.PAGESIZE)) == 0
        device.upload([1])  # a pass begins
        code.madvise(mmap.MADV_DONTNEED)
        assert device.peak_bytes() < 32 * MIB


def test_what_is_given_back_between_two_looks_is_no_growth(tmp_path):
    """LLVM's 40 MiB are read and given back while a layer is attached, between passes."""
    (path := tmp_path / "code.so").write_bytes(bytes(64 * MIB))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as code:
        meter = cpu.MemoryMeter()
        assert sum(code[i] for i in range(0, len(code), mmap.PAGESIZE)) == 0
        assert system.give_back_code(re.compile(r"/code\.so$"), again=True) > 60 * MIB
        assert meter.growth_bytes() < 32 * MIB


@contextmanager
def private_memory(data):
    """Its address, and it."""
    with mmap.mmap(-1, len(data), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = data
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        gc.collect()  # the export is gone, so that the map can be closed
        yield start, memory


def test_memory_put_into_a_file_has_the_same_bytes_and_is_no_memory_of_its_own(tmp_path):
    """What libraries for GPUs made of memory is asked for by nobody, but must be there."""
    data = os.urandom(MIB) * 32
    (old := tmp_path / "old.tables").write_bytes(b"of another library")
    path = tmp_path / "a.tables"
    with private_memory(data) as (start, memory):
        before = system.rss_bytes()[0]
        system._put_into_file(start, len(data), path)
        assert system.rss_bytes()[0] < before - 24 * MIB
        memory[0:2] = b"ab"  # private: the next ones are the file's
        same = memory[:2] == b"ab" and memory[2:] == data[2:]
        assert same  # not the comparison itself: pytest would show how 32 MB differ
    same = path.read_bytes() == data
    assert same and not old.exists()
    # Another process has other addresses in some pages.
    written, other = path.stat().st_mtime_ns, bytearray(data)
    other[5 * MIB + 7], other[-1] = other[5 * MIB + 7] ^ 1, other[-1] ^ 1
    with private_memory(other) as (start, memory):
        before = system.rss_bytes()[0]
        system._put_into_file(start, len(data), path)
        assert system.rss_bytes()[0] < before - 24 * MIB
        same = memory[:] == other
        assert same
    same = path.read_bytes() == data
    assert same and path.stat().st_mtime_ns == written


def test_memory_stays_where_files_are_memory_or_have_other_bytes(tmp_path, monkeypatch):
    data, path = os.urandom(MIB), tmp_path / "a.tables"
    with private_memory(data) as (start, memory):
        path.write_bytes(bytes(MIB))
        with pytest.raises(OSError, match="other bytes"):
            system._put_into_file(start, MIB, path)
        monkeypatch.setattr(system, "file_system", lambda folder: "tmpfs")
        with pytest.raises(OSError, match="in memory"):
            system._put_into_file(start, MIB, path)
        same = memory[:] == data
        assert same


BESIDE = """
import sys
from offload_rt.device.system import settle_math
settle_math()
from offload_rt.device import system
from offload_rt.model.sparing import apart, import_compiler, spare_compiler
spare_compiler()
import torch
import offload_rt.engine.engine
import psutil
from offload_rt.device import cpu
from offload_rt.device.system import _mapped_areas
from offload_rt.folders import cache_folder
def resident():
    found = [a for a in _mapped_areas() if system.LIBRARIES.search(a.path) and not a.changed_bytes]
    return sum(a.resident_bytes for a in found if "w" not in a.rights)
before = resident()
system.put_tables_aside(cache_folder())
assert not system.put_tables_aside(cache_folder())
cpu.CpuDevice()
print(before, resident(), psutil.Process().memory_info().rss)
torch.ones(64, 64) @ torch.ones(64, 64)
torch.cuda.is_available()
assert sys.modules["cuda.bindings"] is None
absent = {"torch._dynamo", "sympy", "torch.distributed.tensor"}
assert not absent & set(sys.modules)
def find():
    import torch._dynamo
    assert torch._dynamo.config and torch._dynamo.disable(len, wrapping=False)([1]) == 1
    import_compiler()
    return absent <= set(sys.modules)
assert apart(find) and not absent & set(sys.modules)
"""


def test_what_a_run_takes_beside_its_device_memory_is_what_plan_says():
    """Code that imports touched is given back and used again where it is asked for, and torch's
    compiler is not imported before it is."""
    ran = subprocess.run([sys.executable, "-c", BESIDE], check=True, capture_output=True)
    before, after, own_bytes = map(int, ran.stdout.split())
    assert after < max(before // 8, MIB)
    assert own_bytes + 90 * MIB <= process_bytes()


def test_an_engine_computes_with_the_threads_there_are(monkeypatch):
    import torch

    from offload_rt.config import RuntimeConfig
    from offload_rt.device import opening

    before = torch.get_num_threads()
    monkeypatch.setattr(opening, "compute_threads", lambda: 3)
    try:
        for config, threads in ((RuntimeConfig(), 3), (RuntimeConfig(threads=2), 2)):
            device = opening.open_device(config)
            device.close()
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


JOIN = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); "
ASK = JOIN + (
    "from offload_rt.device.cgroup import cpu_quota; from offload_rt.device.system import "
    "free_memory_bytes, narrowest_memory; "
    "print(free_memory_bytes(), narrowest_memory().limit_bytes, cpu_quota())"
)


def own_group(controller, name, limit):
    """A group below this process's with a limit, or None where none can be made."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        mount = Path("/sys/fs/cgroup", controller)
        folder = Path(f"{mount}{path.rstrip('/')}", f"offload-run-test-{os.getpid()}")
        try:
            folder.mkdir()
            (folder / name).write_text(limit)
        except OSError:
            if folder.is_dir():
                folder.rmdir()
            return None
        return folder
    return None


def test_a_process_in_a_group_of_this_kernel():
    limit = 256 * MIB
    group = own_group("memory", "memory.limit_in_bytes", str(limit)) or own_group(
        "", "memory.max", str(limit)
    )
    if group is None:
        pytest.skip("no memory cgroup can be made here")
    try:
        command = [sys.executable, "-c", ASK, group / "cgroup.procs"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        group.rmdir()
    free, found, _ = done.stdout.split()
    assert int(found) == limit and 0 < int(free) < limit


@pytest.mark.parametrize("limit", [(), ("--device-memory", "900MiB")])
def test_a_group_that_is_full_is_a_sentence_that_helps(tiny_model, offload_run, monkeypatch, limit):
    """Not: use --device-memory with more than is free."""
    full = MemoryGroup(limit_bytes=256 * MIB, used_bytes=300 * MIB)
    monkeypatch.setattr(system, "memory_groups", lambda: [full])
    done = offload_run("plan", tiny_model, "--device", "cpu", "--draft", "none", *limit)
    assert done.code == 3 and "0 B are free: end other programs" in done.err
    assert "container or job" in done.err and "use --device-memory" not in done.err
