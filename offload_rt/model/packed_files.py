"""Packed model folders: bf16 weights in 12 or 10.75 bits, with all that unpacking needs.

Beside the small files of the model there is, for each of its safetensors files, one that ends in
`.packed`: the original's own header, then its tensors, those of bf16 coded in pieces
(`formats/planes.py`), the others as they are. The manifest, which is written last, says where each
lies, and has sizes and SHA-256 of the originals. Without a manifest nothing is a packed folder, and
no other program takes one for a model.

Everything is checked before a weight is read: a manifest is data from a stranger, as headers are.
No torch here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model.files import FileIdentity, open_inside, read_json_object, shown
from offload_rt.model.formats.methods import CODED_BITS, NESTED_BITS
from offload_rt.model.gguf.folder import refuse_gguf
from offload_rt.model.header import PREFIX_BYTES, TensorExtent, header_bytes, parse_header

MANIFEST = "offload_rt_packed.json"
SUFFIX = ".packed"
FORMAT = "offload_rt packed bf16"
CODED_DTYPE = "BF16"
NAMED: Mapping[str, int] = MappingProxyType({"12": CODED_BITS, "10.75": NESTED_BITS})  # codes
_VERSIONS: Mapping[int, int] = MappingProxyType({1: CODED_BITS, 2: NESTED_BITS})
PIECE_WEIGHTS = 2**21  # of a piece, at most: 4 MiB of bf16, which is what readers read at once
PIECE_ALIGN_BYTES = 64
# Coded are tensors of so many weights; smaller ones of a layer lie side by side and are read in one
# go. Of a model's bytes they are less than a thousandth.
SMALLEST_WEIGHTS = 2**16
# Of a weight of trained matrices that is coded: 12 bits, and three bytes for one in a thousand, as
# many as are escapes (docs/RESULTS.md, "bf16 from disk in 12 bits"); in nested planes as measured
# ("Fewer bytes on a GPU, simulated").
_EXPECTED_BYTES: Mapping[int, float] = MappingProxyType({CODED_BITS: 1.503, NESTED_BITS: 1.346})
_LIMIT_BYTES = 64 * 2**20
_FILES_LIMIT = 2**12
_STEM = re.compile(r"[A-Za-z0-9._-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_BYTES = 2**50
_AGAIN = "pack the model again"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """What a manifest says of one file.

    Attributes:
        stem: name of the original without `.safetensors`, and of the packed one without `.packed`.
        original_bytes: of the original.
        sha256: of the original.
        packed_bytes: of the packed one.
        bits: of its code, the same in all files of a folder.
        starts: where each tensor begins in that; of a coded one where its pieces begin, and last
            where they end.
    """

    stem: str
    original_bytes: int
    sha256: str
    packed_bytes: int
    bits: int
    starts: Mapping[str, tuple[int, ...]]

    @property
    def original_name(self) -> str:
        """Of the file it was made from."""
        return f"{self.stem}.safetensors"

    @property
    def packed_name(self) -> str:
        """Of the file in the packed folder."""
        return f"{self.stem}{SUFFIX}"


def piece_weights(weights: int) -> int:
    """Weights of each piece of a tensor of so many, but for the last."""
    pieces = max(1, -(-weights // PIECE_WEIGHTS))
    return -(-weights // (pieces * PIECE_ALIGN_BYTES)) * PIECE_ALIGN_BYTES


def code_name(bits: int) -> str:
    """What a code is called."""
    return next(name for name, each in NAMED.items() if each == bits)


def expected_pieces(weights: int, bits: int) -> tuple[int, ...]:
    """Where the pieces of a trained bf16 tensor would begin if it were packed, and where they end.

    Only the beginning where it is too small to be coded.
    """
    if weights < SMALLEST_WEIGHTS:
        return (0,)
    each = piece_weights(weights)
    sizes = (min(each, weights - start) for start in range(0, weights, each))
    nbytes = [aligned(int(count * _EXPECTED_BYTES[bits]) + PIECE_ALIGN_BYTES) for count in sizes]
    return tuple(sum(nbytes[:number]) for number in range(len(nbytes) + 1))


def aligned(size: int) -> int:
    """A size filled up to whole multiples of that of pieces and their parts."""
    return -(-size // PIECE_ALIGN_BYTES) * PIECE_ALIGN_BYTES


def read_manifest(folder: Path) -> tuple[PackedFile, ...]:
    """Read what a packed folder says of its files.

    Raises:
        CheckpointError: it is no manifest that this version writes.
    """
    where = folder / MANIFEST
    raw = read_json_object(folder, MANIFEST, _LIMIT_BYTES)
    version = raw.get("version")
    if raw.get("format") != FORMAT or type(version) is not int or version not in _VERSIONS:
        raise CheckpointError(
            f"{where} is of format {shown(raw.get('format'))}, version {shown(version)}, read is "
            f"{FORMAT!r}, version 1 or 2: {_AGAIN} with this version"
        )
    files = raw.get("files")
    if not isinstance(files, list) or not 0 < len(files) <= _FILES_LIMIT:
        raise CheckpointError(f"{where} has files of {shown(files)} instead of a list: {_AGAIN}")
    found = tuple(_file(where, entry, _VERSIONS[version]) for entry in files)
    if len({each.stem for each in found}) < len(found):
        raise CheckpointError(f"{where} names a file twice: {_AGAIN}")
    return found


def manifest_object(files: tuple[PackedFile, ...]) -> dict[str, object]:
    """The same as an object of JSON."""
    return {
        "format": FORMAT,
        "version": next(v for v, bits in _VERSIONS.items() if bits == files[0].bits),
        "files": [
            {
                "stem": each.stem,
                "original_bytes": each.original_bytes,
                "sha256": each.sha256,
                "packed_bytes": each.packed_bytes,
                "starts": {name: list(starts) for name, starts in each.starts.items()},
            }
            for each in files
        ],
    }


def read_packed_header(
    folder: Path, packed: PackedFile
) -> tuple[FileIdentity, bytes, tuple[TensorExtent, ...], tuple[TensorExtent, ...]]:
    """Read the header of a packed file.

    Returns:
        What the file was; the header of the original with the eight bytes before it; the tensors as
        they lie in the original, which is not there; and as they lie in this file, in that order.

    Raises:
        CheckpointError: file and manifest contradict each other or themselves.
    """
    path = folder / packed.packed_name
    with open_inside(folder, packed.packed_name) as file:
        identity = file.identity
        text = header_bytes(file, path)
    if identity.size != packed.packed_bytes:
        raise CheckpointError(
            f"{path} has {identity.size} bytes, {MANIFEST} says {packed.packed_bytes}: copy it "
            f"again, or {_AGAIN}"
        )
    original = parse_header(text, path, packed.original_bytes)
    if {extent.name for extent in original} != packed.starts.keys():
        raise CheckpointError(
            f"{path} has a header of {len(original)} tensors, {MANIFEST} has {len(packed.starts)} "
            f"or others: {_AGAIN}"
        )
    here = tuple(_placed(extent, packed, path) for extent in original)
    start = PREFIX_BYTES + len(text)
    for one, following in pairwise(sorted(here, key=lambda extent: extent.offset)):
        if one.offset + one.file_bytes > following.offset:
            raise CheckpointError(
                f"{path}: {shown(one.name)} and {shown(following.name)} overlap: {_AGAIN}"
            )
    first = min((extent.offset for extent in here), default=start)
    last = max((extent.offset + extent.file_bytes for extent in here), default=start)
    if first < start or last > identity.size:
        raise CheckpointError(
            f"{path}: tensors lie at bytes {first} to {last} of {start} to {identity.size}: "
            f"{_AGAIN}"
        )
    return identity, len(text).to_bytes(PREFIX_BYTES, "little") + text, original, here


def is_packed(folder: Path) -> bool:
    """Whether a folder has a manifest."""
    return (folder / MANIFEST).is_file()


def refuse_packed(folder: Path, why: str) -> None:
    """Refuse a packed folder, or GGUF files, where transformers would read the model.

    Raises:
        ConfigError: it is one.
    """
    refuse_gguf(folder, why)
    if is_packed(folder):
        raise ConfigError(f"{shown(folder.name)} is packed, {why}: `offload-run unpack` it first")


def _file(where: Path, entry: object, bits: int) -> PackedFile:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} describes a file by {shown(entry)}: {_AGAIN}")
    stem, sha256, starts = (entry.get(key) for key in ("stem", "sha256", "starts"))
    sizes = [entry.get(key) for key in ("original_bytes", "packed_bytes")]
    named = isinstance(stem, str) and _STEM.fullmatch(stem)
    digest = isinstance(sha256, str) and _SHA256.fullmatch(sha256)
    if not (named and digest and isinstance(starts, dict) and all(map(_is_size, sizes))):
        raise CheckpointError(
            f"{where} says of a file stem {shown(stem)}, sha256 {shown(sha256)}, bytes "
            f"{shown(sizes[0])} and {shown(sizes[1])}: {_AGAIN}"
        )
    return PackedFile(
        stem=str(stem),
        original_bytes=int(str(sizes[0])),
        sha256=str(sha256),
        packed_bytes=int(str(sizes[1])),
        bits=bits,
        starts={name: _starts(where, name, found) for name, found in starts.items()},
    )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_BYTES


def _starts(where: Path, name: str, found: object) -> tuple[int, ...]:
    if not isinstance(found, list) or not found or not all(map(_is_size, found)):
        raise CheckpointError(f"{where} places {shown(name)} at {shown(found)}: {_AGAIN}")
    return tuple(found)


def _placed(extent: TensorExtent, packed: PackedFile, path: Path) -> TensorExtent:
    """A tensor where it lies in the packed file."""
    starts = packed.starts[extent.name]
    if len(starts) == 1:
        return replace(extent, offset=starts[0])
    weights = extent.nbytes // extent.element_bytes
    pieces = -(-weights // piece_weights(weights)) if weights else 0
    sizes = [end - begin for begin, end in pairwise(starts)]
    most = piece_weights(weights) * extent.element_bytes + 2 * PIECE_ALIGN_BYTES
    even = not any(start % PIECE_ALIGN_BYTES for start in starts)
    if (
        extent.dtype != CODED_DTYPE
        or len(sizes) != pieces
        or not even
        or not all(0 < size <= most for size in sizes)
    ):
        raise CheckpointError(
            f"{path}: {shown(extent.name)}, {extent.dtype} of {weights} weights, is not coded in "
            f"{len(sizes)} pieces from byte {starts[0]} to {starts[-1]}: {_AGAIN}"
        )
    return replace(extent, offset=starts[0], coded=starts, coded_bits=packed.bits)
