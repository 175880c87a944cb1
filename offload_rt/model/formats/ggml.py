"""Dequantising blocks of GGUF, whose scales lie among their codes.

A code times its scale (of the K types, the product of a block's scale and a sub-block's) has at
most 24 bits and so is exact in fp32. What a block adds or takes away (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K)
is rounded there once, and the sum once to the number format of the computation. Layouts:
ggml-common.h and the text of ggml-quants.c.

Work goes in blocks of outputs, so that what it passes through stays in the cache.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from offload_rt.kernels.blocks import DOUBLED, UNEVEN
from offload_rt.model.formats.blocks import outputs_in_blocks
from offload_rt.model.formats.integers import Bring
from offload_rt.model.formats.methods import BLOCKS, SCALES, Form
from offload_rt.model.formats.stored import Stored

PART = "weight"  # of a weight, [O, bytes of a row]
_SUBS = 8  # sub-blocks of Q4_K and Q5_K, of 32 numbers
_HALF_BYTES = 2
_INFINITE = 0x7C  # the exponent in the high byte of an fp16 number that is none

Decode = Callable[[torch.Tensor], torch.Tensor]


def bring_blocks(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """Rows of blocks, U8 [O, bytes], into `out` [O, I]."""
    decode, (_, nbytes) = _DECODE[stored.form], BLOCKS[stored.form]
    data, order = parts[PART], order_of(stored, out.device)

    def bring(rows: slice) -> None:
        chosen = data[rows] if order is None else data.index_select(0, order[rows])
        out[rows].copy_(decode(chosen.view(chosen.shape[0], -1, nbytes)).view(out[rows].shape))

    outputs_in_blocks(stored, out.device, bring)


def bring_paired(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """Plain numbers [O, I] in the file's order of rows into `out` [O, I]."""
    order = order_of(stored, out.device)
    assert order is not None  # or it would be an ordinary weight
    data = parts[PART]

    def bring(rows: slice) -> None:
        out[rows].copy_(data.index_select(0, order[rows]))

    outputs_in_blocks(stored, out.device, bring)


def broken_scales(data: np.ndarray[Any, np.dtype[np.uint8]], form: Form) -> int:
    """How many of the scales of whole blocks are NaN or infinite."""
    blocks = data.reshape(-1, BLOCKS[form][1])
    highs = (blocks[:, start + 1] & _INFINITE for start in SCALES[form])
    return sum(int(np.count_nonzero(high == _INFINITE)) for high in highs)


def order_of(stored: Stored, device: torch.device) -> torch.Tensor | None:
    """[O] which row of the file each output is; None: they are in order."""
    return _pairs(stored.outputs, stored.heads, device) if stored.heads else None


@lru_cache(maxsize=16)
def _pairs(outputs: int, heads: int, device: torch.device) -> torch.Tensor:
    """A head's output j of the first half is row 2 j there, and of the second half row 2 j + 1."""
    rows = torch.arange(outputs, device=device)
    return rows.view(heads, -1, 2).transpose(1, 2).reshape(-1)


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """[o, B] fp32: the fp16 number at a byte of each block."""
    data = blocks[..., start : start + _HALF_BYTES].contiguous()
    return data.view(torch.float16).squeeze(-1).float()


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[..., n] bytes as fp32 [..., 2, n]: low halves, then high ones."""
    found = torch.empty(*codes.shape[:-1], 2, codes.shape[-1], device=codes.device)
    found[..., 0, :] = codes & 15
    found[..., 1, :] = codes >> 4
    return found


def _fifths(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """[o, B, 32] fp32: sixteen, where the bit of a number in the four bytes is set."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    bits = blocks[..., start : start + 4, None] >> shifts & 1
    return bits.flatten(-2).float().mul_(16)


def _fours(blocks: torch.Tensor, *, zero: int, raised: bool, fifth: bool) -> torch.Tensor:
    """Q4_0 (d, 16 bytes of two), Q4_1 (d, m), Q5_0 and Q5_1 (and 4 bytes of fifth bits)."""
    head = 2 * _HALF_BYTES if raised else _HALF_BYTES
    codes = _nibbles(blocks[..., head + 4 * fifth :]).flatten(-2)
    if fifth:
        codes += _fifths(blocks, head)
    if zero:
        codes -= zero
    codes *= _half(blocks, 0)[..., None]
    return codes.add_(_half(blocks, _HALF_BYTES)[..., None]) if raised else codes


def _eights(blocks: torch.Tensor) -> torch.Tensor:
    """Q8_0: d, 32 signed bytes."""
    codes = blocks[..., _HALF_BYTES:].view(torch.int8).float()
    return codes.mul_(_half(blocks, 0)[..., None])


def _subs(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets [o, B, 8] of the sub-blocks of Q4_K and Q5_K.

    12 bytes have 6 bits of each: of the first four plainly; of the last four the low halves in the
    last bytes and the two high bits over those of the first.
    """
    low, high, last = (blocks[..., 4 + 4 * i : 8 + 4 * i] for i in range(3))
    scales = torch.cat([low & 63, last & 15 | (low >> 6) << 4], -1)
    offsets = torch.cat([high & 63, last >> 4 | (high >> 6) << 4], -1)
    return (
        _half(blocks, 0)[..., None] * scales.float(),
        _half(blocks, _HALF_BYTES)[..., None] * offsets.float(),
    )


def _four_k(blocks: torch.Tensor) -> torch.Tensor:
    """Q4_K: d, dmin, 12 bytes of sub-scales, 128 of two codes 32 numbers apart."""
    scales, offsets = _subs(blocks)
    codes = _nibbles(blocks[..., 16:].unflatten(-1, (4, 32))).view(*scales.shape, 32)
    return codes.mul_(scales[..., None]).sub_(offsets[..., None]).flatten(-2)


def _five_k(blocks: torch.Tensor) -> torch.Tensor:
    """Q5_K: d, dmin, 12 bytes of sub-scales, 32 of fifth bits, 128 as those of Q4_K."""
    scales, offsets = _subs(blocks)
    shifts = torch.arange(_SUBS, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[..., None, 16:48] >> shifts & 1).float()
    codes = _nibbles(blocks[..., 48:].unflatten(-1, (4, 32))).view(*scales.shape, 32)
    codes += fifth.mul_(16)
    return codes.mul_(scales[..., None]).sub_(offsets[..., None]).flatten(-2)


def _quarters(codes: torch.Tensor) -> torch.Tensor:
    """[o, B, 64] bytes as [o, B, 2, 4, 32]: of each half its lowest two bits first, and so on."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)[:, None]
    return codes.unflatten(-1, (2, 1, 32)) >> shifts & 3


def _two_k(blocks: torch.Tensor) -> torch.Tensor:
    """Q2_K: 16 bytes of a sub-scale and a sub-offset, 64 of four codes, d, dmin."""
    scales = _half(blocks, 80)[..., None] * (blocks[..., :16] & 15).float()
    offsets = _half(blocks, 82)[..., None] * (blocks[..., :16] >> 4).float()
    codes = _quarters(blocks[..., 16:80]).float().view(*scales.shape, 16)
    return codes.mul_(scales[..., None]).sub_(offsets[..., None]).flatten(-2)


def _three_k(blocks: torch.Tensor) -> torch.Tensor:
    """Q3_K: 32 bytes of third bits, 64 of four codes, 12 of 6-bit sub-scales, d.

    Of the sub-scales 8 bytes have the low halves, 4 the two high bits. A third bit that is not set
    takes four away.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    third = (blocks[..., None, :32] >> shifts & 1).view(*blocks.shape[:-1], 2, 4, 32)
    codes = (_quarters(blocks[..., 32:96]) | third << 2).float().sub_(4)
    low, high = blocks[..., 96:104], blocks[..., 104:108]
    low = torch.cat([low & 15, low >> 4], -1)
    high = (high[..., None, :] >> shifts[:4] * 2 & 3).flatten(-2)
    scales = _half(blocks, 108)[..., None] * (low | high << 4).float().sub_(32)
    return codes.view(*scales.shape, 16).mul_(scales[..., None]).flatten(-2)


@lru_cache(maxsize=4)
def _table(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _picked(codes: torch.Tensor, numbers: tuple[int, ...]) -> torch.Tensor:
    """[..., n] bytes as fp32 [..., 2, n]: numbers of low halves, then of high ones."""
    index = torch.stack([codes & 15, codes >> 4], -2)
    found = _table(numbers, codes.device).index_select(0, index.flatten().to(torch.int32))
    return found.view(index.shape)


def _uneven(blocks: torch.Tensor) -> torch.Tensor:
    """IQ4_NL: d, 16 bytes of two indices into a table."""
    numbers = _picked(blocks[..., _HALF_BYTES:], UNEVEN).flatten(-2)
    return numbers.mul_(_half(blocks, 0)[..., None])


def _uneven_k(blocks: torch.Tensor) -> torch.Tensor:
    """IQ4_XS: d, 2 bytes of high bits and 4 of low halves of 6-bit sub-scales, 128 of indices."""
    high = blocks[..., 2:4, None] >> torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    low = torch.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], -1).flatten(-2)
    signed = (low | (high.flatten(-2) & 3) << 4).float().sub_(32)
    scales = _half(blocks, 0)[..., None] * signed
    numbers = _picked(blocks[..., 8:].unflatten(-1, (_SUBS, 16)), UNEVEN).flatten(-2)
    return numbers.mul_(scales[..., None]).flatten(-2)


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """MXFP4: a power of two (halved, as the table is doubled), 16 bytes of two FP4 numbers."""
    power = blocks[..., 0].int()
    tiny = torch.full_like(power, 0x00200000) << power.clamp(max=1)
    scales = torch.where(power < 2, tiny, (power - 1) << 23).view(torch.float32)
    return _picked(blocks[..., 1:], DOUBLED).flatten(-2).mul_(scales[..., None])


def _six_k(blocks: torch.Tensor) -> torch.Tensor:
    """Q6_K: 128 bytes of low halves, 64 of two high bits, 16 signed sub-scales, d.

    A half of the block has 64 and 32 bytes: its numbers j and j + 64 share a low byte, its numbers
    j, j + 32, j + 64 and j + 96 a high one.
    """
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64))).view(*blocks.shape[:-1], 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3
    codes = low.add_(high.float().mul_(16)).sub_(32)
    scales = _half(blocks, 208)[..., None] * blocks[..., 192:208].view(torch.int8).float()
    return codes.view(*scales.shape, 16).mul_(scales[..., None]).flatten(-2)


_DECODE: dict[Form, Decode] = {
    Form.Q4_0: partial(_fours, zero=8, raised=False, fifth=False),
    Form.Q4_1: partial(_fours, zero=0, raised=True, fifth=False),
    Form.Q5_0: partial(_fours, zero=16, raised=False, fifth=True),
    Form.Q5_1: partial(_fours, zero=0, raised=True, fifth=True),
    Form.Q8_0: _eights,
    Form.Q2_K: _two_k,
    Form.Q3_K: _three_k,
    Form.Q4_K: _four_k,
    Form.Q5_K: _five_k,
    Form.Q6_K: _six_k,
    Form.IQ4_NL: _uneven,
    Form.IQ4_XS: _uneven_k,
    Form.BLOCK_MXFP4: _mxfp4,
}
DECODERS: dict[Form, Bring] = {**dict.fromkeys(_DECODE, bring_blocks), Form.PAIRED: bring_paired}
