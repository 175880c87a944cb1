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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
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
from offload_rt.model.checkpoint import DTYPE_BYTES, FileIdentity, TensorExtent
from offload_rt.model.formats.ggml import broken_scales
from offload_rt.model.formats.methods import Form, block_name
from offload_rt.model.formats.planes import DamagedError, check, decode
from offload_rt.model.formats.rounding import Bytes, NotFiniteError, numbers_of, rounded
from offload_rt.model.formats.stored import Stored
from offload_rt.model.layout import (
    FLOATS,
    FileRun,
    Kept,
    LayerLayout,
    RoundedRun,
    checked_parts,
    torch_name,
)
from offload_rt.model.packed_files import piece_weights
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
        self._rows: dict[Path, _WeightFile] = {}
        self._checked = set[tuple[Path, int]]()  # parts of weights that are not damaged
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
        for each in (*self._files.values(), *self._rows.values()):
            each.file.close()
        self._files, self._rows = {}, {}

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
        if run.rounded is not None:
            yield from self._rounding_blocks(file, run, run.rounded, image)
            return
        for number, (begin, end) in enumerate(pairwise(run.coded)):
            yield CopyBlock(end - begin, partial(self._decode_into, file, run, number, image))
        if run.coded:
            return
        for start, nbytes, kept in _cut(run, PIECE_BYTES):
            yield CopyBlock(nbytes, partial(self._bounce, file, run, start, nbytes, kept, image))

    def pieces(self, run: FileRun) -> Iterator[CopyPiece]:
        """Cut the reading of `run` through staging buffers into independent pieces."""
        file = self._files[run.path]
        if run.rounded is not None:
            yield from self._rounding_pieces(file, run, run.rounded)
            return
        have, want = _formats(run)
        if run.coded:
            yield from self._coded_pieces(file, run)
            return
        step = PIECE_BYTES * have.itemsize // max(have.itemsize, want.itemsize)
        for start, nbytes, kept in _cut(run, step):
            yield CopyPiece(
                offset=run.image_offset + start // have.itemsize * want.itemsize,
                image_bytes=nbytes // have.itemsize * want.itemsize,
                nbytes=nbytes,
                load=partial(self._stage, file, run, start, nbytes, kept),
            )

    def read(self, extent: TensorExtent, stored: Stored | None = None) -> torch.Tensor:
        """A tensor of the file, in memory; checked, where it is a part of a quantised weight."""
        staging, run = _staging_for(extent), _whole(extent)
        if stored is not None:
            run = replace(run, kept=tuple(checked_parts(stored, extent)))
        parts = [piece.load(staging).clone() for piece in self.pieces(run)]
        numbers = torch.cat(parts).view(getattr(torch, torch_name(extent.dtype)))
        return numbers.view(extent.shape)

    def rows(self, extent: TensorExtent, numbers: torch.Tensor) -> torch.Tensor:
        """Some rows [N, ...] of a tensor of the file, by their numbers [N], each once.

        They are read through the page cache, all asked for before the first is waited for.

        Raises:
            CheckpointError: the file was truncated, rewritten, replaced or removed.
        """
        wanted, places = numbers.unique(return_inverse=True)
        file, each = self._rows_file(extent.path), extent.nbytes // extent.shape[0]
        starts = [extent.offset + number * each for number in wanted.tolist()]
        for start in starts:
            os.posix_fadvise(file.file.fd, start, each, os.POSIX_FADV_WILLNEED)
        data = torch.empty(len(starts) * each, dtype=torch.uint8)
        view = memoryview(data.numpy().data)
        for place, start in enumerate(starts):
            self._read(file, view[place * each : (place + 1) * each], start, each)
        self.check([extent.path])
        found = data.view(getattr(torch, torch_name(extent.dtype)))
        return found.view(len(starts), *extent.shape[1:]).index_select(0, places)

    def _rows_file(self, path: Path) -> _WeightFile:
        """The file, open for single rows: nothing is read ahead."""
        if path not in self._rows:
            file = _open(path, False)
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
            self._rows[path] = _WeightFile(file, self._files[path].identity)
        return self._rows[path]

    def not_finite(self, extent: TensorExtent, dtype: torch.dtype) -> tuple[int, int]:
        """How many numbers of a tensor are NaN or infinite: in the file, and in `dtype`."""
        staging, stored = _staging_for(extent), getattr(torch, FLOATS[extent.dtype])
        counts = torch.zeros(2, dtype=torch.int64)
        for piece in self.pieces(_whole(extent)):
            numbers = piece.load(staging).clone().view(stored)  # aligned for it
            counts += torch.stack([(~n.isfinite()).sum() for n in (numbers, numbers.to(dtype))])
        in_file, converted = counts.tolist()
        return in_file, converted

    def _blocks_in_place(
        self, file: _WeightFile, run: FileRun, image: HostBuffer
    ) -> Iterator[CopyBlock]:
        """Cut at page borders of the file; the first and last page are read whole if direct.

        What is checked is read whole in the first read: pages that two such parts share are read
        twice, with the same bytes. Later what decodes coded pieces looks at their heads.
        """
        shift = run.image_offset - run.file_offset
        if any((file.identity.path, kept.begin) not in self._checked for kept in run.kept):
            for start, nbytes, kept in _cut(run, PIECE_BYTES):
                load = partial(self._read_whole, file, run, start, nbytes, kept, image)
                yield CopyBlock(nbytes, load)
            return
        begin, end = run.file_offset, run.file_offset + run.nbytes
        first = begin - begin % PAGE_BYTES
        for page in range(first, end, PIECE_BYTES):
            start, stop = max(begin, page), min(end, page + PIECE_BYTES)
            low, high = start, stop
            if file.file.direct:
                low, high = page, whole_pages(stop)
            target = image.view[low + shift : high + shift]
            yield CopyBlock(stop - start, partial(self._read, file, target, low, stop - low))

    def _read_whole(
        self,
        file: _WeightFile,
        run: FileRun,
        start: int,
        nbytes: int,
        kept: Kept | None,
        image: HostBuffer,
    ) -> None:
        """Read a part of a run into place, and check it."""
        begin, at = run.file_offset + start, run.image_offset + start
        low, high = 0, nbytes
        if file.file.direct:
            low, high = -(begin % PAGE_BYTES), whole_pages(begin + nbytes) - begin
        self._read(file, image.view[at + low : at + high], begin + low, nbytes - low)
        self._check(file, kept, image.tensor[at : at + nbytes])

    def _check(self, file: _WeightFile, kept: Kept | None, source: torch.Tensor) -> None:
        """Refuse what is damaged: heads of coded pieces in each read, all else in the first."""
        if kept is None:
            return
        if kept.form is Form.CODED:
            self._check_piece(file, kept.begin, source, kept.weights, kept.bits)
            return
        key = (file.identity.path, kept.begin)
        if key not in self._checked and (wrong := broken_scales(source.numpy(), kept.form)):
            raise CheckpointError(
                f"{file.identity.path.name} holds {wrong} scales of {block_name(kept.form)} that "
                f"are NaN or infinite, from byte {kept.begin} on: the file is damaged, download it "
                "again"
            )
        self._checked.add(key)

    def _decode(
        self, file: _WeightFile, begin: int, source: torch.Tensor, words: torch.Tensor, bits: int
    ) -> None:
        """A piece of [n] uint8 that was read from `begin` to [2 w] uint8 of weights."""
        self._check_piece(file, begin, source, words.numel() // 2, bits)
        with _damaged(file):
            decode(source.numpy(), words.numpy().view(np.uint16))

    def _check_piece(
        self, file: _WeightFile, begin: int, source: torch.Tensor, count: int, bits: int
    ) -> None:
        key = (file.identity.path, begin)
        with _damaged(file):
            check(source.numpy(), count, bits, whole=key not in self._checked)
        self._checked.add(key)

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
        self,
        file: _WeightFile,
        run: FileRun,
        start: int,
        nbytes: int,
        kept: Kept | None,
        image: HostBuffer,
    ) -> None:
        """Read through a buffer of this thread, then copy or convert into place."""
        bounce = self._bounce_buffer()
        have, want = _formats(run)
        source = self._read_into(file, run, start, nbytes, bounce)
        self._check(file, kept, source)
        at = run.image_offset + start // have.itemsize * want.itemsize
        size = nbytes // have.itemsize * want.itemsize
        image.tensor[at : at + size].view(want).copy_(source.view(have))

    def _stage(
        self,
        file: _WeightFile,
        run: FileRun,
        start: int,
        nbytes: int,
        kept: Kept | None,
        staging: HostBuffer,
    ) -> torch.Tensor:
        """Read into `staging` and convert there; returns the part of it that is the result."""
        have, want = _formats(run)
        source = self._read_into(file, run, start, nbytes, staging)
        self._check(file, kept, source)
        if have is want:
            return source
        converted = source.view(have).to(want).view(torch.uint8)
        return staging.tensor[: converted.numel()].copy_(converted)

    def _coded_pieces(self, file: _WeightFile, run: FileRun) -> Iterator[CopyPiece]:
        """The same of coded weights; in a larger number format a staging buffer takes a part."""
        want = _decoded_format(run)
        each = piece_weights(_weights(run))
        parts = -(-each * want.itemsize // PIECE_BYTES)
        for number, (begin, end) in enumerate(pairwise(run.coded)):
            count = _weights_of(run, number)
            for part in range(parts):
                first, last = (count * at // parts for at in (part, part + 1))
                yield CopyPiece(
                    offset=run.image_offset + (number * each + first) * want.itemsize,
                    image_bytes=(last - first) * want.itemsize,
                    nbytes=(end - begin) * (part + 1) // parts - (end - begin) * part // parts,
                    load=partial(self._stage_coded, file, run, number, slice(first, last)),
                )

    def _decode_into(self, file: _WeightFile, run: FileRun, number: int, image: HostBuffer) -> None:
        """Read a coded piece through a buffer of this thread and decode it into place."""
        want = _decoded_format(run)
        begin, end = run.coded[number : number + 2]
        bounce, scratch = self._buffers()
        source = self._read_pages(file, begin, end - begin, bounce)
        count = _weights_of(run, number)
        at = run.image_offset + number * piece_weights(_weights(run)) * want.itemsize
        place = image.tensor[at : at + count * want.itemsize]
        if want is torch.bfloat16:
            self._decode(file, begin, source, place, run.coded_bits)
            return
        words = scratch.tensor[: count * torch.bfloat16.itemsize]
        self._decode(file, begin, source, words, run.coded_bits)
        place.view(want).copy_(words.view(torch.bfloat16))

    def _stage_coded(
        self, file: _WeightFile, run: FileRun, number: int, part: slice, staging: HostBuffer
    ) -> torch.Tensor:
        """Read a coded piece into `staging` and leave a part of its weights there."""
        want = _decoded_format(run)
        begin, end = run.coded[number : number + 2]
        source = self._read_pages(file, begin, end - begin, staging)
        words = self._buffers()[1].tensor[: _weights_of(run, number) * torch.bfloat16.itemsize]
        self._decode(file, begin, source, words, run.coded_bits)
        made = words.view(torch.bfloat16)[part].to(want).view(torch.uint8)
        return staging.tensor[: made.numel()].copy_(made)

    def _rounding_blocks(
        self, file: _WeightFile, run: FileRun, how: RoundedRun, image: HostBuffer
    ) -> Iterator[CopyBlock]:
        """Read some outputs, and put their codes and scales into place."""

        def put(part: slice) -> None:
            bounce = self._bounce_buffer()
            places = (run.image_offset, how.scales_offset)
            made = self._round(file, run, how, part, bounce)
            for start, data in zip(places, made, strict=True):
                at = start + part.start * data.shape[1]
                image.tensor[at : at + data.size].numpy()[:] = data.reshape(-1)

        for part in _outputs(run, how):
            yield CopyBlock(_bytes_of(how, part), partial(put, part))

    def _rounding_pieces(
        self, file: _WeightFile, run: FileRun, how: RoundedRun
    ) -> Iterator[CopyPiece]:
        """The same through staging buffers: each output is read for its codes and its scales."""
        codes, scales = how.code_bytes, how.scale_bytes

        def stage(part: slice, which: int, staging: HostBuffer) -> torch.Tensor:
            made = torch.from_numpy(self._round(file, run, how, part, staging)[which].reshape(-1))
            return staging.tensor[: made.numel()].copy_(made)

        for part in _outputs(run, how):
            for which, (start, each) in enumerate(
                ((run.image_offset, codes), (how.scales_offset, scales))
            ):
                yield CopyPiece(
                    offset=start + part.start * each,
                    image_bytes=(part.stop - part.start) * each,
                    nbytes=0 if which else _bytes_of(how, part),
                    load=partial(stage, part, which),
                )

    def _round(
        self, file: _WeightFile, run: FileRun, how: RoundedRun, part: slice, buffer: HostBuffer
    ) -> tuple[Bytes, Bytes]:
        """Codes [o, bytes] and scales [o, bytes] of some outputs."""
        data = self._numbers(file, run, how, part, buffer).numpy()
        numbers = numbers_of(data, how.dtype).reshape(-1, how.inputs)
        try:
            codes, scales = rounded(numbers, how.bits, how.dtype)
        except NotFiniteError as error:
            raise CheckpointError(
                f"{file.identity.path.name} holds weights that are NaN, infinite or too large to "
                "be rounded: the file is damaged, download it again, or leave --wire out"
            ) from error
        return codes.reshape(len(numbers), -1), scales.reshape(len(numbers), -1)

    def _numbers(
        self, file: _WeightFile, run: FileRun, how: RoundedRun, part: slice, buffer: HostBuffer
    ) -> torch.Tensor:
        """The bytes of some outputs of a weight, decoded if they are coded."""
        start, nbytes = _bytes_of(how, slice(0, part.start)), _bytes_of(how, part)
        if not run.coded:
            return self._read_into(file, replace(run, convert=None), start, nbytes, buffer)
        each = 2 * piece_weights(_weights(run))
        found = []
        for number in range(start // each, -(-(start + nbytes) // each)):
            begin, end = run.coded[number : number + 2]
            words = self._buffers()[1].tensor[: 2 * _weights_of(run, number)]
            source = self._read_pages(file, begin, end - begin, buffer)
            self._decode(file, begin, source, words, run.coded_bits)
            first = max(start - number * each, 0)
            found.append(words[first : start + nbytes - number * each].clone())
        return torch.cat(found)

    def _bounce_buffer(self) -> HostBuffer:
        """A buffer of this thread."""
        found: HostBuffer | None = getattr(self._bounces, "buffer", None)
        if found is None:
            found = self._bounces.buffer = allocate_host(STAGING_BYTES)
        return found

    def _buffers(self) -> tuple[HostBuffer, HostBuffer]:
        """Two buffers of this thread: for what is read, and for what is made of it."""
        found: tuple[HostBuffer, HostBuffer] | None = getattr(self._bounces, "pair", None)
        if found is None:
            found = self._bounces.pair = allocate_host(STAGING_BYTES), allocate_host(STAGING_BYTES)
        return found

    def _read_into(
        self, file: _WeightFile, run: FileRun, start: int, nbytes: int, staging: HostBuffer
    ) -> torch.Tensor:
        """Read whole pages; returns [nbytes] of `staging`, or a copy aligned for the format."""
        source = self._read_pages(file, run.file_offset + start, nbytes, staging)
        return source.clone() if source.data_ptr() % _formats(run)[0].itemsize else source

    def _read_pages(
        self, file: _WeightFile, offset: int, nbytes: int, staging: HostBuffer
    ) -> torch.Tensor:
        """Read whole pages; returns [nbytes] of `staging`."""
        lead = offset % PAGE_BYTES
        room = whole_pages(lead + nbytes)
        self._read(file, staging.view[:room], offset - lead, lead + nbytes)
        return staging.tensor[lead : lead + nbytes]


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


def _staging_for(extent: TensorExtent) -> HostBuffer:
    """A staging buffer for all of a tensor's pieces; a small one of a small tensor.

    The first byte of a large one has the system clear 2 MiB, which takes 0.35 ms, and a quantised
    mixture has tens of thousands of scales that are checked when it is loaded.
    """
    room = STAGING_BYTES if extent.coded else min(STAGING_BYTES, extent.nbytes + 2 * PAGE_BYTES)
    return allocate_host(room)


def _whole(extent: TensorExtent) -> FileRun:
    """All bytes of a tensor, as they are."""
    return FileRun(
        path=extent.path,
        file_offset=extent.offset,
        nbytes=extent.nbytes,
        image_offset=0,
        in_place=False,
        coded=extent.coded,
        coded_bits=extent.coded_bits,
    )


def _cut(run: FileRun, step: int) -> Iterator[tuple[int, int, Kept | None]]:
    """Where parts of a run begin in it, and their bytes: what is checked, and all else in steps."""
    at = 0
    for kept in (*run.kept, None):
        stop = run.nbytes if kept is None else kept.begin - run.file_offset
        for start in range(at, stop, step):
            yield start, min(step, stop - start), None
        if kept is not None:
            at = kept.end - run.file_offset
            yield stop, at - stop, kept


def _outputs(run: FileRun, how: RoundedRun) -> Iterator[slice]:
    """Outputs of a weight, as many at once as a staging buffer takes."""
    each = how.inputs * DTYPE_BYTES[how.dtype]
    step = max(1, PIECE_BYTES // each)
    for start in range(0, run.nbytes // each, step):
        yield slice(start, min(start + step, run.nbytes // each))


def _bytes_of(how: RoundedRun, part: slice) -> int:
    """Of so many outputs, before they are rounded."""
    count: int = part.stop - part.start
    return count * how.inputs * DTYPE_BYTES[how.dtype]


def _decoded_format(run: FileRun) -> torch.dtype:
    """The number format that coded weights, which are bf16, have in their image."""
    found: torch.dtype = torch.bfloat16
    return found if run.convert is None else getattr(torch, run.convert[1])


def _weights_of(run: FileRun, number: int) -> int:
    """Weights in a coded piece: as many as in any other, but for the last."""
    each = piece_weights(_weights(run))
    return min(each, _weights(run) - number * each)


def _weights(run: FileRun) -> int:
    """Of a coded tensor."""
    return run.nbytes // torch.bfloat16.itemsize


@contextmanager
def _damaged(file: _WeightFile) -> Iterator[None]:
    """Say which file a damaged piece is of."""
    try:
        yield
    except DamagedError as error:
        raise CheckpointError(
            f"{file.identity.path.name}: {error}: the file is damaged, pack the model again"
        ) from error


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
