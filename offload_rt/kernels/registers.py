"""Products in a processor's matrix registers (AMX), whose bits do not go by the number of rows.

A row's inputs are added up two by two, from the first to the last, however many rows there are.
oneDNN adds up in those registers, too, in an order that goes by the number of rows; so where they
are, row-invariant passes take kernels of our own.

A register takes 16 rows of 32 inputs, or 16 pairs of inputs of 16 outputs. A matrix [O, I] as it
lies is the first factor, 16 outputs of 32 inputs, if the rows are the second. These are turned for
it, pairs of inputs one after the other: [I / 2, n, 2] for each 16 rows, and for what is left.
"""

from collections.abc import Iterable
from functools import cache

from offload_rt.device.system import (
    may_use_matrix_registers,
    processor_flags,
    takes_matrix_registers,
)
from offload_rt.kernels import assembling, products
from offload_rt.kernels.code import LANES, WIDE, Code, turned
from offload_rt.kernels.products import HEAD
from offload_rt.kernels.rows import PANEL, fits_registers

_GROUPS = 4  # of 16 rows, whose totals registers hold at once
ROWS_LYING = LANES * _GROUPS  # that are multiplied with a matrix as it lies
# By the number of groups: how many times 16 outputs are taken at once, and registers, after those
# of totals, of their weights and of whole groups.
_TAKEN = {1: (2, (4, 5), ()), 2: (2, (4, 5), (6,)), 3: (1, (4,), (5, 6)), 4: (1, (4,), (5, 6))}
_LAST_ROWS = 7
_AHEAD = 1024  # bytes of each of 16 outputs that are fetched ahead
_BITS = f"<{LANES} x i32>"
RELEASE = "call void @llvm.x86.tilerelease()"
DECLARED = f"""declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)
declare void @llvm.masked.store.v16i32.p0({_BITS}, ptr, i32 immarg, <{LANES} x i1>)
"""
_PARTS = PANEL // LANES


@cache
def multiplies_in_registers(inputs: int, outputs: int) -> bool:
    """Whether row-invariant products with a bf16 matrix are those of matrix registers.

    Args:
        inputs: I.
        outputs: O.
    """
    fits = fits_registers(inputs, outputs)
    return fits and takes_matrix_registers("bfloat16") and not problem()


@cache
def problem() -> str:
    """Why no kernel multiplies with matrix registers; empty where one does."""
    return (
        products.problem()
        or ("" if "amx_bf16" in processor_flags() else "the processor has no matrix registers")
        or ("" if may_use_matrix_registers() else "the system does not allow it")
        or assembling.trouble(_try)
    )


def _try() -> None:
    code = Code("@nothing(ptr %record)", internal=False)
    code.add(RELEASE)
    assembling.assemble(HEAD + DECLARED + tiles() + lying() + finish() + code.text(), ["nothing"])


def lying() -> str:
    """`take`: up to `ROWS_LYING` rows, turned, times a panel of a matrix as it lies; and `turn`.

    Products are added up in the order in which `tiles` adds them. `%skip` is as of `_straight`.
    """
    code = Code(
        "@take(ptr %rows, ptr %weight, ptr %bias, ptr %out, i64 %pairs, i64 %outputs, i64 %skip, "
        "i64 %count)"
    )
    totals = code.let(f"alloca [{ROWS_LYING * PANEL + LANES} x float], align 64")
    sums = code.let(f"alloca [{LANES * PANEL} x float], align 64")
    before = code.let("sub i64 %count, 1")
    last = code.plus(code.let(f"and i64 {before}, {LANES - 1}"), 1)
    for groups in range(1, _GROUPS + 1):
        with code.when(
            code.let(f"icmp eq i64 {code.let(f'udiv i64 {before}, {LANES}')}, {groups - 1}")
        ):
            code.add(
                f"call void @straight{groups}(ptr %rows, ptr %weight, ptr {totals}, i64 %pairs, "
                f"i64 %skip, i64 {last})"
            )
    one = code.let("icmp eq i64 %count, 1")
    with code.when(one):
        code.add(f"call void @finish(ptr {totals}, ptr %bias, ptr %out)")
    with code.loop(0, code.let(f"select i1 {one}, i64 0, i64 %count"), LANES) as row:
        some = code.some("%count", row, LANES)
        with code.loop(0, PANEL, LANES) as part:
            start = code.plus(code.times(row, PANEL), code.times(part, some))
            lines = []
            for line in range(LANES):
                at = code.at(totals, code.plus(start, code.times(some, line)), "i32")
                lines.append(code.let(f"load {_BITS}, ptr {at}, align 4"))
            for number, vector in enumerate(turned(code, lines)):
                at = code.at(sums, code.plus(part, number * PANEL), "i32")
                code.add(f"store {_BITS} {vector}, ptr {at}, align 64")
        with code.loop(0, some) as each:
            given = code.at(sums, code.times(each, PANEL), "float")
            there = code.at("%out", code.times(code.plus(row, each), "%outputs"))
            code.add(f"call void @finish(ptr {given}, ptr %bias, ptr {there})")
    return "".join(map(_straight, range(1, _GROUPS + 1))) + code.text() + _turn()


def _straight(groups: int) -> str:
    """Totals of a panel for so many groups of rows; the last has `%last` rows.

    What is multiplied next, and is in no cache, is fetched ahead: further inputs, then those of the
    next 16 outputs; after the last of a panel `%skip` bytes lie in between.
    """
    code = Code(
        f"@straight{groups}(ptr %turned, ptr %weight, ptr %totals, i64 %pairs, i64 %skip, "
        "i64 %last)"
    )
    across, line = code.times("%last", 4), code.times("%pairs", 4)
    width = code.let(f"trunc i64 {across} to i16")
    parts, weights, whole_rows = _TAKEN[groups]
    lasts = range((groups - 1) * parts, groups * parts)
    configure(code, [(8 + tile, width, "i16") for tile in (*lasts, _LAST_ROWS)])
    ahead = code.let(f"call i64 @llvm.umin.i64(i64 {line}, i64 {_AHEAD})")
    size = code.times(line, LANES)
    with code.loop(0, _PARTS, parts) as part:
        starts = [
            code.at("%weight", code.times(size, code.plus(part, more)), "i8")
            for more in range(parts)
        ]
        final = code.let(f"icmp eq i64 {part}, {_PARTS - parts}")
        skipped = code.let(f"select i1 {final}, i64 %skip, i64 0")
        beyond = code.plus(code.let(f"sub i64 {code.times(size, parts)}, {line}"), skipped)
        further = code.at(starts[0], beyond, "i8")
        for total in range(parts * groups):
            code.add(f"call void @llvm.x86.tilezero(i8 {total})")
        with code.loop(0, "%pairs", LANES) as pair:
            spot = code.plus(code.times(pair, 4), ahead)
            within = code.let(f"icmp ult i64 {spot}, {line}")
            soon = code.let(f"select i1 {within}, ptr {starts[0]}, ptr {further}")
            soon = code.at(soon, spot, "i8")
            for output in range(parts * LANES):
                there = code.at(soon, code.times(line, output), "i8")
                code.add(f"call void @llvm.prefetch.p0(ptr {there}, i32 0, i32 2, i32 1)")
            for number in range(groups):
                whole = number < groups - 1
                rows = whole_rows[number % len(whole_rows)] if whole else _LAST_ROWS
                within = code.times(pair, LANES if whole else "%last")
                place = code.plus(code.times("%pairs", LANES * number), within)
                given, wide = code.at("%turned", place, "i32"), 4 * LANES if whole else across
                code.add(f"call void @llvm.x86.tileloadd64(i8 {rows}, ptr {given}, i64 {wide})")
                for more, start in enumerate(starts):
                    tile, total = weights[more % len(weights)], number * parts + more
                    if not number:
                        at = code.at(start, pair, "i32")
                        code.add(
                            f"call void @llvm.x86.tileloadd64(i8 {tile}, ptr {at}, i64 {line})"
                        )
                    code.add(f"call void @llvm.x86.tdpbf16ps(i8 {total}, i8 {tile}, i8 {rows})")
        for number in range(groups):
            for more in range(parts):
                wide = LANES if number < groups - 1 else "%last"
                begin = code.times(code.times(code.plus(part, more), LANES), wide)
                at = code.at("%totals", code.plus(begin, number * LANES * PANEL), "float")
                stride = code.times(wide, 4)
                total = number * parts + more
                code.add(f"call void @llvm.x86.tilestored64(i8 {total}, ptr {at}, i64 {stride})")
    return code.text()


def _turn() -> str:
    """Turn rows [n, P, 2], which are pairs from `%first` on of longer rows of `%room` pairs."""
    code = Code("@turn(ptr %rows, ptr %turned, i64 %first, i64 %pairs, i64 %room, i64 %count)")
    places = ", ".join(f"i32 {lane}" for lane in range(LANES))
    one = code.let("icmp eq i64 %count, 1")
    with code.when(one), code.loop(0, "%pairs", LANES) as pair:  # which is as it should be
        both = code.let(f"load {_BITS}, ptr {code.at('%rows', pair, 'i32')}, align 4")
        there = code.at("%turned", code.plus("%first", pair), "i32")
        code.add(f"store {_BITS} {both}, ptr {there}, align 4")
    with code.loop(0, code.let(f"select i1 {one}, i64 0, i64 %count"), LANES) as begin:
        some = code.some("%count", begin, LANES)
        last = code.let(f"sub i64 {some}, 1")
        number = code.spread(code.let(f"trunc i64 {some} to i32"), "i32")
        there = code.let(f"icmp ult {_BITS} <{places}>, {number}")
        into = code.plus(code.times(begin, "%room"), code.times("%first", some))
        rows = []
        for lane in range(LANES):
            row = code.let(f"call i64 @llvm.umin.i64(i64 {lane}, i64 {last})")  # none is beyond
            rows.append(code.at("%rows", code.times(code.plus(begin, row), "%pairs"), "i32"))
        with code.loop(0, "%pairs", LANES) as pair:
            lines = [
                code.let(f"load {_BITS}, ptr {code.at(row, pair, 'i32')}, align 4") for row in rows
            ]
            for lane, vector in enumerate(turned(code, lines)):
                place = code.plus(into, code.times(code.plus(pair, lane), some))
                code.add(
                    f"call void @llvm.masked.store.v16i32.p0({_BITS} {vector}, "
                    f"ptr {code.at('%turned', place, 'i32')}, i32 4, <{LANES} x i1> {there})"
                )
    return code.text()


def tiles() -> str:
    """Up to 16 rows times a block in panels, which is in a cache, added to their totals."""
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
            code.add(f"call void @llvm.x86.tileloadd64(i8 {tile}, ptr {at}, i64 {4 * PANEL})")
            code.add(f"call void @llvm.x86.tdpbf16ps(i8 {part}, i8 {_PARTS}, i8 {tile})")
    for part, at in enumerate(totals):
        code.add(f"call void @llvm.x86.tilestored64(i8 {part}, ptr {at}, i64 {4 * PANEL})")
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
