"""How answers in the making are ended where there is no command line: `stop`, or Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from offload_rt.session.observer import Interrupted


class Stops:
    """Whether somebody wants answers to end.

    While a pass runs in the main thread, Ctrl-C is noted and ends it between two layers; at any
    other place Python raises KeyboardInterrupt as always.

    Attributes:
        signalled: Ctrl-C came.
    """

    def __init__(self) -> None:
        self.signalled = False
        self._wanted = threading.Event()

    def stop(self) -> None:
        """Ask for an end; from any thread."""
        self._wanted.set()

    def clear(self) -> None:
        """Forget what was asked for."""
        self._wanted.clear()
        self.signalled = False

    def check(self) -> None:
        """Raise `Interrupted` if an end is wanted."""
        if self.signalled or self._wanted.is_set():
            raise Interrupted

    @contextmanager
    def raising(self, allowed: bool) -> Iterator[None]:
        """Let Ctrl-C interrupt the body anywhere, or note it."""
        if allowed or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
