"""Kernels: work in parts, and where numba is there, compiled once and kept."""

import os
import subprocess
import sys
import threading
import time

import pytest

from offload_rt.device import compiled
from offload_rt.device.compiled import in_parts

with_numba = pytest.mark.skipif(bool(compiled.problem()), reason=f"numba: {compiled.problem()}")

KERNELS = """
import logging, sys
from offload_rt.device.compiled import Kernel, kernel, kept_in, warm

@kernel("int64(int64[::1])")
def total(numbers):
    found = 0
    for number in numbers:
        found += number
    return found

assert isinstance(total, Kernel)
if __name__ == "__main__":
    import numpy
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    done = warm([total])
    assert warm([total]).compiled == 0
    print(total(numpy.arange(5)), done.compiled, kept_in())
    try:
        total(numpy.arange(5.0))
    except TypeError:
        print("refused")
"""


def run(folder, **variables):
    script = folder / "kernels.py"
    script.write_text(KERNELS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@with_numba
def test_a_kernel_is_compiled_once_for_its_types(tmp_path):
    kept = tmp_path / "cache" / "compiled"
    first = run(tmp_path, OFFLOAD_RT_CACHE=str(tmp_path / "cache"))
    assert first[0].startswith("compiled total in ") and first[0].endswith(f"kept in {kept}")
    assert first[1:] == [f"10 1 {kept}", "refused"]
    assert kept.stat().st_mode & 0o777 == 0o700
    assert run(tmp_path, OFFLOAD_RT_CACHE=str(tmp_path / "cache")) == [f"10 0 {kept}", "refused"]


@with_numba
def test_without_a_folder_of_ones_own_each_process_compiles(tmp_path):
    others = tmp_path / "others"
    others.mkdir()
    others.chmod(0o777)
    a_file = tmp_path / "file"
    a_file.touch()
    for folder in (others, a_file):
        said, found, refused = run(tmp_path, NUMBA_CACHE_DIR=str(folder))
        assert said.endswith("not kept: its folder cannot be written")
        assert (found, refused) == ("10 1 None", "refused")
    assert not list(others.iterdir())


def test_why_there_are_none_is_said(monkeypatch):
    monkeypatch.setattr(compiled, "PACKAGE", "no_such_package")
    assert compiled.problem.__wrapped__() == "not installed"
    monkeypatch.setattr(compiled, "PACKAGE", "json")
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert compiled.problem.__wrapped__() == "switched off by NUMBA_DISABLE_JIT"
    monkeypatch.delenv("NUMBA_DISABLE_JIT")
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it raises
    assert compiled.problem.__wrapped__().startswith("not usable: ")


@pytest.mark.parametrize(("count", "step", "threads"), [(100, 7, 4), (5, 9, 3), (64, 8, 1)])
def test_each_part_is_worked_on_once(count, step, threads):
    seen, lock = [], threading.Lock()

    def work(start, stop):
        with lock:
            seen.extend(range(start, stop))

    for _ in range(20):
        seen.clear()
        in_parts(work, count, step, threads)
        assert sorted(seen) == list(range(count))


def test_parts_run_beside_each_other_and_all_are_done_on_return():
    both, caller, done = threading.Barrier(2, timeout=10), threading.current_thread(), []

    def work(start, stop):
        both.wait()  # breaks unless two threads are here at once
        if threading.current_thread() is not caller:
            time.sleep(0.1)
        done.append(start)

    in_parts(work, 2, 1, 2)
    assert sorted(done) == [0, 1]


def test_what_a_part_raises_is_raised_when_all_are_done():
    running = []

    def work(start, stop):
        running.append(start)
        try:
            if start == 3:
                raise ValueError("part 3")
        finally:
            running.remove(start)

    with pytest.raises(ValueError, match="part 3"):
        in_parts(work, 50, 1, 4)
    assert not running
