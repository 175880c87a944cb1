"""Formats of the weights of a model that only drafts, and their bytes. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from offload_rt.config import DraftWeights
from offload_rt.device.kinds import DeviceKind
from offload_rt.device.system import processor_flags
from offload_rt.errors import ConfigError
from offload_rt.model.layout import LayerLayout

GROUP = 32  # inputs that share a scale and an offset, of 4-bit weights
_INT4_OUTPUTS = 16  # the kernels compute whole multiples of that
_INT8_INPUTS, _INT8_OUTPUTS = 512, 48  # FBGEMM's kernels for VNNI fill up blocks of these sizes
_PANEL, _LANES, _FLAG = 64, 16, "avx512_vnni"  # of kernels of our own (`kernels/rounded.py`)
_ROW_SCALE_BYTES = 4
_SCALE_BYTES, _PAIR_BYTES = 8, 4  # per output of int8 (with a sum of weights), per group of int4


def resolve_weights(
    asked: DraftWeights, dtype: str, device: DeviceKind, flag: str = "--draft-weights"
) -> DraftWeights:
    """Settle `auto`: on a CPU bf16 models are rounded to int8, everything else stays as it is.

    Args:
        asked: what the user says.
        dtype: torch's name of the drafting model's number format.
        device: what computes.
        flag: that says it.

    Raises:
        ConfigError: the device or the number format has no such kernels.
    """
    if asked is DraftWeights.AUTO:
        return device.draft_weights if dtype == "bfloat16" else DraftWeights.SAME
    if asked is DraftWeights.SAME or dtype in device.kernels.get(asked, ()):
        return asked
    if asked not in device.kernels:
        raise ConfigError(f"{flag} {asked} is for the CPU: use int4 or same on {device.called}")
    raise ConfigError(
        f"{flag} {asked} on {device.called} is for bf16 models, the one that drafts is {dtype}: "
        "use same"
    )


def rounded_kind(dtype: str, device: DeviceKind) -> DraftWeights | None:
    """To what a model's own weights are rounded for drafting where that may be worth while."""
    return device.copy_weights if dtype == "bfloat16" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A format that weights are rounded to; what computes with it is in `rounded.py`.

    Attributes:
        share: of the bytes of 16-bit weights, where the format was not timed.
        fits: whether a weight [outputs, inputs] can be rounded so.
        nbytes: of a rounded weight [outputs, inputs] whose format torch calls so.
    """

    share: float
    fits: Callable[[int, int], bool]
    nbytes: Callable[[int, int, str], int]


def in_panels(outputs: int, inputs: int, *, dtype: str) -> bool:
    """Whether kernels of our own take a weight in 8 or 4 bits, as `kernels/rounded.suits` says.

    They fill nothing up, and an output head that they multiply with is looked up in, too.

    Args:
        outputs: of the weight.
        inputs: of it.
        dtype: torch's name of its format before; empty: not known.
    """
    fits = dtype == "bfloat16" and not outputs % _PANEL and not inputs % _LANES
    return fits and _FLAG in processor_flags() and find_spec("llvmlite") is not None


def _int8_bytes(outputs: int, inputs: int, dtype: str) -> int:
    """At most: kernels differ by CPU."""
    filled = outputs * inputs
    if not in_panels(outputs, inputs, dtype=dtype):
        filled = _whole(outputs, _INT8_OUTPUTS) * _whole(inputs, _INT8_INPUTS)
    return filled + outputs * _SCALE_BYTES


def _int4_bytes(outputs: int, inputs: int, dtype: str) -> int:
    return outputs * inputs // 2 + outputs * (inputs // GROUP) * _PAIR_BYTES


def _whole(count: int, block: int) -> int:
    return -(-count // block) * block


ROUNDED = {
    DraftWeights.INT8: Rounded(share=0.5, fits=lambda outputs, inputs: True, nbytes=_int8_bytes),
    DraftWeights.INT4: Rounded(
        share=0.3,
        fits=lambda outputs, inputs: outputs % _INT4_OUTPUTS == 0 and inputs % GROUP == 0,
        nbytes=_int4_bytes,
    ),
}


def takes(weights: DraftWeights, outputs: int, inputs: int) -> bool:
    """Whether a weight [outputs, inputs] can be rounded so."""
    return weights in ROUNDED and ROUNDED[weights].fits(outputs, inputs)


def matrix_bytes(weights: DraftWeights, outputs: int, inputs: int, *, dtype: str = "") -> int:
    """Bytes of a rounded weight [outputs, inputs]; at most, where its format is not known."""
    return ROUNDED[weights].nbytes(outputs, inputs, dtype)


def embedding_bytes(rows: int, width: int) -> int:
    """Bytes of a rounded embedding [rows, width]: 8 bits a number, and a scale per row."""
    return rows * (width + _ROW_SCALE_BYTES)


def layer_bytes(layout: LayerLayout, weights: DraftWeights) -> int:
    """Bytes of a layer whose matrices are rounded where they can be."""
    if weights is DraftWeights.SAME:
        return layout.nbytes
    total = 0
    for each in layout.stored:
        rounds = takes(weights, each.outputs, each.inputs) and not each.of_expert
        total += matrix_bytes(weights, each.outputs, each.inputs) if rounds else each.nbytes
    parts = {extent.name for each in layout.stored for extent in each.parts.values()}
    for placement in layout.placements:
        shape = placement.shape
        if placement.name not in parts:
            rounds = len(shape) == 2 and takes(weights, *shape)
            dtype = placement.dtype
            total += matrix_bytes(weights, *shape, dtype=dtype) if rounds else placement.nbytes
    return total
