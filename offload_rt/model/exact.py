"""Row-invariant passes: what a network computes of a row is the same bits in any pass.

Three things depend on how many rows there are: the order of a product's sums, where an elementwise
exponential falls out of whole vectors, and attention. Products are given whole tiles of rows,
activations whole vectors, and attention is `attention/exact.py`. Norms, rotations and sums of two
tensors are the same for any number of rows (measured: docs/RESULTS.md, "Row-invariant passes").

Nothing is taken for granted: `problem_of` looks at what a family does, `unlike_products` compares
each shape of product here and now, and where either finds something, passes are not row-invariant
and the report says why.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import torch

from offload_rt.device.system import processor
from offload_rt.errors import ConfigError
from offload_rt.folders import cache_folder
from offload_rt.kernels.tiles import Forward, evenly, in_tiles
from offload_rt.model.formats.packed import PackedLinear
from offload_rt.model.formats.wide import wide_linear
from offload_rt.model.formats.wired import Product, WiredLinear
from offload_rt.writing import make_folder, write_text

_COMPARED_ROWS = 64
_CUTS = (1, 3, 16, 17, 48, 512)  # rows of a pass that are compared with those of one of 64
_COMPARED_NUMBERS = 2**21  # of a matrix whose products are compared
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
_SETTINGS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")
_MOST_KEPT = 1000
_log = logging.getLogger(__name__)
_LINEARS = torch.nn.Linear, WiredLinear, PackedLinear


def make_exact(model: torch.nn.Module) -> None:
    """Have the linears below `model` compute in tiles, and its activations in whole vectors."""
    for child in model.modules():
        if type(child) in (torch.nn.Linear, WiredLinear):
            _wrap(child, in_tiles)
        elif type(child).__module__ in _ACTIVATIONS and not list(child.children()):
            _wrap(child, evenly)


def _wrap(module: torch.nn.Module, how: Callable[[Forward, torch.Tensor], torch.Tensor]) -> None:
    forward = module.__dict__.get("forward") or partial(_forward_of, ref(module))
    module.forward = partial(how, forward)  # in no circle, so that memory goes at once


def _forward_of(module_ref: ref[torch.nn.Module], rows: torch.Tensor) -> torch.Tensor:
    module: Any = module_ref()
    made: torch.Tensor = type(module).forward(module, rows)
    return made


def problem_of(
    model: torch.nn.Module, layers: Iterable[torch.nn.Module], dtype: torch.dtype, *, widens: bool
) -> str:
    """Why passes of a network cannot be row-invariant; empty if they can.

    Args:
        model: its modules, whose weights need not be there.
        layers: of them, the decoder layers.
        dtype: number format of the computation.
        widens: bf16 products are computed in fp32 blocks.
    """
    for layer in layers:
        for name, child in layer.named_modules():
            own = any(p.dim() > 1 for p in child._parameters.values() if p is not None)
            if own and not isinstance(child, _LINEARS):
                return f"{name} ({type(child).__name__}) multiplies with weights of its own"
    threads = torch.get_num_threads()
    config: Any = model.config
    if getattr(config.get_text_config(), "final_logit_softcapping", None) and threads > 2:
        return f"{threads} threads squash logits, and cut them in the middle of vectors"
    how = wide_linear if widens else torch.nn.functional.linear
    shapes = {_sizes(child) for child in model.modules() if isinstance(child, _LINEARS)}
    return _compared(sorted(shapes), dtype, how)


def _compared(sizes: Sequence[tuple[int, int]], dtype: torch.dtype, how: Product) -> str:
    """What `unlike_product` says of the first of these; what was alike once is not made again.

    It takes 0.1 to 1 s a product, so what was found is kept, for this processor, torch, and number
    of threads. What differed is compared each time.
    """
    machine = [processor()[0], f"torch {torch.__version__}", f"{torch.get_num_threads()} threads"]
    machine += [f"{name}={os.environ[name]}" for name in _SETTINGS if name in os.environ]
    begin = ", ".join([*machine, how.__name__, str(dtype).removeprefix("torch.")])
    path = cache_folder() / "exact.json"
    known = _read(path)
    for inputs, outputs in sizes:
        if f"{begin}, {inputs} by {outputs}" in known:
            continue
        if problem := unlike_product(inputs, outputs, dtype, how):
            return problem
        known.append(f"{begin}, {inputs} by {outputs}")
    if known != _read(path):
        try:
            make_folder(path.parent)
            write_text(path, json.dumps(known[-_MOST_KEPT:], indent=0), lasting=False)
        except ConfigError as error:  # it only saves time
            _log.debug("%s", error)
    return ""


def _read(path: Path) -> list[str]:
    """What was kept; nothing where it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [key for key in found if isinstance(key, str)] if isinstance(found, list) else []


def _sizes(linear: Any) -> tuple[int, int]:  # noqa: ANN401 - one of `_LINEARS`
    """Inputs and outputs."""
    if isinstance(linear, WiredLinear):
        return linear.stored.inputs, linear.stored.outputs
    outputs, inputs = linear.weight.shape
    return inputs, outputs


def unlike_product(inputs: int, outputs: int, dtype: torch.dtype, how: Product) -> str:
    """A number of rows for which a product has other bits than for a tile; empty if none has.

    Args:
        inputs: I.
        outputs: O; of large matrices some are compared.
        dtype: number format.
        how: the product of rows [S, I] with weight [O, I] and no bias.
    """
    outputs = min(outputs, max(64, _COMPARED_NUMBERS // inputs // 64 * 64))
    generator = torch.Generator().manual_seed(0)
    half = inputs // 2
    # Sums that nearly cancel out, so that another order of additions shows.
    order = torch.randperm(half, generator=generator)
    weight = torch.randn(outputs, half, generator=generator)
    rows = torch.randn(_COMPARED_ROWS, half, generator=generator)
    weight = torch.cat([weight, -weight[:, order], torch.ones(outputs, inputs % 2)], 1).to(dtype)
    rows = torch.cat([rows, rows[:, order], torch.ones(_COMPARED_ROWS, inputs % 2)], 1).to(dtype)
    with torch.inference_mode():

        def forward(given: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = how(given, weight, None)
            return made

        expected = in_tiles(forward, rows)
        for cut in _CUTS:
            given = rows.repeat(-(-cut // _COMPARED_ROWS), 1)
            parts = [in_tiles(forward, part) for part in given.split(cut)]
            if not torch.equal(torch.cat(parts)[:_COMPARED_ROWS], expected):
                return f"a product of {inputs} by {outputs} has other bits in passes of {cut} rows"
        placed = in_tiles(forward, rows.flip(0)).flip(0)
        if not torch.equal(placed, expected):
            return f"a product of {inputs} by {outputs} has other bits in other places of a tile"
    return ""
