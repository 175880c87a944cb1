"""bf16 weights in nested planes: the code of 10.75 bits, as few as a Huffman code has.

Sign and mantissa of a weight are a byte, kept as it is. The exponent has a code of 2 bits: one of
the piece's three likeliest, or an escape. The escapes, in their order, have 2 bits again: one of
the next three, or an escape. These have 3 bits: one of the next seven. What is left is a byte. So a
weight's code in the next plane is found by counting escapes, which blocks of 1,024 weights do by
themselves. Behind its head (`planes.py`) a piece has

    exponents    of the three planes, the likeliest first; 64 bytes
    low bytes    one for each weight: the sign, then the mantissa; filled up to 64
    first plane  256 bytes for each block
    begins       uint32 for each block: where its part of the rest begins
    the rest     for each block its second plane, its third, and exponents that are in none

Codes of a plane follow each other from the lowest bit on, and are filled up to eight with zeros. So
is the last block. numba codes and decodes where it is there (`planes_compiled.py`), else numpy, to
the same bytes. No torch here.
"""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from offload_rt.device import compiled
from offload_rt.model.packed_files import aligned

BLOCK = 1024
LEVELS = (2, 2, 3)  # bits of a code of each plane
BASES = (0, 3, 6, 13)  # exponents in the planes before; the last: in all
_TABLE_BYTES, _GROUP = 64, 8
_FIRST_BYTES = BLOCK * LEVELS[0] // 8
_BLOCKS = 256  # that numpy decodes at once
_FOURS = (
    (np.arange(256)[:, None] >> np.arange(0, 8, 2) & 3).astype(np.uint8).view(np.uint32).ravel()
)

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Words = np.ndarray[Any, np.dtype[np.uint16]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]


def nbytes(count: int, more: int) -> int:
    """Bytes of so many weights whose rest has `more`."""
    return _rest_at(count) + more


def encode(words: Words) -> tuple[list[Bytes], int]:
    """Code weights.

    Args:
        words: [n] bits of bf16 numbers.

    Returns:
        What follows the head, and the bytes of the rest.
    """
    counts = np.bincount(words >> 7 & 255, minlength=256)
    order = np.argsort(-counts, kind="stable").astype(np.uint8)
    place = np.empty(256, np.uint8)
    place[order] = np.arange(256, dtype=np.uint8)
    table = np.zeros(_TABLE_BYTES, np.uint8)
    table[: BASES[-1]] = order[: BASES[-1]]
    blocks = _blocks(words.size)
    low, first = np.zeros(aligned(words.size), np.uint8), np.empty(_FIRST_BYTES * blocks, np.uint8)
    begins = np.empty(blocks, np.uint32)
    if (made := compile_now()) is not None:
        words = np.require(words, requirements="W")  # compiled for such only
        left = [counts[order[base:]].sum() for base in BASES[1:]]  # behind each plane
        bits = sum(n * k for n, k in zip(left, (*LEVELS[1:], 8), strict=True))
        rest = np.empty(int(bits) // 8 + blocks * sum(LEVELS), np.uint8)
        rest = rest[: made.nest(words, place, order, low, first, begins, rest)]
    else:
        rest = _nest(words, place, order, low, first, begins)
    return [table, low, first, begins.view(np.uint8), rest], rest.size


def decode(body: Bytes, more: int, words: Words) -> int:
    """Bring weights back.

    Args:
        body: what follows a head, aligned to 4; writable.
        more: bytes of the rest; `body` has `nbytes` with that.
        words: [n] takes the bits of bf16 numbers.

    Returns:
        The first block whose planes end elsewhere than the next begins, or -1.
    """
    blocks, at = _blocks(words.size), _rest_at(words.size)
    first_at = _TABLE_BYTES + aligned(words.size)
    begins_at = first_at + _FIRST_BYTES * blocks
    parts = (
        body[:_TABLE_BYTES],
        body[_TABLE_BYTES:first_at],
        body[first_at:begins_at],
        body[begins_at:at].view(np.uint32),
        body[at : at + more],
    )
    if (made := compile_now()) is not None:
        return int(made.unnest(*parts, words))
    table, low, first, begins, rest = parts
    ends = np.append(begins[1:], np.uint32(more)).astype(np.int64)
    for start in range(0, blocks, _BLOCKS):
        some = slice(start, start + _BLOCKS)
        codes = first[some.start * _FIRST_BYTES : some.stop * _FIRST_BYTES]
        exponents = np.empty(codes.size * 8 // LEVELS[0], np.uint8)
        wrong = _unnest(table, codes, begins[some].astype(np.int64), ends[some], rest, exponents)
        if wrong >= 0:
            return start + wrong
        here = slice(some.start * BLOCK, some.stop * BLOCK)
        mine = low[here].astype(np.uint16)[: words[here].size]
        high = exponents[: mine.size].astype(np.uint16) << 7
        words[here] = (mine & 128) << 8 | high | mine & 127
    return -1


@cache
def compile_now() -> ModuleType | None:
    """What numba compiles, if it can; who asks first waits for it."""
    if compiled.problem():
        return None
    from offload_rt.model.formats import planes_compiled

    compiled.warm([planes_compiled.nest, planes_compiled.unnest])
    return planes_compiled


def _nest(
    words: Words, place: Bytes, order: Bytes, low: Bytes, first: Bytes, begins: np.ndarray
) -> Bytes:
    """Fill low bytes, the first plane and begins; returns the rest."""
    low[: words.size] = words & 127 | words >> 8 & 128
    left = np.zeros(begins.size * BLOCK, np.uint8)
    left[: words.size] = place[words >> 7 & 255]
    codes = np.minimum(left, 2 ** LEVELS[0] - 1)
    first[:] = codes[0::4] | codes[1::4] << 2 | codes[2::4] << 4 | codes[3::4] << 6
    escapes = np.flatnonzero(codes == 2 ** LEVELS[0] - 1)
    left, block = left[escapes], escapes // BLOCK
    parts, sizes = [], []
    for k, base in zip(LEVELS[1:], BASES[1:], strict=False):
        codes = np.minimum(left - base, 2**k - 1)
        counts, nth = _counted(block, begins.size)
        whole = -(-counts // _GROUP) * _GROUP
        plane = np.zeros(whole.sum(), np.uint8)
        plane[nth + np.repeat(np.cumsum(whole) - whole, counts)] = codes
        bits = plane[:, None] >> np.arange(k, dtype=np.uint8) & 1
        parts.append(np.packbits(bits, bitorder="little"))
        sizes.append(whole // 8 * k)
        left, block = left[codes == 2**k - 1], block[codes == 2**k - 1]
    parts.append(order[left])
    sizes.append(_counted(block, begins.size)[0])
    ends = np.cumsum(np.sum(sizes, 0))
    rest, at = np.empty(ends[-1], np.uint8), ends - np.sum(sizes, 0)
    begins[:] = at
    for part, size in zip(parts, sizes, strict=True):
        rest[np.arange(part.size) + np.repeat(at - (np.cumsum(size) - size), size)] = part
        at = at + size
    return rest


def _unnest(
    table: Bytes, first: Bytes, at: Numbers, ends: Numbers, rest: Bytes, exponents: Bytes
) -> int:
    """Exponents of some blocks, whose parts of the rest lie from `at` to `ends`; as `decode`."""
    codes = _FOURS[first].view(np.uint8)
    exponents[:] = table[codes]
    wanted = np.flatnonzero(codes == 2 ** LEVELS[0] - 1)  # whose codes the next plane has
    data = np.append(rest, np.zeros(1, np.uint8))  # a code's byte has one behind it
    wrong = (at > ends) | (ends > rest.size)
    for k, base in zip(LEVELS[1:], BASES[1:], strict=False):
        counts, nth = _counted(wanted // BLOCK, at.size)
        sizes = -(-counts // _GROUP) * k
        wrong |= at + sizes > ends
        if wrong.any():
            return int(wrong.argmax())
        byte = np.repeat(at, counts) + (nth * k >> 3)
        both = data[byte].astype(np.uint16) | data[byte + 1].astype(np.uint16) << 8
        codes = both >> (nth * k & 7).astype(np.uint16) & 2**k - 1
        exponents[wanted] = table[base + codes]
        wanted, at = wanted[codes == 2**k - 1], at + sizes
    counts, nth = _counted(wanted // BLOCK, at.size)
    wrong = at + counts != ends
    if wrong.any():
        return int(wrong.argmax())
    exponents[wanted] = rest[np.repeat(at, counts) + nth]
    return -1


def _counted(block: Numbers, blocks: int) -> tuple[Numbers, Numbers]:
    """Of ascending blocks: how often there is each, and of each entry its number in its block."""
    counts = np.bincount(block, minlength=blocks)
    return counts, np.arange(block.size) - np.repeat(np.cumsum(counts) - counts, counts)


def _rest_at(count: int) -> int:
    return _TABLE_BYTES + aligned(count) + (_FIRST_BYTES + 4) * _blocks(count)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)
