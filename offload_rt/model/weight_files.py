"""Reading weights from the user's own safetensors files, straight past the page cache.

Files are opened once. Whole pages are read with O_DIRECT into page-aligned memory where the file
system allows it, so that neither the page cache nor a mapping holds a second copy of the model.
Every read checks its length, and after each layer the files are compared with what they were when
the headers were read: a file that was truncated, rewritten or replaced ends the run with an error
that says so.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from offload_rt.device.base import (
    PAGE_BYTES,
    PIECE_BYTES,
    STAGING_BYTES,
    CopyBlock,
    CopyPiece,
    DeviceBuffer,
)
from offload_rt.device.host_memory import HostBuffer, allocate_host
from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import FileIdentity, TensorExtent
from offload_rt.model.layout import FLOATS, FileRun, LayerLayout, torch_name
from offload_rt.streaming.direct_io import OpenFile, PReadV, open_file, whole_pages


@dataclass(frozen=True, slots=True)
class _WeightFile:
    """An open weights file, and what it was when its header was read."""

    file: OpenFile
    identity: FileIdentity


class WeightFiles:
    """The open files of one checkpoint.

    Args:
        identities: what each file was when its header was read.
        preadv: replaced in tests to inject faults.
        direct: try to read past the page cache.
    """

    def __init__(
        self,
        identities: Mapping[Path, FileIdentity],
        *,
        preadv: PReadV = os.preadv,
        direct: bool = True,
    ) -> None:
        self._preadv = preadv
        self._bounces = threading.local()
        self._files: dict[Path, _WeightFile] = {}
        try:
            for path, identity in identities.items():
                self._files[path] = _WeightFile(_open(path, direct), identity)
                self.check([path])
        except CheckpointError:
            self.close()
            raise

    @property
    def direct(self) -> bool:
        """Whether all files are read past the page cache."""
        return all(each.file.direct for each in self._files.values())

    def close(self) -> None:
        """Close all files."""
        for each in self._files.values():
            each.file.close()
        self._files = {}

    def check(self, paths: Iterable[Path]) -> None:
        """Compare files with what they were at the start.

        Raises:
            CheckpointError: one was truncated, rewritten, replaced or removed since.
        """
        for path in paths:
            file = self._files[path]
            try:
                now = [os.fstat(file.file.fd), os.stat(path)]
            except OSError as error:
                raise CheckpointError(
                    f"{path.name} cannot be reached any more ({error.strerror}): it was moved or "
                    "removed while running; start again when the files are complete"
                ) from error
            if any(FileIdentity.of(path, stat) != file.identity for stat in now):
                raise CheckpointError(
                    f"{path.name} changed while running ({file.identity.size} bytes at the start, "
                    f"{now[1].st_size} now): start again when nothing writes to {path.parent}"
                )

    def blocks(self, run: FileRun, image: HostBuffer) -> Iterator[CopyBlock]:
        """Cut the reading of `run` into `image` into independent blocks."""
        file = self._files[run.path]
        if run.in_place:
            yield from self._blocks_in_place(file, run, image)
            return
        for start in range(0, run.nbytes, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, run.nbytes - start)
            yield CopyBlock(nbytes, partial(self._bounce, file, run, start, nbytes, image))

    def pieces(self, run: FileRun) -> Iterator[CopyPiece]:
        """Cut the reading of `run` through staging buffers into independent pieces."""
        file = self._files[run.path]
        have, want = _formats(run)
        step = PIECE_BYTES * have.itemsize // max(have.itemsize, want.itemsize)
        for start in range(0, run.nbytes, step):
            nbytes = min(step, run.nbytes - start)
            yield CopyPiece(
                offset=run.image_offset + start // have.itemsize * want.itemsize,
                image_bytes=nbytes // have.itemsize * want.itemsize,
                nbytes=nbytes,
                load=partial(self._stage, file, run, start, nbytes),
            )

    def read(self, extent: TensorExtent) -> torch.Tensor:
        """A tensor of the file, in memory."""
        staging = allocate_host(STAGING_BYTES)
        parts = [piece.load(staging).clone() for piece in self.pieces(_whole(extent))]
        numbers = torch.cat(parts).view(getattr(torch, torch_name(extent.dtype)))
        return numbers.view(extent.shape)

    def not_finite(self, extent: TensorExtent, dtype: torch.dtype) -> tuple[int, int]:
        """How many numbers of a tensor are NaN or infinite: in the file, and in `dtype`."""
        staging, stored = allocate_host(STAGING_BYTES), getattr(torch, FLOATS[extent.dtype])
        counts = torch.zeros(2, dtype=torch.int64)
        for piece in self.pieces(_whole(extent)):
            numbers = piece.load(staging).clone().view(stored)  # aligned for it
            counts += torch.stack([(~n.isfinite()).sum() for n in (numbers, numbers.to(dtype))])
        in_file, converted = counts.tolist()
        return in_file, converted

    def _blocks_in_place(
        self, file: _WeightFile, run: FileRun, image: HostBuffer
    ) -> Iterator[CopyBlock]:
        """Cut at page borders of the file; the first and last page are read whole if direct."""
        begin, end = run.file_offset, run.file_offset + run.nbytes
        shift = run.image_offset - run.file_offset
        first = begin - begin % PAGE_BYTES
        for page in range(first, end, PIECE_BYTES):
            start, stop = max(begin, page), min(end, page + PIECE_BYTES)
            low, high = start, stop
            if file.file.direct:
                low, high = page, whole_pages(stop)
            target = image.view[low + shift : high + shift]
            yield CopyBlock(stop - start, partial(self._read, file, target, low, stop - low))

    def _read(self, file: _WeightFile, target: memoryview, offset: int, need: int) -> None:
        """Read at least `need` bytes at `offset` into `target`."""
        try:
            done = file.file.read(target, offset, need, preadv=self._preadv)
        except OSError as error:
            raise CheckpointError(
                f"{file.identity.path.name}: reading {need} bytes at {offset} failed: "
                f"{error.strerror}; check the disk"
            ) from error
        if done < need:
            raise CheckpointError(
                f"{file.identity.path.name} ends at byte {offset + done}, {need - done} bytes "
                "short of what its header promises: it was truncated while running"
            )

    def _bounce(
        self, file: _WeightFile, run: FileRun, start: int, nbytes: int, image: HostBuffer
    ) -> None:
        """Read through a buffer of this thread, then copy or convert into place."""
        bounce = getattr(self._bounces, "buffer", None)
        if bounce is None:
            bounce = self._bounces.buffer = allocate_host(STAGING_BYTES)
        have, want = _formats(run)
        source = self._read_into(file, run, start, nbytes, bounce)
        at = run.image_offset + start // have.itemsize * want.itemsize
        size = nbytes // have.itemsize * want.itemsize
        image.tensor[at : at + size].view(want).copy_(source.view(have))

    def _stage(
        self, file: _WeightFile, run: FileRun, start: int, nbytes: int, staging: HostBuffer
    ) -> torch.Tensor:
        """Read into `staging` and convert there; returns the part of it that is the result."""
        have, want = _formats(run)
        source = self._read_into(file, run, start, nbytes, staging)
        if have is want:
            return source
        converted = source.view(have).to(want).view(torch.uint8)
        return staging.tensor[: converted.numel()].copy_(converted)

    def _read_into(
        self, file: _WeightFile, run: FileRun, start: int, nbytes: int, staging: HostBuffer
    ) -> torch.Tensor:
        """Read whole pages; returns [nbytes] of `staging`, or a copy aligned for the format."""
        offset = run.file_offset + start
        lead = offset % PAGE_BYTES
        room = whole_pages(lead + nbytes)
        self._read(file, staging.view[:room], offset - lead, lead + nbytes)
        source = staging.tensor[lead : lead + nbytes]
        return source.clone() if lead % _formats(run)[0].itemsize else source


@dataclass(frozen=True, slots=True)
class FileSource:
    """A layer whose home is the checkpoint's own files."""

    layout: LayerLayout
    files: WeightFiles

    @property
    def nbytes(self) -> int:
        """File bytes of the layer."""
        return self.layout.file_bytes

    def blocks(self, dst: DeviceBuffer) -> Sequence[CopyBlock]:
        """The reads that fill `dst`, which must be host memory."""
        assert isinstance(dst, HostBuffer)
        return [block for run in self.layout.runs for block in self.files.blocks(run, dst)]

    @property
    def image(self) -> None:
        """None: no memory holds the layer."""
        return None

    def pieces(self) -> Sequence[CopyPiece]:
        """The reads that bring the layer through staging buffers."""
        return [piece for run in self.layout.runs for piece in self.files.pieces(run)]

    def check(self) -> None:
        """Raise if a file of this layer changed since the start."""
        self.files.check({run.path for run in self.layout.runs})


def _whole(extent: TensorExtent) -> FileRun:
    """All bytes of a tensor, as they are."""
    return FileRun(
        path=extent.path,
        file_offset=extent.offset,
        nbytes=extent.nbytes,
        image_offset=0,
        in_place=False,
    )


def _formats(run: FileRun) -> tuple[torch.dtype, torch.dtype]:
    """Number formats in the file and in the image; bytes when nothing is converted."""
    if run.convert is None:
        return torch.uint8, torch.uint8
    have, want = run.convert
    return getattr(torch, FLOATS[have]), getattr(torch, want)


def _open(path: Path, direct: bool) -> OpenFile:
    try:
        return open_file(path, os.O_RDONLY, direct=direct)
    except OSError as error:
        raise CheckpointError(f"cannot open {path.name}: {error.strerror}") from error
