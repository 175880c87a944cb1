"""bf16 weights in 12 or 10.75 bits, and every bit back: the codes of packed model folders.

The code of 10.75 bits is described in `nested.py`; here is that of 12, of which a CPU decodes
several times as many weights a second, and what both share: pieces, heads and checksums.

A bf16 number has a sign, 8 bits of exponent and 7 of mantissa; in its high byte are the sign and
the upper 7 bits of the exponent. The low byte of a weight is kept as it is. Of a trained layer's
high bytes nearly all have one of few exponents, so 4 bits say which: the sign, and a code of 3 bits
into a window of the exponents. Weights outside of it are escapes: their high bytes follow, with
their places.

Codes 0 to 6 are seven exponents in a row from `base` on; or 0 means exponent 0, zeros and
subnormals, and 1 to 6 are six exponents. What makes fewer escapes is taken, piece by piece. 7 is an
escape. In trained weights 0.1 to 0.5 % are (docs/RESULTS.md, "bf16 from disk in 12 bits").

A tensor is cut into pieces of one size, of up to 2^21 weights, so that reader threads can work on
different ones:

    head         64 bytes: kind, base, whether 0 means 0, version; weights and escapes (little
                 endian; of nested planes the bytes of their last part); of version 1 the CRC-32 of
                 these and of all behind the head
    low bytes    one for each weight
    codes        one byte for two weights, the first in the low half
    counts       uint32 for each 65,536 weights: escapes among them
    places       uint16 for each escape, within these
    high bytes   one for each escape

Low bytes, codes and the whole are filled up to a multiple of 64 with zeros. A piece that this would
not make smaller is kept as it is, behind a head. The same weights give the same bytes. No torch
here.
"""

import zlib
from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from offload_rt.device import compiled
from offload_rt.kernels import twelve
from offload_rt.model.formats import nested
from offload_rt.model.formats.methods import CODED_BITS, NESTED_BITS
from offload_rt.model.packed_files import PIECE_ALIGN_BYTES, aligned

_HEAD = np.dtype(
    [
        *((name, "u1") for name in ("kind", "base", "zero", "version")),
        ("sizes", "<u4", 2),
        ("checksum", "<u4"),
    ]
)
_HEAD_BYTES, _SUMMED_BYTES = 64, 12
_UNSUMMED, _SUMMED = 0, 1  # versions
_AS_IS, _CODED, _NESTED = 0, 1, 2
_KINDS = {CODED_BITS: _CODED, NESTED_BITS: _NESTED}
_ESCAPE, _WINDOW = 7, 7  # the code that says so; exponents that have another
_EXPONENTS = 128  # of a high byte, without its sign
_GROUP = 2**16
_ESCAPE_BYTES = 3
_STEP = 2**19  # weights decoded at once: what they pass through stays in the second cache

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Words = np.ndarray[Any, np.dtype[np.uint16]]


class DamagedError(Exception):
    """Bytes that are no piece."""


def encode(words: Words, bits: int = CODED_BITS) -> Bytes:
    """Code the weights of a piece.

    Args:
        words: [n] bits of bf16 numbers.
        bits: of the code, whole ones.

    Returns:
        [m] bytes, at most those of the weights and a head.
    """
    words = np.ascontiguousarray(words)
    made = _nested(words) if bits == NESTED_BITS else _twelve(words)
    if made is None:
        made = _filled([_head(_AS_IS, 0, 0, words.size, 0), words.view(np.uint8)])
    return _summed(made)


def _nested(words: Words) -> Bytes | None:
    """The piece in nested planes; None where that would not make it smaller."""
    parts, more = nested.encode(words)
    if _nested_size(words.size, more) >= _as_is_size(words.size):
        return None
    return _filled([_head(_NESTED, 0, 0, words.size, more), *parts])


def _twelve(words: Words) -> Bytes | None:
    """The piece in 12 bits; None where that would not make it smaller."""
    parts = words.view(np.uint8)
    high = parts[1::2]
    base, zero, escapes = _window(np.bincount(high & _EXPONENTS - 1, minlength=_EXPONENTS))
    size = _size(words.size, escapes)
    if size >= _as_is_size(words.size):
        return None
    codes = _codes(base, zero)[high]
    places = np.flatnonzero(codes & _ESCAPE == _ESCAPE)
    pairs = np.zeros(_pairs(words.size), np.uint8)
    pairs[: codes[0::2].size] = codes[0::2]
    pairs[: codes[1::2].size] |= codes[1::2] << 4
    made = _filled(
        [
            _head(_CODED, base, zero, words.size, places.size),
            _filled([parts[0::2]]),
            pairs,
            np.bincount(places // _GROUP, minlength=_groups(words.size))
            .astype("<u4")
            .view(np.uint8),
            (places % _GROUP).astype("<u2").view(np.uint8),
            high[places],
        ]
    )
    assert made.size == size
    return made


def check(piece: Bytes, count: int, bits: int, *, whole: bool) -> None:
    """See that bytes are a piece, as far as its head says, without decoding it.

    Args:
        piece: [m] bytes.
        count: weights it should have.
        bits: of the code it should have, whole ones.
        whole: compare its checksum too; pieces of the first version have none.

    Raises:
        DamagedError: they are none.
    """
    head, _ = _headed(piece, count)
    if head["kind"] not in {_AS_IS, _KINDS[bits]}:
        raise DamagedError(f"the head of a piece says kind {int(head['kind'])}, of another code")
    if not whole or head["version"] == _UNSUMMED:
        return
    found = _checksum(piece)
    if found != head["checksum"]:
        raise DamagedError(
            f"a piece of {piece.size} bytes has checksum {found:08x}, its head says "
            f"{int(head['checksum']):08x}"
        )


def decode(piece: Bytes, words: Words) -> None:
    """Bring the weights of a piece back.

    Args:
        piece: [m] bytes that `encode` made, aligned to 4.
        words: [n] takes the bits of bf16 numbers, aligned to 8.

    Raises:
        DamagedError: it is no piece of n weights.
    """
    if not piece.flags.writeable:
        piece = piece.copy()  # compiled for the others only
    count = words.size
    head, escapes = _headed(piece, count)
    base, zero = int(head["base"]), int(head["zero"])
    if head["kind"] == _AS_IS:
        words[:] = piece[_HEAD_BYTES : _HEAD_BYTES + 2 * count].view(np.uint16)
        return
    if head["kind"] == _NESTED:
        wrong = nested.decode(piece[_HEAD_BYTES:], escapes, words)
        if wrong >= 0:
            raise DamagedError(f"planes of block {wrong} of a piece of {count} weights disagree")
        return
    at = _HEAD_BYTES + aligned(count)
    low, pairs = piece[_HEAD_BYTES : _HEAD_BYTES + count], piece[at : at + _pairs(count)]
    _join(low, pairs, words, base, zero)
    _patch(piece[at + pairs.size :], words, escapes)


@cache
def _compiled() -> ModuleType | None:
    """The same compiled, if it can be; who asks first waits for it."""
    if compiled.problem():
        return None
    from offload_rt.model.formats import planes_compiled

    compiled.warm([planes_compiled.join, planes_compiled.patch, planes_compiled.describe])
    return planes_compiled


def prepare(bits: int) -> None:
    """Compile now what decodes, where it can be: LLVM takes memory for a moment."""
    (nested.compile_now if bits == NESTED_BITS else _compiled)()


class Described:
    """What a kernel that multiplies with coded pieces has to know of them (`kernels/twelve.py`).

    Args:
        begins: where each piece of a weight begins in its bytes, and last where they end.
        each: weights of a piece, but for the last.
        numbers: weights.

    Attributes:
        records: [pieces, FIELDS] of the bytes that were described last.
    """

    def __init__(self, begins: Sequence[int], each: int, numbers: int) -> None:
        self._begins = np.array(begins, np.int64)
        self._each, self._numbers = each, numbers
        pieces = len(begins) - 1
        groups = sum(_groups(min(each, numbers - n * each)) for n in range(pieces))
        self.records = np.zeros((pieces, twelve.FIELDS), np.int64)
        self._starts = np.zeros(groups + pieces, np.int32)

    def describe(self, data: Bytes) -> bool:
        """Describe the bytes of a weight; False: some piece is not coded, or is damaged.

        Args:
            data: [n], aligned to 4; it must live as long as the records are used.
        """
        made = _compiled()
        assert made is not None
        found: bool = made.describe(
            data,
            data.view(np.uint32),
            self._begins,
            self._each,
            self._numbers,
            data.ctypes.data,
            self._starts.ctypes.data,
            self.records,
            self._starts,
        )
        return found

    @property
    def misplaced(self) -> bool:
        """Whether a kernel met an escape behind the end of its piece."""
        return bool(self.records[:, twelve.FOUND].any())


def _join(low: Bytes, pairs: Bytes, words: Words, base: int, zero: int) -> None:
    """Low bytes and the high bytes that codes stand for; those of escapes are anything."""
    if (made := _compiled()) is not None:
        even = words.size // 2 * 2
        made.join(low, pairs, words[:even], base, _ESCAPE if zero else _ESCAPE + 1)
        low, pairs, words = low[even:], pairs[even // 2 :], words[even:]
    if words.size:
        _look_up(low, pairs, words, base, zero)


def _look_up(low: Bytes, pairs: Bytes, words: Words, base: int, zero: int) -> None:
    table = _fours(base, zero)
    fours = pairs[: -(-words.size // 4) * 2].view(np.uint16)
    high = np.empty(min(_STEP // 4, fours.size), np.uint64)
    for start in range(0, words.size, _STEP):
        stop = min(start + _STEP, words.size)
        some = high[: -(-(stop - start) // 4)]
        # "wrap" does without a check that no index of 16 bits can fail.
        np.take(table, fours[start // 4 : start // 4 + some.size], out=some, mode="wrap")
        np.bitwise_or(some.view(np.uint16)[: stop - start], low[start:stop], out=words[start:stop])


def _patch(rest: Bytes, words: Words, escapes: int) -> None:
    """Put in the high bytes of escapes, [counts, places, high bytes]."""
    groups = _groups(words.size)
    at = 4 * groups + 2 * escapes
    counts, places = rest[: 4 * groups].view("<u4"), rest[4 * groups : at].view("<u2")
    high, into = rest[at : at + escapes], words.view(np.uint8)
    if counts.sum(dtype=np.int64) != escapes:
        raise DamagedError(
            f"a piece counts {counts.sum(dtype=np.int64)} escapes, its head {escapes}"
        )
    made = _compiled()
    wrong = made.patch(counts, places, high, into) if made else _put(counts, places, high, into)
    if wrong >= 0:
        raise DamagedError(f"an escape is weight {wrong} of {words.size}")


def _put(
    counts: np.ndarray[Any, np.dtype[np.uint32]], places: Words, high: Bytes, words: Bytes
) -> int:
    starts = np.arange(counts.size, dtype=np.int64) * _GROUP
    at = np.repeat(starts, counts) + places
    if at.size and at.max() >= words.size // 2:
        return int(at.max())
    words[1::2][at] = high
    return -1


def _window(counts: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[int, int, int]:
    """The base, whether code 0 means exponent 0, and how many weights are then escapes."""
    sums = np.concatenate([[0], np.cumsum(counts)])
    seven = sums[_WINDOW:] - sums[:-_WINDOW]
    six = sums[_WINDOW:] - sums[1 : 1 - _WINDOW] + counts[0]  # base + 1 to base + 6, and 0
    zero = int(six.max() > seven.max())
    best = six if zero else seven
    base = int(best.argmax())
    return base, zero, int(sums[-1] - best[base])


def _codes(base: int, zero: int) -> Bytes:
    """[256] the 4 bits of each high byte."""
    made = np.full(_EXPONENTS, _ESCAPE, np.uint8)
    made[base + zero : base + _WINDOW] = np.arange(zero, _WINDOW, dtype=np.uint8)
    if zero:
        made[0] = 0
    return np.concatenate([made, made | 8])


@lru_cache(maxsize=32)  # of half a MiB each; the layers of a model have a handful
def _fours(base: int, zero: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """[65536] four words of high bytes, for each two bytes of codes."""
    code = np.arange(16)
    exponent = np.where((code & 7 == 0) & (zero == 1), 0, base + (code & 7)) & _EXPONENTS - 1
    high = ((exponent | (code & 8) << 4) << 8).astype(np.uint16)
    each = np.arange(2**16)
    return (
        np.stack([high[each >> shift & 15] for shift in (0, 4, 8, 12)], 1).view(np.uint64).ravel()
    )


def _headed(piece: Bytes, count: int) -> tuple[Any, int]:
    """The head of a piece of so many weights, and its escapes."""
    if piece.size < _HEAD_BYTES:
        raise DamagedError(f"a piece has {piece.size} bytes, fewer than its head")
    head = piece[: _HEAD.itemsize].view(_HEAD)[0]
    kind, base, version = int(head["kind"]), int(head["base"]), int(head["version"])
    stated, escapes = (int(size) for size in head["sizes"])
    expected = {
        _AS_IS: _as_is_size(stated),
        _CODED: _size(stated, escapes),
        _NESTED: _nested_size(stated, escapes),
    }.get(kind)
    known = base + _WINDOW <= _EXPONENTS and head["zero"] <= 1 and version <= _SUMMED
    if stated != count or expected != piece.size or not known:
        raise DamagedError(
            f"the head of a piece of {piece.size} bytes says kind {kind}, base {base}, version "
            f"{version}, {stated} weights of {count} and {escapes} escapes"
        )
    return head, escapes


def _checksum(piece: Bytes) -> int:
    return zlib.crc32(piece[_HEAD_BYTES:].data, zlib.crc32(piece[:_SUMMED_BYTES].data))


def _summed(piece: Bytes) -> Bytes:
    """The piece with its checksum in its head."""
    piece[: _HEAD.itemsize].view(_HEAD)[0]["checksum"] = _checksum(piece)
    return piece


def _head(kind: int, base: int, zero: int, count: int, escapes: int) -> Bytes:
    made = np.zeros(_HEAD_BYTES, np.uint8)
    made[: _HEAD.itemsize].view(_HEAD)[0] = (kind, base, zero, _SUMMED, (count, escapes), 0)
    return made


def _size(count: int, escapes: int) -> int:
    """Bytes of a coded piece."""
    sizes = aligned(count) + _pairs(count) + 4 * _groups(count) + _ESCAPE_BYTES * escapes
    return _HEAD_BYTES + aligned(sizes)


def _nested_size(count: int, more: int) -> int:
    """Bytes of a piece in nested planes."""
    return _HEAD_BYTES + aligned(nested.nbytes(count, more))


def _as_is_size(count: int) -> int:
    return _HEAD_BYTES + aligned(2 * count)


def _filled(parts: Sequence[Bytes]) -> Bytes:
    """Parts behind each other, filled up."""
    made = np.concatenate(parts)
    return np.pad(made, (0, -made.size % PIECE_ALIGN_BYTES))


def _pairs(count: int) -> int:
    """Bytes of the codes of so many weights."""
    return aligned(-(-count // 2))


def _groups(count: int) -> int:
    return -(-count // _GROUP)
