"""Text that fits the terminal: lines are broken between words, behind a hanging indent."""

import shutil
from textwrap import wrap

_LEAST, _MOST = 40, 100


def columns() -> int:
    """Width to write for: the terminal's, or 80 where there is none."""
    return min(max(shutil.get_terminal_size((80, 24)).columns, _LEAST), _MOST)


def hanging(text: str, indent: int, width: int | None = None) -> str:
    """Break a line so that what follows the first stands below column `indent`.

    Words are not cut and their hyphens are kept, so options can be copied.
    """
    width = columns() if width is None else width
    if len(text) <= width:
        return text
    if indent > width // 2:
        indent = 4
    return "\n".join(
        wrap(
            text,
            width,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
            drop_whitespace=True,
        )
    )
