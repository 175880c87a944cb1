"""Shapes of weights that stay as they are where others are reordered, kept for plans.

Where passes need not be row-invariant, a weight is reordered only if its products have the same
bits then (`packed.py`). Of which shapes that is not so is found when a model is loaded, and depends
on the processor, on torch, and on how many threads compute. No torch here.
"""

import importlib.metadata
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from offload_rt.device.system import compute_threads, processor
from offload_rt.entries import read_entries, write_entries
from offload_rt.folders import cache_folder

Shape = tuple[int, int]  # outputs, inputs
_FILE, _MOST_MACHINES = "left_plain.json", 16
_log = logging.getLogger(__name__)


def left_plain() -> frozenset[Shape]:
    """What runs on this machine have found."""
    return read_entries(_path(), _shapes).get(_machine(), frozenset())


def note_left_plain(shapes: Iterable[Shape], alike: Iterable[Shape] = ()) -> None:
    """Say which shapes stay plain, and keep that for plans to come.

    Args:
        shapes: those.
        alike: shapes that were found to have the same bits reordered, whatever was kept of them.
    """
    found = frozenset(shapes)
    for outputs, inputs in sorted(found):
        text = "weights of %d by %d stay as they are: reordered, products have other bits"
        _log.info(text, outputs, inputs)
    entries = read_entries(_path(), _shapes)
    known = entries.pop(_machine(), frozenset())
    if (now := known - frozenset(alike) | found) != known:
        entries[_machine()] = now
        write_entries(_path(), {name: sorted(e) for name, e in entries.items()}, _MOST_MACHINES)


def _path() -> Path:
    return cache_folder() / _FILE


def _machine() -> str:
    """What they depend on."""
    torch = importlib.metadata.version("torch")
    return f"{processor()[0]}, torch {torch}, {compute_threads()} threads"


def _shapes(raw: Any) -> frozenset[Shape]:  # noqa: ANN401
    return frozenset((int(outputs), int(inputs)) for outputs, inputs in raw)
