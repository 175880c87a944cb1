"""Row-invariant passes where kernels are picked by all of a shape, as on a GPU.

There the order of a product's sums, and of a norm's, goes by the number of rows. So whole layers
are given exactly as many rows as a tile has, the last ones filled up with copies of the last row:
each kernel of a layer has one shape in any pass. What is left is that a row has the same bits in
any place of a tile, beside any others. `places_problem` compares that for each product and for
attention, of chains and of trees, on the device, before a model is loaded: what it draws is no more
than what is planned there.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional

from offload_rt.attention.exact import PART, attend_exact
from offload_rt.attention.spec import ROOT, AttentionSpec, PendingTree
from offload_rt.kernels.tiles import Forward, in_tiles
from offload_rt.model.formats.wired import WiredLinear
from offload_rt.units import format_size

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
        if module in inside or lookup or [*module.children()]:
            continue
        if not module._parameters and not isinstance(module, WiredLinear):
            continue
        module.forward = partial(_by_tiles, module.forward, tile)


def _by_tiles(forward: Forward, tile: int, rows: torch.Tensor) -> torch.Tensor:
    return in_tiles(forward, rows, apart=True, tile=tile)


def places_problem(  # noqa: PLR0913 - what a network computes, and where
    products: Iterable[tuple[int, int]],
    attention: Iterable[tuple[int, int, int, int]],
    widths: Iterable[int],
    dtype: torch.dtype,
    device: torch.device,
    tile: int,
    limit_bytes: int,
) -> str:
    """What has other bits in other places of a tile, or beside other rows; empty if nothing has.

    Args:
        products: inputs and outputs.
        attention: query heads, KV heads, and sizes of keys and values.
        widths: of norms.
        dtype: number format.
        device: where passes are made.
        tile: its rows.
        limit_bytes: of memory there.
    """
    draw = _numbers(dtype, device)
    with torch.inference_mode():
        for inputs, outputs in sorted(set(products)):
            # A weight, four times the rows, and of three products the results.
            needed = dtype.itemsize * (inputs * outputs + tile * (4 * inputs + 3 * outputs))
            if needed > limit_bytes:
                return (
                    f"a product of {inputs} by {outputs} takes {format_size(needed)} to compare, "
                    f"and {format_size(limit_bytes)} are planned"
                )
            weight = draw(outputs, inputs)
            if _depends(partial(functional.linear, weight=weight), draw(tile, inputs), draw):
                return (
                    f"a product of {inputs} by {outputs} has other bits in other places of a tile"
                )
        for width in sorted(set(widths)):
            if _depends(_norm, draw(tile, width), draw):
                return f"a norm of {width} numbers has other bits in other places of a tile"
        spec = AttentionSpec(scaling=1.0, exact=True, fixed=True)
        for shape in sorted(set(attention)):
            if problem := unlike_attention(shape, spec, dtype, device, tile):
                return problem
    return ""


def unlike_attention(
    shape: tuple[int, int, int, int],
    spec: AttentionSpec,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
) -> str:
    """What of attention has other bits than in a pass of so many rows; empty if nothing has.

    Args:
        shape: query heads, KV heads, and sizes of keys and values.
        spec: how it is computed, but for the factor on products.
        dtype: number format.
        device: where.
        rows: of a pass.
    """
    heads, kv_heads, dim, value_dim = shape
    spec, draw = replace(spec, scaling=dim**-0.5), _numbers(dtype, device)
    with torch.inference_mode():
        for before in _COMMITTED:
            total = before + rows
            query, key = draw(heads, total, dim), draw(kv_heads, total, dim)
            value = draw(kv_heads, total, value_dim)
            if _attends_otherwise(query, key, value, spec, rows):
                return f"attention of {heads} heads of {dim} has other bits in smaller passes"
            if _branches_otherwise(query, key, value, spec, rows):
                return f"attention of {heads} heads of {dim} has other bits in a tree"
    return ""


def _numbers(dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    """Draws from a normal distribution, and leaves the user's random numbers alone."""
    generator = torch.Generator(device).manual_seed(0)
    return partial(torch.randn, generator=generator, dtype=dtype, device=device)


def _norm(rows: torch.Tensor) -> torch.Tensor:
    wide = rows.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)


def _depends(forward: Forward, rows: torch.Tensor, draw: Callable[..., torch.Tensor]) -> bool:
    """Whether a row's bits depend on its place, or on other rows."""
    made, half = forward(rows), len(rows) // 2

    def others() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # one after the other, for memory
        yield forward(rows.roll(_ROLLED, 0)).roll(-_ROLLED, 0), made
        yield forward(rows.flip(0)).flip(0), made
        beside = torch.cat([rows[:half], draw(len(rows) - half, rows.shape[1])])
        yield forward(beside)[:half], made[:half]

    return not all(torch.equal(*pair) for pair in others())


def _attends_otherwise(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec, tile: int
) -> bool:
    """Whether rows have other bits in passes of fewer than a tile."""
    total = query.shape[1]
    made = attend_exact(query[:, total - tile :], key, value, spec)
    for start, stop in ((0, 1), (5, 8), (tile - 1, tile), (tile - _ROLLED, tile)):
        first, last = total - tile + start, total - tile + stop
        alone = attend_exact(query[:, first:last], key[:, :last], value[:, :last], spec)
        if not torch.equal(alone, made[start:stop]):
            return True
    return False


def _branches_otherwise(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec, tile: int
) -> bool:
    """Whether rows of a tree have other bits than at the ends of chains that are their paths.

    Half of the tree's nodes have two children each, the rest is one branch.
    """
    committed, half = query.shape[1] - tile, tile // 2
    parents = [ROOT, *((n - 1) // 2 if n < half else n - 1 for n in range(1, tile))]
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent != ROOT else []), node])
    seen = torch.tensor([[n in path for n in range(tile)] for path in paths])
    places = torch.tensor([committed + len(path) - 1 for path in paths])
    tree = PendingTree(seen.to(query.device), places.to(query.device), parents)
    made = attend_exact(query[:, committed:], key, value, spec, tree)
    for row in (0, half // 2, half - 1, half + _ROLLED // 2, tile - 1):
        path = [*range(committed), *(committed + n for n in paths[row])]
        own = query[:, committed + row : committed + row + 1]
        if not torch.equal(attend_exact(own, key[:, path], value[:, path], spec)[0], made[row]):
            return True
    return False
