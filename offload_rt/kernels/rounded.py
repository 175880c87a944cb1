"""Products of rows with a matrix of 8 or 4 bits, for models that only draft.

Activations have a scale per row, found on the way, and 8 bits. `vpdpbusd` multiplies four numbers
without a sign with four that have one, and adds to a sum of 32 bits per output.

8 bits: weights have the sign and a scale per output. What the offset of activations, 128, adds is
taken off again. A panel of `PANEL` outputs is weights [I / 4, 64, 4], then 64 scales in fp32 and 64
sums of weights times 128.

4 bits (`fours`): activations have the sign; weights are 0 to 15, with a scale and an offset for
each `INPUTS` inputs.

All rows go through a panel, `MOST_ROWS` at a time, before the next is read, so more rows read no
more memory.
"""

import copy
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from offload_rt.device.system import ask_for_large_pages, processor_flags
from offload_rt.kernels import assembling
from offload_rt.kernels.code import LANES, WIDE, Code
from offload_rt.kernels.products import AHEAD, HEAD
from offload_rt.kernels.rows import MOST_ROWS, PANEL

_FOUR = 4  # inputs that one instruction multiplies for an output
_OFFSET = 128
_TOGETHER = 6  # rows: 24 of 32 registers have sums, others weights and activations
_LEAST = 2.0**-126  # rows of smaller numbers are taken for zero
_TAIL_BYTES = 2 * 4 * PANEL  # scales and sums behind a panel
MULTIPLY = "@llvm.x86.avx512.vpdpbusd.512"
SUMS = f"<{LANES} x i32>"
DECLARED = f"""
declare {SUMS} {MULTIPLY}({SUMS}, {SUMS}, {SUMS})
declare {WIDE} @llvm.fabs.v16f32({WIDE})
declare {WIDE} @llvm.maxnum.v16f32({WIDE}, {WIDE})
declare float @llvm.vector.reduce.fmax.v16f32({WIDE})
declare {WIDE} @llvm.rint.v16f32({WIDE})
declare {WIDE} @llvm.fma.v16f32({WIDE}, {WIDE}, {WIDE})
declare i32 @llvm.vector.reduce.add.v16i32({SUMS})
"""
ARGUMENTS = "ptr %rows, ptr %factors, ptr %panel, ptr %bias, ptr %out, i64 %outputs"
_FIELDS = "rows matrix bias out eights factors n_count"


@cache
def problem() -> str:
    """Why there are no such kernels; empty where there are."""
    if "avx512_vnni" not in processor_flags():
        return "the processor has no AVX-512 VNNI"
    return assembling.problem() or assembling.trouble(lambda: _kernel(EIGHT, PANEL, PANEL))


def suits(inputs: int, outputs: int, several: int = LANES) -> bool:
    """Whether there are kernels for a matrix of these sizes here, `several` inputs at a time."""
    return not problem() and not outputs % PANEL and not inputs % several


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix is kept, and the code for it.

    Attributes:
        panel_bytes: of a panel of so many inputs.
        factors: fp32 numbers that are kept of a row of so many inputs: its factor first.
        eighth: functions that round a row of so many inputs.
        panel: a function, of inputs and a count of rows: their product with one panel.
        formula: the same, from the matrix [O / 64, panel_bytes], rows as whole numbers in fp64
            [..., I] and their factors [..., 1]: [..., O] in fp32.
    """

    panel_bytes: Callable[[int], int]
    factors: Callable[[int], int]
    eighth: Callable[[int], str]
    panel: Callable[[int, int], str]
    formula: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    def code(self, inputs: int) -> str:
        """Functions `round{I}`, and `take{I}`: rows times one panel."""
        take = Code(f"@take{inputs}({ARGUMENTS}, i64 %count)")
        for count in range(1, MOST_ROWS + 1):
            with take.when(take.let(f"icmp eq i64 %count, {count}")):
                take.add(f"call void @times{inputs}.{count}({ARGUMENTS})")
        made = (self.panel(inputs, count) for count in range(1, MOST_ROWS + 1))
        return "".join([self.eighth(inputs), *made, take.text()])


class RoundedProduct:
    """The product of one rounded matrix with rows; `fill` of its form gives it its weights.

    Args:
        form: how it is kept.
        inputs: I.
        outputs: O.
        bias: [O] in bf16, or None.

    Attributes:
        form, bias: the same.
        memory: [O / 64, panel_bytes] in uint8.
        address: of the matrix.
        blocks: sums of whole numbers are the same in any order.
    """

    blocks = 0, 0

    def __init__(self, form: Form, inputs: int, outputs: int, bias: torch.Tensor | None) -> None:
        self.form, self._inputs, self._outputs, self.bias = form, inputs, outputs, bias
        self.memory = torch.empty(outputs // PANEL, form.panel_bytes(inputs), dtype=torch.uint8)
        self.address = self.memory.data_ptr()
        ask_for_large_pages(self.address, self.memory.nbytes)
        start = 0 if bias is None else bias.data_ptr()
        self._record = (ctypes.c_int64 * 7)(0, self.address, start)

    def __deepcopy__(self, memo: dict[int, object]) -> "RoundedProduct":
        """The same weights in other memory, and so at another address."""
        bias = copy.deepcopy(self.bias, memo)
        made = RoundedProduct(self.form, self._inputs, self._outputs, bias)
        made.memory.copy_(self.memory)
        return made

    def by_formula(self, rows: torch.Tensor) -> torch.Tensor:
        """The same numbers from torch's operators, slowly: for traces and tests."""
        wide = rows.float()
        most = wide.abs().amax(dim=-1, keepdim=True)
        most = torch.where(most > _LEAST, most, torch.ones_like(most))
        eights = (wide * (torch.full_like(most, 127) / most)).round().double()
        out = self.form.formula(self.memory, eights, most / 127)
        return (out if self.bias is None else out + self.bias.float()).to(rows.dtype)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., I] in bf16 gives [..., O]; not from two threads at once."""
        rows = rows.contiguous()
        count = rows.numel() // self._inputs
        out = rows.new_empty(*rows.shape[:-1], self._outputs)
        eights = torch.empty(count, self._inputs, dtype=torch.uint8)
        factors = torch.empty(count, self.form.factors(self._inputs), dtype=torch.float32)
        record = self._record
        record[0], record[3], record[6] = rows.data_ptr(), out.data_ptr(), count
        record[4], record[5] = eights.data_ptr(), factors.data_ptr()
        assembling.together(_kernel(self.form, self._inputs, self._outputs), record)
        return out


def fill(product: RoundedProduct, first: int, rounded: torch.Tensor, scales: torch.Tensor) -> None:
    """Give outputs from `first` on their weights [n, I] in int8 and scales [n] in fp32.

    Both numbers of outputs are multiples of `PANEL`.
    """
    panels = slice(first // PANEL, (first + rounded.shape[0]) // PANEL)
    weights, all_scales, all_sums = _parts(product.memory[panels])
    weights[:] = rounded.view(-1, PANEL, weights.shape[1], _FOUR).transpose(1, 2)
    all_scales[:] = scales.view(-1, PANEL)
    all_sums[:] = (rounded.sum(dim=1, dtype=torch.int32) * _OFFSET).view(-1, PANEL)


def rows_of(product: RoundedProduct, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `fill` gave some outputs [...]: weights [..., I] in int8, scales [..., 1] in fp32."""
    weights, scales, _ = _parts(product.memory)
    panels, places = outputs // PANEL, outputs % PANEL
    return weights[panels, :, places].flatten(-2), scales[panels, places, None]


def _parts(memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of panels [n, panel_bytes]: weights [n, I / 4, 64, 4], scales and sums [n, 64]."""
    weights, tail = memory.split([memory.shape[1] - _TAIL_BYTES, _TAIL_BYTES], dim=1)
    scales, sums = tail.split(_TAIL_BYTES // 2, dim=1)
    weights = weights.view(torch.int8).unflatten(1, (-1, PANEL, _FOUR))
    return weights, scales.view(torch.float32), sums.view(torch.int32)


def _formula(memory: torch.Tensor, eights: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    weights, scales, _ = _parts(memory)
    weight = weights.transpose(1, 2).flatten(2).flatten(0, 1).double()
    return (eights @ weight.t()).float() * (scales.flatten() * factors)


@cache
def _kernel(form: Form, inputs: int, outputs: int) -> int:
    text = HEAD + DECLARED + form.code(inputs) + _all(form, inputs, outputs)
    return assembling.assemble(text, ["product"])["product"]


def round_row(code: Code, inputs: int) -> str:
    """Store the factor of `%row`; returns a register of what its numbers are multiplied with."""
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
    return code.spread(code.let(f"fdiv float 127.0, {most}"))


def whole_numbers(code: Code, place: str | int, factor: str, offset: int = 0) -> str:
    """Round the next numbers of `%row` and store them in `%out`, moved; returns them unmoved."""
    scaled = code.fp("fmul", code.read(code.at("%row", place)), factor)
    whole = code.let(f"call {WIDE} @llvm.rint.v16f32({WIDE} {scaled})")
    number = code.let(f"fptosi {WIDE} {whole} to {SUMS}")
    moved = code.let(f"add {SUMS} {number}, splat (i32 {offset})")
    narrow = code.let(f"trunc {SUMS} {moved} to <{LANES} x i8>")
    code.add(f"store <{LANES} x i8> {narrow}, ptr {code.at('%out', place, 'i8')}, align 1")
    return number


def _eighth(inputs: int) -> str:
    code = Code(f"@round{inputs}(ptr %row, ptr %out, ptr %factor)")
    factor = round_row(code, inputs)
    with code.loop(0, inputs, LANES) as place:
        whole_numbers(code, place, factor, _OFFSET)
    return code.text()


def _panel(inputs: int, count: int) -> str:
    """The loop over inputs keeps sums in registers, so it is written with phis."""
    parts = range(PANEL // LANES)
    code = Code(f"@times{inputs}.{count}({ARGUMENTS})")
    if count > _TOGETHER:  # their sums fit no registers; the second time the panel is in the cache
        half = count // 2
        for start, some in ((0, half), (half, count - half)):
            code.add(
                f"call void @times{inputs}.{some}(ptr {code.at('%rows', start * inputs, 'i8')}, "
                f"ptr {code.at('%factors', start, 'float')}, ptr %panel, ptr %bias, "
                f"ptr {code.at('%out', code.times('%outputs', start))}, i64 %outputs)"
            )
        return code.text()
    code.add("br label %inputs")
    code.block("inputs")
    code.add("%four = phi i64 [0, %entry], [%next, %inputs]")
    for row in range(count):
        for part in parts:
            code.add(
                f"%sum{row}.{part} = phi {SUMS} [zeroinitializer, %entry], "
                f"[%new{row}.{part}, %inputs]"
            )
    weights = []
    for part in parts:
        at = code.plus(code.times("%four", PANEL * _FOUR), part * LANES * _FOUR)
        ahead = code.at("%panel", code.plus(at, AHEAD), "i8")
        code.add(f"call void @llvm.prefetch.p0(ptr {ahead}, i32 0, i32 3, i32 1)")
        weights.append(code.let(f"load {SUMS}, ptr {code.at('%panel', at, 'i8')}, align 64"))
    for row in range(count):
        at = code.plus(code.times("%four", _FOUR), row * inputs)
        number = code.let(f"load i32, ptr {code.at('%rows', at, 'i8')}, align 1")
        spread = code.spread(number, "i32")
        for part in parts:
            code.add(
                f"%new{row}.{part} = call {SUMS} {MULTIPLY}({SUMS} %sum{row}.{part}, "
                f"{SUMS} {spread}, {SUMS} {weights[part]})"
            )
    code.add("%next = add i64 %four, 1")
    code.add(f"%inside = icmp ult i64 %next, {inputs // _FOUR}")
    code.add("br i1 %inside, label %inputs, label %done")
    code.block("done")
    biased = code.let("icmp ne ptr %bias, null")
    for part in parts:
        behind = code.at("%panel", PANEL * inputs + part * LANES * 4, "i8")
        scale = code.let(f"load {WIDE}, ptr {behind}, align 64")
        offset = code.let(f"load {SUMS}, ptr {code.at(behind, PANEL * 4, 'i8')}, align 64")
        there = code.at("%bias", part * LANES)
        readable = code.let(f"select i1 {biased}, ptr {there}, ptr %panel")
        zero = f"{WIDE} zeroinitializer"
        bias = code.let(f"select i1 {biased}, {WIDE} {code.read(readable)}, {zero}")
        for row in range(count):
            whole = code.let(f"sub {SUMS} %new{row}.{part}, {offset}")
            number = code.let(f"sitofp {SUMS} {whole} to {WIDE}")
            factor = code.spread(code.let(f"load float, ptr {code.at('%factors', row, 'float')}"))
            scaled = code.fp("fmul", number, code.fp("fmul", scale, factor))
            result = code.rounded(code.fp("fadd", scaled, bias))
            place = code.plus(code.times("%outputs", row), part * LANES)
            code.write(result, code.at("%out", place))
    return code.text()


def _all(form: Form, inputs: int, outputs: int) -> str:
    """A thread's share: of the rows to be rounded, then of the panels, for all rows."""
    code = Code("@product(ptr %record)", internal=False)
    rows, matrix, bias, out, eights, factors, count = code.fields("%record", _FIELDS)
    first, last = code.my_share(count)
    with code.loop(first, last) as row:
        start = code.times(row, inputs)
        code.add(
            f"call void @round{inputs}(ptr {code.at(rows, start)}, "
            f"ptr {code.at(eights, start, 'i8')}, "
            f"ptr {code.at(factors, code.times(row, form.factors(inputs)), 'float')})"
        )
    code.add("call void @GOMP_barrier()")
    given = code.let(f"icmp ne ptr {bias}, null")
    first, last = code.my_share(outputs // PANEL)
    with code.loop(first, last) as panel:
        there = code.at(matrix, code.times(panel, form.panel_bytes(inputs)), "i8")
        output = code.times(panel, PANEL)
        added = code.let(f"select i1 {given}, ptr {code.at(bias, output)}, ptr null")
        with code.loop(0, count, MOST_ROWS) as row:
            taking = code.some(count, row, MOST_ROWS)
            spot = code.at(out, code.plus(code.times(row, outputs), output))
            code.add(
                f"call void @take{inputs}(ptr {code.at(eights, code.times(row, inputs), 'i8')}, "
                f"ptr {code.at(factors, code.times(row, form.factors(inputs)), 'float')}, "
                f"ptr {there}, ptr {added}, ptr {spot}, i64 {outputs}, i64 {taking})"
            )
    return code.text()


EIGHT = Form(
    panel_bytes=lambda inputs: PANEL * inputs + _TAIL_BYTES,
    factors=lambda inputs: 1,
    eighth=_eighth,
    panel=_panel,
    formula=_formula,
)
