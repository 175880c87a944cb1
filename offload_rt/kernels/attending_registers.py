"""Attention of rows to tiles of keys in matrix registers (AMX), 16 query rows at a time.

Keys are the first factor as they lie in their cache, or as copied where a tile's rows do not follow
one another; query rows, turned once, are the second. So of what comes out each lane is a query row:
maxima, exponentials and sums are those of plain registers. Weights, turned back, are the first
factor of the products with values, which a tile's are put in pairs for, and those are added to
what there is of a row. A row is in a lane and in a line of its own, and all go through the same
instructions: lanes without a row repeat the last one.

What is carried on of rows lies in a scratch of the thread. A row's sum is one number there, which
is added up in four parts, of each fourth column.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from offload_rt.kernels.attending_form import (
    CALL,
    COLUMNS,
    READ,
    TILE,
    UNSEEN,
    Form,
    Share,
    capped,
    exponential,
    fields,
    finish_row,
    greater,
    row_at,
    single,
    splat,
)
from offload_rt.kernels.code import LANES, WIDE, Code, mixed, turned

_ROWS = 256  # of a thread at a time: with 128 numbers of keys and values 200 KiB
_STEP = 2 * LANES  # numbers of a key, or columns, of a register
_BLOCKS = COLUMNS // LANES
_LINES = COLUMNS // 2  # pairs of columns
_SUMS = 4
_WHOLE, _LONG = f"<{LANES} x i32>", f"<{LANES} x i64>"
_PAIR, _SOME = f"<{2 * LANES} x bfloat>", f"<{LANES} x i1>"
_CONVERT = "@llvm.x86.avx512bf16.cvtne2ps2bf16.512"
DECLARED = f"""declare {_PAIR} {_CONVERT}({WIDE}, {WIDE})
declare {_LONG} @llvm.smax.v16i64({_LONG}, {_LONG})
declare {_LONG} @llvm.smin.v16i64({_LONG}, {_LONG})
declare i64 @llvm.umax.i64(i64, i64)
"""


def functions(form: Form) -> str:
    """@unit, and what it calls beside @pair and @finish."""
    return (
        _gather(form)
        + _scores(form)
        + _soften(form)
        + _weighted(form)
        + _block(form)
        + (_begin(form) + _unit(form))
    )


@contextmanager
def _carried(
    code: Code, name: str, stop: int, step: int, starts: list[str]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Repeat, at least once, with registers that are carried on.

    Yields:
        the number, the registers as they come in, and a list for them as they go on; afterwards
        this list has their names behind the loop.
    """
    before = code.here
    code.add(f"br label %{name}")
    code.block(name)
    code.add(f"%{name}.i = phi i64 [0, %{before}], [%{name}.next, %{name}]")
    came = [f"%{name}.in{n}" for n in range(len(starts))]
    for n, start in enumerate(starts):
        code.add(f"{came[n]} = phi {WIDE} [{start}, %{before}], [%{name}.out{n}, %{name}]")
    made: list[str] = []
    yield f"%{name}.i", came, made
    for n, value in enumerate(made):
        code.add(f"%{name}.out{n} = bitcast {WIDE} {value} to {WIDE}")
        made[n] = f"%{name}.out{n}"
    code.add(f"%{name}.next = add i64 %{name}.i, {step}")
    code.add(f"%{name}.more = icmp ult i64 %{name}.next, {stop}")
    code.add(f"br i1 %{name}.more, label %{name}, label %{name}.end")
    code.block(f"{name}.end")


def _load(code: Code, tile: int, address: str, stride: int | str) -> None:
    code.add(f"call void @llvm.x86.tileloadd64(i8 {tile}, ptr {address}, i64 {stride})")


def _store(code: Code, tile: int, address: str, stride: int | str) -> None:
    code.add(f"call void @llvm.x86.tilestored64(i8 {tile}, ptr {address}, i64 {stride})")


def _multiply(code: Code, to: int, one: int, other: int) -> None:
    code.add(f"call void @llvm.x86.tdpbf16ps(i8 {to}, i8 {one}, i8 {other})")


def _gather(form: Form) -> str:
    """@gather: keys of a tile in a scratch, [COLUMNS, D]."""
    code = Code(f"@gather({TILE})")
    with code.loop(0, COLUMNS) as column:
        start = row_at(code, column, "i16")
        to = code.at("%out", code.times(column, form.dim))
        for place in range(0, form.dim, _STEP):
            some = code.let(f"load {_WHOLE}, ptr {code.at(start, place)}, align 2")
            code.add(f"store {_WHOLE} {some}, ptr {code.at(to, place)}, align 64")
    return code.text()


def _scores(form: Form) -> str:
    """@scores: [COLUMNS, 16] of a tile's keys, so many bytes apart, with 16 rows [D / 2, 16, 2]."""
    code = Code("@scores(ptr noalias %keys, i64 %across, ptr noalias %rows, ptr noalias %out)")
    starts = [code.at("%keys", code.times("%across", LANES * n), "i8") for n in range(_BLOCKS)]
    for block in range(_BLOCKS):
        code.add(f"call void @llvm.x86.tilezero(i8 {block})")
    for number in range(form.dim // _STEP):
        given = 4 + number % 2
        _load(code, given, code.at("%rows", number * LANES * LANES, "i32"), 4 * LANES)
        for block, start in enumerate(starts):
            keys = 6 + block % 2
            _load(code, keys, code.at(start, number * _STEP), "%across")
            _multiply(code, block, keys, given)
    for block in range(_BLOCKS):
        _store(code, block, code.at("%out", block * LANES * LANES, "float"), 4 * LANES)
    return code.text()


def _soften(form: Form) -> str:
    """@soften: scores of 16 rows to weights [16, COLUMNS] in bf16, maxima and sums carried on.

    Args: scores [COLUMNS, 16]; weights; most [16]; sums [16]; factors [16], by which what was there
    is to be multiplied; positions [16]; what was there, which is fetched; scale; cap; the tile's
    first column; the window.
    """
    code = Code(
        "@soften(ptr noalias %scores, ptr noalias %weights, ptr noalias %most, ptr noalias %sums, "
        "ptr noalias %factors, ptr noalias %at, ptr noalias %seen, float %scale, float %cap, "
        "i64 %column, i64 %window)"
    )
    scale, cap = code.spread("%scale"), code.spread("%cap")
    pairs = code.let(f"alloca [{_LINES * LANES} x i32], align 64")
    low, high = _bounds(code)
    inside = code.let(f"icmp sge {_WHOLE} {high}, splat (i32 {COLUMNS - 1})")
    after = code.let(f"icmp sle {_WHOLE} {low}, zeroinitializer")
    all_seen = code.let(f"and {_SOME} {inside}, {after}")
    hidden = code.let(f"icmp ne i16 {code.let(f'bitcast {_SOME} {all_seen} to i16')}, -1")
    old = code.let(f"load {WIDE}, ptr %most, align 64")

    def each(name: str, made: Callable[[str, str], str]) -> None:
        """Make scores of scores, and find the greatest."""
        with _carried(code, name, COLUMNS, _SUMS, [old] * _SUMS) as (first, most, found):
            for n in range(_SUMS):
                column = code.plus(first, n)
                place = code.at("%scores", code.times(column, LANES), "float")
                score = made(code.let(f"load {WIDE}, ptr {place}, align 64"), column)
                code.add(f"store {WIDE} {score}, ptr {place}, align 64")
                found.append(greater(code, score, most[n]))
        pair, other = (greater(code, *found[n : n + 2]) for n in (0, 2))
        code.add(f"store {WIDE} {greater(code, pair, other)}, ptr %most, align 64")

    def scaled(score: str, _: str) -> str:
        score = code.fp("fmul", score, scale)
        return capped(code, score, cap) if form.capped else score

    def masked(score: str, column: str) -> str:
        number = code.spread(code.let(f"trunc i64 {column} to i32"), "i32")
        late = code.let(f"icmp sle {_WHOLE} {number}, {high}")
        early = code.let(f"icmp sge {_WHOLE} {number}, {low}")
        both = code.let(f"and {_SOME} {late}, {early}")
        return code.let(f"select {_SOME} {both}, {WIDE} {score}, {WIDE} {splat(float('-inf'))}")

    each("scaled", scaled)
    with code.when(hidden):
        each("masked", masked)
    new = code.let(f"load {WIDE}, ptr %most, align 64")
    factor = exponential(code, code.fp("fsub", old, new))
    code.add(f"store {WIDE} {factor}, ptr %factors, align 64")
    zeros = ["zeroinitializer"] * _SUMS
    with _carried(code, "weighed", COLUMNS, _SUMS, zeros) as (column, sums, more):
        row = code.let(f"lshr i64 {column}, {_SUMS.bit_length() - 1}")
        row = code.at("%seen", code.times(row, form.line), "float")
        for part in range(LANES, form.line, LANES):
            there = code.at(row, part, "float")
            code.add(f"call void @llvm.prefetch.p0(ptr {there}, i32 1, i32 3, i32 1)")
        weights = []
        for n in range(_SUMS):
            place = code.at("%scores", code.times(code.plus(column, n), LANES), "float")
            score = code.let(f"load {WIDE}, ptr {place}, align 64")
            weights.append(exponential(code, code.fp("fsub", score, new)))
            more.append(code.fp("fadd", sums[n], weights[n]))
        for n in range(0, _SUMS, 2):
            both = f"{WIDE} {weights[n + 1]}, {WIDE} {weights[n]}"
            narrow = code.let(f"call {_PAIR} {_CONVERT}({both})")
            order = [lane for n in range(LANES) for lane in (n, LANES + n)]
            narrow = mixed(code, narrow, "poison", order, _PAIR)
            line = code.let(f"lshr i64 {code.plus(column, n)}, 1")
            place = code.at(pairs, code.times(line, LANES), "i32")
            code.add(f"store {_PAIR} {narrow}, ptr {place}, align 64")
    total = code.fp("fmul", code.let(f"load {WIDE}, ptr %sums, align 64"), factor)
    summed = [code.fp("fadd", *more[n : n + 2]) for n in (0, 2)]
    code.add(
        f"store {WIDE} {code.fp('fadd', total, code.fp('fadd', *summed))}, ptr %sums, align 64"
    )
    for half in range(0, _LINES, LANES):
        places = [code.at(pairs, (half + n) * LANES, "i32") for n in range(LANES)]
        lines = [code.let(f"load {_WHOLE}, ptr {place}, align 64") for place in places]
        for number, weights_of in enumerate(turned(code, lines)):
            place = code.at("%weights", number * _LINES + half, "i32")
            code.add(f"store {_WHOLE} {weights_of}, ptr {place}, align 64")
    return code.text()


def _bounds(code: Code) -> tuple[str, str]:
    """The first and last column of the tile that each row sees, within it or just beside it."""
    column, window = code.spread_long("%column"), code.spread_long("%window")
    at = code.let(f"load {_LONG}, ptr %at, align 64")
    high = code.let(f"sub {_LONG} {at}, {column}")
    low = code.let(f"add {_LONG} {code.let(f'sub {_LONG} {high}, {window}')}, splat (i64 1)")
    found = []
    for number in (low, high):
        least = code.let(
            f"call {_LONG} @llvm.smax.v16i64({_LONG} {number}, {_LONG} splat (i64 -1))"
        )
        within = f"{_LONG} {least}, {_LONG} splat (i64 {COLUMNS})"
        most = code.let(f"call {_LONG} @llvm.smin.v16i64({within})")
        found.append(code.let(f"trunc {_LONG} {most} to {_WHOLE}"))
    return found[0], found[1]


def _weighted(form: Form) -> str:
    """@weighted: 16 lines of results times factors, plus weights of a tile's values.

    Where all factors are 1, as they mostly are, nothing is multiplied: the bits are the same.
    """
    dim, line = form.value_dim, 4 * form.line
    code = Code(
        "@weighted(ptr noalias %weights, ptr noalias %values, ptr noalias %factors, "
        "ptr noalias %out)"
    )
    factors = code.let(f"load {WIDE}, ptr %factors, align 64")
    other = code.let(f"fcmp une {WIDE} {factors}, {splat(1.0)}")
    any_other = code.let(f"icmp ne i16 {code.let(f'bitcast {_SOME} {other} to i16')}, 0")
    with code.when(any_other), code.loop(0, LANES) as row:
        place = code.at("%factors", row, "float")
        factor = code.spread(code.let(f"load float, ptr {place}, align 4"))
        start = code.at("%out", code.times(row, form.line), "float")
        for part in range(0, dim, LANES):
            place = code.at(start, part, "float")
            value = code.let(f"load {WIDE}, ptr {place}, align 64")
            code.add(f"store {WIDE} {code.fp('fmul', value, factor)}, ptr {place}, align 64")
    halves = COLUMNS // _STEP
    for half in range(halves):
        _load(code, 4 + half, code.at("%weights", half * _STEP), 2 * COLUMNS)
    for first in range(0, dim, 4 * LANES):
        parts = list(range(first, min(dim, first + 4 * LANES), LANES))
        for tile, part in enumerate(parts):
            _load(code, tile, code.at("%out", part, "float"), line)
        for half in range(halves):
            for tile, part in enumerate(parts):
                values = 6 + tile % 2
                _load(code, values, code.at("%values", half * LANES * dim + part, "i32"), 4 * dim)
                _multiply(code, tile, 4 + half, values)
        for tile, part in enumerate(parts):
            _store(code, tile, code.at("%out", part, "float"), line)
    return code.text()


def _block(form: Form) -> str:
    """@block: 16 rows with one tile."""
    code = Code(
        "@block(ptr %rows, ptr %keys, i64 %across, ptr %values, ptr %at, ptr %most, ptr %sums, "
        "ptr %seen, i64 %column, i64 %window, float %scale, float %cap)"
    )
    scores = code.let(f"alloca [{COLUMNS * LANES} x float], align 64")
    weights = code.let(f"alloca [{LANES * COLUMNS} x i16], align 64")
    factors = code.let(f"alloca {WIDE}, align 64")
    code.add(f"call void @scores(ptr %keys, i64 %across, ptr %rows, ptr {scores})")
    code.add(
        f"call void @soften(ptr {scores}, ptr {weights}, ptr %most, ptr %sums, ptr {factors}, "
        "ptr %at, ptr %seen, float %scale, float %cap, i64 %column, i64 %window)"
    )
    made = code.at("%seen", LANES, "float")
    code.add(f"call void @weighted(ptr {weights}, ptr %values, ptr {factors}, ptr {made})")
    return code.text()


def _copied(code: Code, form: Form, source: str, target: str) -> None:
    """Copy a row's line."""
    for part in range(0, form.line, LANES):
        some = code.let(f"load {WIDE}, ptr {code.at(source, part, 'float')}, align 4")
        code.add(f"store {WIDE} {some}, ptr {code.at(target, part, 'float')}, align 4")


def _number(code: Code, source: str, target: str) -> None:
    """Copy a number."""
    code.add(f"store float {code.let(f'load float, ptr {source}, align 4')}, ptr {target}, align 4")


def _begin(form: Form) -> str:
    """@begin: rows `first` to `last` as they are at first, and 16 by 16 turned: [D / 2, 16, 2].

    Rows that are missing of the last 16 are the last one again.
    """
    code = Code(
        "@begin(ptr %query, ptr %positions, ptr %begun, ptr %old_most, ptr %old_seen, i64 %group, "
        "i64 %first, i64 %last, ptr %turned, ptr %at, ptr %most, ptr %sums, ptr %seen)"
    )
    count = code.let("sub i64 %last, %first")
    begun = code.let("icmp ne ptr %begun, null")
    end = code.let("sub i64 %last, 1")
    with code.loop(0, count, LANES) as block:
        rows = []
        for lane in range(LANES):
            row = code.plus(code.plus("%first", block), lane)
            row = code.let(f"call i64 @llvm.umin.i64(i64 {row}, i64 {end})")
            rows.append(code.at("%query", code.times(row, form.dim)))
            there = code.plus(block, lane)
            token = code.let(f"udiv i64 {row}, %group")
            at = code.let(f"load i64, ptr {code.at('%positions', token, 'i64')}, align 8")
            code.add(f"store i64 {at}, ptr {code.at('%at', there, 'i64')}, align 8")
            for start, number in (("%most", UNSEEN), ("%sums", 0.0)):
                place = code.at(start, there, "float")
                code.add(f"store float {single(number)}, ptr {place}, align 4")
        to = code.at("%turned", code.times(block, form.dim // 2), "i32")
        with code.loop(0, form.dim // 2, LANES) as pair:
            places = [code.at(row, pair, "i32") for row in rows]
            lines = [code.let(f"load {_WHOLE}, ptr {place}, align 2") for place in places]
            for number, line in enumerate(turned(code, lines)):
                place = code.at(to, code.times(code.plus(pair, number), LANES), "i32")
                code.add(f"store {_WHOLE} {line}, ptr {place}, align 64")
        with code.loop(0, code.times(LANES, form.line), LANES) as part:
            place = code.plus(code.times(block, form.line), part)
            place = code.at("%seen", place, "float")
            code.add(f"store {WIDE} zeroinitializer, ptr {place}, align 64")
    with code.when(begun), code.loop(0, count) as row:
        old = code.plus("%first", row)
        line = code.at("%old_seen", code.times(old, form.line), "float")
        _number(code, code.at("%old_most", old, "float"), code.at("%most", row, "float"))
        _number(code, line, code.at("%sums", row, "float"))
        _copied(code, form, line, code.at("%seen", code.times(row, form.line), "float"))
    return code.text()


def _unit(form: Form) -> str:
    """@unit: a KV head of a read, or some of its rows, so many at a time, tile after tile."""
    line = form.line
    code = Code("@unit(ptr %call, ptr %read, i64 %unit)")
    room = {
        "keys": (COLUMNS * form.dim, "i16"),
        "values": (COLUMNS * form.value_dim, "i16"),
        "turned": (_ROWS * form.dim // 2, "i32"),
        "at": (_ROWS, "i64"),
        "most": (_ROWS, "float"),
        "sums": (_ROWS, "float"),
        "seen": (_ROWS * line, "float"),
        "spare_most": (LANES, "float"),
        "spare_sums": (LANES, "float"),
        "spare_seen": (LANES * line, "float"),
    }
    own_room = {n: code.let(f"alloca [{c} x {kind}], align 64") for n, (c, kind) in room.items()}
    call, own = fields(code, "%call", CALL), fields(code, "%read", READ)
    share, group = Share.of(code, form, call, own), call["n_group"]
    stride = own["n_key_row"]
    apart = code.times(stride, 2)

    def bring(index: str) -> tuple[str, str]:
        """Where a tile's keys are, and how far apart; its values are in pairs."""
        first = code.let(f"load i64, ptr {index}, align 8")
        follow = code.let(f"icmp ule i64 {code.plus(first, COLUMNS - 1)}, {own['n_last']}")
        start = code.spread_long(first)
        for place in range(0, COLUMNS, LANES):
            there = code.let(f"load {_LONG}, ptr {code.at(index, place, 'i64')}, align 8")
            lanes = ", ".join(f"i64 {place + lane}" for lane in range(LANES))
            expected = code.let(f"add {_LONG} {start}, <{lanes}>")
            same = code.let(f"icmp eq {_LONG} {there}, {expected}")
            all_same = code.let(f"icmp eq i16 {code.let(f'bitcast {_SOME} {same} to i16')}, -1")
            follow = code.let(f"and i1 {follow}, {all_same}")
        scattered = code.let(f"xor i1 {follow}, true")
        given = f"ptr {index}, i64"
        with code.when(scattered):
            code.add(
                f"call void @gather(ptr {share.key}, {given} {stride}, i64 {own['n_last']}, "
                f"ptr {own_room['keys']})"
            )
        code.add(
            f"call void @pair(ptr {share.value}, {given} {own['n_value_row']}, "
            f"i64 {own['n_last']}, ptr {own_room['values']})"
        )
        lying = code.at(share.key, code.times(first, stride))
        keys = code.let(f"select i1 {follow}, ptr {lying}, ptr {own_room['keys']}")
        across = code.let(f"select i1 {follow}, i64 {apart}, i64 {2 * form.dim}")
        return keys, across

    def take(tile: tuple[str, str], block: str, state: list[str], column: str) -> None:
        """A block of rows with a tile."""
        rows = code.at(own_room["turned"], code.times(block, form.dim // 2), "i32")
        most, sums, seen = state
        code.add(
            f"call void @block(ptr {rows}, ptr {tile[0]}, i64 {tile[1]}, "
            f"ptr {own_room['values']}, ptr {code.at(own_room['at'], block, 'i64')}, "
            f"ptr {most}, ptr {sums}, ptr {seen}, i64 {column}, i64 {call['n_window']}, "
            f"float {share.scale}, float {share.cap})"
        )

    def state(row: str) -> list[str]:
        most, sums = (code.at(own_room[name], row, "float") for name in ("most", "sums"))
        return [most, sums, code.at(own_room["seen"], code.times(row, line), "float")]

    with code.loop(share.first, share.last, _ROWS) as first:
        count = code.some(share.last, first, _ROWS)
        stop = code.plus(first, count)
        code.add(
            f"call void @begin(ptr {share.query}, ptr {share.positions}, ptr {call['seen']}, "
            f"ptr {share.most}, "
            f"ptr {share.seen}, i64 {group}, i64 {first}, i64 {stop}, "
            + ", ".join(f"ptr {own_room[n]}" for n in ("turned", "at", "most", "sums", "seen"))
            + ")"
        )
        with code.loop(0, own["n_tiles"]) as number:
            column = code.times(number, COLUMNS)
            tile = bring(code.at(own["index"], column, "i64"))
            column = code.plus(own["n_start"], column)
            with code.loop(0, count, LANES) as block:
                take(tile, block, state(block), column)
        column = code.plus(own["n_start"], code.times(own["n_tiles"], COLUMNS))
        low = code.let(f"udiv i64 {first}, {group}")
        high = code.plus(code.let(f"udiv i64 {code.let(f'sub i64 {stop}, 1')}, {group}"), 1)
        high = code.let(f"select i1 {share.by_token}, i64 {high}, i64 {low}")
        with code.loop(low, high) as token:
            tile = bring(code.at(own["piece"], code.times(token, COLUMNS), "i64"))
            start = code.times(token, group)
            start = code.let(f"call i64 @llvm.umax.i64(i64 {start}, i64 {first})")
            start = code.let(f"sub i64 {start}, {first}")
            end = code.let(f"sub i64 {code.times(code.plus(token, 1), group)}, {first}")
            end = code.let(f"call i64 @llvm.umin.i64(i64 {end}, i64 {count})")
            aligned = code.let(f"and i64 {start}, {-LANES}")
            spare = [own_room[f"spare_{name}"] for name in ("most", "sums", "seen")]
            with code.loop(aligned, end, LANES) as block:
                _exchange(code, form, state(block), spare, 0, LANES)
                take(tile, block, spare, column)
                begins = code.let(f"call i64 @llvm.umax.i64(i64 {start}, i64 {block})")
                ends = code.let(
                    f"call i64 @llvm.umin.i64(i64 {end}, i64 {code.plus(block, LANES)})"
                )
                skipped, taken = (code.let(f"sub i64 {n}, {block}") for n in (begins, ends))
                _exchange(code, form, spare, state(block), skipped, taken)
        with code.loop(0, count) as row:
            most, sums, seen = state(row)
            total = code.let(f"load float, ptr {sums}, align 4")
            total = code.let(f"insertelement {WIDE} zeroinitializer, float {total}, i32 0")
            code.add(f"store {WIDE} {total}, ptr {seen}, align 64")
            there = code.plus(first, row)
            with code.when(share.ends):
                finish_row(code, form, call, share, there, most, seen)
            with code.when(code.let(f"xor i1 {share.ends}, true")):
                _number(code, most, code.at(share.most, there, "float"))
                to = code.at(share.seen, code.times(there, line), "float")
                _copied(code, form, seen, to)
    return code.text()


def _exchange(
    code: Code,
    form: Form,
    source: list[str],
    target: list[str],
    first: int | str,
    last: int | str,
) -> None:
    """Copy what there is of some rows."""
    with code.loop(first, last) as row:
        for one, other in zip(source[:2], target[:2], strict=True):
            _number(code, code.at(one, row, "float"), code.at(other, row, "float"))
        lines = (code.at(one[2], code.times(row, form.line), "float") for one in (source, target))
        _copied(code, form, *lines)
