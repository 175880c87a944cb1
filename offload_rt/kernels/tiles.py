"""Shapes for which torch's kernels give a row, or a number, the same bits whatever comes beside it.

A product of one row adds up in another order than one of many, and rows left over from whole
multiples of 4 do, too; multiples of 16 are one class (docs/RESULTS.md, "Row-invariant passes").
Where oneDNN has a processor's matrix registers, it takes them from 33 rows on, in blocks that go by
the number of rows: there each tile is a product of its own, or two are, where that was compared.
"""

from collections.abc import Callable

import torch

from offload_rt.device.system import takes_matrix_registers
from offload_rt.kernels.rows import ROW_TILE

FEW_OUTPUTS = 64  # of a product, below which torch goes by the number of rows: tiles are kept apart
_GRAIN = 2**15  # numbers that one thread takes at least, of torch's elementwise kernels
_LANES = 64  # numbers that those take at once, for any format

Forward = Callable[[torch.Tensor], torch.Tensor]
_IN_PAIRS = set[tuple[int, int, torch.dtype, int]]()  # products, as `_key` names them


def allow_pairs(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Have products [S, I] by [O, I] take two tiles at once, now that their bits are known alike.

    It is only faster: matrix registers take 32 rows in 1.1 to 1.2 times the seconds of 16.
    """
    _IN_PAIRS.add(_key(inputs, outputs, dtype))


def _key(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[int, int, torch.dtype, int]:
    return inputs, outputs, dtype, torch.get_num_threads()


def in_tiles(
    forward: Forward,
    rows: torch.Tensor,
    *,
    outputs: int = 0,
    apart: bool = False,
    tile: int = ROW_TILE,
) -> torch.Tensor:
    """What `forward` makes of rows [..., I], given whole tiles of them: [..., O].

    Args:
        forward: the product.
        rows: to be multiplied.
        outputs: O, of a product of torch's with a weight [O, I]; 0: of another.
        apart: give it one tile after the other, as is done where kernels go by their number.
        tile: its rows.
    """
    flat, at_once = rows.reshape(-1, rows.shape[-1]), tile
    count = flat.shape[0]
    if not apart and rows.device.type == "cpu" and goes_by_count(rows.dtype):
        apart = True
        if _key(rows.shape[-1], outputs, rows.dtype) in _IN_PAIRS:
            at_once = 2 * tile
    if missing := -count % tile:
        flat = torch.nn.functional.pad(flat, (0, 0, 0, missing))
    if apart and len(flat) > at_once:
        made = torch.cat([forward(part) for part in flat.split(at_once)])
    else:
        made = forward(flat)
    return made[:count].view(*rows.shape[:-1], -1)


def goes_by_count(dtype: torch.dtype) -> bool:
    """Whether a CPU's product of some whole tiles adds up in another order than one of others."""
    return takes_matrix_registers(str(dtype).removeprefix("torch."))


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
