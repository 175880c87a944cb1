"""What kernels of attention have in common: what they are made for, and functions over lanes."""

import math
import struct
from dataclasses import dataclass

from offload_rt.kernels.code import LANES, WIDE, Code

COLUMNS = 64  # of a tile
UNSEEN = -1e30  # the maximum of a row that has seen nothing
_LEAST = -200.0  # whose exponential is 0
_WHOLE = f"<{LANES} x i32>"
DECLARED = f"""
declare {WIDE} @llvm.rint.v16f32({WIDE})
declare {WIDE} @llvm.fabs.v16f32({WIDE})
declare {WIDE} @llvm.copysign.v16f32({WIDE}, {WIDE})
declare {WIDE} @llvm.fma.v16f32({WIDE}, {WIDE}, {WIDE})
declare {WIDE} @llvm.x86.avx512.mask.scalef.ps.512({WIDE}, {WIDE}, {WIDE}, i16, i32)
"""
CALL = (
    "query at most seen target places sinks reads moves new_keys new_values n_reads n_parts "
    "n_moves n_all n_heads n_group n_window n_scale n_cap n_new_key_head n_new_key_row "
    "n_new_value_head n_new_value_row n_taken"  # the last counts what was taken
)
LIE = "keys values n_key_head n_key_row n_value_head n_value_row"
READ = f"{LIE} index piece n_first n_tokens n_tiles n_start n_last"
MOVE = f"{LIE} n_at n_first n_tokens"
TILE = "ptr noalias %rows, ptr noalias %index, i64 %stride, i64 %last, ptr noalias %out"
_PAIRS = COLUMNS // 2


@dataclass(frozen=True, slots=True)
class Form:
    """What a kernel is made for.

    Attributes:
        dim: numbers of a key.
        value_dim: of a value.
        number: LLVM's name of the format of keys, values and results.
        capped: scores are squashed.
        registers: products are those of matrix registers.
    """

    dim: int
    value_dim: int
    number: str = "bfloat"
    capped: bool = False
    registers: bool = False

    @property
    def pairs(self) -> bool:
        """Whether two numbers are multiplied at once; the query is then in that format too."""
        return self.number == "bfloat"

    @property
    def stored(self) -> str:
        """What a number is in memory."""
        return "i32" if self.number == "float" else "i16"

    @property
    def fed(self) -> str:
        """What a number of the query, and a weight, is in memory."""
        return "i16" if self.pairs else "i32"

    @property
    def line(self) -> int:
        """Numbers of a row's state: sums, and what was made of values so far."""
        return LANES + self.value_dim

    @property
    def units(self) -> int:
        """Of a key, that are multiplied one after another."""
        return self.dim // 2 if self.pairs else self.dim

    @property
    def lines(self) -> int:
        """Of a tile's values, likewise."""
        return _PAIRS if self.pairs else COLUMNS

    def widened(self, code: Code, address: str) -> str:
        """`LANES` numbers of 32 bits: of bf16 pairs, else each number in fp32."""
        if self.number != "half":
            return code.let(f"load {_WHOLE}, ptr {address}, align 2")
        half = code.let(f"load <{LANES} x half>, ptr {address}, align 2")
        wide = code.let(f"fpext <{LANES} x half> {half} to {WIDE}")
        return code.let(f"bitcast {WIDE} {wide} to {_WHOLE}")

    def write(self, code: Code, value: str, address: str) -> None:
        """Store a register as results are."""
        if self.number != "float":
            kind = f"<{LANES} x {self.number}>"
            value = code.let(f"fptrunc {WIDE} {value} to {kind}")
            code.add(f"store {kind} {value}, ptr {address}, align 2")
        else:
            code.add(f"store {WIDE} {value}, ptr {address}, align 4")


def single(value: float) -> str:
    """A number of fp32 as LLVM reads it."""
    (narrow,) = struct.unpack("<f", struct.pack("<f", value))
    (bits,) = struct.unpack("<Q", struct.pack("<d", narrow))
    return f"0x{bits:016X}"


def splat(value: float) -> str:
    """A number in all lanes."""
    return f"splat (float {single(value)})"


def exponential(code: Code, x: str) -> str:
    """Of a register, x at most 0: 2^n times a polynomial of what is left.

    Taylor's of 2^f for |f| up to a half has an error below 2^-24 with seven terms (bound).
    """
    low = code.let(f"fcmp olt {WIDE} {x}, {splat(_LEAST)}")
    x = code.let(f"select <{LANES} x i1> {low}, {WIDE} {splat(_LEAST)}, {WIDE} {x}")
    x = code.fp("fmul", x, splat(math.log2(math.e)))
    whole = code.let(f"call {WIDE} @llvm.rint.v16f32({WIDE} {x})")
    rest = code.fp("fsub", x, whole)
    terms = [math.log(2) ** n / math.factorial(n) for n in range(8)]
    value = splat(terms[-1])
    for term in reversed(terms[:-1]):
        value = code.fused(value, rest, splat(term))
    return code.let(
        f"call {WIDE} @llvm.x86.avx512.mask.scalef.ps.512({WIDE} {value}, {WIDE} {whole}, "
        f"{WIDE} zeroinitializer, i16 -1, i32 4)"
    )


def greater(code: Code, one: str, other: str) -> str:
    """The greater of two numbers in each lane."""
    more = code.let(f"fcmp ogt {WIDE} {one}, {other}")
    return code.let(f"select <{LANES} x i1> {more}, {WIDE} {one}, {WIDE} {other}")


def greatest(code: Code, values: list[str]) -> str:
    """In all lanes the greatest number of some registers."""
    while len(values) > 1:
        values = [greater(code, *values[:2]), *values[2:]]
    (value,) = values
    step = LANES // 2
    while step:
        order = ", ".join(f"i32 {lane ^ step}" for lane in range(LANES))
        other = code.let(f"shufflevector {WIDE} {value}, {WIDE} poison, {_WHOLE} <{order}>")
        value, step = greater(code, value, other), step // 2
    return value


def capped(code: Code, score: str, cap: str) -> str:
    """Squashed scores, cap * tanh(x / cap): by 1 - e^-2y and 1 + e^-2y of the size y of x / cap."""
    part = code.fp("fdiv", score, cap)
    size = code.let(f"call {WIDE} @llvm.fabs.v16f32({WIDE} {part})")
    power = exponential(code, code.fp("fmul", size, splat(-2.0)))
    less, more = (code.fp(f"f{word}", splat(1.0), power) for word in ("sub", "add"))
    made = code.fp("fmul", code.fp("fdiv", less, more), cap)
    return code.let(f"call {WIDE} @llvm.copysign.v16f32({WIDE} {made}, {WIDE} {part})")


def row_at(code: Code, column: str, kind: str) -> str:
    """The address of the row of a cache in a column."""
    place = code.let(f"load i64, ptr {code.at('%index', column, 'i64')}, align 8")
    place = code.let(f"call i64 @llvm.umin.i64(i64 {place}, i64 %last)")
    return code.at("%rows", code.times(place, "%stride"), kind)


def fields(code: Code, record: str, names: str) -> dict[str, str]:
    """Fields of a record by their names."""
    return dict(zip(names.split(), code.fields(record, names), strict=True))


def pair(form: Form) -> str:
    """@pair: values of a tile, [COLUMNS, D], to [COLUMNS / 2, D, 2]; or as they are, in fp32."""
    code = Code(f"@pair({TILE})")
    kind, dim, each = f"<{LANES} x i16>", form.value_dim, 2 if form.pairs else 1
    with code.loop(0, COLUMNS, each) as column:
        starts = [row_at(code, code.plus(column, n), form.stored) for n in range(each)]
        line = code.at("%out", code.times(column, dim), form.fed)
        with code.loop(0, dim, LANES) as place:
            to = code.at(line, code.times(place, each), form.fed)
            if form.pairs:
                one, other = (
                    code.let(f"load {kind}, ptr {code.at(start, place)}, align 2")
                    for start in starts
                )
                lanes = ", ".join(f"i32 {lane}, i32 {LANES + lane}" for lane in range(LANES))
                mixed = code.let(
                    f"shufflevector {kind} {one}, {kind} {other}, <{2 * LANES} x i32> <{lanes}>"
                )
                code.add(f"store <{2 * LANES} x i16> {mixed}, ptr {to}, align 64")
            else:
                value = form.widened(code, code.at(starts[0], place, form.stored))
                code.add(f"store {_WHOLE} {value}, ptr {to}, align 64")
    return code.text()


def finish(form: Form) -> str:
    """@finish: a row's result, of its maximum, its sums and values, and maybe a sink."""
    code = Code("@finish(ptr %most, ptr %seen, ptr %sink, ptr %to)")
    factor, total = (code.let(f"alloca {WIDE}, align 64") for _ in range(2))
    value = code.let(f"load {WIDE}, ptr %seen, align 4")
    step = LANES // 2
    while step:
        order = ", ".join(f"i32 {lane ^ step}" for lane in range(LANES))
        other = code.let(f"shufflevector {WIDE} {value}, {WIDE} poison, {_WHOLE} <{order}>")
        value, step = code.fp("fadd", value, other), step // 2
    code.add(f"store {WIDE} {splat(1.0)}, ptr {factor}, align 64")
    code.add(f"store {WIDE} {value}, ptr {total}, align 64")
    with code.when(code.let("icmp ne ptr %sink, null")):
        old, sink = (
            code.spread(code.let(f"load float, ptr {name}, align 4")) for name in ("%most", "%sink")
        )
        most = greatest(code, [old, sink])
        made = []
        for one in (old, sink):
            made.append(exponential(code, code.fp("fsub", one, most)))
        code.add(f"store {WIDE} {made[0]}, ptr {factor}, align 64")
        both = code.fp("fadd", code.fp("fmul", value, made[0]), made[1])
        code.add(f"store {WIDE} {both}, ptr {total}, align 64")
    scale = code.fp(
        "fdiv", *(code.let(f"load {WIDE}, ptr {name}, align 64") for name in (factor, total))
    )
    for first in range(0, form.value_dim, LANES):
        value = code.let(f"load {WIDE}, ptr {code.at('%seen', LANES + first, 'float')}, align 4")
        form.write(code, code.fp("fmul", value, scale), code.at("%to", first, form.stored))
    return code.text()


@dataclass(frozen=True, slots=True)
class Share:
    """What a thread took: a KV head of a read, or some of its rows.

    Attributes:
        head: number of the KV head.
        first: number of the first row, counted from the read's first.
        last: of the one behind the last.
        by_token: whether each token has one more tile of its own.
        ends: whether results are asked for.
        query: address of the rows of the read, of any.
        most: of their maxima.
        seen: of their sums and values.
        positions: of the positions of its tokens.
        places: of where their results go.
        key: of the head's keys.
        value: of its values.
        scale: factor on products, in fp32.
        cap: that scores are squashed to, likewise.
    """

    head: str
    first: str
    last: str
    by_token: str
    ends: str
    query: str
    most: str
    seen: str
    positions: str
    places: str
    key: str
    value: str
    scale: str
    cap: str

    @classmethod
    def of(cls, code: Code, form: Form, call: dict[str, str], own: dict[str, str]) -> "Share":
        """Of `%unit`."""
        parts, group = call["n_parts"], call["n_group"]
        head = code.let(f"udiv i64 %unit, {parts}")
        part = code.let(f"sub i64 %unit, {code.times(head, parts)}")
        by_token = code.let(f"icmp ne ptr {own['piece']}, null")
        each = code.let(f"select i1 {by_token}, i64 {group}, i64 1")  # rows that are not parted
        count = code.let(f"udiv i64 {code.times(own['n_tokens'], group)}, {each}")
        first, last = (
            code.times(code.let(f"udiv i64 {code.times(end, count)}, {parts}"), each)
            for end in (part, code.plus(part, 1))
        )
        before = code.plus(code.times(head, call["n_all"]), code.times(own["n_first"], group))
        return cls(
            head,
            first,
            last,
            by_token,
            code.let(f"icmp ne ptr {call['target']}, null"),
            code.at(call["query"], code.times(before, form.dim), form.fed),
            code.at(call["most"], before, "float"),
            code.at(call["seen"], code.times(before, form.line), "float"),
            code.at(call["at"], own["n_first"], "i64"),
            code.at(call["places"], own["n_first"], "i64"),
            code.at(own["keys"], code.times(head, own["n_key_head"]), form.stored),
            code.at(own["values"], code.times(head, own["n_value_head"]), form.stored),
            *(
                code.let(f"bitcast i32 {code.let(f'trunc i64 {call[name]} to i32')} to float")
                for name in ("n_scale", "n_cap")
            ),
        )


def finish_row(  # noqa: PLR0913 - where it is, and where it goes
    code: Code, form: Form, call: dict[str, str], share: Share, row: str, most: str, seen: str
) -> None:
    """Write the result of a row of a share, of its maximum, and its sums and values."""
    group = call["n_group"]
    token = code.let(f"udiv i64 {row}, {group}")
    query_head = code.let(f"sub i64 {row}, {code.times(token, group)}")
    query_head = code.plus(query_head, code.times(share.head, group))
    place = code.let(f"load i64, ptr {code.at(share.places, token, 'i64')}, align 8")
    place = code.times(code.times(place, call["n_heads"]), group)
    place = code.times(code.plus(place, query_head), form.value_dim)
    given = code.let(f"icmp ne ptr {call['sinks']}, null")
    sink = code.at(call["sinks"], query_head, "float")
    code.add(
        f"call void @finish(ptr {most}, ptr {seen}, "
        f"ptr {code.let(f'select i1 {given}, ptr {sink}, ptr null')}, "
        f"ptr {code.at(call['target'], place, form.stored)})"
    )
