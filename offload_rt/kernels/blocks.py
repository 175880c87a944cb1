"""Blocks of GGUF as numbers of 16 outputs at once, for `stored.py`; layouts: ggml-common.h.

Words of the blocks of 16 outputs are turned, so that a register has a word of each. A code times
its scale is exact in fp32; what a block adds or takes away is rounded once, as torch does
(`model/formats/ggml.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from offload_rt.kernels.code import LANES, WIDE, Code, turned

_WORDS = f"<{LANES} x i32>"
_HALVES = f"<{LANES} x half>"
_SUB = 32  # numbers that share a scale in Q4_K and Q5_K
_WORD_BYTES = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """How a block lies.

    Attributes:
        numbers: of it.
        nbytes: of it.
    """

    numbers: int
    nbytes: int


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "q4_0": Layout(32, 18),
        "q4_1": Layout(32, 20),
        "q5_0": Layout(32, 22),
        "q5_1": Layout(32, 24),
        "q8_0": Layout(32, 34),
        "q2_k": Layout(256, 84),
        "q3_k": Layout(256, 110),
        "q4_k": Layout(256, 144),
        "q5_k": Layout(256, 176),
        "q6_k": Layout(256, 210),
        "iq4_nl": Layout(32, 18),
        "iq4_xs": Layout(256, 136),
        "block_mxfp4": Layout(32, 17),
    }
)
LOOK_UP = "@llvm.x86.avx512.permvar.sf.512"
DECLARED = f"declare {WIDE} {LOOK_UP}({WIDE}, {_WORDS})\n"
# Of IQ4; and FP4 (E2M1), times two.
UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def numbers_of(code: Code, form: str, place: str, output: str, *, ordered: bool) -> Iterator[str]:
    """Write how the numbers of a block are made.

    Args:
        code: with `%codes`, the rows of blocks, `%inputs`, and `%index` [O] int32, the row of each
            output.
        form: a key of `LAYOUTS`.
        place: first input, at which a block begins.
        output: first of 16 outputs.
        ordered: rows are those of `%index`, else those of the outputs.

    Yields:
        <16 x float> of each input, in order.
    """
    block = _Block(code, LAYOUTS[form], place, output, ordered=ordered)
    if form == "q8_0":
        yield from _eights(block)
    elif form in ("iq4_nl", "block_mxfp4"):
        yield from _looked_up(block, mxfp4=form == "block_mxfp4")
    elif form == "iq4_xs":
        yield from _looked_up_k(block)
    elif form == "q2_k":
        yield from _two(block)
    elif form == "q3_k":
        yield from _three(block)
    elif form == "q6_k":
        yield from _six(block)
    elif form in ("q4_k", "q5_k"):
        yield from _subs(block, fifth=form == "q5_k")
    else:
        yield from _fours(block, raised=form.endswith("1"), fifth=form.startswith("q5"))


class _Block:
    """The blocks of 16 outputs, and what is done with their words."""

    def __init__(
        self, code: Code, layout: Layout, place: str, output: str, *, ordered: bool
    ) -> None:
        self._code = code
        line = code.times(code.let(f"udiv i64 %inputs, {layout.numbers}"), layout.nbytes)
        start = code.times(code.let(f"udiv i64 {place}, {layout.numbers}"), layout.nbytes)
        self._starts = []
        for lane in range(LANES):
            row = code.plus(output, lane)
            if ordered:
                there = code.let(f"load i32, ptr {code.at('%index', row, 'i32')}")
                row = code.let(f"sext i32 {there} to i64")
            self._starts.append(code.at("%codes", code.plus(code.times(row, line), start), "i8"))

    def words(self, offset: int, count: int) -> list[str]:
        """Words of each block from a byte on, up to LANES."""
        code, rows = self._code, []
        for start in self._starts:
            kind = f"<{count} x i32>"
            row = code.let(f"load {kind}, ptr {code.at(start, offset, 'i8')}, align 1")
            if count < LANES:
                lanes = ", ".join(
                    f"i32 {lane if lane < count else 'poison'}" for lane in range(LANES)
                )
                row = code.let(f"shufflevector {kind} {row}, {kind} poison, {_WORDS} <{lanes}>")
            rows.append(row)
        return turned(code, rows)[:count]

    def half(self, word: str, *, high: bool = False) -> str:
        """The fp16 number in a half of a word, as fp32."""
        code = self._code
        shifted = code.let(f"lshr {_WORDS} {word}, splat (i32 16)") if high else word
        short = code.let(f"trunc {_WORDS} {shifted} to <{LANES} x i16>")
        half = code.let(f"bitcast <{LANES} x i16> {short} to {_HALVES}")
        return code.let(f"fpext {_HALVES} {half} to {WIDE}")

    def bits(self, words: Sequence[str], byte: int, shift: int, count: int, to: int = 0) -> str:
        """So many bits of a byte from one on, moved up."""
        code, word = self._code, words[byte // _WORD_BYTES]
        right = 8 * (byte % _WORD_BYTES) + shift - to
        if right:
            word = code.let(
                f"{'lshr' if right > 0 else 'shl'} {_WORDS} {word}, splat (i32 {abs(right)})"
            )
        return code.let(f"and {_WORDS} {word}, splat (i32 {((1 << count) - 1) << to})")

    def signed(self, words: Sequence[str], byte: int) -> str:
        """A byte with its sign, as fp32."""
        code, word = self._code, words[byte // _WORD_BYTES]
        left = 24 - 8 * (byte % _WORD_BYTES)
        if left:
            word = code.let(f"shl {_WORDS} {word}, splat (i32 {left})")
        return self.whole(code.let(f"ashr {_WORDS} {word}, splat (i32 24)"))

    def picked(self, numbers: Sequence[int], index: str) -> str:
        """Numbers of a table of 16, of which each lane takes that at its index."""
        table = ", ".join(f"float {float(number)}" for number in numbers)
        return self._code.let(f"call {WIDE} {LOOK_UP}({WIDE} <{table}>, {_WORDS} {index})")

    def power(self, word: str) -> str:
        """Half of the power of two that a word's lowest byte is the exponent of, as FP32's."""
        code = self._code
        byte = code.let(f"and {_WORDS} {word}, splat (i32 255)")
        small = code.let(f"icmp ult {_WORDS} {byte}, splat (i32 2)")
        tiny = code.let(f"shl {_WORDS} splat (i32 2097152), {byte}")
        less = code.let(f"sub {_WORDS} {byte}, splat (i32 1)")
        large = code.let(f"shl {_WORDS} {less}, splat (i32 23)")
        bits = code.let(f"select <{LANES} x i1> {small}, {_WORDS} {tiny}, {_WORDS} {large}")
        return code.let(f"bitcast {_WORDS} {bits} to {WIDE}")

    def either(self, one: str, other: str) -> str:
        """The bits of both."""
        return self._code.let(f"or {_WORDS} {one}, {other}")

    def whole(self, word: str, zero: int = 0) -> str:
        """Whole numbers less a zero point, as fp32."""
        code = self._code
        less = code.let(f"sub {_WORDS} {word}, splat (i32 {zero})") if zero else word
        return code.let(f"sitofp {_WORDS} {less} to {WIDE}")

    def fp(self, operation: str, one: str, other: str) -> str:
        """`fadd`, `fmul`, `fsub`."""
        return self._code.fp(operation, one, other)


def _fours(block: _Block, *, raised: bool, fifth: bool) -> Iterator[str]:
    """Q4_0, Q4_1, Q5_0, Q5_1: a scale, an offset, 32 fifth bits, 16 bytes of two codes."""
    (first,) = block.words(0, 1)
    scale, offset = block.half(first), block.half(first, high=True) if raised else ""
    head = 4 if raised else 2
    high = block.words(head, 1) if fifth else []
    codes = block.words(head + 4 * fifth, 4)
    zero = 0 if raised else 16 if fifth else 8
    for n in range(32):
        number = block.bits(codes, n % 16, 4 * (n // 16), 4)
        if fifth:
            number = block.either(number, block.bits(high, n // 8, n % 8, 1, to=4))
        number = block.fp("fmul", block.whole(number, zero), scale)
        yield block.fp("fadd", number, offset) if raised else number


def _eights(block: _Block) -> Iterator[str]:
    """Q8_0: a scale, 32 signed bytes."""
    scale = block.half(block.words(0, 1)[0])
    codes = block.words(2, 8)
    for n in range(32):
        yield block.fp("fmul", block.signed(codes, n), scale)


def _subs(block: _Block, *, fifth: bool) -> Iterator[str]:
    """Q4_K and Q5_K: a scale of scales and one of offsets, 6 bits of each, codes."""
    head = block.words(0, 4)
    scale, less = block.half(head[0]), block.half(head[0], high=True)
    low, high, last = ([word] for word in head[1:])
    fifths = block.words(16, 8) if fifth else []
    start = 48 if fifth else 16
    for sub in range(8):
        if sub < 4:
            parts = block.bits(low, sub, 0, 6), block.bits(high, sub, 0, 6)
        else:
            at = sub - 4
            parts = (
                block.either(block.bits(last, at, 0, 4), block.bits(low, at, 6, 2, to=4)),
                block.either(block.bits(last, at, 4, 4), block.bits(high, at, 6, 2, to=4)),
            )
        own = block.fp("fmul", scale, block.whole(parts[0]))
        offset = block.fp("fmul", less, block.whole(parts[1]))
        if sub % 4 == 0:
            codes = block.words(start + 16 * sub, 16)  # of four sub-blocks
        for n in range(_SUB):
            number = block.bits(codes, sub % 4 // 2 * _SUB + n, 4 * (sub % 2), 4)
            if fifth:
                number = block.either(number, block.bits(fifths, n, sub, 1, to=4))
            product = block.fp("fmul", block.whole(number), own)
            yield block.fp("fsub", product, offset)


def _looked_up(block: _Block, *, mxfp4: bool) -> Iterator[str]:
    """IQ4_NL and MXFP4: a scale, 16 bytes of two indices into a table."""
    (first,) = block.words(0, 1)
    scale = block.power(first) if mxfp4 else block.half(first)
    codes = block.words(1 if mxfp4 else 2, 4)
    for n in range(32):
        number = block.picked(
            DOUBLED if mxfp4 else UNEVEN, block.bits(codes, n % 16, 4 * (n // 16), 4)
        )
        yield block.fp("fmul", number, scale)


def _looked_up_k(block: _Block) -> Iterator[str]:
    """IQ4_XS: a scale, 6 bits of signed ones of sub-blocks, bytes of two indices into a table."""
    head = block.words(0, 2)
    scale = block.half(head[0])
    for sub in range(8):
        if sub % 4 == 0:
            codes = block.words(8 + 16 * sub, 16)
        high = block.bits(head, 2 + sub // 4, 2 * (sub % 4), 2, to=4)
        own = block.either(block.bits(head, 4 + sub // 2, 4 * (sub % 2), 4), high)
        product = block.fp("fmul", scale, block.whole(own, 32))
        for n in range(_SUB):
            index = block.bits(codes, 16 * (sub % 4) + n % 16, 4 * (n // 16), 4)
            yield block.fp("fmul", block.picked(UNEVEN, index), product)


def _two(block: _Block) -> Iterator[str]:
    """Q2_K: bytes of a sub-scale and a sub-offset, 64 of four codes, and what scales those."""
    (last,) = block.words(80, 1)
    scale, less = block.half(last), block.half(last, high=True)
    scales = block.words(0, 4)
    for n in range(256):
        if n % 128 == 0:
            codes = block.words(16 + n // 4, 8)
        if n % 16 == 0:
            own = block.fp("fmul", scale, block.whole(block.bits(scales, n // 16, 0, 4)))
            offset = block.fp("fmul", less, block.whole(block.bits(scales, n // 16, 4, 4)))
        number = block.whole(block.bits(codes, n % 32, n % 128 // 32 * 2, 2))
        yield block.fp("fsub", block.fp("fmul", number, own), offset)


def _three(block: _Block) -> Iterator[str]:
    """Q3_K: third bits, 64 bytes of four codes, 6 bits of signed sub-scales, and their scale."""
    third, last = block.words(0, 8), block.words(94, 4)  # two bytes early, to end with the block
    scale = block.half(last[3], high=True)
    for n in range(256):
        if n % 128 == 0:
            codes = block.words(32 + n // 4, 8)
        if n % 16 == 0:
            sub = n // 16
            low = block.bits(last, 2 + sub % 8, 4 * (sub // 8), 4)
            high = block.bits(last, 10 + sub % 4, 2 * (sub // 4), 2, to=4)
            own = block.fp("fmul", scale, block.whole(block.either(low, high), 32))
        number = block.either(
            block.bits(codes, n % 32, n % 128 // 32 * 2, 2),
            block.bits(third, n % 32, n // 32, 1, to=2),
        )
        yield block.fp("fmul", block.whole(number, 4), own)


def _six(block: _Block) -> Iterator[str]:
    """Q6_K: low halves, high bits, signed scales, and a scale of them."""
    scale = block.half(block.words(206, 1)[0], high=True)
    scales, high = block.words(192, 4), block.words(128, 16)
    for part in range(2):
        codes = block.words(64 * part, 16)
        for n in range(128):
            if n % 16 == 0:
                own = block.fp("fmul", scale, block.signed(scales, 8 * part + n // 16))
            number = block.either(
                block.bits(codes, n % 64, 4 * (n // 64), 4),
                block.bits(high, 32 * part + n % 32, n // 32 * 2, 2, to=4),
            )
            yield block.fp("fmul", block.whole(number, 32), own)
