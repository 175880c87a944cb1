"""Products of rows with a matrix of 8 bits, for models that only draft.

Weights have a scale per output, activations one per row, found on the way: 8 bits without a sign,
as `vpdpbusd` multiplies four of them with four weights and adds to a sum of 32 bits per output.
What the offset of 128 adds is taken off again.

The matrix lies in panels of `PANEL` outputs: weights [I / 4, 64, 4], then 64 scales in fp32 and
64 sums of weights times 128. All rows go through a panel, `MOST_ROWS` at a time, before the next is
read, so more rows read no more memory.
"""

import ctypes
from functools import cache

import torch

from offload_rt.device.system import ask_for_large_pages, processor_flags
from offload_rt.kernels import assembling
from offload_rt.kernels.code import LANES, WIDE, Code
from offload_rt.kernels.products import AHEAD, HEAD, MOST_ROWS, PANEL

_FOUR = 4  # inputs that one instruction multiplies for an output
_OFFSET = 128
_LEAST = 2.0**-126  # rows of smaller numbers are taken for zero
_TAIL_BYTES = 2 * 4 * PANEL  # scales and sums behind a panel
_MULTIPLY = "@llvm.x86.avx512.vpdpbusd.512"
_SUMS = f"<{LANES} x i32>"
DECLARED = f"""
declare {_SUMS} {_MULTIPLY}({_SUMS}, {_SUMS}, {_SUMS})
declare {WIDE} @llvm.fabs.v16f32({WIDE})
declare {WIDE} @llvm.maxnum.v16f32({WIDE}, {WIDE})
declare float @llvm.vector.reduce.fmax.v16f32({WIDE})
declare {WIDE} @llvm.rint.v16f32({WIDE})
"""
FIELDS = "rows matrix bias out eights factors n_count"


@cache
def problem() -> str:
    """Why there are no such kernels; empty where there are."""
    if "avx512_vnni" not in processor_flags():
        return "the processor has no AVX-512 VNNI"
    return assembling.problem() or assembling.trouble(lambda: _kernel(PANEL, PANEL))


def suits(inputs: int, outputs: int) -> bool:
    """Whether there are kernels for a matrix of these sizes here."""
    return not problem() and not outputs % PANEL and not inputs % LANES


class RoundedProduct:
    """The product of one matrix of 8 bits with rows; `fill` gives it its weights.

    Args:
        inputs: I.
        outputs: O.
        bias: [O] in bf16, or None.

    Attributes:
        address: of the matrix.
        bias: the same.
        blocks: sums of whole numbers are the same in any order.
    """

    blocks = 0, 0

    def __init__(self, inputs: int, outputs: int, bias: torch.Tensor | None) -> None:
        self._inputs, self._outputs, self.bias = inputs, outputs, bias
        memory = torch.empty(outputs // PANEL, panel_bytes(inputs), dtype=torch.uint8)
        self.address = memory.data_ptr()
        ask_for_large_pages(self.address, memory.nbytes)
        weights, tail = memory.split([PANEL * inputs, _TAIL_BYTES], dim=1)
        self._weights = weights.view(torch.int8).unflatten(1, (inputs // _FOUR, PANEL, _FOUR))
        scales, sums = tail.split(_TAIL_BYTES // 2, dim=1)
        self._scales, self._sums = scales.view(torch.float32), sums.view(torch.int32)
        start = 0 if bias is None else bias.data_ptr()
        self._record = (ctypes.c_int64 * 7)(0, self.address, start)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix, scales and sums included."""
        return self._outputs // PANEL * panel_bytes(self._inputs)

    def fill(self, first: int, rounded: torch.Tensor, scales: torch.Tensor) -> None:
        """Give outputs from `first` on their weights [n, I] in int8 and scales [n] in fp32.

        Both numbers of outputs are multiples of `PANEL`.
        """
        panels = slice(first // PANEL, (first + rounded.shape[0]) // PANEL)
        parts = rounded.view(-1, PANEL, self._inputs // _FOUR, _FOUR)
        self._weights[panels] = parts.transpose(1, 2)
        self._scales[panels] = scales.view(-1, PANEL)
        sums = rounded.sum(dim=1, dtype=torch.int32) * _OFFSET
        self._sums[panels] = sums.view(-1, PANEL)

    def by_formula(self, rows: torch.Tensor) -> torch.Tensor:
        """The same numbers from torch's operators, slowly: for traces and tests."""
        wide = rows.float()
        most = wide.abs().amax(dim=-1, keepdim=True)
        most = torch.where(most > _LEAST, most, torch.ones_like(most))
        eights = (wide * (torch.full_like(most, 127) / most)).round().double()
        weight = self._weights.transpose(1, 2).flatten(2).flatten(0, 1).double()
        sums = (eights @ weight.t()).float()
        out = sums * (self._scales.flatten() * (most / 127))
        return (out if self.bias is None else out + self.bias.float()).to(rows.dtype)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., I] in bf16 gives [..., O]; not from two threads at once."""
        rows = rows.contiguous()
        count = rows.numel() // self._inputs
        out = rows.new_empty(*rows.shape[:-1], self._outputs)
        eights = torch.empty(count, self._inputs, dtype=torch.uint8)
        factors = torch.empty(count, dtype=torch.float32)
        record = self._record
        record[0], record[3], record[6] = rows.data_ptr(), out.data_ptr(), count
        record[4], record[5] = eights.data_ptr(), factors.data_ptr()
        assembling.together(_kernel(self._inputs, self._outputs), record)
        return out


def panel_bytes(inputs: int) -> int:
    """Of a panel with what lies behind it."""
    return PANEL * inputs + _TAIL_BYTES


@cache
def _kernel(inputs: int, outputs: int) -> int:
    text = HEAD + DECLARED + eighth(inputs) + panels(inputs) + _all(inputs, outputs)
    return assembling.assemble(text, ["product"])["product"]


def eighth(inputs: int) -> str:
    """Function `round{I}`: a row of bf16 to 8 bits, and its factor."""
    code = Code(f"@round{inputs}(ptr %row, ptr %out, ptr %factor)")
    largest = code.let(f"alloca {WIDE}, align 64")
    code.add(f"store {WIDE} zeroinitializer, ptr {largest}")
    with code.loop(0, inputs, LANES) as place:
        size = code.let(
            f"call {WIDE} @llvm.fabs.v16f32({WIDE} {code.read(code.at('%row', place))})"
        )
        before = code.let(f"load {WIDE}, ptr {largest}")
        more = code.let(f"call {WIDE} @llvm.maxnum.v16f32({WIDE} {before}, {WIDE} {size})")
        code.add(f"store {WIDE} {more}, ptr {largest}")
    found = code.let(f"load {WIDE}, ptr {largest}")
    most = code.let(f"call float @llvm.vector.reduce.fmax.v16f32({WIDE} {found})")
    safe = code.let(f"fcmp ogt float {most}, 0x3810000000000000")  # 2^-126
    most = code.let(f"select i1 {safe}, float {most}, float 1.0")
    code.add(f"store float {code.let(f'fdiv float {most}, 127.0')}, ptr %factor")
    factor = code.spread(code.let(f"fdiv float 127.0, {most}"))
    with code.loop(0, inputs, LANES) as place:
        scaled = code.fp("fmul", code.read(code.at("%row", place)), factor)
        whole = code.let(f"call {WIDE} @llvm.rint.v16f32({WIDE} {scaled})")
        number = code.let(f"fptosi {WIDE} {whole} to {_SUMS}")
        moved = code.let(f"add {_SUMS} {number}, splat (i32 {_OFFSET})")
        narrow = code.let(f"trunc {_SUMS} {moved} to <{LANES} x i8>")
        code.add(f"store <{LANES} x i8> {narrow}, ptr {code.at('%out', place, 'i8')}, align 1")
    return code.text()


def panels(inputs: int) -> str:
    """Functions `eight{I}.1` and so on: so many rows times one panel; `take{I}` of any count."""
    arguments = "ptr %rows, ptr %factors, ptr %panel, ptr %bias, ptr %out, i64 %outputs"
    take = Code(f"@take{inputs}({arguments}, i64 %count)")
    for count in range(1, MOST_ROWS + 1):
        with take.when(take.let(f"icmp eq i64 %count, {count}")):
            take.add(f"call void @eight{inputs}.{count}({arguments})")
    made = (_panel(inputs, count, arguments) for count in range(1, MOST_ROWS + 1))
    return "".join([*made, take.text()])


def _panel(inputs: int, count: int, arguments: str) -> str:
    """The loop over inputs keeps sums in registers, so it is written with phis."""
    parts = range(PANEL // LANES)
    code = Code(f"@eight{inputs}.{count}({arguments})")
    code.add("br label %inputs")
    code.block("inputs")
    code.add("%four = phi i64 [0, %entry], [%next, %inputs]")
    for row in range(count):
        for part in parts:
            code.add(
                f"%sum{row}.{part} = phi {_SUMS} [zeroinitializer, %entry], "
                f"[%new{row}.{part}, %inputs]"
            )
    weights = []
    for part in parts:
        at = code.plus(code.times("%four", PANEL * _FOUR), part * LANES * _FOUR)
        ahead = code.at("%panel", code.plus(at, AHEAD), "i8")
        code.add(f"call void @llvm.prefetch.p0(ptr {ahead}, i32 0, i32 3, i32 1)")
        weights.append(code.let(f"load {_SUMS}, ptr {code.at('%panel', at, 'i8')}, align 64"))
    for row in range(count):
        at = code.plus(code.times("%four", _FOUR), row * inputs)
        number = code.let(f"load i32, ptr {code.at('%rows', at, 'i8')}, align 1")
        first = code.let(f"insertelement {_SUMS} poison, i32 {number}, i32 0")
        spread = code.let(f"shufflevector {_SUMS} {first}, {_SUMS} poison, {_SUMS} zeroinitializer")
        for part in parts:
            code.add(
                f"%new{row}.{part} = call {_SUMS} {_MULTIPLY}({_SUMS} %sum{row}.{part}, "
                f"{_SUMS} {spread}, {_SUMS} {weights[part]})"
            )
    code.add("%next = add i64 %four, 1")
    code.add(f"%inside = icmp ult i64 %next, {inputs // _FOUR}")
    code.add("br i1 %inside, label %inputs, label %done")
    code.block("done")
    biased = code.let("icmp ne ptr %bias, null")
    for part in parts:
        behind = code.at("%panel", PANEL * inputs + part * LANES * 4, "i8")
        scale = code.let(f"load {WIDE}, ptr {behind}, align 64")
        offset = code.let(f"load {_SUMS}, ptr {code.at(behind, PANEL * 4, 'i8')}, align 64")
        there = code.at("%bias", part * LANES)
        readable = code.let(f"select i1 {biased}, ptr {there}, ptr %panel")
        zero = f"{WIDE} zeroinitializer"
        bias = code.let(f"select i1 {biased}, {WIDE} {code.read(readable)}, {zero}")
        for row in range(count):
            whole = code.let(f"sub {_SUMS} %new{row}.{part}, {offset}")
            number = code.let(f"sitofp {_SUMS} {whole} to {WIDE}")
            factor = code.spread(code.let(f"load float, ptr {code.at('%factors', row, 'float')}"))
            scaled = code.fp("fmul", number, code.fp("fmul", scale, factor))
            result = code.rounded(code.fp("fadd", scaled, bias))
            place = code.plus(code.times("%outputs", row), part * LANES)
            code.write(result, code.at("%out", place))
    return code.text()


def _all(inputs: int, outputs: int) -> str:
    """A thread's share: of the rows to be rounded, then of the panels, for all rows."""
    code = Code("@product(ptr %record)", internal=False)
    rows, matrix, bias, out, eights, factors, count = code.fields("%record", FIELDS)
    first, last = code.my_share(count)
    with code.loop(first, last) as row:
        start = code.times(row, inputs)
        code.add(
            f"call void @round{inputs}(ptr {code.at(rows, start)}, "
            f"ptr {code.at(eights, start, 'i8')}, ptr {code.at(factors, row, 'float')})"
        )
    code.add("call void @GOMP_barrier()")
    given = code.let(f"icmp ne ptr {bias}, null")
    first, last = code.my_share(outputs // PANEL)
    with code.loop(first, last) as panel:
        there = code.at(matrix, code.times(panel, panel_bytes(inputs)), "i8")
        output = code.times(panel, PANEL)
        added = code.let(f"select i1 {given}, ptr {code.at(bias, output)}, ptr null")
        with code.loop(0, count, MOST_ROWS) as row:
            left = code.let(f"sub i64 {count}, {row}")
            taking = code.let(f"call i64 @llvm.umin.i64(i64 {left}, i64 {MOST_ROWS})")
            spot = code.at(out, code.plus(code.times(row, outputs), output))
            code.add(
                f"call void @take{inputs}(ptr {code.at(eights, code.times(row, inputs), 'i8')}, "
                f"ptr {code.at(factors, row, 'float')}, ptr {there}, ptr {added}, ptr {spot}, "
                f"i64 {outputs}, i64 {taking})"
            )
    return code.text()
