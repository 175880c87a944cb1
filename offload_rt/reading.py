"""Bytes that people give us as text: prompts, conversations, plans, profiles, scenarios."""

import os
import stat
from pathlib import Path

from offload_rt.errors import ConfigError

_MARK = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def read_plain(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a plain file; pipes and devices, which may have no end, are refused.

    Raises:
        ConfigError: it is none, cannot be read, or has more bytes.
    """
    try:
        # Not blocking: a pipe of that name would wait for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ConfigError(f"cannot read {path}: it is no plain file")
            data = file.read(limit_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read {path}: {reason}") from error
    if len(data) > limit_bytes:
        raise ConfigError(f"{path} is larger than {limit_bytes} bytes, the most accepted")
    return data


def without_mark(data: bytes) -> bytes:
    """The bytes behind a byte order mark, which editors of Windows write and which is no text."""
    return data.removeprefix(_MARK)


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 as text, without a byte order mark.

    Args:
        data: the whole text, or a line of it.
        where: what the error message calls it.

    Raises:
        ConfigError: it is not UTF-8; the message names the offset.
    """
    try:
        return without_mark(data).decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(without_mark(data))
        guess = "it is UTF-16: " if data.startswith(_UTF_16) else ""
        raise ConfigError(
            f"{where} is not UTF-8: byte {data[offset]:#04x} at offset {offset}; {guess}convert it "
            "first, with iconv for instance"
        ) from error
