"""What the control groups of this process allow it: memory, and shares of the processors.

The kernel says in which group a process is (`/proc/self/cgroup`) and where groups are mounted
(`/proc/self/mountinfo`), of version 1, of version 2, or both beside each other. A limit of any
group above counts as well, so each is looked at from the process's own up to the top of the mount.
Everything is read below a `root` folder. No torch here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_UNLIMITED = 2**60  # version 1 writes no limit as the largest number of whole pages
_ESCAPED = re.compile(r"\\([0-7]{3})")  # blanks and backslashes of a mount point


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGroup:
    """A group that limits memory.

    Attributes:
        limit_bytes: for all its processes together.
        used_bytes: by them, without cached file pages that the kernel drops first.
    """

    limit_bytes: int
    used_bytes: int

    @property
    def rest_bytes(self) -> int:
        """What may still be taken; 0 where the use is above the limit."""
        return max(0, self.limit_bytes - self.used_bytes)


def memory_groups(root: Path = _ROOT) -> list[MemoryGroup]:
    """Each group around this process that limits memory, its own first."""
    found = (_memory_1(folder) for folder in _folders(root, "memory"))
    unified = (_memory_2(folder) for folder in _folders(root, ""))
    return [group for group in (*found, *unified) if group is not None]


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Cores this process may keep busy, by the narrowest group around it; None for no limit."""
    quotas = [_quota_1(folder) for folder in _folders(root, "cpu")]
    quotas += [_quota_2(folder) for folder in _folders(root, "")]
    return min((quota for quota in quotas if quota is not None), default=None)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Groups of a controller ("" is version 2) around this process, from its own upwards."""
    path = _own_path(root, controller)
    if path is None:
        return
    for shown, mount in _mounts(root, controller):
        # A mount shows the groups below `shown`; one elsewhere in the tree shows a container its
        # own top as well, which is the best that is known there.
        inner = path.relative_to(shown) if path.is_relative_to(shown) else PurePosixPath()
        inner = PurePosixPath() if ".." in inner.parts else inner
        yield from (mount / part for part in (inner, *inner.parents))


def _own_path(root: Path, controller: str) -> PurePosixPath | None:
    for line in _lines(root / "proc/self/cgroup"):
        fields = line.split(":", 2)
        if len(fields) == 3 and controller in fields[1].split(","):
            return PurePosixPath(fields[2].removesuffix(" (deleted)"))
    return None


def _mounts(root: Path, controller: str) -> Iterator[tuple[PurePosixPath, Path]]:
    """Where a controller's groups are mounted: which of them, and where."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        fits = kind[0] == "cgroup2" if not controller else kind[0] == "cgroup"
        if fits and (not controller or controller in kind[2].split(",")):
            shown, mount = map(unescaped, fields[3:5])
            yield PurePosixPath(shown), root / mount.lstrip("/")


def unescaped(field: str) -> str:
    """A field of the kernel's list of mounts, which writes a blank in octal."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), field)


def _memory_1(folder: Path) -> MemoryGroup | None:
    stat = _pairs(folder / "memory.stat")
    # The second also tells the limits of groups above that are not mounted here.
    limits = (_number(folder / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit"))
    used = _number(folder / "memory.usage_in_bytes")
    return _group(limits, used, stat.get("total_inactive_file", 0))


def _memory_2(folder: Path) -> MemoryGroup | None:
    # Above `high` processes are not ended, but slowed down until they stand.
    limits = (_number(folder / "memory.max"), _number(folder / "memory.high"))
    used = _number(folder / "memory.current")
    return _group(limits, used, _pairs(folder / "memory.stat").get("inactive_file", 0))


def _group(
    limits: tuple[int | None, ...], used: int | None, reclaimable: int
) -> MemoryGroup | None:
    limit = min((n for n in limits if n is not None and n < _UNLIMITED), default=None)
    if limit is None:
        return None
    return MemoryGroup(limit_bytes=limit, used_bytes=max(0, (used or 0) - reclaimable))


def _quota_1(folder: Path) -> float | None:
    return _share(_number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us"))


def _quota_2(folder: Path) -> float | None:
    quota, period = [*" ".join(_lines(folder / "cpu.max")).split(), "", ""][:2]
    return _share(_whole(quota), _whole(period))


def _share(quota: int | None, period: int | None) -> float | None:
    """Quota by period; -1 and `max` are no limit."""
    return quota / period if quota and period and min(quota, period) > 0 else None


def _pairs(path: Path) -> dict[str, int]:
    pairs = (line.partition(" ") for line in _lines(path))
    return {name: number for name, _, text in pairs if (number := _whole(text)) is not None}


def _number(path: Path) -> int | None:
    return _whole(" ".join(_lines(path)))


def _whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:  # "max", or not there
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except (OSError, ValueError):
        return []
