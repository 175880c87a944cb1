"""Products of few rows with MXFP4 as it is stored: bytes of two weights, of 32 inputs one scale.

An output is 16 sums, one for each byte of a group. 16 bytes are looked up as 32 numbers, multiplied
with the inputs of lower and of upper halves, and added times the scale. So a weight costs less than
memory takes to bring it, and none is written out. A number of the result is one sum in fp32 in an
order of its own, whatever the number of rows: other bits than the product with the dequantised
weight.
"""

import ctypes
from functools import cache

import torch

from offload_rt.device.system import processor_flags
from offload_rt.kernels import assembling
from offload_rt.kernels.blocks import DECLARED, DOUBLED, LOOK_UP
from offload_rt.kernels.code import FUSED, LANES, WIDE, Code
from offload_rt.kernels.products import HEAD

MOST_ROWS = 8  # whose sums are in registers
GROUP = 2 * LANES  # inputs that share a scale
_LOOKS_UP = "avx512f"
_OUTPUTS = 16  # that a thread takes at once
_WORDS, _BYTES = f"<{LANES} x i32>", f"<{LANES} x i8>"
_REDUCE = "@llvm.vector.reduce.fadd.v16f32"
_HEAD = f"""{HEAD}{DECLARED}declare float {_REDUCE}(float, {WIDE})
declare {WIDE} {FUSED}({WIDE}, {WIDE}, {WIDE})
"""
_FIELDS = "codes scales powers even odd out n_groups n_outputs next"


@cache
def problem() -> str:
    """Why there are no such kernels; empty where there are, one for each number of rows."""
    if _LOOKS_UP not in processor_flags():
        return "the processor has no AVX-512"
    counts = range(1, MOST_ROWS + 1)
    return assembling.problem() or assembling.trouble(lambda: [*map(_kernel, counts)])


def multiply(
    rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, powers: torch.Tensor
) -> torch.Tensor:
    """[T, I] in fp32 gives [T, O] in fp32.

    Args:
        rows: at most `MOST_ROWS`.
        codes: [O, I / 2] bytes of two weights, the lower half first.
        scales: [O, I / 32] bytes.
        powers: [256] in fp32, half of what each scale stands for.
    """
    count, inputs = rows.shape
    outputs = codes.shape[0]
    halves = rows.view(count, inputs // 2, 2).permute(2, 0, 1).contiguous()
    out = torch.empty(count, outputs)
    record = (ctypes.c_int64 * 10)()
    parts = codes, scales, powers, halves[0], halves[1], out
    record[:6] = [part.data_ptr() for part in parts]
    counter = ctypes.addressof(record) + 9 * ctypes.sizeof(ctypes.c_int64)
    record[6:] = [inputs // GROUP, outputs, counter, 0]  # the last: the part that is next
    assembling.together(_kernel(count), record)
    return out


@cache
def _kernel(count: int) -> int:
    text = _HEAD + _output(count) + _all()
    return assembling.assemble(text, ["product"])["product"]


def _output(count: int) -> str:
    """One output for so many rows; the loop keeps their sums in registers."""
    code = Code("@output(ptr %codes, ptr %scales, ptr %powers, ptr %even, ptr %odd, ptr %out, "
                "i64 %groups, i64 %outputs)")  # fmt: skip
    table = ", ".join(f"float {float(number)}" for number in DOUBLED)
    code.add("br label %bytes")
    code.block("bytes")
    code.add("%group = phi i64 [0, %entry], [%next, %bytes]")
    for row in range(count):
        code.add(f"%sum{row} = phi {WIDE} [zeroinitializer, %entry], [%new{row}, %bytes]")
    first = code.times("%group", LANES)
    pairs = code.let(f"load {_BYTES}, ptr {code.at('%codes', first, 'i8')}, align 1")
    lower = code.let(f"zext {_BYTES} {pairs} to {_WORDS}")
    upper = code.let(f"lshr {_WORDS} {lower}, splat (i32 4)")
    low, high = (  # of an index the lower four bits count
        code.let(f"call {WIDE} {LOOK_UP}({WIDE} <{table}>, {_WORDS} {index})")
        for index in (lower, upper)
    )
    byte = code.let(f"load i8, ptr {code.at('%scales', '%group', 'i8')}")
    at = code.at("%powers", code.let(f"zext i8 {byte} to i64"), "float")
    scale = code.spread(code.let(f"load float, ptr {at}"))
    line = code.times("%groups", LANES)
    for row in range(count):
        place = code.plus(code.times(line, row), first)
        even, odd = (
            code.let(f"load {WIDE}, ptr {code.at(start, place, 'float')}, align 4")
            for start in ("%even", "%odd")
        )
        made = code.fused(high, odd, code.fp("fmul", low, even))
        code.add(
            f"%new{row} = call {WIDE} {FUSED}({WIDE} {made}, {WIDE} {scale}, {WIDE} %sum{row})"
        )
    code.add("%next = add i64 %group, 1")
    code.add("%inside = icmp ult i64 %next, %groups")
    code.add("br i1 %inside, label %bytes, label %summed")
    code.block("summed")
    for row in range(count):
        total = code.let(f"call reassoc float {_REDUCE}(float 0.0, {WIDE} %new{row})")
        there = code.at("%out", code.times("%outputs", row), "float")
        code.add(f"store float {total}, ptr {there}")
    return code.text()


def _all() -> str:
    """Outputs that threads take in parts."""
    code = Code("@product(ptr %record)", internal=False)
    found = dict(zip(_FIELDS.split(), code.fields("%record", _FIELDS), strict=True))
    outputs, groups = found["n_outputs"], found["n_groups"]
    parts = code.let(f"udiv i64 {code.plus(outputs, _OUTPUTS - 1)}, {_OUTPUTS}")
    with code.taken(found["next"], parts) as part:
        begin = code.times(part, _OUTPUTS)
        end = code.let(f"call i64 @llvm.umin.i64(i64 {code.plus(begin, _OUTPUTS)}, i64 {outputs})")
        with code.loop(begin, end) as output:
            line = code.times(output, groups)
            codes = code.at(found["codes"], code.times(line, LANES), "i8")
            scales, out = (
                code.at(found["scales"], line, "i8"),
                code.at(found["out"], output, "float"),
            )
            code.add(
                f"call void @output(ptr {codes}, ptr {scales}, ptr {found['powers']}, "
                f"ptr {found['even']}, ptr {found['odd']}, ptr {out}, i64 {groups}, i64 {outputs})"
            )
    return code.text()
