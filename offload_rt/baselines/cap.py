"""One memory cap for every engine's process, enforced by the kernel. Imports no torch.

A memory cgroup counts the page cache of files that its processes read, so weights that do not fit
the cap cannot be served from memory. Where no cgroup can be made the size of a process's private
memory is limited, which leaves the page cache out; the report says which of them it was.
"""

import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from offload_rt.units import format_size

_NAME = "offload-run-compare"
_MOUNTS = Path("/sys/fs/cgroup")
_JOIN = 'echo $$ > "$0" && exec "$@"'
_EMPTY_S = 5.0  # a killed process leaves its group within milliseconds, unless the disk hangs
_numbers = itertools.count()


class Cap(Protocol):
    """What keeps one process, and those it starts, below a limit."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs `arguments` below the limit, as the same process."""

    def struck(self) -> bool:
        """Whether the kernel ended a process for exceeding it."""

    def close(self) -> None:
        """Remove what was set up; the process has ended."""


@dataclass(frozen=True, slots=True)
class CapKind:
    """A way to cap memory.

    Attributes:
        words: what the report says about it.
        counts_page_cache: whether cached file pages count.
        open: set up a cap for one process.
    """

    words: str
    counts_page_cache: bool
    open: Callable[[], Cap]


def find_cap(limit_bytes: int | None) -> CapKind:
    """The best way to enforce a limit on this machine; tried, not guessed."""
    if limit_bytes is None:
        return CapKind("none", False, NoCap)
    size = format_size(limit_bytes)
    for version, parent in _parents():
        kind = CapKind(
            f"{size} for the process, page cache included (memory cgroup v{version})",
            True,
            lambda v=version, p=parent: GroupCap(p, v, limit_bytes),  # type: ignore[misc]
        )
        if _works(kind):
            return kind
    scope = CapKind(
        f"{size} for the process, page cache included (systemd-run, MemoryMax)",
        True,
        lambda: ScopeCap(limit_bytes),
    )
    if shutil.which("systemd-run") and _works(scope):
        return scope
    return CapKind(
        f"{size} of private memory (RLIMIT_DATA; no memory cgroup can be made here, so the page "
        "cache does not count)",
        False,
        lambda: DataLimit(limit_bytes),
    )


class NoCap:
    """No limit."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The same."""
        return list(arguments)

    def struck(self) -> bool:
        """Never."""
        return False

    def close(self) -> None:
        """Nothing to do."""


class GroupCap:
    """A memory cgroup of its own.

    Args:
        parent: the group it is made in.
        version: 1 or 2, of the cgroup interface.
        limit_bytes: memory and swap together.

    Raises:
        OSError: the group cannot be made, or sets no limits.
    """

    def __init__(self, parent: Path, version: int, limit_bytes: int) -> None:
        self._version = version
        self.folder = parent / f"{_NAME}-{os.getpid()}-{next(_numbers)}"
        self.folder.mkdir()
        try:
            if version == 1:
                self._write("memory.limit_in_bytes", limit_bytes)
                if (self.folder / "memory.memsw.limit_in_bytes").exists():
                    self._write("memory.memsw.limit_in_bytes", limit_bytes)
            else:
                self._write("memory.max", limit_bytes)
                if (self.folder / "memory.swap.max").exists():
                    self._write("memory.swap.max", 0)
        except OSError:
            self.folder.rmdir()
            raise

    def command(self, arguments: Sequence[str]) -> list[str]:
        """A shell that joins the group and becomes the program."""
        return ["/bin/sh", "-c", _JOIN, str(self.folder / "cgroup.procs"), *arguments]

    def struck(self) -> bool:
        """Whether the kernel's counter of such kills has moved."""
        name = "memory.oom_control" if self._version == 1 else "memory.events"
        for line in (self.folder / name).read_text().splitlines():
            key, _, count = line.partition(" ")
            if key == "oom_kill":
                return int(count) > 0
        return False

    def close(self) -> None:
        """Remove the group; it is empty within a moment of its last process's end."""
        until = time.monotonic() + _EMPTY_S
        while True:
            try:
                self.folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                if time.monotonic() > until:
                    return  # an empty group costs nothing, and the next comparison removes it
                time.sleep(0.01)
            else:
                return

    def _write(self, name: str, value: int) -> None:
        # Not "w": a missing file must not be made, and O_TRUNC means nothing to the kernel here.
        with (self.folder / name).open("r+") as file:
            file.write(str(value))


class ScopeCap:
    """A scope of systemd, of the user's or of the system's instance."""

    def __init__(self, limit_bytes: int) -> None:
        own = [] if os.geteuid() == 0 else ["--user"]
        self._prefix = ["systemd-run", *own, "--scope", "--quiet", "--collect"]
        self._prefix += ["-p", f"MemoryMax={limit_bytes}", "-p", "MemorySwapMax=0", "--"]

    def command(self, arguments: Sequence[str]) -> list[str]:
        """`systemd-run --scope` becomes the program."""
        return [*self._prefix, *arguments]

    def struck(self) -> bool:
        """Not known once the scope is gone."""
        return False

    def close(self) -> None:
        """The scope ends with its process."""


class DataLimit:
    """RLIMIT_DATA: heap and private mappings. Python sees MemoryError, torch its own error."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes

    def command(self, arguments: Sequence[str]) -> list[str]:
        """A shell that limits itself and becomes the program."""
        script = 'ulimit -d "$0" && exec "$@"'
        return ["/bin/sh", "-c", script, str(self._limit_bytes // 1024), *arguments]

    def struck(self) -> bool:
        """Nothing is killed: allocations fail."""
        return False

    def close(self) -> None:
        """Nothing to do."""


def _works(kind: CapKind) -> bool:
    """Whether a process runs below it."""
    try:
        cap = kind.open()
    except OSError:
        return False
    try:
        done = subprocess.run(
            cap.command(["/bin/true"]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=10,
        )
        return done.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
    finally:
        cap.close()


def _parents() -> list[tuple[int, Path]]:
    """Groups of this process in which one of our own may be possible, with the interface's version.

    Version 2 wants processes in leaves only, so there the group above is tried too.
    """
    found: list[tuple[int, Path]] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        number, controllers, path = line.split(":", 2)
        own = path.lstrip("/")
        if "memory" in controllers.split(","):
            found.append((1, _MOUNTS / "memory" / own))
        elif number == "0" and not controllers:
            places = (_MOUNTS / own, (_MOUNTS / own).parent)
            found += [(2, p) for p in places if p.is_relative_to(_MOUNTS)]
    found = [(version, place) for version, place in found if place.is_dir()]
    for _, place in found:
        _remove_old(place)
    return sorted(found, key=lambda pair: pair[0])


def _remove_old(parent: Path) -> None:
    """Remove empty groups of comparisons that were killed."""
    for folder in parent.glob(f"{_NAME}-*"):
        owner = folder.name.removeprefix(f"{_NAME}-").partition("-")[0]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            try:
                folder.rmdir()
            except OSError:
                continue  # still in use
