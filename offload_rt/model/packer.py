"""Pack the bf16 weights of a model folder without loss, and unpack them to the very same files.

Both go through a file once, in pieces: what is read is hashed in its order, coded or decoded in
threads, and written in its order, so memory holds a few pieces whatever the model's size. All is
written in a temporary folder inside the output and gets its names at the end, what makes a model
of a folder last. So a run that is cut off anywhere leaves nothing that loads. No torch here.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model.adapter import WEIGHTS
from offload_rt.model.checkpoint import Checkpoint, TensorExtent
from offload_rt.model.files import FileIdentity, OpenFile, open_inside
from offload_rt.model.formats.methods import CODED_BITS
from offload_rt.model.formats.planes import Bytes, DamagedError, decode, encode
from offload_rt.model.gguf.folder import refuse_gguf
from offload_rt.model.header import PREFIX_BYTES, header_bytes, parse_header
from offload_rt.model.packed_files import (
    CODED_DTYPE,
    MANIFEST,
    PIECE_WEIGHTS,
    SMALLEST_WEIGHTS,
    SUFFIX,
    PackedFile,
    aligned,
    is_packed,
    manifest_object,
    piece_weights,
    read_manifest,
    read_packed_header,
)
from offload_rt.model.shards import INDEX, PICKLES
from offload_rt.units import format_size
from offload_rt.writing import give_names, replacing, temporary_folder, writing

PIECE_BYTES = 2 * PIECE_WEIGHTS  # that are read at once
_AHEAD = 2  # pieces for each thread that wait to be written
_THREADS = 4
_NOT_COPIED = (".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", SUFFIX, *PICKLES)
_BESIDE = frozenset({"medusa_lm_head.safetensors", WEIGHTS})  # heads and adapters, not the model
_FOLDERS = ("additional_chat_templates",)
_SHARE = 0.76  # of bf16 bytes, at most, for trained weights

Poll = Callable[[int], None]  # called with bytes that are done; may raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What packing or unpacking made.

    Attributes:
        files: weight files.
        original_bytes: of the safetensors files.
        packed_bytes: of the packed ones.
    """

    files: int
    original_bytes: int
    packed_bytes: int


def check_packable(checkpoint: Checkpoint) -> None:
    """Refuse models that packing would not make smaller.

    Raises:
        ConfigError: it is packed, quantised, not of bf16, or in GGUF files.
    """
    name = checkpoint.name
    refuse_gguf(checkpoint.folder, "and safetensors files are packed")
    if is_packed(checkpoint.folder):
        raise ConfigError(f"{name} is packed already: use it as it is, or `offload-run unpack` it")
    if checkpoint.config.quantised is not None:
        raise ConfigError(
            f"{name} is quantised ({checkpoint.config.quantised.name}): only bf16 weights are "
            "packed, use it as it is"
        )
    coded = sum(e.nbytes for e in checkpoint.tensors.values() if _is_coded(e))
    if 2 * coded < checkpoint.total_bytes:
        dtypes = sorted({extent.dtype for extent in checkpoint.tensors.values()})
        raise ConfigError(
            f"{name} has weights of {', '.join(dtypes)}, of which {format_size(coded)} of "
            f"{format_size(checkpoint.total_bytes)} are large bf16 tensors: only those are packed"
        )


def bytes_to_pack(checkpoint: Checkpoint) -> int:
    """Bytes of the files that are read."""
    return sum(identity.size for identity in checkpoint.files.values())


def bytes_to_unpack(folder: Path) -> int:
    """Bytes of the files that are written.

    Raises:
        ConfigError: the folder is not packed.
    """
    if not is_packed(folder):
        raise ConfigError(f"{folder} is not packed (it has no {MANIFEST}): use it as it is")
    return sum(each.original_bytes for each in read_manifest(folder))


def pack(checkpoint: Checkpoint, output: Path, poll: Poll, bits: int = CODED_BITS) -> Packed:
    """Write a packed folder.

    Args:
        checkpoint: headers of the model.
        output: an empty folder.
        poll: called with the bytes that were read, file after file.
        bits: of the code, whole ones.

    Raises:
        ConfigError: it could not be written, or there is no room.
        CheckpointError: a file changed while it was read.
    """
    names = sorted(path.name for path in checkpoint.files)
    check_room(output, int(_SHARE * bytes_to_pack(checkpoint)))
    with temporary_folder(output) as made, working() as workers:
        packed = tuple(
            _Packing(checkpoint.folder, name, made, workers, poll, bits).run() for name in names
        )
        others = copy_others(checkpoint.folder, made)
        give_names(made, output, [*(each.packed_name for each in packed), *others])
        with replacing(output / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest_object(packed)), encoding="utf-8")
    return _summary(packed)


def unpack(folder: Path, output: Path, poll: Poll) -> Packed:
    """Write the folder that a packed one was made from.

    Args:
        folder: with a manifest.
        output: an empty folder.
        poll: called with the bytes that were written, file after file.

    Raises:
        ConfigError: it could not be written, or there is no room.
        CheckpointError: what is packed is damaged; nothing is left of it then.
    """
    packed = read_manifest(folder)
    check_room(output, sum(each.original_bytes for each in packed))
    with temporary_folder(output) as made, working() as workers:
        for each in packed:
            _Unpacking(folder, each, made, workers, poll).run()
        others = copy_others(folder, made)
        last = [name for name in others if name == INDEX]
        first = [name for name in others if name != INDEX]
        give_names(made, output, [*first, *(each.original_name for each in packed), *last])
    return _summary(packed)


class _Packing:
    """Packs one file."""

    def __init__(
        self,
        folder: Path,
        name: str,
        made: Path,
        workers: ThreadPoolExecutor,
        poll: Poll,
        bits: int,
    ) -> None:
        self._folder, self._name, self._made = folder, name, made
        self._workers, self._poll, self._bits = workers, poll, bits
        self._digest = hashlib.sha256()

    def run(self) -> PackedFile:
        """Read it once, write what is packed."""
        path = self._folder / self._name
        stem = self._name.removesuffix(".safetensors")
        target = self._made / f"{stem}{SUFFIX}"
        with open_inside(self._folder, self._name) as source, writing(target):
            text = header_bytes(source, path)
            extents = parse_header(text, path, source.identity.size)
            head = len(text).to_bytes(PREFIX_BYTES, "little") + text
            self._digest.update(head)
            starts, end = _plain_starts(extents, len(head))
            with open(target, "xb", buffering=0) as file:
                write(file.fileno(), head, 0)
                self._poll(len(head))
                for extent in extents:
                    if _is_coded(extent):
                        starts[extent.name] = self._coded(source, extent, file.fileno(), end)
                        end = starts[extent.name][-1]
                    else:
                        self._plain(source, extent, file.fileno(), starts[extent.name][0])
                os.ftruncate(file.fileno(), end)
                os.fsync(file.fileno())
            check_unchanged(path, source)
        return PackedFile(
            stem=stem,
            original_bytes=source.identity.size,
            sha256=self._digest.hexdigest(),
            packed_bytes=end,
            bits=self._bits,
            starts={extent.name: tuple(starts[extent.name]) for extent in extents},
        )

    def _plain(self, source: OpenFile, extent: TensorExtent, handle: int, at: int) -> None:
        for offset, data in self._read(source, extent):
            write(handle, data, at + offset)

    def _coded(
        self, source: OpenFile, extent: TensorExtent, handle: int, start: int
    ) -> tuple[int, ...]:
        """Append a tensor; returns where its pieces begin, and last where they end."""
        starts = [start]
        nbytes = piece_weights(_weights(extent)) * extent.element_bytes
        pieces = (data for _, data in self._read(source, extent, nbytes))
        for piece in in_order(self._workers, partial(_encoded, self._bits), pieces):
            write(handle, piece.data, starts[-1])
            starts.append(starts[-1] + piece.size)
        return tuple(starts)

    def _read(
        self, source: OpenFile, extent: TensorExtent, nbytes: int = PIECE_BYTES
    ) -> Iterator[tuple[int, bytes]]:
        """The bytes of a tensor in parts, hashed."""
        for offset in range(0, extent.nbytes, nbytes):
            size = min(nbytes, extent.nbytes - offset)
            data = source.read(size, extent.offset + offset)
            if len(data) < size:
                raise changed(self._folder / self._name)
            self._digest.update(data)
            yield offset, data
            self._poll(size)


class _Unpacking:
    """Unpacks one file."""

    def __init__(
        self, folder: Path, packed: PackedFile, made: Path, workers: ThreadPoolExecutor, poll: Poll
    ) -> None:
        self._folder, self._packed, self._made = folder, packed, made
        self._workers, self._poll = workers, poll
        self._digest = hashlib.sha256()

    def run(self) -> None:
        """Write the original, and compare it with what it was."""
        packed = self._packed
        target = self._made / packed.original_name
        _, head, original, here = read_packed_header(self._folder, packed)
        with (
            open_inside(self._folder, packed.packed_name) as source,
            writing(target),
            open(target, "xb", buffering=0) as file,
        ):
            self._add(file.fileno(), head, 0)
            for before, now in zip(original, here, strict=True):
                at = before.offset
                for data in self._tensor(source, now):
                    self._add(file.fileno(), data, at)
                    at += len(data)
            os.fsync(file.fileno())
        if self._digest.hexdigest() != packed.sha256:
            raise CheckpointError(
                f"{self._folder / packed.packed_name} gives {packed.original_name} back with "
                f"SHA-256 {self._digest.hexdigest()}, {MANIFEST} has {packed.sha256}: it is "
                "damaged, take another copy"
            )

    def _add(self, handle: int, data: bytes, at: int) -> None:
        self._digest.update(data)
        write(handle, data, at)
        self._poll(len(data))

    def _tensor(self, source: OpenFile, extent: TensorExtent) -> Iterator[bytes]:
        """The bytes of a tensor in parts."""
        if not extent.coded:
            for offset in range(0, extent.nbytes, PIECE_BYTES):
                size = min(PIECE_BYTES, extent.nbytes - offset)
                yield self._part(source, extent.offset + offset, size)
            return
        each = piece_weights(_weights(extent))
        pieces = (
            (self._part(source, begin, end - begin), min(each, _weights(extent) - number * each))
            for number, (begin, end) in enumerate(pairwise(extent.coded))
        )
        try:
            yield from in_order(self._workers, _decoded, pieces)
        except DamagedError as error:
            raise CheckpointError(
                f"{self._folder / self._packed.packed_name}: {error}: it is damaged, take another "
                "copy"
            ) from error

    def _part(self, source: OpenFile, at: int, size: int) -> bytes:
        data = source.read(size, at)
        if len(data) < size:
            raise changed(self._folder / self._packed.packed_name)
        return data


def _is_coded(extent: TensorExtent) -> bool:
    return extent.dtype == CODED_DTYPE and _weights(extent) >= SMALLEST_WEIGHTS


def _weights(extent: TensorExtent) -> int:
    return extent.nbytes // extent.element_bytes


def _plain_starts(
    extents: Sequence[TensorExtent], head_bytes: int
) -> tuple[dict[str, Sequence[int]], int]:
    """Where tensors begin that stay as they are, behind the header; and where coded ones may."""
    starts: dict[str, Sequence[int]] = {}
    end = aligned(head_bytes)
    for extent in extents:
        if not _is_coded(extent):
            end = -(-end // extent.element_bytes) * extent.element_bytes
            starts[extent.name] = [end]
            end += extent.nbytes
    return starts, aligned(end)


def _encoded(bits: int, data: bytes) -> Bytes:
    """A piece, decoded once to see that it gives the same back."""
    words = np.frombuffer(data, np.uint16)
    piece, again = encode(words, bits), np.empty_like(words)
    decode(piece, again)
    assert np.array_equal(words, again)
    return piece


def _decoded(piece: tuple[bytes, int]) -> bytes:
    data, count = piece
    words = np.empty(count, np.uint16)
    decode(np.frombuffer(data, np.uint8), words)
    return words.tobytes()


@contextmanager
def working() -> Iterator[ThreadPoolExecutor]:
    """Threads; what was not begun is dropped when the body fails."""
    workers = ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0))), "packer")
    try:
        yield workers
    finally:
        workers.shutdown(cancel_futures=True)


def in_order(
    workers: ThreadPoolExecutor, work: Callable[[Any], Any], given: Iterator[Any]
) -> Iterator[Any]:
    """Results of all, in their order, a few of them ahead."""
    waiting = deque[Future[Any]]()
    for each in given:
        waiting.append(workers.submit(work, each))
        if len(waiting) > _AHEAD * _THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def write(handle: int, data: bytes | memoryview, at: int) -> None:
    """Put all bytes into an open file, from a place on."""
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, at)
        view, at = view[done:], at + done


def check_unchanged(path: Path, source: OpenFile) -> None:
    """Raise `changed` if a file is not what it was when it was opened."""
    if FileIdentity.of(path, os.fstat(source.fd)) != source.identity:
        raise changed(path)


def changed(path: Path) -> CheckpointError:
    """What is said of a file that was written to while it was read."""
    return CheckpointError(
        f"{path} changed while it was read: start again when nothing writes to {path.parent}"
    )


def check_room(output: Path, needed: int) -> None:
    """Refuse before minutes of work what would not fit."""
    free = shutil.disk_usage(output).free
    if needed > free:
        raise ConfigError(
            f"the files will have about {format_size(needed)}, {format_size(free)} is free in "
            f"{output}: make room, or give a folder on another disk"
        )


def copy_others(folder: Path, made: Path, without: Sequence[str] = ()) -> list[str]:
    """Copy what of a model folder is not weights, but for some; returns the names."""
    names = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        wanted = entry.name in _BESIDE or not entry.name.endswith(_NOT_COPIED)
        if entry.name in (MANIFEST, *without) or entry.name.startswith(".") or not wanted:
            continue
        if entry.is_file():
            _copy(folder, entry.name, made)
            names.append(entry.name)
        elif entry.is_dir() and entry.name in _FOLDERS:
            (made / entry.name).mkdir()
            for inner in sorted(os.listdir(entry.path)):
                _copy(folder, f"{entry.name}/{inner}", made)
            names.append(entry.name)
    return names


def _copy(folder: Path, name: str, made: Path) -> None:
    target = made / name
    with open_inside(folder, name) as source, writing(target), open(target, "xb") as file:
        at = 0
        while data := source.read(PIECE_BYTES, at):
            file.write(data)
            at += len(data)
        file.flush()
        os.fsync(file.fileno())


def _summary(files: Sequence[PackedFile]) -> Packed:
    return Packed(
        files=len(files),
        original_bytes=sum(each.original_bytes for each in files),
        packed_bytes=sum(each.packed_bytes for each in files),
    )
