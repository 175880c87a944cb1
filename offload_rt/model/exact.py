"""Row-invariant passes: what a network computes of a row is the same bits in any pass.

Three things depend on how many rows there are: the order of a product's sums, where an elementwise
exponential falls out of whole vectors, and attention. Products are given whole tiles of rows (of an
expert, the rows that are sent to it), activations whole vectors, and attention is
`attention/exact.py`. Norms, rotations and sums of two tensors are the same for any number of rows
(measured: docs/RESULTS.md, "Row-invariant passes"). What mixes rows by a state is fed pieces of one
size at absolute places in any pass (`kv/states.py`), so nothing of it is of another shape.

Nothing is taken for granted: `looks_of` looks at what a family does in a pass over shapes,
`unlike_product` compares each shape of product here and now, `attention_problem` attention, and
where any finds something, passes are not row-invariant and the report says why.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from offload_rt.attention.spec import AttentionSpec
from offload_rt.device.system import processor
from offload_rt.errors import ConfigError
from offload_rt.folders import cache_folder
from offload_rt.kernels import attending
from offload_rt.kernels.assembling import traced
from offload_rt.kernels.registers import multiplies_in_registers
from offload_rt.kernels.rows import ROW_TILE
from offload_rt.kernels.tiles import (
    FEW_OUTPUTS,
    Forward,
    allow_pairs,
    evenly,
    goes_by_count,
    in_tiles,
)
from offload_rt.model.experts import MATRICES, multiply_at_once
from offload_rt.model.formats.direct import plain_for
from offload_rt.model.formats.packed import PackedLinear
from offload_rt.model.formats.stored import AT_ONCE_FEW
from offload_rt.model.formats.wide import wide_linear
from offload_rt.model.formats.wired import Product, WiredLinear
from offload_rt.model.tiles import unlike_attention
from offload_rt.writing import make_folder, write_text

_COMPARED_ROWS = 64
_CUTS = (1, 3, 16, 17, 48, 512)  # rows of a pass that are compared with those of one of 64
# Of so many numbers of a matrix all passes are compared that make 64 rows; of the whole matrix two
# of each, which takes as long for one of five times as many.
_COMPARED_NUMBERS, _FEW_PASSES = 2**21, 2
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
_SETTINGS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")
_COMPARED = "whole"  # of what was compared otherwise once nothing is known
_ATTENDING = 64  # rows of a pass of attention that is compared
_MOST_KEPT = 1000
_log = logging.getLogger(__name__)
Computes = Callable[[Forward, torch.Tensor], torch.Tensor]
_DEFAULT_GATE = "transformers.integrations.moe"  # whose gate is an activation of the first half
_HOST = torch.device("cpu")  # nothing else is exact
_LINEARS = torch.nn.Linear, WiredLinear, PackedLinear


_PLACES = torch, torch.Tensor, functional  # of functions and methods


def _called(names: str) -> frozenset[Any]:
    """Functions and methods by their names."""
    return frozenset(
        getattr(place, name) for name in names.split() for place in _PLACES if hasattr(place, name)
    )


# Whose scalar and vector code part by an ulp; powers do but for those that are products and roots.
_POWERS = _called("float_power pow __pow__")
_UNEVEN = _POWERS | _called(
    "exp expm1 gelu log log1p logsigmoid sigmoid silu softplus tanh __rpow__"
)
_EVEN_EXPONENTS = frozenset({-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0})
_PRODUCTS = _called(
    "__matmul__ addbmm addmm addmv baddbmm bilinear bmm conv1d conv2d dot einsum inner matmul mm "
    "mv scaled_dot_product_attention tensordot"
)


def make_exact(model: torch.nn.Module) -> None:
    """Have the linears below `model` compute in tiles, and its activations in whole vectors."""
    for child in model.modules():
        if type(child) is torch.nn.Linear:  # quantised ones do so by themselves
            _wrap(child, _tiled(child))
        elif _is_activation(child):
            _wrap(child, evenly)


def multiply_few_rows_at_once(module: Any) -> int:  # noqa: ANN401 - a family's class
    """Let a module of experts multiply as row-invariant passes do where one has few rows.

    Kernels take 0.4 to 0.67 of torch's time there, one expert after the other (docs/RESULTS.md,
    "Experts at once"). Where they take plain matrices of bf16, and what is between two products is
    an activation alone: that has to be in whole vectors, for experts that are there are computed in
    other groups than those that come.

    Returns:
        rows of one up to which it does; 0: torch multiplies with any number.
    """
    shapes = _of_experts(module, transposed=False)
    takes = (plain_for(*sizes, torch.bfloat16, _HOST, exact=True) for sizes in shapes)
    gate = type(module)._apply_gate.__module__ if module.has_gate else ""
    if shapes and gate in ("", _DEFAULT_GATE) and _is_activation(module.act_fn) and all(takes):
        make_exact(module)
        multiply_at_once(module, AT_ONCE_FEW)
        return AT_ONCE_FEW
    return 0


def _is_activation(module: torch.nn.Module) -> bool:
    return type(module).__module__ in _ACTIVATIONS and not list(module.children())


def _uneven(function: Any, args: tuple[Any, ...], given: dict[str, Any]) -> bool:  # noqa: ANN401
    """Whether what it computes of a number may depend on how many there are."""
    if function not in _POWERS:
        return function in _UNEVEN
    exponent = args[1] if len(args) > 1 else given.get("exponent")
    return not (isinstance(exponent, int | float) and exponent in _EVEN_EXPONENTS)


class Regular(TorchFunctionMode):
    """Has products and activations that no module of their own makes be of whole tiles, too.

    Those of an expert are among them: as many rows as are sent to it.

    Args:
        tiles: of so many rows, one after the other; 0: a multiple of what a CPU needs.
    """

    def __init__(self, tiles: int = 0) -> None:
        super().__init__()
        self._tiles = tiles

    def __torch_function__(
        self,
        function: Any,  # noqa: ANN401
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        given = kwargs or {}
        numbers = bool(args) and isinstance(args[0], torch.Tensor)
        if not self._tiles and numbers and _uneven(function, args, given):
            return evenly(lambda numbers: function(numbers, *args[1:], **given), args[0])
        if function is functional.linear and len(args) > 1:
            outputs = args[1].shape[0]
            product = None if self._tiles or traced() else _own_product(args[0], args[1])
            if product is not None:
                bias = args[2] if len(args) > 2 else given.get("bias")
                return product(args[0], args[1], bias)
            return in_tiles(
                lambda r: function(r, *args[1:], **given),
                args[0],
                outputs=outputs if args[1].is_contiguous() else 0,
                apart=bool(self._tiles) or outputs < FEW_OUTPUTS,
                tile=self._tiles or ROW_TILE,
            )
        return function(*args, **given)


def _own_product(rows: torch.Tensor, weight: torch.Tensor) -> Product | None:
    """What multiplies with a matrix that no module has, as an expert's; None: torch does."""
    if {rows.dtype, weight.dtype} != {torch.bfloat16} or not weight.is_contiguous():
        return None
    outputs, inputs = weight.shape
    return plain_for(inputs, outputs, torch.bfloat16, rows.device, exact=True)


def _in_registers(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    product = _own_product(rows, weight)
    assert product is not None  # who asks knows
    return product(rows, weight, bias)


class _Noting(TorchFunctionMode):
    """Notes what a pass computes outside of modules that `make_exact` takes care of.

    Attributes:
        inside: such modules that run just now.
        regular: whether `Regular` is needed.
        shapes: inputs and outputs of products that it cares for.
        problem: what nothing cares for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.regular, self.problem = 0, False, ""
        self.shapes: set[tuple[int, int]] = set()

    def __torch_function__(
        self,
        function: Any,  # noqa: ANN401
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if not self.inside:
            name = getattr(function, "__name__", "")
            uneven = _uneven(function, args, kwargs or {})
            self.regular |= uneven
            if uneven and function in _POWERS and not _of_a_number(args, kwargs or {}):
                self.problem = self.problem or f"{name} takes exponents from a tensor"
            if function is functional.linear:
                self.regular = True
                outputs, inputs = args[1].shape
                self.shapes.add((inputs, outputs))
            elif function in _PRODUCTS and not _outer(args):
                self.problem = self.problem or f"{name} multiplies outside of linears"
            elif name.rstrip("_") != name and _uneven(
                getattr(torch, name.rstrip("_"), None), args, kwargs or {}
            ):
                self.problem = self.problem or f"{name} works in place"
        return function(*args, **kwargs or {})


def _of_a_number(args: tuple[Any, ...], given: dict[str, Any]) -> bool:
    """Whether a tensor is raised to a power that is a number."""
    tensors = [isinstance(each, torch.Tensor) for each in (*args, *given.values())]
    return sum(tensors) == 1 and tensors[0]


def _outer(args: tuple[Any, ...]) -> bool:
    """Whether a product adds nothing up, as that of places and frequencies."""
    return (
        len(args) > 1
        and all(isinstance(a, torch.Tensor) for a in args[:2])
        and args[0].shape[-1] == 1
    )


def _tiled(linear: torch.nn.Linear) -> Computes:
    """Kernels of our own where they give the bits of tiles, else torch's with tiles."""
    outputs, inputs = linear.weight.shape
    widened = "forward" in linear.__dict__
    tiles = partial(in_tiles, outputs=0 if widened else outputs, apart=outputs < FEW_OUTPUTS)
    dtype = linear.weight.dtype
    product = None if widened else plain_for(inputs, outputs, dtype, _HOST, exact=True)
    if product is None:
        return tiles
    of = ref(linear)

    def multiply(forward: Forward, rows: torch.Tensor) -> torch.Tensor:
        linear = of()
        assert linear is not None  # it is being called
        if traced() or not linear.weight.is_contiguous():  # what is traced are torch's kernels
            return tiles(forward, rows)
        return product(rows, linear.weight, linear.bias)

    return multiply


def _wrap(module: torch.nn.Module, how: Computes) -> None:
    forward = module.__dict__.get("forward") or partial(_forward_of, ref(module))
    module.forward = partial(how, forward)  # in no circle, so that memory goes at once


def _forward_of(module_ref: ref[torch.nn.Module], rows: torch.Tensor) -> torch.Tensor:
    module: Any = module_ref()
    made: torch.Tensor = type(module).forward(module, rows)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """What was found of a network.

    Attributes:
        problem: why its passes cannot be row-invariant; empty if they can, where `products_problem`
            finds nothing.
        regular: they have to run under `Regular`.
        shapes: inputs and outputs of products that no linear makes.
    """

    problem: str = ""
    regular: bool = False
    shapes: frozenset[tuple[int, int]] = frozenset()


def looks_of(
    model: torch.nn.Module, run: Callable[[], object], mixing: Iterable[torch.nn.Module]
) -> Looks:
    """What the modules of a network compute beside linears and activations.

    Args:
        model: its modules, whose weights need not be there.
        run: makes a pass over shapes.
        mixing: modules that are fed pieces of one size.
    """
    noted = _Noting()
    own = [m for m in model.modules() if isinstance(m, _LINEARS) or _is_activation(m)]

    def enter(*_: object) -> None:
        noted.inside += 1

    def leave(*_: object) -> None:
        noted.inside -= 1

    handles = [m.register_forward_pre_hook(enter) for m in own]
    handles += [m.register_forward_hook(leave) for m in own]
    saved: list[tuple[Any, Any]] = [(module, module.forward) for module in mixing]
    try:
        for module, _ in saved:
            module.forward = lambda hidden_states, **_: hidden_states
        with noted:
            run()
    finally:
        for handle in handles:
            handle.remove()
        for module, forward in saved:
            module.forward = forward
    regular = noted.regular or any(MATRICES & m._parameters.keys() for m in model.modules())
    return Looks(problem=noted.problem, regular=regular, shapes=frozenset(noted.shapes))


def product_shapes(model: torch.nn.Module) -> set[tuple[int, int]]:
    """Inputs and outputs of all linears and experts of a network."""
    return (
        _of_linears(model)
        | _of_experts(model, transposed=False)
        | _of_experts(model, transposed=True)
    )


def products_problem(
    model: torch.nn.Module, looks: Looks, dtype: torch.dtype, *, widens: bool, limit_bytes: int
) -> str:
    """Which product of a network has other bits in some passes; empty if none has.

    Args:
        model: its modules, whose weights need not be there.
        looks: what was found of it.
        dtype: number format of the computation.
        widens: bf16 products are computed in fp32 blocks.
        limit_bytes: of memory, for a matrix and its products.
    """
    how = wide_linear if widens else functional.linear
    shapes = _of_linears(model)
    bare = looks.shapes | _of_experts(model, transposed=False)
    across = _of_experts(model, transposed=True)
    for sizes, product in ((shapes, how), (bare, functional.linear), (across, linear_across)):
        if problem := _compared(sorted(sizes), dtype, product, limit_bytes):
            return problem
    for inputs, outputs in bare:  # kernels are looked for now: it takes memory for a moment
        plain_for(inputs, outputs, dtype, _HOST, exact=True)
    return ""


def attention_problem(
    attention: Iterable[tuple[int, int, int, int]], dtype: torch.dtype, *, capped: bool
) -> str:
    """Which attention has other bits in smaller passes, or in a tree; empty if none has.

    Args:
        attention: query heads, KV heads, and sizes of keys and values.
        dtype: number format.
        capped: scores are.
    """
    spec = AttentionSpec(scaling=1.0, exact=True, softcap=30.0 if capped else None)
    known = _Known(f"attention {dtype}{' capped' * capped}")
    for shape in sorted(set(attention)):
        what = "heads {}, of {}, keys {}, values {}".format(*shape)
        if not attending.takes(dtype, *shape[2:], capped=capped):
            what += ", written out"
        elif attending.in_registers(dtype):
            what += ", in matrix registers"
        if what not in known:
            if problem := unlike_attention(shape, spec, dtype, torch.device("cpu"), _ATTENDING):
                return problem
            known.add(what)
    return ""


def _of_experts(model: torch.nn.Module, *, transposed: bool) -> set[tuple[int, int]]:
    """Inputs and outputs of the matrices of experts, that lie so or the other way round."""
    shapes = set[tuple[int, int]]()
    for module in model.modules():
        for name in MATRICES & module._parameters.keys():
            if bool(getattr(module, "is_transposed", False)) is not transposed:
                continue
            if (parameter := module._parameters[name]) is None:  # quantised, in their layer
                continue
            _, outputs, inputs = parameter.shape
            if transposed:
                outputs, inputs = inputs, outputs
            elif name == "gate_up_proj" and module.is_concatenated:
                outputs //= 2
            shapes.add((inputs, outputs))
    return shapes


def linear_across(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A product with a weight [O, I] that lies input by input."""
    return functional.linear(rows, weight.t().contiguous().t(), bias)


def _compared(
    sizes: Sequence[tuple[int, int]], dtype: torch.dtype, how: Product, limit_bytes: int
) -> str:
    """What `unlike_product` says of the first of these; what was alike once is not made again.

    It takes 0.1 to 1 s a product, so what was found is kept, by how many tiles a product may take
    at once; 0: any number of rows. Where it may take two, it does from now on.
    """
    known = _Known(f"{how.__name__}, {str(dtype).removeprefix('torch.')}")
    by_count = goes_by_count(dtype) and how is functional.linear
    for inputs, outputs in sizes:
        count = _outputs_within(inputs, outputs, dtype, limit_bytes)
        product, ways = how, [1, 2] if by_count else [1]
        if by_count and dtype is torch.bfloat16 and multiplies_in_registers(inputs, outputs):
            product, ways = _in_registers, [0]
        names = {n: f"{inputs} by {outputs}, {count} compared, {n} tiles at once" for n in ways}
        found = next((n for n in ways if names[n] in known), None)
        if found is None:
            compare = partial(unlike_product, inputs, outputs, dtype, product, count)
            found, *more = ways
            if problem := compare(found):
                return problem
            found = next((n for n in more if not compare(n)), found)
            known.add(names[found])
        if found > 1:
            allow_pairs(inputs, outputs, dtype)
    return ""


def _outputs_within(inputs: int, outputs: int, dtype: torch.dtype, limit_bytes: int) -> int:
    """How many outputs of a product are compared: all, if a matrix and its products fit."""
    rows = 3 * max(_CUTS)  # products of two passes, and what they are put together in
    fitting = limit_bytes // dtype.itemsize // (2 * inputs + rows) // 64 * 64
    return min(outputs, max(fitting, _few_outputs(inputs)))


def _few_outputs(inputs: int) -> int:
    return max(64, _COMPARED_NUMBERS // inputs // 64 * 64)


class _Known:
    """What was found alike, for this processor, torch, and number of threads.

    What differed is compared each time.

    Args:
        what: of which of them.
    """

    def __init__(self, what: str) -> None:
        threads = f"{torch.get_num_threads()} threads"
        machine = [processor()[0], f"torch {torch.__version__}", threads]
        machine += [f"{name}={os.environ[name]}" for name in _SETTINGS if name in os.environ]
        self._begin = ", ".join([*machine, what, _COMPARED])
        self._path = cache_folder() / "exact.json"
        self._all = _read(self._path)

    def __contains__(self, key: str) -> bool:
        return f"{self._begin}, {key}" in self._all

    def add(self, key: str) -> None:
        """From now on it is known, the next time, too, whatever is found of others."""
        self._all.append(f"{self._begin}, {key}")
        try:
            make_folder(self._path.parent)
            found = [*_read(self._path), self._all[-1]][-_MOST_KEPT:]
            write_text(self._path, json.dumps(found, indent=0), lasting=False)
        except ConfigError as error:  # it only saves time
            _log.debug("%s", error)


def _read(path: Path) -> list[str]:
    """What was kept; nothing where it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [key for key in found if isinstance(key, str)] if isinstance(found, list) else []


def _of_linears(model: torch.nn.Module) -> set[tuple[int, int]]:
    """Inputs and outputs of the products of linears: of one in parts those of each."""
    shapes = set[tuple[int, int]]()
    linears: Any = [child for child in model.modules() if isinstance(child, _LINEARS)]
    for linear in linears:
        if isinstance(linear, WiredLinear):
            stored = linear.stored
            shapes |= {(stored.inputs, part.stop - part.start) for part in stored.cuts()}
        else:
            outputs, inputs = linear.weight.shape
            shapes.add((inputs, outputs))
    return shapes


def unlike_product(
    inputs: int, outputs: int, dtype: torch.dtype, how: Product, count: int = 0, tiles: int = 1
) -> str:
    """A number of rows for which a product has other bits than for a tile; empty if none has.

    Args:
        inputs: I.
        outputs: O.
        dtype: number format.
        how: the product of rows [S, I] with weight [O, I] and no bias.
        count: of the outputs so many are compared; 0: all.
        tiles: which a product takes at once, where it is given one after the other; 0: it takes
            any number of rows.
    """
    few, count = min(outputs, _few_outputs(inputs)), count or outputs
    generator = torch.Generator().manual_seed(0)
    half = inputs // 2
    # Sums that nearly cancel out, so that another order of additions shows.
    order = torch.randperm(half, generator=generator)
    weight = torch.randn(few, half, generator=generator)
    rows = torch.randn(_COMPARED_ROWS, half, generator=generator)
    weight = torch.cat([weight, -weight[:, order], torch.ones(few, inputs % 2)], 1).to(dtype)
    rows = torch.cat([rows, rows[:, order], torch.ones(_COMPARED_ROWS, inputs % 2)], 1).to(dtype)
    with torch.inference_mode():
        problem = _unlike(rows, weight, how, tiles, _COMPARED_ROWS)
        if not problem and count > few:
            whole = weight.new_empty(count, inputs)
            for part in whole.split(few):
                part.copy_(weight[: len(part)])
            problem = _unlike(rows, whole, how, tiles, _FEW_PASSES)
    return problem and f"a product of {inputs} by {outputs} has other bits {problem}"


def _unlike(rows: torch.Tensor, weight: torch.Tensor, how: Product, tiles: int, passes: int) -> str:
    """In which of so many passes of each size a product has other bits; empty if in none."""

    def forward(given: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = how(given, weight, None)
        return made

    tiled = partial(in_tiles, forward, apart=len(weight) < FEW_OUTPUTS) if tiles else forward
    expected = tiled(rows)
    if tiles > 1:
        together = torch.cat([forward(part) for part in rows.split(tiles * ROW_TILE)])
        return "" if torch.equal(together, expected) else f"where it takes {tiles} tiles at once"
    for cut in _CUTS:
        given = rows.repeat(-(-cut // _COMPARED_ROWS), 1)
        parts = torch.cat([tiled(part) for part in given.split(cut)[:passes]])
        known = expected.repeat(-(-len(parts) // len(expected)), 1)
        if not torch.equal(parts, known[: len(parts)]):
            return f"in passes of {cut} rows"
    return "" if torch.equal(tiled(rows.flip(0)).flip(0), expected) else "in other places of a tile"
