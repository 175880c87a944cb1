"""Where the bytes of layers live, and the store a network borrows them from."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from offload_rt.device.base import CopyBlock, CopyPiece, Device, DeviceBuffer, HomeSource
from offload_rt.device.host_memory import HostBuffer
from offload_rt.model.layout import LayerLayout
from offload_rt.streaming.files import BLOCK_BYTES, FileSource, WeightFiles
from offload_rt.streaming.pipeline import LayerPipeline


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
            for start in range(0, self.nbytes, BLOCK_BYTES)
            for nbytes in [min(BLOCK_BYTES, self.nbytes - start)]
        ]

    def blocks(self, dst: DeviceBuffer) -> Sequence[CopyBlock]:
        """The memory copies that fill `dst`."""
        return [
            CopyBlock(stop - start, partial(self._copy, dst, start, stop))
            for start in range(0, self.nbytes, BLOCK_BYTES)
            for stop in [min(start + BLOCK_BYTES, self.nbytes)]
        ]

    def check(self) -> None:
        """Host memory of this process does not change under us."""

    def _load(self, start: int, nbytes: int, staging: HostBuffer) -> torch.Tensor:
        target = staging.tensor[:nbytes]
        return target.copy_(self.image.tensor[start : start + nbytes])

    def _copy(self, dst: DeviceBuffer, start: int, stop: int) -> None:
        dst.tensor[start:stop].copy_(self.image.tensor[start:stop])


class LayerStore:
    """Lends the weights of every layer: resident ones at once, streamed ones through the pipeline.

    Args:
        device: where the weights are computed with.
        layouts: the image of each layer.
        sources: the home of each streamed layer; a layer without one is resident.
        slots: number of slots of the ring.
        files: where resident layers are read from, once.
        elsewhere: resident layers that are not lent: the network has their weights.
    """

    def __init__(
        self,
        device: Device,
        layouts: Sequence[LayerLayout],
        sources: Mapping[int, HomeSource],
        slots: int,
        files: WeightFiles,
        elsewhere: Collection[int] = (),
    ) -> None:
        self.layouts = layouts
        self.streamed = tuple(sorted(sources))
        self.bytes_per_pass = sum(sources[i].nbytes for i in self.streamed)
        self._resident: dict[int, DeviceBuffer] = {}
        for layer, layout in enumerate(layouts):
            if layer not in sources and layer not in elsewhere:
                self._resident[layer] = device.allocate(layout.nbytes, "resident layers")
                device.load.copy(self._resident[layer], FileSource(layout, files))
        self._pipeline: LayerPipeline[DeviceBuffer, HomeSource] | None = None
        if sources:
            slot_bytes = max(layouts[layer].nbytes for layer in sources)
            ring = [device.allocate(slot_bytes, "slots") for _ in range(slots)]
            self._pipeline = LayerPipeline(
                self.streamed, sources, ring, device.copy, device.compute
            )
        device.load.record().synchronize()

    def restart(self) -> None:
        """Make the store ready for a new pass after one that was not finished."""
        if self._pipeline is not None:
            self._pipeline.restart()

    @contextmanager
    def weights(self, layer: int) -> Iterator[DeviceBuffer]:
        """Lend the image of `layer` on the device."""
        if layer in self._resident:
            yield self._resident[layer]
            return
        assert self._pipeline is not None
        with self._pipeline.weights(layer) as buffer:
            yield buffer
