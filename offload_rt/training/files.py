"""Files of a training run: those of `offload_rt.writing`, and what to do where the disk is full."""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from offload_rt import writing as files
from offload_rt.model.files import read_json_object

_LIMIT_BYTES = 16 * 2**20
_GO_ON = "; what was finished is kept: run the same command again to go on"

writing = partial(files.writing, after=_GO_ON)
replacing = partial(files.replacing, after=_GO_ON)
write_text = partial(files.write_text, after=_GO_ON)


def write_json(path: Path, record: Mapping[str, object]) -> None:
    """Write an object, whole or not at all.

    Raises:
        ConfigError: it could not be written.
    """
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, object] | None:
    """Read an object `write_json` wrote; None if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    if not os.path.lexists(path):
        return None
    return dict(read_json_object(path.parent, path.name, _LIMIT_BYTES))
