"""Linear layers whose bf16 weights lie in the order the CPU's kernels read them.

oneDNN reorders a plain weight on every call. With the order kept, a pass of 1 to 16 tokens runs 2
to 4 times as fast here. It is for weights that stay: a streamed layer would be reordered in each
pass. They lie in large pages, which are read faster
(docs/RESULTS.md, "Large pages and a reordered output head"). Where LLVM can be had, few rows are
multiplied by kernels of our own that read the same memory faster (`kernels/products.py`).

On the machine it was tried on (AVX-512 BF16) a product has the same bits reordered and plain,
so resident layers of the target may be packed too. Shapes of which that is not so on another
machine are found (`unlike_when_packed`), and stay plain. Where row-invariant passes multiply in
matrix registers nothing is reordered: there a matrix is multiplied as it lies in its file, streamed
or not (`kernels/registers.py`). It only gets large pages of its own.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import Linear

from offload_rt.device.system import ask_for_large_pages
from offload_rt.kernels.assembling import traced
from offload_rt.kernels.products import Product, blocks_of, lies_in_panels
from offload_rt.kernels.registers import multiplies_in_registers
from offload_rt.kernels.rows import MOST_ROWS, PANEL, ROW_TILE
from offload_rt.kernels.stored import LyingProduct
from offload_rt.kernels.tiles import in_tiles
from offload_rt.model.formats.lookup import looked_up, stripped
from offload_rt.model.formats.wide import widens

Shape = tuple[int, int]  # outputs, inputs
PACK_FOR_ROWS = 16
_CANCELLED_NUMBERS, _CANCELLED_OUTPUTS = 2**20, 256  # of the weight, in fp32 while rows are made
_CANCELLED_SUMS, _MOST_DRAWS = 1024, 64  # for each number of rows
COMPARED_ROWS = (1, 2, 8, 16, 17, 65)  # kernels differ by the number of rows
HEAD_ROWS = COMPARED_ROWS[:-1]  # twice 65 rows of 152,000 logits were 40 MB that no plan counts


class PackedLinear(torch.nn.Module):
    """Computes what the given linear does from a copy of its weight, reordered where that helps.

    Args:
        linear: weight [O, I] in bf16 on the CPU, bias [O] or None.
        exact: a row has the bits of one in a tile of rows, however many there are.

    Attributes:
        in_registers: matrix registers multiply any number of rows with the weight as it was.
    """

    def __init__(self, linear: torch.nn.Linear, *, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact
        outputs, inputs = linear.weight.shape
        self.inputs, self.outputs = inputs, outputs
        self.bias = None if linear.bias is None else linear.bias.detach().clone()
        self.product: Product | LyingProduct | None = None
        self._most_numbers = MOST_ROWS * inputs
        self.in_registers = exact and multiplies_in_registers(inputs, outputs)
        if self.in_registers:
            self.weight = torch.empty((outputs, inputs), dtype=linear.weight.dtype)
            ask_for_large_pages(self.weight.data_ptr(), self.weight.nbytes)
            self.weight.copy_(linear.weight.detach())
            self.product, self._most_numbers = LyingProduct(self.weight, self.bias), sys.maxsize
            return
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.weight = reorder(linear.weight.detach(), PACK_FOR_ROWS)
        start = torch.ops.mkldnn.data_ptr(self.weight)
        blocks = blocks_of(inputs, outputs, ROW_TILE if exact else 1)
        if blocks is not None and lies_in_panels(self.weight, linear.weight):
            self.product = Product(start, inputs, outputs, self.bias, blocks)
        ask_for_large_pages(start, linear.weight.nbytes)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., I] gives [..., O]."""
        product = self.product
        # What is traced are torch's kernels.
        if product is not None and rows.numel() <= self._most_numbers and not traced():
            return product(rows)
        by_torch = self._by_torch if self.in_registers else self._by_onednn
        return in_tiles(by_torch, rows, outputs=self.outputs) if self.exact else by_torch(rows)

    def _by_torch(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(rows, self.weight, self.bias)

    def _by_onednn(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.weight, self.bias, "none", [], ""
        )
        return out


class PackedEmbedding(torch.nn.Module):
    """Looks up rows of an output head that is the embedding, too, as it lies or in panels.

    Args:
        embedding: weight [V, E]; it computes what its class does with a row, but keeps no weight.
        head: its copy.
    """

    def __init__(self, embedding: torch.nn.Embedding, head: PackedLinear) -> None:
        super().__init__()
        assert head.product is not None  # else it lies otherwise
        self._head, self._embedding = [head], stripped(embedding)  # not a module of this
        if head.in_registers:
            return
        numbers = (ctypes.c_int16 * (head.outputs * head.inputs)).from_address(head.product.address)
        self._panels = torch.frombuffer(numbers, dtype=torch.bfloat16).view(
            -1, head.inputs // 2, PANEL, 2
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] ids give [..., E]."""
        return looked_up(self._embedding, self._rows, ids)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        (head,) = self._head
        if head.in_registers:
            return head.weight[ids]
        return self._panels[ids // PANEL, :, ids % PANEL].flatten(-2)  # [N, E / 2, 2]


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed weights are worth having: bf16 on a CPU with instructions for it."""
    return (
        device.type == "cpu"
        and dtype is torch.bfloat16
        and not widens(dtype, device)
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def worth_packing(shapes: Iterable[Shape], *, exact: bool) -> frozenset[Shape]:
    """Those that matrix registers do not take as they lie, in row-invariant passes (`exact`)."""
    return frozenset(
        (outputs, inputs)
        for outputs, inputs in shapes
        if not (exact and multiplies_in_registers(inputs, outputs))
    )


def unlike_when_packed(module: torch.nn.Module, *, exact: bool = False) -> frozenset[Shape]:
    """Outputs and inputs of linears below `module` that give other numbers when they are packed."""
    linears = [child for child in module.modules() if type(child) is torch.nn.Linear]
    linears = [linear for linear in linears if linear.weight.dtype is torch.bfloat16]
    kinds = {(*linear.weight.shape, linear.bias is None): linear for linear in linears}
    unlike = [each for each in kinds.values() if packed_exactly(each, exact=exact) is None]
    return frozenset((each.out_features, each.in_features) for each in unlike)


def packed_exactly(
    linear: torch.nn.Linear, counts: Sequence[int] = COMPARED_ROWS, *, exact: bool = False
) -> PackedLinear | None:
    """The packed form of a linear, or None where that gives other numbers for so many rows.

    None, too, where a copy gains nothing (`worth_packing`).
    """
    if not worth_packing([(linear.out_features, linear.in_features)], exact=exact):
        return None
    packed = PackedLinear(linear, exact=exact)
    plain: Callable[[torch.Tensor], torch.Tensor] = partial(torch.nn.Linear.forward, linear)
    if exact:
        plain = partial(in_tiles, plain, outputs=linear.out_features)
    alike = (torch.equal(packed(rows), plain(rows)) for rows in _telling_rows(linear, counts))
    return packed if all(alike) else None


def _telling_rows(linear: torch.nn.Linear, counts: Sequence[int]) -> Iterator[torch.Tensor]:
    """Random rows [1, S, I], so many at a time, whose sums nearly cancel out in some outputs.

    Another order of additions changes one of 5,000 rounded sums of random rows, and one of 90 of
    these: rows are moved by as little as takes the chosen outputs to zero, bias and all.
    """
    outputs, inputs = linear.weight.shape
    few = min(outputs, inputs // 2, _CANCELLED_OUTPUTS, max(1, _CANCELLED_NUMBERS // inputs))
    chosen = torch.linspace(0, outputs - 1, few).long()
    weight = linear.weight.detach()[chosen].float()
    bias = 0 if linear.bias is None else linear.bias.detach()[chosen].float()
    square = weight @ weight.T
    # What is no full rank, as zeros, can be divided by, too.
    square.diagonal().add_(1e-6 * square.diagonal().mean() + torch.finfo(torch.float32).tiny)
    generator = torch.Generator().manual_seed(0)
    for count in counts:
        draws = min(_MOST_DRAWS, -(-_CANCELLED_SUMS // (count * max(1, few))))
        at_once = max(1, max(counts) // count)
        for drawn in range(0, draws, at_once):
            rows = torch.randn(min(at_once, draws - drawn) * count, inputs, generator=generator)
            sums = (rows @ weight.T + bias).T
            moved = rows - torch.linalg.solve_ex(square, sums).result.T @ weight
            finite = bool(moved.isfinite().all())  # as of most weights
            made = (moved if finite else rows).to(linear.weight.dtype)
            yield from made.view(-1, 1, count, inputs)


def pack_linears(
    module: torch.nn.Module,
    shapes: frozenset[Shape] | None = None,
    *,
    exact: bool = False,
    drafts: bool = False,
) -> None:
    """Replace linears in bf16 below `module`; all else becomes memory of its own.

    Args:
        module: what they are below.
        shapes: outputs and inputs of those that are replaced; None: of any.
        exact: as of `PackedLinear`.
        drafts: no answer rests on the bits, so the quickest will do.
    """

    def packed(linear: torch.nn.Linear) -> PackedLinear | None:
        fits = shapes is None or (linear.out_features, linear.in_features) in shapes
        if not fits or linear.weight.dtype is not torch.bfloat16:
            return None
        return quickest(linear) if drafts else PackedLinear(linear, exact=exact)

    replace_linears(module, packed)


def quickest(linear: torch.nn.Linear) -> PackedLinear:
    """The packed form of a linear that drafts: in matrix registers, where they can be used."""
    return PackedLinear(
        linear, exact=multiplies_in_registers(linear.in_features, linear.out_features)
    )


def replace_linears(
    module: torch.nn.Module, make: Callable[[Any], torch.nn.Module | None], kind: type = Linear
) -> None:
    """Put other modules in place of linears, so that nothing refers to the memory of their weights.

    Args:
        module: what they are below.
        make: what replaces a linear; None leaves it, with a copy of its parameters.
        kind: of linears.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind and (made := make(child)) is not None:
                setattr(parent, name, made)
                child._parameters.clear()  # it is among the modules listed above
                child._buffers.clear()
        for key, parameter in list(parent._parameters.items()):
            if parameter is not None:
                parent._parameters[key] = torch.nn.Parameter(parameter.detach().clone(), False)
        for key, buffer in list(parent._buffers.items()):
            if buffer is not None:
                parent._buffers[key] = buffer.clone()
