"""What is typed in a chat: where a turn ends, and whether it is text or a command.

A line that begins with the exact name of a command is one, and every other line is text: paths and
comments begin with a slash, too. Only what looks like a mistyped command is held back. Text of
several lines is a command only where the command takes text.
"""

import difflib
import re
from dataclasses import dataclass

import click

from offload_rt.cli.columns import columns
from offload_rt.cli.verb import write_pairs

MARK = '"""'  # text between two of these is a turn as it is, line breaks and all
_SIMILAR = (
    0.75  # difflib's ratio of `/clera` and `/clear` is 0.8, that of `/sys` and `/system` 0.67
)
_GUESS = 0.5
_LONGEST = 32  # letters of a mistyped command
_SEND = "another / in front of it sends it as a turn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command of the chat.

    Attributes:
        argument: what may follow the name, as the help shows it; in brackets if it may be left out.
        help: what it does.
        aliases: other names.
        takes_lines: the argument may have several lines.
    """

    name: str
    help: str
    argument: str = ""
    aliases: tuple[str, ...] = ()
    takes_lines: bool = False

    @property
    def needs_argument(self) -> bool:
        """Whether it means nothing alone."""
        return bool(self.argument) and not self.argument.startswith("[")


COMMANDS = (
    Command(
        name="system",
        argument="[TEXT]",
        takes_lines=True,
        help='show the system prompt, or set it; "" removes it',
    ),
    Command(
        name="set",
        argument="[NAME VALUE]",
        help="show what answers are made with, or change it: /set temperature 0.7",
    ),
    Command(
        name="file",
        argument="PATH [TEXT]",
        takes_lines=True,
        help="send the text of a file, followed by TEXT, as a turn",
    ),
    Command(name="regenerate", help="answer the last turn again"),
    Command(name="undo", help="take the last turn and its answer back"),
    Command(name="clear", help="forget the conversation"),
    Command(name="save", argument="FILE", help="write the conversation to a file"),
    Command(name="load", argument="FILE", help="go on with a conversation that was saved"),
    Command(name="context", help="how full the conversation's context is"),
    Command(name="stats", help="measurements of the last answer"),
    Command(name="help", aliases=("?",), help="this list"),
    Command(
        name="exit",
        aliases=("quit", "bye"),
        help="leave; Ctrl-D does too, and Ctrl-C twice at the prompt",
    ),
)
_BY_NAME = {name: command for command in COMMANDS for name in (command.name, *command.aliases)}
NAMES = tuple(_BY_NAME)

_TAKES_LINES = "|".join(command.name for command in COMMANDS if command.takes_lines)
_OPENING = re.compile(rf"(?:/(?:{_TAKES_LINES})\s[^\n]*?)?{MARK}")

KEYS = (
    "Ctrl-C stops an answer and keeps what there is of it.",
    "Several lines are one turn if they are pasted, if each but the last ends with a backslash or "
    'Alt-Enter, or between two lines of """.',
    "A turn may begin with a slash: //clear is the text /clear.",
)


@dataclass(frozen=True, slots=True)
class Text:
    """A turn."""

    text: str


@dataclass(frozen=True, slots=True)
class Order:
    """A command and what follows its name."""

    name: str
    argument: str


@dataclass(frozen=True, slots=True)
class Refused:
    """What is neither; the sentence says why and what to type."""

    sentence: str


def read_words(typed: str) -> Text | Order | Refused:
    """Tell a turn from a command."""
    if (inner := _between_marks(typed)) is not None:
        return Text(inner)
    if typed.startswith("//") and not isinstance(read_words(typed[1:]), Text):
        return Text(typed[1:])
    found = re.fullmatch(r"/(\S*)\s*(.*)", typed, re.DOTALL)
    if found is None:
        return Text(typed)
    name, argument = found[1], found[2].rstrip()
    command = _BY_NAME.get(name)
    if "\n" in typed.rstrip() and not (command and command.takes_lines):
        return Text(typed)
    if command is not None:
        return _order(command, name, argument)
    return _unknown(typed, name, argument)


def going_on(typed: str) -> str | None:
    """What the next line is added to; None if the turn is whole.

    It goes on while three quotes are open, and behind a backslash, which is left out then.
    """
    if opens_block(typed):
        return f"{typed}\n" if typed.count(MARK) % 2 else None
    return f"{typed[:-1]}\n" if ends_with_backslash(typed) else None


def opens_block(line: str) -> bool:
    """Whether a turn that begins so goes on to the next three quotes."""
    return _OPENING.match(line) is not None


def ends_with_backslash(line: str) -> bool:
    """Whether the line goes on in the next; two backslashes are the character itself, twice."""
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def help_text() -> str:
    """All commands and the keys, as wide as the terminal."""
    formatter = click.HelpFormatter(width=columns())
    rows = []
    for command in COMMANDS:
        names = " ".join(f"/{name}" for name in (command.name, *command.aliases))
        rows.append((f"{names} {command.argument}".rstrip(), command.help))
    with formatter.indentation():
        write_pairs(formatter, rows)
        for sentence in KEYS:
            formatter.write_text(sentence)
    return formatter.getvalue().rstrip()


def split_path(argument: str) -> tuple[str, str]:
    """A path and what follows it; quotes or backslashes keep spaces in it, as terminals drop it."""
    found = re.match(r"""(?:"([^"\n]+)"|'([^'\n]+)'|((?:\\.|[^\s\\])+))\s*""", argument)
    if found is None:
        return argument, ""
    path = found[1] or found[2] or re.sub(r"\\(.)", r"\1", found[3])
    rest = argument[found.end() :]
    inner = _between_marks(rest)
    return path, rest if inner is None else inner


def whole_path(argument: str) -> str:
    """A path that is all of the argument, with or without quotes."""
    path, rest = split_path(argument)
    return argument if rest else path


def unmarked(text: str) -> str:
    """A text without three quotes around it."""
    inner = _between_marks(text)
    return text if inner is None else inner


def as_typed(text: str) -> str:
    """What to type for a turn of this text."""
    for typed in (text, f"/{text}", f"{MARK}{text}{MARK}"):
        if going_on(typed) is None and read_words(typed) == Text(text):
            return typed
    return text


def closest(word: str, known: tuple[str, ...], least: float = _GUESS) -> str | None:
    """The known word that is spelled most like it."""
    return next(iter(difflib.get_close_matches(word.lower(), known, n=1, cutoff=least)), None)


def _order(command: Command, name: str, argument: str) -> Order | Refused:
    if argument and not command.argument:
        return Refused(f"/{name} takes nothing behind it: {_SEND}")
    if command.needs_argument and not argument:
        return Refused(f"/{name} needs {command.argument}: /help explains it")
    return Order(command.name, argument)


def _unknown(typed: str, name: str, argument: str) -> Text | Refused:
    """Text, but for what looks like a mistyped command."""
    if not re.fullmatch(r"[\w-]*", name) or len(name) > _LONGEST:
        return Text(typed)
    likely = closest(name, NAMES, _SIMILAR if argument else _GUESS)
    if argument and likely is None:
        return Text(typed)
    guess = f", did you mean /{likely}?" if likely else ":"
    return Refused(f"no command /{name}{guess} /help lists them; {_SEND}")


def _between_marks(text: str) -> str | None:
    """The text between two marks and nothing else; one line break at each end is the marks' own."""
    whole = text.rstrip()
    if not (whole.startswith(MARK) and whole.endswith(MARK) and whole.count(MARK) == 2):
        return None
    inner = whole.removeprefix(MARK).removesuffix(MARK)
    return inner.removeprefix("\n").removesuffix("\n")
