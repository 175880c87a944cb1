"""Products with weights as they are stored, on a CPU: none is written out in 16 bits.

The numbers are those of the dequantised weight's product (`kernels/stored.py`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch

from offload_rt.kernels import pairs
from offload_rt.kernels import stored as kernels
from offload_rt.kernels.stored import How, StoredProduct, product_for
from offload_rt.model.formats import ggml, integers, planes
from offload_rt.model.formats.grids import powers
from offload_rt.model.formats.methods import BLOCKS, Form
from offload_rt.model.formats.stored import Stored, multiplies, multiplies_fours
from offload_rt.model.layout import CODED_PART
from offload_rt.model.packed_files import piece_weights

Plain = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Parts = Mapping[str, torch.Tensor]
# Codes, bias, scales [G, O], zero points [G, O], the group of each input where they are unordered.
Operands = tuple[
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]
# None: these bytes have to be decoded first.
Direct = Callable[[torch.Tensor, Parts, torch.Tensor | None], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Multiplies:
    """A `Direct` that is one product of a kernel, which may compute several at once."""

    product: StoredProduct
    operands: Callable[[Parts, torch.Tensor | None], Operands]

    def __call__(self, rows: torch.Tensor, parts: Parts, bias: torch.Tensor | None) -> torch.Tensor:
        """[..., I] gives [..., O]."""
        return self.product(rows, *self.operands(parts, bias))


_BY_BITS = {4: (How.PACKED4, How.COLUMNS4), 8: (How.PACKED8, How.COLUMNS8)}


def prepare(stored: Iterable[Stored], dtype: str) -> None:
    """Assemble what multiplies with these weights and with plain ones, before memory is counted."""
    stored = list(stored)
    for bits in {each.bits for each in stored if each.form is Form.CODED}:
        planes.prepare(bits)
    if dtype != "bfloat16":
        return
    kernels.prepare(How.PLAIN)
    for each in stored:
        if multiplies(each, dtype, exact=True):  # as most passes are, where kernels go by that
            how = _how(each)
            kernels.prepare(how, ordered=each.heads > 0)
            if _has_index(each) and each.form is not Form.PACKED:
                kernels.prepare(how, ordered=True)


def _how(stored: Stored) -> How:
    if stored.form is Form.CODED:
        return How.CODED
    if stored.form in BLOCKS:
        return How(stored.form)
    packed, columns = _BY_BITS[stored.bits]
    return {Form.PACKED: packed, Form.AWQ: How.AWQ}.get(stored.form, columns)


def _has_index(stored: Stored) -> bool:
    return any(word.endswith("g_idx") for word in stored.parts)


def direct_for(
    stored: Stored, dtype: torch.dtype, device: torch.device, *, exact: bool, in_order: bool
) -> Direct | None:
    """What multiplies rows with a weight; None where nothing does and gives torch's bits.

    Args:
        stored: the weight.
        dtype: it computes in.
        device: where.
        exact: torch is given tiles of rows.
        in_order: inputs of a group follow each other.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type != "cpu" or not multiplies(stored, name, exact=exact):
        return None
    ordered = not in_order and _has_index(stored)
    if ordered and stored.form is Form.PACKED:
        return None
    coded, in_blocks = stored.form is Form.CODED, stored.form in BLOCKS
    product = product_for(
        _how(stored),
        stored.inputs,
        stored.outputs,
        exact=exact,
        group=piece_weights(stored.numbers) if coded else 1 if in_blocks else stored.group,
        ordered=stored.heads > 0 if in_blocks else ordered,
    )
    if product is None:
        return None
    if coded:
        return _coded(stored, product)
    if in_blocks:
        return Multiplies(product, _of_blocks(stored))
    numbers = _of_packed if stored.form is Form.PACKED else _of_columns
    return Multiplies(product, partial(numbers, stored))


def at_home(stored: Stored, dtype: torch.dtype, *, in_order: bool) -> Direct | None:
    """What multiplies few rows with an expert's weight where a GPU's experts live.

    As of `direct_for`; MXFP4 too, in an order of its own that has other bits than the product with
    the dequantised weight.
    """
    if multiplies_fours(stored) and not pairs.problem():
        return partial(_fours, stored)
    return direct_for(stored, dtype, torch.device("cpu"), exact=False, in_order=in_order)


def _fours(
    stored: Stored, rows: torch.Tensor, parts: Parts, bias: torch.Tensor | None
) -> torch.Tensor:
    """One sum in fp32 for each number, rounded once."""
    codes, scales = (
        parts[word].view(torch.uint8).view(stored.outputs, -1)
        for word in ("weight_packed", "weight_scale")
    )
    out = torch.cat(
        [
            pairs.multiply(some, codes, scales, _halves())
            for some in rows.float().split(pairs.MOST_ROWS)
        ]
    )
    return (out if bias is None else out.add_(bias)).to(rows.dtype)


@cache
def _halves() -> torch.Tensor:
    """Half of what each scale stands for: a power of two, or no number."""
    return powers(torch.arange(256, dtype=torch.uint8)).float() * 0.5


def _coded(stored: Stored, product: StoredProduct) -> Direct:
    """Of 12 bits; a weight with a piece that is not coded, or is damaged, has no such product."""
    each = piece_weights(stored.numbers)
    described = planes.Described(stored.pieces, each, stored.numbers)
    records = torch.from_numpy(described.records)

    def multiply(
        rows: torch.Tensor, parts: Parts, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        if not described.describe(parts[CODED_PART].numpy()):
            return None
        made = product(rows, records, bias)
        return None if described.misplaced else made

    return multiply


def _of_blocks(stored: Stored) -> Callable[[Parts, torch.Tensor | None], Operands]:
    """Of GGUF's blocks, whose rows may lie in another order."""
    order = ggml.order_of(stored, torch.device("cpu"))
    index = None if order is None else order.int()
    return lambda parts, bias: (parts[ggml.PART], bias, None, None, index)


def plain_for(
    inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, *, exact: bool
) -> StoredProduct | None:
    """What multiplies rows with a bf16 weight [O, I] as it lies; None as above.

    Args:
        inputs: I.
        outputs: O.
        dtype: of the weight.
        device: where it is.
        exact: torch is given tiles of rows.
    """
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return None
    return product_for(How.PLAIN, inputs, outputs, exact=exact)


def _of_packed(stored: Stored, parts: Parts, bias: torch.Tensor | None) -> Operands:
    """Of compressed-tensors, whose scales lie output after output."""
    scales = parts["weight_scale"].t().float().contiguous()
    zeros = parts.get("weight_zero_point")
    if zeros is None:
        less = torch.full_like(scales, 1 << stored.bits - 1)
    else:
        less = integers.codes_of(zeros.t().contiguous(), stored.bits, stored.outputs).float()
    return parts["weight_packed"], bias, scales, less, None


def _of_columns(stored: Stored, parts: Parts, bias: torch.Tensor | None) -> Operands:
    """Of AWQ and GPTQ."""
    if stored.form is Form.AWQ:
        zeros = integers.awq_codes(parts["qzeros"], stored.bits)
    else:
        zeros = integers.codes_of(parts["qzeros"], stored.bits, stored.outputs)
    less = zeros.float()
    if stored.form is Form.GPTQ:
        less = less + 1
    index = parts.get("g_idx")
    return (
        parts["qweight"],
        bias,
        parts["scales"].float().contiguous(),
        less.contiguous(),
        None if index is None else index.int(),
    )
