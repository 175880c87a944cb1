"""Text that fits the terminal: lines are broken between words, behind a hanging indent."""

import os
from textwrap import wrap

from offload_rt.printable import printable

_LEAST, _MOST, _USUAL = 40, 100, 80


def columns(file: int = 1) -> int:
    """Width to write for: $COLUMNS, a terminal's, or 80 where there is none."""
    try:
        width = int(os.environ.get("COLUMNS", "")) or os.get_terminal_size(file).columns
    except ValueError:
        try:
            width = os.get_terminal_size(file).columns
        except OSError:
            width = _USUAL
    except OSError:
        width = _USUAL
    return min(max(width or _USUAL, _LEAST), _MOST)


def hanging(text: str, indent: int, width: int | None = None) -> str:
    """Make one line printable and break it; what follows begins below column `indent`.

    Words are not cut and their hyphens are kept, so options can be copied.
    """
    width, text = columns() if width is None else width, printable(text)
    if len(text) <= width:
        return text
    return "\n".join(
        wrap(
            text,
            width,
            subsequent_indent=" " * (indent if indent <= width // 2 else 4),
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
