"""Experts as units that are streamed one by one: which tensors they are, and their images.

A layer of experts is a *rest* (attention, norms, router, shared experts, what is small of each
expert), which stays on the device, and experts, each an image of its own of one to four runs of
file bytes. Which parameters are experts is asked of transformers' modules (`network.find_experts`),
not of names. No torch here.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from offload_rt.device.kinds import Packing
from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import Checkpoint, TensorExtent
from offload_rt.model.files import shown
from offload_rt.model.formats.stored import Stored
from offload_rt.model.layout import LayerLayout, plan_layout, plan_layouts

# A row times an fp32 matrix has other bits where the matrix starts at no multiple of 16 bytes; of
# bf16 none were found (MKL of torch 2.14, 8 shapes, 10 numbers of rows, 8 places).
_ALIGN_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTensor:
    """A tensor of one expert.

    Attributes:
        name: of the parameter of all experts that it is a part of, such as `gate_up_proj`; with
            `.0` and `.1` where the files have that in two.
        extent: its bytes.
        stored: the quantised matrix that it is a part of.
        word: which part.
    """

    name: str
    extent: TensorExtent
    stored: Stored | None = None
    word: str = ""

    @property
    def key(self) -> str:
        """What it is called in the image of an expert."""
        return f"{self.name}:{self.word}" if self.word else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerExperts:
    """The experts of a layer.

    Attributes:
        module: name of the module that computes them, in the network.
        per_token: experts a token is sent to.
        tensors: of each expert.
    """

    module: str
    per_token: int
    tensors: tuple[tuple[ExpertTensor, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experts:
    """The experts of a model.

    Attributes:
        layers: that have some that can be streamed one by one.
        leaves: parameters that are made of them, by the names of the network.
        taken: tensors of the files that they are; the rest of a layer is all others.
        reason: why layers are streamed whole; empty where experts are units.
    """

    layers: Mapping[int, LayerExperts]
    leaves: frozenset[str]
    taken: frozenset[str]
    reason: str = ""

    def of(self, layers: Container[int]) -> "Experts":
        """Those of some layers."""
        kept = {index: own for index, own in self.layers.items() if index in layers}
        tensors = (t for own in kept.values() for expert in own.tensors for t in expert)
        modules = tuple(f"{own.module}." for own in kept.values())
        return replace(
            self,
            layers=kept,
            leaves=frozenset(leaf for leaf in self.leaves if leaf.startswith(modules)),
            taken=frozenset(tensor.extent.name for tensor in tensors),
        )

    @property
    def per_token(self) -> int:
        """Experts of one layer that a token is sent to, at most."""
        return max((own.per_token for own in self.layers.values()), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertImages:
    """How a model whose experts are units lies in memory.

    Attributes:
        rest: the image of each layer without its experts.
        units: those of its experts, by layer.
        per_token: experts of one layer that a token is sent to, at most.
    """

    rest: tuple[LayerLayout, ...]
    units: Mapping[int, tuple[LayerLayout, ...]]
    per_token: int

    @property
    def slot_bytes(self) -> int:
        """Size of a slot that takes any of them."""
        return max(unit.nbytes for own in self.units.values() for unit in own)

    @property
    def file_bytes(self) -> int:
        """Of all experts, as they are stored."""
        return sum(unit.file_bytes for own in self.units.values() for unit in own)

    @property
    def image_bytes(self) -> int:
        """Of all experts, as they compute."""
        return sum(unit.nbytes for own in self.units.values() for unit in own)


def no_experts(reason: str) -> Experts:
    """Those of a model whose layers are streamed whole."""
    return Experts(layers={}, leaves=frozenset(), taken=frozenset(), reason=reason)


NO_EXPERTS = no_experts("it has no experts")


def slices_of(extent: TensorExtent, count: int) -> list[TensorExtent]:
    """The tensors of each expert in one of all, [experts, rows, columns].

    Raises:
        CheckpointError: it does not divide into so many.
    """
    if extent.shape[0] != count or extent.nbytes % count:
        raise CheckpointError(
            f"{extent.path.name}, tensor {shown(extent.name)}, {list(extent.shape)}: does not "
            f"divide into the {count} experts that config.json states: download it again"
        )
    nbytes = extent.nbytes // count
    return [
        replace(
            extent, shape=extent.shape[1:], offset=extent.offset + index * nbytes, nbytes=nbytes
        )
        for index in range(count)
    ]


def check_alike(where: str, experts: Sequence[Sequence[ExpertTensor]]) -> None:
    """See that all experts of a layer have the same tensors in the same shapes.

    Raises:
        CheckpointError: one has not.
    """
    first = {tensor.key: tensor.extent.shape for tensor in experts[0]}
    for index, expert in enumerate(experts):
        found = {tensor.key: tensor.extent.shape for tensor in expert}
        if found != first:
            raise CheckpointError(
                f"{where}: expert {index} has {_sizes(found)}, expert 0 has {_sizes(first)}: "
                "download the checkpoint again"
            )


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{shown(name)} {list(shape)}" for name, shape in sorted(shapes.items()))


def plan_images(
    checkpoint: Checkpoint, experts: Experts, dtype: str, packing: Packing
) -> ExpertImages:
    """Lay out the rest of each layer and every expert.

    Args:
        checkpoint: headers of the files.
        experts: of it; at least one layer has some.
        dtype: torch's name of the format floating tensors get on the device.
        packing: what the images are for.
    """
    *rest, _ = plan_layouts(checkpoint, dtype, packing, without=experts.taken)
    units = plan_units(experts, dtype, packing)
    return ExpertImages(rest=tuple(rest), units=units, per_token=experts.per_token)


def plan_units(
    experts: Experts, dtype: str, packing: Packing
) -> Mapping[int, tuple[LayerLayout, ...]]:
    """Lay out every expert, by layer: its tensors as their bytes follow each other."""
    return {
        index: tuple(
            plan_layout(
                [
                    replace(tensor.extent, name=tensor.key)
                    for tensor in sorted(expert, key=lambda t: (t.extent.path, t.extent.offset))
                ],
                dtype,
                packing,
                stored={t.key: t.stored for t in expert if t.stored is not None},
                align_bytes=1 if dtype == "bfloat16" else _ALIGN_BYTES,
            )
            for expert in own.tensors
        )
        for index, own in experts.layers.items()
    }
