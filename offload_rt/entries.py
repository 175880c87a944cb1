"""Small files in which something learnt is kept from run to run, entry by entry. No torch here.

A damaged file is put aside as if there were none: what is kept only makes guesses better.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from offload_rt.errors import ConfigError
from offload_rt.writing import write_text, writing

Entry = TypeVar("Entry")

_VERSION = 1
_LIMIT_BYTES = 2**20

_log = logging.getLogger(__name__)


def read_entries(path: Path, parse: Callable[[Any], Entry]) -> dict[str, Entry]:
    """All entries, the latest last; none if there is no such file or it cannot be used.

    Args:
        path: of the file.
        parse: makes an entry of its JSON value; a ValueError, TypeError, KeyError or OverflowError
            says that it cannot be one.
    """
    try:
        if not path.is_file() or path.stat().st_size > _LIMIT_BYTES:
            return {}
        raw = json.loads(path.read_text("utf-8"))
        if raw["version"] != _VERSION:
            return {}
        return {str(key): parse(entry) for key, entry in raw["entries"].items()}
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        _log.info("%s is not used: %s", path, error)
        return {}


def write_entries(path: Path, entries: Mapping[str, object], most: int) -> None:
    """Replace the file whole, with the `most` last entries; what goes wrong is only logged.

    They are fewer where it would be too large to be read again.
    """
    last = list(entries.items())[-most:]
    while len(text := _text(last)) > _LIMIT_BYTES:
        last = last[1:]
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text, lasting=False)
    except ConfigError as error:
        _log.info("what was learnt was not kept: %s", error)


def _text(entries: Sequence[tuple[str, object]]) -> str:
    """A file's text, ASCII."""
    return json.dumps({"version": _VERSION, "entries": dict(entries)})
