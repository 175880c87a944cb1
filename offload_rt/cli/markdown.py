"""Reports as Markdown, in which names of models and files are text and nothing more."""

import re
from collections.abc import Iterable, Sequence

from offload_rt.printable import in_markdown, printable


def heading(text: str) -> str:
    """The title of a report."""
    return f"# {in_markdown(text)}"


def bullets(lines: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"- {in_markdown(line)}" for line in lines)


def code(text: str) -> str:
    """What one may type, whatever quotes it has."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " * bool(longest)
    return f"{fence}{space}{printable(text)}{space}{fence}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---" if column == 0 else "---:" for column in range(len(head))]
    rows = [list(map(in_markdown, cells)) for cells in (head, *lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:]))
