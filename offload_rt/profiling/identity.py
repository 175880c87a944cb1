"""Which machine this is, and whether a profile still belongs to it. Imports no torch."""

import importlib.metadata
import platform
from collections.abc import Iterator

import psutil

from offload_rt.device.cuda.nvml import Driver, find_driver
from offload_rt.device.system import compute_threads, processor, takes_matrix_registers
from offload_rt.model.formats.stored import kernels_multiply
from offload_rt.profiling.profile import GpuIdentity, HardwareProfile, Machine, Versions


def this_machine(driver: Driver | None) -> Machine:
    """Describe this machine; without a driver it has no GPU."""
    gpus = () if driver is None else driver.gpus
    return Machine(
        cpu=processor()[0],
        cores=compute_threads(),
        ram_bytes=psutil.virtual_memory().total,
        kernels=kernels_multiply(exact=True),
        matrix_registers=takes_matrix_registers("bfloat16"),
        gpus=tuple(
            GpuIdentity(
                name=gpu.name,
                memory_bytes=gpu.total_bytes,
                link_generation=gpu.link_generation,
                link_width=gpu.link_width,
            )
            for gpu in gpus
        ),
    )


def these_versions(driver: Driver | None) -> Versions:
    """What is installed here."""
    return Versions(
        offload_rt=_version("offload-rt"),
        python=platform.python_version(),
        torch=_version("torch"),
        transformers=_version("transformers"),
        driver="" if driver is None else driver.version,
    )


def find_changes(profile: HardwareProfile) -> list[str]:
    """What is different here from where `profile` was measured, a sentence each."""
    driver = find_driver()
    return compare(profile, this_machine(driver), these_versions(driver))


def compare(profile: HardwareProfile, machine: Machine, versions: Versions) -> list[str]:
    """Where a machine differs from the profile's, a sentence each; none: the numbers hold.

    A link's generation is not compared: it is lower while nothing is copied. What a profile leaves
    empty is not known, so it is not compared either.
    """
    was = profile.machine
    pairs = [
        ("the processor", was.cpu, machine.cpu),
        ("the number of cores", was.cores, machine.cores),
        ("torch", profile.versions.torch, versions.torch),
        ("the NVIDIA driver", profile.versions.driver, versions.driver),
        ("the number of GPUs", len(was.gpus), len(machine.gpus)),
        *_gpu_pairs(was, machine),
    ]
    return [
        f"{what} was {before} in profile {profile.name}, is {_or_none(now)} here"
        for what, before, now in pairs
        if before != now and before != ""
    ]


def old_profile(name: str, *, layers: bool) -> str:
    """What to say where a profile was made before parts of plans were priced by what it lacks.

    Args:
        name: of the profile.
        layers: these are what it timed otherwise (`decoding.times_unlike`); else experts.
    """
    kernels, these = "multiply in matrix registers", "all layers"
    if not layers:
        kernels = "multiply few rows of an expert with --exact off"
        these = "these"
    return (
        f"profile {name} is older than the kernels that {kernels}, so {these} are guessed: run "
        "`offload-run profile` again"
    )


def _gpu_pairs(was: Machine, machine: Machine) -> Iterator[tuple[str, object, object]]:
    for index, (before, now) in enumerate(zip(was.gpus, machine.gpus, strict=False)):
        yield f"GPU {index}", before.name, now.name
        if before.link_width and now.link_width:
            yield f"the PCIe width of GPU {index}", before.link_width, now.link_width


def _or_none(value: object) -> object:
    return "none" if value == "" else value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
