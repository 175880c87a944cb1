"""Attention of rows to tiles of keys, whose bits for a row depend on its past alone.

A tile is `COLUMNS` columns, from the first one a row sees to its own. Of each tile the scores of
some rows are summed up in registers, of bf16 pair after pair by `vdpbf16ps`, of fp16 and fp32
number after number in fp32; a running maximum, sum and result of each row are carried on from tile
to tile, in fp32. A row goes through the same
instructions in the same order whoever goes beside it, so nothing is filled up. Which rows of the
cache a tile's columns are is said by a list: a tree's row is given its path so, in consecutive
columns.

A call reads for rows of many sequences: each *read* is some rows and the cache they look at, and
may write new rows to caches first, so that a pass of 64 sequences is one call a layer. Threads take
KV heads of reads as they get to them. A thread turns a tile's keys around once, so that columns lie
in lanes, and takes the tile's values in pairs or in fp32; query heads of one KV head use both
together.

Where matrix registers multiply bf16 (AMX) they do here, too, by `kernels/attending_registers.py`:
other sums, of which one row's do not go by who is beside it either.
"""

import ctypes
import struct
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from offload_rt.device.system import takes_matrix_registers
from offload_rt.kernels import assembling, attending_registers, registers
from offload_rt.kernels.attending_form import (
    CALL,
    COLUMNS,
    DECLARED,
    MOVE,
    READ,
    TILE,
    UNSEEN,
    Form,
    Share,
    capped,
    exponential,
    fields,
    finish,
    finish_row,
    greatest,
    pair,
    row_at,
    splat,
)
from offload_rt.kernels.code import LANES, WIDE, Code
from offload_rt.kernels.products import HEAD
from offload_rt.kernels.products import problem as products_problem

_MOST_ROWS = 7  # whose sums of a tile are in registers, beside four of the tile's
_VECTORS = COLUMNS // LANES
_MOST_DIM = 256
_NO_WINDOW = 2**40
_NUMBERS = {torch.bfloat16: "bfloat", torch.float16: "half", torch.float32: "float"}
_WHOLE, _HALVES = f"<{LANES} x i32>", f"<{2 * LANES} x bfloat>"
_MANY_UNITS = 4  # for each thread, of which none is cut


@cache
def problem() -> str:
    """Why there is no such kernel; empty where there is."""
    return products_problem() or assembling.trouble(lambda: _kernel(Form(64, 64)))


def takes(dtype: torch.dtype, key_dim: int, value_dim: int, *, capped: bool = False) -> bool:
    """Whether there is a kernel for heads of these sizes; it is assembled when first asked for."""
    dims, unit = (key_dim, value_dim), 2 * LANES  # so many numbers of bf16 are turned at once
    fits = dtype in _NUMBERS and not any(d % unit or d > _MOST_DIM for d in dims)
    return fits and not problem() and _kernel(_form(dtype, *dims, capped=capped)) != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a layer attends.

    Attributes:
        scaling: factor on products.
        window: positions that a row sees, its own the last; None: all.
        cap: scores are squashed to cap * tanh(score / cap); None leaves them.
        sinks: [H] fp32, a score of each head that has no value; or None.
    """

    scaling: float
    window: int | None = None
    cap: float | None = None
    sinks: torch.Tensor | None = None


def lie(key: torch.Tensor, value: torch.Tensor) -> list[int]:
    """Where rows [K, T, D] are whose numbers lie side by side: the first numbers of a `Read`."""
    return [key.data_ptr(), value.data_ptr(), *key.stride()[:2], *value.stride()[:2]]


class Read(NamedTuple):
    """What tokens of a call read in one go, behind the six numbers of where that is (`lie`).

    Attributes:
        columns: address of [columns] int64, the row of T in each.
        piece: of [tokens, COLUMNS] int64, the row in each column of one more tile, for each token
            another; 0: there is none.
        first: number of the first token.
        tokens: how many.
        tiles: of those columns.
        start: column of the first of them, a multiple of `COLUMNS`.
        last: row of T that is looked at instead of any behind it. Columns that no token sees may
            be of any row.
    """

    columns: int
    piece: int
    first: int
    tokens: int
    tiles: int
    start: int
    last: int


@dataclass(frozen=True, slots=True)
class New:
    """Rows that are written to caches before any are read.

    Attributes:
        key: [K, S, D].
        value: [K, S, D].
        moves: [n, 9] int64, where a cache is (`lie`), the row of it that the first goes to, which
            of the S that is, and how many.
    """

    key: torch.Tensor
    value: torch.Tensor
    moves: torch.Tensor


class Attending:
    """What some query rows have seen so far.

    Args:
        query: [K, R, D]: G heads of a KV head for each of R / G tokens, token after token.
        at: [R / G] int64 position of each.
        value_dim: D of values.
        how: the layer attends.
    """

    def __init__(
        self,
        query: torch.Tensor,
        at: torch.Tensor,
        value_dim: int,
        how: Way,
    ) -> None:
        kv_heads, rows, dim = query.shape
        form = _form(query.dtype, dim, value_dim, capped=how.cap is not None)
        self._query, self._at, self._sinks = query if form.pairs else query.float(), at, how.sinks
        self._sizes = kv_heads, rows
        self._kernel = _kernel(form)
        self._scale, self._cap = _bits(how.scaling), _bits(how.cap or 0.0)
        self._window = _NO_WINDOW if how.window is None else how.window
        self._line = form.line
        self._seen: tuple[torch.Tensor, ...] = ()  # maxima [K, R], and lines [K, R, line] of each
        if not form.registers:  # those keep what they see in one call to themselves
            self._keep()

    def _keep(self) -> None:
        most = torch.full(self._sizes, UNSEEN, dtype=torch.float32)
        self._seen = most, torch.zeros(*self._sizes, self._line, dtype=torch.float32)

    def add(
        self,
        reads: torch.Tensor,
        into: tuple[torch.Tensor, torch.Tensor] | None = None,
        new: New | None = None,
    ) -> None:
        """Attend to tiles of columns, of each token those behind what it has seen.

        Args:
            reads: [n, 13] int64, where a cache is and a `Read`; of other tokens each.
            into: where the results go, [S, H, D], and the row there of each token, if these are
                the last tiles.
            new: what is to be written first.
        """
        (kv_heads, rows), threads = self._sizes, torch.get_num_threads()
        units = len(reads) * kv_heads
        whole = units % threads == 0 or units >= _MANY_UNITS * threads
        target, places = (0, 0) if into is None else (t.data_ptr() for t in into)
        moves, strides, count = [0] * 3, [0] * 4, 0
        if new is not None:
            moves = [t.data_ptr() for t in (new.moves, new.key, new.value)]
            strides = [*new.key.stride()[:2], *new.value.stride()[:2]]
            count = len(new.moves)
        if into is None and not self._seen:
            self._keep()
        most, seen = (t.data_ptr() for t in self._seen) if self._seen else (0, 0)
        numbers = (
            *(self._query.data_ptr(), self._at.data_ptr(), most, seen),
            *(target, places, 0 if self._sinks is None else self._sinks.data_ptr()),
            *(reads.data_ptr(), *moves, len(reads), 1 if whole else threads, count),
            *(rows, kv_heads, rows // len(self._at), self._window, self._scale, self._cap),
            *(*strides, 0),
        )
        assembling.together(self._kernel, (ctypes.c_int64 * len(numbers))(*numbers))


def _bits(number: float) -> int:
    """Those of a number in fp32."""
    (bits,) = struct.unpack("<i", struct.pack("<f", number))
    return int(bits)


@cache
def in_registers(dtype: torch.dtype) -> bool:
    """Whether products are those of matrix registers (`attending_registers.py`)."""
    return (
        dtype is torch.bfloat16 and takes_matrix_registers("bfloat16") and not registers.problem()
    )


def _form(dtype: torch.dtype, dim: int, value_dim: int, *, capped: bool) -> Form:
    return Form(dim, value_dim, _NUMBERS[dtype], capped, in_registers(dtype))


@cache
def _kernel(form: Form) -> int:
    text = HEAD + DECLARED + pair(form) + finish(form) + _move(form)
    if form.registers:
        text += registers.DECLARED + attending_registers.DECLARED
        text += attending_registers.functions(form)
    else:
        text += _soften(form) + _turn(form)
        for count in range(1, _MOST_ROWS + 1):
            text += _scores(form, count) + _weighted(form, count)
        text += _tile(form) + _unit(form)
    return assembling.assemble(text + _attend(form), ["attend"])["attend"]


def _soften(form: Form) -> str:
    """@soften: a row's scores of a tile to weights, its maximum and sum carried on.

    Args: scores [COLUMNS] fp32; weights [COLUMNS], bf16 or fp32; most; sums [LANES]; factor, by
    which what was there is to be multiplied; scale; cap; first and last column of the tile that the
    row sees.
    """
    code = Code(
        "@soften(ptr %scores, ptr %weights, ptr %most, ptr %sums, ptr %factor, float %scale, "
        "float %cap, i64 %low, i64 %high)"
    )
    scale, cap = code.spread("%scale"), code.spread("%cap")
    bounds = []
    for name in ("%low", "%high"):
        narrow = code.let(f"trunc i64 {name} to i32")
        bounds.append(code.spread(narrow, "i32"))
    seen = []
    for part in range(_VECTORS):
        score = code.let(f"load {WIDE}, ptr {code.at('%scores', part * LANES, 'float')}, align 64")
        score = code.fp("fmul", score, scale)
        if form.capped:
            score = capped(code, score, cap)
        lanes = ", ".join(f"i32 {part * LANES + lane}" for lane in range(LANES))
        late = code.let(f"icmp sle {_WHOLE} <{lanes}>, {bounds[1]}")
        early = code.let(f"icmp sge {_WHOLE} <{lanes}>, {bounds[0]}")
        both = code.let(f"and <{LANES} x i1> {late}, {early}")
        hidden = splat(float("-inf"))
        seen.append(code.let(f"select <{LANES} x i1> {both}, {WIDE} {score}, {WIDE} {hidden}"))
    before = code.let("load float, ptr %most, align 4")
    old = code.spread(before)
    most = greatest(code, [*seen, old])
    code.add(f"store float {code.let(f'extractelement {WIDE} {most}, i32 0')}, ptr %most, align 4")
    factor = exponential(code, code.fp("fsub", old, most))
    first = code.let(f"extractelement {WIDE} {factor}, i32 0")
    code.add(f"store float {first}, ptr %factor, align 4")
    total = code.fp("fmul", code.let(f"load {WIDE}, ptr %sums, align 4"), factor)
    for part, score in enumerate(seen):
        weight = exponential(code, code.fp("fsub", score, most))
        total = code.fp("fadd", total, weight)
        place = code.at("%weights", part * LANES, form.fed)
        if form.pairs:
            form.write(code, weight, place)
        else:
            code.add(f"store {WIDE} {weight}, ptr {place}, align 64")
    code.add(f"store {WIDE} {total}, ptr %sums, align 4")
    return code.text().replace("#0 {", "noinline #0 {", 1)


def _turn(form: Form) -> str:
    """@turn: keys of a tile, [COLUMNS, D], to [D / 2, COLUMNS, 2], or [D, COLUMNS] in fp32."""
    code = Code(f"@turn({TILE})")
    with code.loop(0, COLUMNS, LANES) as column:
        starts = [row_at(code, code.plus(column, lane), form.stored) for lane in range(LANES)]
        unit = "i16" if form.number == "half" else "i32"
        with code.loop(0, form.units, LANES) as pair:
            rows = [form.widened(code, code.at(start, pair, unit)) for start in starts]
            step = 1
            while step < LANES:  # exchange blocks of so many lanes between rows so far apart
                made = list(rows)
                for low in range(LANES):
                    if low & step:
                        continue
                    one, other = rows[low], rows[low | step]
                    below = [
                        lane if not lane & step else LANES + (lane ^ step) for lane in range(LANES)
                    ]
                    above = [
                        lane | step if not lane & step else LANES + lane for lane in range(LANES)
                    ]
                    for place, order in ((low, below), (low | step, above)):
                        lanes = ", ".join(f"i32 {lane}" for lane in order)
                        made[place] = code.let(
                            f"shufflevector {_WHOLE} {one}, {_WHOLE} {other}, {_WHOLE} <{lanes}>"
                        )
                rows, step = made, step * 2
            for number, row in enumerate(rows):
                spot = code.plus(code.times(code.plus(pair, number), COLUMNS), column)
                code.add(f"store {_WHOLE} {row}, ptr {code.at('%out', spot, 'i32')}, align 64")
    return code.text()


def _dots(  # noqa: PLR0913 - the parts of a product
    code: Code,
    name: str,
    units: int,
    rows: list[str],
    panel: tuple[str, int],
    sums: list[list[str]],
    *,
    pairs: bool,
) -> list[list[str]]:
    """Add to `sums` [row][part] the products of rows with a panel, unit after unit.

    Args:
        code: to write to.
        name: of the blocks.
        units: pairs of numbers of a row, or numbers in fp32.
        rows: addresses.
        panel: [units, columns] units, from the first column to take on, and how many columns.
        sums: before.
        pairs: units are pairs.
    """
    before = code._block
    code.add(f"br label %{name}")
    code.block(name)
    parts = range(len(sums[0]))
    code.add(f"%{name}.i = phi i64 [0, %{before}], [%{name}.next, %{name}]")
    for row, line in enumerate(sums):
        for part, value in enumerate(line):
            code.add(
                f"%{name}.{row}.{part} = phi {WIDE} [{value}, %{before}], "
                f"[%{name}.new{row}.{part}, %{name}]"
            )
    start = code.at(panel[0], code.times(f"%{name}.i", panel[1]), "i32")
    kind = _HALVES if pairs else WIDE
    columns = [
        code.let(f"load {kind}, ptr {code.at(start, part * LANES, 'i32')}, align 64")
        for part in parts
    ]
    for row, address in enumerate(rows):
        number = code.let(f"load i32, ptr {code.at(address, f'%{name}.i', 'i32')}, align 2")
        given = code.let(f"bitcast {_WHOLE} {code.spread(number, 'i32')} to {kind}")
        for part in parts:
            before_it, column = f"{WIDE} %{name}.{row}.{part}", f"{kind} {columns[part]}"
            if pairs:
                call = f"@llvm.x86.avx512bf16.dpbf16ps.512({before_it}, {kind} {given}, {column})"
            else:
                call = f"@llvm.fma.v16f32({kind} {given}, {column}, {before_it})"
            code.add(f"%{name}.new{row}.{part} = call {WIDE} {call}")
    code.add(f"%{name}.next = add i64 %{name}.i, 1")
    code.add(f"%{name}.more = icmp ult i64 %{name}.next, {units}")
    code.add(f"br i1 %{name}.more, label %{name}, label %{name}.end")
    code.block(f"{name}.end")
    return [[f"%{name}.new{row}.{part}" for part in parts] for row in range(len(rows))]


def _scores(form: Form, count: int) -> str:
    """@scores1 and so on: of so many rows [count, D] with a tile's keys, [count, COLUMNS]."""
    code = Code(f"@scores{count}(ptr noalias %rows, ptr noalias %keys, ptr noalias %out)")
    rows = [code.at("%rows", row * form.dim, form.fed) for row in range(count)]
    zeros = [["zeroinitializer"] * _VECTORS for _ in rows]
    sums = _dots(code, "dot", form.units, rows, ("%keys", COLUMNS), zeros, pairs=form.pairs)
    for row, line in enumerate(sums):
        for part, value in enumerate(line):
            to = code.at("%out", row * COLUMNS + part * LANES, "float")
            code.add(f"store {WIDE} {value}, ptr {to}, align 64")
    return code.text()


def _weighted(form: Form, count: int) -> str:
    """@weighted1 and so on: out [count, D] times factors, plus weights of a tile's values."""
    dim = form.value_dim
    stride = LANES + dim
    code = Code(
        f"@weighted{count}(ptr noalias %weights, ptr noalias %values, ptr noalias %factors, "
        "ptr noalias %out)"
    )
    rows = [code.at("%weights", row * COLUMNS, form.fed) for row in range(count)]
    factors = [
        code.spread(code.let(f"load float, ptr {code.at('%factors', row, 'float')}, align 4"))
        for row in range(count)
    ]
    first = 0
    while first < dim:
        parts = min(_VECTORS, (dim - first) // LANES)
        places = [
            [code.at("%out", row * stride + first + part * LANES, "float") for part in range(parts)]
            for row in range(count)
        ]
        sums = [
            [
                code.fp("fmul", code.let(f"load {WIDE}, ptr {place}, align 4"), factors[row])
                for place in line
            ]
            for row, line in enumerate(places)
        ]
        panel = code.at("%values", first, "i32")
        name, lines = f"dot{first}", form.lines
        made = _dots(code, name, lines, rows, (panel, dim), sums, pairs=form.pairs)
        for line, values in zip(places, made, strict=True):
            for place, value in zip(line, values, strict=True):
                code.add(f"store {WIDE} {value}, ptr {place}, align 4")
        first += parts * LANES
    return code.text()


def _tile(form: Form) -> str:
    """@tile: rows `first` to `last` of a KV head with one tile that is turned around."""
    line = LANES + form.value_dim
    code = Code(
        "@tile(ptr %query, ptr %keys, ptr %values, ptr %at, ptr %most, ptr %seen, "
        "i64 %first, i64 %last, i64 %column, i64 %window, float %scale, float %cap, i64 %group)"
    )
    scores = code.let(f"alloca [{_MOST_ROWS * COLUMNS} x float], align 64")
    weights = code.let(f"alloca [{_MOST_ROWS * COLUMNS} x {form.fed}], align 64")
    factors = code.let(f"alloca [{_MOST_ROWS} x float], align 64")
    with code.loop("%first", "%last", _MOST_ROWS) as row:
        count = code.some("%last", row, _MOST_ROWS)
        given = code.at("%query", code.times(row, form.dim), form.fed)
        made = code.at("%seen", code.plus(code.times(row, line), LANES), "float")

        def each(name: str, arguments: str, count: str = count) -> None:
            for number in range(1, _MOST_ROWS + 1):
                with code.when(code.let(f"icmp eq i64 {count}, {number}")):
                    code.add(f"call void @{name}{number}({arguments})")

        each("scores", f"ptr {given}, ptr %keys, ptr {scores}")
        with code.loop(0, count) as number:
            this = code.plus(row, number)
            token = code.let(f"udiv i64 {this}, %group")
            place = code.let(f"load i64, ptr {code.at('%at', token, 'i64')}, align 8")
            high = code.let(f"sub i64 {place}, %column")
            low = code.plus(code.let(f"sub i64 {high}, %window"), 1)
            code.add(
                f"call void @soften(ptr {code.at(scores, code.times(number, COLUMNS), 'float')}, "
                f"ptr {code.at(weights, code.times(number, COLUMNS), form.fed)}, "
                f"ptr {code.at('%most', this, 'float')}, "
                f"ptr {code.at('%seen', code.times(this, line), 'float')}, "
                f"ptr {code.at(factors, number, 'float')}, float %scale, float %cap, "
                f"i64 {_clamped(code, low)}, i64 {_clamped(code, high)})"
            )
        each("weighted", f"ptr {weights}, ptr %values, ptr {factors}, ptr {made}")
    return code.text()


def _clamped(code: Code, number: str) -> str:
    """A column as 32 bits have it, one that is out of a tile as another that is."""
    low = code.let(f"icmp slt i64 {number}, -1")
    number = code.let(f"select i1 {low}, i64 -1, i64 {number}")
    high = code.let(f"icmp sgt i64 {number}, {COLUMNS}")
    return code.let(f"select i1 {high}, i64 {COLUMNS}, i64 {number}")


def _move(form: Form) -> str:
    """@move: new rows of a sequence to their cache."""
    code = Code("@move(ptr %call, ptr %move)")
    call, own = fields(code, "%call", CALL), fields(code, "%move", MOVE)
    kind = f"<{LANES} x {form.stored}>"
    for name, dim in (("key", form.dim), ("value", form.value_dim)):
        with code.loop(0, call["n_heads"]) as head, code.loop(0, own["n_tokens"]) as token:
            ends = []
            for start, strides, first in (
                (call[f"new_{name}s"], call, "n_first"),
                (own[f"{name}s"], own, "n_at"),
            ):
                word = "n_new_" if strides is call else "n_"
                place = code.times(head, strides[f"{word}{name}_head"])
                row = code.times(code.plus(own[first], token), strides[f"{word}{name}_row"])
                ends.append(code.at(start, code.plus(place, row), form.stored))
            with code.loop(0, dim, LANES) as place:
                source, target = (code.at(end, place, form.stored) for end in ends)
                some = code.let(f"load {kind}, ptr {source}, align 2")
                code.add(f"store {kind} {some}, ptr {target}, align 2")
    return code.text()


def _unit(form: Form) -> str:
    """@unit: a KV head of a read, or some of its rows, tile after tile."""
    code = Code("@unit(ptr %call, ptr %read, i64 %unit)")
    keys = code.let(f"alloca [{form.units * COLUMNS} x i32], align 64")
    values = code.let(f"alloca [{form.value_dim * form.lines} x i32], align 64")
    call, own = fields(code, "%call", CALL), fields(code, "%read", READ)
    share = Share.of(code, form, call, own)
    group, first, last = call["n_group"], share.first, share.last

    def take(index: str, column: str, rows: tuple[str, str]) -> None:
        for name, start, out in (("turn", share.key, keys), ("pair", share.value, values)):
            stride = own["n_key_row" if name == "turn" else "n_value_row"]
            code.add(
                f"call void @{name}(ptr {start}, ptr {index}, i64 {stride}, i64 {own['n_last']}, "
                f"ptr {out})"
            )
        code.add(
            f"call void @tile(ptr {share.query}, ptr {keys}, ptr {values}, ptr {share.positions}, "
            f"ptr {share.most}, ptr {share.seen}, i64 {rows[0]}, i64 {rows[1]}, i64 {column}, "
            f"i64 {call['n_window']}, float {share.scale}, float {share.cap}, i64 {group})"
        )

    some = code.let(f"icmp ult i64 {first}, {last}")
    with code.loop(0, code.let(f"select i1 {some}, i64 {own['n_tiles']}, i64 0")) as tile:
        column = code.times(tile, COLUMNS)
        at = code.at(own["index"], column, "i64")
        take(at, code.plus(own["n_start"], column), (first, last))
    low, high = (code.let(f"udiv i64 {end}, {group}") for end in (first, last))
    column = code.plus(own["n_start"], code.times(own["n_tiles"], COLUMNS))
    with code.loop(low, code.let(f"select i1 {share.by_token}, i64 {high}, i64 {low}")) as token:
        rows = code.times(token, group), code.times(code.plus(token, 1), group)
        take(code.at(own["piece"], code.times(token, COLUMNS), "i64"), column, rows)
    with code.loop(first, code.let(f"select i1 {share.ends}, i64 {last}, i64 {first}")) as row:
        most = code.at(share.most, row, "float")
        seen = code.at(share.seen, code.times(row, form.line), "float")
        finish_row(code, form, call, share, row, most, seen)
    return code.text()


def _attend(form: Form) -> str:
    """@attend: a thread's share of new rows, and of what is read when all of those are there."""
    code = Code("@attend(ptr %call)", internal=False)
    call = fields(code, "%call", CALL)
    first, last = code.my_share(call["n_moves"])
    with code.loop(first, last) as number:
        move = code.at(call["moves"], code.times(number, len(MOVE.split())), "i64")
        code.add(f"call void @move(ptr %call, ptr {move})")
    with code.when(code.let(f"icmp ne i64 {call['n_moves']}, 0")):
        code.add("call void @GOMP_barrier()")
    if form.registers:
        registers.configure(code)
    units = code.times(call["n_heads"], call["n_parts"])
    taken = code.at("%call", len(CALL.split()) - 1, "i64")
    with code.taken(taken, code.times(call["n_reads"], units)) as unit:
        number = code.let(f"udiv i64 {unit}, {units}")
        read = code.at(call["reads"], code.times(number, len(READ.split())), "i64")
        within = code.let(f"sub i64 {unit}, {code.times(number, units)}")
        code.add(f"call void @unit(ptr %call, ptr {read}, i64 {within})")
    if form.registers:
        code.add(registers.RELEASE)
    return code.text()
