"""Kernels that dequantise integers of 4 and 8 bits into 16-bit numbers; bit for bit as torch does.

A weight is (code - zero) x scale: the difference is exact, the product is rounded to fp32 and then
to the nearest number of the computation, ties to even. A group of 4-bit codes has 16 such numbers:
they are computed once, stay in a register, and one instruction looks up 32 weights (AVX-512) or 16
(SSSE3). Where the instructions are not there, the table lies in memory.

Formats whose words run along the outputs are turned first, a group of inputs at a time, in a
scratch that stays in the first cache.

Importing this module needs numba (`device/compiled.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from offload_rt.device.compiled import kernel

LANES = 16  # numbers that are computed at once
INPUTS = 32  # of a group, or a multiple of them
AWQ = 0  # a form beside GPTQ's bits

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_F32 = ir.FloatType()
_AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's codes, from the low bits on
_AWQ_CODES = tuple(map(_AWQ_OUTPUTS.index, range(8)))


def features() -> frozenset[str]:
    """Instructions that kernels are compiled for, by LLVM's names."""
    listed = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return frozenset(each[1:] for each in listed if each.startswith("+"))


def rounds_to_half() -> bool:
    """Whether kernels can write fp16: that needs an instruction."""
    return "f16c" in features()


def _vector(of: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(of, lanes)


_WORDS, _FLOATS = _vector(_I32, LANES), _vector(_F32, LANES)


def _same(value: int) -> ir.Constant:
    """That value in each lane of 32 bits."""
    return ir.Constant(_WORDS, [value] * LANES)


def _mixed(builder: ir.IRBuilder, one: ir.Value, other: ir.Value, lanes: list[int]) -> ir.Value:
    """Lanes of two vectors; those of the other are counted on."""
    return builder.shuffle_vector(one, other, ir.Constant(_vector(_I32, len(lanes)), lanes))


def _all(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A vector of one value."""
    nothing = ir.Constant(_vector(value.type, LANES), ir.Undefined)
    one = builder.insert_element(nothing, value, _I32(0))
    return _mixed(builder, one, nothing, [0] * LANES)


def _nearest(builder: ir.IRBuilder, numbers: ir.Value, half: ir.Value) -> ir.Value:
    """<16 x float> rounded to fp16 or bf16, as <16 x i16>."""
    bits = builder.bitcast(numbers, _WORDS)
    even = builder.and_(builder.lshr(bits, _same(16)), _same(1))  # ties go to even
    rounded = builder.add(builder.add(bits, _same(0x7FFF)), even)
    words = _vector(_I16, LANES)
    bf16 = builder.trunc(builder.lshr(rounded, _same(16)), words)
    if not rounds_to_half():  # and nobody asks for it
        return bf16
    fp16 = builder.fptrunc(numbers, _vector(ir.HalfType(), LANES))
    return builder.select(builder.trunc(half, ir.IntType(1)), builder.bitcast(fp16, words), bf16)


def _product(builder: ir.IRBuilder, codes: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
    """Codes less zero points times scales, in float."""
    return builder.fmul(builder.fsub(codes, zero), scale)


def _turned(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """The columns of 16 vectors of 16."""
    for _ in range(4):  # each pair of vectors is merged lane by lane; after four times they lie so
        pairs = zip(rows[:8], rows[8:], strict=True)
        rows = [
            _mixed(builder, one, other, [at for n in range(start, start + 8) for at in (n, 16 + n)])
            for one, other in pairs
            for start in (0, 8)
        ]
    return rows


def _pointer(context, builder, kind, array, at):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """To an element of an array without gaps, counted over all of its dimensions."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def _load(builder: ir.IRBuilder, place: ir.Value, at: ir.Value, kind: ir.Type) -> ir.Value:
    place = builder.gep(place, [at])
    nbytes = kind.element.width // 8 if isinstance(kind.element, ir.IntType) else 4
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=nbytes)


def _store(builder: ir.IRBuilder, value: ir.Value, place: ir.Value, at: ir.Value) -> None:
    place = builder.bitcast(builder.gep(place, [at]), value.type.as_pointer())
    builder.store(value, place, align=value.type.element.width // 8)


@intrinsic
def _look_up(typing, codes, at, nbytes, words, to, scale, zero, half):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, PLR0913
    """Bytes of two 4-bit codes, low first, from `codes[at]` on become `words[to:]`.

    `nbytes` is a multiple of LANES.
    """
    whole = types.int64
    return types.void(codes, whole, whole, words, whole, scale, zero, half), _emit_look_up


def _emit_look_up(context, builder, signature, arguments):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    codes, at, nbytes, words, to, scale, zero, half = arguments
    source = _pointer(context, builder, signature.args[0], codes, at)
    target = _pointer(context, builder, signature.args[3], words, to)
    every = ir.Constant(_FLOATS, [float(code) for code in range(16)])
    product = _product(builder, every, _all(builder, scale), _all(builder, zero))
    write = _writer(builder, _nearest(builder, product, half))
    with _steps(builder, nbytes) as index:
        bits = _load(builder, source, index, _vector(_I8, LANES))
        write(bits, builder.gep(target, [builder.shl(index, index.type(1))]))
    return context.get_dummy_value()


@contextmanager
def _steps(builder: ir.IRBuilder, count: ir.Value) -> Iterator[ir.Value]:
    """A loop from 0 to a multiple of LANES, so many at once."""
    kind = count.type
    with cgutils.for_range_slice(builder, kind(0), count, kind(LANES), kind) as (index, _):
        yield index


@intrinsic
def _scale(typing, codes, at, count, words, to, scale, zero, half):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, PLR0913
    """Codes of 8 bits from `codes[at]` on become `words[to:]`; `count` is a multiple of LANES."""
    whole = types.int64
    return types.void(codes, whole, whole, words, whole, scale, zero, half), _emit_scale


def _emit_scale(context, builder, signature, arguments):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    codes, at, count, words, to, scale, zero, half = arguments
    source = _pointer(context, builder, signature.args[0], codes, at)
    target = _pointer(context, builder, signature.args[3], words, to)
    scale, zero = _all(builder, scale), _all(builder, zero)
    with _steps(builder, count) as index:
        numbers = builder.zext(_load(builder, source, index, _vector(_I8, LANES)), _WORDS)
        floats = builder.sitofp(numbers, _FLOATS)
        made = _nearest(builder, _product(builder, floats, scale, zero), half)
        _store(builder, made, target, index)
    return context.get_dummy_value()


@intrinsic
def _spread(typing, codes, form, begin, first, scales, zeros, index, out, half):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, PLR0913
    """32 inputs of 16 outputs, each input with the scales of its own group.

    Lanes are outputs while numbers are computed, then they are turned. The arguments are those of
    `columns`, and the first input and output.
    """
    if not isinstance(form, types.IntegerLiteral):
        return None
    whole = types.int64
    return types.void(codes, form, whole, whole, scales, zeros, index, out, half), _emit_spread


def _emit_spread(context, builder, signature, arguments):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    codes, _, begin, first, scales, zeros, index, out, half = arguments
    of = signature.args
    arrays = {0: codes, 4: scales, 5: zeros, 6: index, 7: out}
    made = {n: context.make_array(of[n])(context, builder, each) for n, each in arrays.items()}
    outputs, inputs = (builder.extract_value(made[7].shape, n) for n in (0, 1))
    load = _code_loader(builder, of[1].literal_value, made[0].data, outputs, (begin, first))
    numbers = []
    for n in range(2 * LANES):
        group = builder.load(builder.gep(made[6].data, [builder.add(begin, begin.type(n))]))
        line = builder.add(builder.mul(builder.sext(group, begin.type), outputs), first)
        code = builder.sitofp(load(n), _FLOATS)
        scale, zero = (_load(builder, made[which].data, line, _FLOATS) for which in (4, 5))
        numbers.append(_nearest(builder, _product(builder, code, scale, zero), half))
    halves = _turned(builder, numbers[:LANES]), _turned(builder, numbers[LANES:])
    target = builder.gep(made[7].data, [builder.add(builder.mul(first, inputs), begin)])
    for n, both in enumerate(zip(*halves, strict=True)):
        row = _mixed(builder, *both, list(range(2 * LANES)))  # a whole line of the cache
        _store(builder, row, target, builder.mul(inputs, begin.type(n)))
    return context.get_dummy_value()


def _code_loader(builder, form, codes, outputs, at):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """What makes <16 x i32>: the codes of 16 outputs for the n-th input from the first on."""
    begin, first = at
    kind = begin.type
    if form == AWQ:
        shifts = [4 * _AWQ_CODES[lane % 8] for lane in range(LANES)]
        wide, word = (builder.sdiv(each, kind(8)) for each in (outputs, first))

        def from_two_words(n: int) -> ir.Value:
            row = builder.mul(builder.add(begin, kind(n)), wide)
            pair = _load(builder, codes, builder.add(row, word), _vector(_I32, 2))
            spread = _mixed(builder, pair, pair, [0] * 8 + [1] * 8)
            return builder.and_(builder.lshr(spread, ir.Constant(_WORDS, shifts)), _same(15))

        return from_two_words
    each, loaded = 32 // form, list[ir.Value]()

    def from_rows(n: int) -> ir.Value:
        if n % each == 0:
            row = builder.add(builder.sdiv(begin, kind(each)), kind(n // each))
            loaded.append(
                _load(builder, codes, builder.add(builder.mul(row, outputs), first), _WORDS)
            )
        shifted = builder.lshr(loaded[-1], _same(n % each * form))
        return builder.and_(shifted, _same((1 << form) - 1))

    return from_rows


def _writer(builder, table):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """What looks <16 x i8> up and writes 32 words, by what the processor can."""
    able = features()
    if {"avx512f", "avx512bw"} <= able:
        return _widest(builder, table)
    if "ssse3" in able:
        return _shuffles(builder, table)
    return _loads(builder, table)


def _widest(builder, table):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """AVX-512: words of indices, of which the instruction looks at the low 5 bits."""
    kind = _vector(_I16, 32)
    both = builder.shuffle_vector(table, table, ir.Constant(_vector(_I32, 32), list(range(32))))
    permute = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind, kind]), "llvm.x86.avx512.permvar.hi.512"
    )

    def write(codes: ir.Value, target: ir.Value) -> None:
        wide = _vector(_I32, LANES)
        single = builder.zext(codes, wide)
        shifted = builder.shl(single, ir.Constant(wide, [12] * LANES))  # the high code to word 1
        indices = builder.bitcast(builder.or_(single, shifted), kind)
        found = builder.call(permute, [both, indices])
        builder.store(found, builder.bitcast(target, kind.as_pointer()), align=2)

    return write


def _shuffles(builder, table):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """SSSE3: low and high bytes of the numbers are looked up apart."""
    octets, words = _vector(_I8, 16), _vector(_I16, 8)
    lanes = _vector(_I32, 16)
    low = builder.trunc(table, octets)
    high = builder.trunc(builder.lshr(table, ir.Constant(table.type, [8] * 16)), octets)
    shuffle = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(octets, [octets, octets]), "llvm.x86.ssse3.pshuf.b.128"
    )

    def between(first: ir.Value, second: ir.Value, start: int) -> ir.Value:
        """Bytes of both in turns, from one of the first 16 on."""
        order = [at for pair in range(start, start + 8) for at in (pair, 16 + pair)]
        return builder.shuffle_vector(first, second, ir.Constant(lanes, order))

    def write(codes: ir.Value, target: ir.Value) -> None:
        evens = builder.and_(codes, ir.Constant(octets, [15] * 16))
        odds = builder.lshr(codes, ir.Constant(octets, [4] * 16))
        for part in (0, 8):
            indices = between(evens, odds, part)
            halves = [builder.call(shuffle, [each, indices]) for each in (low, high)]
            for start in (0, 8):
                found = builder.bitcast(between(halves[0], halves[1], start), words)
                place = builder.gep(target, [_I32(2 * part + start)])
                builder.store(found, builder.bitcast(place, words.as_pointer()), align=2)

    return write


def _loads(builder, table):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """Anywhere: the table lies in memory."""
    memory = cgutils.alloca_once(builder, table.type)
    builder.store(table, memory)
    entries = builder.bitcast(memory, _I16.as_pointer())

    def write(codes: ir.Value, target: ir.Value) -> None:
        for lane in range(LANES):
            byte = builder.zext(builder.extract_element(codes, _I32(lane)), _I32)
            pair = builder.and_(byte, _I32(15)), builder.lshr(byte, _I32(4))
            for half, index in enumerate(pair):
                found = builder.load(builder.gep(entries, [index]))
                builder.store(found, builder.gep(target, [_I32(2 * lane + half)]))

    return write


@intrinsic
def _half(typing, number):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """The 16 bits of a float32 rounded to fp16."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        if not rounds_to_half():  # and nobody asks for it
            return ir.Constant(_I16, 0)
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), _I16)

    return types.uint16(types.float32), generate


@njit
def _one(code, scale, zero, half):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """One number's 16 bits."""
    product = (np.float32(code) - zero) * scale
    if half:
        return _half(product)
    bits = np.float32(product).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> 16)


_SCALES = "float32[:, ::1], float32[:, ::1]"


@kernel(f"void(uint8[::1], {_SCALES}, uint16[:, ::1], int64, boolean, int64, int64)")
def packed(codes, scales, zeros, out, bits, half, start, stop):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201, PLR0913
    """compressed-tensors: codes lie output after output.

    Args:
        codes: [O I b / 8].
        scales: [O, G]; inputs of a group follow each other, and are a multiple of INPUTS.
        zeros: [O, G].
        out: [O, I] bits of 16-bit numbers.
        bits: of a code, 4 or 8.
        half: numbers are fp16, else bf16.
        start: first output.
        stop: one after the last.
    """
    inputs, groups = out.shape[1], scales.shape[1]
    size, flat = inputs // groups, out.reshape(out.size)
    for row in range(start, stop):
        for group in range(groups):
            to, scale, zero = row * inputs + group * size, scales[row, group], zeros[row, group]
            if bits == 8:
                _scale(codes, to, size, flat, to, scale, zero, half)
            else:
                _look_up(codes, to // 2, size // 2, flat, to, scale, zero, half)


@kernel(f"void(uint8[::1], {_SCALES}, int32[::1], uint16[:, ::1], int64, boolean, int64, int64)")
def packed_ordered(codes, scales, zeros, index, out, bits, half, start, stop):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201, PLR0913
    """The same with the group of each input in `index` [I]."""
    inputs = out.shape[1]
    for row in range(start, stop):
        at, scale, zero = row * inputs * bits // 8, scales[row], zeros[row]
        for i in range(inputs):
            code = codes[at + i] if bits == 8 else codes[at + i // 2] >> 4 * (i & 1) & 15
            group = index[i]
            out[row, i] = _one(code, scale[group], zero[group], half)


@kernel(f"void(uint32[::1], {_SCALES}, int32[::1], uint16[:, ::1], int64, boolean, int64, int64)")
def columns(codes, scales, zeros, index, out, form, half, start, stop):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201, PLR0913
    """GPTQ and AWQ: words lie input after input.

    Args:
        codes: GPTQ: words of 32 / b inputs [I b / 32, O]; AWQ: of 8 outputs [I, O / 8].
        scales: [G, O].
        zeros: [G, O].
        index: [I] the group of each input; I is a multiple of INPUTS.
        out: [O, I] bits of 16-bit numbers.
        form: GPTQ's bits, 4 or 8, or AWQ.
        half: numbers are fp16, else bf16.
        start: first output, a multiple of 8.
        stop: one after the last.
    """
    outputs, inputs = out.shape
    end = start + (stop - start) // LANES * LANES
    for first in range(start, end, LANES):
        for begin in range(0, inputs, INPUTS):
            if form == AWQ:
                _spread(codes, AWQ, begin, first, scales, zeros, index, out, half)
            elif form == 8:
                _spread(codes, 8, begin, first, scales, zeros, index, out, half)
            else:
                _spread(codes, 4, begin, first, scales, zeros, index, out, half)
    for o in range(end, stop):
        for i in range(inputs):
            if form == AWQ:
                code = codes[(i * outputs + o) // 8] >> np.uint32(4 * _AWQ_CODES[o % 8]) & 15
            else:
                each = 32 // form
                word = codes[i // each * outputs + o]
                code = word >> np.uint32(i % each * form) & ((1 << form) - 1)
            group = index[i]
            out[o, i] = _one(code, scales[group, o], zeros[group, o], half)
