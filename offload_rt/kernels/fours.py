"""Products of rows with a matrix of 4 bits, for models that only draft.

A weight is its number, 0 to 15, times a scale, plus an offset; both are bf16, of `INPUTS` inputs.
So a product is, for each such group, scale * sum(number * activation) + offset * sum(activation),
where the activations are whole numbers of 8 bits (`rounded`), added in fp32 group after group.

A panel is four parts of 16 outputs. A part is, group after group, weights [4, 16, 4] in bytes, of
which the lower half is of one input and the upper of that four further on, then 16 scales and 16
offsets.
"""

import torch

from offload_rt.kernels.code import LANES, WIDE, Code
from offload_rt.kernels.products import AHEAD
from offload_rt.kernels.rounded import (
    ARGUMENTS,
    MULTIPLY,
    SUMS,
    Form,
    RoundedProduct,
    round_row,
    suits,
    whole_numbers,
)
from offload_rt.kernels.rows import PANEL

INPUTS = 32  # that share a scale and an offset
_PARTS = PANEL // LANES
_LOADS = 4  # of 64 bytes, eight inputs of 16 outputs each
_LOAD_BYTES = 64
_WEIGHT_BYTES = _LOADS * _LOAD_BYTES
_GROUP_BYTES = _WEIGHT_BYTES + 2 * 2 * LANES
_FEW = 4  # rows, for which two sums each are in registers: their additions need not wait
_LOW_BITS = 0x0F0F0F0F


def takes(inputs: int, outputs: int) -> bool:
    """Whether there are kernels for a matrix of these sizes here."""
    return suits(inputs, outputs, INPUTS)


def fill(product: RoundedProduct, first: int, numbers: torch.Tensor, pairs: torch.Tensor) -> None:
    """Give outputs from `first` on their weights.

    Args:
        product: to fill.
        first: a multiple of `PANEL`, as the number of outputs given is.
        numbers: [n, I] of 0 to 15.
        pairs: scale and offset [n, I / 32, 2] in bf16.
    """
    panels = slice(first // PANEL, (first + numbers.shape[0]) // PANEL)
    groups = numbers.shape[1] // INPUTS
    weights, affine = _views(product.memory[panels])
    # output: panel, part, lane; input: group, load, half, four
    split = numbers.to(torch.uint8).view(-1, _PARTS, LANES, groups, _LOADS, 2, 4)
    low, high = split.permute(5, 0, 1, 3, 4, 2, 6)
    weights[:] = low | high << 4
    affine[:] = pairs.view(-1, _PARTS, LANES, groups, 2).permute(0, 1, 3, 4, 2)


def rows_of(product: RoundedProduct, outputs: torch.Tensor) -> torch.Tensor:
    """What `fill` gave some outputs [...]: their weights [..., I] in fp32."""
    weights, affine = _views(product.memory)
    at = outputs // PANEL, outputs % PANEL // LANES
    lanes = outputs % LANES
    both = weights[*at, :, :, lanes]  # [..., G, 4, 4]
    numbers = torch.stack([both & 15, both >> 4], dim=-2).flatten(-3).float()  # [..., G, 32]
    scale, offset = affine[*at, :, :, lanes].float().split(1, dim=-1)
    return (numbers * scale + offset).flatten(-2)


def _views(memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of panels: weights [n, 4, G, 4, 16, 4] in bytes, scales and offsets [n, 4, G, 2, 16]."""
    groups = memory.unflatten(1, (_PARTS, -1, _GROUP_BYTES))
    weights, affine = groups.split([_WEIGHT_BYTES, _GROUP_BYTES - _WEIGHT_BYTES], dim=-1)
    return weights.unflatten(-1, (_LOADS, LANES, 4)), affine.view(torch.bfloat16).unflatten(
        -1, (2, LANES)
    )


def _formula(memory: torch.Tensor, eights: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    weights, affine = _views(memory)
    both = torch.stack([weights & 15, weights >> 4], dim=-2)  # [n, 4, G, 4, 16, 2, 4]
    numbers = both.permute(0, 1, 4, 2, 3, 5, 6).flatten(0, 2).flatten(2).double()  # [O, G, 32]
    pairs = affine.permute(0, 1, 4, 2, 3).flatten(0, 2).double()  # [O, G, 2]
    groups = eights.unflatten(-1, (-1, INPUTS))  # [..., G, 32]
    total = torch.zeros((), dtype=torch.float64)
    for group in range(groups.shape[-2]):
        rows, pair = groups[..., group, :], pairs[:, group]
        # One rounding each, to fp32: fp64 has the product and the sum of it.
        total = (total + pair[:, 0] * (rows @ numbers[:, group].t())).float().double()
        total = (total + pair[:, 1] * rows.sum(-1, keepdim=True)).float().double()
    return total.float() * factors


def _eighth(inputs: int) -> str:
    """A row's factor, then the sums of its groups."""
    code = Code(f"@round{inputs}(ptr %row, ptr %out, ptr %factor)")
    factor = round_row(code, inputs)
    with code.loop(0, inputs // INPUTS) as group:
        start = code.times(group, INPUTS)
        one, other = (
            whole_numbers(code, code.plus(start, further), factor) for further in (0, LANES)
        )
        both = code.let(f"add {SUMS} {one}, {other}")
        total = code.let(f"call i32 @llvm.vector.reduce.add.v16i32({SUMS} {both})")
        number = code.let(f"sitofp i32 {total} to float")
        code.add(f"store float {number}, ptr {code.at('%factor', code.plus(group, 1), 'float')}")
    return code.text()


def _panel(inputs: int, count: int) -> str:
    """Part after part; the loop over groups keeps what is summed in registers."""
    groups, stride = inputs // INPUTS, _factors(inputs)
    code = Code(f"@times{inputs}.{count}({ARGUMENTS})")
    with code.loop(0, _PARTS) as part:
        before = code.here
        start = code.at("%panel", code.times(part, groups * _GROUP_BYTES), "i8")
        code.add("br label %groups")
        code.block("groups")
        code.add(f"%group = phi i64 [0, %{before}], [%next, %groups]")
        for row in range(count):
            code.add(f"%sum{row} = phi {WIDE} [zeroinitializer, %{before}], [%new{row}, %groups]")
        here = code.at(start, code.times("%group", _GROUP_BYTES), "i8")
        for line in range(0, _GROUP_BYTES, _LOAD_BYTES):
            ahead = code.at(here, AHEAD + line, "i8")
            code.add(f"call void @llvm.prefetch.p0(ptr {ahead}, i32 0, i32 3, i32 1)")
        sums = _whole_sums(code, inputs, count, here)
        scale, offset = (
            code.read(code.at(here, _WEIGHT_BYTES + 2 * LANES * place, "i8")) for place in (0, 1)
        )
        for row, whole in enumerate(sums):
            number = code.let(f"sitofp {SUMS} {whole} to {WIDE}")
            at = code.at("%factors", code.plus("%group", row * stride + 1), "float")
            total = code.spread(code.let(f"load float, ptr {at}"))
            added = code.fused(scale, number, f"%sum{row}")
            code.add(
                f"%new{row} = call {WIDE} @llvm.fma.v16f32({WIDE} {offset}, {WIDE} {total}, "
                f"{WIDE} {added})"
            )
        code.add("%next = add i64 %group, 1")
        code.add(f"%inside = icmp ult i64 %next, {groups}")
        code.add("br i1 %inside, label %groups, label %summed")
        code.block("summed")
        _store(code, part, count, stride)
    return code.text()


def _whole_sums(code: Code, inputs: int, count: int, here: str) -> list[str]:
    """A register of each row: of 16 outputs, the group's products in whole numbers."""
    chains = 2 if count <= _FEW else 1
    sums = [["zeroinitializer"] * chains for _ in range(count)]
    for load in range(_LOADS):
        both = code.let(f"load {SUMS}, ptr {code.at(here, load * _LOAD_BYTES, 'i8')}, align 64")
        upper = code.let(f"lshr {SUMS} {both}, splat (i32 4)")
        for half, numbers in enumerate((both, upper)):
            weights = code.let(f"and {SUMS} {numbers}, splat (i32 {_LOW_BITS})")
            for row in range(count):
                first = row * inputs + (2 * load + half) * 4
                at = code.at("%rows", code.plus(code.times("%group", INPUTS), first), "i8")
                four = code.let(f"load i32, ptr {at}, align 1")
                spread = code.spread(four, "i32")
                chain = half % chains
                sums[row][chain] = code.let(
                    f"call {SUMS} {MULTIPLY}({SUMS} {sums[row][chain]}, {SUMS} {weights}, "
                    f"{SUMS} {spread})"
                )
    return [
        each[0] if chains == 1 else code.let(f"add {SUMS} {each[0]}, {each[1]}") for each in sums
    ]


def _store(code: Code, part: str, count: int, stride: int) -> None:
    """Multiply with the rows' factors, add the bias, round."""
    place = code.times(part, LANES)
    biased = code.let("icmp ne ptr %bias, null")
    readable = code.let(f"select i1 {biased}, ptr {code.at('%bias', place)}, ptr %panel")
    bias = code.let(f"select i1 {biased}, {WIDE} {code.read(readable)}, {WIDE} zeroinitializer")
    for row in range(count):
        at = code.at("%factors", row * stride, "float")
        factor = code.spread(code.let(f"load float, ptr {at}"))
        result = code.fp("fadd", code.fp("fmul", f"%new{row}", factor), bias)
        there = code.plus(code.times("%outputs", row), place)
        code.write(code.rounded(result), code.at("%out", there))


def _factors(inputs: int) -> int:
    return 1 + inputs // INPUTS


FOUR = Form(
    panel_bytes=lambda inputs: _PARTS * (inputs // INPUTS) * _GROUP_BYTES,
    factors=_factors,
    eighth=_eighth,
    panel=_panel,
    formula=_formula,
)
