"""Machine code for this processor from LLVM's own language, where llvmlite is installed.

No compiler is needed on the user's machine: llvmlite carries LLVM, and comes with
`pip install offload-rt[fast]`. Without it torch's kernels compute.

What LLVM made is kept beside numba's kernels (`device/compiled.py`), by its text and the processor:
the next process loads it.

A kernel is a function of one argument, a record of 64-bit numbers and addresses, that runs in all
threads of torch's OpenMP at once (`together`): those wait for work anyway, so no second pool of
threads gets in their way, and a kernel of 50 microseconds is worth starting.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from offload_rt.device.compiled import kept_in
from offload_rt.device.system import give_back_code, give_back_holes
from offload_rt.errors import ConfigError
from offload_rt.writing import replacing

PACKAGE = "llvmlite"
CODE = re.compile(r"/libllvmlite[^/]*$")
_LIBRARY_OF_THREADS = re.compile(r"/lib(g|i)?omp[^/]*\.so[^/]*$")
_NEEDED = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
_KEPT, _DIGEST_BYTES, _MOST_KEPT = ".o", 32, 1000  # 17 kB each
_HELD: list[Any] = []  # what keeps machine code in memory
_log = logging.getLogger(__name__)
traced = torch._C._len_torch_dispatch_stack  # whether who calls is recorded: then torch computes


@cache
def problem() -> str:
    """Why there are no kernels; empty where there are."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"{PACKAGE} is not installed"
    if _threads() is None:
        return "torch's OpenMP was not found"
    try:
        _target()
    except Exception as error:  # noqa: BLE001 - LLVM's loading may fail in many ways
        return f"{PACKAGE} cannot be used: {' '.join(str(error).split())}"
    return ""


def who() -> str:
    """Who assembles, for reports: `llvmlite 0.48.0`; empty where nobody does."""
    return "" if problem() else f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


def trouble(make: Callable[[], object]) -> str:
    """Why machine code cannot be made, as by an LLVM of another age; empty if it can."""
    try:
        make()
    except Exception as error:  # noqa: BLE001 - what LLVM refuses it says in many ways
        reason = f"{PACKAGE} cannot assemble them: {str(error).strip().splitlines()[0]}"
        _log.info("%s", reason)
        return reason
    return ""


def assemble(text: str, names: Iterable[str]) -> Mapping[str, int]:
    """Make machine code.

    Args:
        text: a module in LLVM's language.
        names: functions of it.

    Returns:
        the address of each.
    """
    import llvmlite.binding as llvm

    library = _threads()
    assert library is not None
    for needed in _NEEDED:
        address = ctypes.cast(getattr(library, needed), ctypes.c_void_p).value
        llvm.add_symbol(needed, address)
    machine = _target()
    code = _machine_code(text, machine)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _HELD.append((engine, machine))
    found = {name: engine.get_function_address(name) for name in names}
    give_back_code(CODE, again=True)  # 40 MiB of LLVM; machine code needs none of it
    give_back_holes()
    return found


def _machine_code(text: str, machine: Any) -> bytes:  # noqa: ANN401
    """What LLVM makes of a module, from the folder where it is kept if it is there."""
    import llvmlite.binding as llvm

    who = importlib.metadata.version(PACKAGE), llvm.get_host_cpu_name(), _features()
    key = hashlib.sha256("\n".join([*who, text]).encode()).hexdigest()
    folder = kept_in()
    path = None if folder is None else folder / f"{key}{_KEPT}"
    if path is not None:
        with suppress(OSError):
            digest, code = (data := path.read_bytes())[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
            if hashlib.sha256(code).digest() == digest:
                os.utime(path)
                return code
    module = llvm.parse_assembly(text)
    module.verify()
    made: bytes = machine.emit_object(module)
    if path is not None:
        with suppress(ConfigError, OSError):
            with replacing(path, lasting=False) as temporary:
                temporary.write_bytes(hashlib.sha256(made).digest() + made)
            _drop_old(path.parent)
    return made


def _drop_old(folder: Path) -> None:
    """Keep what was used last: of other versions and models nothing is looked for again."""
    used = sorted(folder.glob(f"*{_KEPT}"), key=lambda one: one.stat().st_mtime_ns)
    for old in used[:-_MOST_KEPT]:
        old.unlink(missing_ok=True)


def together(address: int, record: "ctypes.Array[ctypes.c_int64]") -> None:
    """Run a kernel in all threads that torch computes with; returns when all are done."""
    _run()(address, record, torch.get_num_threads(), 0)


@cache
def _run() -> Any:  # noqa: ANN401 - a C function
    library = _threads()
    assert library is not None
    run = library.GOMP_parallel
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    return run


@cache
def _threads() -> ctypes.CDLL | None:
    """The OpenMP that torch has loaded; LLVM's and Intel's answer to GNU's names, too."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if "omp" in line)
    found = [path for path in paths if _LIBRARY_OF_THREADS.search(path)]
    if len(found) != 1:  # of two only one has torch's threads
        return None
    library = ctypes.CDLL(found[0])
    return library if all(hasattr(library, name) for name in _NEEDED) else None


def _target() -> Any:  # noqa: ANN401 - llvmlite has no types
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=_features(), opt=3
    )


def _features() -> str:
    import llvmlite.binding as llvm

    features: str = llvm.get_host_cpu_features().flatten()
    return features
