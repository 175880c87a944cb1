"""Read files of a model folder as untrusted input: regular, bounded, strict JSON, links by rule.

Nothing here blocks on a pipe, maps a file or runs what it reads.

People keep weights on another disk and link them, or move their whole cache and link that. A folder
that was cloned or unpacked may bring links of its own, and those are the user's by owner. So a link
out of the folder is judged by where it leads (`_why_not_followed`):

- to a regular file with the same ending, or in a `blobs` folder, so that no key or password file
  becomes a template or a prompt (weights may have any name: what is no safetensors file is refused
  without showing any of it);
- not to what the kernel makes up;
- not from another user's link to a third user's file.

What is read there is read as the user, parsed strictly, and shown to nobody but the user.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

from offload_rt.errors import CheckpointError
from offload_rt.printable import printable
from offload_rt.units import format_size

_AGAIN = "download it again"
# Values one JSON text may hold: 2^18 tensors of 16 each. 100 MB of `[],` would take 2.5 GB and
# 15 s to parse (measured, python 3.11), so they are counted before parsing.
_VALUES_LIMIT = 2**22

_SYSTEM = ("/proc", "/dev", "/sys")
_LINKS_LIMIT = 40  # as the kernel has it
# (first bytes, what the file is and what to do about it)
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"<!doc", f"is a web page, not a model file: {_AGAIN}"),
    (b"<html", f"is a web page, not a model file: {_AGAIN}"),
    (b"<?xml", f"is an XML error page, not a model file: {_AGAIN}"),
    (
        b"version https://git-lfs",
        "is a git-LFS pointer, not the file itself: run `git lfs pull` in the model folder",
    ),
    (
        b"pk\x03\x04",
        "is a zip archive or a PyTorch pickle, which is never opened: convert it to safetensors",
    ),
    (b"\x80", "looks like a pickle, which is never opened: convert it to safetensors"),
    (b"gguf", "is a GGUF file under another name: get the model in safetensors format"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """What a file was when it was opened; any difference later means that it was changed."""

    path: Path
    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> Self:
        """Identity of `path` from `os.stat` or `os.fstat`."""
        return cls(
            path=path,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            inode=status.st_ino,
            device=status.st_dev,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """A regular file of a model folder, open for reading; owned by `open_inside`."""

    fd: int
    identity: FileIdentity

    def read(self, nbytes: int, offset: int = 0) -> bytes:
        """Read `nbytes` at `offset`, fewer only where the file ends."""
        parts = []
        while nbytes > 0 and (part := os.pread(self.fd, nbytes, offset)):
            parts.append(part)
            nbytes -= len(part)
            offset += len(part)
        return b"".join(parts)


@contextmanager
def open_inside(folder: Path, name: str) -> Iterator[OpenFile]:
    """Open `folder/name` for reading.

    Links are followed within the folder, into `blobs/` of the same Hugging Face cache repository,
    whose snapshots are links, and by rule to other places; see above.

    Raises:
        CheckpointError: missing, not a regular file, outside, or the system refuses; an `OSError`
            of the body becomes one too.
    """
    path = folder / name
    try:
        real = _real_path(folder, path)
        _require_regular(path, os.stat(real))  # before open: opening a device or pipe has effects
        fd = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            _require_regular(path, status)
            yield OpenFile(fd=fd, identity=FileIdentity.of(path, status))
        finally:
            os.close(fd)
    except FileNotFoundError as error:
        what = "is a link to a file that is gone" if path.is_symlink() else "is missing"
        raise CheckpointError(f"{path} {what}: download the model again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def read_part(folder: Path, name: str, nbytes: int, offset: int) -> bytes:
    """So many bytes of `folder/name`.

    Raises:
        CheckpointError: as of `open_inside`, or the file ends before.
    """
    with open_inside(folder, name) as file:
        data = file.read(nbytes, offset)
    if len(data) < nbytes:
        raise CheckpointError(f"{folder / name} became shorter while it was read: start again")
    return data


def read_json_object(
    folder: Path, name: str, limit_bytes: int, *, lenient: bool = False
) -> dict[str, object]:
    """Read a small JSON file of the model folder; see `parse_json_object`."""
    path = folder / name
    with open_inside(folder, name) as file:
        size = file.identity.size
        if size > limit_bytes:
            raise CheckpointError(
                f"{path} has {format_size(size)}, accepted is up to {format_size(limit_bytes)}: "
                "it is not what its name says"
            )
        data = file.read(size)
    if not data.strip():
        raise CheckpointError(f"{path} is empty ({len(data)} bytes): {_AGAIN}")
    if kind := foreign_format(data[:64]):
        raise CheckpointError(f"{path} {kind}")
    return parse_json_object(data, str(path), lenient=lenient)


def parse_json_object(data: bytes, where: str, *, lenient: bool = False) -> dict[str, object]:
    """Parse UTF-8 JSON strictly: an object, no name twice, finite numbers, not too many values.

    Args:
        data: the text.
        where: what the error message calls it.
        lenient: as Python reads it, and so transformers: the last of several values of a name
            counts, and numbers need not be finite.

    Raises:
        CheckpointError: the text is anything else.
    """
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > _VALUES_LIMIT:
        raise CheckpointError(
            f"{where} holds {values} values, accepted is up to {_VALUES_LIMIT}: it is not genuine, "
            f"{_AGAIN}"
        )
    try:
        value = json.loads(data.decode("utf-8"), **({} if lenient else _STRICT))
    except RecursionError as error:
        raise CheckpointError(f"{where} is nested too deeply to be genuine: {_AGAIN}") from error
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON ({error}): {_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds {shown(value)} instead of a JSON object: {_AGAIN}")
    return value


def foreign_format(head: bytes) -> str | None:
    """Say what a file with these first bytes is when it is none of ours, and what to do."""
    start = head.lstrip().lower()
    for magic, what in _FOREIGN:
        if start.startswith(magic):
            return what
    return None


def shown(value: object) -> str:
    """Write an untrusted value for an error message: short, on one line, no control characters."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    text = printable(repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _real_path(folder: Path, path: Path) -> Path:
    try:
        root = Path(os.path.realpath(folder, strict=True))
        real = Path(os.path.realpath(path, strict=True))
    except ValueError as error:  # NUL in the name
        raise CheckpointError(f"{shown(str(path))} is not a file name") from error
    if any(real.is_relative_to(place) for place in (root, *_blobs(folder, root))):
        return real
    reason = _why_not_followed(_links(root, path.relative_to(folder)), path, real)
    if reason:
        raise CheckpointError(f"{path} leads out of the model folder, to {real}, {reason}")
    return real


def _blobs(folder: Path, root: Path) -> Iterator[Path]:
    """Where the files of a hub snapshot really are; every part of the cache may be a link."""
    for snapshot in (root, Path(os.path.abspath(folder))):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            yield Path(os.path.realpath(repository / "blobs"))


def _links(root: Path, name: Path) -> list[Path]:
    """The links that lead from a name in the folder to its file; none for a name with `..`."""
    found: list[Path] = []
    place, waiting = root, list(name.parts)
    while waiting and ".." not in name.parts and len(found) < _LINKS_LIMIT:
        part = waiting.pop(0)
        place = place.parent if part == ".." else place / part
        if place.is_symlink():
            found.append(place)
            waiting = [*Path(os.readlink(place)).parts, *waiting]
            place = place.parent
    return found


def _why_not_followed(links: list[Path], path: Path, real: Path) -> str:
    """Why links out of the folder are not followed, and what to do; empty if they are."""
    if not links:
        return "and no link does: give the folder it is in"
    if any(real.is_relative_to(place) for place in _SYSTEM):
        return "which is no file of a model: remove the link"
    if path.suffix not in (real.suffix, ".safetensors") and real.parent.name != "blobs":
        return (
            f"which does not end in {path.suffix or 'nothing'} as the link does, so it may be "
            "anything: copy the file into the folder"
        )
    owner = os.stat(real).st_uid
    foreign = [
        by for link in links if (by := os.lstat(link).st_uid) not in (os.geteuid(), 0, owner)
    ]
    if foreign:
        return (
            f"by a link of user {foreign[0]} to a file of user {owner}: make the link yourself, or "
            "copy the file into the folder"
        )
    return ""


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file: {_AGAIN}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names: set[str] = set()
        twice = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {shown(twice)} appears twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is too large for a number")
    return value


_STRICT: dict[str, Any] = {
    "object_pairs_hook": _unique,
    "parse_constant": _refuse_constant,
    "parse_float": _finite,
}
