"""Where the bytes of streamed layers live."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from offload_rt.device.base import PIECE_BYTES, CopyBlock, CopyPiece, DeviceBuffer
from offload_rt.device.host_memory import HostBuffer


@dataclass(frozen=True, slots=True)
class HostSource:
    """A layer whose home is host memory, laid out as on the device."""

    image: HostBuffer

    @property
    def nbytes(self) -> int:
        """Bytes of the image."""
        return self.image.nbytes

    def pieces(self) -> Sequence[CopyPiece]:
        """The memory copies that bring the image through staging buffers."""
        return [
            CopyPiece(
                offset=start,
                image_bytes=nbytes,
                nbytes=nbytes,
                load=partial(self._load, start, nbytes),
            )
            for start in range(0, self.nbytes, PIECE_BYTES)
            for nbytes in [min(PIECE_BYTES, self.nbytes - start)]
        ]

    def blocks(self, dst: DeviceBuffer) -> Sequence[CopyBlock]:
        """The memory copies that fill `dst`."""
        return [
            CopyBlock(stop - start, partial(self._copy, dst, start, stop))
            for start in range(0, self.nbytes, PIECE_BYTES)
            for stop in [min(start + PIECE_BYTES, self.nbytes)]
        ]

    def check(self) -> None:
        """Host memory of this process does not change under us."""

    def _load(self, start: int, nbytes: int, staging: HostBuffer) -> torch.Tensor:
        target = staging.tensor[:nbytes]
        return target.copy_(self.image.tensor[start : start + nbytes])

    def _copy(self, dst: DeviceBuffer, start: int, stop: int) -> None:
        dst.tensor[start:stop].copy_(self.image.tensor[start:stop])
