"""The experts of a network's layers, lent from one pool."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from offload_rt.device.base import Device, DeviceBuffer, HomeSource
from offload_rt.model.experts import ExpertLender, ExpertWeights
from offload_rt.model.formats.stored import Stored
from offload_rt.model.layout import LayerLayout
from offload_rt.model.network import MatricesOf
from offload_rt.streaming.experts import Asked, ExpertPool

Pool = ExpertPool[DeviceBuffer, HomeSource]
Units = Mapping[int, Sequence[LayerLayout]]


@dataclass(frozen=True, slots=True)
class Homes:
    """Experts in host memory, which the host may compute there.

    Attributes:
        images: of each, by layer.
        matrices_of: an expert's image there.
    """

    images: Mapping[int, Mapping[int, DeviceBuffer]]
    matrices_of: MatricesOf


class PooledExperts:
    """The experts of one layer, as `compute_experts` asks for them.

    Args:
        pool: has them.
        layer: whose they are.
        units: the image of each.
        views: of buffers of the pool: the layer and expert, and its weights there.
        matrices_of: an expert's image in a buffer.
        homes: of those that the host computes where they lie, the image of each there, by layer.
    """

    def __init__(
        self,
        pool: Pool,
        layer: int,
        units: Sequence[LayerLayout],
        views: dict[int, tuple[tuple[int, int], ExpertWeights]],
        matrices_of: MatricesOf,
        homes: Homes | None,
    ) -> None:
        self._pool, self._layer, self._units, self._views = pool, layer, units, views
        self._matrices_of, self._homes = matrices_of, homes

    @property
    def stored(self) -> Mapping[str, Stored]:
        """The quantised matrices of an expert, as each has them."""
        unit = self._units[0]
        names = dict.fromkeys(p.name.partition(":")[0] for p in unit.placements if ":" in p.name)
        return dict(zip(names, unit.stored, strict=True))

    def begin(self, parts: int) -> None:
        """Rows begin to go through the layer, in so many parts."""
        self._pool.begin(self._layer, parts)

    @property
    def foresees(self) -> bool:
        """Whether it wants to know what the next layer will ask for."""
        return self._pool.foresees

    @property
    def computes(self) -> bool:
        """Whether the host may compute experts where they lie."""
        return self._homes is not None

    def on_host(self, needed: Sequence[int]) -> list[int]:
        """Which of these the host is to compute."""
        assert self._homes is not None  # it computes
        return self._pool.on_host(self._layer, needed, self._homes.images[self._layer].__contains__)

    def at_home(self, expert: int) -> ExpertWeights:
        """The weights of one of those, in host memory."""
        assert self._homes is not None  # it computes
        image = self._homes.images[self._layer][expert]
        return self._homes.matrices_of(self._units[expert], image)

    def lend(self, asked: Asked) -> Iterator[Sequence[tuple[int, ExpertWeights]]]:
        """Lend the weights of experts: those that are there first."""
        for group in self._pool.lend(self._layer, asked):
            yield [(expert, self._weights(expert, buffer)) for expert, buffer in group]

    def _weights(self, expert: int, buffer: DeviceBuffer) -> ExpertWeights:
        """Of an expert that is in a buffer."""
        key, found = (self._layer, expert), self._views.get(id(buffer))
        if found is None or found[0] != key:
            made = self._matrices_of(self._units[expert], buffer)
            found = self._views[id(buffer)] = key, made
        return found[1]


def open_pool(
    device: Device,
    units: Units,
    slots: Sequence[DeviceBuffer],
    per_token: int,
    sources: Mapping[int, Sequence[HomeSource]],
    *,
    keeps_free: bool,
) -> Pool:
    """A pool of these slots.

    Args:
        device: they are on.
        units: the image of each expert, by layer.
        slots: its buffers.
        per_token: experts a token is sent to.
        sources: where each comes from.
        keeps_free: some slots are for what is foreseen.
    """
    return ExpertPool(
        counts={layer: len(own) for layer, own in units.items()},
        slots=slots,
        per_token=per_token,
        copy=device.copy,
        compute=device.compute,
        source=lambda layer, expert: sources[layer][expert],
        place=partial(_place, units),
        in_file=lambda layer, expert: sources[layer][expert].image is None,
        keeps_free=keeps_free,
    )


def homes_of(sources: Mapping[int, Sequence[HomeSource]], matrices_of: MatricesOf) -> Homes:
    """Of all experts those in host memory."""
    images = {
        layer: {i: source.image for i, source in enumerate(own) if source.image is not None}
        for layer, own in sources.items()
    }
    return Homes(images, matrices_of)


def lenders_of(
    pool: Pool, units: Units, matrices_of: MatricesOf, homes: Homes | None = None
) -> dict[int, ExpertLender]:
    """Who lends the experts of each layer; and computes them, where their homes are given."""
    views: dict[int, tuple[tuple[int, int], ExpertWeights]] = {}
    return {
        layer: PooledExperts(pool, layer, own, views, matrices_of, homes)
        for layer, own in units.items()
    }


def _place(units: Units, layer: int, expert: int) -> tuple[str, int]:
    first = units[layer][expert].runs[0]
    return str(first.path), first.file_offset
