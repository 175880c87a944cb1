"""Resident decoder layers of the Llama family, computed for few rows by two kernels a layer.

transformers' forward of such a layer is some 50 operators for one row, and its products read memory
at half its rate, as threads fall asleep between them. Where a layer has the parts that
`kernels/layers.py` computes, and *gives the same bits*, its kernels are used for as many rows as
they take (`LayerSizes.most_rows`); else, and for more rows, transformers' forward is. That is no
list of families: a layer is run both ways with random rows, and queries, keys, values and what
leaves it are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.kernels import assembling
from offload_rt.kernels.assembling import traced
from offload_rt.kernels.layers import (
    AFTER,
    BEFORE,
    MANY_ROWS,
    REGISTER_ROWS,
    TABLE_NUMBERS,
    LayerSizes,
    Record,
    adds_as_torch,
    assembled,
)
from offload_rt.kernels.products import Product
from offload_rt.kernels.registers import multiplies_in_registers
from offload_rt.kernels.rounded import RoundedProduct
from offload_rt.kernels.rows import MOST_ROWS
from offload_rt.kernels.stored import LyingProduct
from offload_rt.model.attention_function import CONTEXT_KEYWORD, PassContext, Segment
from offload_rt.model.formats.packed import PackedLinear
from offload_rt.model.formats.rounded import Int4Linear, Int8Linear

Forward = Callable[..., torch.Tensor]
_PARTS = {  # of a layer, by transformers' names; anything else below one is not known
    *("input_layernorm", "post_attention_layernorm", "self_attn", "mlp", "mlp.act_fn"),
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
_BF16 = torch.bfloat16
_COMPARED = (1, 3)  # rows that each layer is compared with; the first one with more
_ALL_COMPARED = (*range(1, MOST_ROWS + 2), MANY_ROWS, REGISTER_ROWS)


class _Witness:
    """Stands for a cache in a comparison: keeps what it is given, answers with random numbers."""

    length, capacity = 0, REGISTER_ROWS

    def __init__(self, value_dim: int) -> None:
        self.seen: list[torch.Tensor] = []
        self.spec: AttentionSpec | None = None
        self._value_dim = value_dim

    def begin_pass(self, rows: int, *, keeps_all: bool) -> None:
        """Nothing: every pass is alike to this cache."""

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep key [K, S, D] and value [K, S, D]."""
        self.seen += [key.clone(), value.clone()]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None = None,
    ) -> torch.Tensor:
        """Keep query [H, S, D] and answer with [S, H, D]."""
        self.seen.append(query.clone())
        self.spec = spec
        heads, rows, _ = query.shape
        generator = torch.Generator().manual_seed(rows)
        made = torch.randn(rows, heads, self._value_dim, generator=generator)
        return made.to(query.dtype)

    def commit(self, keep: Sequence[int]) -> None:
        """Nothing to keep."""

    def truncate(self, length: int) -> None:
        """Nothing to forget."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A product of our own with a matrix, that of a linear of some class."""

    product: Product | LyingProduct | RoundedProduct
    inputs: int
    outputs: int
    of: type[torch.nn.Module]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the kernels read of a layer."""

    norms: tuple[torch.Tensor, ...]
    query: _Matrix
    key: _Matrix
    value: _Matrix
    output: _Matrix
    gate: _Matrix
    up: _Matrix
    down: _Matrix
    table: torch.Tensor
    sizes: LayerSizes


Rooms = dict[LayerSizes, tuple[torch.Tensor, torch.Tensor]]  # what rows of one layer become


class LeanLayer:
    """The forward of one decoder layer.

    Args:
        parts: of the layer.
        spec: how it attends.
        index: its number in the caches.
        forward: transformers', for what the kernels do not do.
        rooms: memory that layers of one network compute in, one after the other.
    """

    def __init__(
        self, parts: _Parts, spec: AttentionSpec, index: int, forward: Forward, rooms: Rooms
    ) -> None:
        self._parts, self._index, self._forward, self._rooms = parts, index, forward, rooms
        self._specs = [replace(spec, exact=exact) for exact in (False, True)]
        self._sizes = sizes = parts.sizes
        code = assembled(sizes)
        self._before, self._after = code["before"], code["after"]
        if sizes not in rooms:
            widths = sizes.products, sizes.hidden
            made = (torch.empty(sizes.most_rows, width, dtype=torch.bfloat16) for width in widths)
            rooms[sizes] = next(made), next(made)
        self._products, self._summed = rooms[sizes]
        self._records = [self._record(few) for few in (0, 1)]

    def of(self, layer: torch.nn.Module) -> "LeanLayer":
        """The same of a layer that has the same weights in memory of its own."""
        parts = _parts_of(layer)
        assert parts is not None
        return LeanLayer(parts, self._specs[0], self._index, layer.forward, self._rooms)

    def _record(self, several: int) -> tuple[Record, Record]:
        """What the kernels are given, for one row and for several."""
        parts = self._parts
        before = {"norm": parts.norms[0].data_ptr(), "n_block": _block(parts.query, several)}
        after = {
            "norm": parts.norms[1].data_ptr(),
            "table": parts.table.data_ptr(),
            "summed": self._summed.data_ptr(),
            "products": self._products.data_ptr(),
            "n_attended_block": _block(parts.output, several),
            "n_block": _block(parts.gate, several),
            "n_products_block": _block(parts.down, several),
        }
        for record, names in ((before, "query key value"), (after, "output gate up down")):
            for name in names.split():
                product = getattr(parts, name).product
                record[name] = product.address
                record[f"{name}_bias"] = 0 if product.bias is None else product.bias.data_ptr()
        return Record(BEFORE, before), Record(AFTER, after)

    def __call__(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor:  # noqa: ANN401
        """[1, S, E] gives [1, S, E]; options are those of transformers' layers."""
        context, angles = options.get(CONTEXT_KEYWORD), options.get("position_embeddings")
        rows = hidden.shape[1]
        if rows > self._sizes.most_rows or angles is None or context is None or traced():
            return self._forward(hidden, **options)
        sizes = self._sizes
        before, after = self._records[rows > 1]
        hidden = hidden.contiguous()
        cosine, sine = (angle.contiguous() for angle in angles)
        heads, kv_heads, dim = sizes.heads, sizes.kv_heads, sizes.head_dim
        queries = hidden.new_empty(rows, heads, dim)
        keys, values = hidden.new_empty(2, rows, kv_heads, dim)
        before.set(
            {
                "hidden": hidden.data_ptr(),
                "queries": queries.data_ptr(),
                "keys": keys.data_ptr(),
                "values": values.data_ptr(),
                "cosine": cosine.data_ptr(),
                "sine": sine.data_ptr(),
                "n_rows": rows,
            }
        )
        assembling.together(self._before, before.numbers)
        attended = self._attend(context, queries, keys, values)
        out = torch.empty_like(hidden)
        after.set(
            {
                "hidden": hidden.data_ptr(),
                "attended": attended.data_ptr(),
                "out": out.data_ptr(),
                "n_rows": rows,
            }
        )
        assembling.together(self._after, after.numbers)
        return out

    def _attend(
        self,
        context: PassContext,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Rows [S, heads, D] give [S, H, D], one after the other."""
        query, key, value = (rows.transpose(0, 1) for rows in (queries, keys, values))
        parts = context.attend(self._index, query, key, value, self._specs[context.exact])
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()


def lean_layer(layer: torch.nn.Module, rooms: Rooms, *, first: bool) -> LeanLayer | None:
    """A layer's forward in two kernels; None where there is none that gives its bits.

    Args:
        layer: transformers', all its matrices packed, as they lie, or rounded alike.
        rooms: of its network.
        first: compare all counts of rows; of its sisters the first tells.
    """
    if {name for name, _ in layer.named_modules() if name} != _PARTS:
        return None
    parts = _parts_of(layer)
    if parts is None or not adds_as_torch(parts.sizes):
        return None
    index: int = layer.self_attn.layer_idx  # type: ignore[union-attr, assignment]
    forward, made = layer.forward, None
    with torch.inference_mode():
        for rows in _ALL_COMPARED if first else _COMPARED:
            if rows > parts.sizes.most_rows:
                continue
            expected, witness = _tried(forward, parts.sizes, rows)
            assert witness.spec is not None
            made = made or LeanLayer(parts, witness.spec, index, forward, rooms)
            got, mine = _tried(made, parts.sizes, rows)
            pairs = zip([expected, *witness.seen], [got, *mine.seen], strict=True)
            if not all(torch.equal(one, other) for one, other in pairs):
                return None
    return made


def _tried(forward: Forward, sizes: LayerSizes, rows: int) -> tuple[torch.Tensor, _Witness]:
    """What a layer makes of random rows."""
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    witness = _Witness(sizes.head_dim)
    context = PassContext([Segment(witness, rows)])
    angles = random(1, rows, sizes.head_dim), random(1, rows, sizes.head_dim)
    options = {CONTEXT_KEYWORD: context, "attention_mask": None, "position_embeddings": angles}
    return forward(random(1, rows, sizes.hidden), **options), witness


def _parts_of(layer: Any) -> _Parts | None:  # noqa: ANN401 - a module of transformers
    attention, mlp = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    linears = {
        "query": attention.q_proj,
        "key": attention.k_proj,
        "value": attention.v_proj,
        "output": attention.o_proj,
        "gate": mlp.gate_proj,
        "up": mlp.up_proj,
        "down": mlp.down_proj,
    }
    made = {name: _matrix_of(linear) for name, linear in linears.items()}
    matrices = {name: matrix for name, matrix in made.items() if matrix is not None}
    kinds = {(matrix.of, type(matrix.product)) for matrix in matrices.values()}
    if len(matrices) < len(made) or len(kinds) > 1:
        return None
    product = matrices["query"].product
    eps: set[Any] = {getattr(norm, "variance_epsilon", None) for norm in norms}
    weights = [norm._parameters.get("weight") for norm in norms]
    if len(eps) != 1 or None in eps or any(getattr(w, "dtype", None) is not _BF16 for w in weights):
        return None
    sizes = LayerSizes(
        hidden=matrices["query"].inputs,
        heads=matrices["query"].outputs // attention.head_dim,
        kv_heads=matrices["key"].outputs // attention.head_dim,
        head_dim=attention.head_dim,
        products=matrices["gate"].outputs,
        eps=eps.pop(),
        form=product.form if isinstance(product, RoundedProduct) else None,
        in_registers=isinstance(product, LyingProduct),
    )
    hidden, attended, keys = sizes.hidden, matrices["query"].outputs, matrices["key"].outputs
    expected = [(hidden, attended), (hidden, keys), (hidden, keys), (attended, hidden)]
    expected += 2 * [(hidden, sizes.products)] + [(sizes.products, hidden)]
    if not sizes.suit or [(one.inputs, one.outputs) for one in matrices.values()] != expected:
        return None
    return _Parts(norms=tuple(weights), **matrices, table=_table(mlp.act_fn), sizes=sizes)


def _matrix_of(linear: Any) -> _Matrix | None:  # noqa: ANN401 - of any class
    """None where no product of our own has the bits of a linear."""
    kind = type(linear)
    if kind in (PackedLinear, Int8Linear, Int4Linear) and linear.product is not None:
        return _Matrix(linear.product, linear.inputs, linear.outputs, kind)
    if kind is not torch.nn.Linear or "forward" not in linear.__dict__:  # as `make_exact` has them
        return None
    weight, sizes = linear.weight, (linear.in_features, linear.out_features)
    if (
        weight.dtype is not _BF16
        or not weight.is_contiguous()
        or not multiplies_in_registers(*sizes)
    ):
        return None
    return _Matrix(LyingProduct(weight, linear.bias), *sizes, kind)


def _block(matrix: _Matrix, several: int) -> int:
    """Pairs of inputs after which a product's sum starts again."""
    return matrix.product.blocks[several] // 2


_tables: dict[str, torch.Tensor] = {}


def _table(activation: torch.nn.Module) -> torch.Tensor:
    """What an activation makes of every bf16 number, by its bits."""
    key = repr(activation)
    if key not in _tables:
        bits = torch.arange(TABLE_NUMBERS, dtype=torch.int32).to(torch.int16)
        with torch.inference_mode():
            _tables[key] = activation(bits.view(torch.bfloat16))
    return _tables[key]
