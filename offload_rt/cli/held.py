"""Folders that one process at a time writes in."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from offload_rt.errors import ConfigError

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL)  # some network drives


@contextmanager
def held(folder: Path, flag: str) -> Iterator[None]:
    """Keep other processes that ask the same from a folder; it is free again when this one ends.

    Args:
        folder: an existing folder.
        flag: the option that names it.

    Raises:
        ConfigError: another process has it.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"cannot use the folder {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another run is writing in {folder}: wait until it ends, or give another {flag}"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise ConfigError(f"cannot lock {folder}: {error.strerror}") from error
        yield
    finally:
        with suppress(OSError):
            os.close(handle)
