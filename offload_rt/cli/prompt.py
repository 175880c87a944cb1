"""Where the prompt comes from: an argument, a file, or standard input."""

import sys
from collections.abc import Sequence
from pathlib import Path

from offload_rt.errors import ConfigError
from offload_rt.reading import decode_text

_LIMIT_BYTES = 64 * 2**20  # some 15 million tokens, more than any model takes


def read_prompt(text: str | None, path: str | None, words: Sequence[str] = ()) -> str:
    """The prompt of a command line, from exactly one source.

    One line break at the end of a file or of standard input is left out: `echo` and editors write
    it.

    Args:
        text: value of --prompt.
        path: value of --prompt-file; `-` is standard input.
        words: the prompt as arguments.

    Raises:
        ConfigError: no source or two, not readable, not UTF-8, or nothing in it.
    """
    given = {"-p": text is not None, "-f": path is not None, repr(" ".join(words)): bool(words)}
    sources = [name for name, there in given.items() if there]
    if len(sources) > 1:
        raise ConfigError(f"{' and '.join(sources)} both give a prompt: leave out one of them")
    if words:
        text = " ".join(words)
    if text is not None:
        where, prompt = "--prompt", text.removeprefix("\ufeff")  # "$(cat FILE)" brings it along
    elif path is not None and path != "-":
        where, prompt = path, decode(_read_file(path), path)
    else:
        if path is None and sys.stdin.isatty():
            raise ConfigError(
                "no prompt: give -p TEXT or -f FILE, write it behind MODEL, or pipe text to stdin"
            )
        where, prompt = "stdin", decode(sys.stdin.buffer.read(_LIMIT_BYTES + 1), "stdin")
    if not prompt.strip():
        raise ConfigError(f"the prompt from {where} is empty: give some text")
    return prompt


def decode(data: bytes, where: str) -> str:
    """Text of a prompt's bytes without one final line break, and without a byte order mark.

    Raises:
        ConfigError: too large or not UTF-8; the message names the offset.
    """
    if len(data) > _LIMIT_BYTES:
        raise ConfigError(
            f"the prompt from {where} is larger than {_LIMIT_BYTES} bytes, the most accepted"
        )
    prompt = decode_text(data, f"the prompt from {where}")
    return prompt.removesuffix("\n").removesuffix("\r")


def _read_file(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(_LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read the prompt from {path}: {reason}") from error
