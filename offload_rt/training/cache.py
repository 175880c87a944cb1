"""Hidden states and their labels on disk, written once and read again and again.

There are two files of plain numbers, and a record of how much of them is whole. The record is
replaced after the numbers have reached the disk. So a run that was killed knows what is beyond it
in the files, cuts that off and goes on. Numbers are read by `pread`, blocks of rows at a time: a
cache may be larger than memory.

Shapes: R rows (places), E hidden size, K heads.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from offload_rt.errors import CheckpointError
from offload_rt.training.files import read_json, write_json, writing
from offload_rt.writing import open_growing

_LABEL_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What a row of a cache is.

    Attributes:
        width: numbers of a hidden state.
        heads: labels.
        dtype: torch's name of the states' number format.
    """

    width: int
    heads: int
    dtype: str

    @property
    def state_bytes(self) -> int:
        """Bytes of one hidden state."""
        return self.width * getattr(torch, self.dtype).itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in both files."""
        return self.state_bytes + self.heads * _LABEL_BYTES


class StateCache:
    """Hidden states with their labels.

    Args:
        folder: where its files are.
        name: what they are called.
        shape: of its rows.

    Attributes:
        rows: that are whole.
        samples: that they come from.

    Raises:
        CheckpointError: the files are not what their record says.
    """

    def __init__(self, folder: Path, name: str, shape: CacheShape) -> None:
        self.shape = shape
        self.rows = self.samples = 0
        self._record = folder / f"{name}.json"
        self._paths = folder / f"{name}.states", folder / f"{name}.labels"
        found = read_json(self._record)
        if found is not None:
            self._adopt(found)
        with writing(self._paths[0]):
            self._fds = [open_growing(path, os.O_RDWR) for path in self._paths]
            for fd, nbytes in zip(self._fds, self._lengths(), strict=True):
                os.ftruncate(fd, nbytes)

    def add(self, hidden: torch.Tensor, labels: torch.Tensor, samples: int) -> None:
        """Append rows; once this returns they are there for good.

        Args:
            hidden: [R, E] on any device.
            labels: [R, K] int64.
            samples: that the rows come from.

        Raises:
            ConfigError: the disk is full.
        """
        parts = (hidden.cpu(), labels.to(torch.int32))
        with writing(self._paths[0]):
            for fd, part, at in zip(self._fds, parts, self._lengths(), strict=True):
                _write_all(fd, _bytes_of(part.contiguous()), at)
            for fd in self._fds:
                os.fsync(fd)
        self.rows += len(hidden)
        self.samples += samples
        counts = {"rows": self.rows, "samples": self.samples}
        write_json(self._record, asdict(self.shape) | counts)

    def read(self, rows: Sequence[range]) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of rows, one after the other: [R, E] states and [R, K] int64 labels.

        Raises:
            CheckpointError: the files became shorter.
        """
        count, shape = sum(map(len, rows)), self.shape
        hidden = torch.empty(count, shape.width, dtype=getattr(torch, shape.dtype))
        labels = torch.empty(count, shape.heads, dtype=torch.int32)
        at = 0
        for part in rows:
            stop = at + len(part)
            _read_all(self._fds[0], hidden[at:stop], part.start * shape.state_bytes)
            _read_all(self._fds[1], labels[at:stop], part.start * shape.heads * _LABEL_BYTES)
            at = stop
        return hidden, labels.long()

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds:
            os.close(fd)

    def remove(self) -> None:
        """Remove the files; the record goes first, so what is left is never taken for whole."""
        for path in (self._record, *self._paths):
            path.unlink(missing_ok=True)

    def __enter__(self) -> "StateCache":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _lengths(self) -> tuple[int, int]:
        """Bytes of the whole rows in each file."""
        return self.rows * self.shape.state_bytes, self.rows * self.shape.heads * _LABEL_BYTES

    def _adopt(self, found: dict[str, object]) -> None:
        """Take over what an earlier run left."""
        rows, samples = found.pop("rows", None), found.pop("samples", None)
        if found != asdict(self.shape) or not (type(rows) is type(samples) is int):
            raise CheckpointError(
                f"{self._record} is of {found}, expected is {asdict(self.shape)}: remove the folder"
            )
        assert isinstance(rows, int) and isinstance(samples, int)
        self.rows, self.samples = rows, samples
        for path, nbytes in zip(self._paths, self._lengths(), strict=True):
            if not path.exists() or path.stat().st_size < nbytes:
                raise CheckpointError(
                    f"{path} has fewer than the {nbytes} bytes its record names: remove "
                    f"{self._record}, and they are made again"
                )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _read_all(fd: int, into: torch.Tensor, offset: int) -> None:
    data = _bytes_of(into)
    while data:
        count = os.preadv(fd, [data], offset)
        if not count:
            raise CheckpointError(
                "the cached hidden states became shorter while they were read: start again"
            )
        data, offset = data[count:], offset + count
