"""Kernels that dequantise on a GPU, in Triton's language: a weight at once, bit for bit as torch.

Each program makes a block of the weight [O, I]: the difference of code and zero point is exact, the
product with the scale is rounded to fp32 and then to the number format of the computation, to the
nearest, ties to even. bf16 is rounded by whole numbers and stored as words, as Triton's
interpreter would cut it off, in which tests run these kernels without a GPU.

Importing this module needs triton (`offload_rt/model/formats/on_gpu.py` asks for it).
"""

import triton
import triton.language as tl

AWQ, GPTQ, PACKED = 0, 1, 2  # orders of integers
FP8, INT8 = 0, 1  # numbers of a byte
ROWS, COLUMNS = 32, 64  # of a block
LINES, LINE = 8, 256  # outputs and inputs of a block where the weight is in blocks of GGUF
WEIGHTS = 1024  # in codes, of a block; in nested planes it is one that counts by itself
GROUP = 65536  # weights of such a group
ESCAPES = 256  # that are put in at once
BF16, FP16, FP32 = 0, 1, 2  # number formats of the computation


@triton.jit
def _store(place, value, mask, kind: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    if kind == 0:
        bits = value.to(tl.uint32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        words = tl.where(value == value, near, 0x7FC0)
        tl.store(place, words.to(tl.uint16), mask=mask)
    elif kind == 1:
        tl.store(place, value.to(tl.float16), mask=mask)
    else:
        tl.store(place, value, mask=mask)


@triton.jit
def integers(  # type: ignore[no-untyped-def] # noqa: ANN201, PLR0913
    codes,  # noqa: ANN001
    zeros,  # noqa: ANN001
    scales,  # noqa: ANN001
    index,  # noqa: ANN001
    out,  # noqa: ANN001
    outputs,  # noqa: ANN001
    inputs,  # noqa: ANN001
    groups,  # noqa: ANN001
    group,  # noqa: ANN001
    code_words,  # noqa: ANN001
    zero_words,  # noqa: ANN001
    less,  # noqa: ANN001
    order: tl.constexpr,
    bits: tl.constexpr,
    has_zeros: tl.constexpr,
    has_index: tl.constexpr,
    kind: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Integers of 2, 4 and 8 bits in words of 32, of AWQ, GPTQ and compressed-tensors.

    AWQ: codes [I, O/8], eight outputs a word in the order 0 4 1 5 2 6 3 7; zeros alike; scales
    [G, O]. GPTQ: codes [I b/32, O]; zeros [G, O b/32], `less` is added; scales [G, O].
    compressed-tensors: codes [O, I b/32], zeros [O b/32, G] or the middle `less`; scales [O, G].
    """
    each: tl.constexpr = 32 // bits
    top: tl.constexpr = (1 << bits) - 1
    o = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    i = tl.program_id(1).to(tl.int64) * columns + tl.arange(0, columns)[None, :]
    mask = (o < outputs) & (i < inputs)
    if has_index:  # noqa: SIM108 - a choice of Triton's compiler
        g = tl.load(index + i, mask=i < inputs, other=0).to(tl.int64)
    else:
        g = i // group
    if order == 0:
        nibble = ((o & 1) * 4 + ((o & 7) >> 1)) * 4
        word = tl.load(codes + i * code_words + (o >> 3), mask=mask, other=0)
        code = (word >> nibble) & 15
        word = tl.load(zeros + g * zero_words + (o >> 3), mask=mask, other=0)
        zero = (word >> nibble) & 15
        scale = tl.load(scales + g * outputs + o, mask=mask, other=0)
    elif order == 1:
        word = tl.load(codes + (i // each) * outputs + o, mask=mask, other=0)
        code = (word >> ((i % each) * bits)) & top
        word = tl.load(zeros + g * zero_words + o // each, mask=mask, other=0)
        zero = ((word >> ((o % each) * bits)) & top) + less
        scale = tl.load(scales + g * outputs + o, mask=mask, other=0)
    else:
        word = tl.load(codes + o * code_words + i // each, mask=mask, other=0)
        code = (word >> ((i % each) * bits)) & top
        if has_zeros:
            word = tl.load(zeros + (o // each) * groups + g, mask=mask, other=0)
            zero = (word >> ((o % each) * bits)) & top
        else:
            zero = less
        scale = tl.load(scales + o * groups + g, mask=mask, other=0)
    value = (code - zero).to(tl.float32) * scale.to(tl.float32)
    _store(out + o * inputs + i, value, mask, kind)


@triton.jit
def grid(  # type: ignore[no-untyped-def] # noqa: ANN201, PLR0913
    codes,  # noqa: ANN001
    zeros,  # noqa: ANN001
    scales,  # noqa: ANN001
    out,  # noqa: ANN001
    outputs,  # noqa: ANN001
    inputs,  # noqa: ANN001
    groups,  # noqa: ANN001
    block_outputs,  # noqa: ANN001
    block_inputs,  # noqa: ANN001
    number: tl.constexpr,
    has_zeros: tl.constexpr,
    kind: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Numbers of a byte, FP8 (E4M3) or int8, [O, I], with a scale for each block."""
    o = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    i = tl.program_id(1).to(tl.int64) * columns + tl.arange(0, columns)[None, :]
    mask = (o < outputs) & (i < inputs)
    byte = tl.load(codes + o * inputs + i, mask=mask, other=0).to(tl.int32)
    if number == 0:
        exponent = (byte >> 3) & 15
        mantissa = byte & 7
        normal = ((exponent + 120) << 23) | (mantissa << 20)
        tiny = mantissa.to(tl.float32) * 0.001953125  # 2^-9
        size = tl.where(exponent == 0, tiny, normal.to(tl.float32, bitcast=True))
        value = tl.where((byte & 128) != 0, -size, size)
        value = tl.where((byte & 127) == 127, float("nan"), value)
    else:
        value = (byte - ((byte & 128) << 1)).to(tl.float32)
    place = (o // block_outputs) * groups + i // block_inputs
    if has_zeros:
        value -= tl.load(zeros + place, mask=mask, other=0).to(tl.float32)
    value *= tl.load(scales + place, mask=mask, other=0).to(tl.float32)
    _store(out + o * inputs + i, value, mask, kind)


@triton.jit
def fours(  # type: ignore[no-untyped-def] # noqa: ANN201, PLR0913
    codes,  # noqa: ANN001
    scales,  # noqa: ANN001
    out,  # noqa: ANN001
    outputs,  # noqa: ANN001
    inputs,  # noqa: ANN001
    groups,  # noqa: ANN001
    group,  # noqa: ANN001
    kind: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """FP4 (E2M1) [O, I / 2], low nibble first, with scales [O, G] in fp32."""
    o = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    i = tl.program_id(1).to(tl.int64) * columns + tl.arange(0, columns)[None, :]
    mask = (o < outputs) & (i < inputs)
    pair = tl.load(codes + o * (inputs // 2) + (i >> 1), mask=mask, other=0).to(tl.int32)
    code = (pair >> ((i & 1) * 4).to(tl.int32)) & 15
    exponent = (code >> 1) & 3
    half = code & 1
    normal = ((exponent + 126) << 23) | (half << 22)
    size = tl.where(exponent == 0, half.to(tl.float32) * 0.5, normal.to(tl.float32, bitcast=True))
    value = tl.where((code & 8) != 0, -size, size)
    value *= tl.load(scales + o * groups + i // group, mask=mask, other=0)
    _store(out + o * inputs + i, value, mask, kind)


@triton.jit
def _byte(place, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    return tl.load(place, mask=mask, other=0).to(tl.int32)


@triton.jit
def _half(place, mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """The fp16 number at any byte, as fp32."""
    word = _byte(place, mask) | (_byte(place + 1, mask) << 8)
    return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _picked(index, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """One of 16 signed bytes, of which each word has four."""
    word = tl.where(index < 8, tl.where(index < 4, a, b), tl.where(index < 12, c, d))
    left = word.to(tl.int32) << ((3 - (index & 3)) * 8)
    return (left >> 24).to(tl.float32)


@triton.jit
def _row(o, head):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """The row in the file of an output: those of a head's halves lie by turns."""
    place = o % head
    return o - place + place % (head // 2) * 2 + place // (head // 2)


@triton.jit
def blocks(  # type: ignore[no-untyped-def] # noqa: ANN201, PLR0913
    codes,  # noqa: ANN001
    out,  # noqa: ANN001
    outputs,  # noqa: ANN001
    inputs,  # noqa: ANN001
    head,  # noqa: ANN001
    nbytes: tl.constexpr,
    start: tl.constexpr,
    zero: tl.constexpr,
    paired: tl.constexpr,
    fifth: tl.constexpr,
    raised: tl.constexpr,
    power: tl.constexpr,
    table: tl.constexpr,
    a: tl.constexpr,
    b: tl.constexpr,
    c: tl.constexpr,
    d: tl.constexpr,
    kind: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Blocks of GGUF of 32 numbers (`ggml.py` has their layouts), [O, bytes of a row].

    Args:
        codes: the bytes.
        out: [O, I].
        outputs: O.
        inputs: I.
        head: outputs of a head, where `paired`.
        nbytes: of a block.
        start: of its codes; 34 bytes have one each, others two.
        zero: point.
        paired: rows are in the order of `_row`.
        fifth: bits of codes lie before them.
        raised: an offset follows the scale.
        power: the scale is the exponent of one of two.
        table: codes are looked up in one of a, b, c and d.
        a: its first four numbers, a byte each.
        b: the next four.
        c: then.
        d: and last.
        kind: number format of `out`.
        rows: of a program.
        columns: of it, whole blocks.
    """
    o = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None, None]
    first = tl.program_id(1).to(tl.int64) * columns
    block = tl.arange(0, columns // 32)[None, :, None]
    j = tl.arange(0, 32)[None, None, :]
    mask = (o < outputs) & (first + block * 32 < inputs)
    row = _row(o, head) if paired else o
    at = codes + (row * (inputs // 32) + first // 32 + block) * nbytes
    if nbytes == 34:
        code = (_byte(at + start + j, mask) << 24) >> 24
    else:
        code = (_byte(at + start + (j & 15), mask) >> ((j >> 4) * 4)) & 15
    if fifth:
        code |= ((_byte(at + start - 4 + (j >> 3), mask) >> (j & 7)) & 1) << 4
    value = _picked(code, a, b, c, d) if table else (code - zero).to(tl.float32)
    if power:
        exponent = _byte(at, mask)
        bits = tl.where(exponent < 2, 0x00200000 << (exponent & 1), (exponent - 1) << 23)
        value *= bits.to(tl.float32, bitcast=True)
    else:
        value *= _half(at, mask)
    if raised:
        value += _half(at + 2, mask)
    _store(out + o * inputs + first + block * 32 + j, value, mask, kind)


@triton.jit
def super_blocks(  # type: ignore[no-untyped-def] # noqa: ANN201, PLR0913
    codes,  # noqa: ANN001
    out,  # noqa: ANN001
    outputs,  # noqa: ANN001
    inputs,  # noqa: ANN001
    head,  # noqa: ANN001
    nbytes: tl.constexpr,
    form: tl.constexpr,
    paired: tl.constexpr,
    a: tl.constexpr,
    b: tl.constexpr,
    c: tl.constexpr,
    d: tl.constexpr,
    kind: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
):
    """Blocks of GGUF of 256 numbers with scales of sub-blocks; a program one of each of its rows.

    Args:
        codes: the bytes, [O, bytes of a row].
        out: [O, I].
        outputs: O.
        inputs: I.
        head: outputs of a head, where `paired`.
        nbytes: of a block.
        form: 2 to 6 of Q2_K to Q6_K, 0 of IQ4_XS.
        paired: rows are in the order of `_row`.
        a: first four numbers of a table, a byte each.
        b: the next four.
        c: then.
        d: and last.
        kind: number format of `out`.
        rows: of a program.
        width: numbers of a sub-block.
    """
    o = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None, None]
    block = tl.program_id(1).to(tl.int64)
    s = tl.arange(0, 256 // width)[None, :, None]
    n = s * width + tl.arange(0, width)[None, None, :]
    mask = o < outputs
    row = _row(o, head) if paired else o
    at = codes + (row * (inputs // 256) + block) * nbytes
    less = 0.0
    if form == 2:
        both = _byte(at + s, mask)
        code = (_byte(at + 16 + (n >> 7) * 32 + (n & 31), mask) >> ((n >> 5 & 3) * 2)) & 3
        scale = _half(at + 80, mask) * (both & 15).to(tl.float32)
        less = _half(at + 82, mask) * (both >> 4).to(tl.float32)
    elif form == 3:
        code = (_byte(at + 32 + (n >> 7) * 32 + (n & 31), mask) >> ((n >> 5 & 3) * 2)) & 3
        code = (code | (((_byte(at + (n & 31), mask) >> (n >> 5)) & 1) << 2)) - 4
        own = (_byte(at + 96 + (s & 7), mask) >> ((s >> 3) * 4)) & 15
        own |= ((_byte(at + 104 + (s & 3), mask) >> ((s >> 2) * 2)) & 3) << 4
        scale = _half(at + 108, mask) * (own - 32).to(tl.float32)
    elif form == 6:
        half = n >> 7
        code = (_byte(at + half * 64 + (n & 63), mask) >> ((n >> 6 & 1) * 4)) & 15
        high = _byte(at + 128 + half * 32 + (n & 31), mask) >> ((n >> 5 & 3) * 2)
        code = (code | ((high & 3) << 4)) - 32
        own = (_byte(at + 192 + s, mask) << 24) >> 24
        scale = _half(at + 208, mask) * own.to(tl.float32)
    elif form == 0:
        code = (_byte(at + 8 + s * 16 + (n & 15), mask) >> ((n >> 4 & 1) * 4)) & 15
        own = (_byte(at + 4 + (s >> 1), mask) >> ((s & 1) * 4)) & 15
        own |= ((_byte(at + 2 + (s >> 2), mask) >> ((s & 3) * 2)) & 3) << 4
        scale = _half(at, mask) * (own - 32).to(tl.float32)
    else:
        near = s < 4
        low, high = _byte(at + 4 + (s & 3), mask), _byte(at + 8 + (s & 3), mask)
        last = _byte(at + 12 + (s & 3), mask)
        own = tl.where(near, low & 63, (last & 15) | ((low >> 6) << 4))
        scale = _half(at, mask) * own.to(tl.float32)
        own = tl.where(near, high & 63, (last >> 4) | ((high >> 6) << 4))
        less = _half(at + 2, mask) * own.to(tl.float32)
        code = (_byte(at + nbytes - 128 + (s >> 1) * 32 + (n & 31), mask) >> ((s & 1) * 4)) & 15
        if form == 5:
            code |= ((_byte(at + 16 + (n & 31), mask) >> s) & 1) << 4
    number = _picked(code, a, b, c, d) if form == 0 else code.to(tl.float32)
    _store(out + o * inputs + block * 256 + n, number * scale - less, mask, kind)


@triton.jit
def _put(place, word, mask, kind: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """Store a bf16 by its bits: of those that are no number, too."""
    if kind == 0:
        tl.store(place, word.to(tl.uint16), mask=mask)
    else:
        _store(place, (word << 16).to(tl.float32, bitcast=True), mask, kind)


@triton.jit
def coded(  # type: ignore[no-untyped-def] # noqa: ANN201, PLR0913
    data,  # noqa: ANN001
    starts,  # noqa: ANN001
    out,  # noqa: ANN001
    numbers,  # noqa: ANN001
    each,  # noqa: ANN001
    kind: tl.constexpr,
    weights: tl.constexpr,
):
    """bf16 in 12 bits (`planes.py`): all but the high bytes of escapes.

    Args:
        data: bytes of the pieces.
        starts: where they begin, and last where they end.
        out: [numbers].
        numbers: weights.
        each: weights of a piece.
        kind: number format of `out`.
        weights: of a program.
    """
    piece = tl.program_id(0).to(tl.int64)
    count = tl.minimum(each, numbers - piece * each)
    start = tl.load(starts + piece)
    begin, size = data + start, tl.load(starts + piece + 1) - start
    is_coded, base = tl.load(begin) != 0, tl.load(begin + 1).to(tl.int32)
    zero = tl.load(begin + 2).to(tl.int32)
    at = tl.program_id(1) * weights + tl.arange(0, weights)
    mask = at < count
    whole = (count + 63) // 64 * 64
    ours = 64 + tl.where(is_coded, at, 2 * at)  # the low byte
    codes = 64 + whole + (at >> 1)
    low = tl.load(begin + ours, mask=mask & (ours < size), other=0).to(tl.uint32)
    plain = tl.load(begin + ours + 1, mask=mask & (ours + 1 < size), other=0).to(tl.uint32)
    pair = tl.load(begin + codes, mask=mask & is_coded & (codes < size), other=0)
    code = (pair.to(tl.int32) >> ((at & 1) * 4)) & 15
    counted = code & 7
    exponent = tl.where((counted == 0) & (zero != 0), 0, counted + base) & 127
    high = tl.where(is_coded, (exponent | ((code & 8) << 4)).to(tl.uint32), plain)
    _put(out + piece * each + at, low | (high << 8), mask, kind)


@triton.jit
def escapes(  # type: ignore[no-untyped-def] # noqa: ANN201, PLR0913
    data,  # noqa: ANN001
    starts,  # noqa: ANN001
    out,  # noqa: ANN001
    numbers,  # noqa: ANN001
    each,  # noqa: ANN001
    kind: tl.constexpr,
    some: tl.constexpr,
):
    """Put escapes in, behind `coded`; a program those of 65,536 weights.

    What a damaged file says leads to other weights, never outside of the piece or of `out`.
    """
    piece = tl.program_id(0).to(tl.int64)
    count = tl.minimum(each, numbers - piece * each)
    start = tl.load(starts + piece)
    size = tl.load(starts + piece + 1) - start
    begin = data + start
    groups = (count + 65535) // 65536
    at = 64 + (count + 63) // 64 * 64 + ((count + 1) // 2 + 63) // 64 * 64
    mine = tl.program_id(1)
    groups = tl.where((tl.load(begin) != 0) & (at + 4 * groups <= size), groups, 0)
    before, own, whole = 0, 0, 0
    for line in range(0, groups):
        place = begin + at + 4 * line
        few = tl.load(place).to(tl.int32) | (tl.load(place + 1).to(tl.int32) << 8)
        counted = few | (tl.load(place + 2).to(tl.int32) << 16)  # 65,536 at most
        before += tl.where(line < mine, counted, 0)
        own += tl.where(line == mine, counted, 0)
        whole += counted
    places = at + 4 * groups
    highs = places + 2 * whole
    own = tl.minimum(own, tl.maximum(size - places, 0) // 3).to(tl.int32)  # 3 bytes each
    for first in range(0, own, some):
        number = first + tl.arange(0, some)
        nth = (before + number).to(tl.int64)
        mask = (number < own) & (highs + nth < size)
        low = tl.load(begin + places + 2 * nth, mask=mask, other=0).to(tl.int32)
        high = tl.load(begin + places + 2 * nth + 1, mask=mask, other=0).to(tl.int32)
        weight = mine * 65536 + (low | (high << 8))
        mask = mask & (weight < count) & (64 + weight < size)
        byte = tl.load(begin + highs + nth, mask=mask, other=0).to(tl.uint32)
        word = tl.load(begin + 64 + weight, mask=mask, other=0).to(tl.uint32) | (byte << 8)
        _put(out + piece * each + weight, word, mask, kind)


@triton.jit
def _code(data, plane, nth, size, mask, bits: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """Codes of a plane that begins at a byte of a piece, by their numbers in it."""
    place = plane + (nth * bits >> 3)
    code = tl.load(data + place, mask=mask & (place < size), other=0).to(tl.int32)
    if bits == 3:  # that may lie in two bytes
        more = tl.load(data + place + 1, mask=mask & (place + 1 < size), other=0)
        code |= more.to(tl.int32) << 8
    return (code >> (nth * bits & 7)) & ((1 << bits) - 1)


@triton.jit
def nested(  # type: ignore[no-untyped-def] # noqa: ANN201, PLR0913
    data,  # noqa: ANN001
    starts,  # noqa: ANN001
    out,  # noqa: ANN001
    numbers,  # noqa: ANN001
    each,  # noqa: ANN001
    kind: tl.constexpr,
    weights: tl.constexpr,
):
    """bf16 in nested planes (`nested.py`), a block a program; arguments are those of `coded`.

    What a damaged file says leads to other weights, never outside of the piece or of `out`. Places
    in a piece have 32 bits, as adding up those of 64 takes several times as many instructions.
    """
    piece = tl.program_id(0).to(tl.int64)
    count = tl.minimum(each, numbers - piece * each).to(tl.int32)
    start = tl.load(starts + piece)
    begin, size = data + start, (tl.load(starts + piece + 1) - start).to(tl.int32)
    mine, lane = tl.program_id(1), tl.arange(0, weights)
    at = mine * weights + lane
    mask, blocks = at < count, (count + weights - 1) // weights
    is_coded = (tl.load(begin) != 0) & (mine < blocks)
    ours = tl.where(is_coded, 128 + at, 64 + 2 * at)  # the low byte
    low = tl.load(begin + ours, mask=mask & (ours < size), other=0).to(tl.uint32)
    plain = tl.load(begin + ours + 1, mask=mask & (ours + 1 < size), other=0).to(tl.uint32)
    first = 128 + (count + 63) // 64 * 64
    begins = first + blocks * (weights // 4)
    place = begins + 4 * mine + tl.arange(0, 4)
    byte = tl.load(begin + place, mask=is_coded & (place < size), other=0).to(tl.int64)
    plane = begins + 4 * blocks + tl.sum(byte << (8 * tl.arange(0, 4)), 0)
    plane = tl.minimum(plane, size).to(tl.int32)

    inside = (lane >= 0) & is_coded
    code = _code(begin, first + mine * (weights // 4), lane, size, inside, 2)
    place = 64 + code
    escaped = inside & (code == 3)
    nth, total = tl.cumsum(escaped.to(tl.int32), 0) - 1, tl.sum(escaped.to(tl.int32), 0)
    code = _code(begin, plane, nth, size, escaped, 2)
    place = tl.where(escaped, 67 + code, place)
    plane += (total + 7) // 8 * 2
    escaped = escaped & (code == 3)
    nth, total = tl.cumsum(escaped.to(tl.int32), 0) - 1, tl.sum(escaped.to(tl.int32), 0)
    code = _code(begin, plane, nth, size, escaped, 3)
    place = tl.where(escaped, 70 + code, place)
    plane += (total + 7) // 8 * 3
    escaped = escaped & (code == 7)
    nth = tl.cumsum(escaped.to(tl.int32), 0) - 1
    place = tl.where(escaped, plane + nth, place)  # of the exponent, at last
    exponent = tl.load(begin + place, mask=inside & (place < size), other=0).to(tl.uint32)
    word = ((low & 128) << 8) | (exponent << 7) | (low & 127)
    word = tl.where(is_coded, word, low | (plain << 8))
    _put(out + piece * each + at, word, mask, kind)
