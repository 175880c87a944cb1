"""bf16 weights in 12 bits, decoded into registers on their way into a product (`stored.py`).

A weight's code is looked up in a table of its piece: 64 weights an instruction. The high bytes of
escapes are put into the scratch once the block lies there. What pieces are: `planes.py` in
`model/formats`, which describes them to the kernel, a record of `FIELDS` numbers for each:

    0-4    addresses of low bytes, codes, starts, places, high bytes
    5      weights in it
    6      0; the kernel leaves there a place that is none, plus one
    7      unused
    8-15   16 bytes four times: what the codes stand for

Starts are int32, for each group of 65,536 weights which of the piece's escapes is its first, and
how many there are.
"""

from collections.abc import Iterator, Sequence

from offload_rt.kernels.code import LANES, Code

FIELDS = 16
FOUND = 6  # the field that the kernel writes
STEP = 64  # weights of a line that are taken at once
# Which pairs of inputs are in the halves of what a line becomes (`_Record.line`).
PAIRS = tuple(tuple(8 * (n // 4) + 4 * half + n % 4 for n in range(LANES)) for half in (0, 1))
DECLARED = "declare <64 x i8> @llvm.x86.avx512.pshuf.b.512(<64 x i8>, <64 x i8>)\n"
_PANEL = 64  # outputs
_RECORD_BYTES = 8 * FIELDS
_TABLE = 8
_BITS = f"<{LANES} x i32>"
_WORDS, _BYTES = "<32 x i16>", "<64 x i8>"


def lines(code: Code, part: int) -> Iterator[tuple[list[tuple[str, str]], str]]:
    """Write loops that take 64 inputs of 16 outputs after the other.

    Args:
        code: inside `bring` of `stored.py`.
        part: of a panel.

    Yields:
        inside of each loop 16 times 64 weights (`line`), and the place of the first input.
    """
    origin = code.times(code.plus("%output", part * LANES), "%inputs")
    last = code.plus(code.plus(origin, code.times("%inputs", LANES - 1)), code.plus("%stop", -1))
    piece, other = (
        code.let(f"udiv i64 {weight}, %group") for weight in (code.plus(origin, "%start"), last)
    )
    record = _Record(code, piece)
    with code.when(code.let(f"icmp eq i64 {piece}, {other}")):
        origin_here = code.let(f"sub i64 {origin}, {record.first}")
        with code.loop("%start", "%stop", STEP) as place:
            there = code.plus(origin_here, place)
            weights = [code.plus(there, code.times("%inputs", lane)) for lane in range(LANES)]
            _fetch(code, record, part, place, weights)
            yield [record.line(weight) for weight in weights], place
    with (
        code.when(code.let(f"icmp ne i64 {piece}, {other}")),
        code.loop("%start", "%stop", STEP) as place,
    ):
        found = []
        for lane in range(LANES):
            weight = code.plus(code.plus(origin, place), code.times("%inputs", lane))
            each = _Record(code, code.let(f"udiv i64 {weight}, %group"))
            found.append(each.line(code.let(f"sub i64 {weight}, {each.first}")))
        yield found, place


def _fetch(code: Code, record: "_Record", part: int, place: str, weights: Sequence[str]) -> None:
    """Fetch the lines that come next: those of the next part, or of the next block."""
    ahead = code.times("%inputs", LANES)
    if part == _PANEL // LANES - 1:
        back = code.times("%inputs", LANES - _PANEL)
        more = code.plus(back, code.let("sub i64 %stop, %start"))
        inside = code.let("icmp ult i64 %stop, %inputs")
        other = code.let(f"sub i64 {ahead}, %start")
        ahead = code.let(f"select i1 {inside}, i64 {more}, i64 {other}")
    for start, shift in ((record.low, 0), (record.codes, 1)):
        for weight in weights:
            place = code.let(f"ashr i64 {code.plus(weight, ahead)}, {shift}")
            there = code.at(start, place, "i8")
            code.add(f"call void @llvm.prefetch.p0(ptr {there}, i32 0, i32 2, i32 1)")


class _Record:
    """What is known of a piece, loaded."""

    def __init__(self, code: Code, piece: str) -> None:
        self._code = code
        self.address = code.at("%codes", code.times(piece, _RECORD_BYTES), "i8")
        self.first = code.times(piece, "%group")
        self.low, self.codes = code.fields(self.address, "low codes")
        table = code.at(self.address, _TABLE, "i64")
        self.table = code.let(f"load {_BYTES}, ptr {table}, align 8")

    def line(self, weight: str) -> tuple[str, str]:
        """64 weights, from one of the piece on: pairs `PAIRS[0]`, and pairs `PAIRS[1]`."""
        code = self._code
        low = code.let(f"load {_BYTES}, ptr {code.at(self.low, weight, 'i8')}, align 1")
        half = code.let(f"lshr i64 {weight}, 1")
        two = code.let(f"load <32 x i8>, ptr {code.at(self.codes, half, 'i8')}, align 1")
        wide = code.let(f"zext <32 x i8> {two} to {_WORDS}")
        shifted = code.let(f"shl {_WORDS} {wide}, splat (i16 4)")  # the high code to the high byte
        both = code.let(f"or {_WORDS} {wide}, {shifted}")
        apart = code.let(f"and {_WORDS} {both}, splat (i16 {0x0F0F})")
        codes = code.let(f"bitcast {_WORDS} {apart} to {_BYTES}")
        high = code.let(
            f"call {_BYTES} @llvm.x86.avx512.pshuf.b.512({_BYTES} {self.table}, {_BYTES} {codes})"
        )
        made = []
        for start in (0, 8):  # halves of each 16 bytes: so it is one instruction
            places = [lane + start + n for lane in range(0, 64, 16) for n in range(8)]
            order = ", ".join(f"i32 {at}" for n in places for at in (n, 64 + n))
            mixed = code.let(f"shufflevector {_BYTES} {low}, {_BYTES} {high}, <64 x i32> <{order}>")
            made.append(code.let(f"bitcast {_BYTES} {mixed} to {_BITS}"))
        return made[0], made[1]


def escapes(code: Code) -> None:
    """Write what puts the high bytes of a block's escapes into the scratch."""
    begin = code.times("%output", "%inputs")
    numbers = code.times("%inputs", _PANEL)
    end = code.plus(begin, numbers)
    length = code.let("sub i64 %stop, %start")
    part = code.plus(code.let(f"udiv i64 {2**44}, %inputs"), 1)
    after = code.plus(code.let(f"udiv i64 {code.plus(end, -1)}, %group"), 1)
    with code.loop(code.let(f"udiv i64 {begin}, %group"), after) as piece:
        record = code.at("%codes", code.times(piece, _RECORD_BYTES), "i8")
        names = "low codes starts places high n_weights"
        _, _, starts, places, high, weights = code.fields(record, names)
        first = code.times(piece, "%group")
        low = code.let(f"call i64 @llvm.usub.sat.i64(i64 {begin}, i64 {first})")
        top = code.let(f"sub i64 {end}, {first}")
        top = code.let(f"call i64 @llvm.umin.i64(i64 {top}, i64 {weights})")
        group = code.let(f"lshr i64 {low}, 16")
        behind = code.plus(code.let(f"lshr i64 {code.plus(top, -1)}, 16"), 1)
        with code.loop(group, behind) as number:
            here = code.at(starts, number, "i32")
            one, two = (
                code.let(f"zext i32 {code.let(f'load i32, ptr {at}')} to i64")
                for at in (here, code.at(here, 1, "i32"))
            )
            origin = code.let(f"shl i64 {number}, 16")
            with code.loop(one, two) as escape:
                word = code.let(f"load i16, ptr {code.at(places, escape)}, align 1")
                at = code.plus(code.let(f"zext i16 {word} to i64"), origin)
                with code.when(code.let(f"icmp uge i64 {at}, {weights}")):
                    found = code.at(record, FOUND, "i64")
                    code.add(f"store i64 {code.plus(at, 1)}, ptr {found}")
                weight = code.let(f"sub i64 {code.plus(at, first)}, {begin}")
                with code.when(code.let(f"icmp ult i64 {weight}, {numbers}")):
                    line = code.let(f"lshr i64 {code.times(weight, part)}, 44")
                    column = code.let(f"sub i64 {weight}, {code.times(line, '%inputs')}")
                    place = code.let(f"sub i64 {column}, %start")
                    with code.when(code.let(f"icmp ult i64 {place}, {length}")):
                        pair = code.times(code.let(f"lshr i64 {place}, 1"), _PANEL)
                        spot = code.let(f"shl i64 {code.plus(pair, line)}, 1")
                        spot = code.plus(spot, code.let(f"and i64 {place}, 1"))
                        byte = code.let(f"load i8, ptr {code.at(high, escape, 'i8')}")
                        there = code.at(code.at("%scratch", spot), 1, "i8")
                        code.add(f"store i8 {byte}, ptr {there}")
