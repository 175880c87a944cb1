"""Files of a training run: whole or not there, and what is wrong with a disk in one sentence."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from offload_rt.errors import ConfigError
from offload_rt.model.files import read_json_object

_LIMIT_BYTES = 16 * 2**20


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into a sentence.

    Raises:
        ConfigError: `path` could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigError(
            f"cannot write {path}: {reason}; what was finished is kept, make room "
            "or leave to write and run the same command again"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lend a temporary name; what the body writes there gets the name `path` once it is on disk.

    Raises:
        ConfigError: it could not be written; `path` is what it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def write_json(path: Path, record: Mapping[str, object]) -> None:
    """Write an object, whole or not at all.

    Raises:
        ConfigError: it could not be written.
    """
    with replacing(path) as temporary:
        text = json.dumps(record, indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, object] | None:
    """Read an object `write_json` wrote; None if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    if not os.path.lexists(path):
        return None
    return dict(read_json_object(path.parent, path.name, _LIMIT_BYTES))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
