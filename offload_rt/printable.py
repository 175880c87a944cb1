r"""Text from outside made safe to show: names, values and answers of files nobody vouches for.

A terminal obeys control characters (its title, clipboard and cursor), and marks that turn the
direction of writing or show nothing at all make one name look like another. They are written as
Python would write them: `\x1b`, `\u202e`. No torch here.
"""

import re

# Characters that count as letters or marks and yet show nothing: Unicode's
# Default_Ignorable_Code_Point without what `str.isprintable` refuses already.
_INVISIBLE = (
    "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef"
)
_HIDDEN = re.compile(f"[{_INVISIBLE}]")
# What no text may hold where it is shown: controls, a return to the start of a line, marks that
# turn the direction of writing, halves of characters, line separators that terminals do not know.
_UNSAFE = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
    "\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)
_MARKDOWN = re.compile(r"[\\`*\[\]<>|]")


def printable(text: str) -> str:
    """Write a name or a value on one line; everything that does not show itself is escaped."""
    if text.isprintable() and _HIDDEN.search(text) is None:
        return text
    return "".join(
        one if one.isprintable() and _HIDDEN.match(one) is None else _escaped(one) for one in text
    )


def printable_lines(text: str) -> str:
    """The same for text that may have lines and tabs, such as a table."""
    if text.isprintable() and _HIDDEN.search(text) is None:
        return text
    return "".join(
        part if part in "\n\t" else printable(part) for part in re.split(r"(\n|\t)", text)
    )


def printable_prose(text: str) -> str:
    """The same for a text to be read, which may be of any language.

    Lines, tabs, spaces of all kinds, joiners of emoji and of letters, and characters newer than
    this Python are part of it.
    """
    return _UNSAFE.sub(lambda found: _escaped(found[0]), text)


def in_markdown(text: str) -> str:
    """The same as a piece of Markdown: no markup either, and no end of a table's cell."""
    return printable(_MARKDOWN.sub(r"\\\g<0>", text))


def encodable(text: str, encoding: str) -> str:
    """Escape what an encoding lacks."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escaped(one: str) -> str:
    # JSON knows no \x7f, and json.dumps leaves this one character as it is.
    return "\\u007f" if one == "\x7f" else one.encode("unicode_escape").decode("ascii")
