"""Shapes for which torch's kernels give a row, or a number, the same bits whatever comes beside it.

A product of one row adds up in another order than one of many, and rows left over from whole
multiples of 4 do, too; multiples of 16 are one class (docs/RESULTS.md, "Row-invariant passes").
Where oneDNN has a processor's matrix registers, it takes them from 33 rows on, in blocks that go by
the number of rows: there each tile is a product of its own.
"""

from collections.abc import Callable

import torch

from offload_rt.device.system import processor_flags, takes_matrix_registers
from offload_rt.kernels.rows import ROW_TILE

FEW_OUTPUTS = 64  # of a product, below which torch goes by the number of rows: tiles are kept apart
_GRAIN = 2**15  # numbers that one thread takes at least, of torch's elementwise kernels
_LANES = 64  # numbers that those take at once, for any format
_MATRIX_FLAGS = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}

Forward = Callable[[torch.Tensor], torch.Tensor]


def in_tiles(
    forward: Forward, rows: torch.Tensor, *, apart: bool = False, tile: int = ROW_TILE
) -> torch.Tensor:
    """What `forward` makes of rows [..., I], given whole tiles of them: [..., O].

    Args:
        forward: the product.
        rows: to be multiplied.
        apart: give it one tile after the other, as is done where kernels go by their number.
        tile: its rows.
    """
    apart = apart or (rows.device.type == "cpu" and goes_by_count(rows.dtype))
    flat = rows.reshape(-1, rows.shape[-1])
    count = flat.shape[0]
    if missing := -count % tile:
        flat = torch.nn.functional.pad(flat, (0, 0, 0, missing))
    if apart and len(flat) > tile:
        made = torch.cat([forward(tile) for tile in flat.split(tile)])
    else:
        made = forward(flat)
    return made[:count].view(*rows.shape[:-1], -1)


def goes_by_count(dtype: torch.dtype) -> bool:
    """Whether a CPU's product of some whole tiles adds up in another order than one of others."""
    return _MATRIX_FLAGS.get(dtype) in processor_flags() and takes_matrix_registers()


def evenly(function: Forward, numbers: torch.Tensor) -> torch.Tensor:
    """An elementwise function of any tensor, all of it in whole vectors, whatever its size.

    What is left over from whole vectors, at each thread's end, is computed by other code, an ulp
    apart for exponentials and the like. Here nothing is left over.
    """
    flat = numbers.reshape(-1)
    count, most = flat.numel(), torch.get_num_threads()
    filled = -1
    whole = count
    while whole != filled:  # more numbers may go to more threads
        filled = whole
        unit = _LANES * min(most, -(-filled // _GRAIN))
        whole = -(-filled // unit) * unit if unit else filled
    if whole > count:
        flat = torch.cat([flat, flat.new_zeros(whole - count)])
    return function(flat)[:count].view(numbers.shape)
