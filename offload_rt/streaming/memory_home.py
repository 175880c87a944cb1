"""A home in host memory: what lies there is laid out as on the device."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from offload_rt.device.base import PIECE_BYTES, CopyBlock, CopyPiece, DeviceBuffer
from offload_rt.device.host_memory import HostBuffer


@dataclass(frozen=True, slots=True)
class MemoryHome:
    """A layer, or rows of a KV cache, in host memory; bytes come from it and go there."""

    image: HostBuffer

    @property
    def nbytes(self) -> int:
        """Bytes of the image."""
        return self.image.nbytes

    def blocks(self, dst: DeviceBuffer) -> Sequence[CopyBlock]:
        """The memory copies that fill `dst`."""
        return _copies(dst.tensor, self.image.tensor, self.nbytes)

    def write_blocks(self, src: torch.Tensor) -> Sequence[CopyBlock]:
        """The memory copies that put `src` here."""
        return _copies(self.image.tensor, src, self.nbytes)

    def pieces(self) -> Sequence[CopyPiece]:
        """The memory copies that bring the image through staging buffers."""
        return pieces_of(self.nbytes, self._load)

    def check(self) -> None:
        """Host memory of this process does not change under us."""

    def _load(self, start: int, stop: int, staging: HostBuffer) -> torch.Tensor:
        return staging.tensor[: stop - start].copy_(self.image.tensor[start:stop])


def cut(nbytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """Where each piece starts and stops."""
    for start in range(0, nbytes, piece_bytes):
        yield start, min(start + piece_bytes, nbytes)


def pieces_of(
    nbytes: int, load: Callable[[int, int, HostBuffer], torch.Tensor]
) -> Sequence[CopyPiece]:
    """Pieces of a copy of which bytes `start` to `stop` come by `load(start, stop, staging)`."""
    return [
        CopyPiece(
            offset=start,
            image_bytes=stop - start,
            nbytes=stop - start,
            load=partial(load, start, stop),
        )
        for start, stop in cut(nbytes, PIECE_BYTES)
    ]


def _copies(dst: torch.Tensor, src: torch.Tensor, nbytes: int) -> Sequence[CopyBlock]:
    return [
        CopyBlock(stop - start, partial(_copy, dst, src, start, stop))
        for start, stop in cut(nbytes, PIECE_BYTES)
    ]


def _copy(dst: torch.Tensor, src: torch.Tensor, start: int, stop: int) -> None:
    dst[start:stop].copy_(src[start:stop])
