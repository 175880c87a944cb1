"""Who dequantises on a GPU: Triton's kernels, where triton is installed, else torch.

A kernel is an operator of torch's, so that it is seen by what traces or fakes operators.
"""

import importlib.util
import struct
from collections.abc import Callable, Sequence
from functools import cache

import torch

from offload_rt.device.cuda.torch_driver import on_device_of
from offload_rt.errors import DeviceError
from offload_rt.kernels.blocks import DOUBLED, UNEVEN
from offload_rt.model.formats import ggml, integers
from offload_rt.model.formats.grids import powers
from offload_rt.model.formats.methods import BLOCKS, NESTED_BITS, Form, block_bits
from offload_rt.model.formats.stored import Stored, suits_triton
from offload_rt.model.layout import CODED_PART
from offload_rt.model.packed_files import piece_weights

PACKAGE = "triton"
_INTEGERS = {Form.AWQ: 0, Form.GPTQ: 1, Form.GPTQ_V2: 1, Form.PACKED: 2}  # order of the kernel
_GRIDS = (Form.FP8, Form.INT8)
_FOURS = (Form.NVFP4, Form.NVFP4_PRODUCT, Form.MXFP4)
# Of blocks of 32 numbers: where codes begin, their zero point, and whether fifth bits, an offset,
# a power of two as the scale, a table are there.
_BLOCKS = {
    Form.Q4_0: (2, 8, 0, 0, 0, 0),
    Form.Q4_1: (4, 0, 0, 1, 0, 0),
    Form.Q5_0: (6, 16, 1, 0, 0, 0),
    Form.Q5_1: (8, 0, 1, 1, 0, 0),
    Form.Q8_0: (2, 0, 0, 0, 0, 0),
    Form.IQ4_NL: (2, 0, 0, 0, 0, 1),
    Form.BLOCK_MXFP4: (1, 0, 0, 0, 1, 1),
}
_SIXTEENS = (Form.Q2_K, Form.Q3_K, Form.Q6_K)  # whose scales are of so many numbers
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@cache
def is_there() -> bool:
    """Whether Triton's kernels can be had."""
    return importlib.util.find_spec(PACKAGE) is not None


def suits(stored: Stored) -> bool:
    """Whether there is a kernel for a weight."""
    return suits_triton(stored.form, stored.bits)


def bring_for(stored: Stored, device: torch.device) -> integers.Bring | None:
    """What dequantises a weight in one or two kernels; None where there is none for it.

    Args:
        stored: the weight.
        device: where it is dequantised.

    Raises:
        DeviceError: it can be dequantised by a kernel only, and there is none.
    """
    if stored.form is Form.CODED and not is_there():
        raise DeviceError(
            f"--wire lossless is decoded on a GPU by {PACKAGE}, which is not installed: use raw"
        )
    if not suits(stored) or not is_there():
        return None
    if stored.form in _INTEGERS:
        return _integers
    if stored.form in _GRIDS:
        return _grid
    if stored.form in _FOURS:
        return _fours
    if stored.form in BLOCKS:
        return _blocks
    starts = torch.tensor(stored.pieces, dtype=torch.int64).to(device)
    kernel = "nested" if stored.bits == NESTED_BITS else "coded"

    def bring(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
        each = piece_weights(stored.numbers)
        dequantise(kernel, [parts[CODED_PART], starts], [stored.numbers, each], out)

    return bring


def _integers(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    order = _INTEGERS[stored.form]
    packed = stored.form is Form.PACKED
    codes = parts["weight_packed" if packed else "qweight"]
    scales = parts["weight_scale" if packed else "scales"]
    zeros = parts.get("weight_zero_point" if packed else "qzeros")
    index = parts.get("weight_g_idx" if packed else "g_idx")
    less = 1 << stored.bits - 1 if packed else int(stored.form is Form.GPTQ)
    numbers = [stored.outputs, stored.inputs, stored.groups, stored.group]
    numbers += [codes.shape[1], 0 if zeros is None else zeros.shape[1], less, order, stored.bits]
    numbers += [zeros is not None, index is not None]
    given = [codes, codes if zeros is None else zeros, scales, codes if index is None else index]
    dequantise("integers", given, [int(number) for number in numbers], out)


def _grid(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
    assert scale is not None  # or it would not have been found
    scale = powers(scale) if scale.dtype is torch.uint8 else scale
    zeros = parts.get("weight_zero_point")
    codes = parts["weight"].view(torch.uint8)
    numbers = [stored.outputs, stored.inputs, stored.groups, *stored.block]
    numbers += [int(stored.form is Form.INT8), int(zeros is not None)]
    dequantise("grid", [codes, codes if zeros is None else zeros, scale], numbers, out)


def _fours(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    if stored.form is Form.MXFP4:
        scales = powers(parts["weight_scale"])
    elif stored.form is Form.NVFP4:
        scales = parts["weight_scale"].float() / parts["weight_global_scale"].view(1)
    else:
        scales = parts["weight_scale"].float() * parts["weight_scale_2"].view(1)
    codes = parts["weight" if stored.form is Form.NVFP4_PRODUCT else "weight_packed"]
    numbers = [stored.outputs, stored.inputs, stored.groups, stored.block[1]]
    dequantise("fours", [codes, scales], numbers, out)


def _blocks(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    form = stored.form
    numbers = [stored.outputs, stored.inputs, stored.heads and stored.outputs // stored.heads]
    numbers += [BLOCKS[form][1]]
    table = DOUBLED if form is Form.BLOCK_MXFP4 else UNEVEN
    words = struct.unpack("<4i", struct.pack("<16b", *table))
    if form in _BLOCKS:
        dequantise("blocks", [parts[ggml.PART]], [*numbers, *_BLOCKS[form], *words], out)
        return
    which = 0 if form is Form.IQ4_XS else block_bits(form)
    width = 16 if form in _SIXTEENS else 32
    dequantise("super_blocks", [parts[ggml.PART]], [*numbers, which, width, *words], out)


@torch.library.custom_op("offload_rt::dequantise", mutates_args={"out"})
def dequantise(
    kernel: str, tensors: Sequence[torch.Tensor], numbers: Sequence[int], out: torch.Tensor
) -> None:
    """Run a kernel of `triton_kernels.py`.

    Args:
        kernel: its name.
        tensors: what it reads, in its order.
        numbers: sizes and choices, in its order.
        out: [O, I] takes the weight.
    """
    kind = _KINDS[out.dtype]
    flat = out.view(torch.uint16) if kind == 0 else out
    given = [tensor.contiguous() for tensor in tensors]
    with on_device_of(out):
        _launches()[kernel](given, numbers, flat, kind)


@dequantise.register_fake
def _(
    kernel: str, tensors: Sequence[torch.Tensor], numbers: Sequence[int], out: torch.Tensor
) -> None:
    """Nothing but `out` changes."""


Launch = Callable[[Sequence[torch.Tensor], Sequence[int], torch.Tensor, int], None]


@cache
def _launches() -> dict[str, Launch]:
    """What starts each kernel; triton is imported now."""
    from offload_rt.model.formats import triton_kernels as made

    def blocks(outputs: int, inputs: int) -> tuple[int, int]:
        return -(-outputs // made.ROWS), -(-inputs // made.COLUMNS)

    def integers_(
        tensors: Sequence[torch.Tensor], numbers: Sequence[int], out: torch.Tensor, kind: int
    ) -> None:
        *sizes, order, bits, zeros, index = numbers
        more = (order, bits, bool(zeros), bool(index), kind, made.ROWS, made.COLUMNS)
        made.integers[blocks(*sizes[:2])](*tensors, out, *sizes, *more)

    def grid(
        tensors: Sequence[torch.Tensor], numbers: Sequence[int], out: torch.Tensor, kind: int
    ) -> None:
        *sizes, number, zeros = numbers
        more = (number, bool(zeros), kind, made.ROWS, made.COLUMNS)
        made.grid[blocks(*sizes[:2])](*tensors, out, *sizes, *more)

    def fours(
        tensors: Sequence[torch.Tensor], numbers: Sequence[int], out: torch.Tensor, kind: int
    ) -> None:
        more = (kind, made.ROWS, made.COLUMNS)
        made.fours[blocks(*numbers[:2])](*tensors, out, *numbers, *more)

    def coded(
        tensors: Sequence[torch.Tensor], numbers: Sequence[int], out: torch.Tensor, kind: int
    ) -> None:
        whole, each = numbers
        pieces, most = tensors[1].numel() - 1, min(whole, each)
        made.coded[(pieces, -(-most // made.WEIGHTS))](*tensors, out, *numbers, kind, made.WEIGHTS)
        groups = -(-most // made.GROUP)
        made.escapes[(pieces, groups)](*tensors, out, *numbers, kind, made.ESCAPES)

    def nested(
        tensors: Sequence[torch.Tensor], numbers: Sequence[int], out: torch.Tensor, kind: int
    ) -> None:
        places = (tensors[1].numel() - 1, -(-min(numbers) // made.WEIGHTS))
        made.nested[places](*tensors, out, *numbers, kind, made.WEIGHTS)

    def blocks_(
        tensors: Sequence[torch.Tensor], numbers: Sequence[int], out: torch.Tensor, kind: int
    ) -> None:
        outputs, inputs, head, nbytes, start, zero, *flags = numbers
        *has, a, b, c, d = flags
        paired = (start, zero, head > 0, *map(bool, has), a, b, c, d)
        places = (-(-outputs // made.LINES), -(-inputs // made.LINE))
        made.blocks[places](
            *tensors, out, outputs, inputs, head, nbytes, *paired, kind, made.LINES, made.LINE
        )

    def super_blocks(
        tensors: Sequence[torch.Tensor], numbers: Sequence[int], out: torch.Tensor, kind: int
    ) -> None:
        outputs, inputs, head, nbytes, form, width, *words = numbers
        made.super_blocks[(-(-outputs // made.LINES), inputs // made.LINE)](
            *tensors,
            out,
            outputs,
            inputs,
            head,
            nbytes,
            form,
            head > 0,
            *words,
            kind,
            made.LINES,
            width,
        )

    return {
        "integers": integers_,
        "grid": grid,
        "fours": fours,
        "coded": coded,
        "nested": nested,
        "blocks": blocks_,
        "super_blocks": super_blocks,
    }
