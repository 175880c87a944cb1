"""A decoder layer of the Llama family for few rows: two kernels, with attention between them.

Before attention: RMS norm; query, key and value; rotation. After it: output projection and residual
sum; RMS norm; gate and up, the activation; down and residual sum. One product after the other runs
at the rate of memory, as the threads meet only twice in a layer, and nothing else is started.

Each step rounds where transformers' modules round, and adds in the order of torch's kernels:
products as in `products` or, of rounded matrices, `rounded`; the mean of squares as in `_Sums`.
So the bits are the same; whoever uses this compares (`model/lean.py`).
"""

import ctypes
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from offload_rt.kernels import assembling, registers
from offload_rt.kernels.code import LANES, WIDE, Code
from offload_rt.kernels.products import HEAD, panels
from offload_rt.kernels.rounded import DECLARED, Form
from offload_rt.kernels.rows import MOST_ROWS, PANEL

_SUM_LANES, _TOGETHER, _LEVELS = 8, 4, 4  # of torch's sums: ATen/native/cpu/SumKernel.cpp
_LEAST_STEP = 4  # as a power of two
_EIGHT = f"<{_SUM_LANES} x float>"
MANY_ROWS = 32  # of rounded matrices: what a draft model is fed at once
REGISTER_ROWS = registers.ROWS_LYING  # one of each sequence of a large batch
_MOST_NORMED = 2**19  # numbers that each thread has on its stack
TABLE_NUMBERS = 2**16  # an activation of every bf16 number

BEFORE = (
    "hidden norm query query_bias queries key key_bias keys value value_bias values cosine sine "
    "n_rows n_block"
)
AFTER = (
    "attended hidden output output_bias summed norm gate gate_bias up up_bias products down "
    "down_bias table out n_rows n_attended_block n_block n_products_block"
)


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """What the code of a layer depends on.

    Attributes:
        hidden: E.
        heads: H.
        kv_heads: K.
        head_dim: D.
        products: outputs of gate and up.
        eps: what both norms add to the mean of squares, as an fp32 number.
        form: of rounded matrices; None: they are bf16.
        in_registers: matrix registers multiply, with bf16.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    products: int
    eps: float
    form: Form | None = None
    in_registers: bool = False

    @property
    def most_rows(self) -> int:
        """Rows there is code for; of more torch's kernels are as quick, or the rest is little."""
        widest = max(self.hidden, self.heads * self.head_dim)
        if self.in_registers and REGISTER_ROWS * widest <= _MOST_NORMED:
            return REGISTER_ROWS
        return MANY_ROWS if self.form or self.in_registers else MOST_ROWS

    @property
    def suit(self) -> bool:
        """Whether there is code for such sizes."""
        sizes = (self.hidden, self.head_dim, self.products)
        return not any(size % PANEL for size in sizes) and self.hidden <= 2**14


class Record:
    """The argument of a kernel, kept from call to call."""

    def __init__(self, names: str, values: Mapping[str, int]) -> None:
        self._places = {name: place for place, name in enumerate(names.split())}
        self.numbers = (ctypes.c_int64 * len(self._places))()
        self.set(values)

    def set(self, values: Mapping[str, int]) -> None:
        """Give fields their values."""
        for name, value in values.items():
            self.numbers[self._places[name]] = value


@cache
def assembled(sizes: LayerSizes) -> Mapping[str, int]:
    """The kernels `before`, `after` and, to compare the order of a sum, `squares`."""
    if sizes.form is not None:
        takes = DECLARED + _rounding(sizes, sizes.form)
    elif sizes.in_registers:
        takes = registers.DECLARED + registers.lying() + registers.finish()
    else:
        takes = panels() + _take()
    text = HEAD + takes + _norm(sizes) + _rotate(sizes) + _activate() + _add()
    text += _before(sizes) + _after(sizes) + _squares(sizes)
    return assembling.assemble(text, ["before", "after", "squares"])


def adds_as_torch(sizes: LayerSizes) -> bool:
    """Whether the mean of squares is torch's, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, sizes.hidden, generator=generator).to(torch.bfloat16)
    found = torch.empty(len(rows), dtype=torch.float32)
    record = Record("rows n_count found", {"rows": rows.data_ptr(), "n_count": len(rows)})
    record.set({"found": found.data_ptr()})
    assembling.together(assembled(sizes)["squares"], record.numbers)
    return torch.equal(found, rows.float().pow(2).mean(-1))


def _rounding(sizes: LayerSizes, form: Form) -> str:
    """The functions for rounded matrices, by their inputs."""
    inputs = dict.fromkeys((sizes.hidden, sizes.heads * sizes.head_dim, sizes.products))
    return "".join(map(form.code, inputs))


def _take() -> str:
    """A product of 1 to `MOST_ROWS` rows with the next panel."""
    code = Code(
        "@take(ptr %rows, ptr %weight, ptr %bias, ptr %out, i64 %pairs, i64 %outputs, i64 %block, "
        "i64 %count)"
    )
    for count in range(1, MOST_ROWS + 1):
        with code.when(code.let(f"icmp eq i64 %count, {count}")):
            code.add(
                f"call void @panel{count}(ptr %rows, ptr %weight, ptr %bias, ptr %out, "
                "i64 %pairs, i64 %outputs, i64 %block)"
            )
    return code.text()


class _Sums:
    """Four sums of vectors of 8, on each of four levels, in the order of torch's sums.

    Four vectors are taken at once into four sums. After 2^p such steps the sums go up a level and
    start at zero; after 2^2p those of that level do, and so on.
    """

    def __init__(self, code: Code, row: str) -> None:
        self._code, self._row = code, row
        self.levels = [
            [code.let(f"alloca {_EIGHT}, align 64") for _ in range(_TOGETHER)]
            for _ in range(_LEVELS)
        ]
        for number in range(_LEVELS):
            self.clear(number)

    def clear(self, level: int) -> None:
        """Start at zero."""
        for place in self.levels[level]:
            self._code.add(f"store {_EIGHT} zeroinitializer, ptr {place}")

    def value(self, place: str) -> str:
        """A sum."""
        return self._code.let(f"load {_EIGHT}, ptr {place}")

    def add(self, place: str, value: str) -> None:
        """Add to a sum."""
        both = self._code.let(f"fadd {_EIGHT} {self.value(place)}, {value}")
        self._code.add(f"store {_EIGHT} {both}, ptr {place}")

    def take(self, first: str | int, place: str) -> None:
        """Add the squares of the next 8 numbers."""
        code = self._code
        narrow = code.let(f"load <8 x i16>, ptr {code.at(self._row, first)}, align 2")
        wide = code.let(f"zext <8 x i16> {narrow} to <8 x i32>")
        high = code.let(f"shl <8 x i32> {wide}, splat (i32 16)")
        number = code.let(f"bitcast <8 x i32> {high} to {_EIGHT}")
        self.add(place, code.let(f"fmul {_EIGHT} {number}, {number}"))

    def take_steps(self, first: int, stop: int) -> None:
        """Four vectors at a time."""
        code = self._code
        with code.loop(first, stop) as step:
            start = code.times(step, _SUM_LANES * _TOGETHER)
            for number, place in enumerate(self.levels[0]):
                self.take(code.plus(start, number * _SUM_LANES), place)

    def add_level(self, source: int, target: int) -> None:
        """Add the sums of one level to those of another."""
        for one, other in zip(self.levels[source], self.levels[target], strict=True):
            self.add(other, self.value(one))


def _mean_of_squares(code: Code, row: str, numbers: int) -> str:
    """The mean of a row's squares in fp32, added in the order of torch's sums."""
    steps = numbers // (_SUM_LANES * _TOGETHER)
    power = max(_LEAST_STEP, math.ceil(math.log2(steps)) // _LEVELS)
    sums = _Sums(code, row)
    done = 0
    while done + 2**power <= steps:
        sums.take_steps(done, done + 2**power)
        done += 2**power
        for level in range(1, _LEVELS):
            sums.add_level(level - 1, level)
            sums.clear(level - 1)
            if done & ((2**power - 1) << (level * power)):
                break
    sums.take_steps(done, steps)
    for level in range(1, _LEVELS):
        sums.add_level(level, 0)
    first, *others = sums.levels[0]
    for start in range(steps * _SUM_LANES * _TOGETHER, numbers, _SUM_LANES):
        sums.take(start, first)
    for place in others:
        sums.add(first, sums.value(place))
    eight, total = sums.value(first), "0.0"
    for lane in range(_SUM_LANES):
        one = code.let(f"extractelement {_EIGHT} {eight}, i32 {lane}")
        total = code.let(f"fadd float {total}, {one}")
    return code.let(f"fdiv float {total}, {_float(numbers)}")


def _float(value: float) -> str:
    """An fp32 constant in the one form that LLVM reads any in: the bits of its fp64 equal."""
    (narrow,) = struct.unpack("<f", struct.pack("<f", value))
    (bits,) = struct.unpack("<Q", struct.pack("<d", narrow))
    return f"0x{bits:016X}"


def _norm(sizes: LayerSizes) -> str:
    """RMS norm of rows [count, E]."""
    code = Code("@norm(ptr %row, ptr %weight, ptr %out)")
    mean = _mean_of_squares(code, "%row", sizes.hidden)
    safe = code.let(f"fadd float {mean}, {_float(sizes.eps)}")
    root = code.let(f"call float @llvm.sqrt.f32(float {safe})")
    factor = code.spread(code.let(f"fdiv float {_float(1.0)}, {root}"))
    with code.loop(0, sizes.hidden, LANES) as place:
        number = code.read(code.at("%row", place))
        normal = code.rounded(code.fp("fmul", number, factor))
        scaled = code.rounded(code.fp("fmul", code.read(code.at("%weight", place)), normal))
        code.write(scaled, code.at("%out", place))
    return code.text()


def _squares(sizes: LayerSizes) -> str:
    code = Code("@squares(ptr %record)", internal=False)
    rows, count, found = code.fields("%record", "rows n_count found")
    with code.loop(0, count) as row:
        code.add(
            f"call void @square(ptr {code.at(rows, code.times(row, sizes.hidden))}, "
            f"ptr {code.at(found, row, 'float')})"
        )
    one = Code("@square(ptr %row, ptr %found)")
    one.add(f"store float {_mean_of_squares(one, '%row', sizes.hidden)}, ptr %found")
    return one.text() + code.text()


def _rotate(sizes: LayerSizes) -> str:
    """Rotate a head in place: x * cos + (-second half, first half) * sin, rounded at each step."""
    code = Code("@rotate(ptr %head, ptr %cosine, ptr %sine)")
    half = sizes.head_dim // 2
    with code.loop(0, half, LANES) as place:
        later = code.plus(place, half)
        spots = [code.at("%head", where) for where in (place, later)]
        first, second = (code.read(spot) for spot in spots)
        turned = code.let(f"fneg {WIDE} {second}"), first
        for where, own, other, spot in zip(
            (place, later), (first, second), turned, spots, strict=True
        ):
            cosine, sine = (code.read(code.at(n, where)) for n in ("%cosine", "%sine"))
            straight = code.rounded(code.fp("fmul", own, cosine))
            across = code.rounded(code.fp("fmul", other, sine))
            code.write(code.rounded(code.fp("fadd", straight, across)), spot)
    return code.text()


def _activate() -> str:
    """A panel of activation(gate) * up: gate [64] and up [64] to out [64]; by a table."""
    code = Code("@activate(ptr %gate, ptr %up, ptr %table, ptr %out)")
    with code.loop(0, PANEL) as place:
        bits = code.let(f"load i16, ptr {code.at('%gate', place)}")
        entry = code.at("%table", code.let(f"zext i16 {bits} to i64"))
        code.add(f"store i16 {code.let(f'load i16, ptr {entry}')}, ptr {code.at('%gate', place)}")
    with code.loop(0, PANEL, LANES) as place:
        factors = (code.read(code.at(name, place)) for name in ("%gate", "%up"))
        code.write(code.rounded(code.fp("fmul", *factors)), code.at("%out", place))
    return code.text()


def _add() -> str:
    """Add a panel of a row to another, in place."""
    code = Code("@add(ptr %sum, ptr %other)")
    with code.loop(0, PANEL, LANES) as place:
        both = (code.read(code.at(name, place)) for name in ("%other", "%sum"))
        code.write(code.rounded(code.fp("fadd", *both)), code.at("%sum", place))
    return code.text()


def _room(code: Code, sizes: LayerSizes, inputs: int) -> str:
    """Where a thread has rows of up to so many inputs that were turned, if they are."""
    if not sizes.in_registers:
        return ""
    return code.let(f"alloca [{sizes.most_rows * inputs} x i16], align 64")


def _turned(code: Code, rows: str, room: str, inputs: int, count: str) -> str:
    """All rows as matrix registers take them, by each thread for itself, if there is room."""
    if room:
        pairs = inputs // 2
        code.add(
            f"call void @turn(ptr {rows}, ptr {room}, i64 0, i64 {pairs}, i64 {pairs}, i64 {count})"
        )
    return room or rows


def _normed(code: Code, sizes: LayerSizes, rows: str, weight: str, count: str, room: str) -> str:
    """All rows normed, by each thread for itself: that is quicker than to meet."""
    at_once = LANES if room else sizes.most_rows
    normed = code.let(f"alloca [{at_once * sizes.hidden} x i16], align 64")
    with code.loop(0, count, at_once) as begin:
        some = code.some(count, begin, at_once)
        start = code.times(begin, sizes.hidden)
        with code.loop(0, some) as row:
            place = code.times(row, sizes.hidden)
            source, target = code.at(rows, code.plus(start, place)), code.at(normed, place)
            code.add(f"call void @norm(ptr {source}, ptr {weight}, ptr {target})")
        if room:
            _turned(code, normed, code.at(room, start), sizes.hidden, some)
    return room or normed


@dataclass(frozen=True, slots=True)
class _Factor:
    """Rows [count, inputs] that are multiplied.

    Attributes:
        block: pairs of inputs that are added up in one go.
        rounded: how the matrix is, and what is kept of its rows of 8 bits; None of bf16.
    """

    rows: str
    inputs: int
    count: str
    block: str
    rounded: tuple[Form, str] | None


def _factor(
    code: Code, sizes: LayerSizes, rows: str, inputs: int, count: str, block: str
) -> _Factor:
    """Rows in bf16 as they are multiplied; rounded to 8 bits by each thread for itself."""
    form = sizes.form
    if form is None:
        return _Factor(rows, inputs, count, block, None)
    eights = code.let(f"alloca [{sizes.most_rows * inputs} x i8], align 64")
    numbers = form.factors(inputs)
    factors = code.let(f"alloca [{sizes.most_rows * numbers} x float], align 64")
    with code.loop(0, count) as row:
        start = code.times(row, inputs)
        code.add(
            f"call void @round{inputs}(ptr {code.at(rows, start)}, "
            f"ptr {code.at(eights, start, 'i8')}, "
            f"ptr {code.at(factors, code.times(row, numbers), 'float')})"
        )
    return _Factor(eights, inputs, count, block, (form, factors))


def _panel_of(
    code: Code, factor: _Factor, matrix: tuple[str, str], panel: str, out: str, stride: int
) -> None:
    """Multiply with one panel of a matrix, given as its address and that of its bias."""
    (weight, bias), inputs = matrix, factor.inputs
    given = code.let(f"icmp ne ptr {bias}, null")
    added = code.at(bias, code.times(panel, PANEL))
    added = code.let(f"select i1 {given}, ptr {added}, ptr null")
    if factor.rounded is not None:
        form, factors = factor.rounded
        part = code.at(weight, code.times(panel, form.panel_bytes(inputs)), "i8")
        with code.loop(0, factor.count, MOST_ROWS) as row:
            taking = code.some(factor.count, row, MOST_ROWS)
            code.add(
                f"call void @take{inputs}("
                f"ptr {code.at(factor.rows, code.times(row, inputs), 'i8')}, "
                f"ptr {code.at(factors, code.times(row, form.factors(inputs)), 'float')}, "
                f"ptr {part}, ptr {added}, "
                f"ptr {code.at(out, code.times(row, stride))}, i64 {stride}, i64 {taking})"
            )
        return
    part = code.at(weight, code.times(panel, PANEL * inputs))
    code.add(
        f"call void @take(ptr {factor.rows}, ptr {part}, ptr {added}, ptr {out}, "
        f"i64 {inputs // 2}, i64 {stride}, i64 {factor.block}, i64 {factor.count})"
    )


def _before(sizes: LayerSizes) -> str:
    code = Code("@before(ptr %record)", internal=False)
    field = dict(zip(BEFORE.split(), code.fields("%record", BEFORE), strict=True))
    dim, count = sizes.head_dim, field["n_rows"]
    first, last = code.my_share(sizes.heads + 2 * sizes.kv_heads)
    room = _room(code, sizes, sizes.hidden)
    normed = _normed(code, sizes, field["hidden"], field["norm"], count, room)
    factor = _factor(code, sizes, normed, sizes.hidden, count, field["n_block"])
    start = 0
    with code.loop(first, last) as unit:
        for name, to, heads in (
            ("query", "queries", sizes.heads),
            ("key", "keys", sizes.kv_heads),
            ("value", "values", sizes.kv_heads),
        ):
            head = code.let(f"sub i64 {unit}, {start}")  # wraps below zero
            start += heads
            with code.when(code.let(f"icmp ult i64 {head}, {heads}")):
                matrix, out = (field[name], field[f"{name}_bias"]), field[to]
                with code.loop(0, dim // PANEL) as part:
                    panel = code.plus(code.times(head, dim // PANEL), part)
                    there = code.at(out, code.times(panel, PANEL))
                    _panel_of(code, factor, matrix, panel, there, heads * dim)
                if name != "value":
                    with code.loop(0, count) as row:
                        place = code.times(code.plus(code.times(row, heads), head), dim)
                        angle = code.times(row, dim)
                        code.add(
                            f"call void @rotate(ptr {code.at(out, place)}, "
                            f"ptr {code.at(field['cosine'], angle)}, "
                            f"ptr {code.at(field['sine'], angle)})"
                        )
    _release(code, sizes)
    return code.text()


def _after(sizes: LayerSizes) -> str:
    code = Code("@after(ptr %record)", internal=False)
    field = dict(zip(AFTER.split(), code.fields("%record", AFTER), strict=True))
    summed, count, products = (field[name] for name in ("summed", "n_rows", "products"))
    gates, ups = (code.let(f"alloca [{sizes.most_rows * PANEL} x i16], align 64") for _ in range(2))

    def project(factor: _Factor, name: str, onto: str, to: str) -> None:
        """A product and the sum with what went before: [count, E]."""
        first, last = code.my_share(sizes.hidden // PANEL)
        matrix = field[name], field[f"{name}_bias"]
        with code.loop(first, last) as panel:
            start = code.times(panel, PANEL)
            _panel_of(code, factor, matrix, panel, code.at(to, start), sizes.hidden)
            with code.loop(0, count) as row:
                place = code.plus(code.times(row, sizes.hidden), start)
                code.add(f"call void @add(ptr {code.at(to, place)}, ptr {code.at(onto, place)})")

    attended = sizes.heads * sizes.head_dim
    room = _room(code, sizes, max(sizes.hidden, attended))
    rows = _turned(code, field["attended"], room, attended, count)
    factor = _factor(code, sizes, rows, attended, count, field["n_attended_block"])
    project(factor, "output", field["hidden"], summed)
    code.add("call void @GOMP_barrier()")
    normed = _normed(code, sizes, summed, field["norm"], count, room)
    factor = _factor(code, sizes, normed, sizes.hidden, count, field["n_block"])
    first, last = code.my_share(sizes.products // PANEL)
    with code.loop(first, last) as panel:
        for name, to in (("gate", gates), ("up", ups)):
            _panel_of(code, factor, (field[name], field[f"{name}_bias"]), panel, to, PANEL)
        with code.loop(0, count) as row:
            here = code.times(row, PANEL)
            place = code.plus(code.times(row, sizes.products), code.times(panel, PANEL))
            to = code.at(gates, here) if room else code.at(products, place)
            code.add(
                f"call void @activate(ptr {code.at(gates, here)}, ptr {code.at(ups, here)}, "
                f"ptr {field['table']}, ptr {to})"
            )
        if room:  # all rows, turned, are there for all threads
            code.add(
                f"call void @turn(ptr {gates}, ptr {products}, "
                f"i64 {code.times(panel, PANEL // 2)}, i64 {PANEL // 2}, "
                f"i64 {sizes.products // 2}, i64 {count})"
            )
    code.add("call void @GOMP_barrier()")
    factor = _factor(code, sizes, products, sizes.products, count, field["n_products_block"])
    project(factor, "down", summed, field["out"])
    _release(code, sizes)
    return code.text()


def _release(code: Code, sizes: LayerSizes) -> None:
    """Leave no matrix registers in use, which Linux would keep for the thread."""
    if sizes.in_registers:
        code.add(registers.RELEASE)
