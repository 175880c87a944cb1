"""A file of prompts for measuring: JSON lines as in MT-Bench or HumanEval, or plain lines."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from offload_rt.errors import ConfigError
from offload_rt.reading import decode_text, without_mark

ItemT = TypeVar("ItemT")

_LIMIT_BYTES = 64 * 2**20
_KNOWN = 'expected "prompt", or "turns" with the first one in front'


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptItem:
    """One prompt of a set.

    Attributes:
        line: where it is in the file, from 1.
        name: its id in the file, else `line N`.
        category: what it is counted under.
    """

    line: int
    name: str
    category: str
    text: str


def read_prompt_set(path: str) -> list[PromptItem]:
    """Read all prompts of a file; blank lines are left out.

    A file whose first line begins with a brace has a JSON object in each line: MT-Bench
    (`question_id`, `category`, `turns`; the first turn is taken), HumanEval (`task_id`, `prompt`),
    or `prompt` with an optional `category`. In any other file each line is a prompt.

    Raises:
        ConfigError: not readable, not UTF-8, a line is not what it should be, or there is none.
    """
    lines = read_lines(path)
    if not lines:
        raise ConfigError(f"{path} has no prompts: give a file with one in each line")
    if not lines[0][1].startswith(b"{"):
        return [read_item({"prompt": decode_line(line, path, n)}, path, n) for n, line in lines]
    return [read_item(parse_object(line, path, number), path, number) for number, line in lines]


def spread(items: Sequence[ItemT], limit: int | None) -> list[ItemT]:
    """At most `limit` items, evenly spread over all and in their order."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def read_lines(path: str) -> list[tuple[int, bytes]]:
    """Numbers, from 1, and bytes of the lines that are not blank.

    Raises:
        ConfigError: not readable, or too large.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(_LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read the prompts of {path}: {reason}") from error
    if len(data) > _LIMIT_BYTES:
        raise ConfigError(f"{path} is larger than {_LIMIT_BYTES} bytes, the most accepted")
    lines = enumerate(without_mark(data).split(b"\n"), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def decode_line(line: bytes, path: str, number: int) -> str:
    """The text of a line.

    Raises:
        ConfigError: it is not UTF-8.
    """
    return decode_text(line, f"{path}, line {number}")


def parse_object(line: bytes, path: str, number: int) -> dict[str, Any]:
    """The JSON object in a line.

    Raises:
        ConfigError: there is none.
    """
    try:
        record = json.loads(decode_line(line, path, number))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path}, line {number} is not a JSON object: {_KNOWN}")
    return record


def read_item(record: dict[str, Any], path: str, number: int) -> PromptItem:
    """The prompt an object of MT-Bench's or HumanEval's kind holds.

    Raises:
        ConfigError: it holds none.
    """
    turns = record.get("turns")
    text = turns[0] if isinstance(turns, list) and turns else record.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{path}, line {number} has no prompt: {_KNOWN}")
    task = record.get("task_id")
    name = record.get("question_id", task)
    category = record.get("category", task.partition("/")[0] if isinstance(task, str) else "text")
    if not isinstance(category, str) or not category.strip():
        raise ConfigError(f"{path}, line {number}: category is {category!r}, expected a text")
    name = f"line {number}" if name is None else str(name)
    return PromptItem(line=number, name=name, category=category, text=text)
