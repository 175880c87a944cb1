"""Sizes and rates as people write them: `GiB` is 2^30 bytes, `GB/s` is 10^9 bytes a second."""

import math
import re
from collections.abc import Iterable

from offload_rt.errors import ConfigError

_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?\s*", re.IGNORECASE)


def join_words(words: Iterable[str]) -> str:
    """Words as a sentence lists them: `one`, `one and two`, `one, two and three`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def parse_size(text: str) -> int:
    """Read a memory size: `2GiB`, `2G`, `1536MiB`, `300000` (bytes); `GB` means `GiB` too.

    Raises:
        ConfigError: the text is not a size, or the size is zero.
    """
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _BINARY[(match[2] or "").lower()]) if match else 0
    if size <= 0:
        raise ConfigError(
            f"{text!r} is not a memory size: write 2GiB, 1500MiB or a number of bytes"
        )
    return size


def format_size(nbytes: float) -> str:
    """Write bytes of memory with the unit that gives three digits: `1.53 GiB`."""
    if abs(nbytes) < 2**10:
        return f"{int(nbytes)} B"
    power = min(4, int(math.log2(abs(nbytes)) // 10))
    value = nbytes / 2 ** (10 * power)
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {'KMGT'[power - 1]}iB"


def format_rate(bytes_per_s: float) -> str:
    """Write a bandwidth in decimal gigabytes a second: `2.31 GB/s`."""
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def format_speed(s_per_token: float) -> str:
    """Write seconds per token as tokens a second, with three digits: `2.91 tokens/s`."""
    rate = 1.0 / max(s_per_token, 1e-9)
    digits = max(0, 2 - math.floor(math.log10(rate)))
    return f"{rate:.{digits}f} tokens/s"
