"""A model whose layers are rounded while they are loaded: `--wire int8` and `int4`.

It is described as the folder is that holds the rounded weights (compressed-tensors, symmetric
integers in groups of 32 inputs): its tensors have their names, formats and sizes, but no bytes in
any file; those are made of the original weights when a layer is read. So whatever asks for sizes,
places or modules sees a quantised model, and the run is that of such a folder, bit for bit.

Embedding, head, norms and biases stay as they are. No torch here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType

from offload_rt.config import Wire
from offload_rt.device.kinds import DeviceKind
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import Checkpoint, TensorExtent
from offload_rt.model.files import shown
from offload_rt.model.formats.methods import CODED_BITS, Form, Method
from offload_rt.model.formats.stored import Stored
from offload_rt.model.gguf.folder import refuse_gguf
from offload_rt.model.layout import CODED_PART, CODES_PART, FLOATS, GROUP, SCALES_PART
from offload_rt.model.names import EXPERT
from offload_rt.model.packed_files import CODED_DTYPE, code_name, expected_pieces

BITS: Mapping[Wire, int] = MappingProxyType({Wire.INT8: 8, Wire.INT4: 4})
_WEIGHT = ".weight"
_WORD_BITS = 32


def check_wire(checkpoint: Checkpoint, wire: Wire) -> None:
    """Refuse a form that weights cannot have.

    Raises:
        ConfigError: they are not packed, quantised already, in GGUF files, or of a mixture of
            experts.
    """
    ask, name = f"--wire {wire}", checkpoint.name
    layers = [extent for layer in checkpoint.layers for extent in layer]
    inside = [extent for extent in layers if _of_experts(extent)]
    if wire is Wire.LOSSLESS and not _is_lossless(checkpoint) and not _has_coded(checkpoint):
        if inside:
            raise ConfigError(
                f"{ask} keeps the codes of a packed folder, and {shown(inside[0].name)} of "
                f"{name} is of experts, which share slots of one size and have several in codes: "
                "use raw, packed files are unpacked when they are read"
            )
        raise ConfigError(
            f"{ask} keeps the codes that linear layers have in a packed folder, and {name} has "
            "none: make one with `offload-run pack`, or leave it out"
        )
    if wire not in BITS:
        return
    refuse_gguf(checkpoint.folder, f"and {ask} rounds weights of safetensors files")
    if checkpoint.config.quantised is not None:
        raise ConfigError(
            f"{ask} rounds weights of 16 or 32 bits, those of {name} are quantised "
            f"({checkpoint.config.quantised.name}): leave it out"
        )
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


def as_if_packed(checkpoint: Checkpoint, bits: int | None = None) -> Checkpoint:
    """The model as its packed folder would be, for looking ahead: its sizes are expected ones.

    Args:
        checkpoint: headers; of a packed folder they stay what they are.
        bits: of the code; None: those of a packed folder, or 12.

    Raises:
        ConfigError: it is packed in another code.
    """
    there = {extent.coded_bits for layer in checkpoint.layers for extent in layer if extent.coded}
    if there and bits not in {None, *there}:
        raise ConfigError(
            f"{checkpoint.name} is packed in {code_name(there.pop())} bits: leave --bits out, or "
            "`offload-run unpack` it first"
        )
    if _has_coded(checkpoint):
        return checkpoint
    chosen = bits or CODED_BITS

    def coded(extent: TensorExtent) -> TensorExtent:
        starts = expected_pieces(extent.nbytes // extent.element_bytes, chosen)
        large = extent.dtype == CODED_DTYPE and len(starts) > 1
        return dataclasses.replace(extent, coded=starts, coded_bits=chosen) if large else extent

    layers = tuple(tuple(map(coded, layer)) for layer in checkpoint.layers)
    return dataclasses.replace(checkpoint, layers=layers)


def wires_of(checkpoint: Checkpoint, wire: Wire, device: DeviceKind) -> tuple[Wire, ...]:
    """The forms that a model may have where one is asked for; `auto` is all that change nothing.

    Raises:
        ConfigError: the device cannot decode what is asked for.
    """
    if wire is Wire.LOSSLESS and not device.decodes:
        raise ConfigError(
            f"--wire {wire} is decoded when weights compute, for which there are no kernels on "
            f"{device.called}: use raw"
        )
    if wire is not Wire.AUTO:
        return (wire,)
    decodes = device.decodes and _has_coded(checkpoint)
    return (Wire.RAW, Wire.LOSSLESS) if decodes else (Wire.RAW,)


@lru_cache(maxsize=8)  # what is known of a model is kept by its identity
def wired(checkpoint: Checkpoint, wire: Wire) -> Checkpoint:
    """The model in the form that `--wire` asks for; `auto` is settled later.

    Raises:
        ConfigError: as `check_wire`.
    """
    if checkpoint.rounded is wire or (wire is Wire.LOSSLESS and _is_lossless(checkpoint)):
        return checkpoint
    check_wire(checkpoint, wire)
    if wire is Wire.LOSSLESS:
        return _with(checkpoint, _is_coded, _coded)
    if wire not in BITS:
        return checkpoint
    bits = BITS[wire]
    method = Method(
        name=f"rounded to {wire} by request",
        forms=frozenset({Form.PACKED}),
        bits=frozenset({bits}),
        blocks=frozenset({(1, GROUP)}),
    )
    made = _with(checkpoint, _rounds, lambda extent: _rounded(extent, bits))
    config = dataclasses.replace(checkpoint.config, quantised=method)
    return dataclasses.replace(made, config=config, rounded=wire)


def _with(
    checkpoint: Checkpoint,
    changes: Callable[[TensorExtent], bool],
    make: Callable[[TensorExtent], Stored],
) -> Checkpoint:
    """The model with some tensors of layers stored in another way."""
    layers, stored = [], dict(checkpoint.stored)
    for layer in checkpoint.layers:
        extents = list[TensorExtent]()
        for extent in layer:
            if not changes(extent):
                extents.append(extent)
                continue
            weight = make(extent)
            extents += weight.parts.values()
            stored |= {part.name: weight for part in weight.parts.values()}
        layers.append(tuple(extents))
    tensors = {e.name: e for group in (*layers, checkpoint.others) for e in group}
    return dataclasses.replace(
        checkpoint,
        tensors=MappingProxyType(tensors),
        layers=tuple(layers),
        stored=MappingProxyType(stored),
    )


def _is_lossless(checkpoint: Checkpoint) -> bool:
    return any(each.pieces for each in checkpoint.stored.values())


def _has_coded(checkpoint: Checkpoint) -> bool:
    extents = [extent for layer in checkpoint.layers for extent in layer]
    return not any(map(_of_experts, extents)) and any(map(_is_coded, extents))


def _of_experts(extent: TensorExtent) -> bool:
    return EXPERT.match(extent.name) is not None or len(extent.shape) > 2


def _is_coded(extent: TensorExtent) -> bool:
    """Whether it is a matrix in one of the codes."""
    return extent.name.endswith(_WEIGHT) and len(extent.shape) == 2 and bool(extent.coded)


def _coded(extent: TensorExtent) -> Stored:
    """A matrix that stays as it is coded."""
    module = extent.name.removesuffix(_WEIGHT)
    outputs, inputs = extent.shape
    part = dataclasses.replace(
        extent,
        name=f"{module}.{CODED_PART}",
        dtype="U8",
        shape=(extent.file_bytes,),
        nbytes=extent.file_bytes,
        coded=(),
    )
    return Stored(
        module=module,
        form=Form.CODED,
        outputs=outputs,
        inputs=inputs,
        bits=extent.coded_bits,
        groups=1,
        parts={CODED_PART: part},
        source=extent,
        pieces=tuple(start - extent.coded[0] for start in extent.coded),
    )


def _rounds(extent: TensorExtent) -> bool:
    """Whether it is a matrix of whole groups."""
    matrix = extent.name.endswith(_WEIGHT) and len(extent.shape) == 2 and extent.dtype in FLOATS
    return matrix and extent.shape[1] % GROUP == 0 and extent.shape[1] > 0


def _rounded(source: TensorExtent, bits: int) -> Stored:
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
