"""Dequantising pairs of 4-bit numbers that are looked up: FP4 (E2M1) and bitsandbytes' tables.

A byte is looked up as two numbers at once, then multiplied by its block's scale. The product is
rounded once to fp32 and once to the number format of the computation; bitsandbytes' in between to
the format that it states.
"""

from functools import lru_cache

import torch

from offload_rt.model.formats.blocks import in_blocks, outputs_in_blocks
from offload_rt.model.formats.grids import powers, spread
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.stored import BLOCK_NUMBERS, Stored

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*_HALF, *(-number for number in _HALF))


def bring_fours(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """FP4 [O, I / 2], low nibble first, times scales [O, G], into `out` [O, I].

    A scale of NVFP4 is an FP8 number that one of the weight divides (compressed-tensors) or
    multiplies (ModelOpt) in fp32 first. One of MXFP4 is a power of two, so that bf16 holds it.
    """
    dtype = torch.float32
    if stored.form is Form.MXFP4:
        scales = powers(parts["weight_scale"])
        dtype = out.dtype if out.dtype is torch.bfloat16 else dtype
    else:
        scales = parts["weight_scale"].float()
        if stored.form is Form.NVFP4:
            scales = scales / parts["weight_global_scale"].view(1)
        else:
            scales = scales * parts["weight_scale_2"].view(1)
    packed = parts["weight" if stored.form is Form.NVFP4_PRODUCT else "weight_packed"]
    scales = scales.to(dtype).view(stored.outputs, stored.groups)
    table = _e2m1(dtype, out.device)

    def bring(part: slice) -> None:
        numbers = _looked_up(packed[part], table, dtype).view(out[part].shape)
        spread(numbers, scales[part], stored.block[1], torch.mul, out[part])

    outputs_in_blocks(stored, out.device, bring)


def bring_flat(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """Pairs of bitsandbytes, high nibble first, in the order of the matrix."""
    facts = stored.flat
    assert facts is not None
    codes, flat = parts["weight"].reshape(-1).view(torch.uint8), out.view(-1)
    table = _pairs(parts["quant_map"], high_first=True)
    scales, rounded = _absmax(stored, parts), getattr(torch, facts.dtype)

    def bring(part: slice) -> None:
        numbers = _looked_up(codes[part.start // 2 : (part.stop + 1) // 2], table, torch.float32)
        per_block = numbers.view(-1, facts.block)
        at = part.start // facts.block
        per_block.mul_(scales[at : at + per_block.shape[0], None])
        flat[part].copy_(numbers if rounded is out.dtype else numbers.to(rounded))

    # Whole blocks: both are powers of two.
    in_blocks(stored.numbers, BLOCK_NUMBERS[out.device.type], out.device, bring)


def _absmax(stored: Stored, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The largest number of each block, fp32; nested ones are a look-up times a scale, and more."""
    facts, stated = stored.flat, parts["absmax"]
    assert facts is not None
    if facts.nested is None:
        return stated
    wide = parts["nested_quant_map"].index_select(0, stated.to(torch.int32))
    each = parts["nested_absmax"].repeat_interleave(facts.nested)[: wide.shape[0]]
    return wide.mul_(each).add_(facts.offset)


def _looked_up(codes: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as twice as many numbers, flat."""
    index = codes.reshape(-1).to(torch.int32)
    return table.index_select(0, index).view(dtype)


@lru_cache(maxsize=8)
def _e2m1(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return _pairs(torch.tensor(_E2M1, dtype=dtype)).to(device)


def _pairs(numbers: torch.Tensor, high_first: bool = False) -> torch.Tensor:
    """[256] of both numbers of each byte, as one integer each, of 16 numbers."""
    byte = torch.arange(256, device=numbers.device)
    both = [byte >> 4, byte & 15] if high_first else [byte & 15, byte >> 4]
    whole = torch.int64 if numbers.dtype is torch.float32 else torch.int32
    return numbers[torch.stack(both, dim=1)].contiguous().view(whole).flatten()


DECODERS = {
    Form.NVFP4: bring_fours,
    Form.NVFP4_PRODUCT: bring_fours,
    Form.MXFP4: bring_fours,
    Form.BNB4: bring_flat,
}
