"""Write the folder of a model whose layers are rounded: `offload-run pack --wire int4`.

It is a compressed-tensors folder (`pack-quantized`, symmetric integers, groups of 32 inputs), which
other programs read, too. Each file of the model becomes one of the same name; each is gone through
once, some outputs of a weight at a time. Names are given at the end, as `packer.py` does. No torch
here.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model.checkpoint import Checkpoint, TensorExtent
from offload_rt.model.files import OpenFile, open_inside, read_json_object
from offload_rt.model.formats.rounding import Bytes, NotFiniteError, numbers_of, rounded
from offload_rt.model.formats.stored import Stored
from offload_rt.model.header import PREFIX_BYTES, read_header
from offload_rt.model.layout import CODES_PART, GROUP, SCALES_PART
from offload_rt.model.packer import (
    PIECE_BYTES,
    Packed,
    Poll,
    bytes_to_pack,
    changed,
    check_room,
    check_unchanged,
    copy_others,
    in_order,
    working,
    write,
)
from offload_rt.model.shards import INDEX
from offload_rt.model.wire import BITS
from offload_rt.writing import give_names, temporary_folder, writing

_CONFIG = "config.json"
_CONFIG_LIMIT_BYTES, _INDEX_LIMIT_BYTES = 4 * 2**20, 64 * 2**20
_SHAPE_PART = "weight_shape"
_HEADER_ALIGN = 64

# Name, number format, shape and bytes of a tensor that is written.
_Written = tuple[str, str, tuple[int, ...], int]


def write_rounded(checkpoint: Checkpoint, output: Path, poll: Poll) -> Packed:
    """Write a folder of rounded weights.

    Args:
        checkpoint: from `wire.wired`, of files that are not packed.
        output: an empty folder.
        poll: called with the bytes that were read, file after file.

    Raises:
        ConfigError: it could not be written, or there is no room.
        CheckpointError: a file changed while it was read, or holds what cannot be rounded.
    """
    by_source = {s.source.name: s for s in checkpoint.stored.values() if s.source}
    less = sum(each.file_bytes - each.nbytes for each in by_source.values())
    check_room(output, bytes_to_pack(checkpoint) - less)
    names = sorted(path.name for path in checkpoint.files)
    places, sizes = dict[str, str](), [0, 0]
    with temporary_folder(output) as made, working() as workers:
        for name in names:
            file = _File(checkpoint.folder, name, by_source, workers, poll)
            places |= dict.fromkeys(file.write(made), name)
            sizes[0] += file.identity.size
            sizes[1] += (made / name).stat().st_size
        others = copy_others(checkpoint.folder, made, (_CONFIG, INDEX))
        last = [_CONFIG]
        _write_json(made / _CONFIG, _config(checkpoint))
        if (checkpoint.folder / INDEX).exists():
            _write_json(made / INDEX, _index(checkpoint.folder, places, sizes[1]))
            last.append(INDEX)
        give_names(made, output, [*others, *names, *last])
    return Packed(files=len(names), original_bytes=sizes[0], packed_bytes=sizes[1])


class _File:
    """Rounds the weights of one file."""

    def __init__(
        self,
        folder: Path,
        name: str,
        by_source: dict[str, Stored],
        workers: ThreadPoolExecutor,
        poll: Poll,
    ) -> None:
        self._folder, self._name, self._by_source = folder, name, by_source
        self._workers, self._poll = workers, poll
        self.identity, self._extents = read_header(folder, name)

    def write(self, made: Path) -> list[str]:
        """Write it anew; returns the names of its tensors."""
        header, starts = _header(list(self._tensors()))
        target = made / self._name
        with open_inside(self._folder, self._name) as source, writing(target):
            if source.identity != self.identity:
                raise changed(self._folder / self._name)
            with open(target, "xb", buffering=0) as file:
                write(file.fileno(), header, 0)
                for extent in self._extents:
                    stored = self._by_source.get(extent.name)
                    if stored is None:
                        self._copy(source, extent, file.fileno(), starts[extent.name])
                    else:
                        self._round(source, extent, stored, file.fileno(), starts)
                os.fsync(file.fileno())
            check_unchanged(self._folder / self._name, source)
        self._poll(self.identity.size - sum(extent.nbytes for extent in self._extents))
        return list(starts)

    def _tensors(self) -> Iterator[_Written]:
        """What is written: last the shapes, whose few bytes would leave others unaligned."""
        for extent in self._extents:
            stored = self._by_source.get(extent.name)
            parts = [extent] if stored is None else list(stored.parts.values())
            for part in parts:
                yield part.name, part.dtype, part.shape, part.nbytes
        mine = [self._by_source[e.name] for e in self._extents if e.name in self._by_source]
        for weight in mine:
            yield f"{weight.module}.{_SHAPE_PART}", "I64", (2,), 16

    def _copy(self, source: OpenFile, extent: TensorExtent, handle: int, at: int) -> None:
        for offset in range(0, extent.nbytes, PIECE_BYTES):
            size = min(PIECE_BYTES, extent.nbytes - offset)
            write(handle, self._read(source, extent.offset + offset, size), at + offset)
            self._poll(size)

    def _round(
        self,
        source: OpenFile,
        extent: TensorExtent,
        stored: Stored,
        handle: int,
        starts: dict[str, int],
    ) -> None:
        shape = np.array([stored.outputs, stored.inputs], "<i8")
        write(handle, shape.tobytes(), starts[f"{stored.module}.{_SHAPE_PART}"])
        codes, scales = (starts[f"{stored.module}.{word}"] for word in (CODES_PART, SCALES_PART))
        each = stored.inputs * extent.element_bytes
        step = max(1, PIECE_BYTES // each) * each
        sizes = [min(step, extent.nbytes - at) for at in range(0, extent.nbytes, step)]
        pieces = (
            self._read(source, extent.offset + number * step, size)
            for number, size in enumerate(sizes)
        )
        work = partial(_rounded, stored=stored, dtype=extent.dtype)
        try:
            for size, made in zip(sizes, in_order(self._workers, work, pieces), strict=True):
                write(handle, made[0].data, codes)
                write(handle, made[1].data, scales)
                codes, scales = codes + made[0].size, scales + made[1].size
                self._poll(size)
        except NotFiniteError as error:
            raise CheckpointError(
                f"{extent.name} in {self._folder / self._name} holds weights that are NaN, "
                "infinite or too large to be rounded: download it again"
            ) from error

    def _read(self, source: OpenFile, at: int, size: int) -> bytes:
        data = source.read(size, at)
        if len(data) < size:
            raise changed(self._folder / self._name)
        return data


def _rounded(data: bytes, *, stored: Stored, dtype: str) -> tuple[Bytes, Bytes]:
    numbers = numbers_of(np.frombuffer(data, np.uint8), dtype).reshape(-1, stored.inputs)
    return rounded(numbers, stored.bits, dtype)


def _header(tensors: Sequence[_Written]) -> tuple[bytes, dict[str, int]]:
    """The header of a file with such tensors behind each other, and where each begins."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, offsets = 0, dict[str, int]()
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        offsets[name] = at
        at += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(PREFIX_BYTES + len(text)) % _HEADER_ALIGN)
    whole = len(text).to_bytes(PREFIX_BYTES, "little") + text
    return whole, {name: len(whole) + at for name, at in offsets.items()}


def _config(checkpoint: Checkpoint) -> dict[str, object]:
    """The model's `config.json`, with what is said of its weights."""
    if checkpoint.rounded is None:
        raise ConfigError(f"{checkpoint.name} is not rounded")
    kept = {
        extent.name.rpartition(".")[0]
        for group in (*checkpoint.layers, checkpoint.left_out)
        for extent in group
        if len(extent.shape) == 2 and extent.name not in checkpoint.stored
    }
    weights = {
        "num_bits": BITS[checkpoint.rounded],
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP,
    }
    stated = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": sorted({*checkpoint.family.heads, "lm_head", *kept}),
    }
    raw = read_json_object(checkpoint.folder, _CONFIG, _CONFIG_LIMIT_BYTES, lenient=True)
    return raw | {"quantization_config": stated}


def _index(folder: Path, places: dict[str, str], nbytes: int) -> dict[str, object]:
    raw = read_json_object(folder, INDEX, _INDEX_LIMIT_BYTES)
    return raw | {"metadata": {"total_size": nbytes}, "weight_map": places}


def _write_json(path: Path, value: object) -> None:
    with writing(path):
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
