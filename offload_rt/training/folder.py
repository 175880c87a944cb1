"""The folders of a training: a record of what they were made with, and what is in them."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.files import read_part, shown
from offload_rt.training.files import read_json, write_json, writing
from offload_rt.writing import is_temporary, make_folder

_VERSION = 1
_SAMPLE_BYTES = 64 * 2**10


@dataclass(slots=True)
class Folder:
    """A folder with a record of its settings.

    Attributes:
        path: the folder.
        record_name: the record's file in it.
        settings: what it was made with.
        result: what came of it; None while it is not finished.
    """

    path: Path
    record_name: str
    settings: Mapping[str, object]
    result: Mapping[str, object] | None = None

    def finish(self, result: Mapping[str, object]) -> None:
        """Note what came of it: from now on it counts as done."""
        self.result = result
        self._write()

    def _write(self) -> None:
        record = {"version": _VERSION, "settings": self.settings, "result": self.result}
        write_json(self.path / self.record_name, record)


def open_folder(path: Path, record_name: str, settings: Mapping[str, object], flag: str) -> Folder:
    """Make a folder, or go on with one that was made with the same settings.

    Args:
        path: the folder.
        record_name: of the file with its settings.
        settings: JSON values only.
        flag: the option that names the folder.

    Raises:
        ConfigError: it holds something else, was made with other settings, or cannot be written.
        CheckpointError: its record is damaged.
    """
    settings = json.loads(json.dumps(settings))
    found = read_json(path / record_name)
    folder = Folder(path, record_name, settings)
    if found is None:
        with writing(make_folder(path)):
            strangers = [name for name in os.listdir(path) if not is_temporary(name)]
        if strangers:
            raise ConfigError(
                f"{path} holds {shown(sorted(strangers)[0])} and no {record_name}, so no training "
                f"made it: give {flag} a folder that is new or empty"
            )
        folder._write()
        return folder
    made_with = found.get("settings")
    if found.get("version") != _VERSION or not isinstance(made_with, dict):
        raise CheckpointError(f"{path / record_name} is not a training's record: remove the folder")
    for key in sorted(settings.keys() | made_with.keys()):
        if settings.get(key) != made_with.get(key):
            raise ConfigError(
                f"{path} was made with {key} {made_with.get(key)}, now it is {settings.get(key)}: "
                f"give the same settings to go on, or another {flag}"
            )
    result = found.get("result")
    folder.result = result if isinstance(result, dict) else None
    return folder


def model_identity(checkpoint: Checkpoint) -> str:
    """A digest that differs between models: their headers, and a piece of each layer's numbers."""
    digest = hashlib.sha256(
        json.dumps(checkpoint.config.raw, sort_keys=True, default=dict).encode()
    )
    for group in (*checkpoint.layers, checkpoint.others):
        for extent in group:
            digest.update(repr((extent.name, extent.dtype, extent.shape)).encode())
        largest = max(group, key=lambda extent: extent.nbytes)
        count = min(_SAMPLE_BYTES, largest.nbytes)
        middle = largest.offset + (largest.nbytes - count) // 2
        digest.update(read_part(checkpoint.folder, largest.path.name, count, middle))
    return digest.hexdigest()
