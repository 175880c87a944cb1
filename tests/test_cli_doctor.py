"""`doctor`: each faked fault has its line and its fix, and decides the exit code."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from expert_models import make_mixture
from safetensors.torch import load_file, save_file

from offload_rt.cli import run
from offload_rt.cli.checks import Level, diagnose
from offload_rt.cli.machine import (
    CompilerFacts,
    CpuFacts,
    DiskFacts,
    Machine,
    MemoryFacts,
    ProfileFacts,
    TorchFacts,
    inspect_machine,
)
from offload_rt.config import RuntimeConfig
from offload_rt.device.cgroup import MemoryGroup
from offload_rt.device.cuda.nvml import Driver, Gpu, GpuProcess
from offload_rt.units import format_size

GIB = 2**30
DISK = DiskFacts(
    folder=Path("/models/x"),
    kind="ext4",
    free_bytes=100 * GIB,
    direct_reads=True,
    read_bytes_per_s=3e9,
)
TORCH = TorchFacts(version="2.14.1+cu128", cuda_build="12.8", sees_gpu=True)
GPU = Gpu(name="GPU X", total_bytes=24 * GIB, free_bytes=23 * GIB, capability=(8, 9))
DRIVER = Driver(version="570.1", cuda_version=(12, 8), gpus=(GPU,))
CPU = CpuFacts(name="CPU Y", bf16_flag="amx_bf16", all_cores=8, cores=8, quota=None, threads=8)
COMPILER = CompilerFacts(name="numba 0.68.1", folder=Path("/cache/compiled"))
MEMORY = MemoryFacts(
    ram_bytes=64 * GIB,
    free_bytes=60 * GIB,
    cgroup=None,
    swap_bytes=8 * GIB,
    swap_used_bytes=GIB // 8,
    locked_bytes=None,
)
PROFILE = ProfileFacts(name="box", found=True)
HEALTHY = Machine(
    python="3.12.4",
    torch=TORCH,
    torch_error="",
    transformers="5.23.0",
    cpu=CPU,
    compiler=COMPILER,
    memory=MEMORY,
    driver=DRIVER,
    profile=PROFILE,
    wsl=False,
    disk=DISK,
    demo=True,
)


def torch_with(**changed):
    return {"torch": replace(TORCH, **changed)}


def cpu_with(**changed):
    return {"cpu": replace(CPU, **changed)}


def memory_with(**changed):
    return {"memory": replace(MEMORY, **changed)}


def group(limit_bytes, used_bytes=0):
    return memory_with(cgroup=MemoryGroup(limit_bytes=limit_bytes, used_bytes=used_bytes))


def profile_with(**changed):
    return {"profile": replace(PROFILE, **changed)}


def used_by(*processes):
    gpu = replace(GPU, processes=tuple(GpuProcess(pid=p, used_bytes=n) for p, n in processes))
    return {"driver": replace(DRIVER, gpus=(gpu,))}


def disk_with(**changed):
    return {"disk": replace(DISK, **changed)}


FAULTS = [
    ({"python": "3.10.2"}, Level.FAIL, "Python", "3.11"),
    (
        {"torch": None, "torch_error": "libX.so is missing"},
        Level.FAIL,
        "libX.so is missing",
        "setup.sh",
    ),
    (torch_with(version="2.5.1"), Level.FAIL, "2.5.1", "2.6 or newer"),
    ({"transformers": None}, Level.FAIL, "not installed", "setup.sh"),
    ({"transformers": "4.57.1"}, Level.FAIL, "4.57.1", "5.3 or newer"),
    (cpu_with(bf16_flag=""), Level.WARN, "no bf16 instructions", "--dtype float32"),
    (
        {"compiler": replace(COMPILER, folder=None)},
        Level.WARN,
        "compiled by numba 0.68.1 in each process",
        "OFFLOAD_RT_CACHE",
    ),
    (memory_with(free_bytes=GIB), Level.WARN, "1.00 GiB free of 64.0 GiB", "--device-memory"),
    (group(8 * GIB, 3 * GIB), Level.WARN, "8.00 GiB of 64.0 GiB, 3.00 GiB", "docker run --memory"),
    (
        cpu_with(quota=1.5, threads=1),
        Level.WARN,
        "1 for computing, CPU quota of 1.5 cores (cgroup)",
        "docker run --cpus",
    ),
    (
        cpu_with(all_cores=64, quota=0.5, threads=8),
        Level.WARN,
        "affinity to 8 of 64 cores, CPU quota of 0.5",
        "unset OMP_NUM_THREADS, or set 1",
    ),
    (
        memory_with(swap_used_bytes=6 * GIB),
        Level.WARN,
        "swap 6.00 GiB in use of 8.00 GiB",
        "--device-memory",
    ),
    (
        used_by((12, 9 * GIB), (7, 0)),
        Level.WARN,
        "process 12 on GPU 0 (9.00 GiB), process 7 on GPU 0",
        "--device cuda:N",
    ),
    (profile_with(found=False), Level.WARN, "none: plans use another", "offload-run profile"),
    (profile_with(problem="x is damaged"), Level.WARN, "x is damaged", "offload-run profile"),
    (profile_with(changes=("torch was 1",)), Level.WARN, "torch was 1", "offload-run profile"),
    (profile_with(notes=("other work",)), Level.WARN, "other work", "offload-run profile"),
    (profile_with(pinned_bytes=GIB), Level.WARN, "1.00 GiB at most when it was", "--home disk"),
    (
        torch_with(sees_gpu=False, cuda_build=None),
        Level.FAIL,
        "built for CPU only",
        "pip install torch",
    ),
    (
        torch_with(sees_gpu=False, cuda_build="13.0"),
        Level.FAIL,
        "runs CUDA up to 12.8, torch needs 13.0",
        "update the NVIDIA driver",
    ),
    (torch_with(sees_gpu=False), Level.FAIL, "torch cannot use it", "CUDA_VISIBLE_DEVICES"),
    (memory_with(locked_bytes=65536), Level.WARN, "64.0 KiB of locked memory", "limits.conf"),
    ({"wsl": True}, Level.WARN, "WSL", ".wslconfig"),
    (disk_with(kind="nfs4"), Level.WARN, "nfs4", "local disk"),
    (disk_with(kind="tmpfs"), Level.WARN, "tmpfs", "takes memory"),
    (disk_with(read_bytes_per_s=1e8), Level.WARN, "0.10 GB/s", "NVMe"),
    (disk_with(direct_reads=False), Level.WARN, "no direct reads", "ext4"),
    ({"demo": False}, Level.WARN, "not downloaded", "demo.sh"),
]


@pytest.fixture
def doctor(monkeypatch, capsys):
    def call(machine, *arguments):
        monkeypatch.setattr("offload_rt.cli.doctor.inspect_machine", lambda model: machine)
        code = run(["doctor", *arguments])
        return code, capsys.readouterr().out

    return call


def test_a_healthy_machine(doctor):
    code, out = doctor(HEALTHY)
    assert code == 0
    assert out.endswith("\nusable\n")
    assert "->" not in out and "GPU X (23.0 GiB free of 24.0 GiB), driver 570.1" in out


def test_of_several_gpus_it_says_whether_they_can_share_a_model():
    other = replace(GPU, name="another")
    for gpus, said in (
        ((GPU, GPU), "--device cuda:0,cuda:1 streams over all their links"),
        ((GPU, other), "a model is spread over equal cards only"),
    ):
        machine = replace(HEALTHY, driver=replace(DRIVER, gpus=gpus))
        (found,) = [finding for finding in diagnose(machine) if finding.what == "GPU"]
        assert found.level is Level.OK and found.detail.endswith(said)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ("not installed", "numba is not installed; `pip install offload-rt[fast]` brings it"),
        ("switched off by NUMBA_DISABLE_JIT", "numba is switched off by NUMBA_DISABLE_JIT"),
    ],
)
def test_no_compiler_is_no_fault(problem, said):
    findings = diagnose(replace(HEALTHY, compiler=CompilerFacts(name="", problem=problem)))
    assert {finding.level for finding in findings} == {Level.OK}
    assert any(finding.detail.endswith(said) for finding in findings)


def test_no_gpu_is_no_fault():
    findings = diagnose(replace(HEALTHY, driver=None))
    assert {finding.level for finding in findings} == {Level.OK}
    assert any("no NVIDIA GPU" in finding.detail for finding in findings)
    assert any("takes 80.0 MiB less: `pip install" in finding.detail for finding in findings)
    cpu_only = diagnose(replace(HEALTHY, driver=None, **torch_with(cuda_build=None)))
    assert not any("pip install torch" in finding.detail for finding in cpu_only)


@pytest.mark.parametrize(("fault", "level", "detail", "fix"), FAULTS)
def test_each_fault_has_its_line_and_fix(fault, level, detail, fix, doctor):
    machine = replace(HEALTHY, **fault)
    (finding,) = [f for f in diagnose(machine) if f.level is not Level.OK]
    assert finding.level is level
    assert detail in f"{finding.what} {finding.detail}" and fix in finding.fix
    code, out = doctor(machine)
    assert code == (1 if level is Level.FAIL else 0)
    assert f"-> {finding.fix}" in out
    code, out = doctor(machine, "--json")
    record = json.loads(out)
    assert record["usable"] is (code == 0)
    assert [f["fix"] for f in record["findings"] if f["fix"]] == [finding.fix]


def test_this_machine_with_a_model(tiny_model):
    machine = inspect_machine(tiny_model)
    assert machine.torch is not None and machine.cpu.threads >= 1
    assert 0 < machine.memory.free_bytes <= machine.memory.ram_bytes
    assert machine.disk.kind != "unknown"
    assert machine.disk.read_bytes_per_s > 0
    assert len(diagnose(machine)) == 16


def test_missing_model(capsys):
    assert run(["doctor", "/no/such/folder"]) == 4
    assert "/no/such/folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mixture", "inner", "extents"),
    [("qwen3_moe", 32, 1), ("gpt_oss", 128, 2), ("granitemoe", 128, 2)],
)
def test_experts_are_read_as_runs_do(make_tiny, doctor, mixture, inner, extents):
    """One whole expert after the other, also where a tensor has those of all."""
    found = inspect_machine(make_mixture(make_tiny, mixture)).disk.experts
    assert (found.nbytes, found.extents, found.cut) == (4 * 3 * inner * 64, extents, 0)
    assert found.bytes_per_s > 0 and found.at_once == RuntimeConfig().readers
    _, out = doctor(replace(HEALTHY, **disk_with(experts=found)))
    reads = "one read" if extents == 1 else "2 reads"
    assert f"experts, {format_size(found.nbytes)} in {reads}, 4 at once: " in out
    assert "lie in more reads" not in out


def test_experts_that_are_cut_are_said(make_tiny, doctor, tmp_path):
    """Each layer's in two files, one of them with a part of an expert that the other has."""
    folder = tmp_path / "cut"
    shutil.copytree(make_mixture(make_tiny), folder)
    tensors = load_file(folder / "model.safetensors")
    moved = {name: tensors.pop(name) for name in [*tensors] if ".experts.7.down_proj" in name}
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "some.safetensors")
    save_file(moved, folder / "more.safetensors")
    index = dict.fromkeys(tensors, "some.safetensors") | dict.fromkeys(moved, "more.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = inspect_machine(folder).disk.experts
    assert (found.extents, found.cut) == (1, 1 / 8)
    _, out = doctor(replace(HEALTHY, **disk_with(experts=found)))
    assert "12% of the experts lie in more reads than most" in " ".join(out.split())


def test_a_model_whose_layers_are_whole_has_no_reads_of_experts(tiny_model):
    assert inspect_machine(tiny_model).disk.experts is None
