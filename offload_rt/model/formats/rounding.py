"""Rounding weights to integers of 8 or 4 bits while they are loaded, as `--wire` asks for.

A group of 32 inputs of an output shares a scale. The number of the group with the largest magnitude
becomes the code that is farthest from 0 (-8 of 4 bits, -128 of 8), so a scale may be negative:
scale = that number / -8, rounded to the format of the weight; code = number / scale in fp32,
rounded to the nearest, ties to even, and no larger than 7. Codes and scales are those of
compressed-tensors `pack-quantized`, symmetric: a weight is code x scale. No torch here.
"""

from typing import Any

import numpy as np

from offload_rt.model.layout import GROUP

_HALF_BF16 = np.uint32(0x7FFF)

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Numbers = np.ndarray[Any, np.dtype[np.float32]]


class NotFiniteError(Exception):
    """Weights that cannot be rounded, as some are NaN or infinite, or too large for their scale."""


def numbers_of(data: Bytes, dtype: str) -> Numbers:
    """[n] fp32 of the bytes of a tensor; `dtype` is safetensors' name of its format."""
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def rounded(numbers: Numbers, bits: int, dtype: str) -> tuple[Bytes, Bytes]:
    """Round some outputs of a weight.

    Args:
        numbers: [o, I], I a multiple of GROUP.
        bits: 8 or 4.
        dtype: safetensors' name of the format of scales.

    Returns:
        The bytes of codes, [o, I * bits / 32] I32, and of scales, [o, I / GROUP].

    Raises:
        NotFiniteError: a scale would be no number.
    """
    outputs, inputs = numbers.shape
    groups = numbers.reshape(outputs, inputs // GROUP, GROUP)
    low, high = groups.min(axis=2), groups.max(axis=2)
    half = 1 << bits - 1
    with np.errstate(over="ignore", invalid="ignore"):
        stored, scales = _as_stored(np.where(-low > high, low, high) / np.float32(-half), dtype)
    if not np.isfinite(scales).all():
        raise NotFiniteError
    divisors = np.where(scales == 0, np.float32(1), scales)[:, :, None]
    near = np.clip(np.rint(groups / divisors), -half, half - 1)
    codes: Bytes = (near + half).astype(np.uint8).reshape(-1)
    if bits == 4:
        codes = codes[0::2] | codes[1::2] << np.uint8(4)
    return codes, stored.reshape(-1).view(np.uint8)


def _as_stored(numbers: Numbers, dtype: str) -> tuple[np.ndarray[Any, Any], Numbers]:
    """Numbers in a format, and what they are there; a zero has no sign."""
    numbers = np.where(numbers == 0, np.float32(0), numbers)
    if dtype == "BF16":
        bits = numbers.view(np.uint32)
        words = ((bits + _HALF_BF16 + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        exact = (words.astype(np.uint32) << 16).view(np.float32)
        return words, np.where(np.isfinite(numbers), exact, numbers)
    stored = numbers.astype(np.float16 if dtype == "F16" else np.float32)
    return stored, stored.astype(np.float32)
