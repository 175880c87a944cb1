"""Kernels that multiply rows with weights as they lie, in Triton's language.

One launch computes the rows of all experts that are there: each program a block of the outputs of
one row and one expert, whose codes lie where a table says. So what it makes of a row depends on
nothing else in the launch, and each program has a row of its own: for few rows, which is where
weights are read faster than they are multiplied.

Importing this module needs triton (`offload_rt/model/formats/together.py` asks for it).
"""

import triton
import triton.language as tl

from offload_rt.model.formats.triton_kernels import _store

ROWS, PAIRS = 16, 64  # outputs of a program, and bytes of codes that it takes at once
COLUMNS = 128  # inputs that it takes at once of numbers as they are
FIELDS = 5  # of the table


@triton.jit
def _number(place, mask, kind: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """A number in fp32; bf16 comes as words, as Triton's interpreter has none."""
    value = tl.load(place, mask=mask, other=0)
    if kind == 0:
        return (value.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _four(code):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """E2M1 of four bits."""
    exponent = (code >> 1) & 3
    normal = ((exponent + 126) << 23) | ((code & 1) << 22)
    tiny = (code & 1).to(tl.float32) * 0.5
    size = tl.where(exponent == 0, tiny, normal.to(tl.float32, bitcast=True))
    return tl.where((code & 8) != 0, -size, size)


@triton.jit
def _add(one, other):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    return one + other


@triton.jit
def mxfp4(  # type: ignore[no-untyped-def] # noqa: ANN201, PLR0913
    table,  # noqa: ANN001
    given,  # noqa: ANN001
    biases,  # noqa: ANN001
    out,  # noqa: ANN001
    outputs,  # noqa: ANN001
    inputs,  # noqa: ANN001
    has_bias: tl.constexpr,
    kind: tl.constexpr,
    fields: tl.constexpr,
    rows: tl.constexpr,
    pairs: tl.constexpr,
):
    """MXFP4: codes [O, I / 2], low nibble first, scales [O, I / 32], powers of two.

    An entry of the table has the row of `given` [., I], that of `out` [., O], the expert, and the
    addresses of its codes and scales; `biases` are [experts, O].
    """
    entry = table + tl.program_id(0) * fields
    source, target = tl.load(entry), tl.load(entry + 1)
    codes = tl.load(entry + 3).to(tl.pointer_type(tl.uint8))
    scales = tl.load(entry + 4).to(tl.pointer_type(tl.uint8))
    o = tl.program_id(1).to(tl.int64) * rows + tl.arange(0, rows)
    real = o < outputs
    total = tl.full((rows, pairs), 0.0, tl.float32)
    for first in range(0, inputs // 2, pairs):
        j = first + tl.arange(0, pairs)
        inside = j < inputs // 2
        mask = real[:, None] & inside[None, :]
        byte = tl.load(codes + o[:, None] * (inputs // 2) + j[None, :], mask=mask, other=0)
        byte = byte.to(tl.int32)
        power = tl.load(scales + o[:, None] * (inputs // 32) + j[None, :] // 16, mask=mask, other=0)
        power = power.to(tl.int32)
        scale = (power << 23).to(tl.float32, bitcast=True)
        scale = tl.where(power == 0, 5.877471754111438e-39, scale)  # 2^-127
        scale = tl.where(power == 255, float("nan"), scale)
        even = _number(given + source * inputs + 2 * j, inside, kind)
        odd = _number(given + source * inputs + 2 * j + 1, inside, kind)
        product = _four(byte & 15) * even[None, :] + _four(byte >> 4) * odd[None, :]
        total += tl.where(mask, product * scale, 0.0)
    made = tl.reduce(total, 1, _add)
    if has_bias:
        made += _number(biases + tl.load(entry + 2) * outputs + o, real, kind)
    _store(out + target * outputs + o, made, real, kind)


@triton.jit
def plain(  # type: ignore[no-untyped-def] # noqa: ANN201, PLR0913
    table,  # noqa: ANN001
    given,  # noqa: ANN001
    biases,  # noqa: ANN001
    out,  # noqa: ANN001
    outputs,  # noqa: ANN001
    inputs,  # noqa: ANN001
    half,  # noqa: ANN001
    step_o,  # noqa: ANN001
    step_i,  # noqa: ANN001
    has_bias: tl.constexpr,
    kind: tl.constexpr,
    fields: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Numbers as they are: `half` of the outputs [half, I], then those of another such matrix.

    An entry of the table is as of `mxfp4`, with the addresses of both; the second one is nobody's
    where one matrix has all outputs. The next output of a matrix is `step_o` numbers on, the next
    input `step_i`.
    """
    entry = table + tl.program_id(0) * fields
    source, target = tl.load(entry), tl.load(entry + 1)
    blocks = (half + rows - 1) // rows
    second = tl.program_id(1) // blocks
    address = tl.load(entry + 3 + second)
    if kind == 0:
        weight = address.to(tl.pointer_type(tl.uint16))
    elif kind == 1:
        weight = address.to(tl.pointer_type(tl.float16))
    else:
        weight = address.to(tl.pointer_type(tl.float32))
    o = (tl.program_id(1) - second * blocks).to(tl.int64) * rows + tl.arange(0, rows)
    real = o < half
    total = tl.full((rows, columns), 0.0, tl.float32)
    for first in range(0, inputs, columns):
        i = first + tl.arange(0, columns)
        inside = i < inputs
        mask = real[:, None] & inside[None, :]
        number = _number(weight + o[:, None] * step_o + i[None, :] * step_i, mask, kind)
        product = number * _number(given + source * inputs + i, inside, kind)[None, :]
        total += tl.where(mask, product, 0.0)
    made = tl.reduce(total, 1, _add)
    o += second * half
    if has_bias:
        made += _number(biases + tl.load(entry + 2) * outputs + o, real, kind)
    _store(out + target * outputs + o, made, real, kind)
