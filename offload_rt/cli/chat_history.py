"""What was typed in chats, kept in a file for the next: a JSON string a line, oldest first."""

import fcntl
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from offload_rt.errors import ConfigError
from offload_rt.writing import open_growing, why_not

_MOST_BYTES = 2**20  # some thousands of turns
_KEPT_BYTES = 2**19  # what is left of more
_MOST_TURN_BYTES = 2**16  # a longer one is a document; it would push all others out
_TRIES, _TRY_S = 20, 0.01


def history_path() -> Path:
    """Under $XDG_STATE_HOME or ~/.local/state."""
    import platformdirs

    return platformdirs.user_state_path("offload-rt") / "chat_history"


class HistoryFile:
    """The file; a chat goes on without one that cannot be used.

    Several chats may add to it at a time: a turn is one write at the end of the file, and the file
    is only shortened, in place, by who has its lock.

    Attributes:
        problem: why it cannot be used, or None.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.problem: str | None = None

    def load(self) -> list[str]:
        """All turns, oldest first; damaged lines are left out."""
        turns = []
        for line in self._with_file(_read).splitlines():
            with suppress(ValueError, RecursionError):
                if isinstance(turn := json.loads(line), str):
                    turns.append(turn)
        return turns

    def add(self, turn: str) -> None:
        """Write a turn at the end."""
        data = json.dumps(turn).encode() + b"\n"
        if len(data) <= _MOST_TURN_BYTES:
            self._with_file(lambda handle: _append(handle, data))

    def _with_file(self, work: Callable[[int], bytes]) -> bytes:
        """Do something with the open file; after the first failure nothing is done any more."""
        if self.problem is not None:
            return b""
        try:
            handle = _opened(self._path)
            try:
                return work(handle)
            finally:
                os.close(handle)
        except (OSError, ConfigError) as error:
            why = why_not(error, self._path) if isinstance(error, OSError) else str(error)
            self.problem = f"what is typed here is not kept in {self._path}: {why}"
            return b""


def _opened(path: Path) -> int:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = open_growing(path, os.O_RDWR | os.O_APPEND)
    if os.fstat(handle).st_mode & 0o077:
        os.fchmod(handle, 0o600)
    return handle


def _read(handle: int) -> bytes:
    """The newest turns; an overlong file is shortened, if nobody writes in it."""
    size = os.fstat(handle).st_size
    data = _tail(handle, size, _MOST_BYTES)
    if size > _MOST_BYTES and _locked(handle, tries=1):
        kept = _tail(handle, os.fstat(handle).st_size, _KEPT_BYTES)
        os.ftruncate(handle, 0)
        os.write(handle, kept)
    return data


def _append(handle: int, data: bytes) -> bytes:
    _locked(handle, tries=_TRIES)  # without the lock a turn may be lost, at worst
    size = os.fstat(handle).st_size
    broken = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
    os.write(handle, b"\n" + data if broken else data)
    return data


def _locked(handle: int, tries: int) -> bool:
    """Lock the file until it is closed, if nobody else holds it for long."""
    for attempt in range(tries):
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if attempt + 1 < tries:
            time.sleep(_TRY_S)
    return False


def _tail(handle: int, size: int, nbytes: int) -> bytes:
    """The last whole lines of a file, `nbytes` of it at most."""
    start = max(0, size - nbytes)
    data = os.pread(handle, nbytes, start)
    return data if start == 0 else data.partition(b"\n")[2]
