"""Ctrl-C and SIGTERM: the first ends the answer in an orderly way, the second the process."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from offload_rt.session.observer import Interrupted

__all__ = ["Interrupted", "Interrupts"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"


class Interrupts:
    """Turns the first signal into `Interrupted` and lets the second leave at once.

    Where state must not be left half changed, `raising(False)` keeps the signal for later. Python
    drops an exception raised inside a finaliser or a callback, so the signal is noted too and the
    next `raising(True)` or `check` raises it.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._raises = True
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """What shells expect of a process a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self._signal or signal.SIGINT)  # a terminal may give Ctrl-C as a key

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self._signal:
            raise Interrupted

    @contextmanager
    def raising(self, allowed: bool) -> Iterator[None]:
        """Let a signal interrupt the body, or not; one that waits interrupts it at once."""
        before, self._raises = self._raises, allowed
        try:
            if allowed:
                self.check()
            yield
        finally:
            self._raises = before

    def clear(self) -> None:
        """Forget a Ctrl-C: the session goes on. A SIGTERM stays."""
        if self._signal == signal.SIGINT:
            self._signal = 0

    @property
    def terminated(self) -> bool:
        """Whether the process was asked to end, not only the answer."""
        return self._signal == signal.SIGTERM

    def __enter__(self) -> "Interrupts":
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            if sys.stderr.isatty():
                os.write(2, _SHOW_CURSOR.encode())  # a progress bar may have hidden it
            os._exit(128 + number)
        self._signal = number
        if self._raises:
            raise Interrupted
