"""Bytes that people give us as text: prompts, conversations, plans, profiles, scenarios."""

from offload_rt.errors import ConfigError

_MARK = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


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
