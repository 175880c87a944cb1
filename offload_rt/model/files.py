"""Read files of a model folder as untrusted input: regular, inside it, bounded, strict JSON.

Nothing here follows a link out of the folder, blocks on a pipe, maps a file or runs what it reads.
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

    Links are followed only within the folder, or into `blobs/` of the same Hugging Face cache
    repository, whose snapshots are links.

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
    repository = root.parent.parent
    in_cache = root.parent.name == "snapshots" and repository.name.startswith("models--")
    allowed = (root, repository / "blobs") if in_cache else (root,)
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} leads out of the model folder, to {real}: copy the file into the folder"
        )
    return real


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
