"""Dequantising integers with a scale, and perhaps a zero point, for each group of inputs.

A weight is (code - zero) x scale: the difference is exact, the product is rounded once to fp32 and
once to the number format of the computation. Where scale and result have one 16-bit format, the
product of a code's few bits and the scale is exact in fp32, and kernels of that format round it
once, to the same bits.

Work goes in blocks of outputs, so that what it passes through stays in the cache.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch

from offload_rt.model.formats.stored import BLOCK_NUMBERS, Stored

_WORD_BITS = 32


def bring_packed(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """compressed-tensors `pack-quantized` into `out` [O, I].

    Codes lie low bits first along the inputs, raised by half of their range, as zero points do
    along the outputs.
    """
    middle = 1 << stored.bits - 1
    zeros = parts.get("weight_zero_point")
    if zeros is not None:
        zeros = codes_of(zeros.t().contiguous(), stored.bits, stored.outputs).t()
    index = parts.get("weight_g_idx")
    for rows in blocks(stored, out.device):
        numbers(
            parts["weight_packed"][rows],
            parts["weight_scale"][rows],
            middle if zeros is None else zeros[rows],
            stored.bits,
            out[rows],
            index,
        )


def blocks(stored: Stored, device: torch.device) -> Iterator[slice]:
    """Parts of the outputs that are dequantised at once."""
    step = max(1, BLOCK_NUMBERS[device.type] // stored.inputs)
    return (slice(start, start + step) for start in range(0, stored.outputs, step))


def numbers(
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | int,
    bits: int,
    out: torch.Tensor,
    index: torch.Tensor | None,
) -> None:
    """Dequantise some outputs.

    Args:
        words: [o, W] int32, codes low bits first.
        scales: [o, G].
        zeros: [o, G], or one for all.
        bits: of a code.
        out: [o, I].
        index: [I] the group of each input; None: they follow each other.
    """
    rows, inputs = out.shape
    exact = out.dtype if scales.dtype is out.dtype else torch.float32
    each = zeros.to(exact) if isinstance(zeros, torch.Tensor) else None
    codes = codes_less(words, bits, inputs, zeros if isinstance(zeros, int) else 0, exact)
    scales = scales.to(exact)
    if index is not None:
        index = index.long()
        if each is not None:
            codes.sub_(each[:, index])
        out.copy_(codes.mul_(scales[:, index]))
        return
    grouped = codes.view(rows, scales.shape[1], -1)
    if each is not None:
        grouped.sub_(each[:, :, None])
    if exact is out.dtype:
        torch.mul(grouped, scales[:, :, None], out=out.view_as(grouped))
    else:
        out.copy_(grouped.mul_(scales[:, :, None]).view_as(out))


def codes_less(
    words: torch.Tensor, bits: int, count: int, zero: int, dtype: torch.dtype
) -> torch.Tensor:
    """[o, W] words as [o, count] codes less a zero point, in a format that holds them exactly."""
    if bits == 4 and dtype.itemsize == 2 and count % 8 == 0:
        pairs = words.contiguous().view(torch.uint8).flatten().to(torch.int32)
        table = _pairs(zero, dtype, words.device)
        return torch.index_select(table, 0, pairs).view(dtype).view(words.shape[0], count)
    return codes_of(words, bits, count).to(dtype).sub_(zero)


@lru_cache(maxsize=8)
def _pairs(zero: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256] int32: two numbers of 16 bits for each byte of two codes."""
    byte = torch.arange(256)
    both = torch.stack([byte & 15, byte >> 4], dim=1) - zero
    return both.to(dtype).view(torch.int32).flatten().to(device)


def codes_of(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """[R, W] int32, each row one stream of codes, low bits first, to [R, count]."""
    rows, mask = words.shape[0], (1 << bits) - 1
    if bits == 8:
        return words.contiguous().view(torch.uint8)[:, :count]
    if _WORD_BITS % bits == 0:
        shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32, device=words.device)
        return ((words[..., None] >> shifts) & mask).view(rows, -1)[:, :count]
    start = torch.arange(count, device=words.device) * bits
    first, shift = start // _WORD_BITS, start % _WORD_BITS
    second = (first + 1).clamp(max=words.shape[1] - 1)
    wide = words.to(torch.int64) & 0xFFFFFFFF
    joined = wide[:, first] | wide[:, second] << _WORD_BITS
    return (joined >> shift & mask).to(torch.int32)
