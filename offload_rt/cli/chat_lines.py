"""Turns of a chat from a pipe, or from a terminal that knows lines only."""

import sys
from dataclasses import dataclass, field
from typing import Protocol

import click

from offload_rt.cli.chat_words import MARK, ends_with_backslash, opens_block
from offload_rt.cli.prompt import decode
from offload_rt.errors import ConfigError
from offload_rt.reading import without_mark

TURN_BYTES = 16 * 2**20  # some 4 million tokens, more than any model takes
_STEP_BYTES = 2**20
_END_BYTES = 16  # tells whether the line goes on


class Reader(Protocol):
    """Where turns come from.

    Attributes:
        interactive: somebody types.
        offers: a turn that was not answered can be shown again, to be edited.
        line_end: what ends the line of a turn that Ctrl-C cut short.
    """

    @property
    def interactive(self) -> bool:
        """See above."""
        ...

    @property
    def offers(self) -> bool:
        """See above."""
        ...

    @property
    def line_end(self) -> str:
        """See above."""
        ...

    def read(self, offer: str = "") -> str | None:
        """The next turn or command; None at the end of the input.

        Args:
            offer: text to begin with, where that can be shown.

        Raises:
            ConfigError: it is not UTF-8, or too long.
            Interrupted: a signal came, or Ctrl-C was pressed.
        """


@dataclass(slots=True)
class _Turn:
    """Lines of a turn, until it is whole."""

    lines: list[bytes] = field(default_factory=list)
    nbytes: int = 0
    whole: bool = False
    _open: bool = False  # between three quotes

    def add(self, line: bytes) -> None:
        """Take the next line, without its line break."""
        text = line.decode("utf-8", "replace")
        first = not self.lines
        if self._open or (first and opens_block(text)):
            self._open = self._open != (text.count(MARK) % 2 == 1)
            self.whole = not self._open
        else:
            if not first:  # what went on to this line
                self.lines[-1] = self.lines[-1].removesuffix(b"\\")
            self.whole = not ends_with_backslash(text)
        self.nbytes += len(line) + bool(self.lines)
        self.lines.append(line if self.nbytes <= TURN_BYTES else b"")

    def end(self) -> str:
        """All of it, at the end of the input: that closes what is open."""
        if self._open:
            self.add(MARK.encode())
        return self.text()

    def text(self) -> str:
        """All of it."""
        if self.nbytes > TURN_BYTES:
            raise ConfigError(
                f"the turn has more than {TURN_BYTES} bytes, the most accepted: it was left out"
            )
        return decode(b"\n".join(self.lines), "stdin")


class LineReader:
    """Reads lines; those between three quotes, or that end with a backslash, go on."""

    offers, line_end = False, "\n"

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self._at_start = True
        if self.interactive:
            # Importing it gives input() line editing.
            import readline  # noqa: F401

    def read(self, offer: str = "") -> str | None:
        """The next turn or command; the end of the input ends it, too."""
        turn = _Turn()
        next_line = self._typed_line if self.interactive else self._piped_line
        while not turn.whole:
            line = next_line(bool(turn.lines))
            if line is None:
                return turn.end() if turn.lines else None
            turn.add(line)
        return turn.text()

    def _piped_line(self, _: bool) -> bytes | None:
        data = sys.stdin.buffer.readline(TURN_BYTES + 2)
        if self._at_start:
            self._at_start, data = False, without_mark(data)
        if not data:
            return None
        rest, end = data, b""
        while rest and not rest.endswith(b"\n") and len(data) > TURN_BYTES:
            rest = sys.stdin.buffer.readline(_STEP_BYTES)  # of a line that is too long
            end = (end + rest)[-_END_BYTES:]
        return (data + end).removesuffix(b"\n").removesuffix(b"\r")

    def _typed_line(self, goes_on: bool) -> bytes | None:
        sign = "  " if goes_on else "> "
        try:
            if sys.stdout.isatty():
                return input(sign).encode("utf-8", "surrogateescape")
            click.echo(sign, nl=False, err=True)  # stdout is for answers
            return input().encode("utf-8", "surrogateescape")
        except EOFError:
            click.echo(err=True)
            return None
        except UnicodeDecodeError as error:
            raise ConfigError("the line is not UTF-8: set the terminal to UTF-8") from error
