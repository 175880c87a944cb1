"""What numba compiles of `planes.py` and `nested.py`.

Twelve bits are decoded 16 numbers an instruction, where numpy looks them up.

No numba here at import (`device/compiled.py`).
"""

import numpy as np

from offload_rt.device.compiled import kernel


@kernel("void(uint8[::1], uint8[::1], uint16[::1], uint16, uint16)")
def join(low, pairs, words, base, least):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Low bytes and the high bytes that codes stand for; those of escapes are anything.

    Args:
        low: [n] low bytes, n even.
        pairs: [n / 2] or more, codes of two weights each.
        words: [n] takes the weights.
        base: exponent that code 0 means, or 0 does where that means exponent 0.
        least: 8 where all codes are counted from `base`; 7 where 0 means exponent 0.
    """
    for i in range(words.size // 2):
        # Every result is cast: numba would widen it, and a vector would have fewer numbers.
        pair = np.uint16(pairs[i])
        other = np.uint16(pair >> np.uint16(4))
        one, two = np.uint16(pair & np.uint16(7)), np.uint16(other & np.uint16(7))
        # A code and `least` reach 8, so that `base` counts, unless both are as small as can be.
        from_one = np.uint16(base * np.uint16(np.uint16(one + least) >> np.uint16(3)))
        from_two = np.uint16(base * np.uint16(np.uint16(two + least) >> np.uint16(3)))
        high = np.uint16(np.uint16(one + from_one) << np.uint16(8))
        sign = np.uint16((pair & np.uint16(8)) << np.uint16(12))
        words[2 * i] = np.uint16(low[2 * i]) | high | sign
        high = np.uint16(np.uint16(two + from_two) << np.uint16(8))
        sign = np.uint16((other & np.uint16(8)) << np.uint16(12))
        words[2 * i + 1] = np.uint16(low[2 * i + 1]) | high | sign


@kernel("int64(uint32[::1], uint16[::1], uint8[::1], uint8[::1])")
def patch(counts, places, high, words):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Put in the high bytes of escapes.

    Args:
        counts: [groups] escapes of each 65,536 weights, as many as there are places.
        places: [escapes] within these.
        high: [escapes].
        words: [2 n] the bytes of the weights.

    Returns:
        The first place that is none, or -1.
    """
    done = 0
    for group in range(counts.size):
        for _ in range(counts[group]):
            at = group * 65536 + places[done]
            if 2 * at + 1 >= words.size:
                return at
            words[2 * at + 1] = high[done]
            done += 1
    return -1


_RECORDS = "int64[:, ::1], int32[::1]"


@kernel(f"boolean(uint8[::1], uint32[::1], int64[::1], int64, int64, int64, int64, {_RECORDS})")
def describe(data, words, begins, each, numbers, address, room, records, starts):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, PLR0913
    """Describe coded pieces to the kernel that multiplies with them (`kernels/twelve.py`).

    Args:
        data: bytes of a weight's pieces.
        words: the same, four in each.
        begins: [pieces + 1] where each begins, and last where they end.
        each: weights of a piece, but for the last.
        numbers: weights.
        address: of `data`.
        room: address of `starts`.
        records: [pieces, 16] takes what is known of each.
        starts: [groups of all pieces + pieces] takes which escape is each group's first.

    Returns:
        Whether all are coded and have heads and counts that agree with their sizes.
    """
    filled = 0
    for piece in range(begins.size - 1):
        at = begins[piece]
        count = min(each, numbers - piece * each)
        base, zero = np.int64(data[at + 1]), np.int64(data[at + 2])
        stated = np.int64(words[at + 4 >> 2])
        escapes = np.int64(words[at + 8 >> 2])
        low = at + 64
        codes = low + (count + 63) // 64 * 64
        counts = codes + ((count + 1) // 2 + 63) // 64 * 64
        groups = (count + 65535) // 65536
        places = counts + 4 * groups
        end = counts + (4 * groups + 3 * escapes + 63) // 64 * 64
        if data[at] != 1 or stated != count or base > 121 or zero > 1 or end != begins[piece + 1]:
            return False
        records[piece, 0], records[piece, 1] = address + low, address + codes
        records[piece, 3], records[piece, 4] = address + places, address + places + 2 * escapes
        records[piece, 5], records[piece, 6], records[piece, 2] = count, 0, room + 4 * filled
        done = np.int64(0)
        for group in range(groups):
            starts[filled + group] = done
            done += np.int64(words[counts + 4 * group >> 2])
            if done > escapes:
                return False
        starts[filled + groups] = done
        filled += groups + 1
        if done != escapes:
            return False
        for half in range(2):
            table = np.int64(0)
            for code in range(8 * half + 7, 8 * half - 1, -1):
                exponent = 0 if zero and code & 7 == 0 else (base + (code & 7)) & 127
                table = table << 8 | exponent | (code & 8) << 4
            for part in range(8 + half, 16, 2):
                records[piece, part] = table
    return True


@kernel(
    "int64(uint16[::1], uint8[::1], uint8[::1], uint8[::1], uint8[::1], uint32[::1], uint8[::1])"
)
def nest(words, place, order, low, first, begins, rest):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, PLR0913
    """Code weights in nested planes (`nested.py`).

    Args:
        words: [n] bits of bf16 numbers.
        place: [256] the rank of each exponent.
        order: [256] the exponent of each rank.
        low: [n] or more, takes low bytes.
        first: [256 blocks] takes the first plane.
        begins: [blocks] takes where each block's part of the rest begins.
        rest: takes it, and is large enough.

    Returns:
        Bytes of the rest.
    """
    left = np.zeros(1024 + 8, np.uint8)
    used = 0
    for block in range(begins.size):
        start = 1024 * block
        count = min(1024, words.size - start)
        begins[block] = used
        for i in range(count):
            word = words[start + i]
            low[start + i] = word & 127 | word >> 8 & 128
            left[i] = place[word >> 7 & 255]
        left[count:] = 0
        there, at, n = first, 256 * block, 1024
        for level in range(3):
            bits = 3 if level == 2 else 2
            most = (1 << bits) - 1
            for group in range((n + 7) // 8):
                packed = 0
                for j in range(8):
                    packed |= min(np.int64(left[8 * group + j]), most) << bits * j
                for j in range(bits):
                    there[at] = packed >> 8 * j
                    at += 1
            escapes = 0
            for i in range(n):
                each = np.int64(left[i])
                left[escapes] = each - most
                escapes += each >= most
            left[escapes : escapes + 8] = 0
            n = escapes
            if level == 0:
                there, at = rest, used
        for i in range(n):
            rest[at + i] = order[left[i] + 13]
        used = at + n
    return used


@kernel("int64(uint8[::1], uint8[::1], uint8[::1], uint32[::1], uint8[::1], uint16[::1])")
def unnest(table, low, first, begins, rest, words):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, C901
    """Bring weights back from nested planes (`nested.py`).

    Args:
        table: exponents of the planes.
        low: [n] or more low bytes.
        first: [256 blocks] the first plane.
        begins: [blocks] where each block's part of the rest begins.
        rest: it.
        words: [n] takes the bits of bf16 numbers.

    Returns:
        The first block whose planes end elsewhere than the next begins, or -1.
    """
    wanted = np.empty(1024 + 1, np.uint16)  # whose codes the next plane has
    made = np.empty(1024, np.uint8)
    for block in range(begins.size):
        at = np.int64(begins[block])
        end = np.int64(begins[block + 1]) if block + 1 < begins.size else rest.size
        if at > end or end > rest.size:
            return block
        n = 0
        for i in range(256):
            byte = np.int64(first[256 * block + i])
            for j in range(4):
                code = byte >> 2 * j & 3
                made[4 * i + j] = table[code]
                wanted[n] = 4 * i + j
                n += code == 3
        for level in range(1, 3):
            bits = level + 1
            most = (1 << bits) - 1
            if at + bits * ((n + 7) // 8) > end:
                return block
            escapes = 0
            for group in range(0, n, 8):
                packed = np.int64(0)
                for j in range(bits):
                    packed |= np.int64(rest[at + j]) << 8 * j
                at += bits
                for i in range(group, min(group + 8, n)):
                    code = packed & most
                    packed >>= bits
                    place = wanted[i]
                    made[place] = table[3 * level + code]
                    wanted[escapes] = place
                    escapes += code == most
            n = escapes
        if at + n != end:
            return block
        for i in range(n):
            made[wanted[i]] = rest[at + i]
        start = 1024 * block
        for i in range(min(1024, words.size - start)):
            mine = np.uint16(low[start + i])
            high = np.uint16(np.uint16(made[i]) << np.uint16(7))
            sign = np.uint16(np.uint16(mine & np.uint16(128)) << np.uint16(8))
            words[start + i] = sign | high | np.uint16(mine & np.uint16(127))
    return -1
