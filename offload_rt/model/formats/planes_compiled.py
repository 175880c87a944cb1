"""The decoding of `planes.py`, for numba: 16 numbers an instruction, where numpy looks them up.

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
