"""The store a network borrows the weights of its layers from."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from offload_rt.device.base import Device, DeviceBuffer, HomeSource
from offload_rt.model.layout import LayerLayout
from offload_rt.model.weight_files import FileSource, WeightFiles
from offload_rt.streaming.ring import Cycle, Ring


class LayerStore:
    """Lends the weights of every layer: resident ones at once, streamed ones through a ring.

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
        self._ring: Ring[int, DeviceBuffer, HomeSource] | None = None
        if sources:
            slot_bytes = max(layouts[layer].nbytes for layer in sources)
            buffers = [device.allocate(slot_bytes, "slots") for _ in range(slots)]
            order = Cycle({layer: sources[layer] for layer in self.streamed})
            self._ring = Ring(order, buffers, device.copy, device.compute, strict=True)
            self._ring.restart()
        device.load.record().synchronize()

    def restart(self) -> None:
        """Make the store ready for a new pass after one that was not finished."""
        if self._ring is not None:
            self._ring.restart()

    @contextmanager
    def weights(self, layer: int) -> Iterator[DeviceBuffer]:
        """Lend the image of `layer` on the device."""
        if layer in self._resident:
            yield self._resident[layer]
            return
        assert self._ring is not None
        with self._ring.lend(layer) as buffer:
            yield buffer
