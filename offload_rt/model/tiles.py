"""Row-invariant passes where kernels are picked by all of a shape, as on a GPU.

There the order of a product's sums, and of a norm's, goes by the number of rows. So whole layers
are given exactly as many rows as a tile has, the last ones filled up with copies of the last row:
each kernel of a layer has one shape in any pass. What is left is that a row has the same bits in
any place of a tile, beside any others. `places_problem` compares that for each product and for
attention, on the device, when a model is loaded.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch.nn import functional

from offload_rt.attention.exact import PART, attend_exact
from offload_rt.attention.spec import AttentionSpec
from offload_rt.kernels.tiles import Forward, in_tiles

_ROLLED = 17  # places that rows are moved by
_COMMITTED = (0, 100, PART + 30)  # rows before those whose attention is compared


def filled(rows: int, missing: int, tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """A tensor that has one entry per row, with so many copies of the last one behind it."""
    last = tensor.narrow(axis, rows - 1, 1)
    shape = [-1] * tensor.dim()
    shape[axis] = missing
    return torch.cat([tensor, last.expand(shape)], dim=axis)


def tile_outside(model: torch.nn.Module, layers: Iterable[torch.nn.Module], tile: int) -> None:
    """Have norms and products that are in no layer be computed tile by tile."""
    inside = {module for layer in layers for module in layer.modules()}
    for module in model.modules():
        lookup = isinstance(module, torch.nn.Embedding)
        if module in inside or lookup or [*module.children()] or not module._parameters:
            continue
        module.forward = partial(_by_tiles, module.forward, tile)


def _by_tiles(forward: Forward, tile: int, rows: torch.Tensor) -> torch.Tensor:
    return in_tiles(forward, rows, apart=True, tile=tile)


def places_problem(
    products: Iterable[tuple[int, int]],
    attention: Iterable[tuple[int, int, int, int]],
    widths: Iterable[int],
    dtype: torch.dtype,
    device: torch.device,
    tile: int,
) -> str:
    """What has other bits in other places of a tile, or beside other rows; empty if nothing has.

    Args:
        products: inputs and outputs.
        attention: query heads, KV heads, and sizes of keys and values.
        widths: of norms.
        dtype: number format.
        device: where passes are made.
        tile: its rows.
    """
    draw = partial(torch.randn, dtype=dtype, device=device)
    with torch.inference_mode():
        for inputs, outputs in sorted(set(products)):
            weight = draw(outputs, inputs)
            if _depends(partial(functional.linear, weight=weight), draw(tile, inputs), draw):
                return (
                    f"a product of {inputs} by {outputs} has other bits in other places of a tile"
                )
        for width in sorted(set(widths)):
            if _depends(_norm, draw(tile, width), draw):
                return f"a norm of {width} numbers has other bits in other places of a tile"
        for heads, kv_heads, dim, value_dim in sorted(set(attention)):
            for before in _COMMITTED:
                total = before + tile
                query, key = draw(heads, total, dim), draw(kv_heads, total, dim)
                if _attends_otherwise(query, key, draw(kv_heads, total, value_dim), tile):
                    return f"attention of {heads} heads of {dim} has other bits in smaller passes"
    return ""


def _norm(rows: torch.Tensor) -> torch.Tensor:
    wide = rows.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)


def _depends(forward: Forward, rows: torch.Tensor, draw: Callable[..., torch.Tensor]) -> bool:
    """Whether a row's bits depend on its place, or on other rows."""
    made, half = forward(rows), len(rows) // 2
    moved = forward(rows.roll(_ROLLED, 0)).roll(-_ROLLED, 0)
    turned = forward(rows.flip(0)).flip(0)
    beside = forward(torch.cat([rows[:half], draw(len(rows) - half, rows.shape[1])]))[:half]
    pairs = (moved, made), (turned, made), (beside, made[:half])
    return not all(torch.equal(*pair) for pair in pairs)


def _attends_otherwise(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: int
) -> bool:
    """Whether rows have other bits in passes of fewer than a tile."""
    spec = AttentionSpec(scaling=query.shape[2] ** -0.5, exact=True, fixed=True)
    total = query.shape[1]
    made = attend_exact(query[:, total - tile :], key, value, spec)
    for start, stop in ((0, 1), (5, 8), (tile - 1, tile), (tile - _ROLLED, tile)):
        first, last = total - tile + start, total - tile + stop
        alone = attend_exact(query[:, first:last], key[:, :last], value[:, :last], spec)
        if not torch.equal(alone, made[start:stop]):
            return True
    return False
