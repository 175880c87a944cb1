"""Dequantising numbers of a byte each, with a grid of scales: FP8, int8, bitsandbytes' int8.

A product is rounded once to fp32 and once to the number format of the computation. Where scale and
result have one 16-bit format, the product of the few bits of both is exact in fp32, and kernels of
that format round it once, to the same bits.
"""

from functools import lru_cache

import torch

from offload_rt.model.formats.blocks import outputs_in_blocks
from offload_rt.model.formats.integers import exact_format
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.stored import Stored

_BNB_SHARE = 7.874015718698502e-3  # 1 / 127 as bitsandbytes has it
_POWER_BIAS = 127


def bring_grid(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """`weight` [O, I] of FP8 or int8, times its block's scale, into `out` [O, I]."""
    scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
    assert scale is not None  # or it would not have been found
    if scale.dtype is torch.uint8:
        scale = powers(scale)
    rows, columns = stored.block
    scales = _by_output(scale, stored)
    zeros = parts.get("weight_zero_point")
    offsets = None if zeros is None else _by_output(zeros, stored)
    exact = exact_format(scales, out)

    def bring(part: slice) -> None:
        numbers = _numbers(parts["weight"][part], exact)
        if offsets is not None:
            spread(numbers, offsets[part].to(exact), columns, torch.sub, numbers)
        spread(numbers, scales[part].to(exact), columns, torch.mul, out[part])

    outputs_in_blocks(stored, out.device, bring)


def bring_rows(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """The `weight` of bitsandbytes, int8 [O, I] times `SCB` [O], times what 127 is one of."""

    def bring(part: slice) -> None:
        wide = parts["weight"][part].float().mul_(parts["SCB"][part, None])
        out[part].copy_(wide.mul_(_BNB_SHARE))

    outputs_in_blocks(stored, out.device, bring)


def powers(exponents: torch.Tensor) -> torch.Tensor:
    """Bytes that are exponents of two (E8M0), as fp32."""
    table = _power_table(exponents.device)
    return table.index_select(0, exponents.flatten().to(torch.int32)).view(exponents.shape)


def spread(
    numbers: torch.Tensor,
    each: torch.Tensor,
    size: int,
    combine: object,
    out: torch.Tensor,
) -> None:
    """Combine numbers [o, I] with one of [o, G] for each `size` of the inputs."""
    assert callable(combine)
    count, inputs = numbers.shape
    if inputs % size:
        combined = combine(numbers, each.repeat_interleave(size, 1)[:, :inputs])
        out.copy_(combined)
    elif numbers.dtype is out.dtype:
        shape = (count, -1, size)
        combine(numbers.view(shape), each[:, :, None], out=out.view(shape))
    else:
        grouped = numbers.view(count, -1, size)
        combine(grouped, each[:, :, None], out=grouped)
        out.copy_(numbers)


def _by_output(scale: torch.Tensor, stored: Stored) -> torch.Tensor:
    """A grid of scales as [O or 1, G], without a copy where one row serves all outputs."""
    rows, _ = stored.block
    grid = scale.reshape(-(-stored.outputs // rows), stored.groups)
    if grid.shape[0] == 1:
        return grid.expand(stored.outputs, -1)
    return grid if rows == 1 else grid.repeat_interleave(rows, 0)[: stored.outputs]


def _numbers(codes: torch.Tensor, exact: torch.dtype) -> torch.Tensor:
    """A weight's bytes as numbers; looked up, as torch converts FP8 on a CPU one by one."""
    if codes.dtype is torch.int8 or codes.is_cuda:
        return codes.to(exact)
    index = codes.view(torch.uint8).flatten().to(torch.int32)
    return _fp8_table(exact, codes.device).index_select(0, index).view(codes.shape)


@lru_cache(maxsize=8)
def _fp8_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256] what each byte is."""
    return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).to(dtype).to(device)


@lru_cache(maxsize=4)
def _power_table(device: torch.device) -> torch.Tensor:
    """[256] fp32; the last one is no number."""
    exact = [2.0 ** (byte - _POWER_BIAS) for byte in range(255)]
    return torch.tensor([*exact, torch.nan], dtype=torch.float64).float().to(device)


DECODERS = {Form.FP8: bring_grid, Form.INT8: bring_grid, Form.BNB8: bring_rows}
