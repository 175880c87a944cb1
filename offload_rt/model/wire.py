"""A model whose layers are rounded while they are loaded: `--wire int8` and `int4`.

It is described as the folder is that holds the rounded weights (compressed-tensors, symmetric
integers in groups of 32 inputs): its tensors have their names, formats and sizes, but no bytes in
any file; those are made of the original weights when a layer is read. So whatever asks for sizes,
places or modules sees a quantised model, and the run is that of such a folder, bit for bit.

Embedding, head, norms and biases stay as they are. No torch here.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from offload_rt.config import Wire
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import Checkpoint, TensorExtent
from offload_rt.model.files import shown
from offload_rt.model.formats.methods import Form, Method
from offload_rt.model.formats.rounding import GROUP
from offload_rt.model.formats.stored import Stored
from offload_rt.model.layout import CODES_PART, FLOATS, SCALES_PART
from offload_rt.model.names import EXPERT

BITS: Mapping[Wire, int] = MappingProxyType({Wire.INT8: 8, Wire.INT4: 4})
_WEIGHT = ".weight"
_WORD_BITS = 32


def check_wire(checkpoint: Checkpoint, wire: Wire) -> None:
    """Refuse to round what cannot be rounded so.

    Raises:
        ConfigError: weights are quantised already, or most of them are in experts.
    """
    if wire not in BITS:
        return
    ask, name = f"--wire {wire}", checkpoint.name
    if checkpoint.config.quantised is not None:
        raise ConfigError(
            f"{ask} rounds weights of 16 or 32 bits, those of {name} are quantised "
            f"({checkpoint.config.quantised.name}): leave it out"
        )
    layers = [extent for layer in checkpoint.layers for extent in layer]
    inside = [e for e in layers if EXPERT.match(e.name) or len(e.shape) > 2]
    if inside:
        raise ConfigError(
            f"{ask} rounds linear layers, and {shown(inside[0].name)} of {name} is of experts: "
            "leave it out, or take a model that is quantised"
        )
    if not any(map(_rounds, layers)):
        raise ConfigError(
            f"{ask} rounds in groups of {GROUP} inputs, and no weight of the layers of {name} has "
            "a multiple of that: leave it out"
        )


def wired(checkpoint: Checkpoint, wire: Wire) -> Checkpoint:
    """The model in the form that `--wire` asks for.

    Raises:
        ConfigError: as `check_wire`.
    """
    check_wire(checkpoint, wire)
    if wire not in BITS:
        return checkpoint
    layers, stored = [], dict[str, Stored]()
    for layer in checkpoint.layers:
        extents = list[TensorExtent]()
        for extent in layer:
            if not _rounds(extent):
                extents.append(extent)
                continue
            weight = _stored(extent, BITS[wire])
            extents += weight.parts.values()
            stored |= {part.name: weight for part in weight.parts.values()}
        layers.append(tuple(extents))
    tensors = {e.name: e for group in (*layers, checkpoint.others) for e in group}
    method = Method(
        name=f"rounded to {wire} by request",
        forms=frozenset({Form.PACKED}),
        bits=frozenset({BITS[wire]}),
        blocks=frozenset({(1, GROUP)}),
    )
    return dataclasses.replace(
        checkpoint,
        config=dataclasses.replace(checkpoint.config, quantised=method),
        tensors=MappingProxyType(tensors),
        layers=tuple(layers),
        stored=MappingProxyType(stored),
        rounded=wire,
    )


def _rounds(extent: TensorExtent) -> bool:
    """Whether it is a matrix of whole groups."""
    matrix = extent.name.endswith(_WEIGHT) and len(extent.shape) == 2 and extent.dtype in FLOATS
    return matrix and extent.shape[1] % GROUP == 0 and extent.shape[1] > 0


def _stored(source: TensorExtent, bits: int) -> Stored:
    """What a weight is when it is rounded."""
    module = source.name.removesuffix(_WEIGHT)
    outputs, inputs = source.shape

    def part(word: str, dtype: str, columns: int, element_bytes: int) -> TensorExtent:
        return TensorExtent(
            name=f"{module}.{word}",
            dtype=dtype,
            shape=(outputs, columns),
            path=source.path,
            offset=source.offset,
            nbytes=outputs * columns * element_bytes,
        )

    words, groups = inputs * bits // _WORD_BITS, inputs // GROUP
    parts = {
        CODES_PART: part(CODES_PART, "I32", words, _WORD_BITS // 8),
        SCALES_PART: part(SCALES_PART, source.dtype, groups, source.element_bytes),
    }
    return Stored(
        module=module,
        form=Form.PACKED,
        outputs=outputs,
        inputs=inputs,
        bits=bits,
        groups=groups,
        parts=parts,
        source=source,
    )
