"""Products of rows with a matrix that lies as it is stored: bf16, 12 bits, or integers of 4 and 8.

A panel of `PANEL` outputs is taken at a time, and of that a block of inputs: it is brought into a
scratch of the thread in the order of `products`, in bf16, and multiplied with all rows before the
next one is. So the scratch stays in the second cache, no weight is written to memory, and more rows
dequantise no more.

The results are those of oneDNN with the dequantised matrix, bit for bit: the same instruction adds
in the same order, and blocks of inputs are as long as `products` found out. What is computed of a
row does not depend on how many there are.

Where oneDNN multiplies with a processor's matrix registers, in an order that goes by the number of
rows, row-invariant passes take a kernel that does so too, in one order: inputs are added up two by
two, from the first to the last, of one row as of many (`multiplies_in_registers`). A matrix in bf16
is a factor there as it lies; nothing of it is brought.

A number is (code - zero) x scale, rounded to fp32 and then to bf16. The instruction that rounds
makes subnormal numbers of bf16 zero, and so does the one that multiplies.
"""

import ctypes
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache

import torch

from offload_rt.device.system import takes_matrix_registers
from offload_rt.kernels import assembling, blocks, registers, twelve
from offload_rt.kernels.code import LANES, WIDE, Code, mixed, turned
from offload_rt.kernels.products import BLOCKS, HEAD, cancelling, problem
from offload_rt.kernels.registers import ROWS_LYING, multiplies_in_registers
from offload_rt.kernels.rows import PANEL, REGISTER_STEP
from offload_rt.kernels.tiles import in_tiles

_REGISTERS_BLOCK = 1024  # inputs: of a panel 128 KiB, of the second cache
ROWS_AT_ONCE = 128  # that a block is multiplied with; for more it is brought again
LONGEST_BLOCK = 4096  # inputs
_TOGETHER = 6  # rows whose sums are in registers, with 4 vectors of weights
_PARTS = PANEL // LANES
_LINE_BYTES = 64
_BITS = f"<{LANES} x i32>"
_PAIR = "<32 x bfloat>"
_ROUND = "@llvm.x86.avx512bf16.cvtne2ps2bf16.512"
_DECLARED = f"""declare {_PAIR} {_ROUND}({WIDE}, {WIDE})
declare i64 @llvm.usub.sat.i64(i64, i64)
{registers.DECLARED}
{twelve.DECLARED}"""
_AWQ_CODES = (0, 4, 1, 5, 2, 6, 3, 7)  # which of a word's codes is each of its outputs'
_MATRIX = "ptr %codes, ptr %scales, ptr %zeros, ptr %index"
_SIZES = "i64 %start, i64 %stop, i64 %output, i64 %inputs, i64 %outputs, i64 %group"
_FIELDS = (
    "rows codes scales zeros index bias out scratch n_inputs n_outputs n_count n_block n_group "
    "n_blocks n_room n_line n_taken"
)
_WORDS = len(_FIELDS.split())  # of a record: the last counts panels that were taken


class How(StrEnum):
    """How a matrix lies.

    PLAIN: bf16 [O, I]. CODED: the same in 12 bits, in pieces (`twelve.py`). PACKED4 and PACKED8:
    words of codes along the inputs, [O, I b / 32]. COLUMNS4 and COLUMNS8: the same words,
    [I b / 32, O]. AWQ: words of 8 outputs, [I, O / 8]. Q4_0 and so on: rows of GGUF's blocks
    (`blocks.py`).
    """

    PLAIN = "plain"
    CODED = "coded"
    PACKED4 = "packed4"
    PACKED8 = "packed8"
    COLUMNS4 = "columns4"
    COLUMNS8 = "columns8"
    AWQ = "awq"
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    Q5_0 = "q5_0"
    Q5_1 = "q5_1"
    Q8_0 = "q8_0"
    Q2_K = "q2_k"
    Q3_K = "q3_k"
    Q4_K = "q4_k"
    Q5_K = "q5_k"
    Q6_K = "q6_k"
    IQ4_NL = "iq4_nl"
    IQ4_XS = "iq4_xs"
    BLOCK_MXFP4 = "block_mxfp4"


_CODE_BITS = {How.PACKED8: 8, How.COLUMNS8: 8}
_LINE_BITS = {How.PLAIN: 16, How.PACKED4: 4, How.PACKED8: 8}  # of a number, along its output
# Inputs that are taken at once; blocks and sums of weights begin at multiples.
STEP = {
    How.PLAIN: 32,
    How.CODED: twelve.STEP,
    How.PACKED4: 128,
    How.PACKED8: 64,
    How.COLUMNS4: 8,
    How.COLUMNS8: 4,
    How.AWQ: 8,
    **{How(form): layout.numbers for form, layout in blocks.LAYOUTS.items()},
}


_COUNTS = (2, 3, 4, 5, 7, 8, 16, 17, 65)  # of rows, that are compared
_COMPARED_NUMBERS = 2**22  # of a matrix whose product is compared


@cache
def blocks_of(inputs: int, outputs: int, *, tiles: bool) -> tuple[int, int] | None:
    """Inputs of the blocks in which torch adds up, for one row and for more.

    None where there are no kernels, or none that give its numbers.

    Args:
        inputs: I.
        outputs: O.
        tiles: torch is given whole tiles of rows.
    """
    if problem() or outputs % PANEL or inputs % STEP[How.PLAIN] or _trouble():
        return None
    outputs = min(outputs, max(PANEL, _COMPARED_NUMBERS // inputs // PANEL * PANEL))
    weight, rows = cancelling(inputs, outputs)
    rows = rows.repeat(-(-_COUNTS[-1] // len(rows)), 1)
    bias, found = torch.linspace(-1e-4, 1e-4, outputs).to(torch.bfloat16), []

    def expected(given: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(given, weight, bias)

    with torch.inference_mode():
        for counts in ((1,), _COUNTS):
            made = [in_tiles(expected, rows[:n]) if tiles else expected(rows[:n]) for n in counts]
            for block in BLOCKS:
                if min(block, inputs) > LONGEST_BLOCK:
                    continue
                mine = StoredProduct(How.PLAIN, inputs, outputs, (block, block))
                pairs = zip(counts, made, strict=True)
                if all(torch.equal(mine(rows[:n], weight, bias), one) for n, one in pairs):
                    found.append(block)
                    break
    return (found[0], found[1]) if len(found) == 2 else None


def product_for(
    how: How, inputs: int, outputs: int, *, exact: bool, group: int = 1, ordered: bool = False
) -> "StoredProduct | None":
    """The product with a matrix; None where there are no kernels, or none with torch's bits.

    There is one of each kind, so asking for it in each pass costs a look-up.

    Args:
        how: the matrix lies.
        inputs: I.
        outputs: O.
        exact: torch is given whole tiles of rows, or matrix registers multiply.
        group: as of `StoredProduct`.
        ordered: as of `StoredProduct`.
    """
    blocks = None
    if not (exact and multiplies_in_registers(inputs, outputs)):
        blocks = blocks_of(inputs, outputs, tiles=exact)
        if blocks is None:
            return None
    return _kept(how, inputs, outputs, blocks, group=group, ordered=ordered)


@cache
def _trouble() -> str:
    return assembling.trouble(lambda: _kernel(How.PLAIN, False, False))


class StoredProduct:
    """The product of rows with a matrix whose parts are given anew each time.

    Args:
        how: the matrix lies.
        inputs: I.
        outputs: O.
        blocks: inputs that are added up before their sum is added to the total, for one row and
            for more (`blocks_of`); None: all are, in matrix registers.
        group: inputs that share a scale and a zero point; in 12 bits the weights of a piece.
        ordered: inputs are in any order; `index` says which group each is of.

    Attributes:
        kernel: which it is, as others may be with it (`multiply_all`).
    """

    def __init__(
        self,
        how: How,
        inputs: int,
        outputs: int,
        blocks: tuple[int, int] | None,
        *,
        group: int = 1,
        ordered: bool = False,
    ) -> None:
        self.kernel = how, ordered, blocks is None
        self._inputs, self._outputs = inputs, outputs
        if blocks is None:
            assert not registers.problem()  # which asks the system for them
            step = math.lcm(STEP[how], REGISTER_STEP)
            blocks = (-(-_REGISTERS_BLOCK // step) * step,) * 2
        self._blocks = [min(block, inputs) for block in blocks]
        self._group = group

    def __call__(
        self,
        rows: torch.Tensor,
        codes: torch.Tensor,
        bias: torch.Tensor | None,
        scales: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[..., I] in bf16 gives [..., O].

        Args:
            rows: that are multiplied.
            codes: the matrix, without gaps; of one in 12 bits [pieces, FIELDS] int64 (`twelve.py`).
            bias: [O] in bf16.
            scales: [G, O] in fp32.
            zeros: [G, O] in fp32.
            index: [I] int32, the group of each input; of blocks [O], the row of each output.
        """
        rows = rows.contiguous()
        out = rows.new_empty(*rows.shape[:-1], self._outputs)
        into = out.view(-1, self._outputs)
        multiply_all([Task(self, rows, into, codes, bias, scales, zeros, index)])
        return out

    @property
    def lies(self) -> bool:
        """Whether a matrix is multiplied as it lies, with up to `ROWS_LYING` rows at once."""
        return self.kernel == (How.PLAIN, False, True)

    def room_bytes(self, count: int) -> int:
        """What a thread needs for so many rows: these, turned, or a block of a panel and sums."""
        return 2 * self._inputs * count if self.lies else room_bytes(max(self._blocks))

    def record(self, task: "Task", scratch: int, room: int) -> list[int]:
        """What the kernel reads of a task."""
        given = task.rows, task.codes, task.scales, task.zeros, task.index, task.bias, task.out
        places = [0 if part is None else part.data_ptr() for part in given]
        count = task.rows.numel() // self._inputs
        block = self._blocks[count > 1]
        sizes = [self._inputs, self._outputs, count, block, self._group, -(-self._inputs // block)]
        line = task.out.stride(0)
        return [*places, scratch, *sizes, room, line, 0]


@dataclass(frozen=True, slots=True)
class Task:
    """One of several products that are computed at once.

    Attributes:
        product: whose kernel those of all have.
        rows: [n, I] in bf16, without gaps.
        out: [n, O] in bf16 for the result; numbers of a row follow each other.
        codes: this and what follows as a product is called with.
    """

    product: StoredProduct
    rows: torch.Tensor
    out: torch.Tensor
    codes: torch.Tensor
    bias: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    index: torch.Tensor | None = None

    def parts(self) -> Iterator["Task"]:
        """The same for as many rows as the kernel takes at once: a matrix is read again for more.

        That is quicker than to bring panels of it, or to turn more rows than the second cache has.
        """
        if not self.product.lies or self.out.shape[0] <= ROWS_LYING:
            yield self
            return
        all_rows = self.rows.view(-1, self.rows.shape[-1])
        pairs = zip(all_rows.split(ROWS_LYING), self.out.split(ROWS_LYING), strict=True)
        yield from (replace(self, rows=rows, out=out) for rows, out in pairs)


def multiply_all(tasks: Sequence[Task]) -> None:
    """Compute products into their `out`: threads share out the panels of all, waiting once.

    Small products are worth it: threads that wait for each other after every one, and take unlike
    shares of few panels, cost as much as a product of a megabyte does.
    """
    tasks = [part for task in tasks for part in task.parts()]
    kernel = tasks[0].product.kernel
    room = max(task.product.room_bytes(task.out.shape[0]) for task in tasks)
    assert all(task.product.kernel == kernel and task.rows.is_contiguous() for task in tasks)
    rooms = torch.empty(torch.get_num_threads() * room + _LINE_BYTES, dtype=torch.uint8)
    scratch = rooms.data_ptr() + -rooms.data_ptr() % _LINE_BYTES
    words = [len(tasks)]
    for task in tasks:
        words += task.product.record(task, scratch, room)
    batch = (ctypes.c_int64 * len(words))(*words)
    assembling.together(_kernel(*kernel), batch)


_kept = cache(StoredProduct)


class LyingProduct:
    """The product of rows with one matrix in bf16 in matrix registers; a sum never starts again.

    Args:
        weight: [O, I], without gaps.
        bias: [O] in bf16, or None.

    Attributes:
        bias: the same.
        address: of the matrix.
        blocks: none.
    """

    blocks = 0, 0

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        outputs, inputs = weight.shape
        self._weight, self.bias, self.address = weight, bias, weight.data_ptr()
        self._product = _kept(How.PLAIN, inputs, outputs, None)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., I] in bf16 gives [..., O]."""
        return self._product(rows, self._weight, self.bias)


def prepare(how: How, *, ordered: bool = False) -> None:
    """Assemble a kernel now, where there are any: LLVM takes memory for a moment."""
    if not problem() and not _trouble():
        tiles = takes_matrix_registers("bfloat16") and not registers.problem()
        _kernel(how, ordered, tiles)


def room_bytes(block: int) -> int:
    """What a thread needs: a block of a panel in bf16, and sums in fp32."""
    return PANEL * (2 * block + 4 * ROWS_AT_ONCE)


@cache
def _kernel(how: How, ordered: bool, tiles: bool) -> int:
    if tiles and how is How.PLAIN:
        text = registers.DECLARED + registers.lying() + _lying()
    else:
        text = _DECLARED + blocks.DECLARED + _bring(how, ordered)
        text += (registers.tiles() if tiles else _takes()) + _one(tiles)
    text = HEAD + text + registers.finish() + _all(tiles)
    return assembling.assemble(text, ["product"])["product"]


def _bring(how: How, ordered: bool) -> str:
    """Inputs of a block for the outputs of a panel: [pairs, 64, 2] into the scratch."""
    code = Code(f"@bring({_MATRIX}, ptr %scratch, {_SIZES})")

    def put(first: int | str, vectors: Iterable[tuple[int, str]], place: str) -> None:
        pair = code.let(f"lshr i64 {code.let(f'sub i64 {place}, %start')}, 1")
        target = code.at("%scratch", code.plus(code.times(pair, PANEL), first), "i32")
        for number, vector in vectors:
            there = code.at(target, number * PANEL, "i32")
            code.add(f"store {vector}, ptr {there}, align 64")

    def bring(first: int | str) -> None:
        output = code.plus("%output", first)
        ahead = _ahead(code, _LINE_BITS[how], first) if how in _LINE_BITS else "0"
        with code.loop("%start", "%stop", STEP[how]) as place:
            put(first, enumerate(_pairs(code, how, ordered, place, output, ahead)), place)

    if how in blocks.LAYOUTS:  # whose code is long
        with code.loop(0, PANEL, LANES) as first:
            bring(first)
        return code.text()
    for part in range(_PARTS):
        if how is not How.CODED:
            bring(part * LANES)
            continue
        for lines, place in twelve.lines(code, part):
            for half, pairs in zip(zip(*lines, strict=True), twelve.PAIRS, strict=True):
                vectors = (f"{_BITS} {vector}" for vector in turned(code, half))
                put(part * LANES, zip(pairs, vectors, strict=True), place)
    if how is How.CODED:
        twelve.escapes(code)
    return code.text()


def _ahead(code: Code, bits: int, first: int | str) -> str:
    """Bytes to what is brought after the same inputs of these 16 outputs.

    That is those of the next 16, and after the last of a panel the next block of its first.
    """
    within = code.let("sub i64 %stop, %start") if first == PANEL - LANES else "0"
    outputs = LANES - PANEL if first == PANEL - LANES else LANES
    numbers = code.plus(code.times("%inputs", outputs), within)
    return code.let(f"ashr i64 {code.times(numbers, bits)}, 3")


def _pairs(
    code: Code, how: How, ordered: bool, place: str, output: str, ahead: str
) -> Iterator[str]:
    """Vectors of pairs of inputs from `place` on, of outputs from `output` on, with their types."""
    if how is How.PLAIN:
        for vector in turned(code, _lines(code, output, place, 16, ahead)):
            yield f"{_BITS} {vector}"
        return
    if how in blocks.LAYOUTS:
        made = blocks.numbers_of(code, how, place, output, ordered=ordered)
        for one in made:
            yield f"{_PAIR} {_rounded(code, one, next(made))}"
        return
    bits = _CODE_BITS.get(how, 4)
    each = 32 // bits  # inputs of a word
    if how in (How.PACKED4, How.PACKED8):
        words = turned(code, _lines(code, output, place, bits, ahead))
    elif how is How.AWQ:
        each, words = 8, [""]
    else:
        row = code.let(f"udiv i64 {place}, {each}")
        at = code.at("%codes", code.plus(code.times(row, "%outputs"), output), "i32")
        words = [code.let(f"load {_BITS}, ptr {at}, align 4")]
    for number, word in enumerate(words):
        first = code.plus(place, number * each)
        both = None if ordered else _scale(code, code.let(f"udiv i64 {first}, %group"), output)
        numbers = []
        for n in range(each):
            given = both or _scale(code, _group_of(code, first, n), output)
            found = _awq(code, first, n, output) if not word else _code(code, word, n, bits)
            numbers.append(_number(code, found, *given))
        for n in range(0, each, 2):
            yield f"{_PAIR} {_rounded(code, numbers[n], numbers[n + 1])}"


def _lines(code: Code, output: str, place: str, bits: int, ahead: str) -> list[str]:
    """64 bytes of each of 16 outputs, from an input on, of which each has so many bits."""
    found = []
    for lane in range(LANES):
        numbers = code.plus(code.times(code.plus(output, lane), "%inputs"), place)
        at = code.at("%codes", code.let(f"lshr i64 {code.times(numbers, bits)}, 3"), "i8")
        there = code.at(at, ahead, "i8")
        code.add(f"call void @llvm.prefetch.p0(ptr {there}, i32 0, i32 2, i32 1)")
        found.append(code.let(f"load {_BITS}, ptr {at}, align 2"))
    return found


def _group_of(code: Code, first: str, n: int) -> str:
    there = code.at("%index", code.plus(first, n), "i32")
    return code.let(f"sext i32 {code.let(f'load i32, ptr {there}')} to i64")


def _scale(code: Code, group: str, output: str) -> tuple[str, str]:
    """Scales and zero points of 16 outputs."""
    at = code.plus(code.times(group, "%outputs"), output)
    scale, zero = (
        code.let(f"load {WIDE}, ptr {code.at(start, at, 'float')}, align 4")
        for start in ("%scales", "%zeros")
    )
    return scale, zero


def _code(code: Code, word: str, n: int, bits: int) -> str:
    """The n-th code of 16 words."""
    shifted = code.let(f"lshr {_BITS} {word}, splat (i32 {n * bits})") if n else word
    return code.let(f"and {_BITS} {shifted}, splat (i32 {(1 << bits) - 1})")


def _awq(code: Code, first: str, n: int, output: str) -> str:
    """The codes of 16 outputs, two words, for the n-th input from the first on."""
    line = code.times(code.plus(first, n), code.let("udiv i64 %outputs, 8"))
    at = code.at("%codes", code.plus(line, code.let(f"udiv i64 {output}, 8")), "i32")
    two = code.let(f"load <2 x i32>, ptr {at}, align 4")
    spread = mixed(code, two, "poison", [0] * 8 + [1] * 8, "<2 x i32>")
    shifts = ", ".join(f"i32 {4 * _AWQ_CODES[lane % 8]}" for lane in range(LANES))
    shifted = code.let(f"lshr {_BITS} {spread}, <{shifts}>")
    return code.let(f"and {_BITS} {shifted}, splat (i32 15)")


def _number(code: Code, found: str, scale: str, zero: str) -> str:
    number = code.let(f"uitofp {_BITS} {found} to {WIDE}")
    return code.fp("fmul", code.fp("fsub", number, zero), scale)


def _rounded(code: Code, one: str, two: str) -> str:
    """Numbers of two inputs as bf16, of an output one after the other."""
    halves = code.let(f"call {_PAIR} {_ROUND}({WIDE} {two}, {WIDE} {one})")
    order = [at for lane in range(LANES) for at in (lane, LANES + lane)]
    return mixed(code, halves, "poison", order, _PAIR)


def _takes() -> str:
    """Functions `take1` and so on: so many rows times a block, added to their totals."""
    return "".join(_take(count) for count in range(1, _TOGETHER + 1))


def _take(count: int) -> str:
    """The loop keeps sums in registers, so it is written with phis."""
    code = Code(f"@take{count}(ptr %rows, ptr %scratch, ptr %totals, i64 %pairs, i64 %line)")
    places = [(row, part) for row in range(count) for part in range(_PARTS)]
    code.add("br label %inputs")
    code.block("inputs")
    code.add("%pair = phi i64 [0, %entry], [%next, %inputs]")
    for row, part in places:
        code.add(
            f"%sum{row}.{part} = phi {WIDE} [zeroinitializer, %entry], [%new{row}.{part}, %inputs]"
        )
    start = code.times("%pair", PANEL)
    weights = []
    for part in range(_PARTS):
        at = code.at("%scratch", code.plus(start, part * LANES), "i32")
        weights.append(code.let(f"load {_PAIR}, ptr {at}, align 64"))
    for row in range(count):
        at = code.at("%rows", code.plus(code.times("%line", row), "%pair"), "i32")
        number = code.let(f"load i32, ptr {at}, align 4")
        given = code.let(f"bitcast {_BITS} {code.spread(number, 'i32')} to {_PAIR}")
        for part in range(_PARTS):
            code.add(
                f"%new{row}.{part} = call {WIDE} @llvm.x86.avx512bf16.dpbf16ps.512("
                f"{WIDE} %sum{row}.{part}, {_PAIR} {given}, {_PAIR} {weights[part]})"
            )
    code.add("%next = add i64 %pair, 1")
    code.add("%inside = icmp ult i64 %next, %pairs")
    code.add("br i1 %inside, label %inputs, label %added")
    code.block("added")
    for row, part in places:
        at = code.at("%totals", row * PANEL + part * LANES, "float")
        before = code.let(f"load {WIDE}, ptr {at}, align 64")
        after = code.fp("fadd", before, f"%new{row}.{part}")
        code.add(f"store {WIDE} {after}, ptr {at}, align 64")
    return code.text()


def _lying() -> str:
    """The product of up to `ROWS_LYING` rows with a matrix in bf16 as it lies."""
    code = Code("@one(ptr %record)")
    found = dict(zip(_FIELDS.split(), code.fields("%record", _FIELDS), strict=True))
    rows, count, bias = (found[name] for name in ("rows", "n_count", "bias"))
    thread = code.let(f"sext i32 {code.let('call i32 @omp_get_thread_num()')} to i64")
    room = code.at(found["scratch"], code.times(thread, found["n_room"]), "i8")
    pairs = code.let(f"lshr i64 {found['n_inputs']}, 1")
    several = code.let(f"icmp ugt i64 {count}, 1")  # one is as it should be
    with code.when(several):
        code.add(
            f"call void @turn(ptr {rows}, ptr {room}, i64 0, i64 {pairs}, i64 {pairs}, i64 {count})"
        )
    given = code.let(f"select i1 {several}, ptr {room}, ptr {rows}")
    biased = code.let(f"icmp ne ptr {bias}, null")
    panels = code.let(f"udiv i64 {found['n_outputs']}, {PANEL}")
    with code.taken_ahead(code.at("%record", _WORDS - 1, "i64"), panels) as (panel, following):
        output = code.times(panel, PANEL)
        weight = code.at(found["codes"], code.times(output, found["n_inputs"]))
        between = code.let(f"sub i64 {code.let(f'sub i64 {following}, {panel}')}, 1")
        skip = code.times(code.times(between, found["n_inputs"]), 2 * PANEL)
        added = code.let(f"select i1 {biased}, ptr {code.at(bias, output)}, ptr null")
        code.add(
            f"call void @take(ptr {given}, ptr {weight}, ptr {added}, "
            f"ptr {code.at(found['out'], output)}, i64 {pairs}, i64 {found['n_line']}, i64 {skip}, "
            f"i64 {count})"
        )
    return code.text()


def _one(tiles: bool) -> str:
    """One product: panels, one after the other, for all rows."""
    code = Code("@one(ptr %record)")
    found = dict(zip(_FIELDS.split(), code.fields("%record", _FIELDS), strict=True))
    rows, scratch, out, bias = (found[name] for name in ("rows", "scratch", "out", "bias"))
    inputs, outputs, count = (found[f"n_{name}"] for name in ("inputs", "outputs", "count"))
    thread = code.let(f"sext i32 {code.let('call i32 @omp_get_thread_num()')} to i64")
    totals = code.at(scratch, code.times(thread, found["n_room"]), "i8")
    brought = code.at(totals, 4 * PANEL * ROWS_AT_ONCE, "i8")
    line = code.let(f"lshr i64 {inputs}, 1")
    biased = code.let(f"icmp ne ptr {bias}, null")
    panels = code.let(f"udiv i64 {outputs}, {PANEL}")
    taken = code.at("%record", _WORDS - 1, "i64")
    with code.taken(taken, panels) as panel:
        output = code.times(panel, PANEL)
        added = code.let(f"select i1 {biased}, ptr {code.at(bias, output)}, ptr null")
        with code.loop(0, count, ROWS_AT_ONCE) as begin:
            some = code.some(count, begin, ROWS_AT_ONCE)
            with code.loop(0, code.times(some, PANEL), LANES) as place:
                at = code.at(totals, place, "float")
                code.add(f"store {WIDE} zeroinitializer, ptr {at}, align 64")
            with code.loop(0, found["n_blocks"]) as block:
                start = code.times(block, found["n_block"])
                full = code.plus(start, found["n_block"])
                stop = code.let(f"call i64 @llvm.umin.i64(i64 {full}, i64 {inputs})")
                code.add(
                    f"call void @bring(ptr {found['codes']}, ptr {found['scales']}, "
                    f"ptr {found['zeros']}, ptr {found['index']}, ptr {brought}, i64 {start}, "
                    f"i64 {stop}, i64 {output}, i64 {inputs}, i64 {outputs}, "
                    f"i64 {found['n_group']})"
                )
                pairs = code.let(f"lshr i64 {code.let(f'sub i64 {stop}, {start}')}, 1")
                given = (begin, some, LANES if tiles else _TOGETHER)
                _multiply(code, rows, given, (totals, brought), (start, pairs), line)
            with code.loop(0, some) as row:
                sums = code.at(totals, code.times(row, PANEL), "float")
                spot = code.plus(code.times(code.plus(begin, row), found["n_line"]), output)
                code.add(f"call void @finish(ptr {sums}, ptr {added}, ptr {code.at(out, spot)})")
    return code.text()


def _all(tiles: bool) -> str:
    """Products, one after the other."""
    code = Code("@product(ptr %batch)", internal=False)
    (count,) = code.fields("%batch", "n_tasks")
    with code.loop(0, count) as task:
        record = code.at("%batch", code.plus(code.times(task, _WORDS), 1), "i64")
        code.add(f"call void @one(ptr {record})")
    if tiles:
        code.add(registers.RELEASE)
    return code.text()


def _multiply(
    code: Code,
    rows: str,
    some: tuple[str, str, int],
    room: tuple[str, str],
    block: tuple[str, str],
    line: str,
) -> None:
    """All rows of some, so many in a call, times a block that was brought."""
    (begin, count, at_once), (totals, brought), (start, pairs) = some, room, block
    with code.loop(0, count, at_once) as row:
        taking = code.some(count, row, at_once)
        skipped = code.times(code.times(code.plus(begin, row), line), 2)
        given = code.at(rows, code.plus(skipped, start))
        sums = code.at(totals, code.times(row, PANEL), "float")
        parts = f"ptr {given}, ptr {brought}, ptr {sums}, i64 {pairs}, i64 {line}"
        if at_once == LANES:
            code.add(f"call void @tiles({parts}, i64 {taking})")
        for number in range(1, at_once + 1) if at_once == _TOGETHER else ():
            with code.when(code.let(f"icmp eq i64 {taking}, {number}")):
                code.add(f"call void @take{number}({parts})")
