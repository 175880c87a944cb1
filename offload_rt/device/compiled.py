"""Kernels that numba compiles for this processor, where numba is installed.

numba is an extra (`pip install offload-rt[fast]`); without it torch computes the same bits. Modules
with kernels may import numba at their top, so who wants one asks `problem` before importing it.

`warm` compiles kernels, or loads what an earlier run compiled and kept, before any is called. A
kernel is compiled for the types it was declared with and no others: a call with other types is an
error, never a pause. It runs without Python's lock; `in_parts` spreads its work over threads.

What is compiled is kept in the user's folder of caches, one file a kernel, keyed by its source and
by the processor. numba reads these files as it reads its own code: a folder that another user may
write to is not used. Nor is one that cannot be written: then each process compiles anew.

No torch and no numba here at import.
"""

import importlib.util
import itertools
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from offload_rt.folders import cache_folder

PACKAGE, EXTRA = "numba", "offload-rt[fast]"
_FOLDER = "compiled"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_log = logging.getLogger(__name__)
_warming = threading.Lock()  # numba compiles one at a time, and its folder is a variable of all


@cache
def problem() -> str:
    """Why kernels cannot be compiled; empty if they can."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "not installed"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "switched off by NUMBA_DISABLE_JIT"
    try:
        import numba  # noqa: F401
    except Exception as error:  # noqa: BLE001 - it checks numpy's version, loads LLVM, and more
        return " ".join(f"not usable: {error}".split())
    return ""


def who() -> str:
    """Who compiles, for reports: `numba 0.68.1`; empty where nobody does."""
    if problem():
        return ""
    from importlib.metadata import version  # 13 ms

    return f"{PACKAGE} {version(PACKAGE)}"


@cache
def kept_in() -> Path | None:
    """The folder where kernels are kept; None where there is none that only this user writes."""
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or cache_folder() / _FOLDER)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            status = folder.stat()
    except OSError:
        return None
    return folder if status.st_uid == os.getuid() and not status.st_mode & _OTHERS_WRITE else None


class Kernel:
    """A function that numba compiles when it is warmed.

    Args:
        function: in numba's Python. What it calls must be in the same file: a change elsewhere does
            not make numba compile again.
        signature: types of its arguments, by numba's names.
    """

    def __init__(self, function: Callable[..., Any], signature: str) -> None:
        self.name = function.__name__
        self._function, self._signature = function, signature
        self._made: Any = None

    def __call__(self, *arguments: object) -> Any:  # noqa: ANN401 - what the function returns
        """Run it; it must be warm."""
        return self._made(*arguments)

    def warm(self) -> bool | None:
        """Have it compiled; returns whether that was done now, not before, and None if it was warm.

        Threads that warm it at once wait for the first.
        """
        with _warming:
            if self._made is not None:
                return None
            folder = kept_in()
            if folder is not None:
                with suppress(OSError):  # no room, no rights any more
                    return self._compile(folder)
            return self._compile(None)

    def _compile(self, folder: Path | None) -> bool:
        import numba

        made = numba.njit(nogil=True, error_model="numpy")(self._function)
        if folder is not None:
            # Looked at when caching is enabled; other users of numba in this process have it too.
            saved, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
            try:
                made.enable_caching()
            finally:
                numba.config.CACHE_DIR = saved
        made.compile(self._signature)
        made.disable_compile()
        self._made = made
        return not sum(made.stats.cache_hits.values())


def kernel(signature: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a function a kernel.

    Args:
        signature: types of its arguments and what it returns, as `void(uint8[::1], int64)`.
    """
    return lambda function: Kernel(function, signature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """What warming did.

    Attributes:
        seconds: it took.
        compiled: kernels that were compiled now; the others had been kept.
    """

    seconds: float
    compiled: int


def warm(kernels: Iterable[Kernel]) -> Warmed:
    """Compile kernels, or load them where they were kept; those that are warm are left alone."""
    start = time.perf_counter()
    done = {each.name: each.warm() for each in kernels}
    seconds, made = time.perf_counter() - start, [name for name, now in done.items() if now]
    if made:
        kept = f"kept in {kept_in()}" if kept_in() else "not kept: its folder cannot be written"
        _log.info("compiled %s in %.1f s, %s", ", ".join(made), seconds, kept)
    return Warmed(seconds=seconds, compiled=len(made))


class _Team:
    """Threads that take parts of work from each other's counter until none is left."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._process, self._threads = os.getpid(), 0
        self._lock = threading.Lock()

    def send(self, job: Callable[[], None], times: int) -> None:
        """Have a job run in so many threads."""
        with self._lock:
            if self._process != os.getpid():  # threads do not survive a fork
                self._process, self._threads, self._jobs = os.getpid(), 0, SimpleQueue()
            while self._threads < times:
                self._threads += 1
                threading.Thread(
                    target=self._work,
                    args=(self._jobs,),
                    name=f"kernel-{self._threads}",
                    daemon=True,
                ).start()
        for _ in range(times):
            self._jobs.put(job)

    @staticmethod
    def _work(jobs: "SimpleQueue[Callable[[], None]]") -> None:
        while True:
            jobs.get()()


_team = _Team()


def in_parts(run: Callable[[int, int], object], count: int, step: int, threads: int) -> None:
    """Call `run(start, stop)` for all parts of a range, in this thread and others.

    Who is done with a part takes the next, so that a thread that got no core does not hold up the
    rest. On return all parts are done; if one failed, what it raised is raised.

    Args:
        run: works on a part; others run beside it.
        count: of the range.
        step: of a part.
        threads: at most.
    """
    helpers = min(threads, -(-count // step)) - 1
    if helpers <= 0:
        run(0, count)
        return
    starts = itertools.count(0, step)  # taking the next is one step of the interpreter
    errors: list[BaseException] = []
    done = threading.Semaphore(0)

    def work() -> None:
        try:
            while (start := next(starts)) < count and not errors:
                run(start, min(start + step, count))
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            errors.append(error)
        finally:
            done.release()

    _team.send(work, helpers)
    work()
    for _ in range(helpers + 1):
        done.acquire()
    if errors:
        raise errors[0]
