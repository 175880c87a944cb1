"""Where the committed rows of an offloaded cache live: host memory, or a file without a name.

Rows are token by token: all keys of a token in a layer, then all its values. So any run of rows,
and with it any block of keys and values, is one contiguous stretch, and new rows go behind the old
ones without touching them. In a file each block begins on a page border.
"""

import errno
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from offload_rt.device.base import (
    PIECE_BYTES,
    CopyBlock,
    CopyPiece,
    Device,
    DeviceBuffer,
    HomeSource,
    HomeTarget,
)
from offload_rt.device.host_memory import HostBuffer, allocate_host
from offload_rt.errors import DeviceError, PlanError
from offload_rt.kv.sizes import WRITE_PIECE_BYTES, KVSizes
from offload_rt.streaming.direct_io import OpenFile, PReadV, PWrite, open_file, whole_pages
from offload_rt.streaming.memory_home import MemoryHome, cut, pieces_of
from offload_rt.units import format_size
from offload_rt.writing import size_limit


class KVHome(Protocol):
    """The committed rows of one sequence."""

    def source(self, layer: int, row: int, rows: int) -> HomeSource:
        """Rows of one block, to be copied to the device."""

    def target(self, layer: int, row: int, rows: int) -> HomeTarget:
        """Where rows go; they may span blocks."""

    def rows(self, layer: int, row: int, rows: int) -> torch.Tensor | None:
        """[rows * row bytes] uint8 of the rows themselves, or None if they are in a file."""

    def close(self) -> None:
        """Give back what the system lent; nothing is in flight any more."""


class RamHome:
    """Host memory, one stretch per layer; pinned where that makes copies faster."""

    def __init__(self, device: Device, sizes: KVSizes) -> None:
        self._sizes = sizes
        self._layers: dict[int, HostBuffer] = {}
        for layer in sizes.offloaded:
            memory = allocate_host(sizes.capacity * sizes.row_bytes[layer])
            memory.tensor.zero_()  # pages that were never touched are not counted, and pin slowly
            device.pin(memory)
            self._layers[layer] = memory

    def source(self, layer: int, row: int, rows: int) -> MemoryHome:
        """Rows, to be copied to the device."""
        return MemoryHome(self._part(layer, row, rows))

    def target(self, layer: int, row: int, rows: int) -> MemoryHome:
        """Where rows go."""
        return MemoryHome(self._part(layer, row, rows))

    def rows(self, layer: int, row: int, rows: int) -> torch.Tensor:
        """The rows themselves."""
        return self._part(layer, row, rows).tensor

    def close(self) -> None:
        """The memory dies with its last reference."""

    def _part(self, layer: int, row: int, rows: int) -> HostBuffer:
        size, memory = self._sizes.row_bytes[layer], self._layers[layer]
        part = slice(row * size, (row + rows) * size)
        return HostBuffer(memory.tensor[part], memory.view[part])


class FileHome:
    """A file that has no name, so nothing is left behind however the run ends.

    Its room is taken at the start, so a full disk is met before any work. Blocks are read past the
    page cache where the file system allows it; rows are written whole pages at a time, through an
    aligned buffer of the writing thread.

    Args:
        sizes: what the cache takes.
        folder: where the file is made; None takes $TMPDIR or /var/tmp (/tmp is often memory).
        direct: try to pass the page cache by.
        preadv: replaced in tests to inject faults.
        pwrite: likewise.

    Raises:
        PlanError: the disk has no room.
        DeviceError: no file can be made there.
    """

    def __init__(
        self,
        sizes: KVSizes,
        folder: Path | None = None,
        *,
        direct: bool = True,
        preadv: PReadV = os.preadv,
        pwrite: PWrite = os.pwrite,
    ) -> None:
        self._sizes, self._preadv, self._pwrite = sizes, preadv, pwrite
        self.folder = folder or _default_folder()
        self._bounces = threading.local()
        self._starts: dict[int, int] = {}
        end = 0
        for layer in sizes.offloaded:
            self._starts[layer] = end
            end += sizes.layer_home_bytes(layer)
        self._file: OpenFile | None = _open_unnamed(self.folder, direct)
        try:
            _take_room(self._file.fd, end, self.folder)
        except BaseException:
            self.close()
            raise

    def source(self, layer: int, row: int, rows: int) -> "FileRows":
        """Rows of one block, to be copied to the device."""
        return FileRows(self, self._offset(layer, row), rows * self._sizes.row_bytes[layer])

    def target(self, layer: int, row: int, rows: int) -> "FileRuns":
        """Where rows go, block by block."""
        size, block = self._sizes.row_bytes[layer], self._sizes.block_tokens
        runs, at, stop = [], row, row + rows
        while at < stop:
            end = min(stop, at - at % block + block)
            runs.append((self._offset(layer, at), (at - row) * size, (end - at) * size))
            at = end
        return FileRuns(self, tuple(runs))

    def rows(self, layer: int, row: int, rows: int) -> None:
        """None: they are in a file."""

    def close(self) -> None:
        """Close the file; its room is free again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, target: memoryview, offset: int, need: int) -> None:
        """Read `need` bytes at `offset` into page-aligned memory with room for whole pages."""
        assert self._file is not None
        try:
            done = self._file.read(target[: whole_pages(need)], offset, need, preadv=self._preadv)
        except OSError as error:
            raise self._failed("reading", need, offset, error.strerror) from error
        if done < need:
            raise self._failed("reading", need, offset, "it ends early")

    def write(self, source: torch.Tensor, offset: int) -> None:
        """Write [n] bytes, at most a piece, at a page border; the rest of a page is ours too."""
        bounce = getattr(self._bounces, "buffer", None)
        if bounce is None:
            bounce = self._bounces.buffer = allocate_host(WRITE_PIECE_BYTES)
        need = source.numel()
        bounce.tensor[:need].copy_(source)
        assert self._file is not None
        try:
            rows = bounce.view[: whole_pages(need)]
            done = self._file.write(rows, offset, pwrite=self._pwrite)
        except OSError as error:
            raise self._failed("writing", need, offset, error.strerror) from error
        if done < need:
            raise self._failed("writing", need, offset, "nothing was written")

    def _offset(self, layer: int, row: int) -> int:
        block, rest = divmod(row, self._sizes.block_tokens)
        within = rest * self._sizes.row_bytes[layer]
        return self._starts[layer] + block * self._sizes.block_stride(layer) + within

    def _failed(self, what: str, nbytes: int, offset: int, why: str | None) -> DeviceError:
        return DeviceError(
            f"{what} {nbytes} bytes of the KV cache at {offset} of its file in {self.folder} "
            f"failed: {why}; check the disk, or choose another with --kv-folder"
        )


@dataclass(frozen=True, slots=True)
class FileRows:
    """Rows of one block in the file of a cache."""

    home: FileHome
    offset: int
    nbytes: int

    @property
    def image(self) -> None:
        """None: no memory holds them."""
        return None

    def blocks(self, dst: DeviceBuffer) -> Sequence[CopyBlock]:
        """The reads that fill `dst`, which must be host memory."""
        assert isinstance(dst, HostBuffer)
        return [
            CopyBlock(
                stop - start,
                partial(self.home.read, dst.view[start:], self.offset + start, stop - start),
            )
            for start, stop in cut(self.nbytes, PIECE_BYTES)
        ]

    def pieces(self) -> Sequence[CopyPiece]:
        """The reads that bring the rows through staging buffers."""
        return pieces_of(self.nbytes, self._load)

    def check(self) -> None:
        """Nobody else can reach a file without a name."""

    def _load(self, start: int, stop: int, staging: HostBuffer) -> torch.Tensor:
        self.home.read(staging.view, self.offset + start, stop - start)
        return staging.tensor[: stop - start]


@dataclass(frozen=True, slots=True)
class FileRuns:
    """Stretches of the file that rows go to: offset there, offset among the rows, bytes."""

    home: FileHome
    runs: tuple[tuple[int, int, int], ...]

    @property
    def image(self) -> None:
        """None: no memory holds them."""
        return None

    def write_blocks(self, src: torch.Tensor) -> Sequence[CopyBlock]:
        """The writes of `src`."""
        return [
            CopyBlock(
                stop - start,
                partial(self.home.write, src[at + start : at + stop], offset + start),
            )
            for offset, at, nbytes in self.runs
            for start, stop in cut(nbytes, WRITE_PIECE_BYTES)
        ]


def _default_folder() -> Path:
    lasting = Path("/var/tmp")
    if "TMPDIR" not in os.environ and os.access(lasting, os.W_OK):
        return lasting
    return Path(tempfile.gettempdir())


def _open_unnamed(folder: Path, direct: bool) -> OpenFile:
    """Make a file, open it, take its name away."""
    try:
        fd, name = tempfile.mkstemp(prefix="offload-kv-", dir=folder)
        os.close(fd)
        try:
            return open_file(Path(name), os.O_RDWR, direct=direct)
        finally:
            os.unlink(name)
    except OSError as error:
        raise DeviceError(
            f"cannot make a file for the KV cache in {folder}: {error.strerror}; choose another "
            "folder with --kv-folder"
        ) from error


def _take_room(fd: int, nbytes: int, folder: Path) -> None:
    if not nbytes:
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise DeviceError(
                f"cannot take {format_size(nbytes)} for the KV cache in {folder}: "
                f"{error.strerror}; choose another folder with --kv-folder"
            ) from error
        needs = f"the KV cache needs {format_size(nbytes)} of disk in {folder}, "
        if error.errno == errno.EFBIG:
            raise PlanError(f"{needs}{size_limit()}, or give a smaller --context") from error
        stat = os.statvfs(folder)
        raise PlanError(
            f"{needs}{format_size(stat.f_bavail * stat.f_frsize)} is free: choose another folder "
            "with --kv-folder, or a smaller --context or --max-tokens"
        ) from error
