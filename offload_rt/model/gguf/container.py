"""Read the header of a GGUF file: its metadata, and which tensor lies at which bytes.

Written against the format's text (gguf.md of ggml-org/ggml). Read are versions 2 and 3, little
endian. The file is untrusted: every length is compared with what is left of it before anything is
made of that length, and of long arrays and texts only those that are asked for are kept.
"""

import math
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from offload_rt.errors import CheckpointError
from offload_rt.model.files import FileIdentity, OpenFile, foreign_format, open_inside, shown
from offload_rt.model.gguf.types import TYPES, TensorType
from offload_rt.units import format_size

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_AGAIN = "download it again"
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT, _LARGEST_ALIGNMENT = 32, 2**16
_HEADER_LIMIT = 64 * 2**20  # the largest vocabularies take 20 MB
_PAIRS_LIMIT = 2**12  # files have up to 100
_TENSOR_LIMIT = 2**16  # the largest models have 2,000
_KEY_LIMIT = _NAME_LIMIT = 1024
_TEXT_LIMIT = 2**20  # chat templates have up to 100 kB
_SHORT_TEXT = 2**12  # which is always kept
_DIMENSIONS = 4  # of the format
_SIDE_LIMIT = 2**40
_LONGEST = 2**21  # entries of an array that is kept, and of any of texts: four vocabularies
_SHORT = 2**10  # arrays of numbers up to this length are always kept
_WINDOW = 2**20
_TEXT, _ARRAY, _FLAG = 8, 9, 7
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    _FLAG: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_LEAST_TEXT = 8  # bytes of an empty one

Value = int | float | bool | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        name: as in the file; never to be used as a path.
        type: of its numbers.
        shape: outputs before inputs, which is the file's order turned round.
        path: the file.
        offset: first byte, counted from the start of the file.
        nbytes: of the tensor.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What a file says of itself.

    Attributes:
        identity: what the file was.
        metadata: by key; long arrays and texts that were not asked for are left out.
        tensors: in the order of their bytes.
    """

    identity: FileIdentity
    metadata: Mapping[str, Value]
    tensors: tuple[GgufTensor, ...]


def read_gguf(folder: Path, name: str, wanted: Container[str] = ()) -> GgufHeader:
    """Read the header of `folder/name`.

    Args:
        folder: the file is in.
        name: of the file.
        wanted: keys of long arrays and texts to be kept.

    Raises:
        CheckpointError: the file is not a complete, well-formed GGUF file.
    """
    with open_inside(folder, name) as file:
        return _Reader(file, folder / name, wanted).read()


class _Reader:
    """A place in the header, which only moves forward."""

    def __init__(self, file: OpenFile, path: Path, wanted: Container[str]) -> None:
        self._file, self._path, self._wanted = file, path, wanted
        self._size = file.identity.size
        self._at, self._window, self._start = 0, b"", 0

    def read(self) -> GgufHeader:
        """The whole of it."""
        self._check_start()
        tensors, pairs = self._number("Q"), self._number("Q")
        for count, limit, least, what in (
            (tensors, _TENSOR_LIMIT, 24, "tensors"),
            (pairs, _PAIRS_LIMIT, 13, "settings"),
        ):
            if count > limit or count * least > self._left:
                raise self._error(
                    f"says that it has {count} {what}, accepted are up to {limit} that fit its "
                    f"{self._size} bytes"
                )
        metadata = dict[str, Value]()
        seen = set[str]()
        for _ in range(pairs):
            key = self._text(_KEY_LIMIT, "the name of a setting")
            if key in seen:
                raise self._error(f"has {shown(key)} twice")
            seen.add(key)
            value = self._value(key, self._number("I"))
            if value is not None:
                metadata[key] = value
        alignment = metadata.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
        if not (
            type(alignment) is int
            and 1 <= alignment <= _LARGEST_ALIGNMENT
            and alignment & alignment - 1 == 0
        ):
            raise self._error(
                f"has a {_ALIGNMENT} of {shown(alignment)}, accepted is a power of two up to "
                f"{_LARGEST_ALIGNMENT}"
            )
        described = [self._tensor() for _ in range(tensors)]
        return GgufHeader(
            identity=self._file.identity,
            metadata=metadata,
            tensors=self._placed(described, alignment),
        )

    @property
    def _left(self) -> int:
        """Bytes behind this place, of the file or of what a header may have."""
        return min(self._size, _HEADER_LIMIT) - self._at

    def _check_start(self) -> None:
        magic = self._file.read(64)
        if magic[:4] != MAGIC:
            kind = foreign_format(magic) or f"is no GGUF file: {_AGAIN}"
            raise CheckpointError(f"{self._path} {kind}")
        self._at = len(MAGIC)
        version = self._number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = (
                f"is big endian, version {swapped}"
                if swapped in (1, *_VERSIONS)
                else f"is of version {version}"
            )
            raise CheckpointError(
                f"{self._path} {what}: read are versions 2 and 3 of GGUF, little endian, take a "
                "newer conversion"
            )

    def _tensor(self) -> GgufTensor:
        """A description; its offset is yet that in the data."""
        name = self._text(_NAME_LIMIT, "the name of a tensor")
        where = f"tensor {shown(name)}"
        dimensions = self._number("I")
        if not name or not 1 <= dimensions <= _DIMENSIONS:
            raise self._error(
                f"describes {where} with {dimensions} dimensions, accepted are a name and 1 to "
                f"{_DIMENSIONS}"
            )
        sides = [self._number("Q") for _ in range(dimensions)]
        code, offset = self._number("I"), self._number("Q")
        if not all(1 <= side <= _SIDE_LIMIT for side in sides):
            raise self._error(
                f"gives {where} the shape {sides}, accepted are sides from 1 to {_SIDE_LIMIT}"
            )
        kind = TYPES.get(code)
        if kind is None:
            raise CheckpointError(
                f"{self._path}: {where} is of type {code}, which is not known here: take a file "
                "with Q4_K_M, Q8_0 or BF16 in its name"
            )
        if sides[0] % kind.numbers:
            raise self._error(
                f"gives {where} rows of {sides[0]} numbers, {kind.name} has them in blocks of "
                f"{kind.numbers}"
            )
        nbytes = math.prod(sides) // kind.numbers * kind.block_bytes
        shape = tuple(reversed(sides))
        return GgufTensor(
            name=name, type=kind, shape=shape, path=self._path, offset=offset, nbytes=nbytes
        )

    def _placed(self, described: list[GgufTensor], alignment: int) -> tuple[GgufTensor, ...]:
        """Tensors at their places in the file, which follow each other."""
        start = expected = -(-self._at // alignment) * alignment
        names, placed = set[str](), list[GgufTensor]()
        for each in sorted(described, key=lambda tensor: tensor.offset):
            if each.name in names:
                raise self._error(f"has tensor {shown(each.name)} twice")
            names.add(each.name)
            if start + each.offset != expected:
                raise self._error(
                    f"has tensor {shown(each.name)} at byte {start + each.offset}, the one before "
                    f"it ends so that it would begin at {expected}"
                )
            end = expected + each.nbytes
            if end > self._size:
                raise CheckpointError(
                    f"{self._path} has {self._size} bytes, tensor {shown(each.name)} ends at "
                    f"{end}: the download is not complete, {_AGAIN}"
                )
            placed.append(
                GgufTensor(
                    name=each.name,
                    type=each.type,
                    shape=each.shape,
                    path=each.path,
                    offset=expected,
                    nbytes=each.nbytes,
                )
            )
            expected = -(-end // alignment) * alignment
        return tuple(placed)

    def _value(self, key: str, code: int) -> Value | None:
        """A setting; None for what is long and nobody asked for."""
        if code == _TEXT:
            return self._long_text(key)
        if code == _ARRAY:
            return self._array(key)
        return self._scalar(key, code)

    def _scalar(self, key: str, code: int) -> int | float | bool:
        form = _SCALARS.get(code)
        if form is None:
            raise self._error(f"has {shown(key)} of an unknown kind, {code}")
        value = self._number(form)
        return bool(value) if code == _FLAG else value

    def _array(self, key: str) -> Value | None:
        code, count = self._number("I"), self._number("Q")
        form = _SCALARS.get(code)
        if form is None and code != _TEXT:
            raise self._error(f"has {shown(key)}, a list of an unknown kind, {code}")
        least = _LEAST_TEXT if form is None else struct.calcsize(form)
        if count * least > self._left:
            raise self._error(
                f"has {shown(key)}, a list of {count}, which does not fit the {self._size} bytes "
                "of the file"
            )
        wanted = key in self._wanted
        if (wanted or form is None) and count > _LONGEST:
            raise self._error(f"has {shown(key)}, a list of {count}, accepted are {_LONGEST}")
        if form is None:
            return self._texts(key, count, keep=wanted)
        if not wanted and count > _SHORT:
            self._at += count * least
            return None
        return struct.unpack(f"<{count}{form}", self._take(count * least, shown(key)))

    def _texts(self, key: str, count: int, *, keep: bool) -> tuple[str, ...] | None:
        found = list[str]()
        for _ in range(count):
            size = self._number("Q")
            if size > self._left:
                raise self._cut(shown(key), size)
            if keep:
                found.append(self._decoded(self._take(size, shown(key)), shown(key)))
            else:
                self._at += size
        return tuple(found) if keep else None

    def _long_text(self, key: str) -> str | None:
        """A text of any length; None for a long one that nobody asked for."""
        size = self._number("Q")
        if size <= _SHORT_TEXT or key in self._wanted:
            if size > _TEXT_LIMIT:
                raise self._error(f"has {shown(key)} of {size} bytes, accepted are {_TEXT_LIMIT}")
            return self._decoded(self._take(size, shown(key)), shown(key))
        if size > self._left:
            raise self._cut(shown(key), size)
        self._at += size
        return None

    def _text(self, limit: int, what: str) -> str:
        size = self._number("Q")
        if size > limit:
            raise self._error(f"has {what} of {size} bytes, accepted are up to {limit}")
        return self._decoded(self._take(size, what), what)

    def _decoded(self, data: bytes, what: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"has {what}, which is no UTF-8 text ({error.reason})") from error

    def _number(self, form: str) -> int:
        """One number; floats are those of the file, too."""
        size = struct.calcsize(form)
        value: int
        (value,) = struct.unpack(f"<{form}", self._take(size, "its header"))
        return value

    def _take(self, size: int, what: str) -> bytes:
        """The next bytes."""
        if size > self._left:
            raise self._cut(what, size)
        begin = self._at - self._start
        if begin < 0 or begin + size > len(self._window):
            self._start, begin = self._at, 0
            self._window = self._file.read(max(size, _WINDOW), self._at)
            if len(self._window) < size:
                raise self._cut(what, size)
        self._at += size
        return self._window[begin : begin + size]

    def _cut(self, what: str, size: int) -> CheckpointError:
        if self._size > _HEADER_LIMIT:
            return self._error(
                f"has a header of more than {format_size(_HEADER_LIMIT)}, which is accepted"
            )
        return CheckpointError(
            f"{self._path} has {self._size} bytes and ends within {what} ({size} bytes at byte "
            f"{self._at}): the download is not complete, {_AGAIN}"
        )

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} {what}: the file is damaged, {_AGAIN}")
