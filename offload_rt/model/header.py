"""Read the header of a safetensors file: which tensor lies at which bytes.

Written against the format text of huggingface/safetensors (README, "Format"); stricter than its
library where that accepts a name twice. Only the header is read, never the tensors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

from offload_rt.errors import CheckpointError
from offload_rt.model.files import (
    FileIdentity,
    OpenFile,
    foreign_format,
    open_inside,
    parse_json_object,
    shown,
)
from offload_rt.units import format_size

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "F8_E8M0": 1,
        "F8_E4M3FNUZ": 1,
        "F8_E5M2FNUZ": 1,
        "U16": 2,
        "I16": 2,
        "F16": 2,
        "BF16": 2,
        "U32": 4,
        "I32": 4,
        "F32": 4,
        "U64": 8,
        "I64": 8,
        "F64": 8,
        "C64": 8,
    }
)

PREFIX_BYTES = 8
_HEADER_LIMIT = 100_000_000  # of the format
_TENSOR_LIMIT = 2**18  # DeepSeek-V3 with its scales has 91,000 in all shards together
_NAME_LIMIT = 1024
_DIMENSION_LIMIT = 16
_KEYS = {"dtype", "shape", "data_offsets"}
_AGAIN = "download it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorExtent:
    """Where one tensor lies.

    Attributes:
        name: as in the file; never to be used as a path.
        dtype: safetensors name, a key of `DTYPE_BYTES`.
        shape: as stored.
        path: the file.
        offset: first byte, counted from the start of the file.
        nbytes: bytes of the tensor, equal to shape times dtype.
        coded: where each coded piece of it begins in the file, and last where they end
            (`formats/planes.py`); empty: it lies there as it is.
        coded_bits: of the code.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    coded: tuple[int, ...] = ()
    coded_bits: int = 0

    @property
    def element_bytes(self) -> int:
        """Bytes of one number."""
        return DTYPE_BYTES[self.dtype]

    @property
    def file_bytes(self) -> int:
        """Bytes it has in the file."""
        return self.coded[-1] - self.coded[0] if self.coded else self.nbytes


def read_header(folder: Path, name: str) -> tuple[FileIdentity, tuple[TensorExtent, ...]]:
    """Read the header of `folder/name`.

    Returns:
        What the file was, and its tensors in the order of their bytes, which they cover without
        holes or overlaps.

    Raises:
        CheckpointError: the file is not a complete, well-formed safetensors file.
    """
    path = folder / name
    with open_inside(folder, name) as file:
        identity = file.identity
        header = header_bytes(file, path)
    return identity, parse_header(header, path, identity.size)


def parse_header(header: bytes, path: Path, size: int) -> tuple[TensorExtent, ...]:
    """Read the text of a header.

    Args:
        header: it, without the eight bytes before it.
        path: of the file.
        size: of the file it describes.

    Raises:
        CheckpointError: it does not describe a file of that size.
    """
    entries = parse_json_object(header, f"the header of {path}")
    _check_metadata(entries.pop("__metadata__", None), path)
    if len(entries) > _TENSOR_LIMIT:
        raise CheckpointError(
            f"{path} lists {len(entries)} tensors, accepted is up to {_TENSOR_LIMIT}: {_AGAIN}"
        )
    start = PREFIX_BYTES + len(header)
    extents = [_extent(path, start, tensor, entry) for tensor, entry in entries.items()]
    extents.sort(key=lambda extent: (extent.offset, extent.nbytes))
    _check_cover(path, extents, start, size)
    return tuple(extents)


def header_bytes(file: OpenFile, path: Path) -> bytes:
    """The text of the header that a file begins with.

    Raises:
        CheckpointError: it begins with none.
    """
    size = file.identity.size
    head = file.read(64)
    length = int.from_bytes(head[:PREFIX_BYTES], "little")
    starts_well = head[PREFIX_BYTES : PREFIX_BYTES + 1] == b"{"
    if not (starts_well and length <= _HEADER_LIMIT):
        raise CheckpointError(f"{path} {_why_not_safetensors(head, size, length)}")
    if PREFIX_BYTES + length > size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header alone needs {PREFIX_BYTES + length}: "
            f"the download is not complete, {_AGAIN}"
        )
    header = file.read(length, PREFIX_BYTES)
    if len(header) < length:
        raise CheckpointError(f"{path} became shorter while it was read: wait for its download")
    return header


def _why_not_safetensors(head: bytes, size: int, length: int) -> str:
    if size <= PREFIX_BYTES:
        return f"has {size} bytes, too few for a safetensors file: {_AGAIN}"
    if kind := foreign_format(head):
        return kind
    if not any(head):
        return f"starts with zeros: its download of {format_size(size)} is not complete, {_AGAIN}"
    if head.lstrip()[:1] in (b"{", b"["):
        return f"is JSON text, not weights: {_AGAIN}"
    if length > _HEADER_LIMIT:
        return (
            f"gives its header {length} bytes, accepted is up to {_HEADER_LIMIT}: "
            f"it is not a safetensors file, {_AGAIN}"
        )
    first = head[PREFIX_BYTES : PREFIX_BYTES + 1]
    return f"has a header that starts with {first!r} instead of b'{{': {_AGAIN}"


def _check_metadata(metadata: object, path: Path) -> None:
    # some writers put null, which the library accepts too (safetensors issue 823)
    if metadata is None:
        return
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts:
        raise CheckpointError(f"{path} has a __metadata__ that is not text by name: {_AGAIN}")


def _extent(path: Path, start: int, name: str, entry: object) -> TensorExtent:
    where = f"{path}, tensor {shown(name)},"
    if not 1 <= len(name) <= _NAME_LIMIT:
        raise CheckpointError(
            f"{where} has a name of {len(name)} characters, accepted is 1 to {_NAME_LIMIT}"
        )
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        found = ", ".join(shown(key) for key in entry) if isinstance(entry, dict) else shown(entry)
        raise CheckpointError(
            f"{where} is described by {found[:200]} instead of dtype, shape, data_offsets: {_AGAIN}"
        )
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{where} has dtype {shown(dtype)}, known are {', '.join(DTYPE_BYTES)}: "
            "get the model as BF16, F16 or F32"
        )
    shape = _shape(entry["shape"], where)
    begin, end = _offsets(entry["data_offsets"], where)
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if needed != end - begin:
        raise CheckpointError(
            f"{where} has shape {list(shape)} of {dtype}, {shown(needed)} bytes, but its "
            f"data_offsets span {end - begin}: {_AGAIN}"
        )
    return TensorExtent(
        name=name, dtype=dtype, shape=shape, path=path, offset=start + begin, nbytes=needed
    )


def _shape(value: object, where: str) -> tuple[int, ...]:
    shape = _whole_numbers(value)
    if shape is None or len(shape) > _DIMENSION_LIMIT:
        raise CheckpointError(
            f"{where} has a shape of {_listed(value)}, accepted are up to {_DIMENSION_LIMIT} "
            f"whole numbers from 0 to 2^63 - 1: {_AGAIN}"
        )
    return shape


def _offsets(value: object, where: str) -> tuple[int, int]:
    offsets = _whole_numbers(value)
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where} has data_offsets of {_listed(value)}, accepted are a begin and an end: "
            f"{_AGAIN}"
        )
    return offsets[0], offsets[1]


def _whole_numbers(value: object) -> tuple[int, ...] | None:
    """The list as a tuple when all of it are sizes; `bool` is an `int` in Python but not a size."""
    if isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value):
        return tuple(value)
    return None


def _listed(value: object) -> str:
    if isinstance(value, list) and len(value) <= 4:
        return f"[{', '.join(shown(item) for item in value)}]"
    return shown(value)


def _check_cover(path: Path, extents: list[TensorExtent], start: int, size: int) -> None:
    """Refuse holes, overlaps, a cut end and a tail; `extents` are sorted by offset."""
    promised = max((e.offset + e.nbytes for e in extents), default=start)
    if promised > size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header promises {promised}: the download is not "
            f"complete ({format_size(promised - size)} are missing), {_AGAIN}"
        )
    if promised < size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header describes {promised}: {size - promised} bytes "
            f"belong to no tensor, {_AGAIN}"
        )
    if extents and extents[0].offset != start:
        raise CheckpointError(
            f"{path} has {extents[0].offset - start} bytes before its first tensor: {_AGAIN}"
        )
    for one, following in pairwise(extents):
        gap = following.offset - (one.offset + one.nbytes)
        if gap:
            what = f"leave a hole of {gap}" if gap > 0 else f"overlap by {-gap}"
            raise CheckpointError(
                f"{path}: tensors {shown(one.name)} and {shown(following.name)} {what} bytes: "
                f"{_AGAIN}"
            )
