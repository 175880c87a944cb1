"""Products in a processor's matrix registers (AMX), whose bits do not go by the number of rows.

A row's inputs are added up two by two, from the first to the last, however many rows there are.
oneDNN adds up in those registers, too, in an order that goes by the number of rows; so where they
are, row-invariant passes take kernels of our own: with weights as they are stored
(`kernels/stored.py`), or that lie in panels as those of `kernels/products.py` do. Both have the
same bits.

A register takes 16 rows of 32 inputs, or 16 pairs of inputs of 16 outputs.
"""

from collections.abc import Iterable
from functools import cache

import torch

from offload_rt.device.system import (
    may_use_matrix_registers,
    processor_flags,
    takes_matrix_registers,
)
from offload_rt.kernels import assembling, products
from offload_rt.kernels.code import LANES, WIDE, Code
from offload_rt.kernels.products import HEAD, PANEL, Product

STEP = 32  # inputs of a register
AHEAD = 8192  # bytes of a panel that are fetched ahead
_LONG = 2048  # inputs, of more of which each is fetched ahead within its output
_AHEAD_WITHIN = 1024  # bytes, then
RELEASE = "call void @llvm.x86.tilerelease()"
DECLARED = """declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)
"""
_PARTS = PANEL // LANES
_FIELDS = "rows weight bias out n_pairs n_panels n_count"  # of those of `Product`


@cache
def multiplies_in_registers(inputs: int, outputs: int) -> bool:
    """Whether row-invariant products with a bf16 matrix are those of matrix registers.

    Args:
        inputs: I.
        outputs: O.
    """
    fits = not (outputs % PANEL or inputs % STEP)
    return fits and takes_matrix_registers("bfloat16") and not problem()


@cache
def problem() -> str:
    """Why no kernel multiplies with matrix registers; empty where one does."""
    return (
        products.problem()
        or ("" if "amx_bf16" in processor_flags() else "the processor has no matrix registers")
        or ("" if may_use_matrix_registers() else "the system does not allow it")
        or assembling.trouble(_kernel)
    )


def in_panels(weight: torch.Tensor) -> torch.Tensor:
    """A bf16 matrix [O, I] as kernels read it: [O / 64, I / 2, 64, 2]."""
    outputs, inputs = weight.shape
    numbers = weight.detach().view(outputs // PANEL, PANEL, inputs // 2, 2)
    return numbers.transpose(1, 2).contiguous()


class RegisterProduct(Product):
    """The product of rows with one matrix in panels; a sum never starts again.

    Args:
        address: of the matrix, in panels.
        inputs: I.
        outputs: O.
        bias: [O] in bf16, or None; it must live as long as this.
    """

    def __init__(self, address: int, inputs: int, outputs: int, bias: torch.Tensor | None) -> None:
        assert not problem()  # which asks the system for them
        super().__init__(address, inputs, outputs, bias, (0, 0))

    def _code(self) -> int:
        return _kernel()


@cache
def _kernel() -> int:
    code = Code("@product(ptr %record)", internal=False)
    rows, weight, bias, out, pairs, panels, count = code.fields("%record", _FIELDS)
    outputs = code.times(panels, PANEL)
    biased = code.let(f"icmp ne ptr {bias}, null")
    first, last = code.my_share(panels)
    with code.loop(first, last) as panel:
        start = code.times(panel, PANEL)
        part = code.at(weight, code.times(start, pairs), "i32")
        added = code.let(f"select i1 {biased}, ptr {code.at(bias, start)}, ptr null")
        code.add(
            f"call void @take(ptr {rows}, ptr {part}, ptr {added}, ptr {code.at(out, start)}, "
            f"i64 {pairs}, i64 {outputs}, i64 0, i64 {count})"
        )
    code.add(RELEASE)
    text = HEAD + DECLARED + tiles(AHEAD) + finish() + take() + code.text()
    return assembling.assemble(text, ["product"])["product"]


def take() -> str:
    """The product of any number of rows with a panel, for whole layers too (`layers`)."""
    code = Code(
        "@take(ptr %rows, ptr %weight, ptr %bias, ptr %out, i64 %pairs, i64 %outputs, i64 %block, "
        "i64 %count)"
    )
    totals = code.let(f"alloca [{LANES * PANEL} x float], align 64")
    with code.loop(0, "%count", LANES) as row:
        taking = code.some("%count", row, LANES)
        with code.loop(0, code.times(taking, PANEL), LANES) as place:
            at = code.at(totals, place, "float")
            code.add(f"store {WIDE} zeroinitializer, ptr {at}, align 64")
        given = code.at("%rows", code.times(row, "%pairs"), "i32")
        code.add(
            f"call void @tiles(ptr {given}, ptr %weight, ptr {totals}, i64 %pairs, i64 %pairs, "
            f"i64 {taking})"
        )
        with code.loop(0, taking) as one:
            sums = code.at(totals, code.times(one, PANEL), "float")
            there = code.at("%out", code.times(code.plus(row, one), "%outputs"))
            code.add(f"call void @finish(ptr {sums}, ptr %bias, ptr {there})")
    return code.text()


def tiles(ahead: int = 0) -> str:
    """Up to 16 rows times a block, added to their totals, in matrix registers.

    Args:
        ahead: bytes of the block that are fetched ahead; 0: they are in a cache.
    """
    arguments = "ptr %rows, ptr %scratch, ptr %totals, i64 %pairs, i64 %line, i64 %count"
    code = Code(f"@tiles({arguments})")
    height = code.let("trunc i64 %count to i8")
    configure(code, [(48 + tile, height, "i8") for tile in range(_PARTS + 1)])  # totals, and rows
    totals = [code.at("%totals", part * LANES, "float") for part in range(_PARTS)]
    for part, at in enumerate(totals):
        code.add(f"call void @llvm.x86.tileloadd64(i8 {part}, ptr {at}, i64 {4 * PANEL})")
    across = code.times("%line", 4)
    with code.loop(0, "%pairs", LANES) as pair:
        at = code.at("%rows", pair, "i32")
        code.add(f"call void @llvm.x86.tileloadd64(i8 {_PARTS}, ptr {at}, i64 {across})")
        start = code.times(pair, PANEL)
        for part in range(_PARTS):
            at, tile = code.at("%scratch", code.plus(start, part * LANES), "i32"), 5 + part % 2
            for line in range(LANES if ahead else 0):
                there = code.at(at, ahead + (line * _PARTS) * 64, "i8")
                code.add(f"call void @llvm.prefetch.p0(ptr {there}, i32 0, i32 3, i32 1)")
            code.add(f"call void @llvm.x86.tileloadd64(i8 {tile}, ptr {at}, i64 {4 * PANEL})")
            code.add(f"call void @llvm.x86.tdpbf16ps(i8 {part}, i8 {_PARTS}, i8 {tile})")
    for part, at in enumerate(totals):
        code.add(f"call void @llvm.x86.tilestored64(i8 {part}, ptr {at}, i64 {4 * PANEL})")
    return code.text()


def straight() -> str:
    """Outputs of a panel for up to 16 rows, from a matrix [O, I] as it lies, in matrix registers.

    The matrix is the first factor, and the rows, input after input, are the second: [I / 2, n, 2].
    Products are added up in the order in which `tiles` adds them. What is multiplied next, and is
    in no cache, is fetched ahead: the next 16 outputs, or of long ones the inputs that follow.
    """
    code = Code("@straight(ptr %turned, ptr %weight, ptr %totals, i64 %pairs, i64 %count)")
    across, line = code.times("%count", 4), code.times("%pairs", 4)
    width = code.let(f"trunc i64 {across} to i16")
    configure(code, [(8 + tile, width, "i16") for tile in (0, 1)])  # totals, and rows
    long = code.let(f"icmp ugt i64 %pairs, {_LONG // 2}")
    group = code.times(line, LANES)
    ahead = code.let(f"select i1 {long}, i64 {_AHEAD_WITHIN}, i64 {group}")
    with code.loop(0, _PARTS) as part:
        start = code.at("%weight", code.times(group, part), "i8")
        code.add("call void @llvm.x86.tilezero(i8 0)")
        with code.loop(0, "%pairs", LANES) as pair:
            at, given = code.at(start, pair, "i32"), code.times(pair, "%count")
            for output in range(LANES):
                there = code.at(at, code.plus(code.times(line, output), ahead), "i8")
                code.add(f"call void @llvm.prefetch.p0(ptr {there}, i32 0, i32 2, i32 1)")
            given = code.at("%turned", given, "i32")
            code.add(f"call void @llvm.x86.tileloadd64(i8 1, ptr {given}, i64 {across})")
            code.add(f"call void @llvm.x86.tileloadd64(i8 2, ptr {at}, i64 {line})")
            code.add("call void @llvm.x86.tdpbf16ps(i8 0, i8 2, i8 1)")
        at = code.at("%totals", code.times(code.times(part, LANES), "%count"), "float")
        code.add(f"call void @llvm.x86.tilestored64(i8 0, ptr {at}, i64 {across})")
    return code.text()


def configure(code: Code, parts: Iterable[tuple[int, str, str]] = ()) -> None:
    """Set what registers hold: 16 lines of 64 bytes, but for what is given, by its place."""
    shape = code.let("alloca [64 x i8], align 64")
    settings = [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8
    whole = ", ".join(f"i8 {byte}" for byte in settings)
    code.add(f"store <64 x i8> <{whole}>, ptr {shape}, align 64")
    for place, number, kind in parts:
        code.add(f"store {kind} {number}, ptr {code.at(shape, place, kind)}")
    code.add(f"call void @llvm.x86.ldtilecfg(ptr {shape})")


def finish() -> str:
    """Totals of a row, with the bias, rounded."""
    code = Code("@finish(ptr %totals, ptr %bias, ptr %out)")
    biased = code.let("icmp ne ptr %bias, null")
    for part in range(_PARTS):
        total = code.let(f"load {WIDE}, ptr {code.at('%totals', part * LANES, 'float')}, align 64")
        there = code.at("%bias", part * LANES)
        readable = code.let(f"select i1 {biased}, ptr {there}, ptr %totals")
        summed = code.fp("fadd", total, code.read(readable))
        made = code.let(f"select i1 {biased}, {WIDE} {summed}, {WIDE} {total}")
        narrow = code.let(f"fptrunc {WIDE} {made} to <{LANES} x bfloat>")
        at = code.at("%out", part * LANES)
        code.add(f"store <{LANES} x bfloat> {narrow}, ptr {at}, align 2")
    return code.text()
