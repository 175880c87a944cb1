"""Read tensors out of a PyTorch file without unpickling it.

`torch.save` writes a zip archive: a pickle that says which tensor lies in which storage, and the
storages as plain bytes. The pickle is a program; here its instructions are *read*, by a machine
that knows twenty-odd of them and can make nothing but names, numbers, tuples, dictionaries and
descriptions of tensors. Whatever else a file asks for ends the reading. Storages are only looked at
as bytes, stored without compression, so a file cannot ask for more memory than it has bytes.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_rt.errors import CheckpointError
from offload_rt.model.files import FileIdentity, OpenFile, open_inside, shown

_PICKLE_LIMIT_BYTES = 8 * 2**20  # that of heads has a few kB, of a 70B model's shard 100 kB
_MEMBER_LIMIT = 2**16
_DIMENSION_LIMIT = 16
_AGAIN = "download it again, or get the heads as safetensors"

# Storage class of torch -> safetensors name and bytes of a number.
_STORAGES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "DoubleStorage": ("F64", 8),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
_DICTIONARY = ("collections", "OrderedDict")
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = ("torch._utils", "_rebuild_parameter")


@dataclass(frozen=True, slots=True, kw_only=True)
class PickledTensor:
    """Where one tensor lies.

    Attributes:
        dtype: safetensors name.
        shape: its numbers lie one after the other.
        storage: key of the storage in the archive.
        offset: bytes from the start of the storage.
    """

    dtype: str
    shape: tuple[int, ...]
    storage: str
    offset: int
    nbytes: int


class PickledFile:
    """An open archive; made by `open_pickled`.

    Attributes:
        identity: what the file was when it was opened.
        tensors: what it holds, by name.
    """

    def __init__(self, archive: zipfile.ZipFile, identity: FileIdentity) -> None:
        self._archive, self._path, self.identity = archive, identity.path, identity
        members = archive.infolist()
        pickles = [m.filename for m in members if m.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or len(members) > _MEMBER_LIMIT:
            raise self._error(f"holds {len(members)} parts, {len(pickles)} of them data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")
        stated = f"{self._root}byteorder" in archive.NameToInfo
        if stated and self._member("byteorder", 16) != b"little":
            raise self._error("was written on a big-endian machine")
        program = self._member("data.pkl", _PICKLE_LIMIT_BYTES)
        try:
            self.tensors: Mapping[str, PickledTensor] = _Machine().run(program)
        except _UnknownError as error:
            raise self._error(str(error)) from error
        self._check_storages()

    def read(self, name: str) -> bytes:
        """The bytes of a tensor."""
        tensor = self.tensors[name]
        try:
            with self._archive.open(f"{self._root}data/{tensor.storage}") as storage:
                storage.seek(tensor.offset)
                data = storage.read(tensor.nbytes)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
            raise self._error(f"is damaged at tensor {shown(name)} ({error})") from error
        if len(data) != tensor.nbytes:
            raise self._error(f"ends within tensor {shown(name)}")
        return data

    def _member(self, name: str, limit_bytes: int) -> bytes:
        info = self._info(name)
        if info.file_size > limit_bytes:
            raise self._error(f"has a {name} of {info.file_size} bytes, at most {limit_bytes}")
        try:
            return self._archive.read(info)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
            raise self._error(f"is damaged in {name} ({error})") from error

    def _info(self, name: str) -> zipfile.ZipInfo:
        info = self._archive.NameToInfo.get(self._root + name)
        stored = info is not None and info.compress_type == zipfile.ZIP_STORED
        if info is None or not stored or info.file_size != info.compress_size or info.flag_bits & 1:
            raise self._error(f"has no part {shown(name)} that is stored as it is")
        return info

    def _check_storages(self) -> None:
        """See that tensors lie within their storages."""
        for name, tensor in self.tensors.items():
            size = self._info(f"data/{tensor.storage}").file_size
            if tensor.offset + tensor.nbytes > size:
                raise self._error(
                    f"has {size} bytes for tensor {shown(name)}, which needs "
                    f"{tensor.offset + tensor.nbytes}"
                )

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} {what}: {_AGAIN}")


@contextmanager
def open_pickled(folder: Path, name: str) -> Iterator[PickledFile]:
    """Open the archive `folder/name`.

    Raises:
        CheckpointError: it is no archive of tensors alone, or it is damaged.
    """
    path = folder / name
    with open_inside(folder, name) as file:
        try:
            archive = zipfile.ZipFile(io.BufferedReader(_Reader(file)))
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise CheckpointError(
                f"{path} is not an archive as torch.save writes it since version 1.6 ({error}): "
                f"{_AGAIN}"
            ) from error
        with archive:
            yield PickledFile(archive, file.identity)


class _Reader(io.RawIOBase):
    """An `OpenFile` as a seekable stream."""

    def __init__(self, file: OpenFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.identity.size}
        if base[whence] + offset < 0:
            raise ValueError("a position before the start")
        self._at = base[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - as io.RawIOBase declares it
        data = self._file.read(len(buffer), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _UnknownError(Exception):
    """The program asks for something that tensors do not need."""


@dataclass(frozen=True, slots=True)
class _Global:
    """A name the program mentions; nothing is looked up."""

    module: str
    name: str

    @property
    def pair(self) -> tuple[str, str]:
        return self.module, self.name


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    number_bytes: int
    key: str


_MARK = object()


class _Machine:
    """Reads the instructions of a pickle; values are ours, none is made by code of the file."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps: dict[str, Callable[[Any], None]] = {
            "PROTO": lambda _: None,
            "STOP": lambda _: None,
            "MARK": lambda _: self._stack.append(_MARK),
            "NONE": lambda _: self._stack.append(None),
            "NEWTRUE": lambda _: self._stack.append(True),
            "NEWFALSE": lambda _: self._stack.append(False),
            "EMPTY_TUPLE": lambda _: self._stack.append(()),
            "EMPTY_DICT": lambda _: self._stack.append({}),
            "TUPLE": lambda _: self._stack.append(tuple(self._since_mark())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "SETITEM": lambda _: self._set_items([self._pop(), self._pop()][::-1]),
            "SETITEMS": lambda _: self._set_items(self._since_mark()),
            "BINPERSID": lambda _: self._stack.append(_storage(self._pop())),
            "REDUCE": lambda _: self._reduce(),
            "BUILD": lambda _: self._build(),
            "GLOBAL": lambda text: self._stack.append(_Global(*text.split(" ", 1))),
        }
        numbers = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1")
        self._steps |= dict.fromkeys(numbers, self._stack.append)
        self._steps |= dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._remember)
        self._steps |= dict.fromkeys(("BINGET", "LONG_BINGET"), self._recall)

    def run(self, program: bytes) -> dict[str, PickledTensor]:
        """Return the tensors by name.

        Raises:
            _UnknownError: the program is not one that a dictionary of tensors makes.
        """
        try:
            for operation, argument, _ in pickletools.genops(program):  # ends after STOP
                if operation.name not in self._steps:
                    raise _UnknownError(f"asks for {operation.name}, which tensors do not need")
                self._steps[operation.name](argument)
            return self._result()
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise _UnknownError("does not describe tensors as torch.save does") from error

    def _result(self) -> dict[str, PickledTensor]:
        (found,) = self._stack
        tensors = isinstance(found, dict) and all(
            isinstance(k, str) and isinstance(v, PickledTensor) for k, v in found.items()
        )
        if not tensors or not found:
            raise _UnknownError("holds something else than a dictionary of tensors")
        assert isinstance(found, dict)
        return found

    def _pop(self) -> Any:  # noqa: ANN401 - a pickle's stack holds anything
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError
        return value

    def _since_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def _tuple(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self._stack.append(tuple(reversed(values)))

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError
        for name, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(name, str):
                raise ValueError
            target[name] = value

    def _remember(self, place: int) -> None:
        if self._stack[-1] is _MARK:
            raise ValueError
        self._memo[place] = self._stack[-1]

    def _recall(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global):
            raise ValueError
        if function.pair == _DICTIONARY and arguments == ():
            self._stack.append({})
        elif function.pair == _TENSOR:
            self._stack.append(_tensor(*arguments))
        elif function.pair == _PARAMETER and isinstance(arguments[0], PickledTensor):
            self._stack.append(arguments[0])
        else:
            name = shown(f"{function.module}.{function.name}")
            raise _UnknownError(f"asks to call {name}, which is never done")

    def _build(self) -> None:
        """Attributes of a dictionary (`_metadata`, versions of modules) are left out."""
        self._pop()
        if not isinstance(self._stack[-1], dict):
            raise _UnknownError("asks to change the attributes of an object, which is never done")


def _storage(persistent: Any) -> _Storage:  # noqa: ANN401 - whatever the program made
    kind, storage, key, _place, _numbers = persistent
    if kind != "storage" or not isinstance(storage, _Global) or not isinstance(key, str):
        raise ValueError
    if storage.module != "torch" or storage.name not in _STORAGES:
        name = shown(f"{storage.module}.{storage.name}")
        raise _UnknownError(f"has a tensor of {name}, accepted are {', '.join(_STORAGES)}")
    if not key.isalnum():
        raise ValueError
    return _Storage(*_STORAGES[storage.name], key)


def _tensor(
    storage: Any,  # noqa: ANN401 - whatever the program made
    start: Any,  # noqa: ANN401
    shape: Any,  # noqa: ANN401
    strides: Any,  # noqa: ANN401
    *_unused: object,
) -> PickledTensor:
    """The arguments of torch's `_rebuild_tensor_v2`."""
    sizes = (start, *shape, *strides)
    if len(sizes) > 1 + 2 * _DIMENSION_LIMIT:
        raise ValueError
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in sizes):
        raise ValueError
    packed = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    used = [axis for axis, size in enumerate(shape) if size != 1]
    if len(strides) != len(shape) or any(strides[axis] != packed[axis] for axis in used):
        raise _UnknownError("has a tensor whose numbers do not lie one after the other")
    return PickledTensor(
        dtype=storage.dtype,
        shape=tuple(shape),
        storage=storage.key,
        offset=start * storage.number_bytes,
        nbytes=math.prod(shape) * storage.number_bytes,
    )
